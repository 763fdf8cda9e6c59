"""Numbers and texts as the page writes them."""

from __future__ import annotations

import math
from typing import Any

LONGEST_TEXT = 600  # characters of a question or an answer that are shown
MISSING = "–"


def percent(share: float | None) -> str:
    return MISSING if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def width(share: float | None) -> str:
    """A share as a CSS width."""
    if share is None or not math.isfinite(share):
        return "0%"
    return f"{100 * min(max(share, 0.0), 1.0):.1f}%"


def number(value: float, digits: int, unit: str = "") -> str:
    return f"{value:.{digits}g}{unit}" if math.isfinite(value) else MISSING


def large(value: float) -> str:
    """1,234 as 1.2k, and so on."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{round(value / size, 1):g}{unit}"
    return f"{value:g}"


def with_unit(value: float, unit: str) -> tuple[str, str]:
    """1.234e12 FLOP/s as 1.23 and TFLOP/s."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}", prefix + unit
    return f"{value:.3g}", unit


def memory_unit(value: float) -> tuple[int, str]:
    """Bytes of the unit in which so many bytes are written, and its name."""
    sizes = ((2**30, "GiB"), (2**20, "MiB"))
    return next((unit for unit in sizes if value >= 0.9995 * unit[0]), (2**10, "KiB"))


def memory(value: float) -> str:
    """Bytes in the unit that fits, three digits."""
    size, unit = memory_unit(value)
    return f"{float(f'{value / size:.3g}'):g} {unit}"


def power(value: float) -> str:
    """0.00015 as 1.5e-4: no padded exponents, no row of zeros."""
    if value <= 0:
        return "0"
    exponent = math.floor(math.log10(value) + 1e-9)
    return f"{round(value / 10.0**exponent, 2):g}e{exponent}"


def duration(seconds: float) -> str:
    """Days to seconds, in the two largest that matter."""
    sizes = (("d", 86400), ("h", 3600), ("min", 60))
    for i, (unit, size) in enumerate(sizes):
        if seconds >= size:
            whole, rest = divmod(seconds, size)
            smaller, divisor = (*sizes, ("s", 1))[i + 1]
            return f"{whole:.0f} {unit} {rest // divisor:.0f} {smaller}"
    return f"{seconds:.3g} s"


def short(value: Any) -> str:
    text = str(value).strip()
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"
