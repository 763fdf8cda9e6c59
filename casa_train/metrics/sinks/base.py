"""What takes the records of a run."""

from __future__ import annotations

from typing import Any, Protocol

Record = dict[str, Any]


class Sink(Protocol):
    """Takes one record a step, and one of each validation after its step."""

    def write(self, record: Record) -> None: ...

    def validated(self, record: Record) -> None: ...

    def log(self, line: str) -> None: ...

    def close(self) -> None: ...
