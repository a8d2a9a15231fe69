"""The `sweep:` section of a configuration, checked: what is searched, where, and by which measure.

```yaml
sweep:
  metric: average_accuracy      # any of `clplat list metrics` that is one number a run; or two: [plasticity, stability]
  direction: maximize           # or minimize; default: what is better of this metric; two for two
  choose: balanced              # of two: which point of the front best.yaml is: balanced, or the best by one of them
  trials: 20                    # in the whole study
  sampler: auto                 # auto, tpe, gp, nsgaii, random, grid
  pruner: none                  # after each experience, of one metric: hyperband, successive_halving, median
  seeds: [0, 1]                 # of each trial; the metric is their mean
  give_up: median               # leave out the seeds of a trial that falls behind the median of the others; or never
  held_out: [10, 11]            # seeds that the default and the best are measured on at the end; default: none
  protocol: end_of_stream       # on which data: see `protocol.py`
  study: er-digits              # default: the name of the file
  storage: /shared/study.log    # a journal file, or a database URL; default: in the study's folder
  grace_seconds: 300            # without a sign of life after which a worker on another machine counts as dead
  space:                        # default: what the strategy declares (`Strategy.searched`)
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
from typing import Any

import yaml

from clplat.config import discovery
from clplat.config.settings import flat
from clplat.errors import UserError
from clplat.metrics.catalogue import METRICS
from clplat.sweep.objectives import BALANCED, read_choice, read_objectives
from clplat.sweep.protocol import Protocol, read_protocol
from clplat.sweep.ranges import spans
from clplat.sweep.space import Span, finite, read_space

_KEYS = ("metric", "direction", "choose", "trials", "sampler", "pruner", "seeds", "give_up", "held_out", "protocol",
         "study", "storage", "grace_seconds", "space")  # fmt: skip
PRUNERS = ("none", "hyperband", "successive_halving", "median")
GIVE_UP = ("median", "never")
SAMPLERS = ("auto", "tpe", "gp", "nsgaii", "random", "grid")
_PARTS = ("strategy", "stream", "backbone", "head", "merge")
_SEARCHED = ("strategy", "backbone", "head", "merge", "loop", "fabric", "start")


@dataclass
class Plan:
    """A sweep.

    Args:
        base: the run configuration without its `sweep:` section.
        folder: of the study.
        metrics: one or two.
        directions: of each, maximize or minimize.
        give_up: median: a trial that falls behind it is spared its remaining seeds; never.
        held_out: seeds that nothing is chosen by, on which the default and the best are measured at the end.
        choose: of two, which point of the front is taken for the best: `balanced`, or the name of one.
    """

    base: dict[str, Any]
    study: str
    folder: Path
    space: dict[str, Span]
    storage: str
    seeds: list[int]
    metrics: list[str]
    directions: list[str]
    choose: str = BALANCED
    trials: int = 20
    sampler: str = "auto"
    grace_seconds: float = 300.0
    keys: list[str] = field(default_factory=list)
    protocol: Protocol = field(default_factory=Protocol)
    give_up: str = "median"
    pruner: str = "none"
    held_out: list[int] = field(default_factory=list)

    @property
    def seed(self) -> int:
        """Of the sampler, where one worker works alone."""
        return self.seeds[0]

    @property
    def devices(self) -> int:
        """That each run computes on; 0 where that is searched."""
        key = "fabric.devices"
        return 0 if key in self.space else int(flat(self.base).get(key, 1))

    def config(self, params: Mapping[str, Any], seed: int, folder: str, stream: Any = None) -> dict[str, Any]:
        """Configuration of one trial under one seed, on one of the protocol's streams: always on validation data."""
        name = f"{self.study}-{folder}"
        objectives = " ".join(map(":".join, zip(self.metrics, self.directions, strict=True)))
        fixed = {"loop.evaluate_on": "valid", "seed": seed, "name": name, "tracking.tags.sweep": self.study,
                 "tracking.tags.sweep_objectives": objectives,
                 "tracking.tags.sweep_protocol": str(self.protocol)}  # fmt: skip
        settings = self.protocol.settings(stream)
        base = self.base if stream is None else {k: v for k, v in self.base.items() if k.partition(".")[0] != "stream"}
        config = nested(base, {**params, **fixed, **settings})
        config.pop("seeds", None)
        return config

    @property
    def runs_per_seed(self) -> int:
        """Streams of the protocol."""
        return max(1, len(self.protocol.streams))

    def cells(self, seeds: Sequence[int] | None = None) -> list[tuple[Any, int, Path]]:
        """What a trial consists of: on which stream (None: the configuration's), under which seed, in which folder."""
        streams = list(zip(self.protocol.streams, self.protocol.labels(), strict=True)) or [(None, "")]
        return [
            (stream, seed, Path(label) / f"seed-{seed}") for seed in seeds or self.seeds for stream, label in streams
        ]

    def identity(self) -> str:
        """What two workers must agree on."""
        space = {key: repr(span) for key, span in self.space.items()}
        return json.dumps([self.base, self.keys, space, self.metrics, self.directions, self.seeds]
                          + ([] if self.protocol == Protocol() else [str(self.protocol), self.protocol.streams]),
                          sort_keys=True)  # fmt: skip


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
    """The plan of a configuration file; flags `--sweep.key value` are of its section.

    Raises:
        UserError: one line for each fault.
    """
    from clplat.config.reading import read_yaml
    from clplat.config.resolve import find_config

    path = find_config(config)
    base = read_yaml(path)
    given = base.pop("sweep", None)
    if not isinstance(given, dict) or not given:
        raise UserError(f"sweep: {path} has no `sweep:` section (metric, trials, space)")
    own, keys = section_flags(keys)
    return make_plan(base, {**given, **own}, keys, trials, path.stem)


def make_plan(
    base: dict[str, Any], given: Mapping[str, Any], keys: Sequence[str], trials: int | None, name: str
) -> Plan:  # fmt: skip
    """The plan of a `sweep:` section.

    Args:
        base: the configuration beside it.
        trials: instead of the section's.
        name: of the study, unless it says.

    Raises:
        UserError: one line for each fault.
    """
    given = {**given, **({"trials": trials} if trials is not None else {})}
    faults = [f"sweep.{key}: no such key (valid: {', '.join(_KEYS)})" for key in given if key not in _KEYS]
    flags = flags_of(keys)
    faults += _leaks(base, flags)
    space = read_space(given["space"], flags, faults) if "space" in given else _declared(base, flags, faults)
    metrics, directions = read_objectives(given, faults)
    values: dict[str, Any] = {"choose": read_choice(given.get("choose"), metrics, faults)}
    values |= _numbers(given, faults) | _sampler(given, space, faults)
    values["protocol"] = read_protocol(given.get("protocol"), base, flags, faults)
    seeds = _seeds("seeds", given.get("seeds", [base.get("seed", 0)]), faults)
    values["held_out"] = _seeds("held_out", given["held_out"], faults) if "held_out" in given else []
    if both := sorted(set(seeds) & set(values["held_out"])):
        faults.append(f"sweep.held_out: {both[0]} is one of sweep.seeds, by which is chosen (valid: others)")
    values["pruner"] = _pruner(given.get("pruner", "none"), metrics, faults)
    values["give_up"] = given.get("give_up", "median")
    if values["give_up"] not in GIVE_UP:
        faults.append(f"sweep.give_up: {values['give_up']!r} is not valid (valid: {', '.join(GIVE_UP)})")
    for key in ("study", "storage"):
        if key in given and not (isinstance(given[key], str) and given[key].strip()):
            faults.append(f"sweep.{key}: {given[key]!r} is not a name (valid: text)")
    if faults:
        raise UserError(*faults, *_faults_beside(base, keys, given.get("space"), space))
    base = _overridden(base, flags)
    study = str(given.get("study", name))
    folder = (Path(flags.get("output") or base.get("output") or "runs") / study).absolute()
    storage = str(given.get("storage") or folder / "study.log")
    return Plan(base, study, folder, space, storage, seeds, metrics, directions, keys=list(keys), **values)


def _faults_beside(base: Mapping[str, Any], keys: Sequence[str], given: Any, space: Mapping[str, Span]) -> list[str]:
    """Faults of the configuration beside a section that has some itself, and of the keys that it searches.

    Args:
        given: the section's `space:`; a key whose range is none is looked for by the end that can be read of it.
    """
    from clplat.config.resolve import resolve
    from clplat.run.trying import all_faults, option_faults

    lows = {k: e.get("low") for k, e in given.items() if isinstance(e, dict)} if isinstance(given, dict) else {}
    values = {key: low for key, low in lows.items() if finite(low) is not None and key.partition(".")[0] in _SEARCHED}
    values |= {key: span.ends()[0] for key, span in space.items()}
    config = {key: value for key, value in base.items() if key not in ("seed", "seeds")}
    try:
        with all_faults():
            found = option_faults(resolve(argv=list(keys), config=nested(config, values)))
    except UserError as error:
        found = list(error.faults)
    return [named_fault(values, fault) for fault in found]


def named_fault(searched: Mapping[str, Any], fault: str) -> str:
    """A fault of a searched key under its name in the file."""
    return f"sweep.space.{fault}" if fault.partition(":")[0] in searched else fault


def section_flags(keys: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What flags say of the `sweep:` section, read as YAML, and the other flags."""
    own: dict[str, Any] = {}
    others, tokens = [], list(keys)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--sweep."):
            others.append(token)
            continue
        key, equals, value = token.removeprefix("--sweep.").partition("=")
        if not equals:
            value = tokens.pop(0) if tokens and not tokens[0].startswith("--") else ""
        try:
            own[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"sweep.{key}: {value!r} is not YAML") from error
    return own, others


def _declared(base: Mapping[str, Any], flags: Mapping[str, str], faults: list[str]) -> dict[str, Span]:
    """What the strategy declares to be searched, but for what a flag says."""
    part = flags.get("strategy") or base.get("strategy")
    name = part.get("name") if isinstance(part, Mapping) else part
    if not isinstance(name, str):
        faults.append("strategy: is required where there is no sweep.space (it declares what is searched)")
        return {}
    try:
        found = {key: span for key, span in spans(discovery.find("strategies", name)).items() if key not in flags}
    except UserError as error:
        faults += error.faults
        return {}
    if not found:
        faults.append(f"sweep.space: is empty: flags fix all that {name} declares to be searched")
    return found


def flags_of(keys: Sequence[str]) -> dict[str, str]:
    """`--key value`, `--key=value`, and `--key` alone, which is ""."""
    found = {}
    for token, following in itertools.zip_longest(keys, keys[1:], fillvalue=""):
        if token.startswith("--"):
            key, equals, value = token[2:].partition("=")
            found[key] = value if equals else "" if following.startswith("--") else following
    return found


def _overridden(base: Mapping[str, Any], flags: Mapping[str, str]) -> dict[str, Any]:
    """`base` with the flags in it: best.yaml holds them, and what is searched is of a part that a flag names."""
    values = {key: yaml.safe_load(value) if value else True for key, value in flags.items() if key != "output"}
    named = {p: values.pop(f"{p}.name", values.pop(p, None)) for p in _PARTS}
    held = {p: v["name"] if isinstance(v, dict) and "name" in v else v for p, v in base.items() if p in _PARTS}
    other = {part: name for part, name in named.items() if name is not None and name != held.get(part)}
    return nested(base, other | values)


def _leaks(base: Mapping[str, Any], flags: Mapping[str, str]) -> list[str]:
    """A search on test data is refused, wherever it is asked for."""
    loop = base.get("loop") if isinstance(base.get("loop"), dict) else {}
    asked = {base.get("loop.evaluate_on"), (loop or {}).get("evaluate_on"), flags.get("loop.evaluate_on")}
    if asked - {None, "valid"}:
        return ["loop.evaluate_on: 'test' would choose hyper-parameters on test labels (valid: valid)"]
    return []


def _pruner(given: Any, metrics: Sequence[str], faults: list[str]) -> str:
    if given not in PRUNERS:
        faults.append(f"sweep.pruner: {given!r} is not valid (valid: {', '.join(PRUNERS)})")
    elif given != "none" and len(metrics) > 1:
        faults.append(f"sweep.pruner: {given} has no meaning with two metrics: Optuna prunes by one (valid: none)")
    elif given != "none" and METRICS[metrics[0]].group != "metrics":
        faults.append(f"sweep.pruner: {given} needs a metric; {metrics[0]} is a cost (valid: none)")
    return str(given)


def _seeds(key: str, given: Any, faults: list[str]) -> list[int]:
    if not (isinstance(given, list) and given and all(type(s) is int and s >= 0 for s in given)):
        faults.append(f"sweep.{key}: {given!r} is not a list of integers ≥ 0")
        return []
    if len(set(given)) < len(given):
        faults.append(f"sweep.{key}: {given} names a seed twice")
    return given


def _numbers(given: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "trials" in given:
        count = found["trials"] = given["trials"]
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            faults.append(f"sweep.trials: {count!r} is out of range (valid: ≥ 1)")
    if "grace_seconds" in given:
        seconds = found["grace_seconds"] = finite(given["grace_seconds"])
        if seconds is None or seconds <= 0:
            faults.append(f"sweep.grace_seconds: {given['grace_seconds']!r} is out of range (valid: > 0)")
    return found


def _sampler(given: Mapping[str, Any], space: Mapping[str, Span], faults: list[str]) -> dict[str, Any]:
    """The sampler; a grid has as many trials as points, unless fewer are asked for."""
    sampler = given.get("sampler", "auto")
    if sampler not in SAMPLERS:
        faults.append(f"sweep.sampler: {sampler!r} is not valid (valid: {', '.join(SAMPLERS)})")
        return {}
    if sampler != "grid":
        return {"sampler": sampler}
    endless = [key for key, span in space.items() if span.values() is None]
    faults += [f"sweep.space.{key}: a grid needs {{choices: [...]}}, or a step" for key in endless]
    points = 1 if endless else math.prod(len(span.values() or []) for span in space.values())
    return {"sampler": sampler} | ({} if "trials" in given else {"trials": points + 1})  # and the default
