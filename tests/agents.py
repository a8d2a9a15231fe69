"""Small agents for tests: a model, transitions, and what the loop does with a strategy, without the loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clplat import Data, Experience, Kind
from clplat.backbones.actor_critic import actor_critic
from clplat.data.transitions import Transitions, pack
from clplat.stream import Actions, Transition

O, A = 3, 2
PIXELS = (3, 16, 16)


def model(seed: int = 0, **options: Any) -> Any:
    """An agent of O observations and A actions, 2 critics of 8 units unless told otherwise."""
    torch.manual_seed(seed)
    options = {"actor_hidden": [8], "critic_hidden": [8]} | options
    return actor_critic((O,), **options).assemble(None, Actions(A))


def transitions(n: int, seed: int = 0, episode: int = 5) -> Transitions:
    """n steps of episodes that are cut off after `episode` steps; every seventh ends."""
    g = torch.Generator().manual_seed(seed)
    at = torch.arange(1, n + 1)
    ended = (at % 7 == 0).float()
    return Transitions(
        torch.randn(n, O, generator=g), 2 * torch.rand(n, A, generator=g) - 1, torch.randn(n, generator=g),
        torch.randn(n, O, generator=g), ended, (at % episode == 0).float() * (1 - ended), torch.zeros(n),
    )  # fmt: skip


def pixels(**options: Any) -> Any:
    """An agent of images `PIXELS` and A actions."""
    torch.manual_seed(0)
    options = {"actor_hidden": [8], "critic_hidden": [8], "encoder": "cnn", "encoder_width": 4, "features": 6} | options
    return actor_critic(PIXELS, **options).assemble(None, Actions(A))


def pixel_transitions(n: int) -> Transitions:
    """`transitions` between random images, flattened."""
    g = torch.Generator().manual_seed(0)
    seen, following = (torch.rand(n, math.prod(PIXELS), generator=g) for _ in range(2))
    return transitions(n)._replace(observation=seen, next_observation=following)


def encoder_gradients(strategy: Any) -> list[Tensor]:
    """Gradients that the encoder of pixels has got."""
    return [p.grad.clone() for p in strategy.model.backbone.valued.encoder.parameters() if p.grad is not None]


def offline(n: int = 40, seed: int = 0) -> Experience:
    """An interact experience with n transitions before its environment."""
    return Experience(0, "offline", Kind.INTERACT, Data(pack(transitions(n, seed)), None), env_steps=10)


def online(index: int = 1) -> Experience:
    """An interact experience with nothing but its environment."""
    return Experience(index, "online", Kind.INTERACT, None, env_steps=10)


class Loop:
    """Steps as the loop takes them; counts those that moved critics and those that moved the actor."""

    def __init__(self, strategy: Any) -> None:
        self.strategy, self.optimizer = strategy, strategy.configure_optimizers()
        self.critic_steps, self.actor_steps, self.at = 0, 0, 0
        self.generator = np.random.default_rng(0)

    def learn(self, rows: Tensor | None, index: int = 0) -> Tensor:
        """One training step, on offline rows (B, w) or None; returns the loss."""
        s = self.strategy
        loss = s.training_step(None if rows is None else (rows, None), index)
        loss.backward()
        groups = s.model.groups()
        self.critic_steps += any(p.grad is not None for p in groups["critic"])
        self.actor_steps += any(p.grad is not None for p in groups["actor"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        s.after_step()
        return loss.detach()

    def act(self, steps: int) -> list[Tensor]:
        """So many steps in an environment of noise; the losses of all updates."""
        losses = []
        for _ in range(steps):
            self.at += 1
            seen, following = (self.generator.normal(size=O).astype(np.float32) for _ in range(2))
            action = self.strategy.act(seen, True)
            reward = float(-np.abs(seen).sum())
            step = Transition(seen, action, reward, following, False, self.at % 5 == 0)
            losses += [self.learn(None, index) for index in range(self.strategy.observe(step))]
        return losses


def bits(strategy: Any, optimizer: Any = None) -> list[Tensor]:
    """Copies of every parameter and, given the optimizer, of its moments."""
    found = [p.detach().clone() for p in strategy.model.parameters()]
    if optimizer is not None:
        found += [v.clone() for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return found


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit for bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
