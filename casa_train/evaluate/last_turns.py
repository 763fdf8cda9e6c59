"""Which samples still end with their own last turn once ratings and budgets have had their say.

Read off the index, as the plan of a training reads it.
"""

from __future__ import annotations

import copy

import numpy as np

from casa_train.data.budget import Budget
from casa_train.data.fit import NEVER, Fit
from casa_train.data.prepared.ratings import kept_turns


def keep_their_last_turn(fit: Fit, rows: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Those of the rows whose last turn is neither rated out nor cut off.

    The frames of a video may be fewer or smaller, and a live answer, one turn, may end early.

    :param rows: samples that fit a pack, (rows,) int64.
    :param text: (samples,) their text tokens then, as `Fit.lengths` has them.
    """
    offsets = fit.split.list_column("user_tokens")[1].astype(np.int64)
    kept = kept_turns(fit.split, fit.ratings)
    rows = rows[kept[offsets[rows + 1] - 1]]
    unbound = copy.copy(fit)
    unbound.budget = Budget(int(NEVER) - 1, int(NEVER) - 1)
    shortened = text[rows] < unbound.lengths(len(text))[0][rows]
    before = np.concatenate([[0], np.cumsum(kept)])
    turns = before[offsets[rows + 1]] - before[offsets[rows]]
    stays = [
        not short or ((cut := fit.cut(int(row))) is not None and cut.turns == count)
        for row, short, count in zip(rows, shortened, turns, strict=True)
    ]
    found: np.ndarray = rows[np.array(stays, bool)]
    return found
