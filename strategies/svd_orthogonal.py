"""SVD-orthogonal: full fine-tuning of each weight outside its own leading singular directions.

Source   Nayak et al., "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", ICLR 2026,
         arXiv:2504.07097.
Checked  against peft 0.21 (tuner `osf`, Apache-2.0), whose forward and projected gradients are the same.
    before task t ≥ 2:  W = U_h S_h V_hᵀ + U_l S_l V_lᵀ                k of r singular values are high, r = min(o, d)
        I = mean_i cos(x_i, W x_i) on data of task t−1, divided by its mean over the layers
        k = ⌊ρ r⌋,   ρ = least + I (target − least), cut to [0, 1]
    gradients:  dU_l ← (I − U_h U_hᵀ) dU_l,   dV_l ← (I − V_h V_hᵀ) dV_l,   dS_l free
    after each step the same projections of U_l and V_l, since Adam's steps leave the space that gradients lie in
    after the task:     W ← U_h S_h V_hᵀ + U_l S_l V_lᵀ
Differs  the paper writes G ← G − U_h (U_hᵀ G V_h) V_hᵀ, which leaves more free (`block: paper`); all code has what is
         above. Cosines are taken over the first min(o, d) features of input and output, as code does; negative ones
         count as 0. They are taken when a task ends, so that no sample of it is kept, and of text at all positions,
         padding included. The research scripts compute W without gradients to its factors, which so stay as they are,
         and `unload` of peft's tuner drops what a task learned: neither is followed. Which layers the paper splits is
         not known in full: here all of the blocks; the scripts leave out cross-attention, and train what they do not
         split, which here is frozen after the first task (`train_rest`). Their growing rank counts in max(o, d), so
         that a wide FFN soon is frozen whole; `ranks: linear` counts in r.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from clplat import Experience, Kind, Strategy, require
from clplat.adapters.split import Block, SplitLayers
from clplat.backbones.base import Classifier, Role
from clplat.strategy import evaluating


def normalized(importance: Tensor) -> Tensor:
    """Importances (L,) of the layers, negative ones taken as 0, with mean 1; all 1 where there is none."""
    importance = importance.double().clamp(min=0)
    return importance / importance.mean() if importance.any() else torch.ones_like(importance)


class SVDOrthogonal(Strategy):
    """Constrained full fine-tuning. The first experience is learned without constraint, by all that may be trained.

    Args:
        block: what an update must not have: factored, any part in the span of U_h or of V_h; paper, only the part that
            lies in both.
        ranks: what is preserved of each weight: adaptive, by its importance; constant, `target_retention` of its rank;
            linear, `retention_per_task` · (t − 1) of its rank in task t = 1, 2, ...
        least_retention: share of a rank that is preserved at importance 0, in [0, 1]; of adaptive ranks.
        target_retention: share of a rank that is preserved at mean importance, in [0, 1], so about the mean share.
        retention_per_task: ≥ 0; of linear ranks.
        importance_samples: of a finished experience, by which its layers' importance is measured, ≥ 1.
        roles: of the layers that are split.
        train_rest: what else of the backbone learns from the second experience on: none of it, norms (its
            one-dimensional parameters, so biases too), or all of it, unprotected. The head always learns.
        optimizer: sgd, adam or adamw; made anew for each experience.
        lr: learning rate, > 0.
    """

    kinds = frozenset({Kind.LEARN})
    unmergeable = "it learns by factors that change no leading singular direction, as a merge may"
    paper = "arXiv:2504.07097"
    unshardable = "it takes whole weights apart into factors"
    searched = {"lr": (5e-6, 5e-3, "log"), "least_retention": (0.0, 0.5), "target_retention": (0.5, 0.95)}
    model: Classifier

    def __init__(
        self,
        *,
        model: Classifier,
        block: Block = "factored",
        ranks: Literal["adaptive", "constant", "linear"] = "adaptive",
        least_retention: float = 0.1,
        target_retention: float = 0.8,
        retention_per_task: float = 0.07,
        importance_samples: int = 128,
        roles: list[Role] = ["attention", "ffn"],  # noqa: B006
        train_rest: Literal["none", "norms", "all"] = "none",
        optimizer: Literal["sgd", "adam", "adamw"] = "adamw",
        lr: float = 5e-5,
        **base,
    ):
        super().__init__(model=model, optimizer=optimizer, lr=lr, **base)
        require("block", block, block in ("factored", "paper"), "factored or paper")
        require("ranks", ranks, ranks in ("adaptive", "constant", "linear"), "adaptive, constant or linear")
        require("least_retention", least_retention, 0 <= least_retention <= 1, "in [0, 1]")
        require("target_retention", target_retention, 0 <= target_retention <= 1, "in [0, 1]")
        require("retention_per_task", retention_per_task, retention_per_task >= 0, "≥ 0")
        require("importance_samples", importance_samples, importance_samples >= 1, "≥ 1")
        require("train_rest", train_rest, train_rest in ("none", "norms", "all"), "none, norms or all")
        self.ranks, self.train_rest, self.importance_samples = ranks, train_rest, importance_samples
        self.least, self.target, self.per_task = least_retention, target_retention, retention_per_task
        self._met = 0  # experiences; follows from those met
        self.layers = SplitLayers(self.model.backbone, roles, block)
        self.importance = [1.0] * len(self.layers)  # of each layer, by the last experience that ended
        self.facts: dict[str, float] = {}

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self._met += 1

    def begin(self, experience: Experience) -> None:
        if self._met > 1:
            self.layers.train_rest(self.train_rest)
            self.facts = self.layers.split(self._shares())

    def _shares(self) -> list[float]:
        """ρ of each layer, not cut yet."""
        if self.ranks == "adaptive":
            return [self.least + i * (self.target - self.least) for i in self.importance]
        share = self.target if self.ranks == "constant" else self.per_task * (self._met - 1)
        return [share] * len(self.importance)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        return self.mean_loss(x, y)

    def on_after_backward(self) -> None:
        self.layers.project_gradients()

    def after_step(self) -> None:
        self.layers.project()

    def end(self, experience: Experience) -> None:
        self.layers.merge()
        if self.ranks == "adaptive" and self.importance:
            self.importance = self._measure(experience)

    def _measure(self, experience: Experience) -> list[float]:
        """Importance of each layer, by samples evenly spaced in the experience's data."""
        assert experience.train is not None
        size = len(experience.train)
        rows = torch.arange(min(size, self.importance_samples), device=experience.train.inputs.device)
        raw, _ = experience.train.batch(positions := rows * size // len(rows))
        labels = experience.train.targets()[positions]
        with evaluating(self):  # by losses: features alone pass by a decoder, or CLIP's text
            found = normalized(self.layers.alignment(lambda: self.losses(self.prepare(raw), labels)))
        if self.world_size > 1:  # the same to the last bit, so that all processes keep the same ranks
            torch.distributed.broadcast(found, 0)
        return found.tolist()

    def measurements(self) -> dict[str, float]:
        return self.facts

    def get_extra_state(self) -> dict[str, Any]:
        return {"importance": self.importance, "facts": self.facts}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.importance, self.facts = list(state["importance"]), dict(state["facts"])
