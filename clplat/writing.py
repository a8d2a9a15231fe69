"""Answers of free text that a model writes to training prompts: what a stream lets a strategy do with them.

Shapes: B samples, n tokens of an answer.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Writing(Protocol):
    """What a stream of free text lets a strategy do with answers that a model writes to training prompts.

    Labels (B, ...) are those of training samples, of which no other is known to it.
    """

    def score(self, answers: Tensor, labels: Tensor) -> Tensor:
        """Score in [0, 1] of answers (B, n), token ids filled with -1, as in evaluation; (B,)."""
        ...

    def rewriting(self, labels: Tensor, form: str, most: float) -> tuple[Tensor, Tensor]:
        """Prompts that ask for the right answers in other words; one of more than `most` tokens is left out.

        Args:
            form: text of such a prompt, with {prompt} and {answer} in the places of the sample's own.

        Returns:
            Which of the B samples they are for, (b,) int64, and inputs (b, ...) as the model takes them.
        """
        ...
