"""Losses of agents as pure functions, by the names that their papers give them.

Shapes: B transitions of a batch, N critics, M of them asked, K actions for each state, T steps of an episode.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHT_LIMIT = 100.0  # of IQL's weights, as published


def td_target(reward: Tensor, terminated: Tensor, value: Tensor, gamma: float) -> Tensor:
    """y = r + γ (1 − terminated) V(s'), (B,). A time limit is no end: there V(s') counts."""
    return reward + gamma * (1 - terminated) * value


def critic_loss(q: Tensor, target: Tensor) -> Tensor:
    """Mean over critics and batch of (Q_i(s, a) − y)²; q (N, B), target (B,)."""
    return (q - target).square().mean()


def actor_loss(log_prob: Tensor, q: Tensor, temperature: Tensor) -> Tensor:
    """E[α log π(a|s) − Q(s, a)]; log_prob and q (B,). No gradient reaches the temperature."""
    return (temperature.detach() * log_prob - q).mean()


def temperature_loss(temperature: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """α (−E log π − H̄): α rises while the entropy is below H̄. No gradient reaches the policy."""
    return temperature * (-log_prob.detach().mean() - target_entropy)


def pessimism(q_data: Tensor, q_actions: Tensor, log_density: Tensor | None) -> Tensor:
    """CQL(H)'s gap of each critic and state, (M, B): log Σ exp Q over the actions, less Q of the data.

        with densities:    logsumexp_k (Q(s, a_k) − log density(a_k)) − Q(s, a)
        without:           logsumexp over a_k and a itself − log (K + 1) − Q(s, a)

    Args:
        q_data: (M, B).
        q_actions: (M, B, K).
        log_density: (B, K) that each action was drawn with, or None.
    """
    if log_density is not None:
        return (q_actions - log_density).logsumexp(-1) - q_data
    every = torch.cat([q_actions, q_data.unsqueeze(-1)], -1)
    return every.logsumexp(-1) - math.log(every.shape[-1]) - q_data


def bounded(q: Tensor, returns: Tensor) -> Tensor:
    """max(Q, G), Cal-QL's calibration: no value is pushed below what was reached; q (M, B, K), returns (B,)."""
    return torch.maximum(q, returns.unsqueeze(-1))


def expectile_loss(difference: Tensor, expectile: float) -> Tensor:
    """Mean of |τ − 1(u < 0)| u²; u = Q − V, (B,)."""
    weight = (expectile - (difference < 0).to(difference.dtype)).abs()
    return (weight * difference.square()).mean()


def advantage_weighted_loss(log_prob: Tensor, advantage: Tensor, inverse_temperature: float) -> Tensor:
    """−E[min(exp(β (Q − V)), 100) log π(a|s)]; both (B,). No gradient reaches the advantage."""
    weight = (inverse_temperature * advantage.detach()).exp().clamp(max=WEIGHT_LIMIT)
    return -(weight * log_prob).mean()


def multiplier_loss(raw: Tensor, gap: Tensor, target_gap: float) -> Tensor:
    """−softplus(λ) (gap − τ): the multiplier rises while the gap is above τ. No gradient reaches the critics."""
    return -F.softplus(raw) * (gap.detach() - target_gap)


def monte_carlo_returns(
    reward: Tensor, terminated: Tensor, truncated: Tensor, gamma: float, failure: float | None = None
) -> Tensor:
    """Discounted sum of rewards to the end of each episode, (n,), for episodes that lie one behind the other.

    A sum is cut off where the episode was: nothing stands for what would have followed.

    Args:
        reward: (n,), scaled as training sees it.
        terminated, truncated: (n,), 1 at the last step of an episode.
        gamma: discount, in [0, 1].
        failure: reward of a step without success, of a sparse task: an episode of nothing else gets failure / (1 − γ)
            at each step, as if it went on for ever.
    """
    ends = ((terminated > 0) | (truncated > 0)).tolist()
    rewards, returns = reward.double().tolist(), [0.0] * len(ends)
    stop = len(ends)
    for t in reversed(range(len(ends))):
        if ends[t]:
            stop = t + 1
        returns[t] = rewards[t] + (gamma * returns[t + 1] if t + 1 < stop else 0.0)
        first = t == 0 or ends[t - 1]
        if failure is not None and first and all(math.isclose(r, failure, rel_tol=1e-6) for r in rewards[t:stop]):
            returns[t:stop] = [failure / (1 - gamma)] * (stop - t)
    return torch.tensor(returns, dtype=reward.dtype, device=reward.device)
