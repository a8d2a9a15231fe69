"""SLCA: a backbone that learns slowly, and a classifier that is aligned after each experience on features drawn anew.

Source   Zhang et al., "SLCA: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained Model",
         ICCV 2023, arXiv:2303.05118, of which the abstract and the authors' code were at hand.
Checked  against GengDavid/SLCA models/slca.py (169d4e6).
    loss = CE over the classes of the experience;   rate of the backbone = ρ · rate of the head
    after each:  μ_c, Σ_c of the features φ(x) of its classes
    from the second on:  n features of every class met, f ~ N(μ_c, Σ_c), anew in each of E epochs, and SGD on the head
        with  CE(z / (τ ν), c),   z = head(f),   ν the mean over experiences of the norm of their classes' logits
    the next experience goes on from the head as it was before it was aligned
Differs  no multiple of the unit matrix is added to Σ_c, and means of older classes are not shrunk by up to a tenth, as
         the code does and the paper does not say. Rows of past classes get no gradient, but weight decay, where the
         code freezes them. A class that comes again has the moments of all its samples, each as it was when seen.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat import Experience, Frozen, Kind, Strategy, require
from clplat.backbones.base import Classifier
from clplat.components.gaussians import Gaussians
from clplat.components.losses import own_losses
from clplat.strategies._once import once, shared
from clplat.strategies._rows import require_rows


def over_norms(logits: Tensor, sizes: list[int]) -> Tensor:
    """Logits (n, C) over ν: the mean over tasks, of so many classes each, of the norm of their logits."""
    norms = [part.norm(dim=1, keepdim=True) + 1e-7 for part in logits.split(sizes, dim=1)]
    return logits / torch.stack(norms).mean(0)


class SLCA(Strategy):
    """Slow learner with classifier alignment. n features of a batch, D of them, C classes.

    Args:
        backbone_rate: ρ, learning rate of the backbone as a share of the head's (`lr`), in (0, 1].
        temperature: τ > 0; null: the logits as they are, without a norm.
        draws: n ≥ 1, features drawn of each class and epoch, and in each step of the alignment.
        align_epochs: E ≥ 0; 0 leaves the classifier as it was learned.
        chunk: samples that features are taken of at a time, ≥ 1.
        lr: learning rate of the head, > 0; in the alignment it falls to 0 by a cosine over the epochs.
        momentum: of sgd, which the alignment always is, in [0, 1).
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:2303.05118"
    unshardable = ""
    searched = {"lr": (1e-3, 1.0, "log"), "backbone_rate": (1e-3, 1.0, "log")}
    needs_classes = True
    model: Classifier
    present: Tensor
    aligned: Tensor
    seed: Tensor

    def __init__(
        self,
        *,
        model: Classifier,
        backbone_rate: float = 0.01,
        temperature: float | None = 0.1,
        draws: int = 256,
        align_epochs: int = 5,
        chunk: int = 32,
        lr: float = 0.01,
        momentum: float = 0.9,
        **base,
    ):
        super().__init__(model=model, lr=lr, momentum=momentum, **base)
        require_rows(model, "aligned")
        require("backbone_rate", backbone_rate, 0 < backbone_rate <= 1, "in (0, 1]")
        require("temperature", temperature, temperature is None or temperature > 0, "> 0, or null")
        require("draws", draws, draws >= 1, "≥ 1")
        require("align_epochs", align_epochs, align_epochs >= 0, "≥ 0")
        require("chunk", chunk, chunk >= 1, "≥ 1")
        self.backbone_rate, self.temperature, self.draws, self.chunk = backbone_rate, temperature, draws, chunk
        self.align_epochs = align_epochs
        self.gaussians, self.before = Gaussians(model.backbone.embed_dim), Frozen(model.head)
        self._met, self._sizes = list[int](), list[int]()  # classes in the order met, and how many in each experience
        self.register_buffer("present", torch.zeros(model.num_classes, dtype=torch.bool))
        self.register_buffer("aligned", torch.zeros((), dtype=torch.bool))
        self.register_buffer("seed", torch.randint(2**31, ()))  # equal on all processes, which were seeded alike

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self.before.grow(self.model.head)
        self.gaussians.grow(max(experience.classes, default=-1) + 1)
        if new := sorted(set(experience.classes) - set(self._met)):
            self._met += new
            self._sizes.append(len(new))
        self.present.zero_()
        self.present[list(experience.classes)] = True

    def begin(self, experience: Experience) -> None:
        if self.aligned:
            self.before.copy_to(self.model.head)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        (group,), slow = optimizer.param_groups, {id(p) for p in self.model.backbone.parameters()}
        rates = {id(p): self.lr * (self.backbone_rate if id(p) in slow else 1.0) for p in group["params"]}
        optimizer.param_groups.clear()
        for lr in sorted(set(rates.values())):
            optimizer.add_param_group({"params": [p for p in group["params"] if rates[id(p)] == lr], "lr": lr})
        return optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        return self.mean(own_losses(self.model, x, y, self.present))

    def end(self, experience: Experience) -> None:
        self.gaussians.open(shared(self))
        for x, y in once(self, self.training_data(experience), self.chunk):
            self.gaussians.add(self.model.features(x).detach(), y)
        self.gaussians.gather()
        self.before.take(self.model.head)
        if len(self._sizes) > 1 and self.align_epochs:
            self._align(experience.index)
            self.aligned.fill_(True)

    def _align(self, index: int) -> None:
        """Train the head on features drawn of every class; every process does it whole, with the same draws."""
        head, met = self.model.head, self._met
        learned = [p for p in head.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learned, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        draw = torch.Generator().manual_seed(int(self.seed) + index)
        moments = [self.gaussians.moments(c) for c in met]
        targets = torch.arange(len(met)).repeat_interleave(self.draws)
        for epoch in range(self.align_epochs):
            optimizer.param_groups[0]["lr"] = self.lr * (1 + math.cos(math.pi * epoch / self.align_epochs)) / 2
            normal = torch.randn(len(met), self.draws, self.gaussians.totals.shape[1], generator=draw)
            found = torch.cat([m + z.to(m) @ r.T for (m, r), z in zip(moments, normal, strict=True)])  # (n C, D)
            for part in torch.randperm(len(found), generator=draw).split(self.draws):
                logits = head(found[part.to(found.device)].to(learned[0].dtype))[:, met]
                if self.temperature is not None:
                    logits = over_norms(logits, self._sizes) / self.temperature
                optimizer.zero_grad()
                F.cross_entropy(logits, targets[part].to(logits.device)).backward()
                optimizer.step()
        optimizer.zero_grad()
