"""A language model as strategies see it: losses of answers, logits over classes by label scoring, generation.

Shapes: B samples of a batch, L tokens of the longest prompt, A of the longest answer, C classes, K of them scored.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clplat.backbones.base import Classifier
from clplat.stream import Answers, Experience

TOKENS_AT_ONCE = 2**15  # tokens in one pass of label scoring or generation; batches are cut by length to stay below


class Speaker(Protocol):
    """What a language model's backbone offers beside a backbone's own methods."""

    seq2seq: bool

    def answer_logits(self, prompts: Tensor, answers: Tensor) -> Tensor: ...

    def answer_scores(self, prompts: Tensor, answers: Tensor) -> Tensor: ...

    def generate(self, prompts: Tensor, tokens: int, end: int) -> Tensor: ...


class Answerer(Classifier):
    """A language model that answers prompts; every parameter is the backbone's, the head has none.

    Inputs are (B, 2, L) integers filled with -1: row 0 the prompt's token ids, row 1 the ids of the classes whose
    answers it is to choose from (none: all). Labels are (B,) class ids, or (B, A) the answer's token ids.

    Args:
        backbone: a language model.
        answers: what the stream tells; None where a checkpoint is to bring it.
    """

    classes: Tensor  # (C, A) answer of each class, filled with -1
    ending: Tensor  # (2,) id of the end token; tokens to generate in evaluation, 0: score the classes

    def __init__(self, backbone: Any, answers: Answers | None) -> None:
        super().__init__(backbone, nn.Identity())
        known = answers or Answers(torch.empty(0, 0, dtype=torch.int64), 0, 0)
        self.register_buffer("classes", known.classes.long())
        self.register_buffer("ending", torch.tensor([known.end, known.new_tokens]))

    def grow(self, experience: Experience) -> None:
        """Nothing grows: an answer is words that the model has from the start."""

    def forward(self, inputs: Tensor, task: int | None = None) -> Tensor:
        """Logits (B, C): log-likelihood of each class' answer; -inf for classes that are not to choose from."""
        named = trimmed_classes(inputs[:, 1], len(self.classes))  # (B, K)
        count, width = named.shape[1], self.classes.shape[1]
        answers = self.classes[named]  # (B, K, A); row -1 is any, and its score is dropped
        speaker: Speaker = self.backbone  # type: ignore[assignment]
        # An encoder-decoder reads a copy of the prompt's states for each answer, a decoder one prompt for all.
        cost = (count, count * width) if speaker.seq2seq else (1, count * width)
        parts = _by_length(inputs[:, 0], *cost)
        scores = [speaker.answer_scores(prompts, answers[rows]) for rows, prompts in parts]
        order = torch.cat([rows for rows, _ in parts])
        found = torch.cat(scores)[order.argsort()]
        logits = found.new_full((len(found), len(self.classes) + 1), -torch.inf)
        column = named.masked_fill(named < 0, len(self.classes))
        return logits.scatter(1, column, found)[:, :-1]

    def losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Loss (B,) of each sample: the mean over its answer's tokens, end token included, of −log p(token).

        Args:
            inputs: (B, 2, L).
            labels: (B,) class ids or (B, A) token ids filled with -1.
        """
        prompts = trimmed(inputs[:, 0])
        answers = trimmed(labels if labels.ndim == 2 else self.classes[labels])
        speaker: Speaker = self.backbone  # type: ignore[assignment]
        logits = speaker.answer_logits(prompts, answers).float()  # (B, A, V)
        each = nn.functional.cross_entropy(logits.transpose(1, 2), answers, ignore_index=-1, reduction="none")
        return each.sum(1) / (answers >= 0).sum(1).clamp(min=1)

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        """Logits (B, C); or, where the stream wants text, greedy answers (B, tokens) filled with -1."""
        end, tokens = self.ending.tolist()
        if not tokens:
            return self(inputs, task)
        speaker: Speaker = self.backbone  # type: ignore[assignment]
        parts = _by_length(inputs[:, 0], 1, tokens)
        found = torch.cat([speaker.generate(prompts, tokens, end) for _, prompts in parts])
        return found[torch.cat([rows for rows, _ in parts]).argsort()]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A learner loaded without its stream learns from the checkpoint what the answers are.
        brought = state_dict.get(f"{prefix}classes")
        if brought is not None and not self.classes.numel():
            self.classes = brought.to(self.classes.device, copy=True)
        super()._load_from_state_dict(state_dict, prefix, *args)


def trimmed(ids: Tensor) -> Tensor:
    """ids (B, L), filled with -1, as int64 and without the columns that only hold padding."""
    try:
        longest = int((ids >= 0).sum(1).max())
    except RuntimeError:  # inside vmap, where no number can be read
        longest = ids.shape[1]
    return ids[:, : max(longest, 1)].long()


def trimmed_classes(named: Tensor, count: int) -> Tensor:
    """Classes (B, K) to choose from, filled with -1: those in `named` (B, L), or all `count` where it names none."""
    if bool((named >= 0).any()):
        return trimmed(named)
    return torch.arange(count, device=named.device).expand(len(named), -1)


def _by_length(ids: Tensor, copies: int, behind: int) -> list[tuple[Tensor, Tensor]]:
    """Rows (b,) and prompts (b, l) of ids (B, L) in parts of similar length, each trimmed to its own longest.

    A part takes b · (copies · l + behind) tokens, at most `TOKENS_AT_ONCE` unless it is one row.
    """
    lengths, order = (ids >= 0).sum(1).sort(stable=True)
    sizes, start, host = [], 0, lengths.tolist()
    while start < len(host):
        size = 1
        while start + size < len(host) and (size + 1) * (copies * host[start + size] + behind) <= TOKENS_AT_ONCE:
            size += 1
        sizes.append(size)
        start += size
    return [(rows, trimmed(ids[rows])) for rows in order.split(sizes)]
