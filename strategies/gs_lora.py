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
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat import Data, Experience, Kind, Strategy, require
from clplat.adapters import LoRA
from clplat.backbones.base import Classifier
from clplat.components.memory import ClassBalanced
from clplat.data.batches import epoch_order

ZERO = 1e-3  # a group whose norm is below counts as zero in the measurements


def group_norms(groups: Sequence[Sequence[Tensor]]) -> Tensor:
    """‖G_l‖ of each group of tensors, (groups,); where a tensor is zero its gradient is zero, not NaN."""
    return torch.stack([torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(g)))) for g in groups])


@torch.no_grad()
def shrink(groups: Sequence[Sequence[Tensor]], by: float) -> None:
    """G_l ← max(0, 1 − by / ‖G_l‖) G_l in place: the proximal step of by · Σ_l ‖G_l‖. Zero where ‖G_l‖ ≤ by."""
    for group, norm in zip(groups, group_norms(groups), strict=True):
        torch._foreach_mul_(list(group), torch.clamp(1 - by / norm.clamp(min=torch.finfo(norm.dtype).tiny), min=0))


def some_of_each(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Positions, sorted, of at most `shots` samples of each class, drawn at random. Labels (n,) of classes ≥ 0."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    order = shuffled[labels[shuffled].sort(stable=True).indices]
    counts = torch.bincount(labels)
    rank = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels[order]]
    return order[rank < shots].sort().values


class GSLoRA(Strategy):
    """Group-sparse LoRA. B samples of the memory and B to erase in each step of a request; C classes.

    An epoch of a request runs over the memory's samples, and those to erase come round as often as that needs. A
    memory with nothing left gives epochs over the samples to erase, without the first term.

    Learning is plain fine-tuning, with `optimizer`, `lr`, and so on; a request has its own optimizer. Where the user
    froze adapted layers nothing is merged: each request keeps an adapter of its own.

    Args:
        rank: r ≥ 1 of the change.
        lora_alpha: s = lora_alpha / r; > 0.
        where: layers that are changed: ffn, attention or both.
        grouping: what α pushes to zero as one: all factors of a block, those of a layer (lora), or each matrix.
        forgetting: β_t ≥ 0 of the first, second, ... request; the last one serves all later ones.
        bound: BND > 0, cross-entropy beyond which erasing pushes no further; null takes `bound_chance` · ln C.
        bound_chance: that many times the cross-entropy of guessing among all C classes, > 0.
        sparsity: α ≥ 0.
        sparsity_warmup: epochs with α = 0 first, ≥ 0.
        proximal: take α's part of each step as a proximal one after the optimizer's, which gives exact zeros.
        memory: samples kept of all classes learned, in equal parts, ≥ the classes to be kept.
        shots: samples per class that a request uses, of the memory and of what it erases, drawn for each request anew;
            null takes all.
        missing: classes that leave no sample in the memory.
        replay_batch: samples of the memory, per process, added to each batch when learning, ≥ 0.
        forget_optimizer: of a request.
        forget_lr: learning rate of a request, > 0.
        forget_weight_decay: of a request, on A and B, ≥ 0.
        forget_schedule: of a request's learning rate.
    """

    kinds = frozenset({Kind.LEARN, Kind.FORGET})
    paper = "arXiv:2403.11530"
    model: Classifier
    replays = True
    erasure = (
        "approximate: the adapted layers no longer recognise what was erased; all else, the head too, is as it was"
    )
    data_access = "the samples to erase, and a memory of retained ones"

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
        memory: int = 500,
        shots: int | None = None,
        missing: list[int] = [],  # noqa: B006
        replay_batch: int = 0,
        forget_optimizer: Literal["sgd", "adam", "adamw"] = "adamw",
        forget_lr: float = 1e-2,
        forget_weight_decay: float = 0.05,
        forget_schedule: Literal["constant", "cosine"] = "cosine",
        **base,
    ):
        super().__init__(**base)
        require("grouping", grouping, grouping in ("block", "lora", "matrix"), "block, lora or matrix")
        require("forgetting", forgetting, bool(forgetting) and min(forgetting) >= 0, "weights ≥ 0, at least one")
        require("bound", bound, bound is None or bound > 0, "> 0, or null")
        require("bound_chance", bound_chance, bound_chance > 0, "> 0")
        require("sparsity", sparsity, sparsity >= 0, "≥ 0")
        require("sparsity_warmup", sparsity_warmup, sparsity_warmup >= 0, "≥ 0")
        require("shots", shots, shots is None or shots >= 1, "≥ 1, or null")
        require("replay_batch", replay_batch, replay_batch >= 0, "≥ 0")
        require("forget_lr", forget_lr, forget_lr > 0, "> 0")
        require("forget_weight_decay", forget_weight_decay, forget_weight_decay >= 0, "≥ 0")
        classes = self.model.head.num_classes
        require("missing", missing, all(0 <= c < classes for c in missing), f"classes 0 to {classes - 1}")
        kept = classes - len(set(missing))
        require("memory", memory, memory >= max(kept, 1), f"≥ {max(kept, 1)}, one for each class to be kept")
        self.lora = LoRA(self.model.backbone, where, rank=rank, alpha=lora_alpha)
        self.grouping, self.forgetting = grouping, forgetting
        self.bound = bound_chance * math.log(classes) if bound is None else bound
        self.sparsity, self.sparsity_warmup, self.proximal = sparsity, sparsity_warmup, proximal
        self.memory, self.shots, self.missing, self.replay_batch = ClassBalanced(memory), shots, missing, replay_batch
        self.own = {
            Kind.LEARN: (self.optimizer_name, self.lr, self.weight_decay, self.schedule, self.warmup),
            Kind.FORGET: (forget_optimizer, forget_lr, forget_weight_decay, forget_schedule, 0.0),
        }
        self.seed = torch.initial_seed() % 2**31  # of the order in which samples to erase come, and of `shots`
        self.request = 0  # number of the last one, from 1
        self.adapter = ""
        self.epoch, self.drawn = -1, 0  # of this request: epochs begun, samples to erase drawn so far
        self._erased: Data | None = None  # what this request erases
        self.norms: list[float] = []  # ‖G_l‖ just before the last merge
        self.rate = 0.0

    def grow(self, experience: Experience) -> None:
        self.lora.wake()
        super().grow(experience)
        self.optimizer_name, self.lr, self.weight_decay, self.schedule, self.warmup = self.own[experience.kind]
        if experience.kind is Kind.FORGET:
            self.request += 1
            self.adapter = "request" if self.lora.mergeable else f"request_{self.request}"
            self.lora.add(self.adapter)
            self.lora.use(*self.lora.adapters, train=self.adapter)
            self.lora.rest(self)

    def begin(self, experience: Experience) -> None:
        if experience.kind is Kind.FORGET:
            self.memory.erase(experience)
            self.lora.reset(self.adapter, math.sqrt(5 if self.request == 1 else 50))
            self.epoch, self.drawn = -1, 0

    def training_data(self, experience: Experience) -> Data:
        """Of a request: what is retained, with what is to be erased beside it."""
        if experience.kind is Kind.LEARN:
            return super().training_data(experience)
        self._erased = self._few(super().training_data(experience))
        self._retains = len(self.memory) > 0
        return self._few(self.memory.data()) if self._retains else self._erased

    def _few(self, data: Data) -> Data:
        return data if self.shots is None else data.subset(some_of_each(data.targets(), self.shots, self._draw))

    @property
    def _draw(self) -> int:
        return self.seed * 1009 + self.request

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        if self.replay_batch and len(self.memory):
            mx, my, *_ = self.memory.sample(self.replay_batch)
            x, y = torch.cat([x, self.prepare(mx)]), torch.cat([y, my])
        return self.mean(F.cross_entropy(self.model(x), y, reduction="none"))

    def forget_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 0:
            self.epoch += 1
        x, y = batch  # (B, ...), (B,): retained
        kept = len(y) if self._retains else 0
        if self._retains:
            fx, fy = self._next(self.global_batch)
            x, y = torch.cat([x, self.prepare(fx)]), torch.cat([y, fy])  # (2 B, ...)
        features, losses = self._run(x, y)
        loss = self._weight * self._bounded(losses[kept:], self.bound)
        if kept:
            loss = loss + self.mean(losses[:kept])
        if self._alpha and not self.proximal:
            loss = loss + self._alpha * group_norms(self.lora.groups(self.adapter, self.grouping)).sum()
        return loss + self._extra(features, y, kept)

    def _run(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Features (b, D) and cross-entropies (b,)."""
        features = self.model.features(x)
        return features, F.cross_entropy(self.model.head(features), y, reduction="none")

    def _extra(self, features: Tensor, y: Tensor, kept: int) -> Tensor | float:
        """Further terms of the loss; the first `kept` samples are retained, the others are to be erased."""
        return 0.0

    def _bounded(self, losses: Tensor, bound: float) -> Tensor:
        """ReLU(bound − mean of losses (b,) over the samples of all processes); at the bound its gradient is 0."""
        mine = self.mean(losses)
        whole = mine.detach().clone()
        if self.world_size > 1:  # on a process's own mean the bound would be reached here and not there
            torch.distributed.all_reduce(whole)
            whole /= self.world_size
        return torch.where(whole < bound, bound - mine, torch.zeros_like(mine))

    def _next(self, count: int) -> tuple[Tensor, Tensor]:
        """This process's part of the next `count` samples to erase, as stored: shuffled anew in each round."""
        assert self._erased is not None
        size, start, device = len(self._erased), self.drawn, self._erased.inputs.device
        rounds = range(start // size, (start + count - 1) // size + 1)
        order = torch.cat([epoch_order(size, self._draw, 0, k, device) for k in rounds])
        self.drawn += count
        positions = order[start - rounds[0] * size :][:count].tensor_split(self.world_size)[self.rank]
        raw, labels = self._erased.batch(positions)
        assert labels is not None
        return raw, labels

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
        if experience.kind is Kind.LEARN:
            data = super().training_data(experience)
            missing = torch.tensor(self.missing, dtype=torch.int64, device=data.inputs.device)
            self.memory.fill(data.subset((~torch.isin(data.targets(), missing)).nonzero()[:, 0]))
            return
        self._erased = None
        self.norms = group_norms(self.lora.groups(self.adapter, self.grouping)).tolist()
        if self.lora.mergeable:
            self.lora.merge(self.adapter)
            self.lora.use()
        else:
            self.lora.use(*self.lora.adapters)

    def measurements(self) -> dict[str, float]:
        """Of the last request: norm of each group, share of groups that are zero; samples in the memory."""
        found = {"retained_samples": float(len(self.memory))}
        if self.norms:
            found["zero_groups"] = sum(norm < ZERO for norm in self.norms) / len(self.norms)
            found |= {f"group_norm_{k}": norm for k, norm in enumerate(self.norms)}
        return found

    def get_extra_state(self) -> dict[str, int | list[float]]:
        return {"seed": self.seed, "epoch": self.epoch, "drawn": self.drawn, "norms": list(self.norms)}

    def set_extra_state(self, state: dict[str, int | list[float]]) -> None:
        self.seed, self.epoch, self.drawn, self.norms = (state[k] for k in ("seed", "epoch", "drawn", "norms"))  # type: ignore[assignment]
