"""Filtering turns by rating from the index alone, so that a plan knows lengths unread.

`sample.filter_turns` does the same to a sample that was read.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from casa_train.data.prepared.shards import Split
from casa_train.data.sample import RATINGS
from casa_train.errors import UserError


def kept_turns(split: Split, minimum: Mapping[str, int]) -> np.ndarray:
    """(turns,) bool over all turns of the split, in the order of `split.list_column`.

    A turn that is not rated stays.

    :param minimum: by name of the rating the least one, 1 to 5.
    :raises UserError: a name that is no rating.
    """
    keep = np.ones(len(split.list_column("user_tokens")[0]), dtype=bool)
    for name, least in minimum.items():
        if name not in RATINGS:
            raise UserError(
                f"data.ratings.{name} is no rating; expected one of {', '.join(RATINGS)}."
            )
        values = split.turn_ratings(name)[0]
        keep &= (values == 0) | (values >= least)
    return keep


def kept_images(split: Split, turns: np.ndarray) -> np.ndarray:
    """(images,) bool over all images of the split, for the (turns,) bool that are kept.

    The images of a dropped turn move to the next kept turn of its sample if that shows none of its
    own.
    """
    _, turn_offsets = split.list_column("user_tokens")
    shown_in, image_offsets = split.list_column("image_turns")
    sample = np.repeat(np.arange(len(split)), np.diff(image_offsets))
    turn = turn_offsets[sample] + shown_in  # each image's turn, counted over the whole split
    return carry_images(turn, turns, turn_offsets[sample + 1])[1]


def carry_images(
    turn: np.ndarray, turns: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which turn shows an image once some turns are dropped, and whether one does.

    :param turn: (images,) the turn that shows each image.
    :param turns: (turns,) bool, those that are kept.
    :param ends: (images,) where the turns of the image's sample end.
    """
    pictured = np.zeros(len(turns), dtype=bool)
    pictured[turn] = True
    # For each turn, the first kept one at or after it.
    position = np.where(turns, np.arange(len(turns)), len(turns))
    following = np.minimum.accumulate(position[::-1])[::-1]
    target = following[turn] if len(turns) else turn
    inside = target < ends
    bare = np.zeros(len(turn), dtype=bool)
    bare[inside] = ~pictured[target[inside]]
    kept: np.ndarray = turns[turn] | (inside & bare)
    return target, kept
