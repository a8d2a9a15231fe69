"""HFT: half of what the blocks hold learns in an experience, drawn anew for each, and the other half stays as it is.

Source   Hui et al., "HFT: Half Fine-Tuning for Large Language Models", ACL 2025, arXiv:2404.18466. It was read through
         its abstract and notes on it, not in full; no code of the authors' is known.
    θ = (ϑ, ψ), |ϑ| ≈ |ψ|, of whole tensors:   ϑ ← ϑ − η ∂ CE(f(x; ϑ, ψ), y) / ∂ϑ,   ψ ← ψ
    ϑ of each block: 2 of W_q, W_k, W_v, W_o;  of W_up, W_down, W_gate 2 in one half of the blocks and 1 in the other;
    1 of 2 norms;  drawn when an experience begins.  Embeddings and what gives the logits always learn
Differs  the numbers are those of a Llama. In general the share ρ of each category, in each block as far as it goes:
         what is left over goes to blocks that are drawn, so that the sum is ρ of all of a category; a last part of a
         tensor is drawn, too. A layer's bias goes with its weight; of a fused qkv all parts learn, or none. Other
         layers with matrices (convolutions) are a category. `layer` and `model` are our reading of the paper's
         ablation. What lies outside the blocks learns, a last norm included, of which the notes say nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from clplat import Experience, Kind, Strategy, require
from clplat.backbones.base import Classifier
from clplat.errors import UserError

Granularity = Literal["category", "layer", "model"]


def drawn(sizes: Sequence[int], share: float, draw: torch.Generator) -> list[list[int]]:
    """Which units of each group learn, by place: ⌊share · n⌋ of n, and one more in groups that are drawn.

    All together they are share · Σ n, or where that is not whole one of its neighbours, share · Σ n on average.
    """
    exact = [round(share * n, 9) for n in sizes]  # 0.07 · 100 is more than 7 in floating point
    counts = [int(e) for e in exact]
    left = round(sum(exact) - sum(counts), 9)
    more = int(left) + int(torch.rand((), generator=draw, dtype=torch.float64) < left - int(left))
    open_ = [g for g in torch.randperm(len(sizes), generator=draw).tolist() if exact[g] > counts[g]]
    for g in open_[:more]:
        counts[g] += 1
    return [torch.randperm(n, generator=draw)[:k].tolist() for n, k in zip(sizes, counts, strict=True)]


class HFT(Strategy):
    """Half fine-tuning. A unit is a layer within a block: its weight, and its bias if it has one.

    Args:
        share: ρ of the units that learn in an experience, in [0, 1]; 1 makes this `naive`.
        granularity: where it is counted: category, within the attention, FFN and other matrices and the norms of each
            block; layer, within all of a block; model, within all blocks together.
        outside: whether the backbone's parameters outside its blocks (embeddings, a language model's last layer) learn.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:2404.18466"
    unshardable = "it holds parts of whole weights still"
    searched = {"share": (0.3, 0.7)}
    model: Classifier
    seed: Tensor

    def __init__(
        self,
        *,
        model: Classifier,
        share: float = 0.5,
        granularity: Granularity = "category",
        outside: bool = True,
        **base,
    ):
        super().__init__(model=model, **base)
        require("share", share, 0 <= share <= 1, "in [0, 1]")
        valid = ("category", "layer", "model")
        require("granularity", granularity, granularity in valid, ", ".join(valid))
        if not model.backbone.blocks:
            raise UserError("backbone: has no blocks of which a part could learn")
        self.share = share
        self._kinds = self._groups(granularity)  # these hold what the user did not freeze
        inside = {id(p) for groups in self._kinds for group in groups for unit in group for p in unit}
        for parameter in model.backbone.parameters():
            if id(parameter) not in inside and not outside:
                parameter.requires_grad_(False)
        self.register_buffer("seed", torch.randint(2**31, ()))  # equal on all processes, which were seeded alike

    def _groups(self, granularity: Granularity) -> list[list[list[list[nn.Parameter]]]]:
        """Units by kind and group: share is that of a kind, and as far as it goes that of each group."""
        backbone, met = self.model.backbone, set[int]()
        names = {id(module): name for name, module in backbone.named_modules()}
        kinds: dict[str, dict[int, list[list[nn.Parameter]]]] = {}
        for position, block in enumerate(backbone.blocks):
            for module in block.modules():
                own = [p for p in module.parameters(recurse=False) if id(p) not in met and p.requires_grad]
                if not own:
                    continue
                met |= {id(p) for p in own}
                kind = "matrices" if any(p.ndim > 1 for p in own) else "norms"
                if isinstance(module, nn.Linear):
                    kind = backbone.role(names[id(module)]) or kind
                kind, group = (kind if granularity == "category" else ""), (0 if granularity == "model" else position)
                kinds.setdefault(kind, {}).setdefault(group, []).append(own)
        return [list(groups.values()) for groups in kinds.values()]

    def begin(self, experience: Experience) -> None:
        """Draw what learns: a function of the seed and the experience's place alone."""
        draw = torch.Generator().manual_seed(int(self.seed) + experience.index)
        for groups in self._kinds:
            chosen = drawn([len(group) for group in groups], self.share, draw)
            for group, places in zip(groups, chosen, strict=True):
                for place, unit in enumerate(group):
                    for parameter in unit:
                        parameter.requires_grad_(place in places)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        return self.mean_loss(x, y)

    def measurements(self) -> dict[str, float]:
        """Share of the blocks' numbers that learned last."""
        units = [unit for groups in self._kinds for group in groups for unit in group]
        learned, whole = (sum(p.numel() for u in units for p in u if p.requires_grad or a) for a in (False, True))
        return {"trained_share": learned / max(whole, 1)}
