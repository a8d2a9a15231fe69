"""A strategy under test: how it is built, run on a tiny stream, stopped, gone on with and compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.backbones.actor_critic import actor_critic
from clplat.backbones.base import Backbone, Classifier
from clplat.backbones.clip import clip
from clplat.backbones.cnn import slim_resnet18
from clplat.backbones.heads import Growing
from clplat.backbones.mlp import mlp
from clplat.backbones.vit import vit_micro
from clplat.config import discovery
from clplat.config.settings import Config, FabricSettings, LoopSettings, Part
from clplat.errors import Interrupted, UserError
from clplat.lightning import Fabric
from clplat.metrics import summarize
from clplat.metrics.record import RunRecord
from clplat.run import checkpoint
from clplat.run.build import check_stream, new_record, seed_everything
from clplat.run.launch import make_fabric
from clplat.run.loop import Runner
from clplat.run.runlog import RunLog
from clplat.run.saving import restore, snapshot
from clplat.strategy import Strategy, evaluating
from clplat.stream import Experience, Kind
from clplat.testing.streams import CLASSES, TinyStream
from clplat.testing.writing import Scribe

SEED, BATCH, MEMORY, REPLAY = 0, 8, 12, 4
BACKBONES: tuple[Callable[[tuple[int, ...]], Backbone], ...] = (
    lambda shape: mlp(shape, [16]),
    lambda shape: vit_micro(shape, patch_size=2, dim=8, depth=2, heads=2),
    lambda shape: slim_resnet18(shape, width=2),
    lambda shape: clip(shape, dim=8, depth=1, heads=2, patch_size=2, vocabulary=12),
    lambda shape: actor_critic(shape, actor_hidden=[8], critic_hidden=[8]),
)


def _acts(strategy: Strategy, observation: np.ndarray) -> bool:
    """Whether it gives an action of the tiny environment: an integer, or a vector of one number."""
    with evaluating(strategy), torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            action = np.asarray(strategy.act(observation, False))
        except Exception:  # noqa: BLE001 - on this network; another may do
            return False
    return bool(np.issubdtype(action.dtype, np.integer)) or action.shape == (1,)


class FineTuning(Strategy):
    """What a strategy with no mechanism does: trains on what comes, and leaves everything else as it is."""

    kinds = frozenset(Kind)
    paper = "none: the reference of the conformance suite"

    def training_step(self, batch: tuple[Tensor, Tensor] | None, batch_idx: int) -> Tensor | None:
        if batch is None or batch[1] is None:  # steps in an environment
            return None
        try:
            losses = self.losses(*batch)
        except ValueError:  # batch normalisation does not train on one value a channel
            return None
        return self.mean(losses)

    def forget_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Erases nothing."""

    def adapt_step(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(inputs)

    def act(self, observation: Any, explore: bool) -> int:
        return 0

    def observe(self, transition: Any) -> int:
        return 0


@dataclass
class Outcome:
    """What a run ended with: the strategy, its state then, what was measured, and its steps in each experience."""

    strategy: Strategy
    stream: TinyStream
    record: RunRecord
    steps: dict[int, int]
    state: State


@dataclass
class State:
    """A state as a checkpoint holds it: plain values, and copies of the tensors by path."""

    plain: Any
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, strategy: Strategy) -> State:
        """The strategy's state now. Raises TypeError where it can't be saved."""
        return cls.copy(dict(strategy.state_dict()))

    @classmethod
    def copy(cls, state: dict[str, Any]) -> State:
        """A state of nested tensors and plain values. Raises TypeError where it can't be saved."""
        tensors: dict[str, Tensor] = {}
        plain = checkpoint.flatten(state, tensors)
        return cls(plain, {name: t.detach().clone() for name, t in tensors.items()})

    def differences(self, other: State, tolerance: float = 0.0) -> list[str]:
        """Names of what is not the same in both: bit for bit, or numbers to `tolerance`."""
        names = sorted(self.tensors.keys() ^ other.tensors.keys())
        for name in sorted(self.tensors.keys() & other.tensors.keys()):
            if not _close(self.tensors[name], other.tensors[name], tolerance):
                names.append(name.removeprefix("/"))
        return names or ([] if self.plain == other.plain else ["a plain value of the extra state"])


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if tolerance and a.is_floating_point():
        return torch.allclose(a, b, atol=tolerance, rtol=tolerance, equal_nan=True)
    return a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8))


class Trial(Runner):
    """A runner that counts steps, can be stopped after a number of them, and can draw anew in each experience.

    Args:
        stop_at: steps of the whole run after which to stop; None runs to the end.
        reseed: seed every generator when an experience begins, so that two strategies that draw differently still
            give new head rows the same values.
        flops: count the operations of a step of each experience, as the loop does: that takes longer than a tiny step,
            and its kernels may round otherwise, so that runs to be compared must all count or none.
    """

    def __init__(self, *args: Any, stop_at: int | None = None, reseed: bool = False, flops: bool = False,
                 draws: int | None = None) -> None:  # fmt: skip
        super().__init__(*args)
        self.counts_flops = flops
        self.stop_at, self.reseed, self.draws, self.counted = stop_at, reseed, draws, dict[int, int]()
        self.latest: State | None = None

    def _train(self, experience: Experience) -> None:
        if self.reseed and not self.progress.begun:
            seed_everything(1000 + experience.index)
        super()._train(experience)

    def _between_steps(self, experience: Experience) -> None:
        self.counted[experience.index] = self.progress.steps
        self.stop_requested = self.stop_at is not None and self.progress.total_steps >= self.stop_at
        super()._between_steps(experience)
        if self.draws is not None:
            torch.manual_seed(self.draws + self.progress.total_steps)

    def save(self) -> None:
        """Keep the checkpoint in memory: writing it safely to disk takes longer than the run."""
        if self.stop_at is not None:
            self.latest = State.copy(snapshot(self))
        super().save()


@cache
def one_process() -> Fabric:
    """Fabric on this process and the CPU."""
    return make_fabric(FabricSettings(accelerator="cpu"))


@dataclass
class Subject:
    """A strategy under test.

    Args:
        name: registered name, or `path/to/file.py:Class`.

    Raises:
        UserError: unknown name, or what the strategy needs is not installed.
    """

    name: str
    cls: type[Strategy] = field(init=False)
    entry: discovery.Entry = field(init=False)

    def __post_init__(self) -> None:
        self.entry, self.cls = discovery.find("strategies", self.name), discovery.load("strategies", self.name)

    @cached_property
    def backbone(self) -> Callable[[tuple[int, ...]], Backbone]:
        """The first of the suite's backbones that the strategy can be built on, and acts with where it does nothing
        else; where it acts with none, the first of the former."""
        stream, built, refusals = self.stream(), list[Any](), list[Exception]()
        for make in BACKBONES:
            try:
                strategy = self._build(make, stream, SEED)
            except Exception as error:  # noqa: BLE001 - raised if no network will do
                refusals.append(error)
                continue
            built.append(make)
            if self.cls.kinds != {Kind.INTERACT} or _acts(strategy, stream.probe[0].numpy()):
                return make
        if built:
            return built[0]
        raise next((e for e in refusals if isinstance(e, UserError)), refusals[0])

    def stream(self, without: Collection[Kind] = (), **how: Any) -> TinyStream:
        """A tiny stream that it takes, of the kinds that it declares and that are not in `without`."""
        return TinyStream(self.cls.kinds - set(without), writes=self.cls.needs_text, **how)

    def options(self, processes: int = 1) -> dict[str, Any]:
        """Options for tiny streams. `replay_batch` counts per process, as `loop.batch_size` does, and processes draw
        dropout apart."""
        known = {o.name for o in discovery.options(self.entry)}
        small = {"memory": MEMORY, "replay_batch": REPLAY // processes, "optimizer": "sgd", "lr": 0.05}
        small |= {"dropout": 0.0, "adapt_optimizer": "sgd", "adapt_lr": 0.05, "margin": 2.0, "augmentations": 4}
        small |= {"batch": 4, "warmup_steps": 8, "random_steps": 6, "penalty_actions": 2, "inverse_temperature": 0.3}
        small |= {"general": 1, "expert": 1, "blocks": 2, "held_out": 0.5, "least_drop": -1.0, "tune_steps": 20}
        small |= {"width": 256, "pretraining_steps": 2}
        if "chunk_embedding" not in known:  # samples, so that processes share them; a hypernetwork's are weights
            small["chunk"] = 4
        if "dampening" in known:  # of `ssd`: with less, a network that has learned little has nothing to dampen
            small["alpha"] = 1.0
        return {name: value for name, value in small.items() if name in known}

    def build(self, stream: TinyStream, seed: int = SEED, **how: Any) -> Strategy:
        """A new strategy, everything it draws coming from `seed`."""
        return self._build(self.backbone, stream, seed, **how)

    def _build(
        self,
        backbone: Callable[[tuple[int, ...]], Backbone],
        stream: TinyStream,
        seed: int,
        *,
        cls: type[Strategy] | None = None,
        freeze: Callable[[nn.Module], list[nn.Parameter]] | None = None,
        **options: Any,
    ) -> Strategy:
        seed_everything(seed)
        features = backbone(stream.input_shape)
        head = Growing(features.embed_dim, CLASSES) if features.needs_head else None
        model = features.assemble(head, stream.answers) if stream.slate is None else Scribe(features)
        if Kind.LEARN not in self.cls.kinds and features.needs_head:
            _pretrain(model, stream)
        for parameter in freeze(model.backbone) if freeze else []:
            parameter.requires_grad_(False)
        return (cls or self.cls)(model=model, **(options or self.options()))

    def run(
        self, *, seed: int = SEED, repeat: int = 1, separate: bool = False, mislabel: bool = False,
        reseed: bool = False, flops: bool = False, **how: Any,
    ) -> Outcome:  # fmt: skip
        """One whole run; `how` goes to `build`."""
        stream = self.stream(seed=seed, repeat=repeat, separate=separate, mislabel=mislabel)
        strategy = self.build(stream, seed, **how)
        return self.finish(self.trial(strategy, stream, seed=seed, reseed=reseed, flops=flops))

    def trial(
        self, strategy: Strategy, stream: TinyStream, *, seed: int = SEED, state: State | None = None,
        fabric: Fabric | None = None, batch_size: int = BATCH, accumulate: int = 1, **how: Any,
    ) -> Trial:  # fmt: skip
        """A runner that is ready to run, or to go on from `state`."""
        loop = LoopSettings(max_epochs=2, batch_size=batch_size, accumulate=accumulate, eval_every=3, eval_episodes=2,
                            checkpoint_seconds=None)  # fmt: skip
        if faults := check_stream(Config(Part("tiny"), Part("tiny"), Part("tiny"), loop=loop), type(strategy), stream):
            raise UserError(*faults)
        log, record = RunLog(None, 0.0), new_record(stream, None)
        trial = Trial(strategy, stream, loop, fabric or one_process(), seed, log, record, **how)
        if state is not None:
            restore(trial, checkpoint.unflatten(json.loads(json.dumps(state.plain)), state.tensors))
        return trial

    def finish(self, trial: Trial) -> Outcome:
        """Run to the end. Raises as the runner does."""
        trial.run()
        strategy, stream = trial.strategy, cast(TinyStream, trial.stream)
        return Outcome(strategy, stream, trial.record, dict(trial.counted), State.of(strategy))

    @cached_property
    def _straight(self) -> Outcome | Exception:
        try:
            return self.run()
        except Exception as error:  # noqa: BLE001 - kept, and raised by whoever asks for the run
            return error

    @property
    def straight(self) -> Outcome:
        """The plain run that checks share; nothing may change it. Raises what the run raised."""
        if isinstance(self._straight, Exception):
            raise self._straight
        return self._straight

    def resumed(self, stop_at: int) -> Outcome:
        """The plain run, stopped after `stop_at` steps and gone on with from its checkpoint by new objects."""
        stream = self.stream()
        first = self.trial(self.build(stream), stream, stop_at=stop_at)
        try:
            return self.finish(first)
        except Interrupted:
            stream = self.stream()
            return self.finish(self.trial(self.build(stream), stream, state=first.latest))

    def fine_tuned(self) -> Outcome:
        """The run of a strategy without a mechanism, with this one's optimizer, from the same weights and draws."""
        stream = self.stream()
        mine = self.build(stream)
        options = {k: getattr(mine, k) for k in ("lr", "momentum", "weight_decay", "schedule", "warmup")}
        strategy = self.build(stream, cls=FineTuning, optimizer=mine.optimizer_name, **options)
        return self.finish(self.trial(strategy, stream, reseed=True))

    def answers(self, strategy: Strategy, inputs: Tensor) -> Tensor:
        """Predictions for inputs (n, ...); the greedy actions (n, ·) of a strategy that only interacts."""
        with evaluating(strategy), torch.no_grad():
            if self.cls.kinds != {Kind.INTERACT}:
                return strategy.predict(inputs)
            actions = [np.asarray(strategy.act(x.numpy(), False)) for x in inputs]
            return torch.from_numpy(np.stack(actions)).reshape(len(inputs), -1).float()


def measured(record: RunRecord) -> dict[str, Any]:
    """Everything in a record that is not a time or a size; a number that is not finite equals itself."""
    parts = {k: getattr(record, k) for k in ("matrix", "anytime", "online", "returns", "representation")}
    return {k: repr(v) for k, v in (parts | summarize(record)[0]).items()}


def _pretrain(model: Classifier, stream: TinyStream) -> None:
    """Give a strategy that does not learn something to forget, adapt or act with."""
    inputs, labels = stream.source.all()
    assert labels is not None
    model.grow(Experience(0, "source", Kind.LEARN, None, classes=tuple(range(CLASSES))))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
