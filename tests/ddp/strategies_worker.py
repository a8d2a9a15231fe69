"""One process of a gloo group: feeds memories and trains strategies on its part of each global batch.

    python strategies_worker.py RANK WORLD FOLDER

Gradients are averaged as DDP averages them. Writes FOLDER/<RANK>.pt: what it ended with. All in float64: in float32 the
order of a sum may put a ReLU on the other side, and the weights then part by a whole gradient.
"""

import sys
from pathlib import Path

import torch

from clplat import Data, Experience, Kind
from clplat.backbones.base import Classifier
from clplat.backbones.heads import Growing
from clplat.backbones.mlp import mlp
from clplat.components.memory import ClassBalanced, Reservoir
from clplat.data.batches import batches_per_epoch, epoch_order, local_slice
from clplat.strategies.cumulative import Cumulative
from clplat.strategies.derpp import DERpp
from clplat.strategies.dp_hnet import DPHNet
from clplat.strategies.er import ER
from clplat.strategies.ewc import EWC
from clplat.strategies.hnet import HNet
from clplat.strategies.joint import Joint
from clplat.strategies.lwf import LwF
from clplat.strategies.naive import Naive
from clplat.strategies.si import SI

BATCH, REPLAY, SAMPLES = 7, 3, 23  # 23 = 14 + 9: two processes get 7 + 7, then 5 + 4
PIECES = {"embedding": 4, "chunk": 25, "chunk_embedding": 3, "lr": 0.02}
STRATEGIES = {
    "naive": lambda model, world: Naive(model=model),
    "er": lambda model, world: ER(model=model, memory=15, replay_batch=REPLAY * 2 // world),
    "derpp": lambda model, world: DERpp(model=model, memory=15, replay_batch=REPLAY * 2 // world),
    "ewc": lambda model, world: EWC(model=model, penalty=5.0),
    "si": lambda model, world: SI(model=model, penalty=0.5),
    "lwf": lambda model, world: LwF(model=model),
    "joint": lambda model, world: Joint(model=model),
    "cumulative": lambda model, world: Cumulative(model=model),
    "hnet": lambda model, world: HNet(model=model, **PIECES, hidden=[6], held_outputs="stored", sampled_tasks=1),
    "hnet, lookahead": lambda model, world: HNet(model=model, **PIECES, hidden=[6], lookahead=True, momentum=0.9),
    "hnet, network": lambda model, world: HNet(
        model=model, **PIECES, hidden=[6], infer="network", memory=15, replay_batch=REPLAY * 2 // world
    ),
    "dp_hnet": lambda model, world: DPHNet(model=model, **PIECES, hidden=6, hold_states=1.0, grow_every=2),
}


def experiences():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(SAMPLES * 3) // SAMPLES * 2 + torch.arange(SAMPLES * 3) % 2
    inputs = torch.randn(len(labels), 5, generator=generator) + labels[:, None]
    for k in range(3):
        rows = torch.arange(k * SAMPLES, (k + 1) * SAMPLES)
        yield Experience(k, f"e{k}", Kind.LEARN, Data(inputs, labels, rows), classes=(2 * k, 2 * k + 1), task=k)


def train(name, rank, world):
    """Weights after three experiences of two epochs; the global batch is 2 · BATCH for any number of processes."""
    torch.manual_seed(0)
    strategy = STRATEGIES[name](Classifier(mlp((5,), [7]), Growing(7, 6)), world)
    strategy.rank, strategy.world_size, local = rank, world, BATCH * 2 // world
    for e in experiences():
        strategy.train()
        strategy.grow(e)
        strategy.begin(e)
        optimizer, data = strategy.configure_optimizers(), strategy.training_data(e)
        for epoch in range(2):
            order = epoch_order(len(data), 0, e.index, epoch, torch.device("cpu"))
            for k in range(batches_per_epoch(len(data), local, world)):
                part, strategy.global_batch = local_slice(len(data), k, local, rank, world)
                strategy.raw, labels = data.batch(positions := order[part])
                strategy.rows = positions if data.rows is None else data.rows[positions]
                strategy.training_step((strategy.raw, labels), k).backward()
                if world > 1:
                    for p in strategy.parameters():
                        if p.grad is not None:
                            torch.distributed.all_reduce(p.grad)
                            p.grad /= world
                strategy.on_after_backward()
                strategy.on_before_optimizer_step(optimizer)
                optimizer.step()
                optimizer.zero_grad()
                strategy.after_step()
        strategy.end(e)
    return {k: v for k, v in strategy.state_dict().items() if isinstance(v, torch.Tensor)}


def remember(cls, rank, world):
    """State of a memory after uneven batches, and one draw of 6 samples over all processes."""
    memory = cls(10, seed=5)
    numbers = torch.arange(60.0)
    for part in numbers.split(9):
        mine = part.tensor_split(world)[rank]
        memory.add(mine[:, None], mine.long() % 4, extra=mine[:, None] * 2)
    return {**memory.state_dict(), "draw": torch.stack([t.flatten().float() for t in memory.sample(6 // world)])}


def results(rank, world):
    torch.set_default_dtype(torch.float64)
    try:
        found = {name: train(name, rank, world) for name in STRATEGIES}
    finally:
        torch.set_default_dtype(torch.float32)
    return found | {cls.__name__: remember(cls, rank, world) for cls in (Reservoir, ClassBalanced)}


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    torch.save(results(rank, world), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
