"""A training step of each strategy that adapts a frozen backbone, next to plain peft LoRA of the same rank.

DeiT-tiny with 4 blocks (192 features; 65 tokens of a 32x32 image), batch 16, AdamW, no dropout; LoRA by hand is peft's
layers, cross-entropy and one optimizer. Both take the same batch in turn, `STEPS` steps a time; times are the
processor's, which neighbours on a shared machine disturb least. Sizes are counted, not timed: what one more task adds
to the state, next to the number of factors that the papers' formulas give.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Row, paired

BATCH, STEPS, DEPTH, CLASSES = 16, 2, 4, 10
Step = Callable[[], None]


def classifier() -> Any:
    """The model, always with the same weights."""
    from clplat.backbones.base import Classifier
    from clplat.backbones.heads import Linear
    from clplat.backbones.vit import vit_tiny

    torch.manual_seed(0)
    return Classifier(vit_tiny((3, 32, 32), depth=DEPTH), Linear(192, CLASSES))


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator)
    return images, torch.randint(CLASSES, (BATCH,), generator=generator)


def layers(model: Any, where: str) -> dict[str, Any]:
    """Layers that are adapted, by name."""
    roles = ("attention", "ffn") if where == "both" else (where,)
    return {name: layer for role in roles for name, layer in model.backbone.layers(role).items()}


def by_hand(where: str, rank: int, replay: bool = False) -> Step:
    """A step of peft LoRA. With `replay` it takes the passes of I-LoRA too: one more step's, and one without gradient
    whose outputs of the blocks are compared."""
    from peft import LoraConfig, inject_adapter_in_model

    model = classifier()
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers(model, where)))
    inject_adapter_in_model(config, model.backbone)
    model.head.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    (x, y), (mx, my) = batch(), batch(1)
    states: list[Tensor] = []
    for block in model.backbone.blocks if replay else ():
        block.register_forward_hook(lambda module, inputs, output: states.append(output))

    def step() -> None:
        loss = F.cross_entropy(model(x), y)
        if replay:
            states.clear()
            loss = (loss + F.cross_entropy(model(mx), my)) / 2
            with torch.no_grad():
                model(mx)
            pairs = zip(states[:DEPTH], states[DEPTH:], strict=True)
            loss = loss + sum(F.mse_loss(p, s) for p, s in pairs) / (DEPTH + 1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def learner(name: str, tasks: int, **options: Any) -> Any:
    """A strategy in its `tasks`-th task."""
    from clplat import Data, Experience, Kind
    from clplat.config import discovery

    strategy = discovery.load("strategies", name)(model=classifier(), optimizer="adamw", **options)
    data = Data(*batch())
    for task in range(tasks):
        experience = Experience(task, f"task {task}", Kind.LEARN, data, classes=tuple(range(CLASSES)), task=task)
        strategy.train()
        strategy.grow(experience)
        strategy.begin(experience)
        if task + 1 < tasks:
            strategy.end(experience)
    return strategy


def stepping(strategy: Any) -> Step:
    """A step of a strategy."""
    optimizer = strategy.configure_optimizers()
    (x, y), (mx, my) = batch(), batch(1)
    strategy.raw, strategy.global_batch = x, BATCH
    if getattr(strategy, "memory", None) is not None:
        strategy.memory.add(mx, my)

    def step() -> None:
        strategy.training_step((x, y), 0).backward()
        strategy.on_after_backward()
        optimizer.step()
        optimizer.zero_grad()
        strategy.after_step()

    return step


def milliseconds(step: Step, times: int = STEPS) -> float:
    """Of the processor, for one of `times` calls."""
    started = time.process_time()
    for _ in range(times):
        step()
    return 1000 * (time.process_time() - started) / times


def compare(name: str, ours: Step, base: Step, limit: float | None, quick: bool, note: str = "") -> Row:
    """Both in turn."""
    found: tuple[list[float], list[float]] = ([], [])
    for round_ in range(2 if quick else 16):
        first, second = (base, ours) if round_ % 2 else (ours, base)
        times = milliseconds(first), milliseconds(second)
        if round_ or quick:  # the first round sets up
            for side, value in zip(found, times[::-1] if round_ % 2 else times, strict=True):
                side.append(value)
    return paired(name, "ms", *found, "ratio", limit, note)


def decomposition(quick: bool) -> Row:
    """What SVD-orthogonal does once a task: the SVD of all layers, and the merge, next to one step."""
    strategy = learner("svd_orthogonal", 2)
    step = stepping(strategy)

    def once() -> None:
        for layer in strategy.layers:
            layer.merge()
            layer.split(153)

    times = [(milliseconds(once, 1), milliseconds(step, 1)) for _ in range(1 if quick else 5)]
    ours, base = (list(side) for side in zip(*times, strict=True))
    return paired("svd_orthogonal, once a task, over one of its steps", "ms", ours, base, "ratio")


def sizes() -> list[Row]:
    """Kilobytes that one more task adds to a strategy's state, over the numbers of its formula."""
    found = []
    shapes = [layer.weight.shape for layer in layers(classifier(), "both").values()]  # (o, d) each
    attention = [layer.weight.shape for layer in layers(classifier(), "attention").values()]

    def kept(name: str, tasks: int, **options: Any) -> int:
        strategy = learner(name, tasks, **options)
        return sum(p.numel() for p in strategy.parameters())

    low, high = 192 - 153, 153
    formulas = {
        "lora": (0, 0, {"projections": [], "rank": 8}),
        "olora": (sum(8 * (o + d) for o, d in attention), 0, {"projections": [], "rank": 8}),
        "moram": (sum(16 * (o + d) for o, d in shapes), 0, {}),
        "ilora": (0, 0, {"memory": 0}),
        # While a task is learned: U_l, S_l, V_l, and the smaller basis of a side of r, or U_h of a longer one.
        "svd_orthogonal": (
            sum(low * (o + d + 1) + sum(n * (low if n == 192 else high) for n in (o, d)) for o, d in shapes),
            1,
            {"ranks": "constant", "target_retention": 153.1 / 192},
        ),
    }
    for name, (numbers, first, options) in formulas.items():
        added = kept(name, 2, **options) - kept(name, 1, **options)
        note = "in the state while it learns; nothing between tasks" if first else "per task"
        pairs = [1.0 if added == numbers else float("inf") if not numbers else added / numbers]
        found.append(Row(f"size, {name}", "kB", added * 4 / 1e3, numbers * 4 / 1e3, "ratio", pairs, 1.0, note))
    return found


def rows(quick: bool = False) -> list[Row]:
    """One row for each strategy and number of tasks."""
    plain: dict[str, Any] = {"dropout": 0.0, "projections": []}
    eight = by_hand("attention", 8)
    found = [compare("lora over peft by hand", stepping(learner("lora", 1, **plain)), eight, None, quick)]
    for tasks in (1, 5):
        name = f"olora, task {tasks}, over peft LoRA of rank 8"
        found.append(compare(name, stepping(learner("olora", tasks, **plain)), eight, None, quick))
    for tasks in (1, 2, 5):
        rank, limit = 16 * tasks, 1.3
        name = f"moram, task {tasks}, over peft LoRA of rank {rank}"
        found.append(compare(name, stepping(learner("moram", tasks)), by_hand("both", rank), limit, quick))
    for share, rank in ((0.8, 39), (0.5, 96)):
        strategy = learner("svd_orthogonal", 2, ranks="constant", target_retention=share)
        name = f"svd_orthogonal, {share:.0%} kept, over peft LoRA of rank {rank}"
        found.append(compare(name, stepping(strategy), by_hand("both", rank), 1.15, quick))
    found.append(decomposition(quick))
    slow = stepping(learner("ilora", 2, memory=BATCH, **plain))
    found.append(compare("ilora, task 2, over peft LoRA of rank 8", slow, eight, None, quick))
    passes = by_hand("attention", 8, replay=True)
    found.append(compare("ilora, task 2, over a loop with its passes", slow, passes, 1.1, quick))
    return found + sizes()
