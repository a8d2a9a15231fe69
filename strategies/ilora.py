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
         it. A sample's loss is the mean over its own tokens, the code's over all tokens of a batch. The slow pass is
         without dropout, the fast ones with. The paper's own values of λ, γ and the rest could not be had: defaults are
         the code's, where λ = 0.25 makes the slow copy lag by a third of a step; a slow memory wants λ near 1. Which
         model is meant for inference is not settled either: here the slow one. A and B are averaged one by one, so the
         slow change is not the average change.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clplat import Experience, require
from clplat.backbones.base import Projection, States
from clplat.components.losses import Losses
from clplat.components.memory import Reservoir
from clplat.components.per_parameter import trainable
from clplat.run.evaluation import evaluating
from clplat.strategies._lora import Adapted

Consistency = Literal["mse", "one_sided"]


def distance(fast: States, slow: States, form: Consistency) -> Tensor:
    """Mean over states and layers of the squared difference, for each of b samples: (b,).

    one_sided: only where the slow state is the larger. Positions of padding do not count. The mean is over one layer
    more than there are blocks: what enters the first one is the same on both sides.
    """
    means = []
    for layer, (p, s) in enumerate(zip(fast.outputs, slow.outputs, strict=True)):
        gap = s.to(torch.promote_types(s.dtype, torch.float32)) - p
        squares = (gap.relu() if form == "one_sided" else gap).square()
        if fast.valid is None:
            means.append(squares.flatten(1).mean(1))
        else:
            valid = fast.valid[layer].to(squares.dtype)  # (b, P)
            means.append((squares.mean(2) * valid).sum(1) / valid.sum(1).clamp(min=1))
    return torch.stack(means).sum(0) / (len(means) + 1)


def path_losses(
    model: nn.Module, start: dict[str, Tensor], end: dict[str, Tensor], inputs: Tensor, labels: Tensor, points: int = 11
) -> Tensor:
    """Mean losses (points,) at (1 − α) start + α end, α evenly spaced in [0, 1]; parameters by name in `model`."""
    found = []
    with torch.no_grad(), evaluating(model):
        for alpha in torch.linspace(0, 1, points).tolist():
            mixed = {f"model.{name}": (1 - alpha) * start[name] + alpha * end[name] for name in start}
            found.append(functional_call(Losses(model), mixed, (inputs, labels)).mean())
    return torch.stack(found)


def barrier(losses: Tensor) -> float:
    """The most by which losses (points,) along a path exceed the line between its ends: 0 where modes are connected."""
    line = torch.linspace(0, 1, len(losses), device=losses.device)
    return float((losses - (1 - line) * losses[0] - line * losses[-1]).max())


class Slow(nn.Module):
    """The running average of a model's trainable parameters, in single precision at least, and its count of steps.

    Held as parameters without gradient, not as buffers, which DDP by default sends to all processes in every forward
    pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values, self.steps = nn.ParameterDict(), 0

    @torch.no_grad()
    def grow(self, model: nn.Module) -> None:
        """Take the model's values of what is new in it: parameters, and rows of those that grew."""
        for name, parameter in trainable(model).items():
            old = self.values[_key(name)] if _key(name) in self.values else parameter[:0]
            if old.shape != parameter.shape:
                value = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
                value[: len(old)] = old
                self.values[_key(name)] = nn.Parameter(value, requires_grad=False)

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """One step towards the model, with `decay` the weight of the old values."""
        self.steps += 1
        slow, fast = list(self.named().values()), trainable(model)
        torch._foreach_lerp_(slow, [fast[n].to(s.dtype) for n, s in zip(self.named(), slow, strict=True)], 1 - decay)

    def named(self) -> dict[str, Tensor]:
        """Values by the parameters' names in the model."""
        return {key.replace("/", "."): value for key, value in self.values.items()}

    def get_extra_state(self) -> int:
        return self.steps

    def set_extra_state(self, state: int) -> None:
        self.steps = state


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
    replays = True

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
        loss = self.mean(self.losses(x, y))
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
            losses = self.losses(mx, my)
        # The same call with the same inputs, so that positions of text are the same ones.
        with torch.no_grad(), evaluating(self.model), self.model.backbone.recorded() as slow:
            functional_call(Losses(self.model), self._slow_values(), (mx, my))
        return losses.sum() * share, distance(fast, slow, self.consistency).sum() * share

    def _slow_values(self) -> dict[str, Tensor]:
        """Slow parameters by their names in a module that holds the model."""
        return {f"model.{name}": value for name, value in self.slow.named().items()}

    def after_step(self) -> None:
        k = self.slow.steps + 1
        self.slow.update(self.model, min(1 - 1 / (k + 1), self.slow_decay) if self.slow_warmup else self.slow_decay)

    def end(self, experience: Experience) -> None:
        if self.reset_slow:
            self.slow.update(self.model, 0.0)

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        if self.eval_adapter == "fast" or not len(self.slow.values):
            return super().predict(inputs, task)
        return functional_call(_Predict(self.model), self._slow_values(), (inputs, task))

    @torch.no_grad()
    def measurements(self) -> dict[str, float]:
        fast, slow = trainable(self.model), self.slow.named()
        far = sum(float((fast[n] - slow[n]).square().sum()) for n in slow)
        return {"slow_distance": (far / max(sum(float(fast[n].square().sum()) for n in slow), 1e-30)) ** 0.5}


class _Predict(nn.Module):
    """Prediction as the forward pass of a module, for `functional_call`; parameters are `model.<name>`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, task: int | None) -> Tensor:
        return getattr(self.model, "predict", self.model)(inputs, task)


def _key(name: str) -> str:
    return name.replace(".", "/")  # a module's attribute name may not hold a dot
