"""Training samples of free text, by their labels: what a written answer is worth, and prompts for other words.

Shapes: B samples, n tokens of an answer, b prompts of at most L tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from clplat.data.tokens import padded
from clplat.streams._spoken import Spoken
from clplat.streams._text_general import Right, written_scores


class Written:
    """See `clplat.writing.Writing`.

    Args:
        prompts: texts of the training samples, in the order of what labels name.
        right: the right answers to them, of which the first is learned, and perhaps those to others behind them.
    """

    def __init__(self, spoken: Spoken, prompts: Sequence[str], right: Sequence[Right]) -> None:
        self.spoken, self.prompts, self.right = spoken, prompts, right[: len(prompts)]

    def score(self, answers: Tensor, labels: Tensor) -> Tensor:
        """See `Writing`."""
        return written_scores(self.spoken.tokenizer, answers, [self.right[n] for n in _named(labels)])

    def rewriting(self, labels: Tensor, form: str, most: float) -> tuple[Tensor, Tensor]:
        """See `Writing`; prompts hold whole texts, those that training cuts included."""
        texts = [_filled(form, self.prompts[n], self.right[n][0][1]) for n in _named(labels)]
        ids = self.spoken.uncut(texts)
        kept = [i for i, row in enumerate(ids) if len(row) <= most]
        rows = padded([ids[i] for i in kept])
        inputs = torch.stack([rows, torch.full_like(rows, -1)], 1)  # (b, 2, L)
        return torch.tensor(kept, dtype=torch.int64, device=labels.device), inputs.to(labels.device)


def _filled(form: str, prompt: str, answer: str) -> str:
    """`form` with both texts in their places, whatever these hold."""
    texts = {"{prompt}": prompt, "{answer}": answer}
    return re.sub(r"\{prompt\}|\{answer\}", lambda place: texts[place[0]], form)


def _named(labels: Tensor) -> list[int]:
    """Places of the samples with labels (B, A + 1)."""
    return (-2 - labels[:, -1]).tolist()
