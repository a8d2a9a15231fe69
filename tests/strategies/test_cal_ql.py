"""The bound itself is tested beside CQL's gap, in test_cql.py."""

import pytest
import torch
from agents import Loop, model, offline

from clplat.strategies.cal_ql import CalQL
from clplat.strategies.cql import CQL


def agent(cls=CalQL, **options):
    torch.manual_seed(0)
    return cls(model=model(), batch=4, memory=50, penalty_actions=2, max_backup=2, gamma=0.9, **options)


def test_offline_steps_see_the_returns_of_the_data():
    """The same batch moves CQL's critics elsewhere, and returns of minus infinity move them alike."""
    ends = []
    for cls, returns in ((CalQL, None), (CalQL, -torch.inf), (CQL, None)):
        strategy = agent(cls, reward_bias=5.0)  # returns that lie above the first values
        rows = strategy.training_data(offline()).all()[0].clone()
        if returns is not None:
            rows[:, -1] = returns
        torch.manual_seed(0)
        Loop(strategy).learn(rows)
        ends.append(strategy.model.backbone.valued.critics.weights[0].detach())
    assert not torch.equal(ends[0], ends[2])
    assert torch.equal(ends[1], ends[2])


def test_an_episode_of_failures_counts_as_one_for_ever():
    experience = offline(10)
    experience.train.inputs[:5, 5] = 0.0  # the rewards of the first episode, of 3 + 2 numbers before them
    strategy = agent(reward_scale=10.0, reward_bias=-5.0, failure_reward=-5.0)
    returns = strategy.training_data(experience).all()[0][:, -1]
    assert returns[:5].tolist() == pytest.approx([-50.0] * 5)
    assert returns[5].item() != pytest.approx(-50.0)


def test_what_the_environment_gives_bounds_nothing():
    strategy = agent()
    Loop(strategy).act(3)
    assert strategy.memory.stored["rows"][:3, -1].isneginf().all()
