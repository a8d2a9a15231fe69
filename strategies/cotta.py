"""CoTTA: a slow teacher predicts, averaged over augmentations where the source model is unsure; weights are restored.

Source   Wang, Fink, Van Gool, Dai, "Continual Test-Time Domain Adaptation", CVPR 2022, arXiv:2203.13591.
Checked  against qinenergy/cotta cifar/cotta.py and imagenet/cotta.py (c212a20, MIT).
    c = mean_b max_k softmax(f(x_b; θ_0))_k
    t = 1/N Σ_i f(A_i(x); θ') if c < gate else f(x; θ')                       the prediction, averaged over logits
    loss = mean_b −Σ_k softmax(t)_k log softmax(z)_k,  z = f(x; θ)      or half of it plus half with z and t swapped
    after the step on θ:  θ' ← d θ' + (1 − d) θ;  then each weight of θ becomes that of θ_0 with probability `restore`
Differs  as in mariodoebler/test-time-adaptation: evaluation mode with the statistics of the batch (no dropout; theirs
         is `training_mode`), no augmentation while the gate is closed. Then student and teacher start as one, the
         gradient is exactly zero, and Adam's first steps are amplified rounding: a warning says so. The N augmented
         batches run as one, each with its own statistics. Trained are the parameters of layers that have no layers
         inside: all of a CNN, all but class tokens and position embeddings of a ViT.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clplat import EMA, require
from clplat.components.augment import draw, in_turns
from clplat.components.losses import cross_entropy, symmetric
from clplat.components.norms import batch_of
from clplat.strategies._taught import Taught
from clplat.strategies._tta import laid_out

_MASKS, _AUGMENTATIONS = 0, 1  # what is drawn


def put_back(parameters: list[Tensor], source: list[Tensor], masks: list[Tensor]) -> None:
    """Where a mask is True, put the source's value back, bit for bit; in place."""
    for mine, original, mask in zip(parameters, source, masks, strict=True):
        mine.copy_(torch.where(mask, original, mine))


class CoTTA(Taught):
    """Images must lie in [0, 1], so normalisation belongs in the model. Shapes: B images, C classes, N augmentations.

    The teacher predicts, in evaluation as well (without augmentations, with the statistics of the evaluation batch).
    Settings: the defaults for CIFAR-10-C, gate 0.72 for CIFAR-100-C; for ImageNet-C loss symmetric, restore 0.001, gate
    0.1, sgd 0.01 with Nesterov momentum 0.9 (1e-4 for a ViT). The gate depends on the source model: the authors' rule
    is the 5 % quantile of its confidence on source images, less 0.05.

    Args:
        slow_decay: d in [0, 1]; 0 makes the teacher the student of the step before, 1 the source.
        restore: probability in [0, 1] that a weight is put back, in each step.
        gate: confidence in [0, 1] below which predictions are averaged over augmentations; 0 never, above 1 always.
        gate_by: whether the mean confidence of the batch decides for all its images, or each image's for itself.
        augmentations: N ≥ 1.
        loss: one_way (CIFAR) or symmetric (ImageNet).
        images_at_once: images of a teacher's pass over augmented batches; null is all N · B, on a CPU about 256.
    """

    paper = "arXiv:2203.13591"
    teacher: EMA

    def __init__(
        self,
        *,
        slow_decay: float = 0.999,
        restore: float = 0.01,
        gate: float = 0.92,
        gate_by: Literal["batch", "image"] = "batch",
        augmentations: int = 32,
        loss: Literal["one_way", "symmetric"] = "one_way",
        images_at_once: int | None = None,
        **base: Any,
    ) -> None:
        require("restore", restore, 0 <= restore <= 1, "in [0, 1]")
        require("gate", gate, gate >= 0, "≥ 0")
        require("gate_by", gate_by, gate_by in ("batch", "image"), "batch or image")
        require("augmentations", augmentations, augmentations >= 1, "≥ 1")
        require("loss", loss, loss in ("one_way", "symmetric"), "one_way or symmetric")
        require("images_at_once", images_at_once, images_at_once is None or images_at_once >= 1, "≥ 1 or null")
        super().__init__(**base)
        require("slow_decay", slow_decay, 0 <= slow_decay <= 1, "in [0, 1]")
        self.restore, self.gate, self.gate_by, self.augmentations = restore, gate, gate_by, augmentations
        self.loss, self.images_at_once, self.changes_images = loss, images_at_once, gate > 0
        self.teacher = EMA(self.model, slow_decay, warmup=False)

    def _start(self) -> dict[str, Any]:
        return {"batches": 0, "open": 0}

    def _chosen(self) -> Iterable[nn.Parameter]:
        leaves = (m for m in self.model.modules() if not any(True for _ in m.children()))
        return [p for m in leaves for p in m.parameters()]

    def _generator(self, purpose: int) -> torch.Generator:
        """The same draws on every process, anew for each batch, from two numbers that a checkpoint holds."""
        generator = torch.Generator(self.seed.device)
        return generator.manual_seed((int(self.seed) * 1_000_003 + self.kept["batches"]) * 2 + purpose)

    # --- hooks --------------------------------------------------------------------------------------------------------

    def _adapt(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.kept["batches"] += 1
        logits = self.model(x)  # (B, C)
        with torch.no_grad():
            target = self._target(x)
        loss = symmetric if self.loss == "symmetric" else cross_entropy
        return target, self.mean(loss(logits, target))

    def after_step(self) -> None:
        if not self.adapting:
            return
        self.teacher.update(self.model)
        pairs = zip(self.model.parameters(), self.source.model.parameters(), strict=True)
        chosen = [(mine.detach(), original) for mine, original in pairs if mine.requires_grad]
        if self.restore and chosen:
            mine, originals = map(list, zip(*chosen, strict=True))
            put_back(mine, originals, self._masks(mine))

    def measurements(self) -> dict[str, float]:
        return {"open_gate": self.kept["open"] / max(self.kept["batches"], 1)} if self.adapting else {}

    # --- equations ----------------------------------------------------------------------------------------------------

    def _target(self, x: Tensor) -> Tensor:
        """The teacher's logits (B, C), averaged over augmentations where the gate is open."""
        confidence = self.source(x).softmax(1).amax(1)  # (B,)
        if self.gate_by == "batch":
            confidence = (self._sum(confidence.sum()) / self._whole(x)).expand(len(x))
        unsure = confidence < self.gate
        if not self._sum(unsure.sum()):
            return self.teacher(x)
        self.kept["open"] += 1
        averaged = self._averaged(x)
        return averaged if self.gate_by == "batch" else torch.where(unsure[:, None], averaged, self.teacher(x))

    def _averaged(self, x: Tensor) -> Tensor:
        """Mean over N augmentations of the teacher's logits (B, C)."""
        generator, sharing = self._generator(_AUGMENTATIONS), (self._whole(x), self.rank, self.world_size)
        draws = draw(self.augmentations, x.shape[-2], x.shape[-1], generator)
        total: Any = 0
        for part in in_turns(x, draws, generator, self.images_at_once, sharing):
            with batch_of(groups=len(part), shared=self.world_size > 1):
                total = total + self.teacher(laid_out(part.flatten(0, 1))).unflatten(0, part.shape[:2]).sum(0)
        return total / self.augmentations

    def _masks(self, parameters: list[Tensor]) -> list[Tensor]:
        """Bernoulli(restore) for each element of each parameter, the same on every process."""
        sizes = [p.numel() for p in parameters]
        drawn = torch.rand(sum(sizes), generator=self._generator(_MASKS), device=self.seed.device) < self.restore
        return [part.view_as(p) for part, p in zip(drawn.split(sizes), parameters, strict=True)]
