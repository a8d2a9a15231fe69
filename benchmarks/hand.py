"""The loops that a good engineer would write by hand for the same work, with nothing of clplat's in them.

`python -m benchmarks.hand MODEL METHOD EPOCHS [STORE]` trains in this process; with EPOCHS 0 it says when its first
step was done and stops there. So a fresh process pays for what these loops need, and no more. With an MLflow STORE it
logs the losses of each experience there.

Shapes: n samples of an experience, B of a batch, M replayed, S slots of the reservoir.
"""

from __future__ import annotations

import gzip
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, REPLAY, SLOTS, LR, EXPERIENCES = 32, 32, 500, 0.1, 5
Tick = Callable[[int], object]


def mlp() -> nn.Module:
    """64-400-400-10 with PyTorch's initialisation."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10)
    )


def vit_tiny() -> nn.Module:
    """DeiT-tiny for 8x8 pixels, patches of 2, and a linear layer."""
    from timm.models import create_model

    net = create_model("deit_tiny_patch16_224", num_classes=0, in_chans=1, img_size=8, patch_size=2)
    return nn.Sequential(net, nn.Linear(192, 10))


MODELS = {"mlp": mlp, "vit_tiny": vit_tiny}


def naive(model: nn.Module, x: Tensor, y: Tensor, orders: Iterable[Tensor], tick: Tick) -> list[Tensor]:
    """Train on one experience: x (n, ...), y (n,), one order (n,) per epoch. Returns the loss of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses: list[Tensor] = []
    for order in orders:
        for rows in order.split(BATCH):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            tick(len(losses))
    return losses


class Reservoir:
    """A uniform sample of S of all samples seen (algorithm R), one batch at a time, where the samples are."""

    def __init__(self, sample: Tensor, slots: int = SLOTS, replay: int = REPLAY) -> None:
        self.size, self.replay, self.seen = slots, replay, 0
        self.x = sample.new_empty(slots, *sample.shape)
        self.y = torch.empty(slots, dtype=torch.int64, device=sample.device)

    def add(self, x: Tensor, y: Tensor) -> None:
        last = self.seen + len(y)
        if last <= self.size:
            self.x[self.seen : last], self.y[self.seen : last] = x, y
        else:
            numbers = torch.arange(self.seen, last, device=y.device)
            drawn = (torch.rand(len(y), device=y.device) * (numbers + 1)).long()
            slots = torch.where(numbers < self.size, numbers, drawn)
            kept = (slots < self.size).nonzero().squeeze(1)
            self.x[slots[kept]], self.y[slots[kept]] = x[kept], y[kept]
        self.seen = last

    def sample(self) -> tuple[Tensor, Tensor]:
        slots = torch.randint(min(self.seen, self.size), (self.replay,), device=self.y.device)
        return self.x[slots], self.y[slots]


def er(model: nn.Module, x: Tensor, y: Tensor, orders: Iterable[Tensor], tick: Tick, memory: Reservoir) -> list[Tensor]:
    """The same with M samples of a reservoir in each batch, one joint forward pass."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses: list[Tensor] = []
    for order in orders:
        for rows in order.split(BATCH):
            new_x, new_y = x[rows], y[rows]
            if memory.seen:
                old_x, old_y = memory.sample()
                loss = F.cross_entropy(model(torch.cat([new_x, old_x])), torch.cat([new_y, old_y]))
            else:
                loss = F.cross_entropy(model(new_x), new_y)
            memory.add(new_x, new_y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            tick(len(losses))
    return losses


@torch.no_grad()
def accuracies(model: nn.Module, x: Tensor, y: Tensor, sets: Tensor, batch_size: int) -> list[float]:
    """Accuracy on each of several test sets in one loop over all samples; sets (n,) says which one each belongs to."""
    model.eval()
    right = torch.zeros(int(sets.max()) + 1)
    for start in range(0, len(x), batch_size):
        part = slice(start, start + batch_size)
        right.index_add_(0, sets[part], (model(x[part]).argmax(1) == y[part]).float())
    model.train()
    return (right / torch.bincount(sets)).tolist()


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits, (1797, 1, 8, 8) in [0, 1], and labels, read without importing scikit-learn."""
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    with gzip.open(Path(spec.origin).parent / "datasets/data/digits.csv.gz", "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    return torch.from_numpy(table[:, :-1] / 16).view(-1, 1, 8, 8), torch.from_numpy(table[:, -1].astype(np.int64))


def orders(size: int, epochs: int) -> Iterator[Tensor]:
    """A shuffled order (size,) for each epoch."""
    return (torch.randperm(size) for _ in range(epochs))


def main(model_name: str, method: str, epochs: int, store: str | None = None) -> None:
    def first_step(step: int) -> None:
        if epochs == 0:
            os.write(1, f"{time.monotonic()}\n".encode())
            os._exit(0)

    torch.manual_seed(0)
    x, y = digits()
    model, memory = MODELS[model_name](), Reservoir(x[0])
    log = _mlflow(store) if store else None
    for classes in torch.arange(10).chunk(EXPERIENCES):
        rows = torch.isin(y[:1437], classes).nonzero().squeeze(1)
        now = x[rows], y[rows], orders(len(rows), max(1, epochs)), first_step
        losses = er(model, *now, memory) if method == "er" else naive(model, *now)
        if log is not None:
            log(torch.stack(losses).tolist())
        accuracies(model, x[1437:], y[1437:], y[1437:] // 2, 512)


def _mlflow(store: str) -> Callable[[list[float]], None]:
    """A function that logs losses to a new run."""
    from mlflow.entities import Metric

    from mlflow import MlflowClient

    client = MlflowClient(store)
    run_id = client.create_run(client.create_experiment("hand", artifact_location="unused")).info.run_id

    def log(losses: list[float]) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[Metric("train/loss", loss, now, i) for i, loss in enumerate(losses)])

    return log


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
