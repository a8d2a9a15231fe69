"""Text: instructions and their answers for language models, labelled texts for encoders.

Source   the standard benchmark (orders 1 to 3: Zhang et al., NeurIPS 2015, arXiv:1509.01626) and the 15 tasks (orders 4
         to 6: Razdaibiedina et al., "Progressive Prompts", ICLR 2023, arXiv:2301.12314), as the files and prompts of
         Wang et al., "O-LoRA", EMNLP Findings 2023, arXiv:2310.14152, have them; SuperNI tasks as in Zhao et al.,
         "SAPT", arXiv:2401.08295; TRACE: Wang et al., arXiv:2310.06762; TOFU: Maini et al., arXiv:2401.06121.
Differs  a prompt that is too long loses tokens before its last 16, not its end, so that the cue for the answer stays,
         and samples without a gold label are left out (both are said when a run starts); instruction lines are in our
         words unless `stream.instructions` names the published file; 20Minuten of TRACE is scored by ROUGE-L, not SARI.

Inputs are (N, 2, L) int32 filled with -1: row 0 the prompt's token ids, row 1 the classes to choose from, none for all.
Labels are (N,) class ids, a class being an answer, the same words in two tasks one class; or, where a task's answers
are free text, (N, A + 1): token ids filled with -1, and behind them −2 − n, n the row of the right texts.

Tasks with other answers each are class-incremental, those with the same ones (reviews of other shops) domain-
incremental; with `tell_task` either is task-incremental.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from clplat.data.batches import by_length
from clplat.data.datasets import find_root
from clplat.data.tokens import load_tokenizer, padded
from clplat.errors import UserError
from clplat.stream import Answers, Data, Experience, Kind, Stream
from clplat.streams._spoken import Spoken
from clplat.streams._text_general import General, written_scores
from clplat.streams._text_options import check, check_shared
from clplat.streams._text_pieces import Sharing, drawn, pieces
from clplat.streams._text_reading import Source
from clplat.streams._text_tasks import Row, Task, cut
from clplat.streams._text_written import Written


class Text(Stream):
    """Text tasks one after the other; a language model learns to write the answer, an encoder with a head its class.

    Args:
        seed: of everything drawn; null takes the run's seed.
        data_root: folder of data sets; null takes $CLPLAT_DATA.
        benchmark: olora: the standard benchmark and the 15 tasks, from olora_text/ in the data root. superni: from
            superni_text/. trace: the eight tasks of TRACE, each a folder of `path` with train.json and test.json; by
            name also MedMCQA and JEC-QA, laid out alike. jsonl: any instruction set or labelled texts: `path` is a
            file, or a folder of folders with train.jsonl and test.jsonl (or .json, .jsonl.gz, .csv, .parquet); a row
            holds prompt, text or sentence, or some of instruction, context, passage, input and question, in this order;
            and answer, output, label or a like name: text, a number, a list of right answers, or SQuAD's {text: list}.
            A field that would not be used is refused, but for id, idx, index, uid, guid, qid.
            tofu: questions about invented authors, the files of locuslab/TOFU in `path`, or tofu/ of the data root;
            each set is a task of free text, asked as it is learned (stream `tofu` forgets one of them).
        order: of the tasks of olora, 1 to 6.
        tasks: names in order; null takes those of `order`, retain90 and forget10 (tofu), or all that the benchmark
            has but those of `general` and `general_texts`.
        absent: what to do about a task that is not there: error, or skip it.
        path: of trace, jsonl, tofu; a relative one that is not in the working directory is looked for in the data root.
        instructions: file of instruction lines in the benchmark's format (its configs/instruction_config.json), found
            like `path`; null takes our own wording.
        answer: words: of a language model or CLIP. class: an id, for a backbone with a head: the text alone, without
            preamble and cue (olora, superni), which loses its end where it is too long. Null: what the backbone needs.
        preamble: begin prompts of olora with group, data set, instruction and options; false leaves the text and its
            cue for the answer, for models that know no instructions and have little room; null: true with words.
        chat: give each prompt as what a user says, in the tokenizer's chat template, which then stands for its plain
            one.
        tokenizer: folder, name below weights/ of the data root or hub name; null takes that of the backbone's weights,
            and `bytes` (one token a byte) where these are random.
        max_length: tokens of a prompt, ≥ 32.
        max_answer: tokens of an answer with its end, ≥ 2; also the bound on generated ones. A longer class is refused,
            a longer free answer cut, which is said.
        buckets: training batches are cut from runs of so many, sorted by length, so that little is padding, ≥ 1; 1: as
            drawn.
        evaluate: score: log-likelihood of each answer to choose from, the accuracy that of the best. generate: greedy
            answers, scored by exact match, or as TRACE does; free text by ROUGE-L.
        candidates: what scores compare: all answers of the stream, or those named in the prompt, which are the task's.
        choices: a task of superni, trace or jsonl with at most so many different answers, each row with one and at
            least two training rows for each, is a choice among them, ≥ 1.
        tell_task: tell the task at test time: a prediction is one among its classes.
        classes_per_task: cut a task with more classes to choose from into several, of so many each in the order of its
            labels, ≥ 1; its prompts stay as they are. Null cuts none.
        general: names of tasks that are neither learned nor adapted to: their test samples are asked before the first
            experience and after each, for what learning costs of what the model knew. `evaluate` says how; scores
            compare the answers of the task, whatever `candidates` says. Null asks none.
        general_texts: text files (.txt in UTF-8, found like `path`), or tasks whose test samples' texts are read, whose
            perplexity is measured at the same times. A text has no template, is cut into blocks of max_length tokens
            that do not overlap, and the first token of each is not predicted; the texts of a task follow each other
            with the end token between them. Perplexities of other tokenizers or max_length do not compare. Null
            measures none.
        adapt: names of tasks that are not learned but adapted to, where they stand among the others: their test samples
            come unlabelled, in an order drawn by seed, to be predicted first (kind adapt). Their answers to choose from
            are those of tasks learned before.
        blurry: share, in [0, 1), of the training samples of each class of a task (of each task of free text) that
            appear in other experiences, evenly; test samples stay.
        disjoint: share, in [0, 1], of these classes that stay in one experience although blurry is above 0.
        repetition: probability, in [0, 1], that a class of a task met before (a task of free text) is met again in an
            experience. Its samples are shared out evenly over the experiences it appears in.
        experiences: how many where repetition is above 0, at least one a task: a new one in each until all are met;
            null: one a task.
        train_per_class: keep so many training samples of each class of a task, drawn, ≥ 1; null keeps all.
        test_per_class: the same for test samples, those of `general` and `general_texts` too, drawn alike for every
            seed.
        validation: share, in [0, 1), of each class's training samples held out.

    Raises:
        UserError: an option out of range, an unknown task, answers that can't be scored as asked.
        MissingError: a task is not there; says what to put where.
    """

    kinds = frozenset({Kind.LEARN, Kind.ADAPT})

    def __init__(
        self,
        *,
        seed: int | None = None,
        data_root: str | None = None,
        benchmark: Literal["olora", "superni", "trace", "jsonl", "tofu"] = "olora",
        order: int = 1,
        tasks: list[str] | None = None,
        absent: Literal["error", "skip"] = "error",
        path: str | None = None,
        instructions: str | None = None,
        answer: Literal["words", "class"] | None = None,
        preamble: bool | None = None,
        chat: bool = False,
        tokenizer: str | None = None,
        max_length: int = 512,
        max_answer: int = 50,
        buckets: int = 50,
        evaluate: Literal["score", "generate"] = "score",
        candidates: Literal["all", "prompt"] = "all",
        choices: int = 20,
        tell_task: bool = False,
        classes_per_task: int | None = None,
        general: list[str] | None = None,
        general_texts: list[str] | None = None,
        adapt: list[str] | None = None,
        blurry: float = 0.0,
        disjoint: float = 0.0,
        repetition: float = 0.0,
        experiences: int | None = None,
        train_per_class: int | None = None,
        test_per_class: int | None = None,
        validation: float = 0.0,
    ) -> None:
        sharing = Sharing(adapt, blurry, disjoint, repetition, experiences, train_per_class, test_per_class,
                          validation)  # fmt: skip
        check(benchmark, sharing, answer=answer, order=order, max_length=max_length, max_answer=max_answer,
              buckets=buckets, choices=choices, classes_per_task=classes_per_task, general=general,
              general_texts=general_texts, tasks=tasks, instructions=instructions, preamble=preamble, chat=chat,
              evaluate=evaluate, candidates=candidates, tell_task=tell_task)  # fmt: skip
        words, notes = answer != "class", list[str]()
        source = Source(benchmark, order, path, instructions, choices, find_root(data_root))
        beside = General.of(source, general, general_texts)
        said, learned = (words, words if preamble is None else preamble, chat), beside.learned(tasks, words)
        found = [part for task in source.read(learned, absent, said, notes) for part in cut(task, classes_per_task)]
        check_shared(sharing, found, evaluate=evaluate, candidates=candidates, tell_task=tell_task)
        self.buckets, self.free, self.tokenizer = buckets, _any_free(found, evaluate, words), load_tokenizer(tokenizer)
        names = list(dict.fromkeys(label for t in found for label in t.labels))
        self.spoken = Spoken(self.tokenizer, chat, max_length, max_answer, notes, cue=words)
        notes += dict.fromkeys(note for task in found for note in task.notes)
        classes = self.spoken.classes(names if words and not self.free else [], evaluate == "generate")
        self._references: list[list[tuple[str, str]]] = []  # (metric, text) of the right answers to each free sample
        made, length = self._experiences(found, sharing, seed or 0, names, candidates == "prompt")
        self.general = beside.sets(self.spoken, said, evaluate == "generate", test_per_class)
        self.notes = tuple(notes)
        known, shape = [] if self.free else names, (2, length)
        super().__init__(made, num_classes=len(known), input_shape=shape, task_known=tell_task, class_names=known)
        named = tuple(tuple(map(names.index, t.labels)) for t in found) if candidates == "prompt" else ()
        self.origin = {"text": self.spoken.facts(tokenizer), "choices": named}
        self.answers = Answers(classes, self.tokenizer.end, self.tokenizer.size, max_answer * (evaluate == "generate"))

    def arrange(self, data: Data, order: Tensor, batch_size: int) -> Tensor:
        """Batches of prompts of similar length; answers are short beside them."""
        assert isinstance(data.inputs, Tensor)
        return by_length(order, (data.inputs[data.row_ids(), 0] >= 0).sum(1), batch_size, self.buckets)

    def score(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Score in [0, 1] of each sample, (B,): of logits (B, C) their accuracy; of generated answers (B, n) token ids
        the best score over the sample's references."""
        if predictions.is_floating_point():
            return super().score(predictions, labels)
        return written_scores(self.tokenizer, predictions, [self._right(label) for label in labels.tolist()])

    def _right(self, label: int | list[int]) -> list[tuple[str, str]]:
        """(metric, text) of each right answer to a sample with this label."""
        if isinstance(label, list):
            return self._references[-2 - label[-1]]
        return [("exact_match", self.class_names[label])]

    def _experiences(
        self, tasks: Sequence[Task], sharing: Sharing, seed: int, names: list[str], named: bool
    ) -> tuple[list[Experience], int]:
        """The experiences, and L."""
        chosen, number = drawn(tasks, sharing, seed), {name: i for i, name in enumerate(names)}
        ids: dict[str, list[np.ndarray]] = {"train": [], "test": []}
        rows: dict[str, list[Row]] = {"train": [], "test": []}
        owners: dict[str, list[Task]] = {"train": [], "test": []}
        for task, which in zip(tasks, chosen, strict=True):
            for part, own in (("train", task.train), ("test", task.test)):
                if not len(which[part]):
                    continue
                texts = [row.prompt for row in own]
                ids[part] += self.spoken.prompts(texts, which[part], f"{part} prompts of {task.name}")
                rows[part] += [own[i] for i in which[part].tolist()]
                owners[part] += [task] * len(which[part])
        length = max(len(row) for part in ids.values() for row in part)
        length = max(length, *(len(t.labels) for t in tasks)) if named else length
        tables = {part: self._table(ids[part], owners[part], number, length, named) for part in ids}
        labels = {part: self._labels(rows[part], owners[part], number) for part in rows}
        if self.free:  # training samples come first among those that labels name
            self.writing = Written(self.spoken, [row.prompt for row in rows["train"]], self._references)
        train, test = (Data(tables[part], labels[part]) for part in ("train", "test"))
        made = [
            Experience(
                index=i,
                name=piece.name,
                kind=Kind.LEARN if piece.adapted is None else Kind.ADAPT,
                train=train.subset(piece.kept) if piece.adapted is None else test.subset(piece.adapted),
                test=test.subset(piece.test) if len(piece.test) else None,
                valid=train.subset(piece.held) if len(piece.held) else None,
                classes=() if self.free else tuple(sorted(number[name] for name in piece.labels)),
                task=i,
                title=piece.title,
            )
            for i, piece in enumerate(pieces(tasks, chosen, sharing, seed))
        ]
        return made, length

    def _table(
        self, ids: Sequence[np.ndarray], owners: Sequence[Task], number: dict[str, int], length: int, named: bool
    ) -> Tensor:
        """Inputs (N, 2, L)."""
        table = torch.full((len(ids), 2, length), -1, dtype=torch.int32)
        table[:, 0] = padded(ids, length)
        for task in set(owners) if named else ():
            mine = torch.tensor([owner is task for owner in owners])
            table[mine, 1, : len(task.labels)] = torch.tensor([number[n] for n in task.labels], dtype=torch.int32)
        return table

    def _labels(self, rows: Sequence[Row], owners: Sequence[Task], number: dict[str, int]) -> Tensor:
        """Class ids (N,); or token ids of free answers and which texts are right (N, A + 1)."""
        if not self.free:
            return torch.tensor([number[row.answers[0]] for row in rows], dtype=torch.int64)
        table = self.spoken.free([row.answers[0] for row in rows])
        first = len(self._references)
        self._references += [
            [(task.metric, text) for text in row.answers] for row, task in zip(rows, owners, strict=True)
        ]
        return torch.cat([table, -2 - torch.arange(first, first + len(rows)).unsqueeze(1)], 1)


def _any_free(tasks: Sequence[Task], evaluate: str, words: bool) -> bool:
    """Whether a task's answers are free text, which can't be scored."""
    free = next((t for t in tasks if not t.labels), None)
    if free is not None and not words:
        raise UserError(
            f"stream.answer: class, but those of {free.name} are free text (valid: words; or rows with one answer "
            "each, of which at most stream.choices differ, and half as many as there are training rows)"
        )
    if free is not None and evaluate == "score":
        raise UserError(
            f"stream.evaluate: score needs answers to choose from, but those of {free.name} are free text (valid: "
            "generate)"
        )
    return free is not None
