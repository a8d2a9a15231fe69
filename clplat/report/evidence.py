"""The evidence of erasure: what a run's files say about each request, beside an oracle's if there is one.

Read from the run's folder alone: `summary.json`, `ledger.json`, `metrics.jsonl`, the newest checkpoint's record, and
`audit/`. The oracle is a run on the same stream that never had, or no longer has, the erased data; its audit of the
same request, made with the model it had by then, is the reference. What can't be told is null, and `why_null` says why.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from clplat.erasure.audit.aggregates import aggregates, start_of_relearning
from clplat.erasure.audit.audit import FOLDER, audit_dir
from clplat.erasure.audit.sets import SETS
from clplat.errors import UserError
from clplat.metrics import membership, reference
from clplat.metrics.membership import Scores
from clplat.metrics.record import RunRecord
from clplat.metrics.relearning import RelearnTime, anamnesis_index, relearn_time
from clplat.metrics.summary import per_request
from clplat.package import __version__
from clplat.report.compare import load_summaries
from clplat.report.data import read_log
from clplat.run import checkpoint

NO_AUDIT = "not audited (audit.enabled is off, the run has not come to it, or answers are written: clplat.memorisation)"
NO_ORACLE = "no reference: no oracle's run was given"


def evidence(run_dir: Path | str, oracle_dir: Path | str | None = None) -> dict[str, Any] | None:
    """What `erasure.json` holds; None for a run without a request to forget.

    Raises:
        UserError: a folder that is no run's, or an oracle of another stream.
    """
    run = _Run(Path(run_dir))
    if not run.requests:
        return None
    oracle = None if oracle_dir is None else _Run(Path(oracle_dir))
    if oracle is not None and oracle.experiences != run.experiences:
        raise UserError(f"oracle: {oracle_dir} is a run on another stream (its experiences are not those of {run_dir})")
    entries = [_entry(run, oracle, index) for index in run.requests]
    return {
        "clplat": __version__,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": run.facts(),
        "oracle": None if oracle is None else oracle.facts(),
        "summary": _summary(run, entries),
        "requests": entries,
        "ledger": run.ledger,
        "traces": traces(run.folder, run.config, str(run.summary.get("status"))),
        "memorisation": _memorisation(run.folder),
        "rejected": [e for e in run.ledger if str(e.get("outcome")).startswith("refused")],
    }


def traces(folder: Path, config: dict[str, Any], status: str) -> list[dict[str, str]]:
    """What still derives from erased samples, one entry a file or place: {"path", "holds"}.

    Of the run's folder, of what the run was started from, and of MLflow. Numbers over all of the erased samples (an
    accuracy, an area under a curve, a digest of rows) are no traces in this sense; `clplat forget RUN_DIR --purge`
    removes those that it can.
    """
    found = []
    # A complete run lets them go as soon as its report is written.
    stay = status != "complete" or bool((config.get("audit") or {}).get("keep_scores"))
    for path in sorted((folder / FOLDER).glob("*/*.safetensors")) if stay else ():
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        if header.keys() - {"__metadata__"}:
            found.append((path, "outputs, labels and row numbers of single samples (audit.keep_scores)"))
    scored = "predictions on the data of an adapt experience, sample by sample (loop.keep_predictions)"
    found += [(path, scored) for path in sorted((folder / "predictions").glob("*.safetensors"))]
    kept = sorted((folder / "checkpoints").glob("[0-9]*"))
    found += [(p, "a checkpoint before the last: the learner, and its memories, as they were then") for p in kept[:-1]]
    if kept[:-1]:
        held = "samples of a memory, as checkpoints before the last know them"
        found += [(path, held) for path in sorted((folder / "memory").glob("*.rows"))]
    named = [{"path": p.relative_to(folder).as_posix(), "holds": holds} for p, holds in found]
    start = config.get("start") or {}
    if start.get("run"):
        named.append({"path": f"start.run: {start['run']}", "holds": "weights trained before this run"})
    return named


class _Run:
    """Files of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder, (self.summary,) = folder, load_summaries([folder])
        self.config = self.summary["config"]
        self.experiences = [(e["name"], e["kind"]) for e in self.summary.get("experiences") or []]
        done = len(self.summary.get("accuracy_matrix") or [None]) - 1
        self.requests = [i for i, (_, kind) in enumerate(self.experiences) if kind == "forget" and i < done]
        self.log, self.record = read_log(self.summary), _record(folder)
        self.terms = {} if self.record is None else {int(t["index"] or 0): t for t in per_request(self.record)}
        ledger = folder / "ledger.json"
        self.ledger: list[dict[str, Any]] = _read_json(ledger) if ledger.is_file() else []

    def facts(self) -> dict[str, Any]:
        """Who it is, and what its strategy says of its erasures."""
        known = ("name", "strategy", "stream", "backbone", "head", "seed", "status", "clplat", "git_commit",
                 "config_sha256")  # fmt: skip
        return {k: self.summary.get(k) for k in known} | {
            "run_dir": self.folder.name,
            "class_names": self.summary.get("class_names") or [],
            "guarantee": guarantee(str(self.summary.get("strategy"))),
            "trained_before": self._trained_before(),
            "checkpoint_sha256": checkpoint_sha256(self.folder),
        }

    def _trained_before(self) -> str | None:
        """Where the weights at the start came from, if not from random numbers."""
        options, start = self.config.get("backbone") or {}, self.config.get("start") or {}
        if start.get("run"):
            return f"start.run: {start['run']}"
        weights = options.get("weights", "random")
        return None if weights in (None, "random") else f"backbone.weights: {weights}"

    def event(self, index: int) -> dict[str, Any]:
        """The ledger's event of an experience."""
        return next((e for e in self.ledger if e.get("index") == index and e.get("outcome") == "done"), {})

    def seconds(self, index: int) -> float | None:
        """Training time of an experience."""
        spent = self.log.experiences.get("cost/train_seconds", {})
        before = 0.0 if index == 0 else spent.get(index)
        return spent[index + 1] - before if index + 1 in spent and before is not None else None

    def own(self, index: int) -> dict[str, float]:
        """What the strategy measured of itself after an experience."""
        return {k.removeprefix("strategy/"): v[index + 1] for k, v in self.log.experiences.items()
                if k.startswith("strategy/") and index + 1 in v}  # fmt: skip

    def audit(self, index: int, model: str) -> tuple[Scores, dict[str, Any]] | None:
        """Scores and numbers of one model in the audit of a request."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        numbers = audit_dir(self.folder, index) / f"{model}.json"
        if not numbers.is_file():
            return None
        scores = numbers.with_suffix(".safetensors")
        try:
            return load_file(scores), _read_json(numbers)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{scores}: cannot be read ({error}); put it back") from error


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error}); put it back") from error


def guarantee(strategy: str) -> dict[str, str]:
    """What a strategy says of its erasures: level (exact or approximate), statement, data that a request reads."""
    from clplat.config import discovery

    try:
        cls = discovery.load("strategies", strategy)
    except UserError:  # of a file that is no longer where it was, or given in Python
        why = f"not known here: {strategy} can't be found by its name"
        return {"level": "approximate", "statement": why, "data_access": why}
    level, _, statement = cls.erasure.partition(":")
    access = "the erased data only"
    if cls.unbounded_memory:
        access = "all data retained (they are stored)"
    elif cls.replays:
        access = "the erased data, and a memory of retained samples"
    return {"level": level.strip(), "statement": statement.strip(), "data_access": cls.data_access or access}


def _record(folder: Path) -> RunRecord | None:
    """What the run had measured by its newest checkpoint, without reading its tensors."""
    for path in sorted((folder / "checkpoints").glob("[0-9]*"), reverse=True):
        try:
            plain = json.loads(json.loads((path / "state.json").read_text())["state"])
            return RunRecord.from_dict(checkpoint.unflatten(plain["items"]["record"], {}))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return None


def checkpoint_sha256(folder: Path) -> str | None:
    """Of the tensors of a run's newest checkpoint."""
    for path in sorted((folder / "checkpoints").glob("[0-9]*"), reverse=True):
        try:
            return str(json.loads((path / "state.json").read_text())["tensors_sha256"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return None


def _entry(run: _Run, oracle: _Run | None, index: int) -> dict[str, Any]:
    """Everything about one request."""
    event, why = run.event(index), dict[str, str]()
    name, _ = run.experiences[index]
    facts = run.summary["experiences"][index]
    original, unlearned = run.audit(index, "original"), run.audit(index, "unlearned")
    known, reason = _oracle_audit(oracle, index, unlearned)
    seconds, theirs = run.seconds(index), None if oracle is None else oracle.seconds(index)
    models = {"original": original, "unlearned": unlearned, "oracle": known}
    measured = {m: None if a is None else _model(a, why) for m, a in models.items()}
    if unlearned is None or original is None:
        why["unlearned"] = NO_AUDIT
    if known is None:
        why["oracle"] = reason
    column = [row[index] for row in run.summary["accuracy_matrix"]]
    return {
        "index": index, "name": name, "request": event.get("request", []), "classes": event.get("classes", []),
        "training_samples": facts["train_samples"], "test_samples": facts["test_samples"],
        "started": event.get("started"), "finished": event.get("finished"), "rows_sha256": event.get("rows_sha256"),
        "outcome": event.get("outcome", "done"), "late": facts.get("late", False),
        "seconds": seconds, "oracle_seconds": theirs,
        "speed_up": theirs / seconds if theirs and seconds else None,
        "metrics": {k: v for k, v in run.terms.get(index, {}).items() if k != "index"},
        "accuracy_over_run": column,
        "models": measured,
        "relearning": _relearning(original, unlearned, known, why),
        "against_oracle": None if known is None or unlearned is None else _distances(unlearned, known, measured, why),
        "lira": _lira(run.folder, index, why),
        "strategy": run.own(index),
        "why_null": why,
    }  # fmt: skip


def _lira(folder: Path, index: int, why: dict[str, str]) -> dict[str, Any] | None:
    """What U-LiRA's shadow models found of a request."""
    file = audit_dir(folder, index) / "lira.json"
    found = _read_json(file) if file.is_file() else {"why": "no shadow models were made (audit.shadows; last request)"}
    if "why" in found:
        why["lira"] = found["why"]
        return None
    return dict(found)


def _memorisation(folder: Path) -> dict[str, Any] | None:
    """What `clplat.memorisation` has measured of the model that the run ends in; None where it was not asked."""
    file = folder / "memorisation.json"
    found = _read_json(file) if file.is_file() else {}
    return dict(found) if found and found.get("checkpoint_sha256") == checkpoint_sha256(folder) else None


def _oracle_audit(
    oracle: _Run | None, index: int, own: tuple[Scores, dict[str, Any]] | None
) -> tuple[tuple[Scores, dict[str, Any]] | None, str]:
    """The oracle's audit of a request, or None and why."""
    if oracle is None:
        return None, NO_ORACLE
    found = oracle.audit(index, "unlearned")
    if found is None or own is None:
        return None, "the oracle's run or this one was not audited at this request"
    whole = [s for s in SETS if f"{s}.rows" in found[0] and f"{s}.rows" in own[0]]
    if found[1]["scored"] != own[1]["scored"]:
        return None, "the oracle's run scored other samples: its stream, or audit.samples, differs"
    for key in (f"{s}.{k}" for s in whole for k in ("rows", "source", "labels")):
        if not np.array_equal(found[0].get(key, []), own[0].get(key, [])):
            return None, "the oracle's run scored other samples: its stream, or audit.samples, differs"
    return found, ""


def _model(audit: tuple[Scores, dict[str, Any]], why: dict[str, str]) -> dict[str, Any]:
    """Numbers of one model: accuracies on the samples scored, and how well membership can be told."""
    scores, numbers = audit
    found = aggregates(scores, numbers)
    found |= {"probe_accuracy": numbers.get("probe"), "model_sha256": numbers.get("model_sha256"),
              "sizes": numbers["sizes"], "scored": numbers["scored"]}  # fmt: skip
    for key, value in found.items():
        if value is None:
            why.setdefault(key, "there are no samples to measure it on, or too few")
    if found["probe_accuracy"] is None:
        why["probe_accuracy"] = "no held-out sample goes with this request, or the model offers no features"
    return found


def _relearning(original: Any, unlearned: Any, oracle: Any, why: dict[str, str]) -> dict[str, Any] | None:
    """Steps to learn the erased samples again, of this run's model and of the oracle's, to one target."""
    tried = None if unlearned is None else unlearned[1].get("relearn")
    start = None if tried is None or original is None else start_of_relearning(original[0], tried)
    if tried is None or start is None:
        why["relearning"] = "not tried (audit.relearn_steps is 0), or not audited"
        return None
    if start == 0:
        why["relearning"] = "none of these samples was named right before the request: there is nothing to learn again"
        return None
    target, cap = (1 - tried["tolerance"]) * start, tried["settings"]["steps"]
    found: dict[str, Any] = {"target": target, "settings": tried["settings"], "accuracies": tried["accuracies"]}
    own = relearn_time(tried["accuracies"], target, cap) if tried["accuracies"] else None
    if own is None:
        why["relearning.unlearned"] = str(tried["why"])
    theirs = _their_time(tried, None if oracle is None else oracle[1].get("relearn"), target, cap, why)
    found |= {"unlearned": own and asdict(own), "oracle": theirs and asdict(theirs)}
    found["oracle_accuracies"] = oracle[1]["relearn"]["accuracies"] if theirs else None
    index = anamnesis_index(own, theirs) if own and theirs else None
    if own and theirs and index is None:
        why["relearning.anamnesis_index"] = "the retrained model needs no step, or neither reached the target"
    return found | {"anamnesis_index": index and asdict(index)}


def _their_time(
    own: dict[str, Any], theirs: dict[str, Any] | None, target: float, cap: int, why: dict[str, str]
) -> RelearnTime | None:
    if theirs is None:
        why["relearning.oracle"] = why.get("oracle", "its audit did not try to relearn (audit.relearn_steps is 0)")
    elif theirs["settings"] != own["settings"]:
        why["relearning.oracle"] = "the oracle was relearned under other settings (audit.relearn_lr makes them equal)"
    elif not theirs["accuracies"]:
        why["relearning.oracle"] = str(theirs["why"])
    else:
        return relearn_time(theirs["accuracies"], target, cap)
    return None


def _distances(unlearned: Any, oracle: Any, measured: dict[str, Any], why: dict[str, str]) -> dict[str, Any]:
    """How far the unlearned model is from the oracle: in its predictions, in accuracy, in what an attacker finds."""
    found: dict[str, Any] = {}
    for name in SETS:
        a, b = unlearned[0].get(f"{name}.logits"), oracle[0].get(f"{name}.logits")
        if a is None or b is None or not a.shape[1]:
            if unlearned[1]["scored"][name] and (a is None or b is None):
                why[f"against_oracle.{name}"] = "scores of single samples were not kept (audit.keep_scores)"
            continue
        p, q = membership.softmax(a), membership.softmax(b)
        found[name] = {
            "agreement": reference.agreement(p, q), "js_divergence": reference.js_divergence(p, q),
            "activation_distance": reference.activation_distance(p, q),
            "logit_difference": apart if math.isfinite(apart := reference.logit_difference(a, b)) else None,
        }  # fmt: skip
    u, r = measured["unlearned"], measured["oracle"]
    keys = ("accuracy_erased", "accuracy_retained", "accuracy_retained_test")
    pairs = [(u[k], r[k]) for k in keys]
    whole = all(v is not None for pair in pairs for v in pair)
    tug = reference.tug_of_war(*zip(*pairs, strict=True)) if whole else None
    sides = [{"UA": 1 - m[keys[0]], "RA": m[keys[1]], "TA": m[keys[2]], "MIA": m["forget_efficacy"]} if whole else {}
             for m in (u, r)]  # fmt: skip
    complete = whole and all(v is not None for side in sides for v in side.values())
    gaps = {k: abs(sides[0][k] - sides[1][k]) for k in sides[0]} if complete else None
    return found | {"tug_of_war": tug, "gaps": gaps,
                    "average_gap": reference.average_gap(*sides) if complete else None}  # fmt: skip


def _summary(run: _Run, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """One row for the run: counts, the largest relapse and gap, the last request's closeness, times."""

    def values(*path: str) -> list[float]:
        found = []
        for entry in entries:
            value: Any = entry
            for key in path:
                value = None if value is None else value.get(key)
            if value is not None:
                found.append(float(value))
        return found

    seconds, theirs = values("seconds"), values("oracle_seconds")
    gaps, relapses, tugs = (values("against_oracle", "average_gap"), values("metrics", "relapse"),
                            values("against_oracle", "tug_of_war"))  # fmt: skip
    return {
        "requests_done": len(entries),
        "requests_refused": sum(str(e.get("outcome")).startswith("refused") for e in run.ledger),
        "requests_in_stream": sum(kind == "forget" for _, kind in run.experiences),
        "training_samples_erased": sum(e["training_samples"] for e in entries),
        "average_accuracy": (run.summary.get("metrics") or {}).get("average_accuracy"),
        "largest_relapse": max(relapses, default=None),
        "largest_average_gap": max(gaps, default=None),
        "last_tug_of_war": tugs[-1] if tugs else None,
        "request_seconds": sum(seconds) if seconds else None,
        "median_request_seconds": float(np.median(seconds)) if seconds else None,
        "p95_request_seconds": float(np.percentile(seconds, 95)) if seconds else None,
        "oracle_seconds": sum(theirs) if theirs else None,
    }
