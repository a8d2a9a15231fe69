"""I-LoRA: replay in which a slow average of the adapters holds the hidden states of the fast ones.

Source   Ren, Li, Wang, Zhao, Qin, "Analyzing and Reducing Catastrophic Forgetting in Parameter Efficient Tuning",
         ICASSP 2025, arXiv:2402.18865.
Checked  by reading which47/LLMCL method/ILORA.py (no licence), whose loss this is with `consistency: one_sided`.
    m of memory M, x new; φ the fast parameters (adapters and head), φ_slow theirs averaged; h_l states after block l
    task 1:     loss = CE(x; φ)
    task t ≥ 2: loss = (CE(x; φ) + CE(m; φ)) / 2 + γ · mean_l mean (h_l(m; φ) − h_l(m; φ_slow))²
    after step k of a task:  φ_slow ← λ_k φ_slow + (1 − λ_k) φ,   λ_k = min(1 − 1/(k+1), λ)
Differs  in the code the slow adapters never move, since it looks their names up among the fast ones'; here they start
         as a copy and follow. Its consistency counts only states that the slow model exceeds (`one_sided`). It replays
         padding as text; here padding counts nowhere. The states before the first block are the same in both models,
         and count as a difference of 0, and those after the last one are taken before the final norm, the code's behind
         it; each tower of CLIP counts by the mean over its own batch. Both passes over m are in single precision: in
         bfloat16 the states' rounding is larger than the distance at the default λ. A sample's loss is the mean over
         its own tokens, the code's over all tokens of a batch. The slow pass is without dropout, the fast ones with.
         The paper's own values of λ, γ and the rest could not be had: defaults are the code's, where λ = 0.25 makes the
         slow copy lag by a third of a step; a slow memory wants λ near 1. Which model is meant for inference is not
         settled either: here the slow one. A and B are averaged one by one, so the slow change is not the average
         change.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor

from clplat import Experience, require
from clplat.backbones.base import Projection
from clplat.components.ema import Slow
from clplat.components.losses import single_losses
from clplat.components.memory import Reservoir
from clplat.components.per_parameter import trainable
from clplat.components.states import Consistency, distance
from clplat.strategies._lora import Adapted


class ILoRA(Adapted):
    """Fast adapters that learn and replay, slow ones that follow without gradients. B new samples, b replayed.

    Args:
        memory: samples kept in all, by reservoir sampling, ≥ 0; 0 replays nothing, which leaves `lora` and an average.
        replay_batch: b ≥ 1, samples replayed in each step and process, without replacement; null takes as many as are
            new.
        slow_decay: λ in [0, 1], weight of the old slow values; 0 keeps no past.
        slow_warmup: let λ_k rise from 1/2 to λ in each experience, so that λ = 1 is the plain mean of its steps.
        consistency_weight: γ ≥ 0; with 0 the slow model has no part in training.
        consistency: mse, or one_sided, as the code has it.
        eval_adapter: the parameters that predict, slow or fast.
        reset_slow: set the slow parameters to the fast ones when an experience ends.
        insert: put new samples into the memory before or after the step that they are new in.
        projections: of an attention's layers, those that are adapted; one that is fused counts as each of its parts.
            Empty takes all.
        lr: learning rate, > 0.
    """

    paper = "arXiv:2402.18865"
    predicts_as_model = True
    searched = {"slow_decay": (0.0, 0.999), "consistency_weight": (0.1, 10.0, "log")}
    replays = True
    unmergeable = "it predicts by a slow average of its own"
    unshardable = ""

    def __init__(
        self,
        *,
        memory: int = 500,
        replay_batch: int | None = None,
        slow_decay: float = 0.25,
        slow_warmup: bool = True,
        consistency_weight: float = 1.0,
        consistency: Consistency = "mse",
        eval_adapter: Literal["slow", "fast"] = "slow",
        reset_slow: bool = False,
        insert: Literal["before", "after"] = "before",
        projections: list[Projection] = [],  # noqa: B006
        lr: float = 1e-4,
        **base,
    ):
        super().__init__(projections=projections, lr=lr, **base)
        require("replay_batch", replay_batch, replay_batch is None or replay_batch >= 1, "≥ 1, or null")
        require("slow_decay", slow_decay, 0 <= slow_decay <= 1, "in [0, 1]")
        require("consistency_weight", consistency_weight, consistency_weight >= 0, "≥ 0")
        require("consistency", consistency, consistency in ("mse", "one_sided"), "mse or one_sided")
        require("eval_adapter", eval_adapter, eval_adapter in ("slow", "fast"), "slow or fast")
        require("insert", insert, insert in ("before", "after"), "before or after")
        require("memory", memory, memory >= 0, "≥ 0")
        self.memory = Reservoir(memory) if memory else None
        self.slow, self.replay_batch = Slow(), replay_batch
        self.slow_decay, self.slow_warmup, self.reset_slow = slow_decay, slow_warmup, reset_slow
        self.consistency_weight, self.consistency = consistency_weight, consistency
        self.eval_adapter, self.insert = eval_adapter, insert
        self._met = 0  # experiences; follows from those met

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self.adapters.add("fast")
        self.adapters.use("fast", train="fast")
        self.slow.grow(self.model)
        self._met += 1

    def begin(self, experience: Experience) -> None:
        self.slow.steps = 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        if self.memory is not None and self.insert == "before":
            self.memory.add(self.raw, y)
        loss = self.mean_loss(x, y)
        if self.memory is not None and self._met > 1 and len(self.memory):
            replayed, gap = self._replay(self.memory)
            loss = (loss + replayed) / 2 + self.consistency_weight * gap
        if self.memory is not None and self.insert == "after":
            self.memory.add(self.raw, y)
        return loss

    def _replay(self, memory: Reservoir) -> tuple[Tensor, Tensor | float]:
        """CE(m; φ), and the distance of its states to the slow ones: means over the samples of all processes."""
        total = self.global_batch if self.replay_batch is None else self.replay_batch * self.world_size
        mx, my = memory.sample_distinct(total)  # (b, ...), (b,)
        mx, share = self.prepare(mx), self.world_size / min(total, len(memory))
        if not self.consistency_weight:
            return self.losses(mx, my).sum() * share, 0.0
        with self.model.backbone.recorded() as fast:
            losses = single_losses(self.model, mx, my)
        with self.model.backbone.recorded() as slow:  # by the same call, so that positions of text are the same ones
            self.slow.losses(self.model, mx, my)
        gaps = distance(fast, slow, self.consistency)
        return losses.sum() * share, sum(g.sum() * (share * len(mx) / max(len(g), 1)) for g in gaps)

    def after_step(self) -> None:
        k = self.slow.steps + 1
        self.slow.update(self.model, min(1 - 1 / (k + 1), self.slow_decay) if self.slow_warmup else self.slow_decay)

    def end(self, experience: Experience) -> None:
        if self.reset_slow:
            self.slow.update(self.model, 0.0)

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        if self.eval_adapter == "fast":
            return super().predict(inputs, task)
        return self.slow.predict(self.model, inputs, task)

    def predicting(self) -> AbstractContextManager[None]:
        return super().predicting() if self.eval_adapter == "fast" else self.slow.applied(self.model)

    @torch.no_grad()
    def measurements(self) -> dict[str, float]:
        fast, slow = trainable(self.model), self.slow.named()
        far = sum(float((fast[n] - slow[n]).square().sum()) for n in slow)
        return {"slow_distance": (far / max(sum(float(fast[n].square().sum()) for n in slow), 1e-30)) ** 0.5}
