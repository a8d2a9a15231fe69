"""A language model as strategies see it: losses of answers, logits over classes by label scoring, generation.

Shapes: B samples of a batch, L tokens of the longest prompt, A of the longest answer, C classes, K of them scored.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clplat.backbones._passes import joined
from clplat.backbones.base import Classifier
from clplat.stream import Answers, Experience, Kind

TOKENS_AT_ONCE = 2**15  # tokens in one pass of label scoring or generation; batches are cut by length to stay below
LOGITS_AT_ONCE = 2**27  # logits in one pass over texts, each of whose tokens has one for each of the vocabulary


class Speaker(Protocol):
    """What a language model's backbone offers beside a backbone's own methods."""

    seq2seq: bool
    vocabulary: int

    @property
    def context(self) -> float: ...

    def one_pass(self, tokens: int) -> bool: ...

    def answer_logits(self, prompts: Tensor, answers: Tensor) -> Tensor: ...

    def answer_scores(self, prompts: Tensor, answers: Tensor) -> Tensor: ...

    def generate(self, prompts: Tensor, tokens: int, end: int) -> Tensor: ...


class _Told(Classifier):
    """A model without a head, whose classes are words. Shapes: see the module's head.

    Args:
        backbone: all parameters are its.
        answers: what the stream tells; None where a checkpoint is to bring it.
    """

    classes: Tensor  # (C, A) words of each class, filled with -1

    def __init__(self, backbone: Any, answers: Answers | None) -> None:
        no_head: Any = nn.Identity()
        super().__init__(backbone, no_head)
        known = torch.empty(0, 0, dtype=torch.int64) if answers is None else answers.classes.long()
        self.register_buffer("classes", known)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def writes(self) -> bool:
        """Whether it predicts by text, not by scores of the classes."""
        return False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A learner loaded without its stream learns from the checkpoint what the classes are.
        brought = state_dict.get(f"{prefix}classes")
        if brought is not None and not (self.classes >= 0).any():
            self.classes = brought.to(self.classes.device, copy=True)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Answerer(_Told):
    """A language model that answers prompts; every parameter is the backbone's, the head has none.

    Inputs are (B, 2, L) integers filled with -1: row 0 the prompt's token ids, row 1 the ids of the classes whose
    answers it is to choose from (none: all). Labels are (B,) class ids, or (B, A) the answer's token ids. Of inputs
    (B, 2 + K, L) the rows behind these are the token ids of K continuations of the prompt, and a prediction is the
    log-likelihood (B, K) of each; row 1 is not read.

    Args:
        backbone: a language model.
        answers: what the stream tells; None where a checkpoint is to bring it.
    """

    ending: Tensor  # (2,) id of the end token; tokens to generate in evaluation, 0: score the classes

    def __init__(self, backbone: Any, answers: Answers | None) -> None:
        super().__init__(backbone, answers)
        known = (0, 0) if answers is None else (answers.end, answers.new_tokens)
        self.register_buffer("ending", torch.tensor(known))

    def grow(self, experience: Experience) -> None:
        """Nothing grows: an answer is words that the model has from the start."""

    def forward(self, inputs: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Logits (B, C): log-likelihood of each class' answer; -inf for classes that are not to choose from."""
        if inputs.shape[1] > 2:
            return self._continued(inputs)
        named = trimmed_classes(inputs[:, 1], len(self.classes))  # (B, K)
        # Of row -1 any words are read, and their score is dropped.
        found = self._scores(inputs[:, 0], self.classes[named], inputs.shape[2])
        logits = found.new_full((len(found), len(self.classes) + 1), -torch.inf)
        column = named.masked_fill(named < 0, len(self.classes))
        return logits.scatter(1, column, found)[:, :-1]

    def _continued(self, inputs: Tensor) -> Tensor:
        """Log-likelihood (B, K) of each continuation in inputs (B, 2 + K, L); −∞ for one without a token."""
        tokens = inputs[:, 2:]
        speaker: Speaker = self.backbone  # type: ignore[assignment]
        length = (tokens >= 0).sum(2)  # (B, K)
        tokens = tokens[:, :, : max(int(length.max()), 1)].long()
        rows = max(LOGITS_AT_ONCE // (tokens[0].numel() * speaker.vocabulary), 1)
        parts = zip(inputs[:, 0].split(rows), tokens.split(rows), strict=True)
        found = torch.cat([self._scores(*part, inputs.shape[2]) for part in parts])
        return found.masked_fill(length == 0, -torch.inf)

    def _scores(self, prompts: Tensor, answers: Tensor, longest: int) -> Tensor:
        """Log-likelihood (B, K) of answers (B, K, A) given prompts (B, L), of at most `longest` tokens."""
        count, width = answers.shape[1:]
        speaker: Speaker = self.backbone  # type: ignore[assignment]
        # Where the prompt is not read once for all answers, each has a copy of it, or of its states.
        copies = 1 if speaker.one_pass(longest + width) else count
        parts = _by_length(prompts, copies, count * width)
        scores = [speaker.answer_scores(own, answers[rows]) for rows, own in parts]
        return torch.cat(scores)[torch.cat([rows for rows, _ in parts]).argsort()]

    def losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Loss (B,) of each sample: the mean over its answer's tokens, end token included, of −log p(token).

        Args:
            inputs: (B, 2, L).
            labels: (B,) class ids or (B, A) token ids, all below 0 being padding.
        """
        prompts = trimmed(inputs[:, 0])
        answers = trimmed(self._words(labels)).clamp(min=-1)
        speaker: Speaker = self.backbone  # type: ignore[assignment]
        logits = speaker.answer_logits(prompts, answers).float()  # (B, A, V)
        each = nn.functional.cross_entropy(logits.transpose(1, 2), answers, ignore_index=-1, reduction="none")
        return each.sum(1) / self.lengths(labels)

    def lengths(self, labels: Tensor) -> Tensor:
        """Tokens (B,) of each sample's answer, end token included, which its loss is the mean over."""
        return (self._words(labels) >= 0).sum(1).clamp(min=1)

    def _words(self, labels: Tensor) -> Tensor:
        """Token ids (B, A) of answers (B,) or (B, A), padding below 0."""
        return labels if labels.ndim == 2 else self.classes[labels]

    def candidates(self, inputs: Tensor) -> Tensor:
        """How many answers each sample is chosen from, (B,); where answers are free text, tokens of the vocabulary."""
        speaker: Any = self.backbone
        named = (inputs[:, 1] >= 0).sum(1)
        return named.masked_fill(named == 0, self.num_classes or speaker.vocabulary)

    @property
    def writes(self) -> bool:
        return bool(self.ending[1] > 0)

    @property
    def room(self) -> float:
        """Tokens that a prompt may have whose answer it writes."""
        speaker: Speaker = self.backbone  # type: ignore[assignment]
        return speaker.context - (0 if speaker.seq2seq else int(self.ending[1]))

    def first_token(self, inputs: Tensor) -> Tensor:
        """Logits (B, V) of the token that an answer begins with."""
        speaker: Speaker = self.backbone  # type: ignore[assignment]
        prompts = trimmed(inputs[:, 0])
        return speaker.answer_logits(prompts, prompts.new_zeros(len(prompts), 1))[:, 0]

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        """Logits (B, C); or, where the stream wants text, greedy answers (B, tokens) filled with -1."""
        end, tokens = self.ending.tolist()
        if not tokens or inputs.shape[1] > 2:
            return self(inputs, task)
        speaker: Speaker = self.backbone  # type: ignore[assignment]
        parts = _by_length(inputs[:, 0], 1, tokens)
        found = torch.cat([speaker.generate(prompts, tokens, end) for _, prompts in parts])
        return found[torch.cat([rows for rows, _ in parts]).argsort()]


class ImageText(_Told):
    """CLIP as a classifier: an image is of the class whose prompt it is nearest to. All parameters are the backbone's.

    In training the classes of the current experience compete, or all met so far where the strategy replays (`replays`);
    in a request to forget all classes of the stream, and in evaluation these, seen or not, or those of the task where
    it is told. So a sample's loss does not depend on the others of its batch, nor on which process has them.

    Source: Zheng et al., "ZSCL", ICCV 2023, arXiv:2303.06628 (told tasks); Xu et al., "RAIL", NeurIPS 2024,
    arXiv:2406.18868 (all classes).
    """

    members: Tensor  # (tasks, C) bool: classes of each task; (0, C) where tasks are not told

    def __init__(self, backbone: Any, answers: Answers | None) -> None:
        super().__init__(backbone, answers)
        tasks = () if answers is None else answers.tasks
        members = torch.zeros(len(tasks), len(self.classes), dtype=torch.bool)
        for task, classes in enumerate(tasks):
            members[task, list(classes)] = True
        self.register_buffer("members", members)
        self.replayed = False  # whether samples of past experiences are learned from, too; the strategy's to set
        self.met: tuple[int, ...] = ()  # these two follow from the experiences met, which a resume replays
        self.rivals: tuple[int, ...] = ()

    def grow(self, experience: Experience) -> None:
        """Nothing grows: what an experience's classes are called is known from the start."""
        if experience.kind is Kind.FORGET:
            self.rivals = tuple(range(len(self.classes)))
            return
        self.met += experience.classes
        self.rivals = self.met if self.replayed else experience.classes

    def candidates(self, inputs: Tensor) -> Tensor:
        """How many classes compete for each of images (B, 3, H, W) in a request to forget, (B,)."""
        return torch.full((len(inputs),), self.num_classes, device=inputs.device)

    def forward(self, inputs: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Logits (B, C) for images (B, 3, H, W): scaled cosines with the prompt of every class of the stream."""
        return self._logits(inputs, self.classes)

    def losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy (B,) over the classes that compete and those in labels (B,), their prompts read anew."""
        rivals = torch.cat([torch.tensor(self.rivals, dtype=torch.int64, device=labels.device), labels])
        try:
            rivals = rivals.unique()
        except RuntimeError:  # inside vmap, where no size can be read: every prompt is read
            absent = ~(torch.arange(len(self.classes), device=labels.device)[:, None] == rivals).any(1)
            return nn.functional.cross_entropy(self(inputs).masked_fill(absent, -torch.inf), labels, reduction="none")
        return nn.functional.cross_entropy(
            self.among(inputs, rivals), torch.searchsorted(rivals, labels), reduction="none"
        )

    def among(self, inputs: Tensor, classes: Tensor) -> Tensor:
        """Logits (B, K) for images (B, 3, H, W) with the prompts of K classes only, which are read anew."""
        return self._logits(inputs, self.classes[classes])

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        """Logits (B, C); -inf for the classes of other tasks where the task is told."""
        logits = self(inputs)
        return logits if task is None else logits.masked_fill(~self.members[task], -torch.inf)

    def _logits(self, inputs: Tensor, prompts: Tensor) -> Tensor:
        towers: Any = self.backbone
        images = towers.features(inputs)  # before the text: `recorded` ends with the last block of the text tower
        return towers.scale() * images @ towers.text_features(trimmed(prompts)).T

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        brought = state_dict.get(f"{prefix}members")
        if brought is not None and not self.members.numel():
            self.members = brought.to(self.members.device, copy=True)
        super()._load_from_state_dict(state_dict, prefix, *args)


def trimmed(ids: Tensor) -> Tensor:
    """ids (B, L), filled with -1, as int64 and without the columns that only hold padding."""
    try:
        longest = ids.shape[1] if torch.compiler.is_exporting() else int((ids >= 0).sum(1).max())
    except RuntimeError:  # inside vmap, where no number can be read
        longest = ids.shape[1]
    return ids[:, : max(longest, 1)].long()


def read_ids(inputs: Tensor) -> Tensor:
    """Token ids (B, P) that features of inputs (B, R, L) are of: the prompt, and the first continuation behind it."""
    prompts = trimmed(inputs[:, 0])
    return prompts if inputs.shape[1] == 2 else joined(prompts, trimmed(inputs[:, 2]))[0]


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
    return [(rows, trimmed(ids[rows])) for rows in order.split(sizes or [0])]
