"""CoACT: adapters that learn beside a slow teacher without any, and later ones held to the models of the first session.

Source   Roy et al., "Consistency-Guided Asynchronous Contrastive Tuning for Few-Shot Class-Incremental Tuning of
         Foundation Models", TMLR 2025, arXiv:2405.16625.
Checked  by reading ShuvenduRoy/CoACT-FSCIL through notes on it; it was not run.
    w_c = mean of f(x; θ, φ) over y = c, for each new class, when a session begins;   z = f / ‖f‖
    first:  loss = CE(f(x) wᵀ, y) + SupCon(z(x; θ, φ), z(x'; θ_slow); τ),   x, x' two augmentations, φ adapters
            θ of the last blocks learns, too, from an epoch on, at a rate of its own;   θ_slow ← m θ_slow + (1 − m) θ
    later:  loss = CE + SupCon(z(x; θ, φ), z(x'; θ_slow), z(x'; θ_0)) + mean (f(x) wᵀ − logits of the first session's)²
            for a few epochs, of w, φ or both;  θ_slow stays, θ_0 as pretrained
Differs  the last epoch's model is kept, not the best on the test set, and w is not set to means again. Momentum is
         plain, not Nesterov's (theirs 0.9, with a cosine and weight decay 5e-4). The squares are over the first
         session's classes, theirs over all, of random rows (`head: linear` has these). That x' is what both frozen
         models see is our reading. SupCon is over the batch of all processes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat import Experience, Frozen, require
from clplat.backbones.base import Classifier
from clplat.components.gradients import of_all
from clplat.components.losses import contrast
from clplat.components.precision import wide
from clplat.strategies._lora import Adapted
from clplat.strategies._rows import class_means, require_rows
from clplat.strategies.derpp import logit_distances


class CoACT(Adapted):
    """Asynchronous contrastive tuning. B samples of a batch, D features, C classes, K of them the first session's.

    Args:
        unfreeze: first of the blocks that learn in the first session, from 0; null: none.
        unfreeze_epoch: epochs that pass before they do, ≥ 0.
        unfreeze_rate: their learning rate as a share of `lr`, > 0.
        slow_decay: m in [0, 1].
        temperature: τ > 0.
        later: what learns in later sessions: classifier, adapters or both.
        later_epochs: how many of a later session's epochs, ≥ 0; 0: means of features alone.
        later_rate: learning rate in later sessions as a share of `lr`, > 0.
        rank: r ≥ 1 of an adapter; its change is scaled by alpha / r.
        alpha: > 0.
        optimizer: sgd, adam or adamw; made anew for each experience.
        lr: learning rate, > 0.
    """

    paper = "arXiv:2405.16625"
    unshardable = "its slow teacher follows the whole weights of the last blocks"
    searched = {"lr": (1e-3, 1.0, "log"), "later_rate": (1e-3, 1.0, "log")}
    needs_classes = True
    whole_batch = "it contrasts the samples of a batch"
    epoch: Tensor

    def __init__(
        self,
        *,
        model: Classifier,
        unfreeze: int | None = None,
        unfreeze_epoch: int = 0,
        unfreeze_rate: float = 0.01,
        slow_decay: float = 0.999,
        temperature: float = 0.07,
        later: Literal["classifier", "adapters", "both"] = "classifier",
        later_epochs: int = 1,
        later_rate: float = 0.01,
        rank: int = 16,
        alpha: float = 16.0,
        optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
        lr: float = 0.1,
        **base,
    ):
        learned = [p for p in model.backbone.parameters() if p.requires_grad]  # which the user did not freeze
        super().__init__(model=model, rank=rank, alpha=alpha, optimizer=optimizer, lr=lr, **base)
        require_rows(model, "set to means", linear=True)
        blocks = model.backbone.blocks
        require("unfreeze", unfreeze, unfreeze in (None, *range(len(blocks))), f"0 to {len(blocks) - 1}, or null")
        require("slow_decay", slow_decay, 0 <= slow_decay <= 1, "in [0, 1]")
        require("later", later, later in ("classifier", "adapters", "both"), "classifier, adapters or both")
        for name, value in {"unfreeze_epoch": unfreeze_epoch, "later_epochs": later_epochs}.items():
            require(name, value, value >= 0, "≥ 0")
        for name, above in (("temperature", temperature), ("unfreeze_rate", unfreeze_rate), ("later_rate", later_rate)):
            require(name, above, above > 0, "> 0")
        self.unfreeze_epoch, self.unfreeze_rate, self.slow_decay = unfreeze_epoch, unfreeze_rate, slow_decay
        self.temperature, self.later, self.later_epochs, self.later_rate = temperature, later, later_epochs, later_rate
        self.slow, self.pretrained = Frozen(model.backbone), Frozen(model.backbone)
        self.first: Frozen | None = None  # the student as the first session left it
        self._pairs = list(zip(self.slow.parameters(), model.backbone.parameters(), strict=True))
        late = {id(p) for block in blocks[len(blocks) if unfreeze is None else unfreeze :] for p in block.parameters()}
        self._late = [p for p in learned if id(p) in late]
        self._met, self._new = set[int](), list[int]()  # classes; these follow from the experiences, as growth does
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))  # of this experience, from 1

    def grow(self, experience: Experience) -> None:
        if self._met and self.first is None:
            self.first = Frozen(self.model)
        super().grow(experience)
        self._new = sorted(set(experience.classes) - self._met)
        self._met |= set(experience.classes)
        self.adapters.add("shared")
        self.adapters.use("shared", train=() if self.first and self.later == "classifier" else "shared")
        self.model.head.weight.requires_grad_(not self.first or self.later != "adapters")
        self.model.head.bias.requires_grad_(False)
        for parameter in self._late:
            parameter.requires_grad_(self.first is None)

    @torch.no_grad()
    def begin(self, experience: Experience) -> None:
        self.epoch.zero_()
        head: Any = self.model.head
        means = class_means(self, self.training_data(experience), max(experience.classes) + 1)
        head.weight[self._new] = means[self._new].to(head.weight)
        head.bias.zero_()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        (group,), late = optimizer.param_groups, {id(p): p for p in self._late if p.requires_grad}
        group["params"] = [p for p in group["params"] if id(p) not in late]
        group["lr"] = self.lr * (self.later_rate if self.first else 1.0)
        optimizer.add_param_group({"params": [*late.values()], "lr": self.lr * self.unfreeze_rate})
        return optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:  # type: ignore[override]
        x, y = batch  # (B, ...), (B,)
        self.epoch += batch_idx == 0
        if self.first is not None and self.epoch > self.later_epochs:
            return None
        features, other = self.model.features(x), self.prepare(self.raw)  # (B, D); x'
        logits = self.model.head(features)  # (B, C)
        losses = F.cross_entropy(logits, y, reduction="none")
        views = [features, self.slow(other), *([self.pretrained(other)] if self.first else ())]
        if self.first is not None:
            losses = losses + logit_distances(logits, self.first(x))
        z = torch.stack([of_all(F.normalize(wide(v), dim=1), self.world_size) for v in views])
        return self.mean(losses) + contrast(z, self.temperature, of_all(y, self.world_size))

    def on_after_backward(self) -> None:
        if self.epoch <= self.unfreeze_epoch:
            for parameter in self._late:
                parameter.grad = None

    @torch.no_grad()
    def after_step(self) -> None:
        if self.first is None:
            for slow, parameter in self._pairs:
                slow.lerp_(parameter, 1 - self.slow_decay)
