"""GS-LoRA++: GS-LoRA with prototypes that erased classes are pushed from, and an average of the weights.

Source   Zhao et al., "Practical Continual Forgetting for Pre-trained Vision Models", 2025, arXiv:2501.09705.
Checked  against bjzhb666/GS-LoRA engine_cl.py, util/utils.py (a92fb97, MIT).
    loss = that of GS-LoRA + w_f · ReLU(BND_p − K(x_f)) + w_r · K(x_r)
    K(x) = mean KL(softmax p_y ‖ softmax e(x)),   e features, p_y mean feature of class y before the request
    from epoch E on, after each epoch: W̄ ← d W̄ + (1 − d) (W + s B A)
Differs  besides what GS-LoRA differs in: the paper's figure takes prototypes from the model as it was at first; here,
         as in their continual code, from the model before each request. Their code evaluates the average and goes on
         from the last weights; so does this, but theirs, in the continual script, averages weights without LoRA.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat import Data, Experience, Kind, require
from clplat.adapters import WeightAverage
from clplat.components.losses import hinge
from clplat.strategies.gs_lora import GSLoRA
from clplat.strategy import evaluating

CHUNK = 512  # samples whose features are made at a time


def divergence(prototypes: Tensor, features: Tensor) -> Tensor:
    """KL(softmax p ‖ softmax e) of each pair of rows of p, e (b, D); (b,) in nats."""
    p, e = F.log_softmax(prototypes, 1), F.log_softmax(features, 1)
    return F.kl_div(e, p, reduction="none", log_target=True).sum(1)


class GSLoRAPP(GSLoRA):
    """Group-sparse LoRA with prototypes and averaged weights. D features.

    Args:
        prototype_forgetting: w_f ≥ 0.
        prototype_retaining: w_r ≥ 0.
        prototype_bound: BND_p > 0, in nats.
        average_decay: d in [0, 1], weight of the old average.
        average_start: E ≥ 0, epoch of a request, from 0, after which averaging begins.
        predict_with: average, or the raw weights; the next request goes on from the raw ones in any case.
    """

    paper = "arXiv:2501.09705"
    predicts_as_model = True
    unshardable = ""
    searched = {"prototype_forgetting": (1e-3, 0.1, "log")}
    needs_classes = True  # prototypes are theirs

    def __init__(
        self,
        *,
        prototype_forgetting: float = 0.01,
        prototype_retaining: float = 0.0,
        prototype_bound: float = 18.0,
        average_decay: float = 0.9,
        average_start: int = 30,
        predict_with: Literal["average", "raw"] = "average",
        **base,
    ):
        super().__init__(**base)
        require("prototype_forgetting", prototype_forgetting, prototype_forgetting >= 0, "≥ 0")
        require("prototype_retaining", prototype_retaining, prototype_retaining >= 0, "≥ 0")
        require("prototype_bound", prototype_bound, prototype_bound > 0, "> 0")
        require("average_start", average_start, average_start >= 0, "≥ 0")
        require("predict_with", predict_with, predict_with in ("average", "raw"), "average or raw")
        self.prototype_forgetting, self.prototype_retaining = prototype_forgetting, prototype_retaining
        self.prototype_bound, self.average_start = prototype_bound, average_start
        self.average, self.predict_with = WeightAverage(self.lora, average_decay), predict_with
        self.uses_features = bool(prototype_forgetting or prototype_retaining)
        shape = self.model.num_classes, self.model.backbone.embed_dim
        self.prototypes = nn.Parameter(torch.zeros(shape), requires_grad=False)  # (C, D); 0 outside a request

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self.average.grow()
        self.average.clear()

    def begin(self, experience: Experience) -> None:
        super().begin(experience)
        if experience.kind is Kind.FORGET:
            retained = self.training_data(experience)
            self._make_prototypes([d for d in (retained, self._erased) if d is not None])

    @torch.no_grad()
    def _make_prototypes(self, parts: list[Data]) -> None:
        """Mean feature of each class in `parts`. Every process makes them whole, so that all agree."""
        sums = torch.zeros_like(self.prototypes, dtype=torch.float64)
        counts = sums.new_zeros(len(sums))
        with evaluating(self):
            for data in parts:
                for positions in torch.arange(len(data), device=data.inputs.device).split(CHUNK):
                    raw, labels = data.batch(positions)
                    assert labels is not None
                    sums.index_add_(0, labels, self.model.features(self.prepare(raw)).double())
                    counts += torch.bincount(labels, minlength=len(counts))
        self.prototypes.copy_(sums / counts.clamp(min=1).unsqueeze(1))

    def forget_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 0:
            self._average_epoch()
        return super().forget_step(batch, batch_idx)

    def _extra(self, features: Tensor, y: Tensor, kept: int) -> Tensor | float:
        apart = divergence(self.prototypes[y], features)  # (b,)
        gap = self.mean(self.prototype_bound - apart[kept:])
        loss = self.prototype_forgetting * hinge(gap, self.world_size)
        return loss + self.prototype_retaining * self.mean(apart[:kept]) if kept else loss

    def _average_epoch(self) -> None:
        """Take in the weights that the epoch just done ended with."""
        if self.epoch >= self.average_start:
            self.average.update()

    @torch.no_grad()
    def end(self, experience: Experience) -> None:
        if experience.kind is Kind.FORGET:
            self._average_epoch()
            self.prototypes.zero_()  # those of the erased classes least of all may stay
        super().end(experience)

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        with self.predicting():
            return super().predict(inputs, task)

    def predicting(self) -> AbstractContextManager[None]:
        own = self.predict_with == "raw" or not self.average.count
        return super().predicting() if own else self.average.applied()
