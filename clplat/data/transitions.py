"""Steps in an environment as tensors, and as rows of one tensor that a data set, a batch or a memory holds.

Shapes: n transitions, o numbers of an observation, a of an action, w = 2 o + a + 4 of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clplat.stream import Transition


class Transitions(NamedTuple):
    """n steps.

    Args:
        observation: (n, o), flattened where an observation has several dimensions.
        action: (n, a), in [-1, 1].
        reward: (n,), as the environment gave it.
        next_observation: (n, o); of an episode's last step what was seen at its end.
        terminated: (n,) 1 where the task ended: nothing follows; 0 otherwise.
        truncated: (n,) 1 where the episode was cut off (a time limit, the end of the data): something would follow.
        mc_return: (n,) discounted sum of rewards from here to the episode's end; NaN where nobody has summed.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    next_observation: Tensor
    terminated: Tensor
    truncated: Tensor
    mc_return: Tensor


def pack(transitions: Transitions) -> Tensor:
    """Rows (n, w), float32: observation, action, reward, next observation, terminated, truncated, return."""
    columns = [t.reshape(len(t), -1).float() for t in transitions]
    return torch.cat(columns, 1)


def pack_step(step: Transition) -> Tensor:
    """One row (1, w) of a step just taken; nobody knows its return yet: minus infinity, which bounds nothing."""
    parts = (step.observation, step.action, step.reward, step.next_observation, step.terminated, step.truncated)
    row = np.concatenate([*(np.ravel(part) for part in parts), [-np.inf]])
    return torch.from_numpy(row.astype(np.float32))[None]


def unpack(rows: Tensor, actions: int) -> Transitions:
    """Inverse of `pack` for rows (n, w) whose actions are `actions` numbers; views, no copies."""
    o = (rows.shape[1] - actions - 4) // 2
    parts = rows.split([o, actions, 1, o, 1, 1, 1], 1)
    flat = [p if i in (0, 1, 3) else p[:, 0] for i, p in enumerate(parts)]
    return Transitions(*flat)
