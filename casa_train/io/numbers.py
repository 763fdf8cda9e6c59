"""How numbers read in terminals, logs and pages: one way each."""

from __future__ import annotations

import math

MISSING = "–"
MIB, GIB = 2**20, 2**30  # bytes
PREFIXES = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
DURATIONS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def count(number: int, noun: str) -> str:
    """1 rank, 1,024 ranks."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def percent(share: float | None) -> str:
    """0.123 as 12.3 %."""
    return MISSING if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def significant(value: float, digits: int) -> str:
    """So many digits, without a prefix."""
    return f"{value:.{digits}g}" if math.isfinite(value) else MISSING


def prefixed(value: float, digits: int = 3) -> tuple[str, str]:
    """1.234e12 as 1.23 and T; below a thousand there is no prefix."""
    value = float(f"{value:.{digits}g}")  # first, so that 999,999 is 1M and not 1000k
    for size, prefix in PREFIXES:
        if abs(value) >= size:
            return f"{float(f'{value / size:.{digits}g}'):g}", prefix
    return f"{value:g}", ""


def short(value: float, digits: int = 3) -> str:
    """1,234,567 as 1.23M."""
    return "".join(prefixed(value, digits))


def with_unit(value: float, unit: str) -> str:
    """1.234e12 FLOP as 1.23 TFLOP."""
    number, prefix = prefixed(value)
    return f"{number} {prefix}{unit}"


def memory_unit(value: float) -> tuple[int, str]:
    """Bytes of the unit in which so many bytes are written, and its name."""
    sizes = ((GIB, "GiB"), (MIB, "MiB"))
    return next((unit for unit in sizes if value >= 0.9995 * unit[0]), (2**10, "KiB"))


def memory(value: float) -> str:
    """Bytes in the unit that fits, three digits."""
    size, unit = memory_unit(value)
    return f"{float(f'{value / size:.3g}'):g} {unit}"


def rate(value: float) -> str:
    """0.00015 as 1.5e-4: no padded exponents, no row of zeros."""
    if value <= 0:
        return "0"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def duration(seconds: float) -> str:
    """The two largest of days, hours, minutes and seconds; three digits of less than a minute."""
    if not math.isfinite(seconds):
        return MISSING
    rounded = float(f"{seconds:.3g}")
    if rounded < 60:
        units = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
        size, unit = next((u for u in units if rounded >= u[0]), units[0])
        return f"{float(f'{rounded / size:.3g}'):g} {unit}"
    whole = round(seconds)
    longer, shorter = next(
        pair for pair in zip(DURATIONS, DURATIONS[1:], strict=False) if whole >= pair[0][0]
    )
    number, rest = divmod(whole, longer[0])
    return f"{number} {longer[1]} {rest // shorter[0]} {shorter[1]}"
