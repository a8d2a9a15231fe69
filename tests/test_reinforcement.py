"""Losses of agents next to plain loops in NumPy's float64, which share no line with them."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from clplat.components.reinforcement import (
    actor_loss,
    advantage_weighted_loss,
    bounded,
    critic_loss,
    expectile_loss,
    monte_carlo_returns,
    multiplier_loss,
    pessimism,
    td_target,
    temperature_loss,
)

TOLERANCE = {"abs": 1e-9, "rel": 1e-9}
N, B, K = 3, 5, 4
GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def test_critic_loss_and_target():
    q, reward, value = draw(N, B), draw(B), draw(B)
    ended = torch.tensor([0.0, 1, 0, 0, 1], dtype=torch.float64)
    total = 0.0
    for i in range(N):
        for b in range(B):
            y = reward[b].item() + (0.0 if ended[b] == 1 else 0.9 * value[b].item())
            total += (q[i, b].item() - y) ** 2
    found = critic_loss(q, td_target(reward, ended, value, 0.9)).item()
    assert found == pytest.approx(total / (N * B), **TOLERANCE)


def test_a_terminated_step_is_worth_its_reward_and_a_time_limit_bootstraps():
    reward, value = draw(B), draw(B)
    assert torch.equal(td_target(reward, torch.ones_like(reward), value, 0.9), reward)
    assert torch.equal(td_target(reward, torch.zeros_like(reward), value, 0.9), reward + 0.9 * value)


def test_actor_and_temperature_losses():
    log_prob, q, alpha = draw(B), draw(B), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    by_hand = sum(0.3 * p - v for p, v in zip(log_prob.tolist(), q.tolist(), strict=True)) / B
    loss = actor_loss(log_prob, q, alpha)
    assert loss.item() == pytest.approx(by_hand, **TOLERANCE)
    assert not loss.requires_grad
    entropy = -sum(log_prob.tolist()) / B
    assert temperature_loss(alpha, log_prob, -2.0).item() == pytest.approx(0.3 * (entropy + 2.0), **TOLERANCE)


@pytest.mark.parametrize(("entropy", "rises"), [(-3.0, True), (-1.0, False)])
def test_temperature_rises_while_the_entropy_is_below_its_target(entropy, rises):
    rho = torch.tensor(0.0, requires_grad=True)
    temperature_loss(torch.nn.functional.softplus(rho), torch.full((B,), -entropy), -2.0).backward()
    assert bool(rho.grad < 0) == rises  # descent goes against the gradient


def test_pessimism_with_densities():
    q, values, density = draw(N, B), draw(N, B, K), draw(B, K)
    found = pessimism(q, values, density)
    for i in range(N):
        for b in range(B):
            terms = [math.exp(values[i, b, k].item() - density[b, k].item()) for k in range(K)]
            assert found[i, b].item() == pytest.approx(math.log(sum(terms)) - q[i, b].item(), **TOLERANCE)
    assert (found + q >= (values - density).amax(-1)).all()  # a log-sum-exp is no less than its greatest term


def test_pessimism_without_densities_counts_the_action_of_the_data():
    q, values = draw(N, B), draw(N, B, K)
    found = pessimism(q, values, None)
    for i in range(N):
        for b in range(B):
            terms = [math.exp(v) for v in [*values[i, b].tolist(), q[i, b].item()]]
            expected = math.log(sum(terms)) - math.log(K + 1) - q[i, b].item()
            assert found[i, b].item() == pytest.approx(expected, **TOLERANCE)


def test_the_bound_of_cal_ql():
    values, returns = draw(N, B, K), draw(B)
    found = bounded(values, returns)
    for b in range(B):
        expected = np.maximum(values[:, b].numpy(), returns[b].item())
        assert found[:, b].numpy() == pytest.approx(expected, **TOLERANCE)
    assert torch.equal(bounded(values, torch.full((B,), -torch.inf)), values)  # no return: CQL
    high = values.clone().requires_grad_()
    bounded(high, torch.full((B,), 1e6, dtype=torch.float64)).sum().backward()
    assert not high.grad.any()  # all reached: nothing is pushed down


def test_expectile_and_advantage_weighted_losses():
    difference, log_prob = draw(B), draw(B)
    by_hand = sum(abs(0.7 - (1.0 if u < 0 else 0.0)) * u * u for u in difference.tolist()) / B
    assert expectile_loss(difference, 0.7).item() == pytest.approx(by_hand, **TOLERANCE)
    advantage = torch.cat([difference[1:], torch.tensor([9.0], dtype=torch.float64)])  # the last weight is cut
    terms = [min(math.exp(3 * a), 100.0) * p for a, p in zip(advantage.tolist(), log_prob.tolist(), strict=True)]
    assert advantage_weighted_loss(log_prob, advantage, 3.0).item() == pytest.approx(-sum(terms) / B, **TOLERANCE)
    advantage.requires_grad_()
    assert not advantage_weighted_loss(log_prob, advantage, 3.0).requires_grad


@pytest.mark.parametrize(("gap", "rises"), [(2.0, True), (0.1, False)])
def test_the_multiplier_rises_while_the_gap_is_above_its_target(gap, rises):
    raw = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    loss = multiplier_loss(raw, torch.tensor(gap, dtype=torch.float64), 0.8)
    assert loss.item() == pytest.approx(-math.log1p(math.exp(0.5)) * (gap - 0.8), **TOLERANCE)
    loss.backward()
    assert bool(raw.grad < 0) == rises


def test_returns_of_a_constant_reward():
    length, gamma, reward = 7, 0.9, 2.0
    ended = torch.zeros(2 * length)
    ended[length - 1] = 1
    returns = monte_carlo_returns(
        torch.full((2 * length,), reward, dtype=torch.float64), ended, torch.zeros(2 * length), gamma
    )
    expected = reward * (1 - gamma**length) / (1 - gamma)
    assert returns[0].item() == pytest.approx(expected, **TOLERANCE)  # it stops at the end of the episode,
    assert returns[length].item() == pytest.approx(expected, **TOLERANCE)  # and at the end of the data
    assert returns[length - 1].item() == reward


def test_an_episode_without_success_counts_as_one_for_ever():
    reward = torch.tensor([-5.0, -5, -5, -5, 5])
    truncated = torch.tensor([0.0, 0, 1, 0, 0])
    returns = monte_carlo_returns(reward, torch.tensor([0.0, 0, 0, 0, 1]), truncated, 0.99, failure=-5.0)
    assert returns[:3].tolist() == pytest.approx([-500.0] * 3)
    assert returns[3:].tolist() == pytest.approx([-5 + 0.99 * 5, 5.0])
    plain = monte_carlo_returns(reward, torch.tensor([0.0, 0, 0, 0, 1]), truncated, 0.99)
    assert plain[2].item() == -5.0  # cut off: nothing stands for what would have followed
