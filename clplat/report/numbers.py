"""Numbers as people read them: units, intervals, ticks of axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from clplat.report.compare import Estimate

NONE = "–"
_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BINARY = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_WHOLE = ("trainable_parameters", "train_flops")
_NUMBERS = ("effective_rank", "weight_norm", "gradient_norm")


def unit_of(name: str) -> str:
    """Unit of a metric or cost, from its name: fraction, seconds, bytes, rate, count or number."""
    for ending, unit in (("_seconds", "seconds"), ("_bytes", "bytes"), ("_per_second", "rate")):
        if name.endswith(ending):
            return unit
    if name in _WHOLE:
        return "count"
    return "number" if name in _NUMBERS or "perplexity" in name else "fraction"


def show(value: float | None, unit: str = "fraction") -> str:
    """A number with its unit, three significant digits or three decimals; a dash for None."""
    return show_estimate(Estimate(1, value), unit)


def show_estimate(value: Estimate, unit: str = "fraction") -> str:
    """Mean ± half the 95 % interval, in one unit and to one decimal; the mean alone for one seed or equal values.

    An interval that was cut at the end of a range is given by both ends: 0.975 [0.925, 1.000]. Of two seeds, which have
    none, both stand in brackets: 0.620 (0.550, 0.690).
    """
    if value.mean is None:
        return NONE
    scale, suffix = _scale(abs(value.mean), unit)
    form = _form(value.mean / scale, unit)
    text = format(value.mean / scale, form)
    if form == ".3f" and float(text) == 0:
        text = "0.000"  # without the sign of a small negative number
    ends = ", ".join(format(v / scale, form) for v in value.seeds or (value.low, value.high) if v is not None)
    spread = ""
    if value.seeds and len(set(value.seeds)) > 1:
        spread = f" ({ends})"
    elif value.half_width is not None:
        spread = f" ± {format(value.half_width / scale, form)}" if value.half_width else ""
    elif value.low is not None:
        spread = f" [{ends}]"
    return (text + spread + suffix).replace("-", "−")


def show_p(p: float | None) -> str:
    """A p-value, with its sign of comparison."""
    if p is None:
        return NONE
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers that cover [low, high], its ends included."""
    if not high - low > 1e-300:  # below that, powers of ten underflow
        low, high = min(low, 0.0), max(2 * low, 0.0)
    if not high - low > 1e-300:
        low, high = 0.0, 1.0
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def tick_labels(values: Sequence[float], unit: str = "fraction") -> list[str]:
    """Labels of an axis: one unit, one number of decimals."""
    scale, suffix = _scale(max(map(abs, values)), unit)
    scaled = [round(v / scale, 12) for v in values]
    if max(map(abs, scaled)) >= 1e6:
        return [f"{v:.1e}" for v in scaled]
    decimals = max(len(f"{v:.6g}".partition(".")[2]) for v in scaled[1:-1] or scaled)
    return [(f"{v:.{min(decimals, 4)}f}" if v else "0").replace("-", "−") + suffix for v in scaled]


def _scale(size: float, unit: str) -> tuple[float, str]:
    if unit == "seconds":
        return next(((s, f" {n}") for s, n in ((3600, "h"), (60, "min")) if size >= 2 * s), (1, " s"))
    if unit == "bytes":
        return next(((s, f" {n}") for s, n in _BINARY if size >= s), (1, " B"))
    end = "/s" if unit == "rate" else ""
    if unit in ("rate", "count"):
        return next(((s, f" {n}{end}") for s, n in _SI if size >= s), (1, end and f" {end}".replace(" /", "/")))
    return 1, ""


def _form(value: float, unit: str) -> str:
    """Format of a number: three decimals for a fraction, else three significant digits."""
    if unit == "fraction":
        return ".3f"
    size = abs(value)
    if unit in ("count", "bytes") and value == int(value) and size < 10000:
        return ".0f"
    if size == 0 or 1e-3 <= size < 1e5:
        return f".{max(0, 2 - math.floor(math.log10(size))) if size else 0}f"
    return ".1e"
