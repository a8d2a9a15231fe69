"""What is searched: keys of a configuration, each with choices or a range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Span:
    """The values of one key: either choices, or a range from low to high, both included."""

    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None

    def __str__(self) -> str:
        if self.choices:
            return " | ".join("null" if c is None else str(c) for c in self.choices)
        how = " (log)" if self.log else f" by {self.step:g}" if self.step else ""
        return f"{self.low:g} to {self.high:g}{how}"

    def ends(self) -> list[Any]:
        """All choices, or both ends."""
        return list(self.choices) if self.choices else [self.low, self.high]

    def values(self) -> list[Any] | None:
        """All values, where they can be counted."""
        if self.choices:
            return list(self.choices)
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        if self.step is None and not (whole and not self.log):
            return None
        step = self.step or 1
        return [self.low + i * step for i in range(round((self.high - self.low) / step) + 1)]

    def holds(self, value: Any) -> bool:
        """Whether a value is one of these."""
        if self.choices:
            return repr(value) in map(repr, self.choices)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        values = self.values()
        whole = isinstance(value, int) or not (isinstance(self.low, int) and isinstance(self.high, int))
        return self.low <= value <= self.high and whole and (values is None or any(math.isclose(value, v, abs_tol=1e-12)
                                                                                   for v in values))  # fmt: skip

    def distribution(self) -> Any:
        """As Optuna has it."""
        from optuna import distributions as d

        if self.choices:
            return d.CategoricalDistribution(self.choices)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return d.IntDistribution(self.low, self.high, log=self.log, step=int(self.step or 1))
        return d.FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def suggest(self, trial: Any, key: str) -> Any:
        """The value that a trial has of it, drawn if it has none."""
        if self.choices:
            return trial.suggest_categorical(key, self.choices)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(key, self.low, self.high, log=self.log, step=int(self.step or 1))
        return trial.suggest_float(key, self.low, self.high, log=self.log, step=self.step)


def read_space(given: Any, flags: Mapping[str, str], faults: list[str]) -> dict[str, Span]:
    """The spans of a `space:`; adds a line to `faults` for each that is none."""
    if not isinstance(given, dict) or not given:
        what = f"{given!r} is not a mapping" if given else "is empty"
        faults.append(f"sweep.space: {what} (give keys with {{low, high}} or {{choices}})")
        return {}
    space = {}
    for key, entry in given.items():
        where, group = f"sweep.space.{key}", str(key).partition(".")[0]
        if key in ("loop.evaluate_on", "seed", "seeds") or group in (
            "stream",
            "output",
            "tracking",
            "audit",
            "data_root",
        ):
            faults.append(f"{where}: is not searched (another world or seed is no better setting)")
        elif key in flags:
            faults.append(f"{where}: is searched, so --{key} has no effect (leave one of them out)")
        elif not isinstance(entry, dict):
            faults.append(f"{where}: {entry!r} is not {{low: ..., high: ...}} or {{choices: [...]}}")
        else:
            span = read_span(where, entry, faults)
            if span is not None:
                space[str(key)] = span
    return space


def read_span(where: str, entry: dict[str, Any], faults: list[str]) -> Span | None:
    """A range or choices as written; None, and a line in `faults` for each, where it is neither."""
    before = len(faults)
    allowed = ("choices",) if "choices" in entry else ("low", "high", "log", "step")
    faults += [f"{where}.{k}: no such key (valid: {', '.join(allowed)})" for k in entry if k not in allowed]
    if "choices" in entry:
        choices = entry["choices"]
        plain = (type(None), bool, int, float, str)
        if not (isinstance(choices, list) and choices and all(isinstance(c, plain) for c in choices)):
            faults.append(f"{where}.choices: {choices!r} is not a list of plain values (valid: one or more)")
        elif len({repr(c) for c in choices}) < len(choices):
            faults.append(f"{where}.choices: {choices!r} names a value twice")
        return Span(choices=tuple(choices)) if len(faults) == before else None
    low, high, step = (finite(entry.get(k)) for k in ("low", "high", "step"))
    log = entry.get("log", False)
    for name, number in (("low", low), ("high", high), ("step", step)):
        if number is None and (name != "step" or entry.get("step") is not None):
            faults.append(f"{where}.{name}: {entry.get(name)!r} is not a number")
    if not isinstance(log, bool):
        faults.append(f"{where}.log: {log!r} is not true or false")
    if len(faults) > before or low is None or high is None:
        return None
    if low >= high:
        faults.append(f"{where}: low {low} is not below high {high}")
    if log and low <= 0:
        faults.append(f"{where}.low: {low} is out of range (valid with log: > 0)")
    if log and step is not None:
        faults.append(f"{where}.step: has no meaning with log")
    elif step is not None and low < high:
        faults += _step_faults(where, low, high, step)
    return Span(low=low, high=high, log=log, step=step) if len(faults) == before else None


def _step_faults(where: str, low: float, high: float, step: float) -> list[str]:
    """Optuna would cut the range to whole steps, and a step of integers to its integer part."""
    whole = isinstance(low, int) and isinstance(high, int)
    if not 0 < step <= high - low or (whole and step != int(step)):
        return [f"{where}.step: {step} is out of range (valid: {'whole, ' if whole else ''}> 0, ≤ {high - low:g})"]
    count = (high - low) / step
    if abs(count - round(count)) > 1e-8 * count:
        return [f"{where}.step: {step} does not lead from {low} to {high} (valid: a whole fraction of {high - low:g})"]
    return []


def finite(value: Any) -> int | float | None:
    """A finite number; YAML reads 1e-4, without a dot, as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return None
    return number if math.isfinite(number) else None
