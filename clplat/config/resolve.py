"""From a YAML file, Python overrides and flags to a fully resolved, checked `settings.Config`.

Three layers, later wins: file, keyword overrides, flags. Each part's options are its constructor's arguments, known
from the syntax tree; values are checked against their types by jsonargparse. All faults come at once. Nothing named in
a configuration is executed or imported here, except a part whose signature the syntax tree can't tell.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clplat.config import discovery, syntax
from clplat.config.given import absent, is_given, named
from clplat.config.nested import check_nested
from clplat.config.reading import read_yaml
from clplat.config.settings import (
    AuditSettings,
    Config,
    FabricSettings,
    LoopSettings,
    Part,
    StartSettings,
    TrackingSettings,
)
from clplat.config.syntax import REQUIRED, Option
from clplat.config.values import typed
from clplat.errors import UserError

PARTS = {"strategy": "strategies", "stream": "streams", "backbone": "backbones", "head": "heads", "merge": "merges"}
SECTIONS: dict[str, type] = {
    "loop": LoopSettings, "fabric": FabricSettings, "start": StartSettings, "audit": AuditSettings,
    "tracking": TrackingSettings,
}  # fmt: skip
DEFAULTS = {"stream": "digits", "backbone": "mlp", "head": "growing", "merge": "none"}
_PACKAGE = Path(__file__).parents[1]
_EXPERIMENTS = (_PACKAGE.parent / "experiments", _PACKAGE / "experiments")


class Refused(UserError):
    """A configuration with faults, of which `rest` is left without them; its parts may have faults of their own.

    Args:
        rest: of each run; a part that is not known has no name.
    """

    def __init__(self, faults: Iterable[str], rest: Sequence[Config]) -> None:
        super().__init__(*dict.fromkeys(faults))
        self.rest = rest


def resolve(
    argv: list[str] | None = None, config: str | Path | Mapping[str, Any] | None = None, **overrides: Any
) -> Config:
    """The configuration of one run, complete and checked.

    Args:
        argv: flags, `["--strategy", "er", "--strategy.memory", "50"]`.
        config: YAML file, name of a shipped experiment, or a mapping in the layout of config.yaml.
        overrides: as in YAML: `strategy="er"`, `loop={"max_epochs": 2}`, `**{"strategy.lr": 0.1}`.

    Raises:
        UserError: one line for each fault.
    """
    layer, name = _read(config)
    if several := [k for k in ("runs", "seeds") if k in layer]:
        what = f"{name or 'the configuration'} describes several runs; one is wanted (in Python: or give seeds=[0, 1])"
        raise UserError(*(f"{k}: {what}" for k in several))
    layer.pop("sweep", None)
    return _resolve([layer, overrides], argv or [], name)


def expand(
    argv: list[str] | None = None, config: str | Path | Mapping[str, Any] | None = None,
    seeds: Sequence[int] | None = None, only: Sequence[str] | None = None, **overrides: Any,
) -> list[Config]:  # fmt: skip
    """All runs of a configuration: each of its `runs:` (name → partial override) under each seed.

    Args:
        seeds: instead of the configuration's `seeds:`; without either, its one seed.
        only: names under `runs:`, of which alone runs are made.
        overrides: as in `resolve`, over each of the runs.

    Raises:
        UserError: one line for each fault, over all runs.
    """
    layer, name = _read(config)
    runs, own_seeds = layer.pop("runs", None), layer.pop("seeds", None)
    layer.pop("sweep", None)
    faults = []
    if runs is not None and not (isinstance(runs, dict) and runs and all(isinstance(v, dict) for v in runs.values())):
        faults.append(f"runs: {runs!r} is not a mapping of names to overrides, as {{er: {{strategy: er}}}}")
        runs = None
    if own_seeds is not None and not (isinstance(own_seeds, list) and all(_is_seed(s) for s in own_seeds)):
        faults.append(f"seeds: {own_seeds!r} is not a list of integers ≥ 0")
        own_seeds = None
    found: list[Config] = []
    rest: list[Config] = []
    if only is not None:
        valid = ", ".join(runs or ()) or "none: it has no runs:"
        whose = name or "the configuration"
        faults += [f"only: {one!r} is no run of {whose} (valid: {valid})" for one in only if one not in (runs or ())]
        runs = {label: override for label, override in (runs or {}).items() if label in only}
    for label, override in (runs or {None: {}}).items():
        try:
            one = _resolve([layer, override, overrides], argv or [], name, label)
        except Refused as error:
            faults += error.faults
            rest += error.rest
            continue
        chosen = seeds if seeds is not None else own_seeds
        # `--seed` typed by the user is one seed, whatever the file's list says.
        if chosen is None or (seeds is None and _typed_seed(argv or [])):
            chosen = [one.seed]
        found += [dataclasses.replace(one, seed=s) for s in chosen]
    if faults:
        raise Refused(faults, [*found, *rest])
    return found


def find_config(name: str | Path) -> Path:
    """The file of a configuration: a path, or a shipped experiment's `<paper>/<name>` or unique `<name>`.

    Raises:
        UserError: neither, with the nearest names.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"
    shipped = experiments()
    wanted = str(name).removesuffix(".yaml")
    if wanted in shipped:
        return shipped[wanted]
    stems = [k for k in shipped if k.rpartition("/")[2] == wanted]
    if len(stems) == 1:
        return shipped[stems[0]]
    if stems:
        raise UserError(f"config: '{name}' is the name of several experiments ({', '.join(stems)})")
    by_stem = {k.rpartition("/")[2]: k for k in shipped}
    inside = [k for k in shipped if k.startswith(f"{wanted}/")][:3]
    near = inside or difflib.get_close_matches(wanted, [*shipped, *by_stem], n=3)
    hint = ", ".join(dict.fromkeys(by_stem.get(k, k) for k in near))
    hint = f" (did you mean {hint}?)" if hint else ""
    if "=" in wanted:
        hint = f" (keys are written --{wanted})"
    raise UserError(f"config: '{name}' is neither a file nor an experiment{hint}")


def experiments() -> dict[str, Path]:
    """Shipped experiments, `<paper>/<name>` → file, sorted."""
    folder = next((f for f in _EXPERIMENTS if f.is_dir()), None)
    files = sorted(folder.glob("*/*.yaml")) if folder else []
    return {f"{f.parent.name}/{f.stem}": f for f in files}


# --- schema -------------------------------------------------------------------------------------------------------


def section_options(section: str | None) -> list[Option]:
    """Options of `loop`, `fabric` or `tracking`; of the top level for None."""
    cls = Config if section is None else SECTIONS[section]
    hints, texts = typing.get_type_hints(cls), syntax.help_texts(inspect.getdoc(cls) or "")
    found = []
    for item in dataclasses.fields(cls):
        if section is None and (item.name in PARTS or item.name in SECTIONS or item.name == "given"):
            continue
        made = None if item.default_factory is dataclasses.MISSING else item.default_factory()
        default = made if item.default is dataclasses.MISSING else item.default
        found.append(Option(item.name, hints[item.name], default, texts.get(item.name, "")))
    return found


def schema(parts: Mapping[str, str]) -> dict[str, Option]:
    """All keys of a run with these parts (key → name), dotted.

    Raises:
        UserError: an unknown part.
    """
    found = {o.name: o for o in section_options(None)}
    for section in SECTIONS:
        found |= {f"{section}.{o.name}": o for o in section_options(section)}
    for part, name in parts.items():
        found |= {f"{part}.{o.name}": o for o in discovery.options(discovery.find(PARTS[part], name))}
    return found


# --- layers -------------------------------------------------------------------------------------------------------


def _read(config: str | Path | Mapping[str, Any] | None) -> tuple[dict[str, Any], str | None]:
    """A configuration's mapping and the name its runs get unless it says."""
    if config is None:
        return {}, None
    if isinstance(config, Mapping):
        return dict(config), None
    path = find_config(config)
    shipped = {file.resolve(): name for name, file in experiments().items()}
    return read_yaml(path), shipped.get(path.resolve(), re.sub(r"[^\w.-]", "_", path.stem).lstrip("."))


def _resolve(layers: Iterable[Mapping[str, Any]], argv: list[str], name: str | None, label: Any = None) -> Config:
    faults: list[str] = []
    given: dict[str, Any] = dict(DEFAULTS)
    held: dict[str, Any] = {}
    for layer in (*(_flatten(named(layer, held, faults), faults) for layer in layers), _flags(argv, faults)):
        _merge(given, layer)
    parts = {p: given.pop(p, None) for p in PARTS}
    keys, unknown = _known_keys(parts, held, faults)
    known_parts = {k: v for k, v in given.items() if k.partition(".")[0] not in unknown}
    values = typed(keys, known_parts, faults, lambda key: _nearest_key(key, keys))
    check_nested(keys, values, held, faults)
    faults += [absent(k, v) for k, v in values.items() if is_given(v) and v not in held]
    known = {p: str(n) for p, n in parts.items() if p not in unknown}
    complete = {k: values.get(k, o.default) for k, o in keys.items()}
    faults += _range_faults(complete)
    config = dataclasses.replace(_build(known, complete, faults, name, label), given=held)
    if faults:
        raise Refused(faults, [config])
    return config


def _flatten(layer: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """`{strategy: {name: er, memory: 50}}` → `{strategy: er, strategy.memory: 50}`; faulty entries are reported."""
    flat: dict[str, Any] = {}
    for key, value in layer.items():
        key = str(key)
        if key in PARTS and isinstance(value, Part):
            value = {"name": value.name, **value.options}
        if key in PARTS or key in SECTIONS:
            if key in PARTS and isinstance(value, str | Path):
                flat[key] = str(value)
            elif isinstance(value, Mapping):
                flat |= {f"{key}.{k}": v for k, v in value.items()}
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                flat |= {f"{key}.{k}": v for k, v in dataclasses.asdict(value).items()}
            else:
                wanted = "a name, or a mapping with a name" if key in PARTS else "a mapping of keys to values"
                faults.append(f"{key}: {value!r} is not {wanted}")
        else:
            flat[key] = value
    return _lift_names(flat, faults)


def _lift_names(flat: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    for part in PARTS:
        if (name := f"{part}.name") in flat:
            value = flat.pop(name)
            if isinstance(value, str):
                flat.setdefault(part, value)
            else:
                faults.append(f"{part}: {value!r} is not a name")
    return flat


def _flags(argv: list[str], faults: list[str]) -> dict[str, Any]:
    """`--key value`, `--key=value`, and `--key` alone for true."""
    flat: dict[str, Any] = {}
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--"):
            faults.append(f"{token}: unexpected argument (options are written --key value)")
            continue
        key, equals, value = token[2:].partition("=")
        if equals:
            flat[key] = value
        elif tokens and not tokens[0].startswith("--"):
            flat[key] = tokens.pop(0)
        else:
            flat[key] = True
    return _lift_names(flat, faults)


def _typed_seed(argv: list[str]) -> bool:
    return "seed" in _flags(argv, [])


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _merge(given: dict[str, Any], layer: dict[str, Any]) -> None:
    """Put a layer over what is given. Naming another part drops the options of the old one."""
    for part in PARTS:
        if part in layer and part in given and layer[part] != given[part]:
            for key in [k for k in given if k.startswith(f"{part}.")]:
                del given[key]
    for key, value in layer.items():
        head, _, entry = key.rpartition(".")
        if head.count(".") == 1 and isinstance(given.get(head, {}), Mapping):
            given[head] = {**given.get(head, {}), entry: value}  # --tracking.tags.team x
        else:
            given[key] = value


# --- checks -------------------------------------------------------------------------------------------------------


def _known_keys(
    parts: dict[str, Any], held: Mapping[str, Any], faults: list[str]
) -> tuple[dict[str, Option], set[str]]:
    """The schema, and the parts that are not known (reported; their options can't be checked)."""
    keys, unknown = schema({}), set()
    for part, name in parts.items():
        try:
            if name is None and any(f.startswith(f"{part}: ") for f in faults):
                unknown.add(part)  # its value was refused already
                continue
            if name is None:
                names = discovery.some(PARTS[part], list(discovery.entries(PARTS[part])))
                raise UserError(f"{part}: is required (known: {names})")
            if not isinstance(name, str):
                raise UserError(f"{part}: needs a name")
            entry = discovery.find(PARTS[part], name, held)
            if entry.fault:
                raise UserError(f"{part}: '{name}' can't be used: {entry.fault}")
            keys |= {f"{part}.{o.name}": o for o in discovery.options(entry)}
            if part == "stream":
                keys["stream.seed"] = Option("seed", int | None, None, "of the stream; without it, the run's seed")
            if ".py" in name:
                # The file again, wherever the resolved configuration is read.
                parts[part] = entry.qualname if entry.qualname.startswith("/") else entry.name
        except UserError as error:
            faults += error.faults
            unknown.add(part)
    return keys, unknown


def _nearest_key(key: str, keys: Mapping[str, Any]) -> str:
    group, _, last = key.rpartition(".")
    own = [k for k in keys if k.rpartition(".")[0] == group] + ([] if group else [*PARTS, *SECTIONS])
    near = difflib.get_close_matches(last, [k.rpartition(".")[2] for k in own], n=3, cutoff=0.5)
    if near:
        return f" (did you mean {', '.join(f'{group}.{n}' if group else n for n in near)}?)"
    by_last = {k.rpartition(".")[2]: k for k in keys}
    near = difflib.get_close_matches(last, list(by_last), n=2, cutoff=0.75 if own else 0.6)
    if not near and not own:
        near = difflib.get_close_matches(key, keys, n=2)
    if near:
        return f" (did you mean {', '.join(by_last.get(n, n) for n in near)}?)"
    known = group in PARTS or group in SECTIONS
    return f" ({group} takes: {', '.join(k.rpartition('.')[2] for k in own) or 'no options'})" if known else ""


def _range_faults(values: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for section, cls in SECTIONS.items():
        settings = cls(**{k.partition(".")[2]: v for k, v in values.items() if k.startswith(f"{section}.")})
        found += settings.faults() if hasattr(settings, "faults") else []
    if values["loop.max_epochs"] == 0 and not values["start.run"]:
        found.append("loop.max_epochs: 0 is out of range (valid: ≥ 1, or 0 with start.run)")
    found += [
        f"{k}: {values[k]} is out of range (valid: ≥ 0)" for k in ("seed", "stream.seed") if (values.get(k) or 0) < 0
    ]
    return found


def _build(parts: dict[str, str], values: dict[str, Any], faults: list[str], name: str | None, label: Any) -> Config:
    """The configuration; adds a line to `faults` where its name is none. A part not in `parts` has no name."""

    def part(key: str) -> Part:
        chosen = {k.partition(".")[2]: v for k, v in values.items() if k.startswith(f"{key}.") and v is not REQUIRED}
        if key == "stream" and chosen.get("seed") is None:
            chosen.pop("seed", None)  # the run's
        return Part(parts.get(key, ""), chosen)

    def settings(key: str) -> Any:
        return SECTIONS[key](**{k.partition(".")[2]: v for k, v in values.items() if k.startswith(f"{key}.")})

    top = {k: v for k, v in values.items() if "." not in k}
    if top["name"] is None:
        names = [parts.get(k, "unknown") for k in ("strategy", "stream", "backbone")]
        stems = [n.partition("@python:")[0] for n in names]
        stems = [Path(n.partition(":")[0]).stem if ".py" in n else n for n in stems]
        top["name"] = name or "-".join(stems)
    if label is not None:
        top["name"] = f"{top['name']}/{label}"
    if not re.fullmatch(r"\w[\w.@-]*(/\w[\w.@-]*)*", top["name"]):
        faults.append(f"name: {top['name']!r} can't name a folder (valid: letters, digits, _ . - and / between them)")
    fields: dict[str, Any] = {k: part(k) for k in PARTS} | {k: settings(k) for k in SECTIONS} | top
    return Config(**fields)
