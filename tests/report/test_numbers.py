"""Numbers as people read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clplat.report.compare import Estimate
from clplat.report.numbers import show, show_estimate, show_p, tick_labels, ticks, unit_of


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (None, "fraction", "–"), (0.87349, "fraction", "0.873"), (-0.0001, "fraction", "0.000"),
        (-0.25, "fraction", "−0.250"), (61.234, "seconds", "61.2 s"), (7250.0, "seconds", "2.01 h"),
        (0.0314, "seconds", "0.0314 s"), (627200, "bytes", "612 KiB"), (0, "bytes", "0 B"), (118282, "count", "118 k"),
        (84, "count", "84"), (3.2e9, "rate", "3.20 G/s"), (12.0, "rate", "12.0/s"), (1e-7, "number", "1.0e−07"),
    ],
)  # fmt: skip
def test_show(value, unit, expected):
    assert show(value, unit) == expected


def test_estimates_share_unit_and_decimals():
    assert show_estimate(Estimate(5, 8.88, 0.3, 8.46, 9.30), "seconds") == "8.88 ± 0.42 s"
    assert show_estimate(Estimate(1, 0.5)) == "0.500"
    assert show_estimate(Estimate(5, 1024, 0.0, 1024, 1024), "bytes") == "1 KiB"


def test_p_values():
    assert [show_p(p) for p in (None, 0.0004, 0.0625)] == ["–", "p < 0.001", "p = 0.062"]


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_cover_the_range(low, size):
    found = ticks(low, low + size)
    assert 2 <= len(found) <= 9
    assert found == sorted(found)
    assert found[0] <= low + 1e-6 * (1 + abs(low) + size)
    assert found[-1] >= low + size - 1e-6 * (1 + abs(low) + size)
    assert len(tick_labels(found)) == len(found)


def test_tick_labels_share_decimals():
    assert tick_labels([0, 0.25, 0.5, 0.75, 1.0]) == ["0", "0.25", "0.50", "0.75", "1.00"]


def test_units_come_from_names():
    names = ("train_seconds", "stored_bytes", "samples_per_second", "train_flops", "h_mean", "weight_norm")
    assert [unit_of(n) for n in names] == ["seconds", "bytes", "rate", "count", "fraction", "number"]
