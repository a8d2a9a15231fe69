"""From a resolved configuration to objects: stream, model, strategy."""

from __future__ import annotations

import copy
import dataclasses
import os
import random
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clplat.backbones.base import Backbone, Classifier
from clplat.backbones.frozen import Frozen
from clplat.config import discovery
from clplat.config.resolve import DEFAULTS, PARTS
from clplat.config.settings import Config, Part
from clplat.erasure.ledger import stream_faults
from clplat.errors import MissingError, UserError
from clplat.inputs import Inputs
from clplat.metrics.erasure import erased_samples
from clplat.metrics.record import ExperienceRecord, RunRecord
from clplat.run import budget, compiling, filing, filming, general, precisions, recomputing, sharding
from clplat.run.given import maker, real
from clplat.run.merging import build_merge, merge_faults
from clplat.run.preprocessing import agree
from clplat.run.start import start_from
from clplat.strategy import Strategy, check_hooks, check_kinds
from clplat.stream import Actions, Answers, Kind, Stream


def build(config: Config, start: Path | None = None) -> tuple[Stream, Strategy]:
    """Stream and strategy, checked against each other before anything runs.

    Args:
        start: folder of a run whose weights the model starts from.

    Raises:
        UserError: with all faults at once: values out of range in any part, a missing or misspelt hook, a kind that
            the strategy does not declare, a head that needs task ids which the stream hides.
        MissingError: data or weights are not there, and nothing else is wrong.
    """
    trial = Trial(config)
    stream = trial.part("stream", lambda options: build_stream(config, options))
    cls = maker(config, "strategy")
    shape, classes = (stream.input_shape, stream.num_classes) if stream is not None else _guess(cls)
    seed_everything(config.seed)
    make_backbone = maker(config, "backbone")
    backbone = trial.part("backbone", lambda options: make_backbone(shape, **options), whole=stream is not None)
    backbone = None if backbone is None else precisions.narrow(config, backbone)
    if stream is not None and backbone is not None:
        trial.faults += agree(stream, backbone)
    width = 1 if backbone is None else backbone.embed_dim
    head = None
    if classes > 0 if backbone is None else backbone.needs_head:  # a stream of environments has no use for one
        make_head = maker(config, "head")
        head = trial.part("head", lambda options: make_head(width, classes, **options), whole=stream is not None)
    else:
        trial.faults += _idle_head(config)
    if stream is not None and backbone is not None:
        trial.faults += _other_inputs(config.backbone.name, backbone, stream)
        trial.faults += _kept_faults(cls, backbone, stream)
    trial.faults += [f"strategy: {f}" for f in check_hooks(cls)] + _several(config, cls)
    model: Any = torch.nn.Linear(1, 1)
    if backbone is not None and (head is not None or not backbone.needs_head):
        answers = None if stream is None else stream.answers
        model = trial.part("backbone", lambda _: backbone.assemble(head, answers), whole=stream is not None) or model
    untrained: dict[str, torch.Tensor] | None = None
    if start is not None and isinstance(model, Classifier):
        untrained = {name: t.clone() for name, t in model.state_dict().items()}
        trial.faults += start_from(model, start, head=config.start.head)
    whole = isinstance(model, Classifier) and not trial.faults
    strategy = trial.part("strategy", lambda options: cls(model=model, **options), whole=whole)
    if strategy is not None:
        trial.faults += [f for room in (precisions, filing, budget) for f in room.faults(config, strategy)]
        if untrained is not None:
            strategy.before_start(untrained)
    merge = trial.part("merge", lambda options: build_merge(config, options))
    if stream is not None:
        trial.faults += check_stream(config, cls, stream)
        if strategy is not None:
            trial.faults += _passes(config, cls, strategy, stream)
        if strategy is not None and merge is not None and config.merge.name != DEFAULTS["merge"]:
            trial.faults += merge_faults(config.merge.name, merge, strategy, stream)
    if stream is not None and strategy is not None and not trial.faults:
        trial.faults += strategy.faults([e.seen() for e in stream], config.start.run is not None)
    trial.end()
    assert stream is not None
    assert strategy is not None
    stream.notes = (*stream.notes, *strategy.notes, *precisions.notes(config, strategy), *_other_step(config, strategy))
    return stream, strategy


def _other_step(config: Config, strategy: Strategy) -> list[str]:
    """What the user is told where accumulated batches are no larger batch."""
    if config.loop.accumulate == 1 or not strategy.whole_batch:
        return []
    said = f"loop.accumulate: {config.loop.accumulate} batches are another step than one of their size"
    return [f"{said}: {strategy.whole_batch}"]


def _guess(cls: type[Strategy]) -> tuple[tuple[int, ...], int]:
    """Shape of inputs and number of classes that the other parts are tried on where there is no stream."""
    return ((3,), 0) if cls.kinds == {Kind.INTERACT} else ((1, 28, 28), 10)


# What the constructor of a part is called with beside its options.
_TAKES = {
    "stream": "`seed` and `data_root` beside its options (docs/streams.md)",
    "strategy": "`model` beside its options (docs/strategy.md)",
    "backbone": "the shape of an input, then its options (docs/architecture.md)",
    "head": "the number of features and that of classes, then its options (docs/architecture.md)",
}


def _last_file(error: Exception) -> str:
    """The file in which it was raised."""
    return traceback.extract_tb(error.__traceback__)[-1].filename


class Trial:
    """Builds parts and gathers their faults: an option refused is put back to its default, and the part tried again."""

    def __init__(self, config: Config) -> None:
        self.config, self.faults, self.missing = config, list[str](), list[str]()

    def part(self, key: str, make: Callable[[dict[str, Any]], Any], whole: bool = True) -> Any:
        """The part, or None where it can't be built.

        Args:
            whole: whether what it is built on stands; where not, only faults of its own options count.
        """
        part: Part = getattr(self.config, key)
        entry = discovery.find(PARTS[key], part.name, self.config.given)
        defaults = {o.name: o.default for o in discovery.options(entry)}
        options, refused = dict(part.options), 0
        while True:
            try:
                made = make(real(self.config, options))
            except UserError as error:
                own = [f for f in error.faults if f.startswith(f"{key}.")]
                told = {f.partition(":")[0] for f in self.faults}  # of an option a line is enough
                found = error.faults if whole else own
                self.faults += [f for f in found if f not in own or f.partition(":")[0] not in told]
                again = {f[len(key) + 1 :].partition(":")[0] for f in own}
                again = {k for k in again if k in options and k in defaults and options[k] != defaults[k]}
                if not again:
                    return None
                refused += len(own)
                options |= {k: defaults[k] for k in again}
            except MissingError as error:
                self.missing += error.faults if whole else []
                return None
            except Exception as error:
                if whole and not self.faults:
                    calls = (__file__, maker.__code__.co_filename)  # not what they call
                    if isinstance(error, TypeError) and _last_file(error) in calls:
                        raise UserError(f"{key}: {error}; it is called with {_TAKES[key]}") from None
                    raise
                return None  # most likely a consequence of the faults found
            else:
                return None if refused else made

    def end(self) -> None:
        """Raise what was found."""
        if self.faults:
            raise UserError(*dict.fromkeys(self.faults + self.missing))
        if self.missing:
            raise MissingError(*self.missing)


def build_stream(config: Config, options: dict[str, Any] | None = None) -> Stream:
    """The stream; its draws come from its own seed, or else the run's. `options` stand for those of `config`.

    Test data are withheld where validation data are scored: nothing of the run can read them.
    """
    options = real(config, config.stream.options) if options is None else dict(options)
    seed = options.pop("seed", None)
    root = config.data_root or os.environ.get("CLPLAT_DATA")
    _speak(options, config)
    stream = maker(config, "stream")(seed=config.seed if seed is None else seed, data_root=root, **options)
    return _without_test(stream) if config.loop.evaluate_on == "valid" else stream


def _without_test(stream: Stream) -> Stream:
    """The same stream, whose experiences hold no test data; a user's own object stays as it is."""
    bare = copy.copy(stream)
    bare.experiences, bare.general = tuple(dataclasses.replace(e, test=None) for e in stream), {}
    return bare


def _speak(options: dict[str, Any], config: Config) -> None:
    """Give a stream of text, or the one that a stream is made of, what it takes from the backbone where it says null.

    That is the tokenizer of the weights, and whether answers are words or the classes of a head.
    """
    if isinstance(options.get("base"), str) and "base_options" in options:
        known = {o.name for o in discovery.options(discovery.find("streams", options["base"]))}
        given = {k: None for k in ("tokenizer", "answer") if k in known} | (options["base_options"] or {})
        options["base_options"] = given
        _speak(given, config)
    if "tokenizer" in options and options["tokenizer"] is None:
        given = config.backbone.options
        given = (given.get("base_options") or {}) if "base_options" in given else given  # the one within it has them
        options["tokenizer"] = given.get("config") if given.get("weights") == "random" else given.get("weights")
    if "answer" in options and options["answer"] is None:
        backbone = discovery.find("backbones", config.backbone.name, config.given)
        options["answer"] = "class" if discovery.has_head(backbone) else "words"


def _other_inputs(name: str, backbone: Backbone, stream: Stream) -> list[str]:
    """The fault of token ids for a backbone that reads none, or of other inputs for one that does."""
    tokens = isinstance(stream.answers, Answers) and len(stream.input_shape) == 2
    if tokens and not backbone.reads_tokens:
        return [f"backbone: {name} takes no token ids (valid: text_encoder, language_model)"]
    if backbone.reads_tokens and not tokens:
        return [f"backbone: {name} reads token ids, which this stream does not hold (valid: a stream of text)"]
    return []


def _kept_faults(cls: type[Strategy], backbone: Backbone, stream: Stream) -> list[str]:
    """The fault of keeping features by input where an input is never the same, or has features by its batch."""
    if not isinstance(backbone, Frozen) or backbone.folder is None:
        return []
    faults = [f"{cls.__name__} adapts the backbone to the batch (valid: null)"] if Kind.ADAPT in cls.kinds else []
    if stream.augment is not None:
        faults.append("augmented inputs are new ones each time (valid: null, or a stream that augments none)")
    return [f"backbone.cache: {fault}" for fault in faults]


def build_strategy(
    config: Config, input_shape: tuple[int, ...], num_classes: int, *, seed: int,
    answers: Answers | Actions | None = None,
) -> Strategy:  # fmt: skip
    """Backbone, head and strategy without a stream, initialised from `seed`."""
    seed_everything(seed)
    model = build_model(config, input_shape, num_classes, answers)
    return maker(config, "strategy")(model=model, **real(config, config.strategy.options))


def build_model(
    config: Config, input_shape: tuple[int, ...], num_classes: int, answers: Answers | Actions | None = None
) -> Classifier:
    """Backbone and head without a stream."""
    backbone = precisions.narrow(
        config, maker(config, "backbone")(input_shape, **real(config, config.backbone.options))
    )
    head = None
    if backbone.needs_head:
        make_head = maker(config, "head")
        head = make_head(backbone.embed_dim, num_classes, **config.head.options)
    elif answers is None and num_classes:  # their words come with the checkpoint
        answers = Answers(torch.full((num_classes, 1), -1), 0, 0)
    return backbone.assemble(head, answers)


def _idle_head(config: Config) -> list[str]:
    """The fault of choosing a head for a backbone that makes its logits itself."""
    if config.head.name == DEFAULTS["head"] and not config.head.options:
        return []
    return [f"head: {config.head.name!r} has no meaning here (backbone {config.backbone.name} makes its own logits)"]


def _several(config: Config, cls: type[Strategy]) -> list[str]:
    """The fault of several processes for a strategy that declares one."""
    fabric = config.fabric
    if not cls.one_process or fabric.devices * fabric.num_nodes == 1:
        return []
    key, value = ("devices", fabric.devices) if fabric.devices != 1 else ("num_nodes", fabric.num_nodes)
    return [f"fabric.{key}: {value} is out of range (valid: 1, since {cls.__name__} runs in one process)"]


def _passes(config: Config, cls: type[Strategy], strategy: Strategy, stream: Stream) -> list[str]:
    """Faults of how passes are to be made: in parts, again, compiled, over texts that are not the stream's."""
    found = sharding.faults(config, cls, strategy, stream) + recomputing.faults(config, cls, strategy)
    return found + compiling.faults(config, strategy, stream) + general.faults(config, strategy, stream)


def check_stream(config: Config, cls: type[Strategy], stream: Stream) -> list[str]:
    """Faults of running a strategy on a stream: kinds, heads and data that do not fit."""
    faults = check_kinds(cls, [e.kind for e in stream])
    if config.head.name == "taskwise" and not stream.task_known:
        faults.append("head: taskwise needs a stream whose task is known at test time (stream.scenario: task)")
    if config.head.name == "taskwise" and cls.replays:
        faults += _taskwise_faults(cls, stream)
    if config.head.name == "ncm" and any(e.kind is Kind.FORGET and not e.classes for e in stream):
        faults.append("head: ncm keeps means over samples that a request erases (valid: requests for whole classes)")
    if config.head.name in ("ncm", "taskwise") and cls.readout is not Strategy.readout:
        faults.append(
            f"head: {config.head.name} has no part in what {cls.__name__} predicts with (valid: a head of another kind)"
        )
    if cls.needs_classes and isinstance(stream.answers, Answers) and not stream.num_classes:
        faults.append(f"strategy: {config.strategy.name} needs classes, but the answers of this stream are free text")
    if cls.needs_text and stream.writing is None:
        faults.append(
            f"strategy: {cls.__name__} lets the model write answers, but those of this stream are no free text (valid: "
            "stream text with tasks of free text)"
        )
    scored = any(e.kind is not Kind.ADAPT for e in stream)  # adapted to alone, it is scored as its data arrive
    if config.loop.evaluate_on == "valid" and scored and all(e.valid is None for e in stream):
        faults.append("loop.evaluate_on: valid, but the stream has no validation data (set stream.validation)")
    if config.loop.keep_predictions and all(e.kind is not Kind.ADAPT for e in stream):
        faults.append("loop.keep_predictions: true, but the stream has no adapt experience (valid: false)")
    on_disk = any(isinstance(e.train.inputs, Inputs) for e in stream if e.train is not None)
    if on_disk and (cls.reads_whole or cls.unbounded_memory):
        faults.append(
            f"strategy: {config.strategy.name} holds all samples of an experience at once, and these are not in memory "
            "(valid: stream.in_memory true, or a strategy that takes a batch at a time)"
        )
    names = [e.name for e in stream]
    for name in dict.fromkeys(n for n in names if names.count(n) > 1):
        faults.append(f"stream: {names.count(name)} experiences are called {name!r} (valid: each its own name)")
    for e in stream:
        if e.kind in (Kind.LEARN, Kind.FORGET, Kind.ADAPT) and (e.train is None or len(e.train) == 0):
            faults.append(f"stream: experience {e.index} ({e.name}) has no data")
        if e.kind is Kind.INTERACT and e.environment is None:
            faults.append(f"stream: experience {e.index} ({e.name}) has no environment")
    return faults + filming.faults(stream, config.loop.eval_frames) + stream_faults(stream)


def _taskwise_faults(cls: type[Strategy], stream: Stream) -> list[str]:
    """Why a strategy whose batches hold samples of several tasks can't have a head with rows for each task."""
    if Kind.FORGET in cls.kinds or "avalanche" in cls.__module__:
        return [f"head: taskwise scores a batch with one task's rows, but {cls.__name__} mixes tasks in a batch"]
    owners: dict[int, set[int]] = {}
    for e in stream:
        for c in e.classes:
            owners.setdefault(c, set()).add(e.task)
    shared = next((c for c, tasks in owners.items() if len(tasks) > 1), None)
    if shared is None:
        return []
    tasks = ", ".join(map(str, sorted(owners[shared])))
    return [
        f"head: taskwise tells the task of a sample that {cls.__name__} replays by its class, but class {shared} is in "
        f"tasks {tasks} (valid: tasks without a class in common)"
    ]


def new_record(stream: Stream, reference: dict[str, Any] | None = None, evaluate_on: str = "test") -> RunRecord:
    """An empty record of a run over `stream`, whose `evaluate_on` part ("test" or "valid") is scored.

    Args:
        reference: summary of the reference run.
    """
    held_out = [getattr(e, evaluate_on) for e in stream]
    facts = [
        ExperienceRecord(
            name=e.name,
            kind=e.kind,
            train_samples=0 if e.train is None else len(e.train),
            test_samples=0 if data is None else len(data),
            classes=e.classes,
            task=e.task,
            return_bounds=e.return_bounds,
            erases=erased_samples(stream, e.index, evaluate_on),
            domain=e.domain,
            severity=e.severity,
            round=e.round,
            title=e.title,
        )
        for e, data in zip(stream, held_out, strict=True)
    ]
    known = reference or {}
    return RunRecord(
        facts, reference=known.get("accuracy_matrix"), reference_returns=known.get("interaction"),
        class_names=list(stream.class_names), perplexity=stream.perplexity,
        notes=list(stream.notes),
    )  # fmt: skip


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries may draw from the global generator
    torch.manual_seed(seed)


def read_reference(path: str | None) -> Any:
    """Summary of a reference run, or None.

    Raises:
        UserError: `path` is neither a run directory with a summary nor a summary.json.
    """
    import json
    from pathlib import Path

    if path is None:
        return None
    file = Path(path) / "summary.json" if Path(path).is_dir() else Path(path)
    try:
        found = json.loads(file.read_text())
        found["accuracy_matrix"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"reference: {path} is no run directory or summary.json ({error})") from error
    return found
