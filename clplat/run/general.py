"""Sets that no experience learns: whether they can be measured, and what they score before and after experiences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from clplat.backbones.answering import Answerer
from clplat.config.settings import Config
from clplat.run.measuring import evaluate
from clplat.run.state import RunState
from clplat.strategy import Strategy
from clplat.stream import Answers, Data, Stream

_OPTIONS = {"accuracy": "general", "perplexity": "general_texts"}


def faults(config: Config, strategy: Strategy, stream: Stream) -> list[str]:
    """Why likelihoods of texts that a stream of words asks for can't be measured; one line each."""
    if not isinstance(stream.answers, Answers):
        return []
    stem = "stream.base_options" if "base_options" in config.stream.options else "stream"
    own = [f"stream: {fault}" for fault in _faults(strategy, stream, 0)] if stream.perplexity else []
    return own or [
        f"{stem}.{_OPTIONS[what]}: {fault} (valid: null)"
        for what, sets in stream.general.items()
        for fault in _faults(strategy, sets, stream.answers.new_tokens)
    ]


def _faults(strategy: Strategy, sets: Stream, written: int) -> Iterator[str]:
    """Args: written: tokens that a model writes where a set has no continuations."""
    model, cls = strategy.model, type(strategy)
    if not isinstance(model, Answerer):
        yield f"needs backbone language_model as it is, but {cls.__name__} predicts by another model"
        return
    if cls.frozen_features or (cls.predict is not Strategy.predict and not cls.predicts_as_model):
        yield f"{cls.__name__} predicts by more than its model, which tells no likelihood of texts"
    backbone: Any = model.backbone
    if sets.perplexity and backbone.seq2seq:
        yield "an encoder-decoder has no perplexity of a text (a decoder has)"
    for e in sets:
        longest = [_tokens(data, written, backbone.seq2seq) for data in (e.train, e.test) if data is not None]
        if max(longest) > backbone.context:
            yield f"{e.name} has texts of {max(longest)} tokens, but the model's context is {backbone.context}"


def _tokens(data: Data, written: int, apart: bool) -> int:
    """Tokens of the longest text: of a prompt and what follows it, or where they are read apart of the longer one."""
    inputs, labels = data.all()
    prompts, answers = int((inputs[:, 0] >= 0).sum(1).max()), written
    if inputs.shape[1] > 2:
        answers = int((inputs[:, 2:] >= 0).sum(2).max())
    elif labels is not None and labels.ndim == 2:
        answers = int((labels >= 0).sum(1).max())
    return max(prompts, answers) if apart else prompts + answers


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
