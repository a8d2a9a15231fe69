import math

import pytest
import torch
from agents import Loop, encoder_gradients, model, offline, pixel_transitions, pixels, transitions

from clplat import UserError
from clplat.strategies.iql import IQL


def iql(**options):
    return IQL(**{"model": model(), "batch": 4, "memory": 50, "value_hidden": [6], "expectile": 0.8} | options)


def test_loss_by_hand():
    agent, t = iql(inverse_temperature=0.5, gamma=0.9), transitions(9)
    for p in agent.model.backbone.target.parameters():
        p.data += 0.1  # so that the slow copy differs
    m, total = agent.model, 0.0
    for b in range(9):
        seen, action = t.observation[b : b + 1], t.action[b : b + 1]
        held = min(m.q(seen, action, target=True)[:, 0].tolist())
        value, following = (agent.value(x)[0, 0].item() for x in (seen, t.next_observation[b : b + 1]))
        u = held - value
        total += (0.8 if u >= 0 else 0.2) * u * u
        y = t.reward[b].item() + (0 if t.terminated[b] else 0.9 * following)
        total += sum((q - y) ** 2 for q in m.q(seen, action)[:, 0].tolist()) / 2
        total -= min(math.exp(0.5 * u), 100) * m.log_prob(seen, action).item()
    assert agent._loss(t).item() == pytest.approx(total / 9, rel=1e-4)


def test_each_network_learns_from_its_own_loss_and_no_other_action_is_asked_for():
    agent, t = iql(), transitions(9)
    agent.model.sample = lambda *args: pytest.fail("an action was drawn")
    agent._loss(t).backward()
    critic, actor, temperature = (agent.model.groups()[k] for k in ("critic", "actor", "temperature"))
    assert all(p.grad is not None for p in [*critic, *actor, *agent.value.parameters()])
    assert temperature[0].grad is None
    assert all(p.grad is None for p in agent.model.backbone.target.parameters())


def test_an_encoder_of_pixels_learns_from_the_critics_alone():
    """Its gradient is that of the critics' loss: nothing comes from the value net or the policy."""
    agent, t = iql(model=pixels(), gamma=0.0), pixel_transitions(5)
    agent._loss(t).backward()
    found = encoder_gradients(agent)
    agent.zero_grad()
    (agent.model.q(agent.model.encode(t.observation), t.action) - t.reward).square().mean().backward()
    for a, b in zip(found, encoder_gradients(agent), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_weight_zero_of_advantages_is_behaviour_cloning():
    agent, t = iql(inverse_temperature=0.0), transitions(9)
    agent._loss(t).backward()
    found = [p.grad.clone() for p in agent.model.groups()["actor"]]
    agent.zero_grad()
    (-agent.model.log_prob(t.observation, t.action).mean()).backward()
    for a, p in zip(found, agent.model.groups()["actor"], strict=True):
        assert torch.allclose(a, p.grad, atol=1e-6)


def test_the_value_net_is_trained_too():
    agent = iql()
    before = [p.clone() for p in agent.value.parameters()]
    Loop(agent).learn(agent.training_data(offline(8)).all()[0])
    assert any(not torch.equal(a, b) for a, b in zip(before, agent.value.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "match"),
    [({"expectile": 1.0}, "strategy.expectile"), ({"inverse_temperature": -1.0}, "strategy.inverse"),
     ({"value_hidden": [0]}, "strategy.value_hidden")],
)  # fmt: skip
def test_bad_options_are_refused(options, match):
    with pytest.raises(UserError, match=match):
        iql(**options)
