"""A check of what an agent does when it is asked for actions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from clplat.components.state import rng_state
from clplat.data.transitions import unpack
from clplat.strategy import evaluating
from clplat.stream import Kind
from clplat.testing.result import NotApplicable, expect, listed
from clplat.testing.subject import State, Subject

TOLERANCE = 1e-5  # between one observation by itself and in a batch


def acting(subject: Subject) -> None:
    """Greedy actions and `probe` draw nothing and change nothing; actions are integers, or vectors in [-1, 1]."""
    if Kind.INTERACT not in subject.cls.kinds:
        raise NotApplicable("it does not act")
    outcome = subject.run()  # one of its own, which what is wrong here may change
    strategy, stream = outcome.strategy, outcome.stream
    seen = stream.probe[:6].numpy()
    with evaluating(strategy), torch.no_grad():
        before = _everything(strategy)
        first, again = ([np.asarray(strategy.act(o, False)) for o in seen] for _ in range(2))
        _unchanged(before, _everything(strategy), "act(observation, False)")
        expect(all(map(np.array_equal, first, again)), "act(observation, False) gives two answers to one observation")
        if not np.issubdtype(first[0].dtype, np.integer):
            _vectors(strategy, seen, first)
        data = next(e.train for e in stream if e.kind is Kind.INTERACT)
        if data is not None and hasattr(strategy, "probe"):
            rows = data.all()[0]
            before = _everything(strategy)
            found = strategy.probe(unpack(rows, 1))
            _unchanged(before, _everything(strategy), "probe")
            shapes = {name: tuple(values.shape) for name, values in found.items()}
            valid = {"q": (len(rows),), "td_error": (len(rows),)}
            expect(valid.items() <= shapes.items(), f"probe gives {shapes} for {len(rows)} transitions, not {valid}")


def _vectors(strategy: Any, seen: np.ndarray, single: list[np.ndarray]) -> None:
    """Actions (1,) of single observations, (n, 1) of n."""
    shape = single[0].shape
    expect(shape == (1,), f"an action has shape {shape} where the environment takes (1,)")
    together = np.asarray(strategy.act(seen, False))
    expect(
        together.shape == (len(seen), 1), f"actions for {len(seen)} observations at once have shape {together.shape}"
    )
    same = np.allclose(together, np.stack(single), rtol=0, atol=TOLERANCE)
    expect(same, "an observation among others gets another action than by itself")
    drawn = np.stack([np.asarray(strategy.act(o, True)) for o in seen])
    far = float(np.abs(np.concatenate([together, drawn])).max())
    expect(far <= 1, f"an action of {far:.3g}: agents act in [-1, 1], which streams scale to their environments")


def _everything(strategy: Any) -> tuple[State, State]:
    return State.of(strategy), State.copy({"rng": rng_state()})


def _unchanged(before: tuple[State, State], after: tuple[State, State], what: str) -> None:
    wrong = before[0].differences(after[0])
    expect(not wrong, f"{what} changes {listed(wrong)}")
    expect(not before[1].differences(after[1]), f"{what} draws from a global generator: measuring would change the run")
