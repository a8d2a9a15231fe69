"""LoRAMoE: experts of low rank share each FFN layer, one half of them meant for knowledge and one for tasks.

Source   Dou, Zhou et al., "LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style
         Plugin", ACL 2024, arXiv:2312.09979. It was read through its code and summaries, not in full.
Checked  by reading Ablustrund/LoRAMoE, which was not run; it switches the constraint off (δ = β = 0) in its script.
    g(x) = softmax(W_g x),   y = W x + s Σ_n g_n(x) B_n A_n dropout_n(x),   s = alpha / r, of each position x
    Q_nm = Σ over the tokens j of row m of g_n(x_j),   Z = I Q
    I = 1 + δ for the experts of the experience's kind, 1 − δ for the others
    loss = CE(f(x), y) + β Σ_layers var(Z) / mean(Z)²
Differs  the form of the constraint is the code's; the paper's summaries have var / mean. A batch has one kind, that of
         its experience, where the paper mixes both in one task: so I does not depend on m. The code's Q counts padding,
         so that a row's load hangs on its batch. Variance and mean are over the batch of all processes (the code: each
         its own). At the minimum the experts with the larger I have the smaller share: which half is called knowledge
         is a name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from clplat import Experience, Kind, Strategy, require
from clplat.adapters.experts import ExpertLinear, imbalance, pass_over_padding
from clplat.adapters.replace import replaced
from clplat.backbones.base import Classifier, Role


class LoRAMoE(Strategy):
    """One set of experts and routers for all experiences; the backbone is frozen.

    Args:
        experts: N ≥ 2, even; the first half is for knowledge.
        rank: r ≥ 1, of an expert.
        alpha: a change is scaled by alpha / r, > 0.
        dropout: share of a layer's inputs that is dropped on the way to each expert in training, in [0, 1).
        kind_gap: δ in [0, 1); 0 only evens the load.
        balance: β ≥ 0, weight of the constraint, a sum over layers, so that it does not carry over between depths.
        knowledge: indices in the stream of the experiences that bring knowledge; the others bring tasks.
        roles: of the layers that get experts.
        optimizer: sgd, adam or adamw; made anew for each experience.
        lr: learning rate, > 0.
        schedule: of the learning rate within an experience; cosine ends at 0.
        warmup: share of an experience's steps over which the rate rises linearly from 0, in [0, 1].
    """

    kinds = frozenset({Kind.LEARN})
    factored = True
    paper = "arXiv:2312.09979"
    unshardable = ""
    whole_batch = "its experts are to share the samples of a batch"
    searched = {"lr": (1e-5, 1e-2, "log"), "balance": (0.01, 1.0, "log")}
    model: Classifier

    def __init__(
        self,
        *,
        model: Classifier,
        experts: int = 6,
        rank: int = 4,
        alpha: float = 32.0,
        dropout: float = 0.05,
        kind_gap: float = 0.1,
        balance: float = 0.1,
        knowledge: list[int] = [],  # noqa: B006
        roles: list[Role] = ["ffn"],  # noqa: B006
        optimizer: Literal["sgd", "adam", "adamw"] = "adamw",
        lr: float = 2e-4,
        schedule: Literal["constant", "cosine"] = "cosine",
        warmup: float = 0.03,
        **base,
    ):
        super().__init__(model=model, optimizer=optimizer, lr=lr, schedule=schedule, warmup=warmup, **base)
        require("experts", experts, experts >= 2 and experts % 2 == 0, "even, ≥ 2")
        require("rank", rank, rank >= 1, "≥ 1")
        require("alpha", alpha, alpha > 0, "> 0")
        require("dropout", dropout, 0 <= dropout < 1, "in [0, 1)")
        require("kind_gap", kind_gap, 0 <= kind_gap < 1, "in [0, 1)")
        require("balance", balance, balance >= 0, "≥ 0")
        self.kind_gap, self.balance, self.knowledge = kind_gap, balance, set(knowledge)
        model.backbone.requires_grad_(False)
        made = replaced(model.backbone, roles, lambda old: ExpertLinear(old, experts, rank, alpha, dropout))
        self._layers = list(made.values())
        self._alike = [model.backbone.alike(name) for name in made]  # its rows are the same in every process
        pass_over_padding(model.backbone)
        self._signs = torch.ones(experts)  # 1 for the experts of the experience's kind, −1 for the others

    def faults(self, experiences: Sequence[Experience], started: bool) -> list[str]:
        unknown = sorted(self.knowledge - {e.index for e in experiences})
        last = len(experiences) - 1
        return [f"strategy.knowledge: no experience has the index {i} (valid: 0 to {last})" for i in unknown]

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        half = len(self._signs) // 2
        self._signs = torch.tensor([1.0] * half + [-1.0] * half)
        if experience.index not in self.knowledge:
            self._signs = -self._signs

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        loss = self.mean_loss(x, y)
        loads = [(layer.take_load(), alike) for layer, alike in zip(self._layers, self._alike, strict=True)]  # (N, M)
        if not self.balance:
            return loss
        coefficients = (1 + self.kind_gap * self._signs)[:, None].to(loss.device)
        uneven = torch.stack([imbalance(coefficients * q, alike) for q, alike in loads if q is not None]).sum()
        return loss + self.balance * uneven.to(loss.dtype)
