import pytest
import torch
from agents import Loop, bits, encoder_gradients, model, offline, pixel_transitions, pixels, same, transitions

from clplat.strategies.bc import BC


def test_loss_is_the_negative_log_likelihood_and_moves_the_actor_alone():
    agent, t = BC(model=model()), transitions(8)
    loss = agent._loss(t)
    by_hand = [-agent.model.log_prob(t.observation[b : b + 1], t.action[b : b + 1]).item() for b in range(8)]
    assert loss.item() == pytest.approx(sum(by_hand) / 8, rel=1e-5)
    loss.backward()
    groups = agent.model.groups()
    assert all(p.grad is not None for p in groups["actor"])
    assert all(p.grad is None for p in [*groups["critic"], *groups["temperature"]])


def test_it_comes_to_imitate():
    agent = BC(model=model(), lr=0.01)
    rows = agent.training_data(offline(30)).all()[0]
    rows[:, 3:5] = rows[:, :2].tanh()  # an action that the observation tells
    loop = Loop(agent)
    for _ in range(400):
        loop.learn(rows)
    found = agent.model(rows[:, :3])
    assert (found - rows[:, 3:5]).abs().mean() < 0.5 * rows[:, 3:5].abs().mean()


def test_in_the_environment_it_only_acts():
    agent = BC(model=model())
    loop, before = Loop(agent), bits(agent)
    assert loop.act(5) == []
    assert same(before, bits(agent))
    assert len(agent.memory) == 0
    assert torch.equal(torch.tensor(agent.observed), torch.tensor(0))


def test_it_leaves_an_encoder_of_pixels_alone():
    agent = BC(model=pixels())
    agent._loss(pixel_transitions(4)).backward()
    assert encoder_gradients(agent) == []
