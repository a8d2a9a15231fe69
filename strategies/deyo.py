"""DeYO: entropy minimisation on sure samples whose prediction falls when the shape of what is seen is destroyed.

Source   Lee et al., "Entropy is not Enough for Test-Time Adaptation: From the Perspective of Disentangled Factors",
         ICLR 2024, arXiv:2403.07366.
Checked  against mariodoebler/test-time-adaptation classification/methods/deyo.py (8b2ed63, MIT), and by reading
         Jhyun17/DeYO methods/deyo.py (3d7d289, Apache-2.0).
    PLPD(x) = f(x)_ŷ − f(x′)_ŷ,   ŷ = argmax f(x), f probabilities;   x′: x with its patches in random order
    chosen:  H(x) < τ_ent = margin · ln C   and   PLPD(x) > τ_plpd
    loss = mean over the chosen of  (exp(E_0 − H(x)) + exp(PLPD(x))) H(x)     weights without gradient, E_0 = e_0 · ln C
Differs  the blocks left alone are told as in `sar`; evaluation mode (theirs is `training_mode`). x′ by patches alone
         (theirs has occlusion and pixels, too); sides that are no multiple of the patches are resized there and back,
         as in theirs.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat import require
from clplat.components.losses import entropy
from clplat.strategies._affine import NormStepping, norm_affine_below
from clplat.strategies._tta import laid_out


def shuffled(images: Tensor, order: Tensor) -> Tensor:
    """Images (B, C, H, W) whose k × k patches are in the order (B, k²) given: patch i of x′ is patch order[i] of x."""
    k, sides = math.isqrt(order.shape[1]), images.shape[2:]
    whole = [max(s // k, 1) * k for s in sides]
    if whole != list(sides):
        images = F.interpolate(images, whole, mode="bilinear", antialias=True)
    parts = images.unflatten(3, (k, -1)).unflatten(2, (k, -1))  # (B, C, k, h, k, w)
    parts = parts.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (B, k², C, h, w)
    parts = parts[torch.arange(len(images), device=images.device)[:, None], order]
    parts = parts.unflatten(1, (k, k)).permute(0, 3, 1, 4, 2, 5)
    out = parts.flatten(4, 5).flatten(2, 3)
    return out if whole == list(sides) else F.interpolate(out, list(sides), mode="bilinear", antialias=True)


class DeYO(NormStepping):
    """Destroy your object. Shapes: B images, C classes, k² patches.

    Settings: the defaults for ImageNet (ResNet-50-GN and ViT: sgd 2.5e-4 and 1e-3 at batch 64).

    Args:
        margin: τ_ent in shares of ln C, > 0.
        e_0: E_0 in shares of ln C, > 0.
        least_drop: τ_plpd in [-1, 1), of the probability of the predicted class.
        patches: k ≥ 2, on a side.
        top: share in [0, 1) of the last blocks that stay as they are, or null, as in `sar`.
    """

    paper = "arXiv:2403.07366"
    searched = {"margin": (0.2, 1.0), "e_0": (0.2, 1.0), "least_drop": (0.0, 0.5)}
    changes_images = True
    seed: Tensor

    def __init__(
        self,
        *,
        margin: float = 0.5,
        e_0: float = 0.4,
        least_drop: float = 0.2,
        patches: int = 4,
        top: float | None = None,
        adapt_optimizer: Literal["sgd", "adam"] = "sgd",
        adapt_lr: float = 0.00025,
        **base: Any,
    ) -> None:
        super().__init__(adapt_optimizer=adapt_optimizer, adapt_lr=adapt_lr, **base)
        require("margin", margin, margin > 0, "> 0")
        require("e_0", e_0, e_0 > 0, "> 0")
        require("least_drop", least_drop, -1 <= least_drop < 1, "in [-1, 1)")
        require("patches", patches, patches >= 2, "≥ 2")
        require("top", top, top is None or 0 <= top < 1, "in [0, 1), or null")
        self.margin, self.e_0, self.least_drop, self.patches, self.top = margin, e_0, least_drop, patches, top
        require("top", top, bool(self._chosen()), "less: no normalisation layer is left to adapt")
        self.register_buffer("seed", torch.randint(2**31, ()))  # equal on all processes, which were seeded alike

    def _start(self) -> dict[str, Any]:
        return {"batches": 0, "chosen": 0, "seen": 0}

    def _chosen(self) -> list[nn.Parameter]:
        return norm_affine_below(self.model, self.top)

    def _adapt(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        self.kept["batches"] += 1
        self.kept["seen"] += self._whole(x)
        logits = self.model(x)  # (B, C)
        uncertainty, scale = entropy(logits), math.log(logits.shape[1])
        sure = uncertainty.detach() < self.margin * scale
        if not self._sum(sure.sum()):
            return logits, None
        with torch.no_grad():
            changed = self.model(laid_out(shuffled(x, self._order(x))[sure])).softmax(1)
            highest, labels = logits[sure].softmax(1).max(1)
            drop = highest - changed.gather(1, labels[:, None])[:, 0]  # PLPD
            chosen, weight = torch.zeros_like(sure), torch.zeros_like(uncertainty)
            chosen[sure] = drop > self.least_drop
            weight[sure] = (self.e_0 * scale - uncertainty[sure]).exp() + drop.exp()
        self.kept["chosen"] += int(self._sum(chosen.sum()))
        return logits, self._mean_of(weight * uncertainty, chosen)

    def _order(self, x: Tensor) -> Tensor:
        """Of the patches of each image (B, k²), drawn for the whole batch, the same on every process."""
        generator = torch.Generator(self.seed.device)
        generator.manual_seed(int(self.seed) * 1_000_003 + self.kept["batches"])
        size = (self._whole(x), self.patches**2)
        return self._own(torch.rand(size, generator=generator, device=self.seed.device).argsort(1))

    def measurements(self) -> dict[str, float]:
        return {"chosen": self.kept["chosen"] / max(self.kept["seen"], 1)} if self.adapting else {}
