"""SOMF: a mask over what an experience changed, trained on samples of the past, and the change that it leaves.

Source   Yi et al., "A safety realignment framework via subspace-oriented model fusion for large language models",
         Knowledge-Based Systems 2024, arXiv:2405.09055.
Checked  by notes on the official code (xinykou/safety_realignment, no licence); the paper could not be read in full.
    τ = θ − θ_before;   for each tensor a mask  m = σ((φ + ln u − ln(1 − u)) / T),  u ~ U(0, 1),  φ = 0 at first
    θ(m) = θ_before + m ⊙ τ / mean(m);   φ ← argmin E_u loss(past samples; θ(m)) by Adam, all weights frozen
    at the end   θ ← θ_before + σ(φ) ⊙ τ / mean(σ(φ))
Differs  θ_before stands for the aligned model, and what is to be retained are a strategy's remembered samples by the
         model's own loss, where theirs are preferences by DPO. The mask in use is the probability of a binary one, not
         a draw. One task vector at a time, of one experience. Running statistics and the head stay as learned.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from clplat.components.losses import single_losses
from clplat.components.merging._base import Anchored, require
from clplat.components.stored import Stored
from clplat.strategy import Strategy, evaluating


def concrete(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """A relaxed binary mask for draws `uniform` in (0, 1), both shaped alike."""
    return ((logits + uniform.log() - (1 - uniform).log()) / temperature).sigmoid()


def masked(change: Tensor, mask: Tensor) -> Tensor:
    """m ⊙ τ / mean(m); zeros where the mask is zero throughout."""
    return mask * change / mask.mean().clamp(min=torch.finfo(mask.dtype).tiny)


class SOMF(Anchored):
    """Trains the mask on what the strategy's memory held before the experience; leaves the first one as learned.

    Args:
        steps: of training the mask, ≥ 0; 0 changes nothing.
        lr: learning rate of φ at first, > 0, cosine to 0.
        batch_size: past samples in each step, ≥ 1.
        temperature: T > 0.
    """

    paper = "arXiv:2405.09055"
    by_factors = True
    statistics = False

    def __init__(
        self, *, steps: int = 100, lr: float = 0.01, batch_size: int = 16, temperature: float = 0.5, **base: Any
    ) -> None:
        super().__init__(**base)
        require("steps", steps, steps >= 0, "≥ 0")
        require("lr", lr, lr > 0, "> 0")
        require("batch_size", batch_size, batch_size >= 1, "≥ 1")
        require("temperature", temperature, temperature > 0, "> 0")
        self.steps, self.lr, self.batch_size, self.temperature = steps, lr, batch_size, temperature
        self.past: dict[str, Tensor] = {}  # what the memory held: inputs (n, ...), labels (n,)
        self.number = 0  # of experiences merged; the draws of each are its own
        self.losses: list[float] = []  # first and last of the last experience

    def faults(self, strategy: Strategy) -> list[str]:
        if isinstance(getattr(strategy, "memory", None), Stored):
            return []
        what = f"merge: somf trains its mask on past samples, and {type(strategy).__name__} keeps none"
        return [f"{what} (valid: a strategy with a memory, as er; or lines, breadcrumbs)"]

    def begin(self, strategy: Strategy) -> None:
        super().begin(strategy)
        memory: Any = strategy.memory
        self.past = dict(zip(("inputs", "labels"), memory.everything(), strict=False)) if len(memory) else {}
        self.number += 1

    def merged(self, strategy: Strategy, changes: dict[str, Tensor]) -> dict[str, Tensor]:
        past, self.past, self.losses = self.past, {}, []
        if not past or not self.steps:
            return changes
        logits = {name: torch.zeros_like(change, requires_grad=True) for name, change in changes.items()}
        optimizer = torch.optim.Adam(logits.values(), lr=self.lr)
        draws = torch.Generator().manual_seed(torch.initial_seed() + self.number)  # alike on all processes
        with torch.enable_grad(), evaluating(strategy):
            for step in range(self.steps):
                values = {}
                for name, change in changes.items():
                    u = torch.rand(change.shape, generator=draws).clamp(1e-6, 1 - 1e-6).to(change)
                    values[name] = self.before[name] + masked(change, concrete(logits[name], u, self.temperature))
                rows = torch.randint(len(past["labels"]), (self.batch_size,), generator=draws).to(past["labels"].device)
                x = strategy.prepare(past["inputs"][rows])
                loss = single_losses(strategy.model, x, past["labels"][rows], values).mean()
                found = torch.autograd.grad(loss, list(logits.values()), allow_unused=True)
                for phi, gradient in zip(logits.values(), found, strict=True):
                    phi.grad = gradient
                optimizer.param_groups[0]["lr"] = self.lr * (1 + math.cos(math.pi * step / self.steps)) / 2
                optimizer.step()
                if step in (0, self.steps - 1):
                    self.losses.append(float(loss.detach()))
        return {name: masked(change, logits[name].detach().sigmoid()) for name, change in changes.items()}

    def measurements(self) -> dict[str, float]:
        """Loss on past samples in the mask's first and last step."""
        return dict(zip(("first_loss", "last_loss"), self.losses, strict=False))

    def state(self) -> dict[str, Any]:
        return super().state() | {"past": self.past, "number": self.number}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.past, self.number = state["past"], state["number"]
