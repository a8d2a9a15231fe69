"""Several runs side by side: grouping, means with intervals, and paired tests. Imports no torch.

What is computed, and why
    Interval   Student's t over seeds, n - 1 degrees of freedom: mean ± t(0.975, n - 1) · sd / √n, with sd the sample
               standard deviation (divisor n - 1), cut at the ends of a metric's range, beyond which no mean can lie.
               Fewer than three seeds have none: with two, t(0.975, 1) = 12.7, and it would say nothing but that.
    Pairing    Runs of equal seed share initialisation, data order and class order, so two groups are compared by the
               differences within seeds; what a seed makes easy or hard for both cancels.
    Test       Paired t-test (two-sided), the test that agrees with the interval of the mean difference. Beside it the
               sign-flip permutation test (Fisher, The Design of Experiments, 1935, section 21), which assumes only
               that differences are symmetric about zero under the null hypothesis. With n seeds its p-value cannot be
               below 2 / 2^n (0.0625 for 5 seeds), so it checks the t-test and does not replace it. Neither is made
               of fewer than three shared seeds: a variance from one degree of freedom tells nothing. Wilcoxon's signed
               ranks have the same floor and discard the sizes of the differences.
    Several    Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979) over the comparisons of one
               metric in one stream. Valid under any dependence.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import stdtr, stdtrit

from clplat.config.settings import flat
from clplat.errors import UserError
from clplat.report.naming import labels, own_name, short_name
from clplat.run.seal import seal_faults

if TYPE_CHECKING:
    from clplat.metrics.catalogue import MetricInfo

HEADLINE = ("average_accuracy", "forgetting", "plasticity", "stability", "train_seconds")

# What two runs may differ in and still be repetitions of one another.
_NOT_COMPARED = ("seed", "name", "output", "data_root", "tracking", "audit")
# Seeds that an interval or a test needs.
FEWEST = 3
# Beyond this many pairs, sign flips are drawn and not enumerated.
_EXACT_PAIRS = 16
_DRAWS = 99_999

Bounds = tuple[float | None, float | None]


@dataclass(frozen=True)
class Estimate:
    """Mean over n seeds with its 95 % interval; None where n is too small for it.

    Args:
        seeds: the values themselves, where there are several but too few for an interval.
    """

    n: int
    mean: float | None = None
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: tuple[float, ...] = ()

    @property
    def half_width(self) -> float | None:
        """Half of the interval's width: what stands after ±; None where there is none or it was cut at one end."""
        if self.mean is None or self.low is None or self.high is None:
            return None
        below, above = self.mean - self.low, self.high - self.mean
        return (below + above) / 2 if math.isclose(below, above, rel_tol=1e-6, abs_tol=1e-12) else None


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ only in their seed.

    Args:
        label: unique within a stream: the key under `runs:` or else the strategy and, where needed, the options that
            set it apart.
        stream: label of the stream, unique within a report; says so where figures are of validation data.
        runs: summaries of all its runs, as given.
        counted: those that enter means: one per seed, complete ones only if there is any complete one.
    """

    label: str
    strategy: str
    stream: str
    backbone: str
    runs: tuple[dict[str, Any], ...]
    counted: tuple[dict[str, Any], ...]

    def values(self, metric: str) -> dict[Any, float]:
        """Seed → value of `metric`, over counted runs that have measured it."""
        found = {run.get("seed"): value_of(run, metric) for run in self.counted}
        return {seed: value for seed, value in found.items() if value is not None}

    def estimate(self, metric: str) -> Estimate:
        """Mean and interval of `metric` over seeds."""
        return estimate(self.values(metric).values(), bounds_of(metric))


@dataclass(frozen=True)
class Comparison:
    """Mean of (first - second) over n shared seeds; p-values are two-sided, None with a `reason` if there is none."""

    first: str
    second: str
    metric: str
    difference: Estimate
    p_value: float | None
    p_permutation: float | None
    p_holm: float | None = None
    reason: str | None = None


def load_summaries(run_dirs: Iterable[Path | str]) -> list[dict[str, Any]]:
    """summary.json of each run directory, with `config` (from config.yaml) and `run_dir` added.

    A run that was killed before it wrote a summary, but has a config.yaml, counts as interrupted with nothing measured.

    Raises:
        UserError: a directory that is no run directory, or a file in it that cannot be read; all faults at once.
    """
    found: list[dict[str, Any]] = []
    faults: list[str] = []
    for folder in map(Path, run_dirs):
        faults += seal_faults(folder)
        try:
            found.append(_load_summary(folder))
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError(*faults)
    return found


def _load_summary(folder: Path) -> dict[str, Any]:
    import yaml

    summary_file, config_file = folder / "summary.json", folder / "config.yaml"
    try:
        config = yaml.safe_load(config_file.read_text()) if config_file.exists() else {}
        summary = json.loads(summary_file.read_text()) if summary_file.exists() else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: cannot be read ({why})") from error
    if config_file.exists() and not isinstance(config, dict):
        raise UserError(f"{config_file}: not a configuration (valid: keys and values, as a run writes it)")
    if summary is None and not config:
        raise UserError(f"{folder}: no summary.json and no config.yaml (valid: a run directory, or several)")
    if summary is None:
        names = {part: (config.get(part) or {}).get("name") for part in ("strategy", "stream", "backbone")}
        summary = {**names, "seed": config.get("seed"), "status": "interrupted", "metrics": {}, "experiences": []}
    if not isinstance(summary, dict):
        raise UserError(f"{summary_file}: not a summary (valid: a JSON object)")
    return {**summary, "config": config, "run_dir": str(folder), "start": start_of(config)}


def start_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """Configuration and seed of the run whose folder `start.run` names, and its start in turn; None where it can't be
    read: then its path tells it from others."""
    import yaml

    file = Path(str((config.get("start") or {}).get("run"))) / "config.yaml"
    try:
        own = yaml.safe_load(file.read_text()) if file.is_file() else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    return {"config": own, "seed": own.get("seed"), "start": start_of(own)} if isinstance(own, dict) else None


def value_of(summary: dict[str, Any], metric: str) -> float | None:
    """A metric or cost of one run by name, or None where it was not measured or is not finite."""
    for part in ("metrics", "cost"):
        value = (summary.get(part) or {}).get(metric)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    return None


def metric_names(summaries: Iterable[dict[str, Any]], part: str = "metrics") -> list[str]:
    """Names in `part` ("metrics" or "cost") of any run, in the order met."""
    return list(dict.fromkeys(name for run in summaries for name in (run.get(part) or {})))


def split_streams(summaries: Sequence[dict[str, Any]]) -> list[list[Group]]:
    """Groups of runs, one list per stream: numbers from different streams (or options of one) do not compare.

    What makes a stream: its name, its options apart from the seed, the split evaluated on, its kinds in order.
    """
    streams: dict[str, dict[str, list[dict[str, Any]]]] = {}
    facts: dict[str, tuple[str, dict[str, Any]]] = {}
    for run in summaries:
        config = _comparable(run)
        kinds = [e.get("kind") for e in run.get("experiences") or []]
        # A run without its experiences (killed early) belongs with the others of the same configuration.
        own = {"stream": run.get("stream"), **(config.get("stream") or {})} if config else {"kinds": kinds}
        parts = [run.get("stream"), config.get("stream"), evaluated_on(run), None if config else kinds]
        stream = json.dumps(parts, sort_keys=True, default=str)
        name = short_name(run.get("stream")) + (" on validation data" if evaluated_on(run) == "valid" else "")
        facts[stream] = name, flat(own)
        group = json.dumps([run.get("strategy"), run.get("backbone"), config], sort_keys=True, default=str)
        streams.setdefault(stream, {}).setdefault(group, []).append(run)
    named = labels([name for name, _ in facts.values()], [own for _, own in facts.values()])
    return [
        _labelled([part for runs in groups.values() for part in _by_own_name(runs)], label)
        for label, groups in zip(named, streams.values(), strict=True)
    ]


def evaluated_on(run: dict[str, Any]) -> str | None:
    """test, or valid for a run whose figures are of validation data; None where its configuration does not say."""
    return ((run.get("config") or {}).get("loop") or {}).get("evaluate_on")


def aggregate(summaries: Sequence[dict[str, Any]]) -> dict[Group, dict[str, Estimate]]:
    """For each group of runs and each metric and cost: n, mean, sd and 95 % interval (Student's t) over seeds."""
    names = metric_names(summaries) + metric_names(summaries, "cost")
    groups = [group for groups in split_streams(summaries) for group in groups]
    return {group: {name: group.estimate(name) for name in names} for group in groups}


def _comparable(run: dict[str, Any]) -> dict[str, Any]:
    """The run's configuration without what may differ between repetitions."""
    given = {"merge": {"name": "none"}} | own if (own := run.get("config")) else {}  # of before there was this key
    config = {k: v for k, v in given.items() if k not in _NOT_COMPARED}
    for part in ("strategy", "stream", "backbone", "head"):
        options = config.get(part)
        if isinstance(options, dict) and options.get("seed") in (None, run.get("seed")):
            config[part] = {k: v for k, v in options.items() if k != "seed"}
    start = run.get("start")
    if start is not None and start["seed"] == run.get("seed"):  # each repetition starts from one of its own seed
        own = json.dumps(_comparable(start), sort_keys=True, default=str)
        name = start["config"].get("name") or (start["config"].get("strategy") or {}).get("name")
        config["start"] = {**config["start"], "run": f"{name} {hashlib.sha256(own.encode()).hexdigest()[:6]}"}
    return config


def _labelled(members: list[list[dict[str, Any]]], stream: str) -> list[Group]:
    configs = [_comparable(runs[0]) for runs in members]
    strategies = [short_name(runs[0].get("strategy")) for runs in members]
    names = [_own_name(runs) or strategy for runs, strategy in zip(members, strategies, strict=True)]
    facts = [flat({**c, "backbone.name": runs[0].get("backbone")}) for c, runs in zip(configs, members, strict=True)]
    return [
        Group(label, strategy, stream, short_name(runs[0].get("backbone")), tuple(runs), _counted(runs))
        for label, strategy, runs in zip(labels(names, facts), strategies, members, strict=True)
    ]


def _own_name(runs: Sequence[dict[str, Any]]) -> str | None:
    """The key under `runs:` of the first of these that has one."""
    return next((name for run in runs if (name := own_name(run.get("config") or {}))), None)


def _by_own_name(runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Runs of equal configuration apart by their keys under `runs:`; those without go with the first."""
    named: dict[str | None, list[dict[str, Any]]] = {}
    first = _own_name(runs)
    for run in runs:
        named.setdefault(own_name(run.get("config") or {}) or first, []).append(run)
    return list(named.values())


def _counted(runs: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    complete = [run for run in runs if run.get("status") == "complete"]
    last = {run.get("seed", id(run)): run for run in (complete or runs)}
    return tuple(last[seed] for seed in sorted(last, key=lambda s: (not isinstance(s, int), str(s).zfill(20))))


def estimate(values: Iterable[float | None], bounds: Bounds = (None, None), confidence: float = 0.95) -> Estimate:
    """Mean, sample standard deviation and Student-t interval of `values`; None among them are left out.

    Args:
        values: one per seed.
        bounds: of what is measured, which the interval does not pass.
        confidence: of the interval, in (0, 1).
    """
    kept = np.array([v for v in values if v is not None], dtype=float)
    n = len(kept)
    if n == 0:
        return Estimate(0)
    mean = float(kept.mean())
    if n == 1:
        return Estimate(1, mean)
    sd = float(kept.std(ddof=1))
    if n < FEWEST:
        return Estimate(n, mean, sd, seeds=tuple(kept.tolist()))
    half = _quantile(n - 1, (1 + confidence) / 2) * sd / math.sqrt(n)
    low, high = (-math.inf if bounds[0] is None else bounds[0]), (math.inf if bounds[1] is None else bounds[1])
    return Estimate(n, mean, sd, min(mean, max(low, mean - half)), max(mean, min(high, mean + half)))


@functools.cache
def _quantile(freedom: int, probability: float) -> float:
    """Of Student's t."""
    return float(stdtrit(freedom, probability))


def t_test(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of the one-sample t-test of mean zero; None for fewer than 2 or for equal non-zero values."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return None
    if not values.any():
        return 1.0
    error = values.std(ddof=1) / math.sqrt(len(values))
    # Equal up to rounding: the variance is that of the arithmetic, not of the experiment.
    if error <= 1e-12 * abs(values).max():
        return None
    return float(2 * stdtr(len(values) - 1, -abs(values.mean() / error)))


def sign_flip_test(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of the sign-flip permutation test of mean zero; None without differences.

    Enumerates all 2^n sign patterns for n ≤ 16; beyond, 99 999 patterns from a fixed seed and the observed one, with
    p = (hits + 1) / 100 000.
    """
    values = np.asarray(differences, dtype=float)
    n = len(values)
    if n == 0:
        return None
    observed = abs(values.sum())
    tolerance = 1e-12 * max(abs(values).sum(), 1e-300)
    if n <= _EXACT_PAIRS:
        sums = np.zeros(1)
        for value in values:
            sums = np.concatenate([sums + value, sums - value])
        return float((abs(sums) >= observed - tolerance).mean())
    generator = np.random.default_rng(0)
    signs = generator.integers(0, 2, size=(_DRAWS, n), dtype=np.int8) * 2 - 1
    hits = int((abs(signs @ values) >= observed - tolerance).sum())
    return (hits + 1) / (_DRAWS + 1)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm-corrected p-values in the order given; None stays None and is not counted as a comparison."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[i] = largest
    return corrected


def paired(first: Group, second: Group, metric: str) -> Comparison:
    """Compare two groups of one stream by the differences (first - second) over the seeds they share."""
    one, two = first.values(metric), second.values(metric)
    differences = [one[seed] - two[seed] for seed in one if seed in two]
    enough, (low, high) = len(differences) >= FEWEST, bounds_of(metric)
    p_value, flips = (t_test(differences), sign_flip_test(differences)) if enough else (None, None)
    reason = None
    if not enough:
        plural = "" if len(differences) == 1 else "s"
        reason = f"{len(differences)} shared seed{plural}, and a paired test needs {FEWEST} or more"
    elif p_value is None:
        reason = "all differences are equal: there is no variance to test against"
    widest = None if low is None or high is None else high - low
    difference = estimate(differences, (None if widest is None else -widest, widest))
    return Comparison(first.label, second.label, metric, difference, p_value, flips, reason=reason)


def against_best(groups: Sequence[Group], metric: str) -> list[Comparison]:
    """The group with the best mean against each other one, Holm-corrected; [] if fewer than two have measured it.

    The best is chosen by the same data, so a p-value here is a guard against noise and not a planned test.
    """
    means = {group: mean for group in groups if (mean := group.estimate(metric).mean) is not None}
    if len(means) < 2:
        return []
    sign = 1 if higher_is_better(metric) is not False else -1
    best = max(means, key=lambda group: sign * means[group])
    results = [paired(best, other, metric) for other in means if other is not best]
    corrected = holm([result.p_value for result in results])
    return [replace(result, p_holm=p) for result, p in zip(results, corrected, strict=True)]


def metric_info(metric: str) -> MetricInfo | None:
    """Catalogue entry of a metric, or None for a name that the catalogue does not have."""
    from clplat.metrics.catalogue import METRICS

    return METRICS.get(metric)


def bounds_of(metric: str) -> Bounds:
    """Least and greatest possible value; None where there is no bound, or the name is unknown."""
    info = metric_info(metric)
    return (None, None) if info is None else (info.lowest, info.highest)


def higher_is_better(metric: str) -> bool | None:
    """Direction of a metric or cost; None where neither direction is better, or for an unknown name."""
    info = metric_info(metric)
    return None if info is None else info.higher_is_better
