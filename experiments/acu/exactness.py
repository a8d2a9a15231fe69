"""The head of finished runs of `acu` next to one solved for anew on what is left; prints a line of JSON for each.

    python experiments/acu/exactness.py RUN_DIR...

Retained samples come from the run's stream, features from its backbone in batches of another order, and the solution
from SciPy, so that nothing of the learner's own sums is used. Both heads are compared on all test samples learned:
"weight": ‖W − W*‖ / ‖W*‖; "logit": the largest difference; "agreement": share of equal predictions; "kept" and
"erased": accuracies of both heads on test samples of classes that are left, and of those erased; "condition": of
A + γI, by its eigenvalues.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

import clplat
from clplat.components.frozen import frozen_features
from clplat.config.resolve import resolve
from clplat.erasure.counterfactual import counterfactual
from clplat.erasure.ledger import Membership
from clplat.run.build import build_stream
from clplat.stream import Data, Stream


def features(learner: Any, stream: Stream, data: Data) -> Tensor:
    """Backbone features (n, k) of a part of a data set, in its order."""
    inputs = [stream.prepare(data.batch(rows)[0], False) for rows in torch.arange(len(data)).split(500)]
    return torch.cat([frozen_features(learner.model, x, learner.chunk) for x in inputs])


def exactness(run_dir: Path) -> dict[str, Any]:
    """Measurements of one run."""
    config, learner = resolve(config=run_dir / "config.yaml"), clplat.load(run_dir)
    stream, ridge, members = build_stream(config), learner.ridge, Membership()
    for experience in stream:
        members.take(experience)
    retained = [e.train for e in counterfactual(stream, len(stream) - 1) if e.train is not None]
    phi = torch.cat([features(learner, stream, data) for data in retained])
    labels = torch.cat([data.targets() for data in retained])
    h = learner._expanded(phi).numpy()
    a = h.T @ h + ridge.gamma * np.eye(ridge.width)
    b = h.T @ np.eye(len(ridge.counts))[labels.numpy()]
    fresh = torch.from_numpy(scipy.linalg.solve(a, b, assume_a="pos"))
    values = np.linalg.eigvalsh(a)
    tests = [e.test for e in stream if e.test is not None and e.kind == "learn"]
    phi = torch.cat([features(learner, stream, data) for data in tests])
    truth = torch.cat([data.targets() for data in tests])
    logits = learner.readout(phi)
    known = torch.bincount(labels, minlength=len(ridge.counts)) > 0
    anew = (learner._expand(phi) @ fresh).masked_fill(~known, -torch.inf)
    erased = torch.tensor([c for c, on in members.classes.items() if not on], dtype=torch.int64)
    gone = torch.isin(truth, erased)
    hits = [(x.argmax(1) == truth).double() for x in (logits, anew)]
    return {
        "run": f"{config.name}", "seed": config.seed, "requests": sum(e.kind == "forget" for e in stream),
        "samples": int(ridge.counts.sum()), "weight": float((ridge.weight - fresh).norm() / fresh.norm()),
        "logit": float((logits - anew)[:, known].abs().max()),
        "agreement": float((logits.argmax(1) == anew.argmax(1)).double().mean()),
        "kept": [float(x[~gone].mean()) for x in hits],
        "erased": [float(x[gone].mean()) for x in hits] if gone.any() else None,
        "condition": float(values[-1] / values[0]), "counts_equal": bool((torch.bincount(labels,
        minlength=len(ridge.counts)) == ridge.counts).all()),
    }  # fmt: skip


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps(exactness(Path(name))), flush=True)
