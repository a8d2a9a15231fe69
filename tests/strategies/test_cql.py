import math

import pytest
import torch
from agents import A, Loop, O, model, offline, transitions

from clplat import UserError
from clplat.strategies.cal_ql import CalQL
from clplat.strategies.cql import CQL

n = 3


def cql(cls=CQL, **options):
    small = {"model": model(critics=3), "batch": 4, "memory": 50, "penalty_actions": n, "max_backup": 2, "penalty": 2.0}
    return cls(**small | options)


def gap(agent, t, seed=0):
    torch.manual_seed(seed)
    return agent._gap(t, t.observation, agent.model.q(t.observation, t.action))


def by_hand(agent, t, bound=None, seed=0):
    """The gap, state by state and critic by critic, with the actions that `_gap` draws."""
    torch.manual_seed(seed)
    uniform = 2 * torch.rand(len(t.reward), n, A) - 1
    here, log_here = agent.model.sample(t.observation, n)
    there, log_there = agent.model.sample(t.next_observation, n)
    critics, total = agent.model.backbone.valued.critics, 0.0
    for b in range(len(t.reward)):
        for i in range(3):

            def q(action, b=b, i=i):
                return critics(torch.cat([t.observation[b], action])[None])[i, 0].item()

            terms = [q(uniform[b, k]) - A * math.log(0.5) for k in range(n)]
            for actions, logs in ((here, log_here), (there, log_there)):
                for k in range(n):
                    value = q(actions[b, k]) if bound is None else max(q(actions[b, k]), bound[b].item())
                    terms.append(value - logs[b, k].item())
            top = max(terms)
            total += top + math.log(sum(math.exp(x - top) for x in terms)) - q(t.action[b])
    return total / (3 * len(t.reward))


def test_the_gap_by_hand():
    agent, t = cql(), transitions(6)
    assert gap(agent, t).item() == pytest.approx(by_hand(agent, t), abs=1e-4)


def test_the_bound_lifts_the_policys_actions_and_no_others():
    agent, t = cql(CalQL), transitions(6)
    bound = torch.tensor([-9.0, 0.0, 1.0, 2.0, 3.0, 9.0])
    found = gap(agent, t._replace(mc_return=bound))
    assert found.item() == pytest.approx(by_hand(agent, t, bound), abs=1e-4)


def test_an_episode_without_success_has_the_return_of_one_that_goes_on_for_ever():
    """Rewards of -1, scaled: of a sparse task that is failure; where a task is not sparse it is a sum like others."""
    experience = offline(10)
    experience.train.inputs[:5, O + A] = -1.0  # the first episode
    found = {}
    for failure in (None, -2.0):
        agent = cql(CalQL, gamma=0.5, reward_scale=2.0, failure_reward=failure)
        found[failure] = agent.training_data(experience).all()[0][:, -1]
    assert found[-2.0][:5].tolist() == [-4.0] * 5
    assert found[None][:5].tolist() == [-3.875, -3.75, -3.5, -3.0, -2.0]
    assert torch.equal(found[None][5:], found[-2.0][5:])


def test_without_returns_cal_ql_is_cql():
    t = transitions(6)._replace(mc_return=torch.full((6,), -torch.inf))
    assert torch.equal(gap(cql(CalQL), t), gap(cql(), t))


def test_where_all_was_reached_the_policys_actions_are_not_pushed():
    """Every policy action lies below its bound: the gradient is that of the uniform ones and the data."""
    agent, t = cql(CalQL, importance=False), transitions(6)._replace(mc_return=torch.full((6,), 1e4))
    critics = agent.model.groups()["critic"]
    found = torch.autograd.grad(gap(agent, t), critics)
    expected = torch.autograd.grad(-agent.model.q(t.observation, t.action).mean(), critics)
    for a, b in zip(found, expected, strict=True):  # the bound is so high that the uniform ones weigh nothing
        assert torch.allclose(a, b, atol=1e-6)


def test_the_penalty_lifts_the_data_over_other_actions():
    t, lifted = transitions(30), []
    for penalty in (0.0, 20.0):
        agent = cql(lr=0.01, penalty=penalty)
        loop, data = Loop(agent), agent.training_data(offline(30)).all()[0]
        for _ in range(60):
            loop.learn(data)
        torch.manual_seed(0)
        others = agent.model.q(t.observation, 2 * torch.rand(30, 20, A) - 1)
        lifted.append((agent.model.q(t.observation, t.action).mean() - others.mean()).item())
    assert lifted[1] > lifted[0]


def test_penalty_zero_leaves_the_td_error():
    agent, t = cql(penalty=0.0), transitions(6)
    torch.manual_seed(0)
    loss = agent._critic_loss(t)
    torch.manual_seed(0)
    y = agent._target(t)
    q = agent.model.q(t.observation, t.action)
    assert loss.item() == pytest.approx((q - y).square().mean().item(), abs=1e-6)


@pytest.mark.parametrize(("target", "rises"), [(-50.0, True), (50.0, False)])
def test_the_multiplier_follows_the_gap(target, rises):
    agent = cql(target_gap=target, lr=0.01)
    before = agent.multiplier.item()
    Loop(agent).learn(agent.training_data(offline(8)).all()[0])
    assert (agent.multiplier.item() > before) == rises


def test_the_multiplier_weighs_the_gap_and_learns_nothing_from_the_critics():
    agent, t = cql(target_gap=0.8), transitions(6)
    torch.manual_seed(0)
    loss = agent._critic_loss(t)
    torch.manual_seed(0)
    q = agent.model.q(t.observation, t.action)
    td = (q - agent._target(t)).square().mean()
    found = agent._gap(t, t.observation, q)
    assert loss.item() == pytest.approx((td + (found - 0.8) - (found - 0.8)).item(), abs=1e-5)  # softplus(λ) is 1
    gradient = torch.autograd.grad(loss, agent.multiplier)[0]
    sigmoid = 1 - math.exp(-1)  # of λ, where softplus(λ) = 1
    assert gradient.item() == pytest.approx(-sigmoid * (found.item() - 0.8), rel=1e-4)


def test_the_policy_gets_no_gradient_from_the_penalty():
    agent, t = cql(), transitions(6)
    gap(agent, t).backward()
    assert all(p.grad is None for p in agent.model.groups()["actor"])


def test_online_the_penalty_stays_and_each_step_moves_all():
    agent = cql(updates=2)
    loop = Loop(agent)
    loop.act(6)
    assert (loop.critic_steps, loop.actor_steps) == (4, 4)


@pytest.mark.parametrize(("options", "match"), [({"penalty": -1.0}, "penalty"), ({"penalty_actions": 0}, "actions")])
def test_bad_options_are_refused(options, match):
    with pytest.raises(UserError, match=match):
        cql(**options)
