"""Sets of text that no experience learns: questions with their answers, and texts whose tokens are to be predicted.

Shapes: N samples, K answers to choose from, A tokens of the longest, L of the longest prompt or answer. Inputs are
those of `Answerer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clplat.data.tokens import Tokenizer, padded
from clplat.data.worlds import generator
from clplat.errors import MissingError, UserError
from clplat.metrics.text import TEXT_METRICS
from clplat.stream import Data, Experience, Kind, Stream
from clplat.streams._blocks import Passages, called, cut, is_file, read_text, to_predict
from clplat.streams._spoken import Spoken
from clplat.streams._text_pieces import class_ids, some
from clplat.streams._text_reading import Source, find
from clplat.streams._text_tasks import Task

Right = Sequence[tuple[str, str]]  # (metric, text) of each right answer to a question


def written_scores(tokenizer: Tokenizer, answers: Tensor, right: Sequence[Right]) -> Tensor:
    """The best score in [0, 1] of answers (B, n), token ids filled with -1, over the right ones to each; (B,)."""
    found = []
    for ids, own in zip(answers.tolist(), right, strict=True):
        answer = tokenizer.decode([i for i in ids if i >= 0]).strip()
        found.append(max(TEXT_METRICS[metric](answer, text) for metric, text in own))
    return torch.tensor(found, device=answers.device)


class Questions(Stream):
    """Tasks that are asked and never learned, each an experience.

    Where answers are chosen, each of a task's own is a continuation of the prompt, and the best of them is the
    prediction; labels are (N,) their places. Where they are written, labels are (N,) places in a list of right ones.

    Args:
        tasks: whose test samples are asked.
        spoken: of the stream they come with.
        generated: whether answers are written.
        per_class: keep so many samples of each class, drawn alike for every seed; None keeps all.

    Raises:
        UserError: answers are to be chosen, and a task has none; or they are too long, or can't be told apart.
        MissingError: a task has no samples.
    """

    def __init__(self, tasks: Sequence[Task], spoken: Spoken, generated: bool, per_class: int | None) -> None:
        self.tokenizer, self.right = spoken.tokenizer, list[Right]()
        made = list[Experience]()
        for task in tasks:
            which = some(class_ids(task, task.test), per_class, generator(0, f"general {task.name}"))
            if not len(which):
                raise MissingError(f"stream.general: {task.name} has no test samples: replace its files by whole ones")
            prompts = spoken.prompts([row.prompt for row in task.test], which, f"test prompts of {task.name}")
            data = self._written(task, prompts, which) if generated else _chosen(task, prompts, which, spoken)
            made.append(Experience(len(made), task.name, Kind.LEARN, None, test=data))
        width = max(len(task.labels) for task in tasks)
        super().__init__(made, num_classes=width, input_shape=(2,))

    def _written(self, task: Task, prompts: Sequence[np.ndarray], which: np.ndarray) -> Data:
        inputs = torch.full((len(prompts), 2, max(map(len, prompts))), -1, dtype=torch.int32)
        inputs[:, 0] = padded(prompts)
        first = len(self.right)
        self.right += [[(task.metric, text) for text in task.test[i].answers] for i in which.tolist()]
        return Data(inputs, torch.arange(first, len(self.right)))

    def score(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """As `Text.score`."""
        if predictions.is_floating_point():
            return super().score(predictions, labels)
        return written_scores(self.tokenizer, predictions, [self.right[i] for i in labels.tolist()])


def _chosen(task: Task, prompts: Sequence[np.ndarray], which: np.ndarray, spoken: Spoken) -> Data:
    if not task.labels:
        raise UserError(
            f"stream.general: {task.name} has answers of free text, which can't be scored (valid: tasks with answers "
            "to choose from, or stream.evaluate generate)"
        )
    answers = spoken.classes(task.labels, False)  # (K, A)
    length = max(answers.shape[1], *map(len, prompts))
    inputs = torch.full((len(prompts), 2 + len(answers), length), -1, dtype=torch.int32)
    inputs[:, 0] = padded(prompts, length)
    inputs[:, 2:, : answers.shape[1]] = answers
    return Data(inputs, torch.from_numpy(class_ids(task, task.test)[which]))


@dataclass(frozen=True)
class General:
    """What is measured beside the tasks of a stream, by full names: options `general` and `general_texts` of `Text`."""

    source: Source
    tasks: Sequence[str]
    texts: Sequence[str]

    @classmethod
    def of(cls, source: Source, tasks: Sequence[str] | None, texts: Sequence[str] | None) -> General:
        """From the options as they are given.

        Raises:
            UserError: an unknown task, or a name that stands there twice.
        """
        found = [name if is_file(name) else source.full([name], "general_texts")[0] for name in texts or ()]
        names = [called(name) for name in found]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"stream.general_texts: {twice[0]} stands there twice (valid: each text once)")
        return cls(source, source.full(tasks or (), "general"), found)

    def learned(self, tasks: Sequence[str] | None, words: bool) -> list[str]:
        """Full names of what the stream teaches beside them, as `Source.learned`; `words` are its answers.

        Raises:
            UserError: an unknown task, or one that is taught and asked; or answers are no words.
        """
        learned = self.source.learned(tasks, (*self.tasks, *self.texts))
        if faults := self._faults(learned, words):
            raise UserError(*faults)
        return learned

    def _faults(self, learned: Sequence[str], words: bool) -> list[str]:
        asked = {"general": self.tasks, "general_texts": [name for name in self.texts if not is_file(name)]}
        faults = [
            f"stream.{key}: {name} is a task of the stream (valid: one that is not among stream.tasks)"
            for key, names in asked.items()
            for name in names
            if name in learned
        ]
        for key, names in (("general", self.tasks), ("general_texts", self.texts)):
            if names and not words:
                faults.append(f"stream.{key}: has no meaning with stream.answer class (valid: null)")
        return faults

    def sets(
        self, spoken: Spoken, said: tuple[bool, bool, bool], generated: bool, per_class: int | None
    ) -> dict[str, Stream]:
        """What is measured of each; nothing where none is asked for. Arguments: see `Questions` and `Source.read`.

        Raises:
            UserError: a text of less than two tokens; or as `Questions`.
            MissingError: a file is not there, or no text.
        """
        found: dict[str, Stream] = {}
        if self.tasks:
            tasks = self.source.read(self.tasks, "error", said, spoken.notes)
            found["accuracy"] = Questions(tasks, spoken, generated, per_class)
        if self.texts:
            length = spoken.max_length
            passages = [self._passages(name, spoken.tokenizer, length, per_class) for name in self.texts]
            found["perplexity"] = Passages(passages)
        return found

    def _passages(self, name: str, tokenizer: Tokenizer, length: int, per_class: int | None) -> tuple[str, Data]:
        """What a set is called, and its blocks: of a file, or of the test prompts of a task, `per_class` of each."""
        if is_file(name):
            documents = [read_text(find(name, self.source.root, "general_texts"))]
        else:
            (task,) = self.source.read([name], "error", (False, False, False), [])
            which = some(class_ids(task, task.test), per_class, generator(0, f"general {task.name}"))
            documents = [task.test[i].prompt for i in which.tolist()]
        first, others = cut(documents, tokenizer, length)
        if not len(first):
            raise UserError(f"stream.general_texts: {name} has less than two tokens (valid: a text that has more)")
        return called(name), to_predict(first, others)
