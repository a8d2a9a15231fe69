"""LoRA: one low-rank adapter learns all experiences in turn, the baseline of those that protect what was learned.

Source   Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685; in sequence as
         "SeqLoRA" in Wang et al., arXiv:2310.14152, whose values the defaults are.
    h = W x + s B A dropout(x),   s = alpha / r        loss = CE(f(x; A, B), y)
Differs  their gradients are clipped to a norm of 1, which is the loop's (`loop.clip_norm: 1`) and not on by itself.
"""

from __future__ import annotations

from clplat import Experience
from clplat.strategies._lora import Adapted


class SequentialLoRA(Adapted):
    """One adapter, trained in sequence and not protected. The backbone is frozen."""

    paper = "arXiv:2106.09685"
    unshardable = ""
    plain_passes = True

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self.adapters.add("shared")
        self.adapters.use("shared", train="shared")
