"""Task-incremental streams: predictions are among the task's classes, and replayed samples their own task's rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import clplat
from clplat.backbones.base import Classifier
from clplat.backbones.heads import Growing, Taskwise
from clplat.backbones.mlp import mlp
from clplat.config.resolve import resolve
from clplat.errors import DivergedError
from clplat.run.build import build
from clplat.strategy import losses
from clplat.stream import Experience, Kind

PLAIN = ("agem", "cumulative", "derpp", "er", "er_ace", "ewc", "gdumb", "gem", "icarl", "joint", "lwf", "mas", "mir",
         "naive", "si")  # fmt: skip
ADAPTED = ("ilora", "lora", "moram", "olora", "svd_orthogonal")


def model_of(head: type) -> Classifier:
    torch.manual_seed(0)
    made = Classifier(mlp((3,), hidden=[5]), head(5, 4)).double()
    for task, classes in enumerate(((0, 1), (2, 3))):
        made.grow(Experience(task, f"task-{task}", Kind.LEARN, train=None, classes=classes, task=task))
    return made


def test_any_head_predicts_among_the_classes_of_the_task() -> None:
    model, x = model_of(Growing), torch.randn(6, 3, dtype=torch.float64)
    free = model.predict(x)
    for task, (own, others) in enumerate((([0, 1], [2, 3]), ([2, 3], [0, 1]))):
        told = model.predict(x, task)
        assert torch.equal(told[:, own], free[:, own])
        assert bool(told[:, others].isneginf().all())
    assert torch.equal(model.predict(x), free)


@pytest.mark.parametrize("strategy", PLAIN)
def test_a_default_head_is_scored_among_the_classes_of_the_task(tmp_path: Path, strategy: str) -> None:
    """Never below the class-incremental score of the very same learner, and above it where tasks are confused."""
    own = {"name": strategy, "lr": 0.02}
    options: dict[str, Any] = {"strategy": own, "backbone": "mlp", "tracking": {"enabled": False},
                               "output": str(tmp_path), "loop": {"max_steps": 20}}  # fmt: skip
    rows = {}
    for scenario in ("class", "task"):
        stream = {"name": "digits", "scenario": scenario}
        rows[scenario] = clplat.run({**options, "stream": stream}, quiet=True).accuracy_matrix[-1]
    assert all(t >= c for t, c in zip(rows["task"], rows["class"], strict=True))
    assert sum(rows["task"]) > sum(rows["class"])


def test_what_predicts_past_its_classifier_is_scored_among_the_classes_of_the_task_too(tmp_path: Path) -> None:
    rows = {}
    for scenario in ("class", "task"):
        stream = {"name": "digits", "scenario": scenario}
        rows[scenario] = clplat.run(
            {"strategy": {"name": "acil", "width": 64}, "stream": stream, "tracking": {"enabled": False},
             "output": str(tmp_path)}, quiet=True).accuracy_matrix[-1]  # fmt: skip
    assert all(t >= c for t, c in zip(rows["task"], rows["class"], strict=True))
    assert sum(rows["task"]) > sum(rows["class"])


def test_a_class_of_several_tasks_is_the_current_tasks() -> None:
    head = Taskwise(5, 4)
    for task, classes in enumerate(((0, 1), (1, 2), (2, 3))):
        head.grow(Experience(task, f"task-{task}", Kind.LEARN, train=None, classes=classes, task=task))
    assert head.tasks_of(torch.tensor([0, 1, 2, 3])).tolist() == [0, 1, 2, 2]
    head.grow(Experience(3, "again", Kind.LEARN, train=None, classes=(1, 2), task=1))
    assert head.tasks_of(torch.tensor([0, 1, 2, 3])).tolist() == [0, 1, 1, 2]


def test_samples_of_several_tasks_go_each_through_its_own_tasks_rows() -> None:
    """The loss of a mixed batch is that of two heads written by hand, and so is its gradient."""
    model, x, y = model_of(Taskwise).train(), torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 3, 3, 0])
    mine = losses(model, x, y)
    head: Any = model.head
    features = model.features(x)
    logits = [F.linear(features, head.weight[2 * t : 2 * t + 2], head.bias[2 * t : 2 * t + 2]) for t in (0, 1)]
    by_hand = torch.stack([F.cross_entropy(logits[c // 2][i], torch.tensor(c % 2)) for i, c in enumerate(y.tolist())])
    torch.testing.assert_close(mine, by_hand, rtol=0, atol=1e-12)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(mine.sum(), parameters), torch.autograd.grad(by_hand.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_replayed_sample_moves_only_the_rows_of_its_task() -> None:
    model = model_of(Taskwise).train()
    losses(model, torch.randn(2, 3, dtype=torch.float64), torch.tensor([0, 1])).sum().backward()
    head: Any = model.head
    assert head.current == 1
    assert bool(head.weight.grad[:2].any())
    assert not bool(head.weight.grad[2:].any())


@pytest.mark.parametrize("strategy", [*PLAIN, *ADAPTED])
def test_runs_task_incremental_with_rows_for_each_task(tmp_path: Path, strategy: str) -> None:
    backbone = {"name": "vit_micro"} if strategy in ADAPTED else {"name": "mlp", "hidden": [32]}
    own = {"name": strategy} | ({"memory": 50} if strategy == "ilora" else {})
    config = {"strategy": own, "backbone": backbone, "head": "taskwise", "tracking": {"enabled": False},
              "stream": {"name": "digits", "scenario": "task", "train_per_class": 20, "test_per_class": 10},
              "output": str(tmp_path), "loop": {"max_steps": 4, "stop_after": 3}}  # fmt: skip
    result = clplat.run(config, quiet=True)
    assert result.status == "complete"
    learner = clplat.load(result.run_dir)
    stream, _ = build(resolve(config=result.run_dir / "config.yaml"))
    x, y = stream[1].test.all()
    with torch.no_grad():
        right = (learner.predict(stream.prepare(x, False), 1).argmax(1) == y).double().mean()
    assert float(right) == pytest.approx(result.accuracy_matrix[-1][1])


REPLAY = """
import torch
from torch.nn import functional as F
from clplat import Kind, Strategy
from clplat.components.memory import Reservoir


class Mine(Strategy):
    '''Replay by a third party.'''

    kinds = frozenset({Kind.LEARN})
    paper = "none"
    replays = True

    def __init__(self, **base):
        super().__init__(**base)
        self.memory = Reservoir(50)

    def training_step(self, batch, batch_idx):
        x, y = batch
        new = y
        if len(self.memory):
            mx, my = self.memory.sample(8)
            x, y = torch.cat([x, self.prepare(mx)]), torch.cat([y, my])
        loss = LOSS
        self.memory.add(self.raw, new)
        return loss
"""


def third_party(tmp_path: Path, loss: str, head: str = "taskwise") -> Any:
    (tmp_path / "mine.py").write_text(REPLAY.replace("LOSS", loss))
    stream = {"name": "digits", "scenario": "task", "train_per_class": 20}
    return clplat.run(
        {"strategy": f"{tmp_path / 'mine.py'}:Mine", "backbone": "mlp", "head": head, "stream": stream,
         "tracking": {"enabled": False}, "output": str(tmp_path), "loop": {"max_steps": 3, "stop_after": 2}},
        quiet=True,
    )  # fmt: skip


def test_a_third_partys_replay_tells_the_task_of_each_sample(tmp_path: Path) -> None:
    assert third_party(tmp_path, "self.mean(self.losses(x, y))").status == "complete"


def test_a_third_partys_replay_that_tells_no_task_is_told_how_to(tmp_path: Path) -> None:
    """Once a batch holds another task's samples, whose classes the current one has not; said in that experience."""
    with pytest.raises(DivergedError, match=r"loss is inf in experience 1 .*Mine .*self\.losses\(x, y\)"):
        third_party(tmp_path, "F.cross_entropy(self.model(x), y)")


@pytest.mark.parametrize(("head", "held", "experience"), [("taskwise", 0, 0), ("growing", 40, 1)])
def test_another_loss_that_diverges_is_not_laid_to_the_head(
    tmp_path: Path, head: str, held: int, experience: int
) -> None:
    loss = f"self.mean(self.losses(x, y)) * (1 if len(self.memory) <= {held} else float('inf'))"
    with pytest.raises(DivergedError, match=rf"experience {experience} .* \(try a smaller strategy\.lr, or set loop"):
        third_party(tmp_path, loss, head)
