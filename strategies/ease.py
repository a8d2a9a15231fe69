"""EASE: an adapter for each experience, and class prototypes in the space of each; those that are missing are made up.

Source   Zhou et al., "Expandable Subspace Ensemble for Pre-Trained Model-Based Class-Incremental Learning", CVPR 2024,
         arXiv:2403.12030, of which the abstract and the authors' code were at hand.
Checked  against LAMDA-CL/LAMDA-PILOT models/ease.py (5240714), with `recalc_sim` and `use_reweight`, its default.
    experience t:  adapter t alone is trained and in use, φ_t;  loss = CE over the classes of the experience
    after it:  p_{c,j} = mean of φ_j over samples of c, for its classes c and all j ≤ t
    a class c first met in i has no sample in the spaces j > i; there, over the classes k that have,
        p_{c,j} = Σ_k w_k p_{k,j},   w = softmax_k cos(p_{c,i}, p_{k,i})
    prediction argmax_c  cos(φ_i(x), p_{c,i}) + a / (t − 1) Σ_{j ≠ i} cos(φ_j(x), p_{c,j})
Differs  adapters are LoRA (theirs: AdaptFormer), trained under the head that the run has, from the second experience on
         with the rows of old classes left out (theirs: a new cosine head for each). Sums over all samples of a class,
         wherever they come, in float64. Their code takes features to have 768 numbers. While the first experience
         lasts the head predicts, and in later ones the classes before it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat import Experience, require
from clplat.components.losses import own_losses
from clplat.components.prototypes import Prototypes
from clplat.strategies._lora import Adapted
from clplat.strategies._once import once, shared


def completed(means: Tensor, met: Tensor, home: Tensor) -> Tensor:
    """Prototypes (T, C, D) of every class in every space.

    Args:
        means: (T, C, D), of the samples of a class in a space.
        met: (T, C) bool, where there are any.
        home: (C,) space of the experience that a class was first met in.
    """
    found, unit = means.clone(), F.normalize(means, dim=2)
    for i, j in torch.cartesian_prod(*[torch.arange(len(means))] * 2).tolist():
        given, absent = met[j] & met[i], ~met[j] & met[i] & (home == i)
        if given.any() and absent.any():
            likeness = unit[i, absent] @ unit[i, given].T  # (absent, given)
            found[j, absent] = likeness.softmax(1) @ means[j, given]
    return found


def weights(home: Tensor, spaces: int, others: float) -> Tensor:
    """What each space counts for a class, (T, C): 1 its own, a / (t − 1) any other."""
    own = F.one_hot(home, spaces).T.to(torch.float64)
    return own + (1 - own) * others / max(spaces - 1, 1)


class EASE(Adapted):
    """Expandable subspace ensemble. B samples, D features, C classes, T experiences that are over.

    Args:
        others: a ≥ 0, weight of the mean cosine in the spaces of other experiences beside that in a class's own.
        chunk: samples that prototypes are made from at a time, ≥ 1.
    """

    paper = "arXiv:2403.12030"
    unshardable = ""
    unmergeable = "its prototypes stand in the spaces of single adapters"
    searched = {"others": (0.0, 1.0)}
    needs_classes = True
    present: Tensor
    home: Tensor
    over: Tensor

    def __init__(self, *, others: float = 0.1, chunk: int = 32, **base):
        super().__init__(**base)
        require("others", others, others >= 0, "≥ 0")
        require("chunk", chunk, chunk >= 1, "≥ 1")
        self.others, self.chunk = others, chunk
        self.spaces: Any = nn.ModuleList()  # prototypes of all classes, one for each adapter
        self.register_buffer("present", torch.zeros(self.model.num_classes, dtype=torch.bool))
        self.register_buffer("home", torch.full((self.model.num_classes,), -1))
        self.register_buffer("over", torch.zeros((), dtype=torch.int64))  # T

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self.present.zero_()
        self.present[list(experience.classes)] = True
        self.home[self.present & (self.home < 0)] = len(self.spaces)
        self.adapters.add(f"task{len(self.spaces)}")
        self.adapters.use(f"task{len(self.spaces)}", train=f"task{len(self.spaces)}")
        self.spaces.append(Prototypes(self.model.backbone.embed_dim))
        for space in self.spaces:
            space.grow(self.model.num_classes)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        return self.mean(own_losses(self.model, x, y, self.present))

    @torch.no_grad()
    def end(self, experience: Experience) -> None:
        self.over.fill_(len(self.spaces))
        for space in self.spaces:
            space.open(shared(self))
        for x, y in once(self, self.training_data(experience), self.chunk):
            for space, features in zip(self.spaces, self._features(x), strict=True):
                space.add(features, y)
        for space in self.spaces:
            space.gather()

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        if not self.over:
            return super().predict(inputs, task)
        spaces = self.spaces[: int(self.over)]
        counts = torch.stack([s.counts for s in spaces])  # (T, C)
        means = torch.stack([s.totals for s in spaces]) / counts.clamp(min=1).unsqueeze(2)
        prototypes = F.normalize(completed(means, counts > 0, self.home), dim=2)
        features = F.normalize(torch.stack(self._features(inputs)).double(), dim=2)  # (T, B, D)
        known = counts.any(0)
        logits = features.new_full((features.shape[1], len(known)), -torch.inf)
        counted = weights(self.home[known], len(spaces), self.others)
        logits[:, known] = torch.einsum("tbd,tcd,tc->bc", features, prototypes[:, known], counted)
        return logits  # (B, C)

    def _features(self, inputs: Tensor) -> list[Tensor]:
        """φ_j(x) (B, D) of the experiences that are over."""
        found = []
        for j in range(int(self.over)):
            with self.adapters.using(f"task{j}"):
                found.append(self.model.features(inputs))
        return found
