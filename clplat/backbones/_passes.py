"""How prompts and answers lie in a pass of a language model, and what is read from it.

Shapes: B rows, L tokens of the longest prompt, A of the longest answer, P of a row, V ids of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def joined(prompts: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (B, L + A) of answers (B, A) right behind their prompts (B, L), and the prompts' lengths (B, 1)."""
    length, width = (prompts >= 0).sum(1, keepdim=True), answers.shape[1]
    place = torch.arange(prompts.shape[1] + width, device=prompts.device) - length  # (B, L + A): of the answer
    behind = answers.gather(1, place.clamp(0, width - 1)).masked_fill(place >= width, -1)
    return torch.where(place < 0, nn.functional.pad(prompts, (0, width), value=-1), behind), length


def rows_at(hidden: Tensor, places: Tensor) -> Tensor:
    """hidden (B, P, D) at places (B, n): (B, n, D)."""
    return hidden.gather(1, places.unsqueeze(2).expand(-1, -1, hidden.shape[2]))


def likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-likelihood (...) of tokens (..., n), -1 where there is none, under logits (..., n, V)."""
    chosen = logits.float().log_softmax(-1).gather(-1, tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen.masked_fill(tokens < 0, 0.0).sum(-1)


def tree_mask(length: Tensor, longest: int, count: int, width: int) -> Tensor:
    """What each token sees: (B, 1, P, P) bool, P = longest + count · width.

    Args:
        length: (B, 1) tokens of each prompt, of which the longest has `longest`.
        count: answers behind each prompt, of `width` tokens.
    """
    device = length.device
    place = torch.arange(longest + count * width, device=device)
    answer = torch.where(place < longest, -1, (place - longest) // max(width, 1))  # (P,) -1: the prompt
    earlier = place.unsqueeze(1) >= place  # (P, P)
    own = earlier & (answer.unsqueeze(1) == answer)
    prompt = (place < length).unsqueeze(1)  # (B, 1, P)
    return (own | ((answer >= 0).unsqueeze(1) & prompt)).unsqueeze(1)
