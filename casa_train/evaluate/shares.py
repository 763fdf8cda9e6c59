"""Which held-out samples are taken: even shares of the sources, evenly over each, always the same.

Validations and `evaluate` choose alike. Everything is read off the index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from casa_train.data.prepared.shards import Split
from casa_train.data.schemas.video_rows import LIVE

K = TypeVar("K", str, tuple[str, str])
Groups = dict[tuple[str, str], np.ndarray]
"""By split and what its rows call their source, those rows."""


def by_source(splits: Mapping[str, Split], rows: Mapping[str, np.ndarray]) -> Groups:
    """Rows of splits by their sources.

    :param rows: by split, ascending.
    """
    groups: Groups = {}
    for name, split in splits.items():
        families = split.index.column("source").to_numpy()[rows[name]]
        groups |= {(name, f): rows[name][families == f] for f in sorted(set(families))}
    return groups


def source_labels(found: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Names of sources, given splits and what their rows call their sources.

    A split of one source has its own name, as in training. The sources of others have theirs, with
    the split in front where two splits would share it.
    """
    many = [split for split, _ in found if sum(split == other for other, _ in found) > 1]
    labels = {(split, own): own if split in many else split for split, own in found}
    taken = list(labels.values())
    return {
        key: "/".join(key) if key[0] in many and taken.count(label) > 1 else label
        for key, label in labels.items()
    }


def spread(groups: Mapping[K, Sequence[int] | np.ndarray], total: int) -> dict[K, list[int]]:
    """At most `total` members of all groups together, in even shares, evenly over each group.

    What a small group cannot give, others do.
    """
    chosen: dict[K, list[int]] = {}
    names = sorted(groups, key=lambda name: (len(groups[name]), name))
    for i, name in enumerate(names):
        members = groups[name]
        count = min(len(members), total // (len(names) - i))
        total -= count
        chosen[name] = [int(members[k * len(members) // count]) for k in range(count)]
    return {name: chosen[name] for name in groups}


def show_image(split: Split, rows: np.ndarray, last: bool = False) -> np.ndarray:
    """Those of the rows that ask about an image in their first turn.

    The frames of live captions stand in the answer, and nothing is asked about them.

    :param last: the last turn is asked, about images that it or any turn before it shows.
    """
    if split.meta["schema"] == LIVE:
        return rows[:0]
    turns, offsets = split.list_column("image_turns")
    shown: np.ndarray = rows[offsets[rows] < offsets[rows + 1]]
    if last:
        return shown
    first: np.ndarray = shown[turns[offsets[shown]] == 0]
    return first
