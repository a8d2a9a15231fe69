"""`summary.json`: what a run was and what it measured."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

from clplat.config.given import keys_of
from clplat.config.settings import TUNED, Config, flat
from clplat.files import to_json
from clplat.metrics import general, interaction, online, summarize
from clplat.metrics.record import RunRecord
from clplat.package import __version__

_COST = ("train_seconds", "eval_seconds", "save_seconds", "samples_per_second", "warmup_seconds", "first_step_seconds",
         "peak_rss_bytes", "peak_device_bytes", "trainable_parameters", "stored_bytes", "train_flops")  # fmt: skip
_REPRESENTATION = ("dormant_fraction", "effective_rank", "weight_norm", "gradient_norm")
_DIAGNOSTICS = ("intruder_dimensions", "new_intruder_dimensions", "tuning_contribution")  # where asked for


def summary(config: Config, record: RunRecord, status: str) -> dict[str, Any]:
    """The contents of summary.json; `status` is complete, interrupted or failed."""
    metrics, why_null = summarize(record)
    cost = {k: record.cost.get(k) for k in _COST}
    why_null |= {f"cost.{k}": _why_no_cost(k, record) for k, v in cost.items() if v is None}
    asked = [k for k in _DIAGNOSTICS if any(k in r for r in record.representation)]
    representation = {k: [r.get(k) for r in record.representation] for k in (*_REPRESENTATION, *asked)}
    for key, values in representation.items():
        if None in values:
            off = "it has no meaning for this network" if key in asked else "loop.representation is off"
            why_null[f"representation.{key}"] = f"nothing to measure it on, or {off}"
    adaptation = online.table(record)
    if adaptation is None:
        why_null["adaptation"] = "no adapt experience with data to score has finished"
    interacted = interaction.table(record)
    if interacted is None:
        why_null["interaction"] = "no interact experience has finished"
    unlearned = general.table(record)
    if unlearned is None:
        why_null["general"] = general.NONE
    commit = git_commit()
    if commit is None:
        why_null["git_commit"] = "clplat does not run from a git checkout"
    return {
        "clplat": __version__,
        "strategy": config.strategy.name,
        "stream": config.stream.name,
        "backbone": config.backbone.name,
        "head": config.head.name,
        "name": config.name,
        "seed": config.seed,
        "config_sha256": config_sha256(config),
        "tuned": config.tracking.tags.get(TUNED),
        "from_python": keys_of(config),
        "git_commit": commit,
        "status": status,
        "experiences": [
            {"name": e.name, "kind": str(e.kind), "train_samples": e.train_samples, "test_samples": e.test_samples}
            | ({"title": e.title} if e.title else {})
            | ({"late": True} if e.late else {})
            for e in record.experiences
        ],
        "class_names": record.class_names,
        "stream_notes": record.notes,
        "accuracy_matrix": record.matrix,
        "metrics": metrics,
        "adaptation": adaptation,
        "interaction": interacted,
        "general": unlearned,
        "representation": representation,
        "cost": cost,
        "why_null": why_null,
    }


def _why_no_cost(key: str, record: RunRecord) -> str:
    if key == "peak_device_bytes":
        return "no accelerator was used"
    return "no experience was finished" if not record.representation else "no gradient step was taken"


def config_sha256(config: Config) -> str:
    """Digest of everything that can change a result: the resolved configuration without names and places."""
    aside = ("name", "output", "data_root", "tracking", "audit", "reference")
    plain = {k: v for k, v in config.to_dict().items() if k not in aside}
    for key in ("checkpoint_whole", "checkpoint_sharded", "diagnostics", "activation_checkpointing", "memory_on_disk"):
        del plain["loop"][key]
    # Of runs made before there were these keys.
    if plain["merge"]["name"] == "none":
        del plain["merge"]
    for key in ("max_flops", "memory_ratio") if plain["loop"]["max_flops"] is None else ():
        del plain["loop"][key]
    if not plain["fabric"]["compile"]:
        del plain["fabric"]["compile"]
    return hashlib.sha256(to_json(plain, sort_keys=True).encode()).hexdigest()


def changes(before: Any, config: Config) -> str:
    """What differs between the configuration in a checkpoint and `config`: `key: old → new`; empty if nothing."""
    if not isinstance(before, dict):
        return ""
    old, new = flat(before), flat(json.loads(to_json(config.to_dict())))
    since = {"loop.checkpoint_whole": False, "loop.checkpoint_sharded": False, "loop.diagnostics": [],
             "loop.activation_checkpointing": False, "loop.memory_on_disk": False, "audit.shadows": 0,
             "loop.max_flops": None, "loop.memory_ratio": 1.0, "fabric.compile": False,
             "merge.name": "none"}  # fmt: skip
    for key, value in since.items():
        old.setdefault(key, value)  # of a run begun before there was this key
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    shown = ", ".join(f"{k}: {old.get(k)!r} → {new.get(k)!r}" for k in keys[:3])
    return shown + (f", and {len(keys) - 3} more" if len(keys) > 3 else "")


def git_commit() -> str | None:
    """Commit of the checkout that clplat is imported from, or None."""
    folder = Path(__file__).resolve().parent
    try:
        found = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
