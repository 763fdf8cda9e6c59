"""A sink that may break without breaking the run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from casa_train.metrics.sinks.base import Record, Sink


class Guarded:
    """Another sink, switched off with one warning when it fails in any way.

    :param open_sink: makes the sink; this may fail, too.
    :param warn: prints the warning.
    """

    def __init__(
        self, name: str, open_sink: Callable[[], Sink], warn: Callable[[str], None]
    ) -> None:
        self.name, self.warn = name, warn
        self.sink: Sink | None = None
        self._try(lambda: setattr(self, "sink", open_sink()))

    def write(self, record: Record) -> None:
        if self.sink is not None:
            self._try(self.sink.write, record)

    def validated(self, record: Record) -> None:
        if self.sink is not None:
            self._try(self.sink.validated, record)

    def log(self, line: str) -> None:
        if self.sink is not None:
            self._try(self.sink.log, line)

    def close(self) -> None:
        sink, self.sink = self.sink, None
        if sink is not None:
            self._try(sink.close)

    def _try(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:  # whatever a service or its library may think of
            broken, self.sink = self.sink, None
            with contextlib.suppress(Exception):
                said = " ".join(str(error).split())  # some libraries write pages
                said = said if len(said) <= 300 else said[:300] + "..."
                self.warn(
                    f"{self.name} is switched off until the next start: "
                    f"{type(error).__name__}: {said}; training goes on"
                )
            if broken is not None:
                with contextlib.suppress(Exception):
                    broken.close()
