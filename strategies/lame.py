"""LAME: the model stays as it is, and neighbouring samples of a batch are given like predictions.

Source   Boudiaf et al., "Parameter-free Online Test-time Adaptation", CVPR 2022, arXiv:2201.05718, equations 5 to 7.
Checked  against mariodoebler/test-time-adaptation classification/methods/lame.py (8b2ed63, MIT).
    z = argmin Σ_i KL(z_i ‖ p_i) − Σ_ij w_ij z_iᵀ z_j         over distributions z_i,  p_i = softmax(f(x_i; θ_0))
    by  z_i ← softmax(log p_i + Σ_j w_ij z_j)  until none changes (concave-convex procedure)
    w, of features φ/‖φ‖:   knn    1 for the k nearest of i, else 0
                            rbf    exp(−‖φ_i − φ_j‖² / 2σ²),  σ: mean distance to the k-th nearest
                            linear φ_iᵀ φ_j
Differs  stops when no z changes by more than 1e-8 (theirs: its bound). A sample is not among its own k nearest (theirs
         takes out whichever is first, and counts it for σ). In float64.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat import Experience, require
from clplat.strategies._tta import EVALUATION_BATCH, TTA

Affinity = Literal["knn", "rbf", "linear"]
STEPS, TOLERANCE = 100, 1e-8


def affinities(features: Tensor, kind: Affinity, neighbours: int) -> Tensor:
    """w (N, N) of features (N, D)."""
    unit = F.normalize(features, dim=1)
    if kind == "linear":
        return unit @ unit.T
    distances = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")  # (N, N)
    others = distances.clone().fill_diagonal_(torch.inf)
    nearest = others.topk(min(neighbours, len(unit) - 1), dim=1, largest=False)
    if kind == "knn" or not nearest.values.numel():
        return torch.zeros_like(distances).scatter_(1, nearest.indices, 1.0)
    sigma = nearest.values[:, -1].mean().clamp(min=torch.finfo(unit.dtype).tiny ** 0.5)
    return torch.exp(-distances.square() / (2 * sigma**2))


def assigned(log: Tensor, affinity: Tensor) -> Tensor:
    """log z (N, C) of log p (N, C) and w (N, N)."""
    z = log.exp()
    for _ in range(STEPS):
        found = (log + affinity @ z).log_softmax(1)
        before, z = z, found.exp()
        if (z - before).abs().max() <= TOLERANCE:
            break
    return found


class LAME(TTA):
    """Laplacian-adjusted maximum-likelihood estimation. B images of a batch, N of all processes, C classes, D features.

    Evaluation after an adapt experience adjusts the predictions of each evaluation batch in the same way.

    Args:
        affinity: knn, rbf or linear.
        neighbours: k ≥ 1.
    """

    paper = "arXiv:2201.05718"
    searched = {"affinity": ["knn", "rbf", "linear"], "neighbours": [1, 3, 5]}
    statistics = "source"

    def __init__(self, *, affinity: Affinity = "knn", neighbours: int = 5, **base: Any) -> None:
        super().__init__(**base)
        require("affinity", affinity, affinity in ("knn", "rbf", "linear"), "knn, rbf or linear")
        require("neighbours", neighbours, neighbours >= 1, "≥ 1")
        self.affinity, self.neighbours = affinity, neighbours

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self.evaluation_batch = EVALUATION_BATCH if self.adapting else None

    @torch.no_grad()
    def _adapt(self, x: Tensor) -> tuple[Tensor, None]:
        features, logits = self._seen(x)
        return self._own(self._adjusted(self._all(features), self._all(logits))), None

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        if not self.adapting:
            return super().predict(inputs, task)
        model: Any = self.model
        return self._adjusted(model.features(inputs), super().predict(inputs, task))

    def _seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D) and logits (B, C), of one pass where the model has a head."""
        model: Any = self.model
        features = model.features(x)
        return features, model.head(features) if hasattr(model, "head") else model(x)

    def _adjusted(self, features: Tensor, logits: Tensor) -> Tensor:
        """log z (N, C)."""
        weights = affinities(features.double(), self.affinity, self.neighbours)
        return assigned(logits.double().log_softmax(1), weights).to(logits.dtype)
