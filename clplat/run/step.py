"""The step: an optimizer for what is trainable, backward, and an optimizer step where a batch completes one."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from clplat.components.sums import Sums
from clplat.data.batches import batches_per_epoch
from clplat.errors import UserError
from clplat.metrics.representation import gradient_norm
from clplat.run.schedule import rate_factor
from clplat.run.sharding import average_gradients, parted_moments
from clplat.run.state import RunState
from clplat.strategy import HOOKS
from clplat.stream import Experience, Kind

NORM_STEPS = 50  # the gradient's norm is taken in each of so many steps


def setup_optimizer(run: RunState) -> None:
    """A new optimizer over what is trainable now; the module is wrapped anew, since it may have grown."""
    trainable = [q for q in run.strategy.parameters() if q.requires_grad]
    run.steps_planned = total_steps(run, run.stream[run.progress.experience])
    held = [] if run.optimizer is None else [q for g in run.optimizer.param_groups for q in g["params"]]
    if held and carried(run, run.progress.experience) and list(map(id, held)) == list(map(id, trainable)):
        return
    if not trainable:  # gradient-free learners: nothing to wrap, nothing to step
        run.module, run.optimizer = run.strategy, None
        return
    module, optimizer = run.fabric.setup(run.strategy, run.strategy.configure_optimizers())
    for part in run.strategy.modules():
        if isinstance(part, Sums):  # DDP has given every process the buffers of the first
            part.keep_on_one()
    for hook in ("forget_step", "adapt_step"):
        if hasattr(run.strategy, hook):
            module.mark_forward_method(hook)
    run.module, run.optimizer = module, optimizer
    run.base_lrs = [g["lr"] for g in optimizer.param_groups]
    if run.resumed is not None:
        optimizer.load_state_dict(parted_moments(run.resumed["optimizer"], optimizer))
        run.base_lrs, run.resumed = run.resumed["learning_rates"], None


def carried(run: RunState, index: int) -> bool:
    """Whether the optimizer goes on into experience `index`: test data are one stream, its pieces unannounced; and
    where the strategy says so, through environments and into what starts from the run."""
    kinds = [e.kind for e in run.stream.experiences[max(0, index - 1) : index + 1]]
    return kinds == [Kind.ADAPT] * 2 or (run.strategy.carries_optimizer and set(kinds) == {Kind.INTERACT})


def update(run: RunState, loss: Tensor | None) -> None:
    """Backward and, at an accumulation boundary, one optimizer step."""
    p, strategy = run.progress, run.strategy
    p.batch += 1
    if loss is None or run.optimizer is None:
        p.steps, p.total_steps = p.steps + 1, p.total_steps + 1
        return
    check_loss(run, loss)
    run.losses.append(loss.detach())
    run.fabric.backward(loss if run.share == 1 else loss * run.share)
    strategy.on_after_backward()
    if not run.boundary:
        return
    if run.sharded:
        average_gradients(strategy.parameters(), run.world_size)
    if p.steps % NORM_STEPS == 0:
        run.gradient_norms.append(float(gradient_norm(strategy.parameters())))
    if run.loop.clip_norm is not None:
        run.fabric.clip_gradients(run.module, run.optimizer, max_norm=run.loop.clip_norm)
    if strategy.schedule != "constant" or strategy.warmup:
        factor = rate_factor(p.steps, run.steps_planned, strategy.schedule, strategy.warmup)
        for group, lr in zip(run.optimizer.param_groups, run.base_lrs, strict=True):
            group["lr"] = lr * factor
    optimizer = run.optimizer.optimizer  # as it is, without Fabric's wrapper, whose every attribute is looked up twice
    strategy.on_before_optimizer_step(optimizer)
    merge = run.merging
    if merge is not None:
        merge.before_step(strategy)
    run.fabric.strategy.optimizer_step(optimizer)
    for group in optimizer.param_groups:  # what zero_grad does, without what it asks and records at each step
        for parameter in group["params"]:
            parameter.grad = None
    p.gradient_steps += 1
    p.steps, p.total_steps = p.steps + 1, p.total_steps + 1
    strategy.after_step()
    if merge is not None:
        merge.after_step(strategy)


def check_loss(run: RunState, loss: Any) -> None:
    """Refuse what a hook gives for a loss, and names the hook, where no gradient can be taken of it."""
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
        return
    what = f"a {type(loss).__name__}"
    if isinstance(loss, Tensor):
        what = f"a loss of shape {tuple(loss.shape)}" if loss.numel() != 1 else "a loss without a gradient"
    kind = run.stream[run.progress.experience].kind
    valid = "valid: a tensor of one number, as self.mean(losses) is, or None"
    raise UserError(f"strategy: {place(run, HOOKS[kind][-1])} gives {what} ({valid})")


def place(run: RunState, hook: str) -> str:
    """A hook of the strategy with its file and line."""
    cls, code = type(run.strategy), inspect.unwrap(getattr(type(run.strategy), hook)).__code__
    return f"{cls.__name__}.{hook} ({code.co_filename}, line {code.co_firstlineno})"


def total_steps(run: RunState, experience: Experience) -> int:
    """Steps that an experience will take, as far as its own data tell."""
    size = len(experience.train) if experience.train is not None else 0
    if experience.kind is Kind.ADAPT:
        return batches_per_epoch(size, run.loop.batch_size, run.world_size)
    return gradient_steps(run, size, experience.kind) + run.env_steps(experience)


def gradient_steps(run: RunState, size: int, kind: Kind) -> int:
    """Optimizer steps over `size` samples: epochs of accumulated batches, within the bound on steps."""
    loop = run.loop
    batches = batches_per_epoch(size, loop.batch_size, run.world_size)
    steps = -(-batches // loop.accumulate) * loop.epochs(kind)
    return steps if loop.max_steps is None else min(steps, loop.max_steps)
