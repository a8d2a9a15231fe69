"""What a figure shows, apart from how it is drawn: `svg` draws it into the page, `plots` into files for papers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clplat.report.compare import Estimate

Values = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """A line of one group: y over x, with its 95 % band where there are three seeds or more.

    Args:
        seeds: lines of two seeds, each as (x, y), which have no band.
    """

    group: int
    label: str
    x: Sequence[float]
    y: Values
    low: Values
    high: Values
    seeds: Sequence[Sequence[tuple[float, float]]] = ()


@dataclass(frozen=True)
class Lines:
    """Lines over a shared axis.

    Args:
        unit: of y, as `numbers.show` takes it.
        y_range: (lowest, highest); None fits the data.
        whole: whether x is a count of experiences, so that ticks are whole numbers.
        marks: x positions of thin vertical lines, where an experience ends or the shown one was trained.
        mark_label: what stands beside the first of them.
        levels: (y, label) of thin horizontal lines.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    unit: str = "fraction"
    y_range: tuple[float, float] | None = None
    whole: bool = True
    marks: Sequence[float] = ()
    mark_label: str = ""
    levels: Sequence[tuple[float, str]] = ()


@dataclass(frozen=True)
class Heat:
    """Scores in [0, 1] as a grid; `values[row][column]`, None where not measured.

    Args:
        group: that it is of; None: of all.
        accuracy: an accuracy matrix, whose rows are times and whose columns are test sets; else errors.
    """

    title: str
    group: int | None
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[Estimate]]
    accuracy: bool = True


@dataclass(frozen=True)
class Point:
    """A group in a scatter plot, with intervals both ways."""

    group: int
    label: str
    x: Estimate
    y: Estimate


@dataclass(frozen=True)
class Scatter:
    """One quantity against another.

    Args:
        x_unit: of x, as `numbers.show` takes it.
        y_unit: of y.
        path: points of a thin line in the first group's colour, a front, say.
    """

    title: str
    x_label: str
    y_label: str
    points: Sequence[Point]
    x_unit: str = "fraction"
    y_unit: str = "fraction"
    path: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Bar:
    """One bar of a group, with its interval."""

    group: int
    label: str
    value: Estimate


@dataclass(frozen=True)
class Bars:
    """Horizontal bars from zero, one for each group.

    Args:
        ends: write both ends of an interval, which need not lie evenly about the value.
    """

    title: str
    bars: Sequence[Bar]
    unit: str
    ends: bool = False


@dataclass(frozen=True)
class Ranks:
    """Mean ranks of strategies, best first: a critical-difference diagram.

    Args:
        means: in [1, number of strategies], increasing.
        alike: first and last position of each row that a bar joins: those not told apart.
        length: the critical difference, shown as a scale; None where nothing is told apart by it.
    """

    title: str
    names: Sequence[str]
    means: Sequence[float]
    alike: Sequence[tuple[int, int]]
    length: float | None


Panel = Lines | Heat | Scatter | Bars | Ranks


@dataclass(frozen=True)
class Figure:
    """Panels that belong together.

    Args:
        slug: file name without ending.
        caption: how to read it, in a sentence or two.
        alt: what it shows, in words, for those who do not see it.
    """

    slug: str
    title: str
    caption: str
    alt: str
    panels: Sequence[Panel]
