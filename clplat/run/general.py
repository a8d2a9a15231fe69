"""Sets that no experience learns: whether they can be measured, and what they score before and after experiences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from clplat.backbones.answering import Answerer
from clplat.config.settings import Config
from clplat.run.measuring import evaluate
from clplat.run.state import RunState
from clplat.strategy import Strategy
from clplat.stream import Answers, Stream

_OPTIONS = {"accuracy": "general", "perplexity": "general_texts"}


def faults(config: Config, strategy: Strategy, stream: Stream) -> list[str]:
    """Why the sets of a stream of words can't be measured; one line each."""
    if not isinstance(stream.answers, Answers):
        return []
    stem = "stream.base_options" if "base_options" in config.stream.options else "stream"
    return [
        f"{stem}.{_OPTIONS[what]}: {fault} (valid: null)"
        for what, sets in stream.general.items()
        for fault in _faults(strategy, what, sets, stream.answers.new_tokens)
    ]


def _faults(strategy: Strategy, what: str, sets: Stream, written: int) -> Iterator[str]:
    model, cls = strategy.model, type(strategy)
    if not isinstance(model, Answerer):
        yield f"needs backbone language_model with its own words, but {cls.__name__} predicts by another model"
        return
    if cls.frozen_features or (cls.predict is not Strategy.predict and not cls.predicts_as_model):
        yield f"{cls.__name__} predicts by more than its model, which tells no likelihood of other texts"
    backbone: Any = model.backbone
    if what == "perplexity" and backbone.seq2seq:
        yield "an encoder-decoder has no perplexity of a text (a decoder has)"
    for e in sets:
        assert e.test is not None
        inputs, _ = e.test.all()
        prompts = int((inputs[:, 0] >= 0).sum(1).max())
        answers = int((inputs[:, 2:] >= 0).sum(2).max()) if inputs.shape[1] > 2 else written
        longest = max(prompts, answers) if backbone.seq2seq else prompts + answers
        if longest > backbone.context:
            yield f"{e.name} has texts of {longest} tokens, but the model's context is {backbone.context}"


def measure(run: RunState) -> None:
    """Take the sets' scores into the record; nothing where the stream has none."""
    row: dict[str, dict[str, float | None]] = {}
    for what, evaluator in run.general.items():
        scores = evaluate(run, evaluator=evaluator)
        if what == "perplexity":
            scores = [1 / s if s else None for s in scores]
        row[what] = {e.name: score for e, score in zip(evaluator.stream, scores, strict=True)}
    if row:
        run.record.general.append(row)
