"""The pictures of questions that a page shows, also of benchmarks that earlier commands asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from casa_train.errors import UserError
from casa_train.evaluate.benchmarks.reading import Benchmark, read_benchmark
from casa_train.modeling.image_sources import ImageError


class PictureSource:
    """Pictures by benchmark and row.

    :param read: the benchmarks of this command; :param source: where others are read from.
    """

    def __init__(self, read: Mapping[str, Benchmark], source: Path | None) -> None:
        self._read: dict[str, Benchmark | UserError] = dict(read)
        self._source = source
        self._index: dict[str, dict[int, int]] = {}

    def picture(self, name: str, row: int, question: str) -> bytes:
        """A question's picture, as its file.

        :param question: its text, by which another release of the data set is noticed.
        :raises ImageError: there is none, or the data set is no longer where it was.
        """
        if name not in self._read:
            try:
                self._read[name] = read_benchmark(name, self._source)
            except UserError as error:
                self._read[name] = error
        benchmark = self._read[name]
        if isinstance(benchmark, UserError):
            raise ImageError("missing_image", str(benchmark))
        if name not in self._index:
            self._index[name] = {row: index for index, row in enumerate(benchmark.rows)}
        index = self._index[name].get(row)
        if index is None or benchmark.questions[index].text != question:
            raise ImageError("missing_image", f"{benchmark.place} holds another question there")
        return benchmark.picture(index)
