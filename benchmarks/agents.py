"""Agents: an update of ten critics next to ten modules and to the same arithmetic by hand, and SAC next to a peer.

Critics: 64x2 with layer norm, N = 10, batches of 256 of Pendulum's size, a mean squared error, Adam and the slow copy.
SAC: 64x2, two critics, Pendulum-v1, one update for each step in the environment, in clplat's loop and in
stable-baselines3's, between step `FROM` and the last. Times are the processor's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import Row, paired

N, BATCH, INPUTS, HIDDEN, POLYAK, UPDATES = 10, 256, 4, [64, 64], 0.005, 10
FROM, STEPS = 300, 1300


def batch() -> tuple[Tensor, Tensor]:
    """Inputs (B, inputs) and targets (B,)."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, INPUTS, generator=g), torch.randn(BATCH, generator=g)


def updates(parameters: list[Tensor], slow: list[Tensor], q: Callable[[Tensor], Tensor]) -> Callable[[], float]:
    """Takes `UPDATES` updates of critics `q`: (B, inputs) → (N, B); returns milliseconds for one."""
    optimizer = torch.optim.Adam(parameters, lr=3e-4, fused=True)
    x, y = batch()

    def run() -> float:
        started = time.process_time()
        for _ in range(UPDATES):
            (q(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            torch._foreach_lerp_(slow, [p.detach() for p in parameters], POLYAK)
        return 1000 * (time.process_time() - started) / UPDATES

    return run


def ours() -> Callable[[], float]:
    """The ensemble of the backbone `actor_critic`."""
    from clplat.backbones.actor_critic import Critics

    critics = Critics(INPUTS, HIDDEN, N)
    return updates(list(critics.parameters()), list(deepcopy(critics).requires_grad_(False).parameters()), critics)


def modules() -> Callable[[], float]:
    """Ten networks in a loop, each with its own Adam and its own slow copy, moved parameter by parameter."""
    sizes = list(itertools.pairwise([INPUTS, *HIDDEN]))
    nets = [
        nn.Sequential(*(m for a, b in sizes for m in (nn.Linear(a, b), nn.LayerNorm(b), nn.ReLU())), nn.Linear(64, 1))
        for _ in range(N)
    ]
    slow = [deepcopy(net).requires_grad_(False) for net in nets]
    optimizers = [torch.optim.Adam(net.parameters(), lr=3e-4) for net in nets]
    x, y = batch()

    def run() -> float:
        started = time.process_time()
        for _ in range(UPDATES):
            for net, copy, optimizer in zip(nets, slow, optimizers, strict=True):
                (net(x)[:, 0] - y).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                for target, parameter in zip(copy.parameters(), net.parameters(), strict=True):
                    target.lerp_(parameter.detach(), POLYAK)
        return 1000 * (time.process_time() - started) / UPDATES

    return run


def by_hand() -> Callable[[], float]:
    """The ensemble's arithmetic, tensor by tensor."""
    w1, w2, w3 = (torch.randn(N, a, b) / a**0.5 for a, b in itertools.pairwise([INPUTS, *HIDDEN, 1]))
    b1, b2, b3, s1, s2 = (torch.zeros(N, 1, b) for b in (64, 64, 1, 64, 64))
    g1, g2 = torch.ones(N, 1, 64), torch.ones(N, 1, 64)
    parameters = [t.requires_grad_() for t in (w1, w2, w3, b1, b2, b3, g1, g2, s1, s2)]

    def q(x: Tensor) -> Tensor:
        h = torch.baddbmm(b1, x.expand(N, BATCH, INPUTS), w1)
        h = (F.layer_norm(h, (64,), eps=1e-6) * g1).add_(s1).relu_()
        h = torch.baddbmm(b2, h, w2)
        h = (F.layer_norm(h, (64,), eps=1e-6) * g2).add_(s2).relu_()
        return torch.linalg.vecdot(h, w3.mT) + b3[..., 0]

    return updates(parameters, [p.detach().clone() for p in parameters], q)


def sac_here(steps: int) -> Iterator[float]:
    """Processor seconds at each step in the environment."""
    from clplat.backbones.actor_critic import actor_critic
    from clplat.config.settings import FabricSettings, LoopSettings
    from clplat.run.build import new_record
    from clplat.run.launch import make_fabric
    from clplat.run.loop import Runner
    from clplat.run.runlog import RunLog
    from clplat.strategies.sac import SAC
    from clplat.streams.rl import RL

    stream = RL(env="Pendulum-v1", env_steps=steps)
    model = actor_critic(stream.input_shape, [64, 64], [64, 64], layer_norm=False).assemble(None, stream.answers)
    strategy, times = SAC(model=model, random_steps=FROM), list[float]()
    observe = strategy.observe
    strategy.observe = lambda t: (times.append(time.process_time()), observe(t))[1]  # type: ignore[func-returns-value]
    loop = LoopSettings(eval_every=None, checkpoint_seconds=None, representation=False, eval_episodes=1)
    fabric = make_fabric(FabricSettings(accelerator="cpu"))
    Runner(strategy, stream, loop, fabric, 0, RunLog(None, 0.0), new_record(stream)).run()
    return iter(times)


def sac_there(steps: int) -> Iterator[float]:
    """The same of stable-baselines3."""
    import gymnasium
    from stable_baselines3 import SAC

    env, times = gymnasium.make("Pendulum-v1"), list[float]()
    agent: Any = SAC("MlpPolicy", env, learning_starts=FROM, policy_kwargs={"net_arch": [64, 64]}, seed=0, device="cpu")
    step = env.step
    env.step = lambda action: (times.append(time.process_time()), step(action))[1]  # type: ignore[func-returns-value]
    agent.learn(steps)
    return iter(times)


def rows(quick: bool = False) -> list[Row]:
    """Two rows for the critics, one for SAC; limits: a third of ten modules, 1.1 by hand, 1.5 times a peer's steps."""
    torch.manual_seed(0)
    found, rounds = [], 2 if quick else 30
    for name, base, limit in (("ten modules", modules(), 1 / 3), ("by hand", by_hand(), 1.1)):
        mine, sides = ours(), ([], [])
        for round_ in range(rounds + 1):
            order = (mine, base) if round_ % 2 else (base, mine)
            times = [run() for run in order]
            if round_:  # the first sets up
                for side, value in zip(sides, times if round_ % 2 else times[::-1], strict=True):
                    side.append(value)
        found.append(paired(f"update of {N} critics, {name}", "ms", *sides, "ratio", limit))
    steps, here, there = FROM + 20 if quick else STEPS, [], []
    for _ in range(1 if quick else 5):
        for side, run in ((here, sac_here), (there, sac_there)):
            times = list(run(steps))
            side.append(1000 * (times[-1] - times[FROM + 10]) / (len(times) - FROM - 11))
    found.append(paired("SAC on Pendulum, a step, stable-baselines3", "ms", here, there, "ratio", 1 / 1.5))
    return found
