"""All that a run holds while it goes: the learner, its stream, where it stands, and what has been measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clplat.components.merging._base import Merge
from clplat.components.merging.none import Unmerged
from clplat.components.norms import batch_of, prepare_training
from clplat.config.settings import AuditSettings, LoopSettings
from clplat.data.batches import local_slice
from clplat.erasure.ledger import Ledger
from clplat.lightning import Fabric
from clplat.metrics.record import RunRecord
from clplat.metrics.rows import Rows
from clplat.run.budget import steps_bought
from clplat.run.diagnosing import Diagnostics
from clplat.run.evaluation import Evaluator
from clplat.run.progress import Progress
from clplat.run.recomputing import recompute
from clplat.run.runlog import RunLog
from clplat.run.sharding import shard, sharding
from clplat.run.sources import Sources
from clplat.run.writer import Writer
from clplat.strategy import Strategy
from clplat.stream import Data, Experience, Kind, Stream

Watch = Callable[[RunRecord], bool]
"""Asked after each experience but the last, with what has been measured so far: whether the run is to stop."""


class RunState:
    """What the turns, the step, measuring and saving work on.

    Args:
        strategy: on the CPU or on the device; moved.
        stream: moved to the device whole.
        loop: settings.
        fabric: launched.
        seed: of the order of the data.
        log: where measurements go.
        record: what has been measured so far.
    """

    def __init__(
        self, strategy: Strategy, stream: Stream, loop: LoopSettings, fabric: Fabric, seed: int, log: RunLog,
        record: RunRecord,
    ) -> None:  # fmt: skip
        self.loop, self.fabric, self.seed, self.log, self.record = loop, fabric, seed, log, record
        self.rank, self.world_size = fabric.global_rank, fabric.world_size
        self.stream = stream.to(fabric.device)
        self.module: Any = strategy  # as Fabric wraps it
        self.optimizer: Any = None
        self.base_lrs: list[float] = []
        self.steps_planned = 0  # of the current experience
        self.ledger = Ledger(self.stream)
        prepare_training(strategy, self.world_size)
        if loop.activation_checkpointing:
            backbone: Any = strategy.model.backbone
            recompute(backbone)
        self.sharded = sharding(fabric)
        if self.sharded:
            shard(strategy, fabric.device)
        self.rows = Rows()
        self.strategy = strategy.to(fabric.device)
        strategy._prepare, strategy.rank, strategy.world_size = stream.prepare, self.rank, self.world_size
        if stream.writing is not None:
            strategy.writing = stream.writing
        # Sharded weights come together in every pass: all processes must make the same passes, so each scores all.
        self.share_of_tests = rank, world = (0, 1) if self.sharded else (self.rank, self.world_size)
        shared: dict[str, Any] = {"device": fabric.device, "batch_size": loop.eval_batch_size, "rank": rank}
        shared |= {"world_size": world, "valid": loop.evaluate_on == "valid"}
        self.evaluate = Evaluator(stream, **shared)
        self.evaluate_inside = (
            Evaluator(stream, **shared, limit=loop.eval_samples) if loop.eval_every else self.evaluate
        )
        held_out = shared | {"valid": False}
        self.general = {what: Evaluator(sets, **held_out) for what, sets in self.stream.general.items()}
        self.progress, self.audit = Progress(), AuditSettings(enabled=False)
        self.merge: Merge = Unmerged()
        self.diagnostics = Diagnostics(loop.diagnostics, self.strategy)
        self.compiled = False  # whether passes are compiled
        self.stop_requested = False
        self.watch: Watch | None = None
        self.config: dict[str, Any] = {}  # as config.yaml has it; what a resumed run is compared with
        self.resumed: dict[str, Any] | None = None  # {"optimizer", "learning_rates"} of the experience gone on with
        self.losses: list[Tensor] = []
        self.broken: list[Tensor] = []  # numbers of predictions that are not finite, not yet read from the device
        self.gradient_norms: list[float] = []
        self.online = {"correct": 0.0, "seen": 0}
        self.predictions: list[dict[str, Tensor]] = []  # kept of the current experience, this process's part
        self.returns: dict[str, Any] = {}
        self.may_save = True  # not within an episode of an environment that can't be saved
        self.acting: Any = None  # `interaction.Acting`, while an environment is acted in
        self.acted: dict[str, Any] | None = None  # its state in the checkpoint that the run goes on from
        self.saves, self.saved_at, self.saved_step = 0, time.monotonic(), 0
        self.save_seconds = 0.0  # that the last checkpoint held up the loop
        self.writer = Writer()
        self.sources: Sources | None = None  # of weights that checkpoints name instead of holding them
        self.flops_per_step = 0.0
        self.spent = dict.fromkeys(("train_seconds", "eval_seconds", "save_seconds", "train_flops", "samples"), 0.0)
        self.window, self.boundary = 1, True  # batches of the current optimizer step, and whether this is its last
        self.share = 1.0  # of the samples of that step, what this batch has: its loss weighs so much

    def hook(self, name: str) -> Callable[..., Any]:
        """A hook of the strategy, called through DDP's wrapper where there is one, in the precision asked for.

        Fabric's own wrapper enters the precision only where the strategy is wrapped once more, by DDP, say.
        """
        method = getattr(self.module, name)

        shared = partial(batch_of, shared=True) if self.world_size > 1 else nullcontext

        def in_precision(*args: Any) -> Any:
            with self.fabric.autocast(), shared():
                return method(*args)

        return in_precision

    def ahead(self, data: Data, order: Tensor, batches: int) -> Data:
        """The data in `order` (n,), so that a batch is a slice; what is not in memory is read ahead of its batch."""
        n, size, rank, world = len(order), self.loop.batch_size, self.rank, self.world_size
        parts = (local_slice(n, k, size, rank, world)[0] for k in range(self.progress.batch, batches))
        return data.subset(order).ahead(parts)

    def batch(self, data: Data) -> tuple[Tensor, Tensor | None]:
        """This process's part of the coming batch of data in order; sets what a strategy may ask about it."""
        assert data.rows is not None
        part, whole = local_slice(len(data), self.progress.batch, self.loop.batch_size, self.rank, self.world_size)
        raw, labels = data.batch(part)
        attributes = self.strategy.__dict__  # past nn.Module's slow attribute machinery
        attributes["raw"], attributes["rows"], attributes["global_batch"] = raw, data.rows[part], whole
        self.spent["samples"] += whole
        return raw, labels

    @property
    def merging(self) -> Merge | None:
        """What is done to the weights of the current experience, if anything is."""
        p = self.progress
        return self.merge if self.stream[p.experience].kind is Kind.LEARN and p.experience >= self.merge.skip else None

    def enough(self) -> bool:
        """Whether the current experience has taken all the steps it may."""
        steps, most = self.progress.steps, self.loop.max_steps
        if most is not None and steps >= most:
            return True
        known = self.loop.max_flops is not None and self.flops_per_step > 0  # asked first: this is called at every step
        return known and self.budgeted and steps >= steps_bought(self.loop, self.flops_per_step * self.world_size)

    @property
    def budgeted(self) -> bool:
        """Whether the current experience has a budget of FLOPs."""
        kind = self.stream[self.progress.experience].kind
        return self.loop.max_flops is not None and kind in (Kind.LEARN, Kind.FORGET)

    def env_steps(self, experience: Experience) -> int:
        """Steps to take in its environment."""
        most = self.loop.max_env_steps
        return experience.env_steps if most is None else min(most, experience.env_steps)

    def all_processes(self, counts: dict[str, float]) -> dict[str, float]:
        """Sums over processes; a collective call."""
        if self.world_size == 1:
            return dict(counts)
        total = torch.tensor(list(counts.values()), dtype=torch.float64, device=self.fabric.device)
        torch.distributed.all_reduce(total)
        return dict(zip(counts, total.tolist(), strict=True))
