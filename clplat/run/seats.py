"""Where an agent sits: one environment in this process, or several side by side, each in a process of its own.

Those in processes step while this one takes its steps of training: `send` returns at once, `receive` waits.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from clplat.components.state import flatten, unflatten
from clplat.stream import Environment

Step = tuple[Any, float, bool, bool]  # observation, reward, terminated, truncated


class Seat:
    """An environment in this process; it steps when its step is asked for."""

    def __init__(self, make: Callable[[], Environment]) -> None:
        self.environment: Any = make()
        self.savable = bool(getattr(self.environment, "savable", False))
        self._action: Any = None

    def reset(self, seed: int) -> Any:
        """The first observation of an episode."""
        return self.environment.reset(seed=seed)[0]

    def send(self, action: Any) -> None:
        """Begin a step."""
        self._action = action

    def receive(self) -> Step:
        """The end of the step begun."""
        observation, reward, terminated, truncated, _ = self.environment.step(self._action)
        return observation, float(reward), bool(terminated), bool(truncated)

    def state(self) -> Any:
        """What `restore` takes; between two steps only."""
        return self.environment.state()

    def restore(self, state: Any) -> None:
        """Go on where `state` was taken."""
        self.environment.restore(state)

    def close(self) -> None:
        """Nothing more is asked."""


class RemoteSeat(Seat):
    """An environment in a process of its own.

    Raises:
        RuntimeError: what goes wrong there, in any method.
    """

    def __init__(self, make: Callable[[], Environment]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.savable = bool(self._answer())

    def reset(self, seed: int) -> Any:
        self._pipe.send(("reset", seed))
        return self._answer()

    def send(self, action: Any) -> None:
        self._pipe.send(("step", action))

    def receive(self) -> Step:
        return self._answer()

    def state(self) -> Any:
        self._pipe.send(("state", None))
        plain, arrays = self._answer()
        return unflatten(plain, {k: torch.from_numpy(v) for k, v in arrays.items()})

    def restore(self, state: Any) -> None:
        self._pipe.send(("restore", _as_arrays(state)))
        self._answer()

    def close(self) -> None:
        self._process.terminate()
        self._process.join()
        self._pipe.close()

    def _answer(self) -> Any:
        try:
            fine, answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError("the process of an environment has died") from None
        if not fine:
            raise RuntimeError(f"in the process of an environment: {answer}")
        return answer


def seats(make: Callable[[], Environment], number: int) -> list[Seat]:
    """One in this process, or several in processes of their own."""
    return [Seat(make)] if number == 1 else [RemoteSeat(make) for _ in range(number)]


def _as_arrays(state: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """A state for a pipe: tensors would be shared by file, arrays are copied."""
    tensors: dict[str, torch.Tensor] = {}
    plain = flatten(state, tensors)
    return plain, {k: v.cpu().numpy() for k, v in tensors.items()}


def _serve(make: Callable[[], Environment], pipe: Any) -> None:
    """The process of a `RemoteSeat`."""
    torch.set_num_threads(1)
    try:
        seat = Seat(make)
        pipe.send((True, seat.savable))
        while True:
            what, value = pipe.recv()
            answer: Any = None
            if what == "reset":
                answer = seat.reset(value)
            elif what == "step":
                seat.send(value)
                answer = seat.receive()
            elif what == "state":
                answer = _as_arrays(seat.state())
            else:
                plain, arrays = value
                seat.restore(unflatten(plain, {k: torch.from_numpy(v) for k, v in arrays.items()}))
            pipe.send((True, answer))
    except (EOFError, KeyboardInterrupt):
        return
    except Exception:  # noqa: BLE001 - whatever it is, the other end says it
        pipe.send((False, traceback.format_exc()))
