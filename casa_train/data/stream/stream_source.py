"""What a stream reads: published subsets, their files, and the order of their row groups."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np

from casa_train.data.mixture import Mixture, SourceSize
from casa_train.data.stream.row_groups import ParquetFile


@dataclass(frozen=True)
class StreamSource:
    """One subset of a published dataset: its files and their row groups.

    :param schema: name in `SCHEMAS`; :param subset: stands in for a source that rows do not name.
    :param repeats: passes that count as one epoch.
    """

    schema: str
    subset: str
    files: tuple[ParquetFile, ...]
    repeats: int = 1
    # (row groups, 3): number of the file, of the row group in it, and of its first row in the file.
    row_groups: np.ndarray = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        groups = [
            (number, group, sum(file.rows[:group]))
            for number, file in enumerate(self.files)
            for group, rows in enumerate(file.rows)
            if rows
        ]
        object.__setattr__(self, "row_groups", np.array(groups, np.int64).reshape(-1, 3))

    @property
    def rows(self) -> int:
        return sum(sum(file.rows) for file in self.files)

    @property
    def fingerprint(self) -> str:
        """Identifies the data: names and footers of the files, not where they lie."""
        names = "".join(f"{PurePosixPath(f.url).name} {f.digest}\n" for f in self.files)
        return hashlib.sha256(names.encode()).hexdigest()

    def rows_of(self, row_group: int) -> int:
        """Rows of a row group, by its number among those of all files."""
        file, number, _ = self.row_groups[row_group]
        return int(self.files[file].rows[number])


def row_group_mixture(sources: Mapping[str, StreamSource], seed: int) -> Mixture:
    """The order in which row groups are dealt to lanes; lanes of a process share one."""
    sizes = {n: SourceSize(len(s.row_groups), repeats=s.repeats) for n, s in sources.items()}
    return Mixture(sizes, seed)
