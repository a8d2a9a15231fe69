"""Acting in an environment: what an `interact` experience adds to the loop.

    for each round:  act in every seat; observe; as many training steps as `observe` asked for

One environment steps in this process. Several step in processes of their own, while the training steps that the round
before asked for are taken. What can be saved is saved within its episodes: see `Acting.state`.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clplat.data.transitions import unpack
from clplat.run.filming import film
from clplat.run.seats import seats
from clplat.run.state import RunState
from clplat.strategy import Strategy, evaluating
from clplat.stream import Actions, Data, Experience, Transition

PAUSE: Any = object()  # a moment without a step, at which the run can be saved


class Acting:
    """Seats in an environment, and what was seen from each.

    Args:
        run: whose strategy acts; holds this as `run.acting`.
        experience: with an environment.
    """

    def __init__(self, run: RunState, experience: Experience) -> None:
        assert experience.environment is not None
        self.run, self.experience = run, experience
        self.seats = seats(experience.environment, experience.environments)
        self.beside = len(self.seats) > 1  # steps are taken beside those of training
        self.savable = all(seat.savable for seat in self.seats)
        self.seen: list[Any] = [None] * len(self.seats)  # None: a new episode begins there
        self.owed = 0  # training steps asked for and not taken
        saved, run.acted = run.acted, None
        if saved is not None:
            self._restore(saved)

    def state(self) -> dict[str, Any]:
        """Of all seats between two rounds, for a checkpoint; without what environments can't tell."""
        if not self.savable:
            return {"seen": [], "environments": [], "owed": self.owed}
        seen = [None if o is None else torch.from_numpy(np.array(o)) for o in self.seen]
        known = [seat.state() for seat, o in zip(self.seats, self.seen, strict=True) if o is not None]
        return {"seen": seen, "environments": known, "owed": self.owed}

    def _restore(self, saved: dict[str, Any]) -> None:
        self.owed = saved["owed"]
        if not saved["seen"]:
            if self.beside:
                warnings.warn(f"{self.experience.name} can't be saved: new episodes begin", stacklevel=2)
            return
        self.seen = [None if o is None else o.numpy() for o in saved["seen"]]
        at = [seat for seat, o in zip(self.seats, self.seen, strict=True) if o is not None]
        for seat, state in zip(at, saved["environments"], strict=True):
            seat.restore(state)

    def begin(self) -> int:
        """Choose and send an action from each seat that still has a step to take; how many."""
        run, p = self.run, self.run.progress
        taking = min(len(self.seats), run.env_steps(self.experience) - p.env_step)
        for i in range(taking):
            if self.seen[i] is None:
                self.seen[i] = self.seats[i].reset(_seed(run.seed, self.experience.index, p.episode))
                p.episode += 1
        if self.beside:
            self.actions = list(run.strategy.act(np.stack(self.seen[:taking]), True))
        else:
            self.actions = [run.strategy.act(self.seen[0], True)]
        for seat, action in zip(self.seats, self.actions, strict=False):
            seat.send(action)
        return taking

    def finish(self, taking: int) -> None:
        """Observe what the first `taking` seats have met."""
        for i in range(taking):
            following, reward, terminated, truncated = self.seats[i].receive()
            step = Transition(self.seen[i], self.actions[i], reward, following, terminated, truncated)
            self.owed += self.run.strategy.observe(step)
            self.seen[i] = None if terminated or truncated else following
            self.run.progress.env_step += 1

    def train(self, save: bool) -> Iterator[Tensor | None]:
        """The training steps owed; a turn without one where there is none. The run may be saved after the last."""
        run, owed = self.run, self.owed
        run.window, run.share, run.boundary, self.owed = 1, 1.0, True, 0
        run.may_save = save
        if not owed:
            yield None
        for index in range(owed):
            run.may_save = save and index + 1 == owed
            yield run.hook("training_step")(None, index)

    def close(self) -> None:
        """Nothing is asked of the environments any more."""
        self.run.acting = None
        for seat in self.seats:
            seat.close()


def play(run: RunState, experience: Experience) -> Iterator[Tensor | None]:
    """Act, store, and train as often as `observe` asks, for as many steps as there are to take.

    Each episode starts from a seed of its own. The run can be saved after any round; one environment that can't be
    saved is waited for: until its episode ends.
    """
    p = run.progress
    if not run.returns:
        _hand_over(run, experience)
    run.acting = acting = Acting(run, experience)
    try:
        while p.env_step < run.env_steps(experience):
            _evaluate_if_due(run, experience)
            taking = acting.begin()
            if acting.beside:
                yield from acting.train(save=False)
            acting.finish(taking)
            if acting.beside:
                run.may_save = True
                yield PAUSE
                continue
            yield from acting.train(save=acting.savable)
            if acting.seen[0] is None:
                run.may_save = True
                yield PAUSE
        if acting.owed:
            yield from acting.train(save=False)
    finally:
        run.may_save = True
        acting.close()
    done = run.returns["evaluations"]
    if not done or done[-1][0] != p.env_step:
        _log_return(run, experience)
    film(run, experience, _evaluated(run.seed, experience, 0), "after")


def _hand_over(run: RunState, experience: Experience) -> None:
    """Measure what comes to the environment, and tell the strategy."""
    strategy = run.strategy
    before = evaluate_return(strategy, experience, run.loop.eval_episodes, run.seed)
    film(run, experience, _evaluated(run.seed, experience, 0), "before")
    run.returns = {
        "experience": experience.index, "before": before, "evaluations": [],
        "offline_steps": run.progress.gradient_steps, "gradient_steps": run.progress.gradient_steps,
    }  # fmt: skip
    if hasattr(strategy, "handover"):
        for line in strategy.handover(experience.seen(), before, _chance(run, experience)):
            warnings.warn(line, stacklevel=2)


def _chance(run: RunState, experience: Experience) -> float | None:
    """The return that random actions reach: as the stream says, or else their mean over ten episodes at least, plus
    twice its standard error; None where actions are no vectors."""
    if experience.return_bounds is not None:
        return experience.return_bounds[0]
    answers = run.stream.answers
    if not isinstance(answers, Actions):
        return None
    generator, episodes = np.random.default_rng(run.seed), max(10, run.loop.eval_episodes)
    found = _returns(lambda _: generator.uniform(-1, 1, answers.size), experience, episodes, run.seed)
    return float(np.mean(found) + 2 * np.std(found, ddof=1) / np.sqrt(len(found)))


def _evaluate_if_due(run: RunState, experience: Experience) -> None:
    """Every `eval_every` steps in the environment; what was evaluated before a stop is not evaluated again."""
    every, done = run.loop.eval_every, run.returns["evaluations"]
    if every and run.progress.env_step // every > (done[-1][0] if done else 0) // every:
        _log_return(run, experience)


def _log_return(run: RunState, experience: Experience) -> None:
    started, p = time.perf_counter(), run.progress
    value = evaluate_return(run.strategy, experience, run.loop.eval_episodes, run.seed)
    found = {"interact/return": value, "interact/env_step": float(p.env_step),
             "interact/gradient_steps": float(p.gradient_steps)}  # fmt: skip
    run.returns["evaluations"].append([p.env_step, value])
    run.returns["gradient_steps"] = p.gradient_steps
    if experience.probe is not None and hasattr(run.strategy, "probe"):
        probed = _probe(run, experience, experience.probe)
        found |= {f"interact/probe_{name}": v for name, v in probed.items()}
        run.returns.setdefault("probe", []).append({"env_step": p.env_step, **probed})
    run.log.step(p.total_steps, found)
    seconds = time.perf_counter() - started
    run.spent["eval_seconds"] += seconds
    run.spent["train_seconds"] -= seconds  # of which the turn takes account


def _probe(run: RunState, experience: Experience, data: Data) -> dict[str, float]:
    """Means over transitions kept for measurement: value, size of the TD error, return that the recorded episode had
    from there (where the strategy sums it), and distance of the value from it."""
    assert isinstance(run.stream.answers, Actions)
    whole = dataclasses.replace(experience.seen(), train=Data(data.inputs, None))
    with evaluating(run.strategy), torch.no_grad():
        rows = run.strategy.training_data(whole).inputs[data.row_ids()]
        transitions = unpack(rows, run.stream.answers.size)
        found = run.strategy.probe(transitions)
    means = {name: float(values.mean()) for name, values in found.items()}
    known = transitions.mc_return.mean()
    if "q" not in found or not known.isfinite():
        return means
    apart = (found["q"] - transitions.mc_return).abs().mean()
    return means | {"return_error": float(apart), "mc_return": float(known)}


def evaluate_return(strategy: Strategy, experience: Experience, episodes: int, seed: int) -> float:
    """Mean undiscounted return of greedy episodes in a fresh environment, from seeds that training never uses."""
    with evaluating(strategy), torch.no_grad(), torch.random.fork_rng():
        return sum(_returns(lambda seen: strategy.act(seen, False), experience, episodes, seed)) / episodes


def _returns(act: Callable[[Any], Any], experience: Experience, episodes: int, seed: int) -> list[float]:
    """Undiscounted return of each evaluation episode."""
    assert experience.environment is not None
    environment, found = experience.environment(), []
    for episode in range(episodes):
        observation, _ = environment.reset(seed=_evaluated(seed, experience, episode))
        total, done = 0.0, False
        while not done:
            observation, reward, terminated, truncated, _ = environment.step(act(observation))
            total, done = total + float(reward), bool(terminated or truncated)
        found.append(total)
    return found


def everywhere(run: RunState) -> dict[str, Any]:
    """`after` of an entry of the record's `returns`: the mean return in each environment, where there are several."""
    started, acted = time.perf_counter(), [e for e in run.stream if e.environment is not None]
    if len(acted) < 2:
        return {}
    found = {str(e.index): evaluate_return(run.strategy, e, run.loop.eval_episodes, run.seed) for e in acted}
    run.spent["eval_seconds"] += time.perf_counter() - started
    return {"after": found}


def _evaluated(seed: int, experience: Experience, episode: int) -> int:
    """Seed of an evaluation episode."""
    return _seed(seed + 1, experience.index, -1 - episode)


def _seed(seed: int, experience: int, episode: int) -> int:
    """Distinct for every (seed, experience, episode); evaluation episodes count down from -1."""
    return (seed * 1_000_003 + experience * 7_919 + episode) % 2**31
