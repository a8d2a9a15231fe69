"""What is kept of an audit when the outputs on erased samples are let go: figures over all of them.

Shapes: n samples of a set, C classes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clplat.erasure.audit.sets import SETS
from clplat.files import to_json, write_atomic
from clplat.metrics import forensics, membership
from clplat.metrics.membership import Scores


def aggregates(scores: Scores, numbers: dict[str, Any]) -> dict[str, Any]:
    """Accuracies of one model on the samples scored, and how well membership can be told; None: too few samples.

    Args:
        scores: of the model, set by set.
        numbers: those of the audit that are no scores; `aggregates` among them are given back.
    """
    if "aggregates" in numbers:
        return dict(numbers["aggregates"])
    other, note = membership.unseen(scores)
    losses = {s: membership.losses_of(scores, s) for s in SETS}
    confidence = {s: _confidences(scores, s) for s in ("erased", "retained", "retained_test")}
    attacks = {
        "loss_auc": membership.erased_loss_auc(scores),
        "loss_attack_accuracy": membership.loss_attack_accuracy(losses["erased"], other),
        "retained_loss_auc": membership.loss_auc(losses["retained"], losses["retained_test"]),
        "forget_efficacy": 1 - membership.svc_membership(
            confidence["retained"], confidence["retained_test"], confidence["erased"]),
    }  # fmt: skip
    found: dict[str, Any] = {f"accuracy_{s}": accuracy(scores, s) for s in SETS}
    found |= {k: v if math.isfinite(v) else None for k, v in attacks.items()}
    return found | forensics.which_were_erased(scores) | {"unseen": note}


def accuracy(scores: Scores, name: str) -> float | None:
    """Share of a set's samples that are named right; None where it was not scored."""
    if not membership.scored(scores, name):
        return None
    return float((scores[f"{name}.logits"].argmax(1) == scores[f"{name}.labels"]).mean())


def start_of_relearning(original: Scores, tried: dict[str, Any]) -> float | None:
    """Accuracy of the model before the request on the samples that were relearned; None where they were not scored."""
    if "before" in tried:
        return tried["before"]
    if not membership.scored(original, "erased"):
        return None
    at = tried["positions"]
    return float((original["erased.logits"][at].argmax(1) == original["erased.labels"][at]).mean())


def let_go(folder: Path) -> list[str]:
    """Replace the scores in the audit of one request by figures over them; names of files changed.

    Those of retained samples, too: a later request may erase them. What is kept are the aggregates and the curve of
    relearning. The numbers are written first, so that a crash in between loses none.
    """
    from safetensors.numpy import load_file, save

    audits: dict[str, tuple[dict[str, NDArray[Any]], dict[str, Any]]] = {}
    for model in ("original", "unlearned"):
        file = folder / f"{model}.json"
        if file.is_file():
            audits[model] = load_file(file.with_suffix(".safetensors")), json.loads(file.read_text())
    changed = []
    for model, (scores, numbers) in audits.items():
        if not scores:
            continue
        if (tried := numbers.get("relearn")) is not None:
            original = audits["original"][0] if "original" in audits else {}
            numbers["relearn"] = {**tried, "before": start_of_relearning(original, tried), "positions": []}
        numbers["aggregates"] = aggregates(scores, numbers)
        write_atomic(folder / f"{model}.json", to_json(numbers, indent=1))
        write_atomic(folder / f"{model}.safetensors", save({}))
        changed += [f"{model}.json", f"{model}.safetensors"]
    return changed


def _confidences(scores: Scores, name: str) -> NDArray[np.float64]:
    if not membership.scored(scores, name):
        return np.zeros(0)
    return membership.true_confidences(membership.softmax(scores[f"{name}.logits"]), scores[f"{name}.labels"])
