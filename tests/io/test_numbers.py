"""Numbers in terminals and on pages."""

from __future__ import annotations

import math

import pytest

from casa_train.io import numbers as numbers_text
from casa_train.io.numbers import MISSING


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (999, "999"),
        (999.6, "1k"),
        (1250, "1.25k"),
        (2.5e6, "2.5M"),
        (999_999, "1M"),
        (-3e4, "-30k"),
        (1.234e22, "12.3Z"),
    ],
)
def test_large_numbers_are_short(value: float, shown: str) -> None:
    assert numbers_text.short(value) == shown


def test_ticks_keep_a_fourth_digit() -> None:
    assert numbers_text.short(12_250, 4) == "12.25k"


def test_prefixes_stand_before_units() -> None:
    assert numbers_text.with_unit(4.193e21, "FLOP") == "4.19 ZFLOP"
    assert numbers_text.with_unit(999.7e9, "FLOP/s") == "1 TFLOP/s"  # not 1e+03 GFLOP/s
    assert numbers_text.with_unit(12, "FLOP") == "12 FLOP"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (2.5e-6, "2.5 us"),
        (0.0023, "2.3 ms"),
        (0.9999, "1 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (3580, "59 min 40 s"),
        (3599.6, "1 h 0 min"),
        (3 * 3600 + 61, "3 h 1 min"),
        (1e7, "115 d 17 h"),
        (math.nan, MISSING),
    ],
)
def test_durations_have_two_units(seconds: float, shown: str) -> None:
    assert numbers_text.duration(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (1e-4, "1e-4"), (0.00015, "1.5e-4"), (9.999e-5, "1e-4"), (2, "2e0")],
)
def test_rates_are_written_as_powers(value: float, shown: str) -> None:
    assert numbers_text.rate(value) == shown


@pytest.mark.parametrize(
    ("size", "shown"),
    [(61 << 30, "61 GiB"), (1.5 * 2**20, "1.5 MiB"), (2**30 - 1, "1 GiB"), (512, "0.5 KiB")],
)
def test_memory_is_written_in_the_unit_that_fits(size: float, shown: str) -> None:
    assert numbers_text.memory(size) == shown


def test_shares_that_are_not_known_are_missing() -> None:
    assert numbers_text.percent(0.1234) == "12.3 %"
    assert numbers_text.percent(None) == numbers_text.percent(math.nan) == MISSING
    assert numbers_text.significant(math.inf, 3) == MISSING
    assert numbers_text.significant(0.123456, 4) == "0.1235"


def test_nouns_are_counted() -> None:
    assert numbers_text.count(1, "rank") == "1 rank"
    assert numbers_text.count(1024, "rank") == "1,024 ranks"
