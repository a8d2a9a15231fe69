"""RMU: in what is to be erased, a layer's activations are steered to a random direction; in the rest they are held.

Source   Li et al., "The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning", ICML 2024,
         arXiv:2403.03218, section 5.
Checked  against locuslab/open-unlearning src/trainer/unlearn/rmu.py, which takes it from the authors' code.
    u ~ U[0, 1)^D, scaled to ‖u‖ = 1, one for a request;   h_t(x; θ) the output of block ℓ at token t
    request: loss = mean_x mean_t ‖ h_t(x_f; θ) − c · u ‖² + α · mean_x mean_t ‖ h_t(x_r; θ) − h_t(x_r; θ_o) ‖²
             by steps on the weights of the FFN layers of blocks ℓ − 2, ℓ − 1 and ℓ alone
Differs  ‖·‖² is the sum over D, as in the paper (the code's mean scales the whole loss). Of an FFN the weights of all
         its layers move (the authors' code: those of the last). Tokens are those of prompt and answer, or an image's
         patches. Retained samples are of a memory; the paper's are a text that has nothing to do with the data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clplat import Experience, Kind, require
from clplat.components.precision import wide
from clplat.errors import UserError
from clplat.strategies.grad_diff import GradDiff
from clplat.strategy import losses as losses_of


def distances(states: Tensor, aim: Tensor, real: Tensor) -> Tensor:
    """Squared distance (b,) of states (b, P, D) from `aim`, (D,) or (b, P, D): mean over tokens that `real` (b, P) is 1
    for."""
    return ((states - aim).square().sum(2) * real).sum(1) / real.sum(1).clamp(min=1)


class RMU(GradDiff):
    """Plain training; a request is answered by steering activations. B samples, P tokens, D features of a block.

    Args:
        layer: ℓ, place of the block among the backbone's, from 0; null: a quarter of the way up (7 of 32 there).
        steering: c > 0, size of the activations aimed at; the larger the model's are, the larger this has to be.
        retain_weight: α ≥ 0, weight of the retained samples.
        forget_lr: learning rate of a request, > 0. This and α are ours, for small models and few steps; the paper has
            5e-5 and 1200 for one of 7 billion weights.
    """

    paper = "arXiv:2403.03218"
    unshardable = ""
    searched = {"forget_lr": (1e-5, 0.1, "log"), "steering": (1.0, 100.0, "log"), "retain_weight": (0.1, 1200.0, "log")}
    compares = True
    erasure = "approximate: a layer's activations for the erased data are made noise; no guarantee beyond that"

    def __init__(
        self, *, layer: int | None = None, steering: float = 6.5, retain_weight: float = 1.0,
        forget_lr: float = 1e-2, **base: Any,
    ):  # fmt: skip
        super().__init__(retain_weight=retain_weight, forget_lr=forget_lr, **base)
        blocks = self.model.backbone.blocks
        if not blocks:
            raise UserError("strategy: rmu needs blocks, one of whose outputs it steers")
        self.layer = len(blocks) // 4 if layer is None else layer
        require("layer", layer, 0 <= self.layer < len(blocks), f"0 to {len(blocks) - 1}, or null")
        require("steering", steering, steering > 0, "> 0")
        self.steering = steering
        near = {id(m) for block in blocks[max(0, self.layer - 2) : self.layer + 1] for m in block.modules()}
        self._layers = [m for m in self.model.backbone.layers("ffn").values() if id(m) in near]
        if not self._layers:
            raise UserError(f"strategy: rmu needs FFN layers up to block {self.layer}{self.model.backbone.offered()}")
        if not any(m.weight.requires_grad for m in self._layers):
            self.notes = ["strategy: rmu moves FFN layers alone, and these are frozen: requests will change nothing"]
        self._resting: list[nn.Parameter] = []  # what a request leaves as it is

    def grow(self, experience: Experience) -> None:
        self._thaw()
        super().grow(experience)
        if experience.kind is Kind.FORGET:
            moved = {id(layer.weight) for layer in self._layers}
            self._resting = [p for p in self.model.parameters() if p.requires_grad and id(p) not in moved]
            for p in self._resting:
                p.requires_grad_(False)

    def _thaw(self) -> None:
        for p in self._resting:
            p.requires_grad_(True)
        self._resting = []

    def forget_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        assert self.before is not None
        x, y = batch  # (B, ...), (B,)
        count, beside = len(x), self._beside()
        if beside is not None:
            x, y = torch.cat([x, beside[0]]), torch.cat([y, beside[1]])
        states, real = self._states(self.model, x, y)
        aim = self.steering * self._direction(states.shape[2]).to(states)
        loss = self.mean(distances(states[:count], aim, real[:count]))
        if beside is None:
            return loss
        with torch.no_grad():  # the same batch, so that text lies in the same places
            held, _ = self._states(self.before.model, x, y)
        return loss + self.retain_weight * self.mean(distances(states[count:], held[count:], real[count:]))

    def _states(self, model: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What block ℓ puts out (b, P, D), and which of its tokens are real (b, P)."""
        with model.backbone.recorded() as states:
            losses_of(model, x, y)  # which reads the answers of a text, too
        found = states.outputs[self.layer]
        if len(found) != len(x):
            raise UserError(f"strategy.layer: block {self.layer} reads no samples, but the classes' names")
        found = wide(found).reshape(len(x), -1, found.shape[-1])  # a layer without tokens has one
        real = None if states.valid is None else states.valid[self.layer]
        return found, found.new_ones(found.shape[:2]) if real is None else real.to(found)

    def _direction(self, features: int) -> Tensor:
        """u (D,), the same in all steps of a request and on all processes. On the CPU."""
        drawn = torch.rand(features, generator=torch.Generator().manual_seed(self._draw))
        return drawn / drawn.norm()

    def end(self, experience: Experience) -> None:
        super().end(experience)
        self._thaw()
