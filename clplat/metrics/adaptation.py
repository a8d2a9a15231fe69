"""Metrics of adapting to unlabelled data and of acting: online error, returns, the dip on going online."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clplat.metrics.matrix import _mean


def online_error(correct: Sequence[float], seen: Sequence[int]) -> float:
    """Error of predictions made as the data arrive, mean over experiences; in [0, 1], lower is better.

        e = (1 / D) Σ_d (1 − correct_d / seen_d)

    Unweighted over the D adapt experiences, as benchmarks report it (15 corruptions of equal size, say).

    Source: Wang et al., "CoTTA", CVPR 2022, arXiv:2203.13591; Döbler et al., "RMT", CVPR 2023, arXiv:2211.13081.

    Args:
        correct: sum of scores of the predictions in each experience, in [0, seen].
        seen: samples predicted in each experience, > 0.

    >>> online_error([8, 5], [10, 10])
    0.35
    """
    return _mean(1 - right / total for right, total in zip(correct, seen, strict=True))


@dataclass(frozen=True)
class ReturnCurve:
    """Returns of one interact experience.

    Args:
        random: mean return of the random policy.
        expert: mean return of the expert, > `random`.
        before: mean return on entry, before the first step in the environment; None if not measured.
        steps: environment steps at each evaluation, increasing, > 0.
        returns: mean return at each evaluation.
    """

    random: float
    expert: float
    before: float | None
    steps: Sequence[int]
    returns: Sequence[float]

    def normalized(self, value: float) -> float:
        """(value − random) / (expert − random)."""
        return (value - self.random) / (self.expert - self.random)


def normalized_return(curves: Sequence[ReturnCurve]) -> float:
    """Last return of each experience between the random policy's (0) and the expert's (1), averaged; higher is better.

        S = (G − G_random) / (G_expert − G_random)

    Not clipped: below 0 is worse than random, above 1 better than the expert.

    Source: Fu et al., "D4RL", 2020, arXiv:2004.07219 (there times 100).

    >>> normalized_return([ReturnCurve(0, 200, 100, [10, 20], [60, 150])])
    0.75
    """
    return _mean(c.normalized(c.returns[-1]) for c in curves)


def initial_dip(curves: Sequence[ReturnCurve]) -> float:
    """Largest loss of return below that on entry, in the first half of each experience, averaged; lower is better.

        dip = max(0, S_before − min_{t ≤ T/2} S_t)     S normalised returns, T the last step evaluated

    0 where the return never falls below that on entry. Not bounded by 1: S is not. Returns are estimates, so a dip
    within their spread is none. Evaluations further apart than the dip is wide miss it.

    Source: the drop at the switch to online learning in Zhou et al., "WSRL", ICLR 2025, arXiv:2412.07762, who plot it;
    the window of half the experience is this platform's.

    >>> initial_dip([ReturnCurve(0, 100, 80, [10, 20, 30, 40], [30, 90, 95, 20])])
    0.5
    """
    return _mean(_dip(c) for c in curves)


def recovery_fraction(curves: Sequence[ReturnCurve]) -> float:
    """Share of each experience gone before the return is back at that on entry, averaged; in [0, 1], lower is better.

        t_r / T,   t_r the first evaluation after the lowest point of the first half with S ≥ S_before

    0 where there is no dip, 1 where it is not made good by the last evaluation T (the true time is then longer).

    Source: recovery after the switch to online learning in Zhou et al., "WSRL", ICLR 2025, arXiv:2412.07762; the
    number is this platform's.

    >>> recovery_fraction([ReturnCurve(0, 100, 80, [10, 20, 30, 40], [30, 70, 95, 20])])
    0.75
    """
    return _mean(_recovery(c) for c in curves)


def dip_area(curves: Sequence[ReturnCurve]) -> float:
    """Loss of return below that on entry, over the whole of each experience, averaged; lower is better.

        (1 / T) ∫_0^T max(0, S_before − S_t) dt     by the trapezoidal rule, S_0 = S_before

    Depth times length, where `initial_dip` is the depth. 0 where the return never falls below that on entry.

    Source: the drop at the switch to online learning in Zhou et al., "WSRL", ICLR 2025, arXiv:2412.07762; the area is
    this platform's.

    >>> dip_area([ReturnCurve(0, 100, 100, [10, 20], [50, 100])])
    0.25
    """
    return _mean(_area(c) for c in curves)


def steps_to_score(curves: Sequence[ReturnCurve], score: float = 0.9) -> float:
    """Environment steps to the first evaluation with a normalised return of `score`, averaged; NaN if ever not met.

    0 where the return on entry is there already.

    >>> steps_to_score([ReturnCurve(0, 100, 10, [10, 20, 30], [50, 95, 80])])
    20.0
    """
    met = [_steps_to(c, score) for c in curves]
    return float("nan") if None in met else _mean(float(t) for t in met if t is not None)


def _area(curve: ReturnCurve) -> float:
    if curve.before is None:
        return float("nan")
    start = curve.normalized(curve.before)
    below = [0.0, *(max(0.0, start - curve.normalized(g)) for g in curve.returns)]
    times = [0, *curve.steps]
    pieces = zip(below, below[1:], times, times[1:], strict=False)
    return sum((a + b) / 2 * (t - s) for a, b, s, t in pieces) / times[-1] if times[-1] else 0.0


def _steps_to(curve: ReturnCurve, score: float) -> int | None:
    if curve.before is not None and curve.normalized(curve.before) >= score:
        return 0
    met = (t for t, g in zip(curve.steps, curve.returns, strict=True) if curve.normalized(g) >= score)
    return next(met, None)


def _early(curve: ReturnCurve) -> list[int]:
    """Positions of the evaluations in the first half of the experience; at least the first."""
    return [k for k, t in enumerate(curve.steps) if 2 * t <= curve.steps[-1]] or [0]


def _dip(curve: ReturnCurve) -> float:
    if curve.before is None:
        return float("nan")
    lowest = min(curve.normalized(curve.returns[k]) for k in _early(curve))
    return max(0.0, curve.normalized(curve.before) - lowest)


def _recovery(curve: ReturnCurve) -> float:
    if curve.before is None:
        return float("nan")
    steps = recovery_steps(curve)
    return 1.0 if steps is None else steps / max(1, curve.steps[-1])


def recovery_steps(curve: ReturnCurve) -> int | None:
    """Environment steps to the first evaluation after the lowest one of the first half that is as good as on entry.

    0 where there is no dip, None where the return does not come back.

    >>> recovery_steps(ReturnCurve(0, 100, 80, [10, 20, 30, 40], [30, 70, 95, 20]))
    30
    """
    if curve.before is None:
        return None
    lowest = min(_early(curve), key=lambda k: curve.returns[k])
    if curve.returns[lowest] >= curve.before:
        return 0
    later = zip(curve.steps[lowest:], curve.returns[lowest:], strict=True)
    return next((t for t, g in later if g >= curve.before), None)
