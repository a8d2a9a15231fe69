"""Dynamic EMA: an average follows the weights by a rate from their gradients, and takes their place at the end.

Source   Qiao et al., "Large Continual Instruction Assistant", ICML 2025, arXiv:2410.10868.
Checked  by notes on the official code (JingyangQiao/CoIN, MIT); the paper could not be read in full.
    for each tensor after each step:   a = ‖θ_t − θ*‖₁,   b = ‖g_t‖₁,   c = ‖g_t − g_{t−1}‖₁
    code:    θ* ← (1 − w) θ* + w θ_t,   w = 2 (1 + b) / (a c),              w = 0.01 unless 0 < w < 1
    paper:   θ* ← β θ* + (1 − β) θ_t,   β = (1 + b) ‖θ_t − θ_{t−1}‖₁ / (a c), β = 0.99 unless 0 < β < 1
    at the end   θ ← θ*
Differs  θ* begins as the weights before the experience, the code's as those after its first step, when part of the
         past is gone. Everything trained is averaged, full weights and the head too, where theirs are adapters and a
         projector; running statistics stay as learned. Adapters chosen by instructions, their other part, are not here.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from clplat.components.merging._base import Merge, require
from clplat.components.per_parameter import trainable
from clplat.errors import UserError
from clplat.strategy import Strategy

FALLBACK = 0.01  # w where the rule gives none


def rate(now: Tensor, slow: Tensor, gradient: Tensor, earlier: Tensor | None, moved: Tensor | None = None) -> Tensor:
    """w of one tensor, () float64, NaN where the rule gives none.

    Args:
        now: θ_t.
        slow: θ*.
        gradient: g_t.
        earlier: g_{t−1}; None in the first step.
        moved: θ_t − θ_{t−1}, for the paper's rule instead of the code's.
    """
    if earlier is None:
        return now.new_full((), torch.nan, dtype=torch.float64)
    a, b, c = ((now - slow).double().abs().sum(), gradient.double().abs().sum(),
               (gradient - earlier).double().abs().sum())  # fmt: skip
    ratio = (1 + b) / (a * c)
    found = 2 * ratio if moved is None else 1 - ratio * moved.double().abs().sum()
    return torch.where((found > 0) & (found < 1), found, torch.nan)


class DynamicEMA(Merge):
    """An average of everything that is trained, the head too, which the model takes on when an experience ends.

    Within an experience training goes on as without it. Keeps two copies of what is trained.

    Args:
        mode: whose rate: the code's, by which results were published, or the paper's, which differs from it.
    """

    paper = "arXiv:2410.10868"
    by_factors = True

    def __init__(self, *, mode: Literal["code", "paper"] = "code", **base: Any) -> None:
        super().__init__(**base)
        require("mode", mode, mode in ("code", "paper"), "code or paper")
        self.mode = mode
        self.slow: dict[str, Tensor] = {}  # θ*
        self.earlier: dict[str, Tensor] = {}  # g_{t−1}
        self._gradients: dict[str, Tensor] = {}  # of the step that is being taken
        self._last: dict[str, Tensor] = {}  # θ_{t−1}, within a step
        self.counts = [0.0, 0.0, 0.0]  # tensors averaged, sum of their w, those without a rate of their own

    def faults(self, strategy: Strategy) -> list[str]:
        if not strategy.in_turn:
            return []
        what = f"{type(strategy).__name__} trains networks in turn, and dynamic_ema averages over all steps"
        return [f"merge: {what} (valid: none, breadcrumbs, lines)"]

    def begin(self, strategy: Strategy) -> None:
        self.slow = {name: p.detach().clone() for name, p in trainable(strategy.model).items()}
        self.earlier, self.counts = {}, [0.0, 0.0, 0.0]

    @torch.no_grad()
    def before_step(self, strategy: Strategy) -> None:
        named = trainable(strategy.model)
        self._gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        self._last = {name: p.clone() for name, p in named.items()} if self.mode == "paper" else {}

    @torch.no_grad()
    def after_step(self, strategy: Strategy) -> None:
        named = trainable(strategy.model)
        if late := sorted(named.keys() - self.slow.keys()):
            raise UserError(f"merge: {type(strategy).__name__} thawed {late[0]} after `grow`: it has no weights before")
        rates = []
        for name, now in named.items():
            gradient = self._gradients.get(name, torch.zeros_like(now))
            moved = now - self._last[name] if self.mode == "paper" else None
            found = rate(now, self.slow[name], gradient, self.earlier.get(name), moved)
            w = torch.nan_to_num(found, nan=FALLBACK)
            self.slow[name].copy_(torch.lerp(self.slow[name], now, w.to(now.dtype)))
            rates.append(found)
        self.earlier, self._gradients, self._last = self._gradients, {}, {}
        every = torch.stack(rates)
        sums = torch.stack([torch.nan_to_num(every, nan=FALLBACK).sum(), every.isnan().sum()]).tolist()
        self.counts = [a + b for a, b in zip(self.counts, [len(rates), *sums], strict=True)]

    @torch.no_grad()
    def end(self, strategy: Strategy) -> None:
        for name, p in strategy.model.named_parameters():
            if name in self.slow:
                p.copy_(self.slow[name])
        self.slow, self.earlier = {}, {}

    def measurements(self) -> dict[str, float]:
        """Mean weight of the new values, and the share of tensors and steps in which the rule gave none."""
        count, total, without = self.counts
        return {"mean_weight": total / count, "fallback_share": without / count} if count else {}

    def state(self) -> dict[str, Any]:
        return {"slow": self.slow, "earlier": self.earlier, "counts": self.counts}

    def load(self, state: dict[str, Any]) -> None:
        self.slow, self.earlier, self.counts = state["slow"], state["earlier"], list(state["counts"])
