import torch
from agents import Loop, model, transitions

from clplat.strategies.redq import REDQ
from clplat.strategies.sac import SAC


def redq(cls=REDQ, **options):
    return cls(**{"model": model(critics=5), "batch": 4, "memory": 50, "updates": 3, "target_members": 2} | options)


def test_targets_ask_different_critics_each_time():
    agent = redq()
    drawn = {tuple(sorted(agent._members().tolist())) for _ in range(200)}
    assert len(drawn) == 10  # all pairs of five, and none of twice the same


def test_the_actor_climbs_the_mean_of_the_critics():
    q = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    assert redq()._pool(q).tolist() == [2.0, 1.0]
    assert redq(SAC)._pool(q).tolist() == [1.0, 0.0]
    agent, t = redq(), transitions(6)
    torch.manual_seed(0)
    loss = agent._actor_loss(t)
    torch.manual_seed(0)
    action, log_prob = agent.model.sample(t.observation)
    alpha = agent.model.temperature
    expected = (alpha * log_prob - agent.model.q(t.observation, action).mean(0)).mean()
    expected = expected + alpha * (-log_prob.mean() - agent.target_entropy)
    assert torch.allclose(loss, expected, atol=1e-5)


def test_all_critics_with_one_update_differ_from_sac_in_the_actor_alone():
    t, losses = transitions(6), []
    for cls in (REDQ, SAC):
        agent = redq(cls, target_members=None)
        torch.manual_seed(0)
        losses.append(agent._critic_loss(t).item())
    assert losses[0] == losses[1]


def test_many_updates_for_each_step():
    agent = redq()
    loop = Loop(agent)
    loop.act(6)
    assert (loop.critic_steps, loop.actor_steps) == (6, 2)
