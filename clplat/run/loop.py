"""The loop over a stream, written once for all four kinds of experience.

    for experience in stream:
        strategy.grow(experience); strategy.begin(experience)
        for loss in turns(experience):            # learn, forget: batches; adapt: predict first; interact: act, store
            backward; optimizer.step; strategy.after_step
            log; evaluate every n steps; checkpoint; stop if asked
        merge the weights with those of before, where asked to; strategy.end(experience)
        checkpoint; evaluate all test sets in one pass; log; checkpoint

Progress is counted, and saved with every random state and the grown structure, so that a resumed run is the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from clplat.components.state import rng_state, set_rng_state
from clplat.erasure.audit import audit
from clplat.errors import Interrupted, OutOfMemory
from clplat.metrics.cost import step_flops
from clplat.run import budget, filing, general, measuring, saving
from clplat.run.compiling import compile_passes
from clplat.run.evaluation import Stopped, renew_means
from clplat.run.interaction import PAUSE
from clplat.run.progress import Progress
from clplat.run.state import RunState
from clplat.run.step import setup_optimizer, update
from clplat.run.turns import turns
from clplat.run.warmup import warm_up
from clplat.stream import Experience, Kind

_END: Any = object()
MEASURED_STEP = 1  # the step of an experience whose FLOPs are counted: the second, when memories hold something


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed: an accelerator's, Python's, or that of torch on the CPU."""
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "DefaultCPUAllocator" in text or "can't allocate memory" in text or "not enough memory" in text
    )


class Runner(RunState):
    """Runs one strategy over one stream; its arguments are those of `RunState`."""

    counts_flops = True  # of one step of each experience

    def run(self) -> None:
        """From where progress stands to the end of the stream.

        Raises:
            Interrupted: `stop_requested` was set; a checkpoint has been written.
            DivergedError: a loss or a prediction was not finite; the last good checkpoint stands.
            UserError: a checkpoint could not be written; the one before stands.
            OutOfMemory: there was none left; the last checkpoint stands.
        """
        try:
            self._run()
            self.writer.wait()
            filing.let_go(self.strategy)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            p, text = self.progress, " ".join(str(error).split())[:160]
            where = f"experience {p.experience} ({self.stream[p.experience].name}) at step {p.steps}"
            raise OutOfMemory(
                f"out of memory in {where}: lower loop.batch_size (loop.accumulate keeps the step's size) or "
                f"loop.eval_batch_size, or take a smaller backbone; the run can be resumed ({text})"
            ) from error
        finally:
            self.writer.finish()

    def _run(self) -> None:
        cost = self.record.cost
        cost["warmup_seconds"] = float(cost.get("warmup_seconds") or 0.0) + warm_up(self.fabric)
        if not self.progress.measured_first_row:
            try:
                self.record.matrix.append(measuring.row(self, 0))
                general.measure(self)
            except Stopped:
                raise Interrupted("stopped before the first experience, where there is no checkpoint yet") from None
            self.progress.measured_first_row = True
        last = min(len(self.stream), self.loop.stop_after or len(self.stream))
        while self.progress.experience < last:
            experience = self.stream[self.progress.experience]
            if not self.progress.trained:
                self._train(experience)
                self._save_between(experience)
            self._finish(experience)
            self._save_between(experience, ended=self.progress.experience == last)
            if self.watch is not None and self.progress.experience < last and self.watch(self.record):
                self.save()
                self.writer.wait()
                raise Interrupted(f"stopped after experience {experience.index} ({experience.name})")

    def _train(self, experience: Experience) -> None:
        p, seen = self.progress, experience.seen()
        if not p.begun:
            self.ledger.open(p.experience, self.record.ledger, self.log.ledger)  # refuses before anything is done
            self._audit(audit.before, experience)
        started = time.perf_counter()
        if not p.begun:
            self.strategy.train()
            self.strategy.grow(seen)
            self.strategy.to(self.fabric.device)
            if self.merging is not None:
                self.merging.begin(self.strategy)
            self.strategy.begin(seen)
            p.begun = True
        if self.compiled:
            compile_passes(self.strategy.model.backbone)  # type: ignore[arg-type]
        self.log.describe(experience)
        setup_optimizer(self)
        losses = turns(self, experience, seen)
        while self._turn(losses):
            self.spent["train_seconds"] += time.perf_counter() - started
            self._between_steps(experience)
            started = time.perf_counter()
        measuring.flush(self)
        if self.merging is not None:
            self.merging.end(self.strategy)
        self.strategy.end(seen)
        head: Any = getattr(self.strategy.model, "head", None)
        if experience.kind is Kind.FORGET and hasattr(head, "let_go"):
            head.let_go(experience.classes)
        if experience.kind is Kind.LEARN and hasattr(head, "renew"):
            with self.fabric.autocast():
                renew_means(self.strategy, self.strategy.training_data(seen), self.loop.eval_batch_size)
        self.spent["train_seconds"] += time.perf_counter() - started
        self.spent["train_flops"] += self.flops_per_step * p.steps * self.loop.accumulate
        self.ledger.close(self.record.ledger, self.spent["train_seconds"], self.log.ledger)
        p.trained = True

    def _turn(self, losses: Iterator[Tensor | None]) -> bool:
        """One turn and its step; False after the last. The FLOPs of one step of each experience are counted."""
        if self.progress.steps == MEASURED_STEP and self.counts_flops and not self.flops_per_step:
            self.flops_per_step = -1.0  # so that the call below takes the other branch
            more: list[bool] = []
            self.flops_per_step = float(step_flops(lambda: more.append(self._turn(losses))))
            if self.budgeted:  # processes, whose batches may be of other lengths, must stop together
                total = self.all_processes({"flops": self.flops_per_step})["flops"]
                self.flops_per_step = total / self.world_size
                budget.check(self.loop, total, self.stream[self.progress.experience].name)
            return more[0]
        loss = next(losses, _END)
        if loss is _END:
            return False
        if loss is not PAUSE:
            self._update(loss)
        return True

    def _finish(self, experience: Experience) -> None:
        """Measure everything after an experience and move on to the next."""
        p, measured, drawn = self.progress, len(self.record.general), rng_state()
        try:
            general.measure(self)
            found = measuring.measure_experience(self, experience)
        except Stopped:  # the whole evaluation is made anew
            del self.record.general[measured:]
            set_rng_state(drawn)
            self.save()
            self.writer.wait()
            raise Interrupted(f"stopped in experience {p.experience} ({experience.name}), before its scores") from None
        found |= self._audit(audit.after, experience) or {}
        self.log.experience(p.experience + 1, found)
        self.progress = Progress(p.experience + 1, total_steps=p.total_steps, measured_first_row=True)
        self.online, self.returns, self.gradient_norms = {"correct": 0.0, "seen": 0}, {}, []
        self.flops_per_step = 0.0

    def _audit(self, step: Callable[[audit.Subject, Experience], Any], experience: Experience) -> Any:
        """The audit before or after a request; counts as evaluation."""
        if experience.kind is not Kind.FORGET or not self.audit.enabled:
            return None
        started, loop = time.perf_counter(), self.loop
        subject = audit.Subject(
            self.strategy, self.stream, self.audit, loop.evaluate_on, loop.eval_batch_size, self.fabric.device,
            self.fabric.autocast, *self.share_of_tests, self.log.run_dir,
        )  # fmt: skip
        found = step(subject, experience)
        self.spent["eval_seconds"] += time.perf_counter() - started
        return found

    def _between_steps(self, experience: Experience) -> None:
        """All that happens after a step and is not the step."""
        p, loop = self.progress, self.loop
        self.writer.check()
        self.log.advance(p)
        if p.total_steps == 1:
            self.record.cost.setdefault("first_step_seconds", self.log.age())
            self.log.start_tracking()
        due = not self.losses and self.online["seen"] and p.steps % loop.log_every == 0
        if len(self.losses) >= loop.log_every or due:
            measuring.flush(self)
        if not self.boundary:
            return
        evaluated = self.record.anytime[-1]["step"] if self.record.anytime else None  # a pause is no step
        if loop.eval_every and p.steps % loop.eval_every == 0 and evaluated != p.total_steps:
            measuring.evaluate_inside(self, experience)
        stopping = self.fabric.broadcast(self.stop_requested) if self.world_size > 1 else self.stop_requested
        if self.may_save and (stopping or saving.due(self)):
            measuring.check(self)  # no checkpoint of what is not finite; what is to be logged waits, as without one
            self.save()
        if stopping and (self.may_save or self.acting is None or not self.acting.savable):
            self.writer.wait()
            raise Interrupted(f"stopped in experience {p.experience} ({experience.name}) after step {p.steps}")

    def _update(self, loss: Tensor | None) -> None:
        update(self, loss)

    def _save_between(self, experience: Experience, *, ended: bool = False) -> None:
        """A checkpoint where an experience ends, if it is worth its time; always of a request, and of the last."""
        if ended or experience.kind is Kind.FORGET or saving.worth(self):
            self.save()

    def save(self) -> None:
        """Take a checkpoint, written while the run goes on; a collective call under DDP."""
        saving.save(self)
