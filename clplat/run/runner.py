"""The loop over a stream, written once for all four kinds of experience.

    for experience in stream:
        strategy.grow(experience); strategy.begin(experience)
        for loss in turns(experience):            # learn, forget: batches; adapt: predict first; interact: act, store
            backward; optimizer.step; strategy.after_step
            log; evaluate every n steps; checkpoint; stop if asked
        strategy.end(experience)
        checkpoint; evaluate all test sets in one pass; log; checkpoint

Progress is counted, and saved with every random state and the grown structure, so that a resumed run is the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from clplat.config.settings import AuditSettings, LoopSettings
from clplat.data.batches import batches_per_epoch, epoch_order, local_slice
from clplat.erasure import audit
from clplat.erasure.ledger import Ledger
from clplat.errors import DivergedError, Interrupted
from clplat.lightning import Fabric
from clplat.metrics import per_experience
from clplat.metrics.cost import step_flops
from clplat.metrics.record import RunRecord
from clplat.metrics.representation import gradient_norm
from clplat.run import checkpoint, measurement, online
from clplat.run.evaluation import Evaluator, renew_means
from clplat.run.interaction import PAUSE, play
from clplat.run.progress import Progress
from clplat.run.runlog import RunLog
from clplat.run.schedule import rate_factor
from clplat.run.snapshot import snapshot
from clplat.strategy import Strategy
from clplat.stream import Data, Experience, Kind, Stream

FLUSH_STEPS = 50  # losses are read from the device, checked and logged once per so many steps
_END: Any = object()
MEASURED_STEP = 1  # the step of an experience whose FLOPs are counted: the second, when memories hold something


class Runner:
    """Runs one strategy over one stream.

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
        self.optimizer: Any = None
        self.ledger = Ledger(self.stream)
        self.strategy = strategy.to(fabric.device)
        strategy._prepare, strategy.rank, strategy.world_size = stream.prepare, self.rank, self.world_size
        shared: dict[str, Any] = {"device": fabric.device, "batch_size": loop.eval_batch_size, "rank": self.rank}
        shared |= {"world_size": self.world_size, "valid": loop.evaluate_on == "valid"}
        self.evaluate = Evaluator(stream, **shared)
        self.evaluate_inside = (
            Evaluator(stream, **shared, limit=loop.eval_samples) if loop.eval_every else self.evaluate
        )
        self.progress, self.audit = Progress(), AuditSettings(enabled=False)
        self.stop_requested = False
        self.resumed: dict[str, Any] | None = None  # {"optimizer", "learning_rates"} of the experience gone on with
        self.losses: list[Tensor] = []
        self.gradient_norms: list[float] = []
        self.online = {"correct": 0.0, "seen": 0}
        self.returns: dict[str, Any] = {}
        self.may_save = True  # not within an episode: an environment can't be saved
        self.saves, self.saved_at = 0, time.monotonic()
        self.flops_per_step = 0.0
        self.spent = {"train_seconds": 0.0, "eval_seconds": 0.0, "train_flops": 0.0, "samples": 0.0}
        self.window, self.boundary = 1, True  # batches of the current optimizer step, and whether this is its last

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """From where progress stands to the end of the stream.

        Raises:
            Interrupted: `stop_requested` was set; a checkpoint has been written.
            DivergedError: a loss was not finite; the last good checkpoint stands.
        """
        if not self.progress.measured_first_row:
            self.record.matrix.append(self._evaluate())
            self.progress.measured_first_row = True
        last = min(len(self.stream), self.loop.stop_after or len(self.stream))
        while self.progress.experience < last:
            experience = self.stream[self.progress.experience]
            if not self.progress.trained:
                self._train(experience)
                self.save()
            self._finish(experience)
            self.save()

    def _train(self, experience: Experience) -> None:
        p, seen = self.progress, experience.seen()
        if not p.begun:
            self.ledger.open(p.experience, self.record.ledger, self.log.ledger)  # refuses before anything is done
        audit.before(self, experience)
        started = time.perf_counter()
        if not p.begun:
            self.strategy.train()
            self.strategy.grow(seen)
            self.strategy.to(self.fabric.device)
            self.strategy.begin(seen)
            p.begun = True
        self.log.describe(experience)
        self._setup_optimizer()
        turns = self._turns(experience, seen)
        while self._turn(turns):
            self.spent["train_seconds"] += time.perf_counter() - started
            self._between_steps(experience)
            started = time.perf_counter()
        self._flush(experience)
        self.strategy.end(seen)
        if experience.kind is Kind.LEARN and hasattr(getattr(self.strategy.model, "head", None), "renew"):
            with self.fabric.autocast():
                renew_means(self.strategy, self.strategy.training_data(seen), self.loop.eval_batch_size)
        self.spent["train_seconds"] += time.perf_counter() - started
        self.spent["train_flops"] += self.flops_per_step * p.steps * self.loop.accumulate
        self.ledger.close(self.record.ledger, self.spent["train_seconds"], self.log.ledger)
        p.trained = True

    def _turn(self, turns: Iterator[Tensor | None]) -> bool:
        """One turn and its step; False after the last. The FLOPs of one step of each experience are counted."""
        if self.progress.steps == MEASURED_STEP and not self.flops_per_step:
            self.flops_per_step = -1.0  # so that the call below takes the other branch
            more: list[bool] = []
            self.flops_per_step = float(step_flops(lambda: more.append(self._turn(turns))))
            return more[0]
        loss = next(turns, _END)
        if loss is _END:
            return False
        if loss is not PAUSE:
            self._update(loss)
        return True

    def _finish(self, experience: Experience) -> None:
        """Measure everything after an experience and move on to the next."""
        p, record = self.progress, self.record
        record.matrix.append(self._evaluate())
        if experience.kind is Kind.ADAPT:
            record.online.append({"experience": experience.index, **self._all_processes(self.online)})
        if experience.kind is Kind.INTERACT:
            record.returns.append(self.returns)
        health = measurement.health(self.strategy, self.stream, experience) if self.loop.representation else {}
        norms = self.gradient_norms
        record.representation.append(health | {"gradient_norm": sum(norms) / len(norms) if norms else None})
        record.cost |= measurement.cost(self.strategy, self.fabric.device, self.spent, self.world_size)
        spent = {f"cost/{k}": v for k, v in record.cost.items() if v is not None}
        own = {f"strategy/{name}": value for name, value in self.strategy.measurements().items()}
        own |= audit.after(self, experience)
        self.log.experience(p.experience + 1, per_experience(record) | spent | own)
        self.progress = Progress(p.experience + 1, total_steps=p.total_steps, measured_first_row=True)
        self.online, self.returns, self.gradient_norms = {"correct": 0.0, "seen": 0}, {}, []
        self.flops_per_step = 0.0

    # --- turns: what each kind does before a gradient step ------------------------------------------------------------

    def _turns(self, experience: Experience, seen: Experience) -> Iterator[Tensor | None]:
        """A loss for each step to take, or None for a turn that takes no gradient step."""
        match experience.kind:
            case Kind.LEARN:
                yield from self._supervised(experience, self.strategy.training_data(seen), "training_step")
            case Kind.FORGET:
                yield from self._supervised(experience, self.strategy.training_data(seen), "forget_step")
            case Kind.ADAPT:
                yield from self._adapt(experience)
            case Kind.INTERACT:
                if seen.train is not None:
                    yield from self._supervised(experience, seen.train, "training_step")
                yield from play(self, experience)

    def _supervised(self, experience: Experience, data: Data, hook: str) -> Iterator[Tensor | None]:
        p, loop, step = self.progress, self.loop, self.hook(hook)
        batches = batches_per_epoch(len(data), loop.batch_size, self.world_size)
        self.steps_planned = self._gradient_steps(len(data), experience.kind)
        while p.epoch < loop.epochs(experience.kind) and not self._enough():
            order = epoch_order(len(data), self.seed, p.experience, p.epoch, data.inputs.device)
            order = self.stream.arrange(data, order, loop.batch_size * self.world_size)
            while p.batch < batches and not self._enough():
                raw, labels = self._batch(data, order)
                self.window = min(loop.accumulate, batches - p.batch // loop.accumulate * loop.accumulate)
                self.boundary = (p.batch + 1) % loop.accumulate == 0 or p.batch + 1 == batches
                yield step((self.strategy.prepare(raw), labels), p.batch)
            p.epoch, p.batch = p.epoch + 1, 0

    def _adapt(self, experience: Experience) -> Iterator[Tensor | None]:
        """Predictions are made and scored by labels that the strategy never holds, then the loss is stepped on."""
        data, p, step = experience.train, self.progress, self.hook("adapt_step")
        assert data is not None
        order = torch.arange(len(data), device=data.inputs.device)
        self.window, self.boundary = 1, True
        for _ in range(p.batch, batches_per_epoch(len(data), self.loop.batch_size, self.world_size)):
            raw, labels = self._batch(data, order)
            out = step(self.stream.prepare(raw, False))
            predictions, loss = out if isinstance(out, tuple) else (out, None)
            if labels is not None:
                scores = self.stream.score(predictions.detach(), labels)
                online.count(self.online, data, self.strategy.rows, scores)
            yield loss

    def hook(self, name: str) -> Callable[..., Any]:
        """A hook of the strategy, called through DDP's wrapper where there is one, in the precision asked for.

        Fabric's own wrapper enters the precision only where the strategy is wrapped once more, by DDP, say.
        """
        method = getattr(self.module, name)

        def in_precision(*args: Any) -> Any:
            with self.fabric.autocast():
                return method(*args)

        return in_precision

    def _batch(self, data: Data, order: Tensor) -> tuple[Tensor, Tensor | None]:
        """This process's part of the coming batch; sets what a strategy may ask about it."""
        positions, whole = local_slice(order, self.progress.batch, self.loop.batch_size, self.rank, self.world_size)
        raw, labels = data.batch(positions)
        attributes = self.strategy.__dict__  # past nn.Module's slow attribute machinery
        attributes["raw"], attributes["global_batch"] = raw, whole
        attributes["rows"] = positions if data.rows is None else data.rows[positions]
        self.spent["samples"] += whole
        return raw, labels

    def _enough(self) -> bool:
        return self.loop.max_steps is not None and self.progress.steps >= self.loop.max_steps

    def total_steps(self, experience: Experience) -> int:
        """Steps that an experience will take, as far as its own data tell."""
        size = len(experience.train) if experience.train is not None else 0
        if experience.kind is Kind.ADAPT:
            return batches_per_epoch(size, self.loop.batch_size, self.world_size)
        return self._gradient_steps(size, experience.kind) + experience.env_steps

    def _gradient_steps(self, size: int, kind: Kind) -> int:
        """Optimizer steps over `size` samples: epochs of accumulated batches, within the bound on steps."""
        loop = self.loop
        batches = batches_per_epoch(size, loop.batch_size, self.world_size)
        steps = -(-batches // loop.accumulate) * loop.epochs(kind)
        return steps if loop.max_steps is None else min(steps, loop.max_steps)

    # --- a step -------------------------------------------------------------------------------------------------------

    def _setup_optimizer(self) -> None:
        """A new optimizer over what is trainable now; the module is wrapped anew, since it may have grown."""
        trainable = [q for q in self.strategy.parameters() if q.requires_grad]
        self.steps_planned = self.total_steps(self.stream[self.progress.experience])
        held = [] if self.optimizer is None else [q for g in self.optimizer.param_groups for q in g["params"]]
        if held and self.carried(self.progress.experience) and list(map(id, held)) == list(map(id, trainable)):
            return
        if not trainable:  # gradient-free learners: nothing to wrap, nothing to step
            self.module, self.optimizer = self.strategy, None
            return
        module, optimizer = self.fabric.setup(self.strategy, self.strategy.configure_optimizers())
        for hook in ("forget_step", "adapt_step"):
            if hasattr(self.strategy, hook):
                module.mark_forward_method(hook)
        self.module, self.optimizer = module, optimizer
        self.base_lrs = [g["lr"] for g in optimizer.param_groups]
        if self.resumed is not None:
            optimizer.load_state_dict(self.resumed["optimizer"])
            self.base_lrs, self.resumed = self.resumed["learning_rates"], None

    def carried(self, index: int) -> bool:
        """Whether the optimizer goes on into experience `index`: test data are one stream, its pieces unannounced; and
        where the strategy says so, through environments and into what starts from the run."""
        kinds = [e.kind for e in self.stream.experiences[max(0, index - 1) : index + 1]]
        return kinds == [Kind.ADAPT] * 2 or (self.strategy.carries_optimizer and set(kinds) == {Kind.INTERACT})

    def _update(self, loss: Tensor | None) -> None:
        """Backward and, at an accumulation boundary, one optimizer step."""
        p, strategy = self.progress, self.strategy
        p.batch += 1
        if loss is None or self.optimizer is None:
            p.steps, p.total_steps = p.steps + 1, p.total_steps + 1
            return
        self.losses.append(loss.detach())
        self.fabric.backward(loss if self.window == 1 else loss / self.window)
        strategy.on_after_backward()
        if not self.boundary:
            return
        if p.steps % FLUSH_STEPS == 0:
            self.gradient_norms.append(float(gradient_norm(strategy.parameters())))
        if self.loop.clip_norm is not None:
            self.fabric.clip_gradients(self.module, self.optimizer, max_norm=self.loop.clip_norm)
        if strategy.schedule != "constant" or strategy.warmup:
            factor = rate_factor(p.steps, self.steps_planned, strategy.schedule, strategy.warmup)
            for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                group["lr"] = lr * factor
        strategy.on_before_optimizer_step(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        p.steps, p.total_steps = p.steps + 1, p.total_steps + 1
        strategy.after_step()

    def _between_steps(self, experience: Experience) -> None:
        """All that happens after a step and is not the step."""
        p, loop = self.progress, self.loop
        self.log.advance(p)
        if p.total_steps == 1:
            self.record.cost.setdefault("first_step_seconds", self.log.age())
            self.log.start_tracking()
        due = not self.losses and self.online["seen"] and p.steps % FLUSH_STEPS == 0
        if len(self.losses) >= FLUSH_STEPS or due:
            self._flush(experience)
        if not self.boundary:
            return
        if loop.eval_every and p.steps % loop.eval_every == 0:
            self._evaluate_inside(experience)
        stopping = self.fabric.broadcast(self.stop_requested) if self.world_size > 1 else self.stop_requested
        if self.may_save and (stopping or self._due()):
            self._flush(experience)
            self.save()
        if stopping:
            raise Interrupted(f"stopped in experience {p.experience} ({experience.name}) after step {p.steps}")

    def _due(self) -> bool:
        loop, p = self.loop, self.progress
        due = bool(loop.checkpoint_every and p.steps % loop.checkpoint_every == 0)
        due |= bool(loop.checkpoint_seconds and time.monotonic() - self.saved_at >= loop.checkpoint_seconds)
        return bool(self.fabric.broadcast(due)) if self.world_size > 1 and loop.checkpoint_seconds else due

    def _flush(self, experience: Experience) -> None:
        """Read losses from the device, refuse those that are not finite, log their mean."""
        metrics = online.running_error(self.record.online, self.online)
        if not self.losses:
            if metrics:
                self.log.step(self.progress.total_steps, metrics)
            return
        values, self.losses = torch.stack(self.losses).float().cpu(), []
        finite = values.isfinite()
        if self.world_size > 1:  # all processes must stop together
            torch.distributed.all_reduce(every := finite.int(), torch.distributed.ReduceOp.MIN)
            finite = every.bool()
        if not finite.all():
            first = int(finite.int().argmin())
            step = self.progress.steps - (len(values) - first) // self.window + 1
            raise DivergedError(
                f"loss is {values[first].item()} in experience {experience.index} ({experience.name}) at step {step}; "
                "the last good checkpoint is kept (try a smaller strategy.lr, or set loop.clip_norm)"
            )
        metrics["train/loss"] = values.mean().item()
        if self.optimizer is not None:
            metrics["train/lr"] = self.optimizer.param_groups[0]["lr"]
        if self.gradient_norms:
            metrics["train/gradient_norm"] = self.gradient_norms[-1]
        self.log.step(self.progress.total_steps, metrics)

    # --- measurements -------------------------------------------------------------------------------------------------

    def _evaluate(self) -> list[float | None]:
        started = time.perf_counter()
        with self.fabric.autocast():
            row = self.evaluate(self.strategy)
        self.spent["eval_seconds"] += time.perf_counter() - started
        return row

    def _evaluate_inside(self, experience: Experience) -> None:
        """Evaluation between steps, for anytime accuracy and the stability gap."""
        started, p = time.perf_counter(), self.progress
        with self.fabric.autocast():
            scores = self.evaluate_inside(self.strategy)
        self.spent["eval_seconds"] += time.perf_counter() - started
        self.record.anytime.append({"step": p.total_steps, "experience": experience.index, "scores": scores})
        seen = [s for s in scores[: experience.index + 1] if s is not None]
        named = {f"anytime/{self.stream[j].name}": s for j, s in enumerate(scores) if s is not None}
        self.log.step(p.total_steps, named | ({"anytime/accuracy": sum(seen) / len(seen)} if seen else {}))

    def _all_processes(self, counts: dict[str, float]) -> dict[str, float]:
        if self.world_size == 1:
            return dict(counts)
        total = torch.tensor(list(counts.values()), dtype=torch.float64, device=self.fabric.device)
        torch.distributed.all_reduce(total)
        return dict(zip(counts, total.tolist(), strict=True))

    def save(self) -> None:
        """Write a checkpoint from process 0; a collective call under DDP."""
        state = snapshot(self)
        if self.rank == 0 and self.log.run_dir is not None:
            checkpoint.save(self.log.run_dir / "checkpoints", self.saves, state)
        self.saves, self.saved_at = self.saves + 1, time.monotonic()
