"""S3FT: a model learns its own answers where they are right, else the right ones in its words, else those given.

Source   Gupta et al., "Selective Self-to-Supervised Fine-Tuning for Generalization in Large Language Models", Findings
         of NAACL 2025, arXiv:2502.08130; without rewriting it is SSR of Gupta et al., arXiv:2409.04787. What is here
         follows summaries: neither text was read in full, and no code of the authors was found.
    before a task, M the model as it stands, y the answer given to x:
        ŷ = M(x);                                 judge(ŷ, y): learn (x, ŷ)
        else ỹ = M(x, y), asked for other words;  judge(ỹ, y): learn (x, ỹ)
        else learn (x, y)
    loss = mean over an answer's tokens of −log p(token),   h = W x + s B A dropout(x),   s = alpha / r
Differs  the judge is the stream's score of a written answer against a least one (theirs: a rule for each task, or the
         model itself). ROUGE-L also passes a sentence that says something else in nearly the same words. Not known are
         their decoding (here greedy), prompt for rewriting, rate, epochs and batch. An answer that does not end within
         the stream's bound is not taken. They learn one task; here M has learned those before.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat import Data, Experience, require
from clplat.backbones.answering import Answerer
from clplat.components.memory import gathered
from clplat.components.stored import CHUNK
from clplat.strategies.lora import SequentialLoRA
from clplat.strategy import evaluating

GIVEN, OWN, REWRITTEN, UNFIT = range(4)  # where a target comes from; UNFIT: given, since it could not be asked for
FORM = """Here are a task and its right answer.

Task:
{prompt}

Right answer:
{answer}

Write the right answer once more, in your own words and without anything else.
Answer:"""


def widened(answers: Tensor, width: int) -> Tensor:
    """Answers (B, n) in `width` columns or more, filled with -1."""
    return F.pad(answers, (0, max(width - answers.shape[1], 0)), value=-1)


class S3FT(SequentialLoRA):
    """Fine-tuning of one adapter on answers that are chosen when an experience begins. B samples, n tokens at most.

    Args:
        least_score: of the stream's, from which a written answer counts as right, in (0, 1].
        rewrite: ask for the given answer in other words where the model's own is not right; false: SSR.
        form: text that asks for it, with {prompt} and {answer} in the places of the sample's; null: ours.
        alpha: a change is scaled by alpha / r, > 0.
    """

    paper = "arXiv:2502.08130"
    unshardable = "its processes write answers of their own, in passes of their own"
    needs_text = True
    searched = {"least_score": (0.3, 1.0), "rewrite": [False, True]}
    model: Answerer
    counts: Tensor

    def __init__(
        self, *, least_score: float = 0.7, rewrite: bool = True, form: str | None = None, alpha: float = 16.0, **base
    ):
        super().__init__(alpha=alpha, **base)
        require("least_score", least_score, 0 < least_score <= 1, "in (0, 1]")
        self.least_score, self.rewrite, self.form = least_score, rewrite, FORM if form is None else form
        whole = "{prompt}" in self.form and "{answer}" in self.form
        require("form", form, whole, "a text with {prompt} and {answer}, or null")
        self.targets = torch.empty(0, 0, dtype=torch.int64)  # (N, n) of the experience under way, filled with -1
        self.register_buffer("counts", torch.zeros(4, dtype=torch.int64))  # of its samples, by source

    @torch.no_grad()
    def begin(self, experience: Experience) -> None:
        """Choose the targets; each process does so for its part of the samples."""
        data = super().training_data(experience)
        self.targets = widened(data.targets(), int(self.model.ending[1]))  # (N, n)
        sources = torch.full_like(self.targets[:, 0], GIVEN)
        mine = torch.arange(len(data), device=sources.device).tensor_split(self.world_size)[self.rank]
        with evaluating(self):
            for part in mine.split(CHUNK):
                self._choose(data, part, sources)
        if self.world_size > 1:
            found = gathered({"labels": sources[mine], "targets": self.targets[mine]})
            sources, self.targets = found["labels"], found["targets"]
        self.counts.copy_(torch.bincount(sources, minlength=len(self.counts)))
        self._warn(experience.name)

    def _choose(self, data: Data, rows: Tensor, sources: Tensor) -> None:
        """Put right answers into the targets of samples `rows` (B,), and where they come from into `sources` (N,)."""
        raw, labels = data.batch(rows)
        assert labels is not None
        left = self._take(self.prepare(raw), rows, labels, OWN, sources)
        if not self.rewrite or not len(left):
            return
        rows, labels = rows[left], labels[left]
        sources[rows] = UNFIT
        fit, inputs = self.writing.rewriting(labels, self.form, self.model.room)
        sources[rows[fit]] = GIVEN
        self._take(inputs, rows[fit], labels[fit], REWRITTEN, sources)

    def _take(self, inputs: Tensor, rows: Tensor, labels: Tensor, source: int, sources: Tensor) -> Tensor:
        """Write answers to inputs (B, ...) and take those that are right; places (b,) in the batch of the others."""
        if not len(rows):
            return rows
        answers = self.model.predict(inputs)  # (B, n)
        length, most = (answers >= 0).sum(1, keepdim=True), answers.shape[1]
        right = (length[:, 0] < most) & (self.writing.score(answers, labels) >= self.least_score)
        ended = answers.scatter(1, length.clamp(max=most - 1), int(self.model.ending[0]))
        self.targets[rows[right]] = widened(ended[right], self.targets.shape[1])
        sources[rows[right]] = source
        return (~right).nonzero()[:, 0]

    def _warn(self, name: str) -> None:
        shares = self.measurements() if self.rank == 0 else {}
        if shares.get("unfit"):
            what = "need a prompt that does not fit into the model's context, and are learned as given"
            warnings.warn(f"strategy.form: {shares['unfit']:.1%} of {name} {what}", stacklevel=2)
        for source, so in (("given", "this is plain fine-tuning"), ("own", "there is next to nothing to learn")):
            if shares.get(source, 0.0) > 0.99:
                what = f"{shares[source]:.1%} of the answers of {name} are learned from the {source} ones: {so}"
                warnings.warn(f"strategy.least_score: {what}", stacklevel=2)

    def training_data(self, experience: Experience) -> Data:
        data = super().training_data(experience)
        labels = self.targets.new_full((len(data.inputs), self.targets.shape[1]), -1).to(data.row_ids().device)
        labels[data.row_ids()] = self.targets.to(labels.device)
        return dataclasses.replace(data, labels=labels)

    def end(self, experience: Experience) -> None:
        self.targets = self.targets[:0]

    def measurements(self) -> dict[str, float]:
        """Shares of the samples by whose answer was learned; and of those whose prompt for rewriting was too long."""
        given, own, rewritten, unfit = (self.counts.double() / self.counts.sum().clamp(min=1)).tolist()
        return {"own": own, "rewritten": rewritten, "given": given + unfit, "unfit": unfit}

    def get_extra_state(self) -> dict[str, Any]:
        return {"targets": self.targets}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.targets = state["targets"]
