"""DER++: replay that also matches the logits a sample had when it was stored.

Source   Buzzega et al., "Dark Experience for General Continual Learning", NeurIPS 2020, arXiv:2004.07211.
Checked  by reading aimagelab/mammoth models/derpp.py (e75a491, MIT).
    loss = CE(f(x; θ), y) + α · mean (f(m; θ) − z)² + β · CE(f(m'; θ), y')        (m, z) and (m', y') drawn apart
Differs  one forward pass for all three parts (theirs three: the same without batch norm). Where the head grows, only
         the logits that a sample had when it was stored are matched. A sample is offered in the first of several
         passes only, with its logits of that time (theirs offers it, as a new sample, in every pass).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat import Kind, Strategy, require
from clplat.components.memory import Reservoir
from clplat.components.precision import wide
from clplat.strategy import tasks_of


def logit_distances(logits: Tensor, stored: Tensor) -> Tensor:
    """Mean squared difference (M,) of logits (M, C) and stored ones (M, C' ≤ C), where stored ones are finite."""
    known = stored.isfinite()  # NaN: no such class yet; -inf: masked by the head
    difference = torch.where(known, logits[:, : stored.shape[1]].float() - stored.float(), 0.0)
    return difference.square().sum(1) / known.sum(1)


def logit_distance(logits: Tensor, stored: Tensor) -> Tensor:
    """The mean of `logit_distances` over samples, a scalar."""
    return logit_distances(logits, stored).mean()


class DERpp(Strategy):
    """Dark experience replay with labels. B new samples, M replayed twice, C classes.

    Args:
        memory: samples kept in all, with their logits, by reservoir sampling, ≥ 1.
        replay_batch: M, samples of each of the two draws of a step, ≥ 1.
        logit_weight: α ≥ 0, weight of the squared logit difference.
        label_weight: β ≥ 0, weight of the replayed cross-entropy; 0 is DER.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:2004.07211"
    unshardable = ""
    plain_passes = True
    searched = {"logit_weight": (0.03, 3.0, "log"), "label_weight": (0.1, 3.0, "log")}
    needs_classes = True
    replays = True

    def __init__(
        self,
        *,
        memory: int = 500,
        replay_batch: int = 32,
        logit_weight: float = 0.1,
        label_weight: float = 0.5,
        **base,
    ):
        super().__init__(**base)
        require("replay_batch", replay_batch, replay_batch >= 1, "≥ 1")
        require("logit_weight", logit_weight, logit_weight >= 0, "≥ 0")
        require("label_weight", label_weight, label_weight >= 0, "≥ 0")
        self.memory, self.replay_batch = Reservoir(memory), replay_batch
        self.logit_weight, self.label_weight = logit_weight, label_weight

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        if len(self.memory) == 0:
            new = self.model(x)
            loss = self.mean(F.cross_entropy(new, y, reduction="none"))
        else:
            m = self.replay_batch
            mx, my, mz = self.memory.sample(m)  # (M, ...), (M,), (M, C')
            lx, ly, _ = self.memory.sample(m)
            inputs, task = (
                torch.cat([x, self.prepare(torch.cat([mx, lx]))]),
                tasks_of(self.model, torch.cat([y, my, ly])),
            )
            new, match, label = self.model(inputs, task).split([len(x), m, m])  # (·, C)
            loss = self.mean(F.cross_entropy(new, y, reduction="none"))
            loss = loss + self.logit_weight * logit_distance(match, mz)
            loss = loss + self.label_weight * F.cross_entropy(label, ly)
        self.memory.add(self.raw, y, logits=wide(new))
        return loss
