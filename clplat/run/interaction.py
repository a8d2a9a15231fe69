"""Acting in an environment: what an `interact` experience adds to the loop."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from clplat.data.transitions import unpack
from clplat.run.state import RunState
from clplat.strategy import Strategy, evaluating
from clplat.stream import Actions, Data, Experience, Transition

PAUSE: Any = object()  # a moment between episodes, without a step, at which the run can be saved


def play(run: RunState, experience: Experience) -> Iterator[Tensor | None]:
    """Act, store, and train as often as `observe` asks, for the experience's `env_steps`.

    Each episode starts from a seed of its own, so a run that was stopped goes on from the last whole episode.
    """
    assert experience.environment is not None
    p, strategy, environment = run.progress, run.strategy, experience.environment()
    if not run.returns:
        before = evaluate_return(strategy, experience, run.loop.eval_episodes, run.seed)
        run.returns = {"experience": experience.index, "before": before, "evaluations": []}
        if hasattr(strategy, "handover"):
            bounds = experience.return_bounds
            for line in strategy.handover(experience.seen(), before, None if bounds is None else bounds[0]):
                warnings.warn(line, stacklevel=2)
    while p.env_step < experience.env_steps:
        run.may_save = False
        observation, _ = environment.reset(seed=_seed(run.seed, experience.index, p.episode))
        done = False
        while not done and p.env_step < experience.env_steps:
            action = strategy.act(observation, True)
            following, reward, terminated, truncated, _ = environment.step(action)
            step = (observation, action, float(reward), following, bool(terminated), bool(truncated))
            updates = strategy.observe(Transition(*step))
            observation, done = following, bool(terminated or truncated)
            p.env_step += 1
            run.window, run.share, run.boundary = 1, 1.0, True
            if updates == 0:
                yield None
            for index in range(updates):
                yield run.hook("training_step")(None, index)
            every = run.loop.eval_every
            if every and p.env_step % every == 0:
                _log_return(run, experience)
        p.episode += 1
        run.may_save = True
        yield PAUSE
    _log_return(run, experience)


def _log_return(run: RunState, experience: Experience) -> None:
    value = evaluate_return(run.strategy, experience, run.loop.eval_episodes, run.seed)
    found = {"interact/return": value, "interact/env_step": float(run.progress.env_step)}
    run.returns["evaluations"].append([run.progress.env_step, value])
    if experience.probe is not None and hasattr(run.strategy, "probe"):
        found |= _probe(run, experience.probe)
        probed = [run.progress.env_step, found["interact/probe_q"], found["interact/probe_td_error"]]
        run.returns.setdefault("probe", []).append(probed)
    run.log.step(run.progress.total_steps, found)


def _probe(run: RunState, data: Data) -> dict[str, float]:
    """Mean value, and mean size of the TD error, on transitions held for measurement."""
    assert isinstance(run.stream.answers, Actions)
    with evaluating(run.strategy):
        found = run.strategy.probe(unpack(data.all()[0].to(run.fabric.device), run.stream.answers.size))
    return {f"interact/probe_{name}": float(values.mean()) for name, values in found.items()}


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
