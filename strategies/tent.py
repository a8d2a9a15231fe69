"""TENT: gradient steps on the entropy of the predictions, taken by the gains and offsets of normalisation layers.

Source   Wang et al., "Tent: Fully Test-Time Adaptation by Entropy Minimization", ICLR 2021, arXiv:2006.10726.
Checked  against DequanWang/tent tent.py (e9e926a, MIT).
    loss = mean_b H(softmax(f(x_b; θ)))        θ: gains and offsets; statistics of the batch
Differs  layer, group and instance normalisation adapt too, so that transformers do (as in SAR); the model is in
         evaluation mode, so dropout is off (theirs is `training_mode`).
"""

from __future__ import annotations

from torch import Tensor

from clplat.components.losses import entropy
from clplat.strategies._affine import NormStepping


class Tent(NormStepping):
    """Entropy minimisation; the prediction is that before the step. Shapes: B images, C classes.

    Settings: Adam 1e-3 at batch 200 (CIFAR); sgd 2.5e-4, momentum 0.9 at batch 64 (ImageNet, ResNet-50).
    """

    paper = "arXiv:2006.10726"

    def _adapt(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(x)  # (B, C)
        return logits, self.mean(entropy(logits))
