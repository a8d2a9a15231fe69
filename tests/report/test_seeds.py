"""One seed, two, three: what is drawn of each."""

import re

from clplat.report.compare import Estimate
from clplat.report.data import seeds_curve
from clplat.report.plots import draw
from clplat.report.spec import Bar, Bars, Figure, Lines, Point, Scatter
from clplat.report.svg import render, y_axis

CURVES = [[[0, 0.2], [1, 0.4]], [[0, 0.6], [1, 0.5]], [[0, 0.9], [1, 1.0]]]


def panels(n):
    line = seeds_curve(0, "er", CURVES[:n], (0, 1))
    value = Estimate(n, 0.5, 0.1, *((0.4, 0.6) if n > 2 else (None, None)), (0.45, 0.55) if n == 2 else ())
    return line, [Lines("t", "x", "y", [line]), Bars("b", [Bar(0, "er", value)], "fraction"),
                  Scatter("s", "x", "y", [Point(0, "er", value, value)])]  # fmt: skip


def test_one_seed_is_a_line():
    line, drawn = panels(1)
    svg = render(drawn[0], "alt")
    assert line.low == [None, None]
    assert svg.count("<polyline") == 1
    assert "band" not in svg


def test_two_seeds_are_drawn_themselves_and_have_no_band():
    line, drawn = panels(2)
    assert line.y == [0.4, 0.45]
    assert line.seeds == [[(0.0, 0.2), (1.0, 0.4)], [(0.0, 0.6), (1.0, 0.5)]]
    svg = render(drawn[0], "alt")
    assert svg.count('class="line seed"') == 2
    assert "band" not in svg
    axis = y_axis(drawn[0])
    assert axis[0] <= 0.2
    assert axis[-1] >= 0.6
    assert render(drawn[1], "alt").count('class="whisker"') == 2
    assert ">0.500 (0.450, 0.550)<" in render(drawn[1], "alt")
    assert render(drawn[2], "alt").count('<g class="seed">') == 2
    assert draw(Figure("f", "f", "", "", drawn))["png"].startswith(b"\x89PNG")


def test_three_seeds_have_a_band_within_the_range_of_the_metric():
    line, drawn = panels(3)
    assert line.seeds == []
    assert line.high == [1, 1]
    assert min(line.low) >= 0
    svg = render(drawn[0], "alt")
    assert "seed" not in svg
    assert len(re.findall('class="band"', svg)) == 1


def test_a_line_of_one_experience_has_its_number_once_on_the_axis():
    svg = render(Lines("t", "x", "y", [seeds_curve(0, "er", [[[4, 0.2]]], (0, 1))], y_range=(0, 1)), "alt")
    assert re.findall(r">([3-5])</text>", svg) == ["4"]
