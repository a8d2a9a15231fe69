"""What a strategy that lets the model write is checked with: answers of a few tokens, and a model that writes them.

Shapes: B samples, n = TOKENS, V = IDS of the vocabulary; a label (A + 1,) ends with −2 − its class.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.backbones.base import Backbone, Classifier
from clplat.stream import Experience

TOKENS, IDS, END = 4, 12, 2


class Scribe(Classifier):
    """Writes its answer at once, each token by a row of logits; before it has learned, the third one ends it."""

    room = float("inf")
    ending: Tensor
    num_classes = 0

    def __init__(self, backbone: Backbone) -> None:
        rows: Any = nn.Linear(backbone.embed_dim, TOKENS * IDS)
        rows.bias.data.view(TOKENS, IDS)[2, END] += 4
        super().__init__(backbone, rows)
        self.register_buffer("ending", torch.tensor([END, TOKENS]))

    def grow(self, experience: Experience) -> None:
        """Nothing grows."""

    def forward(self, inputs: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Logits (B, n, V)."""
        return self.head(self.backbone(inputs)).unflatten(1, (TOKENS, IDS))

    def losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Mean over the answer's tokens of −log p, (B,)."""
        words = F.pad(labels, (0, TOKENS - labels.shape[1]), value=-1).clamp(min=-1)
        each = F.cross_entropy(self(inputs).transpose(1, 2), words, ignore_index=-1, reduction="none")
        return each.sum(1) / (words >= 0).sum(1)

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        """Answers (B, n), filled with -1 from the end token on."""
        tokens = self(inputs).argmax(2)
        return tokens.masked_fill((tokens == END).cumsum(1) > 0, -1)


class Slate:
    """The `writing` of a tiny stream: an answer is right whose second token is odd where the given one's is.

    Args:
        words: (C, A) the answer that each class is learned with.
        asked: (C, ...) inputs that ask for it in other words; that of the last class is too long.
    """

    def __init__(self, words: Tensor, asked: Tensor) -> None:
        self.words, self.asked = words, asked

    def labels(self, classes: Tensor) -> Tensor:
        """Labels (n, A + 1) of samples of `classes` (n,)."""
        return torch.cat([self.words[classes], -2 - classes[:, None]], 1)

    def score(self, answers: Tensor, labels: Tensor) -> Tensor:
        """1 where it is right, else 0; (B,)."""
        alike = (answers[:, 1] - self.words[-2 - labels[:, -1], 1]) % 2 == 0
        return (alike & (answers[:, 1] >= 0)).float()

    def rewriting(self, labels: Tensor, form: str, most: float) -> tuple[Tensor, Tensor]:
        """Those of the B samples that are not of the last class, (b,), and the inputs of their classes (b, ...)."""
        classes = -2 - labels[:, -1]
        kept = (classes < len(self.asked) - 1).nonzero()[:, 0]
        return kept, self.asked[classes[kept]]
