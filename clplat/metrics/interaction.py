"""Interact experiences one by one, as `summary.json` holds them: the curve, the dip after the hand-over, the probe."""

from __future__ import annotations

from typing import Any

from clplat.metrics.adaptation import ReturnCurve, dip_area, initial_dip, recovery_steps
from clplat.metrics.record import RunRecord


def table(record: RunRecord) -> list[dict[str, Any]] | None:
    """What `summary.json` holds under `interaction`, an entry for each experience that has ended; None without any.

    Each is {"experience": its name, "return_bounds": (random, expert) or None, "before": return on entry or None,
    "evaluations": [[env_step, return], ...], "probe": [{"env_step", "q", "td_error", ...}, ...], "dip": see `dip`};
    of several environments also "after": {name of an experience: mean return in its environment when this one ended}.
    """
    found = []
    for entry in record.returns:
        e = record.experiences[entry["experience"]]
        curve = {k: entry[k] for k in ("before", "evaluations")} | {"probe": entry.get("probe", [])}
        bounds = None if e.return_bounds is None else list(e.return_bounds)
        measured = dip(e.return_bounds, entry["before"], entry["evaluations"])
        after = {record.experiences[int(j)].name: g for j, g in entry.get("after", {}).items()}
        found.append({"experience": e.name, "return_bounds": bounds, **curve, "dip": measured}
                     | ({"after": after} if after else {}))  # fmt: skip
    return found or None


def dip(
    bounds: tuple[float, float] | None, before: float | None, evaluations: list[list[float]]
) -> dict[str, float | None] | None:
    """Depth, length and area of what is lost after the hand-over; None where the return on entry, or any, is unknown.

    "depth" and "area" are `initial_dip` and `dip_area` of this one experience: of normalised returns with `bounds`,
    else of returns as they are. "steps" are steps in the environment until the return is back at that on entry, 0
    where it never fell below it, None where it did not come back.

    >>> dip(None, 80.0, [[10, 30.0], [20, 90.0], [30, 95.0]])
    {'depth': 50.0, 'steps': 20, 'area': 16.666666666666668}
    """
    if before is None or not evaluations:
        return None
    low, high = bounds or (0.0, 1.0)
    steps, returns = zip(*evaluations, strict=True)
    curve = ReturnCurve(low, high, before, steps, returns)
    return {"depth": initial_dip([curve]), "steps": recovery_steps(curve), "area": dip_area([curve])}
