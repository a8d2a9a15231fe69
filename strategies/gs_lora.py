"""GS-LoRA: forget on request by low-rank changes of which whole blocks are pushed to zero.

Source   Zhao et al., "Continual Forgetting for Pre-trained Vision Models", CVPR 2024, arXiv:2403.11530.
Checked  against bjzhb666/GS-LoRA engine_cl.py (a92fb97, MIT).
    W ← W + s B A in both linear layers of every block's FFN, everything else frozen; then, for request t,
    loss = mean CE(x_r, y_r) + β_t · ReLU(BND − mean CE(x_f, y_f)) + α(epoch) · Σ_l ‖G_l‖
    x_r retained samples of a memory, x_f those to erase, G_l all factors of block l as one vector
    α = 0 in the first epochs, then constant; after the request the change is merged and A, B are made anew
Differs  BND is a multiple of ln C: 105 to 110, as published, suits their head, whose logits reach 64. One forward pass
         over x_r and x_f together. The rate's cosine is by step and ends at 0, theirs by epoch and at 1e-5. Retained
         samples come from a memory filled while learning, where theirs are drawn anew from the whole training set.
         `proximal` is an extension: with AdamW alone no group is ever exactly zero.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from clplat import Experience, Kind, require
from clplat.adapters import LoRA
from clplat.adapters.groups import group_norms, shrink
from clplat.components.losses import bounds, hinge, scored
from clplat.strategies._paired import Paired

ZERO = 1e-3  # a group whose norm is below counts as zero in the measurements


class GSLoRA(Paired):
    """Group-sparse LoRA. C classes, or answers to choose from; b samples of a step, those to keep first.
    Where the user froze adapted layers nothing is merged: each request keeps an adapter of its own.

    Args:
        rank: r ≥ 1 of the change.
        lora_alpha: s = lora_alpha / r; > 0.
        where: layers that are changed: ffn, attention or both.
        grouping: what α pushes to zero as one: all factors of a block, those of a layer (lora), or each matrix.
        forgetting: β_t ≥ 0 of the first, second, ... request; the last one serves all later ones.
        bound: BND > 0, cross-entropy beyond which erasing pushes no further; null takes `bound_chance` · ln C.
        bound_chance: that many times the cross-entropy of guessing among the C answers that compete, > 0.
        sparsity: α ≥ 0.
        sparsity_warmup: epochs with α = 0 first, ≥ 0.
        proximal: take α's part of each step as a proximal one after the optimizer's, which gives exact zeros.
    """

    paper = "arXiv:2403.11530"
    unshardable = ""
    searched = {"sparsity": (1e-5, 1e-2, "log"), "bound_chance": (1.0, 4.0)}
    uses_features = False  # whether `_extra` has terms
    erasure = "approximate: adapted layers no longer recognise what was erased; all else, the head too, is as it was"

    def __init__(
        self,
        *,
        rank: int = 8,
        lora_alpha: float = 1.0,
        where: Literal["ffn", "attention", "both"] = "ffn",
        grouping: Literal["block", "lora", "matrix"] = "block",
        forgetting: list[float] = [0.2, 0.25, 0.25, 0.2],  # noqa: B006
        bound: float | None = None,
        bound_chance: float = 2.0,
        sparsity: float = 1e-4,
        sparsity_warmup: int = 0,
        proximal: bool = False,
        **base,
    ):
        super().__init__(**base)
        require("grouping", grouping, grouping in ("block", "lora", "matrix"), "block, lora or matrix")
        require("forgetting", forgetting, bool(forgetting) and min(forgetting) >= 0, "weights ≥ 0, at least one")
        require("bound", bound, bound is None or bound > 0, "> 0, or null")
        require("bound_chance", bound_chance, bound_chance > 0, "> 0")
        require("sparsity", sparsity, sparsity >= 0, "≥ 0")
        require("sparsity_warmup", sparsity_warmup, sparsity_warmup >= 0, "≥ 0")
        self.lora = LoRA(self.model.backbone, where, rank=rank, alpha=lora_alpha)
        self.grouping, self.forgetting = grouping, forgetting
        self.bound, self.bound_chance = bound, bound_chance
        self.sparsity, self.sparsity_warmup, self.proximal = sparsity, sparsity_warmup, proximal
        self.adapter, self.rate = "", 0.0
        self.norms: list[float] = []  # ‖G_l‖ just before the last merge

    def grow(self, experience: Experience) -> None:
        self.lora.wake()
        super().grow(experience)
        if experience.kind is Kind.FORGET:
            self.adapter = "request" if self.lora.mergeable else f"request_{self.request}"
            self.lora.add(self.adapter)
            self.lora.use(*self.lora.adapters, train=self.adapter)
            self.lora.rest(self)

    def begin(self, experience: Experience) -> None:
        super().begin(experience)
        if experience.kind is Kind.FORGET:
            self.lora.reset(self.adapter, math.sqrt(5 if self.request == 1 else 50))

    def forget_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y, kept = self._pair(batch, batch_idx)  # (2 B, ...), (2 B,)
        found = scored(self.model, x, y, features=self.uses_features)
        gaps = bounds(found, self.bound, self.bound_chance) - found.losses
        loss = self._weight * hinge(self.mean(gaps[kept:]), self.world_size)
        if kept:
            loss = loss + self.mean(found.losses[:kept])
        if self._alpha and not self.proximal:
            loss = loss + self._alpha * group_norms(self.lora.groups(self.adapter, self.grouping)).sum()
        return loss if found.features is None else loss + self._extra(found.features, y, kept)

    def _extra(self, features: Tensor, y: Tensor, kept: int) -> Tensor | float:
        """Terms of features (b, D); the first `kept` samples are retained, the others are to be erased."""
        return 0.0

    @property
    def _weight(self) -> float:
        """β_t."""
        return self.forgetting[min(self.request, len(self.forgetting)) - 1]

    @property
    def _alpha(self) -> float:
        """α of this epoch."""
        return self.sparsity if self.epoch >= self.sparsity_warmup else 0.0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rate = optimizer.param_groups[0]["lr"]

    def after_step(self) -> None:
        if self.proximal and self.lora.trained and self._alpha:
            shrink(self.lora.groups(self.adapter, self.grouping), self.rate * self._alpha)

    def end(self, experience: Experience) -> None:
        super().end(experience)
        if experience.kind is Kind.FORGET:
            self.norms = group_norms(self.lora.groups(self.adapter, self.grouping)).tolist()
            if self.lora.mergeable:
                self.lora.merge(self.adapter)
            self.lora.use(*(() if self.lora.mergeable else self.lora.adapters))

    def measurements(self) -> dict[str, float]:
        """Of the last request: norm of each group, share of groups that are zero; samples in the memory."""
        found = super().measurements()
        if self.norms:
            found["zero_groups"] = sum(norm < ZERO for norm in self.norms) / len(self.norms)
            found |= {f"group_norm_{k}": norm for k, norm in enumerate(self.norms)}
        return found

    def get_extra_state(self) -> dict[str, Any]:
        return super().get_extra_state() | {"norms": list(self.norms)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.norms = state["norms"]
