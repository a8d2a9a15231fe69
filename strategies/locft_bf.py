"""LocFT-BF: fine-tuning of one matrix in a late block, in plain epochs over all edits, and no step where all is known.

Source   Yang et al., "Fine-tuning Done Right in Model Editing", ICLR 2026, arXiv:2509.22072. It was read through notes
         and the settings of its code (ICT-STAR/LocFT), not in full; the code was not run.
    θ_l the last linear layer of the FFN of one block, all else frozen;   loss = mean_b CE_b(f(x; θ_l), y)
    no step where the batch's loss is below 0.01, and none in what is left of an experience once an epoch's mean is
Differs  breadth first (each epoch passes over all edits) is what every learner does here: depth first, its rival, is a
         stream with an edit an experience. A head beside the backbone learns, too. The block is ⌊0.7 L⌋ of L unless
         told: 22 of 32, as the code has it for Llama-3-8B (6 of 28 for Qwen2.5-7B; for Mistral-7B all of block 23 of
         32: `tuned: block`). An answer ends with its end token, in the stream's words. Its pad token is not added.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from clplat import Experience, Kind, Strategy, require
from clplat.adapters import block_of
from clplat.backbones.base import Classifier
from clplat.errors import UserError


class LocFTBF(Strategy):
    """Localised fine-tuning. With a language model whose answers are words nothing but the chosen matrix changes.

    Args:
        block: of the backbone, from 0, or from −1 backwards; null: ⌊0.7 L⌋ of L.
        tuned: layer, the weight of the last linear layer of its FFN; block, all parameters of the block.
        known: loss ≥ 0 below which a batch, and an epoch by its mean, count as known; 0: none does.
        optimizer: sgd, adam or adamw; made anew for each experience.
        lr: learning rate, > 0.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:2509.22072"
    unshardable = ""
    searched = {"lr": (1e-5, 1e-2, "log"), "tuned": ["layer", "block"]}
    model: Classifier
    sums: Tensor
    done: Tensor
    skipped: Tensor

    def __init__(
        self,
        *,
        model: Classifier,
        block: int | None = None,
        tuned: Literal["layer", "block"] = "layer",
        known: float = 1e-2,
        optimizer: Literal["sgd", "adam", "adamw"] = "adam",
        lr: float = 5e-4,
        **base,
    ):
        super().__init__(model=model, optimizer=optimizer, lr=lr, **base)
        require("tuned", tuned, tuned in ("layer", "block"), "layer or block")
        require("known", known, known >= 0, "≥ 0")
        self.known = known
        backbone, blocks = model.backbone, model.backbone.blocks
        if not blocks or (tuned == "layer" and not backbone.layers("ffn")):
            what = "linear FFN layers" if blocks else "blocks"
            raise UserError(f"backbone: has no {what} of which one could be chosen{backbone.offered()}")
        position = int(0.7 * len(blocks)) if block is None else block
        require("block", block, -len(blocks) <= position < len(blocks), f"{-len(blocks)} to {len(blocks) - 1}")
        position %= len(blocks)
        chosen: list[Tensor] = list(blocks[position].parameters())
        if tuned == "layer":
            own = [m for m in backbone.layers("ffn").values() if block_of(backbone, m) == position]
            valid = "a block with linear FFN layers"
            require("block", position, bool(own), valid)
            chosen = [own[-1].weight]
        trained = [p for p in chosen if p.requires_grad]
        backbone.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        self.register_buffer("sums", torch.zeros(2, dtype=torch.float64))  # of losses and samples of this epoch
        self.register_buffer("done", torch.zeros((), dtype=torch.bool))  # an epoch's mean was below `known`
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))  # batches of this experience without a step

    def begin(self, experience: Experience) -> None:
        self.sums.zero_()
        self.done.fill_(False)
        self.skipped.zero_()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        x, y = batch  # (B, ...), (B,)
        if batch_idx == 0:  # an epoch begins
            self.done |= bool(self.sums[1]) and bool(self.sums[0] < self.known * self.sums[1])
            self.sums.zero_()
        if self.done:
            self.skipped += 1
            return None
        loss = self.mean_loss(x, y)
        whole = loss.detach().double()
        if self.world_size > 1:  # all processes step, or none
            torch.distributed.all_reduce(whole)
            whole /= self.world_size
        samples = self.global_batch or len(x)
        self.sums += torch.stack([whole * samples, whole.new_tensor(samples)])
        if whole < self.known:
            self.skipped += 1
            return None
        return loss

    def measurements(self) -> dict[str, float]:
        """Batches of the last experience in which nothing was left to learn."""
        return {"batches_known": float(self.skipped)}
