"""Whether a run that goes on may have another value of a field, written beside the field.

`Annotated[int, FREE]`, `Annotated[int, Kept(why)]` and `Annotated[int, Changeable(why)]` stand in
the dataclasses of the configuration, ADDED beside what came later. A field without a mark may
differ if `checkpoint.resume_allow` names it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from casa_train.config.bounds import Resume, leaves


class Free(Resume):
    """It may differ: no part of the run's fingerprint."""


class Changeable(Resume):
    """It may differ if `checkpoint.resume_allow` names it."""


class Kept(Resume):
    """A run that has a checkpoint keeps it, whatever `checkpoint.resume_allow` names."""


class Added(Resume):
    """It came when runs had begun without it: at its default it is no part of their fingerprint, so
    that they go on. Another value may follow if `checkpoint.resume_allow` names it.
    """


FREE = Free("it changes nothing of what the run computes")
ADDED = Added("runs that began without it have its default")


@functools.cache
def marks(root: type) -> Mapping[str, Resume]:
    """Every mark below a dataclass by the dotted name that it stands beside, `*` standing for any
    key. That of a section holds for all fields in it, whatever stands beside them.
    """
    return {".".join(leaf.marked): leaf.resume for leaf in leaves(root) if leaf.resume is not None}


def matches(pattern: str, name: str) -> bool:
    """Whether a dotted name is, or lies below, what a pattern names."""
    return _expression(pattern).match(name) is not None


@functools.cache
def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"[^.]+") + r"(\.|$)")
