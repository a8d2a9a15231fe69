"""The `sweep:` section of a configuration, checked: what is searched, where, and by which measure.

```yaml
sweep:
  metric: average_accuracy      # any of `clplat list metrics`
  direction: maximize           # or minimize; default: what is better of this metric
  trials: 20                    # in the whole study
  sampler: auto                 # auto, tpe, gp, random
  seeds: [0, 1]                 # of each trial; the metric is their mean
  study: er-digits              # default: the name of the file
  storage: /shared/study.log    # a journal file, or a database URL; default: in the study's folder
  grace_seconds: 300            # without a sign of life after which a worker counts as dead
  space:
    strategy.lr: {low: 1e-4, high: 1e-1, log: true}
    strategy.memory: {low: 50, high: 500, step: 50}     # both ends whole numbers: an int
    strategy.optimizer: {choices: [sgd, adam]}
```
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clplat.errors import UserError

_KEYS = ("metric", "direction", "trials", "sampler", "seeds", "study", "storage", "grace_seconds", "space")
_VALID = {"direction": ("maximize", "minimize"), "sampler": ("auto", "tpe", "gp", "random")}
_PARTS = ("strategy", "stream", "backbone", "head")


@dataclass(frozen=True)
class Span:
    """The values of one key: either choices, or a range from low to high, both included."""

    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None

    def ends(self) -> list[Any]:
        """All choices, or both ends."""
        return list(self.choices) if self.choices else [self.low, self.high]

    def distribution(self) -> Any:
        """As Optuna has it."""
        from optuna import distributions as d

        if self.choices:
            return d.CategoricalDistribution(self.choices)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return d.IntDistribution(self.low, self.high, log=self.log, step=int(self.step or 1))
        return d.FloatDistribution(self.low, self.high, log=self.log, step=self.step)


@dataclass
class Plan:
    """A sweep.

    Args:
        base: the run configuration without its `sweep:` section.
        folder: of the study.
    """

    base: dict[str, Any]
    study: str
    folder: Path
    space: dict[str, Span]
    storage: str
    seeds: list[int]
    metric: str = "average_accuracy"
    direction: Literal["maximize", "minimize"] = "maximize"
    trials: int = 20
    sampler: str = "auto"
    grace_seconds: float = 300.0
    keys: list[str] = field(default_factory=list)

    @property
    def seed(self) -> int:
        """Of the sampler, where one worker works alone."""
        return self.seeds[0]

    def distributions(self) -> dict[str, Any]:
        """Key → Optuna's distribution."""
        return {key: span.distribution() for key, span in self.space.items()}

    def config(self, params: Mapping[str, Any], seed: int, folder: str) -> dict[str, Any]:
        """Configuration of one trial under one seed: always on validation data."""
        name = f"{self.study}-{folder}"
        fixed = {"loop.evaluate_on": "valid", "seed": seed, "name": name, "tracking.tags.sweep": self.study}
        config = nested(self.base, {**params, **fixed})
        config.pop("seeds", None)
        return config

    def identity(self) -> str:
        """What two workers must agree on."""
        space = {key: repr(span) for key, span in self.space.items()}
        return json.dumps([self.base, self.keys, space, self.metric, self.direction, self.seeds], sort_keys=True)


def nested(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `base` with dotted keys set; a part given by its name alone becomes {name: ...}."""
    config = copy.deepcopy(dict(base))
    for key, value in values.items():
        if key in config and "." in key:
            config[key] = value
            continue
        *path, last = key.split(".")
        node = config
        for part in path:
            inner = node.get(part)
            if isinstance(inner, str) and part in _PARTS:
                inner = {"name": inner}
            if not isinstance(inner, dict | None):
                raise UserError(f"{part}: {inner!r} is not a mapping of keys to values, which {key} needs")
            node[part] = inner = {} if inner is None else inner
            node = inner
        if not path and last in _PARTS and isinstance(node.get(last), dict):
            node[last] = {"name": value}  # another part: the old one's options do not fit it
        else:
            node[last] = value
    return config


def read_plan(config: str | Path, keys: Sequence[str], trials: int | None) -> Plan:
    """The plan of a configuration file.

    Raises:
        UserError: one line for each fault.
    """
    from clplat.config.resolve import find_config, read_yaml

    path = find_config(config)
    base = read_yaml(path)
    given = base.pop("sweep", None)
    if not isinstance(given, dict) or not given:
        raise UserError(f"sweep: {path} has no `sweep:` section (metric, trials, space)")
    given = {**given, **({"trials": trials} if trials is not None else {})}
    faults = [f"sweep.{key}: no such key (valid: {', '.join(_KEYS)})" for key in given if key not in _KEYS]
    flags = _flags(keys)
    faults += _leaks(base, flags)
    space = _space(given.get("space"), flags, faults)
    values = {k: v for k, v in given.items() if k in _KEYS and k not in ("space", "seeds", "study", "storage")}
    _check_values(values, faults)
    seeds = given.get("seeds", [base.get("seed", 0)])
    if not (isinstance(seeds, list) and seeds and all(type(s) is int and s >= 0 for s in seeds)):
        faults.append(f"sweep.seeds: {seeds!r} is not a list of integers ≥ 0")
    elif len(set(seeds)) < len(seeds):
        faults.append(f"sweep.seeds: {seeds} names a seed twice")
    for key in ("study", "storage"):
        if key in given and not (isinstance(given[key], str) and given[key].strip()):
            faults.append(f"sweep.{key}: {given[key]!r} is not a name (valid: text)")
    if faults:
        raise UserError(*faults)
    study = str(given.get("study", path.stem))
    folder = (Path(flags.get("output") or base.get("output") or "runs") / study).absolute()
    storage = str(given.get("storage") or folder / "study.log")
    return Plan(base, study, folder, space, storage, seeds, keys=list(keys), **values)


def _flags(keys: Sequence[str]) -> dict[str, str]:
    """`--key value` and `--key=value`; values only matter for a few keys here."""
    found = {}
    for token, following in itertools.zip_longest(keys, keys[1:], fillvalue=""):
        if token.startswith("--"):
            key, equals, value = token[2:].partition("=")
            found[key] = value if equals else following
    return found


def _leaks(base: Mapping[str, Any], flags: Mapping[str, str]) -> list[str]:
    """A search on test data is refused, wherever it is asked for."""
    loop = base.get("loop") if isinstance(base.get("loop"), dict) else {}
    asked = {base.get("loop.evaluate_on"), (loop or {}).get("evaluate_on"), flags.get("loop.evaluate_on")}
    if asked - {None, "valid"}:
        return ["loop.evaluate_on: 'test' would choose hyper-parameters on test labels (valid: valid)"]
    return []


def _check_values(values: dict[str, Any], faults: list[str]) -> None:
    for key, valid in _VALID.items():
        if key in values and values[key] not in valid:
            faults.append(f"sweep.{key}: {values[key]!r} is not valid (valid: {', '.join(valid)})")
    count = values.get("trials", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        faults.append(f"sweep.trials: {count!r} is out of range (valid: ≥ 1)")
    if "grace_seconds" in values:
        number = _number(values["grace_seconds"])
        if number is None or number <= 0:
            faults.append(f"sweep.grace_seconds: {values['grace_seconds']!r} is out of range (valid: > 0)")
        else:
            values["grace_seconds"] = number
    _check_metric(values, faults)


def _check_metric(values: dict[str, Any], faults: list[str]) -> None:
    """The metric must be one of a run as a whole, and the direction its better one, which is also the default."""
    from clplat.config.discovery import did_you_mean
    from clplat.metrics.catalogue import METRICS

    metric = values.get("metric", Plan.metric)
    own = [name for name, info in METRICS.items() if info.group == "metrics"]
    if not isinstance(metric, str):
        faults.append(f"sweep.metric: {metric!r} is not the name of one metric (valid: see `clplat list metrics`)")
    elif metric not in own:
        what = f"{metric!r} is no figure of a whole run" if metric in METRICS else f"no metric {metric!r}"
        near = did_you_mean(metric, own) or " (valid: see `clplat list metrics`)"
        faults.append(f"sweep.metric: {what}{near}")
    elif METRICS[metric].higher_is_better is not None:
        better = "maximize" if METRICS[metric].higher_is_better else "minimize"
        if values.setdefault("direction", better) in _VALID["direction"] and values["direction"] != better:
            faults.append(f"sweep.direction: {values['direction']} would choose the worst {metric} (valid: {better})")


def _space(given: Any, flags: Mapping[str, str], faults: list[str]) -> dict[str, Span]:
    if not isinstance(given, dict) or not given:
        faults.append("sweep.space: is empty (give keys with {low, high} or {choices})")
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
            span = _span(where, entry, faults)
            if span is not None:
                space[str(key)] = span
    return space


def _span(where: str, entry: dict[str, Any], faults: list[str]) -> Span | None:
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
    low, high, step = (_number(entry.get(k)) for k in ("low", "high", "step"))
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


def _number(value: Any) -> int | float | None:
    """A finite number; YAML reads 1e-4, without a dot, as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return None
    return number if math.isfinite(number) else None
