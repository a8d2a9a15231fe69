"""What the strategies that generate a target network's weights have in common: the loss, the regulariser, inference.

    loss of task t = CE(f(x; ω_t), y) + β · (1/m) Σ_j Σ_i F_ji (ω*_ji − h(e_j; θ + Δθ)_i)²,    ω_t = h(e_t; θ)

j runs over the m tasks met before (or a random part of them), ω*_j is h(e_j; θ) as it was before task t, F is 1 or an
importance, and Δθ is 0 or, with lookahead, the step that the optimizer would take from the first term alone.
"""

from __future__ import annotations

import copy
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat import Experience, Kind, Strategy, require
from clplat.backbones.base import Classifier, Role
from clplat.backbones.heads import Growing
from clplat.components.ema import Frozen
from clplat.components.generated import GeneratedClassifier, Target
from clplat.components.hypernetwork import Generator, factored_change, output_change
from clplat.components.lookahead import simulated_step
from clplat.components.memory import ClassBalanced


def least_entropy(logits: Tensor) -> Tensor:
    """For each sample the task whose prediction is surest, (B,) int64, from logits (T, B, C); -inf: no such class.

    By log_softmax: the logarithm of a softmax that underflows to 0 would make the entropy NaN, which argmin may take.
    """
    logs = logits.log_softmax(2)
    return torch.where(logs.isneginf(), 0.0, -logs.exp() * logs).sum(2).argmin(0)


class Hypernet(Strategy):
    """Common part of the strategies that generate weights. A subclass passes a generator to `_generate`.

    Args:
        beta: β ≥ 0, weight of the regulariser, a sum over all weights, so that it does not carry over between targets
            of different size; 0 trains the generator in sequence without any.
        lookahead: regularise at θ + Δθ, by a second backward pass, instead of at θ.
        held_outputs: factors: of the ω*_j only the generator's last layer and its inputs are kept, and ω is compared
            by them, at a cost that hardly grows with t (the same numbers but for rounding). stored: the ω*_j are
            computed once a task and kept, (t − 1) |ω| numbers. recomputed: they are made again in each step.
        sampled_tasks: old tasks, drawn anew in each step, that the regulariser runs over, ≥ 1; null takes all.
        own_rows: hold only the head's rows of a task's own classes.
        embedding: E ≥ 1, numbers of a task's embedding.
        rank: 0 generates every trainable parameter of the model; r > 0 freezes the backbone and generates the head,
            and adapters of rank r for the linear layers of `role`.
        role: of the layers that get adapters; has no effect with rank 0.
        infer: how the task is found where it is not given. entropy: the task that predicts with least entropy.
            network: a copy of the backbone that learns to tell tasks apart, from samples in a memory.
        memory: samples kept for that network, ≥ 1; has no effect otherwise.
        replay_batch: of these, in each step, ≥ 1.
        optimizer: sgd, adam or adamw; made anew for each experience. The authors train with Adam throughout.
        lr: learning rate, > 0; generated weights diverge at the rates that suit weights trained directly.
    """

    kinds = frozenset({Kind.LEARN})
    model: GeneratedClassifier
    held: Tensor

    def __init__(
        self,
        *,
        model: Classifier,
        beta: float = 0.01,
        lookahead: bool = False,
        held_outputs: Literal["factors", "stored", "recomputed"] = "factors",
        sampled_tasks: int | None = None,
        own_rows: bool = False,
        embedding: int = 32,
        rank: int = 0,
        role: Role = "attention",
        infer: Literal["entropy", "network"] = "entropy",
        memory: int = 500,
        replay_batch: int = 32,
        optimizer: Literal["sgd", "adam", "adamw"] = "adam",
        lr: float = 1e-3,
        **base,
    ):
        super().__init__(model=model, optimizer=optimizer, lr=lr, **base)
        require("beta", beta, beta >= 0, "≥ 0")
        ways = ("stored", "recomputed") if own_rows else ("factors", "stored", "recomputed")
        require("held_outputs", held_outputs, held_outputs in ways, f"{', '.join(ways)}" + " with own_rows" * own_rows)
        require("sampled_tasks", sampled_tasks, sampled_tasks is None or sampled_tasks >= 1, "≥ 1, or null")
        require("embedding", embedding, embedding >= 1, "≥ 1")
        require("rank", rank, rank >= 0, "≥ 0")
        require("infer", infer, infer in ("entropy", "network"), "entropy or network")
        require("replay_batch", replay_batch, replay_batch >= 1, "≥ 1")
        self.beta, self.lookahead, self.held_outputs = beta, lookahead, held_outputs
        self.sampled_tasks, self.own_rows, self.embedding = sampled_tasks, own_rows, embedding
        self.replay_batch, self.steps = replay_batch, 0
        self.teller: Classifier | None = None
        if infer == "network":
            backbone = copy.deepcopy(model.backbone)
            self.teller = Classifier(backbone, Growing(backbone.embed_dim, 2**31))  # as many rows as tasks are met
            self.memory = ClassBalanced(memory)  # with tasks for classes
        self.target = Target(model, rank, role)
        self.register_buffer("held", torch.zeros(0, 0))
        self.register_buffer("rows_held", None, persistent=False)  # follow from the classes of the tasks
        self.before: Frozen | None = None
        self._old: list[int] = []  # places of the tasks that are held, from the experiences met

    def _generate(self, generator: Generator) -> None:
        """Take `generator`, of `self.target.size` numbers, as the model's."""
        self.model = GeneratedClassifier(self.target, generator, self.embedding)
        del self.target  # it is the model's now

    # --- life of an experience ------------------------------------------------------------------------------------

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        if self.teller is not None:
            self.teller.grow(Experience(0, "tasks", Kind.LEARN, None, classes=(len(self.model.codes) - 1,)))
        model, now = self.model, self.model.current
        # Parts of the generator below the present level are frozen, so that tasks made by them can't change.
        self._old = [s for s, level in enumerate(model.levels) if s != now and level == model.levels[now]]
        if not self.beta or not self._old:
            self.held, self.before = self.held.new_zeros(0, 0), None
            return
        if self.held_outputs == "stored":
            self.held = self.held.new_zeros(len(self._old), model.generator.width)
        else:
            self.before = Frozen(model.generator)
        if self.own_rows:
            rows = model.target.own_rows(model.classes[self._old])
            self.rows_held = F.pad(rows, (0, model.generator.width - model.target.size), value=1.0)

    def begin(self, experience: Experience) -> None:
        if len(self.held):
            # With gradients on, as in the steps: torch has other kernels without, and R would not start at exactly 0.
            self.held.copy_(self.model.generator.outputs(*self.model.tasks(self._old)).detach())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        loss = self.mean(F.cross_entropy(self.model(x), y, reduction="none"))
        if self.beta and self._old and not self.lookahead:
            loss = loss + self.beta * self._change()
        if self.teller is not None:
            loss = loss + self._tell_apart(x)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """With lookahead: add the regulariser's gradient at θ + Δθ. Every process computes it whole."""
        if not (self.lookahead and self.beta and self._old):
            return
        theta = [p for p in self.model.generator.parameters() if p.requires_grad]
        changes, before = simulated_step(optimizer, theta), [p.detach().clone() for p in theta]
        with torch.no_grad():
            for p, change in zip(theta, changes, strict=True):
                p.add_(change)
        gradients = torch.autograd.grad(self.beta * self._change(), theta, allow_unused=True)
        with torch.no_grad():
            for p, start, gradient in zip(theta, before, gradients, strict=True):
                p.copy_(start)
                if gradient is not None:
                    p.grad = gradient if p.grad is None else p.grad + gradient

    def after_step(self) -> None:
        self.steps += 1

    @torch.no_grad()
    def end(self, experience: Experience) -> None:
        """Processes see other batches, and so keep other statistics of them: take the mean."""
        if self.world_size > 1:
            for value in self.model.statistics[self.model.current].buffers():
                if value.is_floating_point():
                    torch.distributed.all_reduce(value)
                    value /= self.world_size

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        model = self.model
        if task is not None or len(model.codes) < 2:
            return model(inputs, task)
        if self.teller is None:
            logits = torch.stack([model.of_slot(inputs, s) for s in range(len(model.codes))])  # (T, B, C)
            return logits[least_entropy(logits), torch.arange(len(inputs), device=inputs.device)]
        chosen, found = self.teller(inputs).argmax(1), inputs.new_empty(len(inputs), model.target.classes)
        for slot in chosen.unique().tolist():
            found[chosen == slot] = model.of_slot(inputs[chosen == slot], slot).to(found.dtype)
        return found

    def measurements(self) -> dict[str, float]:
        return {"compression": self.model.compression}

    def get_extra_state(self) -> int:
        return self.steps

    def set_extra_state(self, state: int) -> None:
        self.steps = state

    # --- parts ----------------------------------------------------------------------------------------------------

    def _change(self) -> Tensor:
        """Mean over the old tasks, or those drawn in this step, of how far their outputs have moved; a scalar."""
        rows = self._drawn()
        slots = [self._old[r] for r in rows]
        tasks, now = self.model.tasks(slots), self.model.generator
        before = None if self.before is None else cast(Generator, self.before.model)
        if before is not None and self.held_outputs == "factors":
            with torch.no_grad():
                factors = before.factors(*tasks)
            return factored_change(now.factors(*tasks), factors, now.size)
        if before is None:
            held = self.held if len(rows) == len(self._old) else self.held[rows]
        else:
            with torch.no_grad():
                held = before.outputs(*tasks)
        return output_change(now.outputs(*tasks), held, self._importance(slots, rows))

    def _drawn(self) -> list[int]:
        """Rows of `held` that this step's regulariser runs over: the same in every process."""
        count = len(self._old)
        if self.sampled_tasks is None or self.sampled_tasks >= count:
            return list(range(count))
        generator = torch.Generator().manual_seed(self.steps)
        return torch.randperm(count, generator=generator)[: self.sampled_tasks].tolist()

    def _importance(self, slots: list[int], rows: list[int]) -> Tensor | None:
        """F (m, width) of these old tasks, or None where all weights count alike."""
        return self.rows_held[rows] if self.own_rows else None

    def _tell_apart(self, inputs: Tensor) -> Tensor:
        """Cross-entropy of the inference network on the batch, which is of this task, and on remembered samples."""
        assert self.teller is not None
        here = torch.full((len(inputs),), self.model.current, device=inputs.device)
        losses = F.cross_entropy(self.teller(inputs), here, reduction="none")
        loss = self.mean(losses)
        if len(self.memory):
            raw, tasks = self.memory.sample(self.replay_batch)
            loss = loss + F.cross_entropy(self.teller(self.prepare(raw)), tasks)
        self.memory.add(self.raw, here)
        return loss
