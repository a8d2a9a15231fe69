"""RoTTA: a balanced memory of recent, certain samples, statistics that follow it, and a slow teacher that predicts.

Source   Yuan, Xie, Li, "Robust Test-Time Adaptation in Dynamic Scenarios", CVPR 2023, arXiv:2303.13899, equations 2-10.
Checked  against BIT-DA/RoTTA core/adapter/rotta.py and core/utils (67e34c9, MIT).
    μ ← (1 − a) μ + a μ_memory, σ² likewise                                  a = share; they normalise as well
    keep the N samples with low  1 / (1 + exp(−age / N)) + H / ln C,  of a predicted class at most ⌈N / C⌉
    every so many samples:  loss = mean over the memory of E(age) · −Σ_k softmax(t)_k log softmax(z)_k,
    E = exp(−age / N) / (1 + exp(−age / N)),  t = f(m; θ'),  z = f(A(m); θ);   then  θ' ← (1 − ν) θ' + ν θ
Differs  at most one update a batch (with batches of `update_every` samples it is theirs); layer norms adapt too;
         evaluation mode, unless `training_mode` is set, which the prediction never is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from clplat import Frozen, require
from clplat.components.augment import augment, draw
from clplat.components.balanced import place
from clplat.components.losses import cross_entropy, entropy
from clplat.components.memory import gathered
from clplat.components.norms import batch_of, norm_affine
from clplat.strategies._affine import refuse_without_norms
from clplat.strategies._taught import Taught
from clplat.strategy import evaluating


class RoTTA(Taught):
    """The teacher predicts, also in evaluation, by the statistics it has followed. Shapes: B images, C classes, N held.

    Settings: Adam 1e-3, batch 64 (CIFAR).

    Args:
        memory: N ≥ 1, images held.
        update_every: images between two updates, ≥ 1; null takes as many as the memory holds.
        share: a in [0, 1], of the memory in the statistics.
        slow_rate: ν in [0, 1].
    """

    paper = "arXiv:2303.13899"
    searched = {"share": (0.01, 0.2, "log"), "slow_rate": (1e-4, 1e-2, "log")}
    statistics = "follow"

    def __init__(
        self,
        *,
        memory: int = 64,
        update_every: int | None = None,
        share: float = 0.05,
        slow_rate: float = 0.001,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        refuse_without_norms(self)
        require("memory", memory, memory >= 1, "≥ 1")
        require("update_every", update_every, update_every is None or update_every >= 1, "≥ 1 or null")
        require("share", share, 0 <= share <= 1, "in [0, 1]")
        require("slow_rate", slow_rate, 0 <= slow_rate <= 1, "in [0, 1]")
        self.memory, self.update_every = memory, update_every or memory
        self.share, self.slow_rate = share, slow_rate
        self.teacher = Frozen(self.model)

    def _chosen(self) -> Iterable[nn.Parameter]:
        return norm_affine(self.model)

    def _start(self) -> dict[str, Any]:
        # images (n, ...); class, uncertainty, age of each
        return {"images": None, "facts": [], "waiting": 0, "updates": 0}

    def _adapt(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        with evaluating(self.teacher):
            predictions = self.teacher(x)  # (B, C)
        self._remember(x, predictions)
        self.kept["waiting"] += self._whole(x)
        if self.kept["waiting"] < self.update_every or not len(self.kept["images"]):
            return predictions, None
        self.kept["waiting"] %= self.update_every
        return predictions, self._loss()

    def _remember(self, x: Tensor, predictions: Tensor) -> None:
        """Let the memory take what it wants of the images of all processes."""
        new = {"inputs": x, "labels": predictions.argmax(1), "uncertainty": entropy(predictions)}
        if self.world_size > 1:
            new = gathered(new)
        sound = new["uncertainty"].isfinite()
        new = {name: rows[sound] for name, rows in new.items()}
        held, facts = self.kept["images"], [list(row) for row in self.kept["facts"]]
        pairs = zip(new["labels"].tolist(), new["uncertainty"].tolist(), strict=True)
        kept = place(facts, [[c, h, 0] for c, h in pairs], self.memory, max(predictions.shape[1], 2))
        images = new["inputs"] if held is None else torch.cat([held, new["inputs"]])
        self.kept["images"] = images[torch.tensor(kept, dtype=torch.int64, device=images.device)].contiguous()
        self.kept["facts"] = facts

    def _loss(self) -> Tensor:
        """Of the whole memory, which every process holds; the statistics of both models follow it."""
        images = self.kept["images"]  # (n, C, H, W)
        self.kept["updates"] += 1
        generator = torch.Generator(self.seed.device).manual_seed(int(self.seed) * 1_000_003 + self.kept["updates"])
        draws = draw(1, images.shape[-2], images.shape[-1], generator)
        noise = torch.randn(1, *images.shape, generator=generator, dtype=images.dtype, device=images.device)
        with batch_of(follow=True):
            target = self.teacher(images)  # (n, C)
            logits = self.model(augment(images, draws, noise))
        losses = cross_entropy(logits, target)  # (n,)
        ages = losses.new_tensor([age for _, _, age in self.kept["facts"]])
        return (losses * torch.sigmoid(-ages / self.memory)).mean()

    @torch.no_grad()
    def after_step(self) -> None:
        if self.adapting:
            slow: list[Tensor] = list(self.teacher.model.parameters())
            torch._foreach_lerp_(slow, list(self.model.parameters()), self.slow_rate)

    def measurements(self) -> dict[str, float]:
        return {"updates": float(self.kept["updates"])} if self.adapting else {}
