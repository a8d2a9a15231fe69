"""Self-distillation for further pre-training: what the inputs alone teach is taken twice, the second time from oneself.

Source   Lee et al., "Self-Distillation for Further Pre-training of Transformers", ICLR 2023, arXiv:2210.02871, of which
         the abstract and the authors' code were at hand; masked objective: He et al., CVPR 2022, arXiv:2111.06377.
Checked  against seanie12/self-distillation trainer.py (4f6436f), which was read, not run.
    φ_0, ψ_0: encoder and decoder when an experience begins.  Of its steps, on its inputs x, without labels:
    n     L_MAE(x; φ, ψ) from φ_0, ψ_0                                              → teacher φ_T
    n     L_MAE(x; φ, ψ) + λ · mean_b ‖h(x_b; φ) − h(x_b; φ_T)‖²  from φ_0, ψ_0 again;   h of the whole image
    rest  CE(f(x; φ), y), the head included
Differs  there all three are runs of their own, of 20,000, 20,000 and 10,000 steps on one data set; here they share an
         experience's steps, its rate (`schedule` goes once over all three; theirs 1.5e-4, 1.5e-4 and 1e-4, each
         falling to 0) and weight decay; moments begin anew in each, as there. Adam's are the usual (0.9, 0.999), theirs
         (0.9, 0.95). ψ is a new, small decoder, theirs the pretrained MAE's, and goes on from one experience to the
         next. h is what the head is given: the class token's state behind the last normalisation, as theirs, where a
         backbone pools so, else what it pools (`vit_micro`: the normalised mean of the patches). λ is 1 there; ‖·‖² is
         a sum over features, so that it means more of a wide backbone. What the paper says of several rounds and of
         texts was not at hand: it is left out, and other backbones than vision transformers of timm are refused.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clplat import Experience, Frozen, Kind, Strategy, require
from clplat.components.masked import HEAD, Draws, MaskedPatches
from clplat.components.precision import wide
from clplat.strategy import evaluating


class SelfDistillationFPT(Strategy):
    """Further pre-training in each experience, then fine-tuning. B images of a batch, L patches, D features.

    Args:
        pretraining_steps: n ≥ 1, optimizer steps of the teacher, and as many of the student; an experience needs more
            than 2 n.
        weight: λ ≥ 0.
        mask_ratio: share of an image's patches that are hidden, in (0, 1).
        decoder_width: features of the decoder, a multiple of 32.
        decoder_depth: its blocks, ≥ 1.
        optimizer: sgd, adam or adamw; made anew for each experience.
        lr: learning rate, > 0.
        weight_decay: ≥ 0.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:2210.02871"
    in_turn = True
    unshardable = "its masked passes end within the backbone"
    searched = {"lr": (1e-5, 1e-2, "log"), "weight": (1e-3, 10.0, "log")}
    model: Any

    def __init__(
        self,
        *,
        model: nn.Module,
        pretraining_steps: int = 10,
        weight: float = 1.0,
        mask_ratio: float = 0.75,
        decoder_width: int = 64,
        decoder_depth: int = 1,
        optimizer: Literal["sgd", "adam", "adamw"] = "adamw",
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        **base,
    ):
        super().__init__(model=model, optimizer=optimizer, lr=lr, weight_decay=weight_decay, **base)
        require("pretraining_steps", pretraining_steps, pretraining_steps >= 1, "≥ 1")
        require("weight", weight, weight >= 0, "≥ 0")
        require("mask_ratio", mask_ratio, 0 < mask_ratio < 1, "in (0, 1)")
        whole = decoder_width > 0 and decoder_width % HEAD == 0
        require("decoder_width", decoder_width, whole, f"a multiple of {HEAD}")
        require("decoder_depth", decoder_depth, decoder_depth >= 1, "≥ 1")
        self.pretraining_steps, self.weight = pretraining_steps, weight
        backbone: Any = getattr(model, "backbone", model)
        self.decoder = MaskedPatches(backbone, mask_ratio, decoder_width, decoder_depth)
        self.draws = Draws()
        # φ_0 and ψ_0 while the teacher learns; then the two change places, and it holds the teacher.
        self.other, self.other_decoder = Frozen(backbone), Frozen(self.decoder)
        self.steps = 0  # of this experience
        self.notes = (
            "strategy: train_flops counts all steps as those of the teacher, the second of which it measures",
        )

    def begin(self, experience: Experience) -> None:
        self.steps = 0
        self.other.take(self.model.backbone)
        self.other_decoder.take(self.decoder)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        if self.steps >= 2 * self.pretraining_steps:
            return self.mean_loss(x, y)
        with evaluating(self):
            x = self.prepare(self.raw)  # not augmented
        noise = self.draws(self.decoder.count, self.global_batch, self.rank, self.world_size)  # (B, L)
        losses = self.decoder(self.model.backbone, x, noise)
        if self.steps >= self.pretraining_steps:
            losses = losses + self.weight * self._distances(x)
        return self.mean(losses)

    def _distances(self, x: Tensor) -> Tensor:
        """‖h(x; φ) − h(x; φ_T)‖² (B,), nothing being hidden."""
        return (wide(self.model.features(x)) - self.other(x)).square().sum(1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.steps in (self.pretraining_steps, 2 * self.pretraining_steps):
            optimizer.state.clear()

    def after_step(self) -> None:
        self.steps += 1
        self.draws.advance()
        if self.steps == self.pretraining_steps:
            _exchange(self.model.backbone, self.other.model)
            _exchange(self.decoder, self.other_decoder.model)

    def end(self, experience: Experience) -> None:
        if self.steps <= 2 * self.pretraining_steps and self.rank == 0:
            warnings.warn(
                f"strategy.pretraining_steps: {self.pretraining_steps} for the teacher and for the student leave none "
                f"of the {self.steps} steps of {experience.name} to learn its labels in (valid: fewer, or more steps "
                "by loop.max_epochs)",
                stacklevel=2,
            )

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


@torch.no_grad()
def _exchange(one: nn.Module, other: nn.Module) -> None:
    """Parameters and buffers of two modules of the same structure change places."""
    pairs = [*zip(one.parameters(), other.parameters(), strict=True), *zip(one.buffers(), other.buffers(), strict=True)]
    for mine, theirs in pairs:
        held = mine.clone()
        mine.copy_(theirs)
        theirs.copy_(held)
