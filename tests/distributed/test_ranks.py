"""What ranks tell each other: one that fails takes the others along, and the first one speaks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from casa_train.distributed.ranks import Ranks
from casa_train.errors import UserError


class Among(Ranks):
    """One of two ranks; what the other one gathers is given."""

    other: Any = None

    def gather(self, value: Any) -> Sequence[Any]:
        return [value, self.other] if self.first else [self.other, value]


def fail() -> None:
    raise UserError("no room")


def test_a_rank_alone_agrees_with_itself() -> None:
    lines: list[str] = []
    alone = Ranks(out=lines.append)
    alone.log("one", "two")
    assert lines == ["one", "two"]
    assert alone.gather("x") == ["x"] and alone.broadcast("x") == "x"
    assert alone.gather_rows([1.5, 2.0]) == [[1.5, 2.0]] and alone.sum([1.5]) == [1.5]
    assert alone.agree(lambda: 7) == 7 and alone.first_does(lambda: 7) == 7
    alone.barrier()
    with pytest.raises(UserError, match="^no room$"):
        alone.agree(fail)


def test_who_fails_is_named_and_nobody_goes_on_alone() -> None:
    first, second = Among(0, 2), Among(1, 2)
    with pytest.raises(UserError, match="^rank 1: no room$"):
        second.agree(fail)  # the first one had no trouble
    object.__setattr__(first, "other", "no room")
    with pytest.raises(UserError, match="^rank 1: no room$"):
        first.agree(lambda: 7)
    object.__setattr__(second, "other", "no room")
    with pytest.raises(UserError, match="^no room$"):  # all have it: nobody is named
        second.agree(fail)


def test_the_first_rank_alone_works_and_speaks() -> None:
    lines: list[str] = []
    second = Among(1, 2, out=lines.append)
    second.log("hidden")
    assert second.first_does(fail) is None and lines == []  # it is the first one's to do
    object.__setattr__(second, "other", "no room")
    with pytest.raises(UserError, match="^no room$"):
        second.first_does(lambda: 7)
