"""What `--benchmarks` is asked for, and of which export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from casa_train.errors import UserError
from casa_train.io.files import EXPORT_MARKER
from casa_train.run.layout import EXPORT


@dataclass(frozen=True)
class Request:
    """What the command is asked for.

    :param export: an export; :param names: of benchmarks, in the order of `BENCHMARKS`.
    :param source: a folder of local copies; None: the hub.
    :param out: gets the answers and the results.
    :param samples: questions of each benchmark; None: all.
    :param image_size: of the processor; None: the protocol's, or else the export's own limit.
    :param dtype: of the parameters; None: that of the files.
    """

    export: Path
    names: Sequence[str]
    protocol: str
    source: Path | None
    out: Path
    samples: int | None
    batch_size: int
    image_size: int | None = None
    dtype: str | None = None


def export_of(place: Path) -> Path:
    """An export, or that of a run.

    :raises UserError: neither.
    """
    for path in (place, place / EXPORT):
        if (path / EXPORT_MARKER).is_file():
            return path
    raise UserError(
        f"{place} is no export and holds none; expected a directory with {EXPORT_MARKER}. Write "
        f"one with 'python -m casa_train.export {place} --out {place / EXPORT}'."
    )


def default_out(export: Path, protocol: str) -> Path:
    """Beside the export, a folder for each protocol: figures of two do not compare."""
    ending = "" if protocol == "casa" else f"_{protocol}"
    # `.` and `..` name no place beside them.
    place = export if export.name not in ("", "..") else export.resolve()
    return place.with_name(f"{export.resolve().name}_benchmarks{ending}")
