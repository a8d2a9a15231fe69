"""Acting in an environment: what an `interact` experience adds to the loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from clplat.strategy import Strategy, evaluating
from clplat.stream import Experience

if TYPE_CHECKING:
    from clplat.run.runner import Runner

PAUSE: Any = object()  # a moment between episodes, without a step, at which the run can be saved


class Transition(NamedTuple):
    """One step in an environment. `terminated` is the end of the task; a time limit alone is not."""

    observation: Any
    action: Any
    reward: float
    next_observation: Any
    terminated: bool


def play(runner: Runner, experience: Experience) -> Iterator[Tensor | None]:
    """Act, store, and train as often as `observe` asks, for the experience's `env_steps`.

    Each episode starts from a seed of its own, so a run that was stopped goes on from the last whole episode.
    """
    assert experience.environment is not None
    p, strategy, environment = runner.progress, runner.strategy, experience.environment()
    if not runner.returns:
        before = evaluate_return(strategy, experience, runner.loop.eval_episodes, runner.seed)
        runner.returns = {"experience": experience.index, "before": before, "evaluations": []}
    while p.env_step < experience.env_steps:
        runner.may_save = False
        observation, _ = environment.reset(seed=_seed(runner.seed, experience.index, p.episode))
        done = False
        while not done and p.env_step < experience.env_steps:
            action = strategy.act(observation, True)
            following, reward, terminated, truncated, _ = environment.step(action)
            updates = strategy.observe(Transition(observation, action, float(reward), following, bool(terminated)))
            observation, done = following, bool(terminated or truncated)
            p.env_step += 1
            runner.window, runner.boundary = 1, True
            if updates == 0:
                yield None
            for index in range(updates):
                yield runner.hook("training_step")(None, index)
            every = runner.loop.eval_every
            if every and p.env_step % every == 0:
                _log_return(runner, experience)
        p.episode += 1
        runner.may_save = True
        yield PAUSE
    _log_return(runner, experience)


def _log_return(runner: Runner, experience: Experience) -> None:
    value = evaluate_return(runner.strategy, experience, runner.loop.eval_episodes, runner.seed)
    runner.returns["evaluations"].append([runner.progress.env_step, value])
    runner.log.step(runner.progress.total_steps, {"interact/return": value})


def evaluate_return(strategy: Strategy, experience: Experience, episodes: int, seed: int) -> float:
    """Mean undiscounted return of greedy episodes in a fresh environment, from seeds that training never uses."""
    assert experience.environment is not None
    environment, total = experience.environment(), 0.0
    with evaluating(strategy), torch.no_grad(), torch.random.fork_rng():
        for episode in range(episodes):
            observation, _ = environment.reset(seed=_seed(seed + 1, experience.index, -1 - episode))
            done = False
            while not done:
                observation, reward, terminated, truncated, _ = environment.step(strategy.act(observation, False))
                total, done = total + float(reward), bool(terminated or truncated)
    return total / episodes


def _seed(seed: int, experience: int, episode: int) -> int:
    """Distinct for every (seed, experience, episode); evaluation episodes count down from -1."""
    return (seed * 1_000_003 + experience * 7_919 + episode) % 2**31
