"""What strategies that learn by low-rank adapters have in common: a frozen backbone, and adapters beside its layers.

Adapters change a layer as follows.
    h = W x + Σ_t s B_t A_t dropout(x),   s = alpha / r
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from clplat import Kind, Strategy
from clplat.adapters import LoRA
from clplat.backbones.base import Classifier, Projection

Where = Literal["attention", "ffn", "both"]


class Adapted(Strategy):
    """Common part: the model's adapters, and plain training. A subclass adds adapters in `grow`.

    Args:
        where: role of the layers that are adapted.
        projections: of an attention's layers, those that are adapted; one that is fused counts as each of its parts,
            which then share A. Empty takes all.
        rank: r ≥ 1 of an adapter.
        alpha: a change is scaled by alpha / r, > 0.
        dropout: share of a layer's inputs that is dropped on the way to its adapters in training, in [0, 1).
        optimizer: sgd, adam or adamw; made anew for each experience.
        lr: learning rate, > 0.
    """

    kinds = frozenset({Kind.LEARN})
    factored = True
    searched = {"lr": (1e-5, 1e-2, "log"), "dropout": (0.0, 0.3)}
    model: Classifier

    def __init__(
        self,
        *,
        model: Classifier,
        where: Where = "attention",
        projections: list[Projection] = ["query", "value"],  # noqa: B006
        rank: int = 8,
        alpha: float = 32.0,
        dropout: float = 0.1,
        optimizer: Literal["sgd", "adam", "adamw"] = "adamw",
        lr: float = 1e-3,
        **base,
    ):
        super().__init__(model=model, optimizer=optimizer, lr=lr, **base)
        self.adapters = LoRA(model.backbone, where, rank=rank, alpha=alpha, dropout=dropout, projections=projections)
        model.backbone.requires_grad_(False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        return self.mean_loss(x, y)
