"""A sweep without a file: what flags say, and for the rest what the strategy declares and accepts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from clplat.config import discovery
from clplat.config.resolve import DEFAULTS, resolve
from clplat.config.settings import Config, flat
from clplat.errors import UserError
from clplat.run.build import build
from clplat.sweep.plan import Plan, flags_of, make_plan, nested, section_flags

VALIDATION = 0.1  # share of the training data, where the stream holds none back by itself
BACKBONES = (DEFAULTS["backbone"], "vit_micro", "cnn", "actor_critic")  # tried in turn where none is named


def plan_of_flags(keys: Sequence[str], trials: int | None) -> tuple[Plan, list[str]]:
    """The plan, and what it takes for granted, a line each.

    Raises:
        UserError: no strategy is named; no backbone fits; all that `make_plan` refuses.
    """
    own, keys = section_flags(keys)
    flags = flags_of(keys)
    if "strategy" not in flags:
        raise UserError("sweep: give a configuration with a `sweep:` section, or --strategy NAME [--stream NAME]")
    resolved = resolve(argv=list(keys))
    known = flat(resolved.to_dict()) | {part: getattr(resolved, part).name for part in ("strategy", "stream")}
    base = nested({}, {"strategy": known["strategy"], "stream": known["stream"]})
    given = {key: known[key] for key in flags if key in known and key not in base}
    notes = []
    options = {o.name: o.default for o in discovery.options(discovery.find("streams", known["stream"]))}
    if "stream.validation" not in flags and options.get("validation", 1) in (0, 0.0, None):
        given["stream.validation"] = VALIDATION
        notes.append(f"stream.validation: {VALIDATION} (a share of the training data is held back to choose by)")
    if "backbone" in flags:
        given = {"backbone": resolved.backbone.name, **given}
    base = nested(base, given)
    if "backbone" not in flags:
        base["backbone"], refused = _backbone(base)
        notes += [f"backbone: {base['backbone']} ({refused})"] if refused else []
    plan = make_plan(base, own, [], trials, f"{_on_validation(base).name}-sweep")
    if "space" not in own:
        plan.space = {key: span for key, span in plan.space.items() if key not in flags}
    if not plan.space:
        raise UserError(f"sweep.space: is empty: flags fix all that {known['strategy']} declares to be searched")
    return plan, [*notes, *(f"searched: {key} {span}" for key, span in plan.space.items())]


def _backbone(base: dict[str, Any]) -> tuple[str, str]:
    """The first of the backbones that stream and strategy go with, and why it is not the usual one."""
    first: UserError | None = None
    for name in BACKBONES:
        try:
            build(_on_validation({**copy.deepcopy(base), "backbone": name}))
        except UserError as error:
            first = first or error
        else:
            return name, "" if first is None else f"with {BACKBONES[0]}: {first.faults[0]}"
    assert first is not None
    raise first


def _on_validation(base: dict[str, Any]) -> Config:
    return resolve(config=nested(base, {"loop.evaluate_on": "valid"}))
