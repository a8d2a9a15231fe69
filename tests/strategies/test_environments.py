"""Agents from one environment to the next: fine-tuned, held by EWC, begun anew."""

import copy

import pytest
import torch
from agents import A, Loop, O, bits, model, offline, online, same

from clplat import UserError
from clplat.components.consolidation import policy_fisher
from clplat.components.transitions import TransitionMemory
from clplat.config import discovery
from clplat.strategies.bc import BC
from clplat.strategies.iql import IQL
from clplat.strategies.sac import SAC


def sac(**options):
    torch.manual_seed(0)
    return SAC(**{"model": model(), "batch": 4, "memory": 50, "lr": 0.01} | options)


def through(agent, steps=(12, 12)):
    """Environments one after the other; the actor's parameters at the end of each."""
    ends = []
    for index, count in enumerate(steps):
        agent.grow(online(index))
        agent.begin(online(index))
        loop = Loop(agent)
        torch.manual_seed(index)
        loop.act(count)
        agent.end(online(index))
        ends.append([p.detach().clone() for p in agent.model.backbone.actor.parameters()])
    return ends


def by_hand(actor, states):
    """One output of one state after the other, by autograd, in double precision."""
    actor, total = copy.deepcopy(actor).double(), None
    for state in states.double():
        mean, std = actor(state[None])
        for k in range(A):
            for output, weight in ((mean[0, k], 1 / std[0, k].detach() ** 2), (std[0, k].log(), 2.0)):
                grads = torch.autograd.grad(output, list(actor.parameters()), retain_graph=True, allow_unused=True)
                found = [weight * (torch.zeros_like(p) if g is None else g).square()
                         for g, p in zip(grads, actor.parameters(), strict=True)]  # fmt: skip
                total = found if total is None else [t + f for t, f in zip(total, found, strict=True)]
    return [t / len(states) for t in total]


@pytest.mark.parametrize("std", ["head", "shared"])
def test_fisher_of_the_policy_is_that_of_its_gaussian(std):
    agent = model(std=std)
    states = torch.randn(5, O, generator=torch.Generator().manual_seed(1))
    found = policy_fisher(copy.deepcopy(agent.backbone.actor).double(), states.double())
    for ours, theirs in zip(found.values(), by_hand(agent.backbone.actor, states), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)
    bias = found["heads.bias"]
    _, deviation = agent.backbone.actor(states)
    assert torch.allclose(bias[:A].float(), (1 / deviation**2).mean(0), rtol=1e-4)
    if std == "head":
        assert torch.allclose(bias[A:].float(), torch.full((A,), 2.0), rtol=1e-4)


def test_the_penalty_is_the_sum_of_all_environments_own():
    agent = sac(ewc_penalty=3.0)
    actor, terms = agent.model.backbone.actor, []
    agent.grow(online(0))
    for seed in range(3):
        states = torch.randn(6, O, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            for p in actor.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) / 10)
        agent.consolidation.add(actor, states)
        terms.append((policy_fisher(actor, states), {n: p.detach().clone() for n, p in actor.named_parameters()}))
    with torch.no_grad():
        for p in actor.parameters():
            p.add_(0.05)
    ours = torch.autograd.grad(agent._held(torch.zeros(())), list(actor.parameters()), retain_graph=True)
    for (name, p), gradient in zip(actor.named_parameters(), ours, strict=True):
        expected = sum(2 * 3.0 * fisher[name] * (p.detach() - centre[name]) for fisher, centre in terms)
        assert torch.allclose(gradient, expected, atol=1e-4, rtol=1e-4), name


def test_nothing_is_held_in_the_first_environment_and_the_policy_in_the_second():
    plain, held = through(sac()), through(sac(ewc_penalty=1e4))
    assert same(plain[0], held[0])
    moved = [sum(float((b - a).square().sum()) for a, b in zip(*ends, strict=True)) for ends in (plain, held)]
    assert moved[1] < moved[0]


def test_critics_step_without_the_penalty():
    """A step of the critics gives the actor no gradient: Adam would follow the penalty alone."""
    agent = sac(ewc_penalty=10.0, updates=3)
    through(agent, (8,))
    agent.grow(online(1))
    agent.begin(online(1))
    loop = Loop(agent)
    loop.act(10)
    assert (loop.critic_steps, loop.actor_steps) == (3 * 6, 6)


@pytest.mark.parametrize("cls", [BC, IQL])
def test_offline_agents_are_held_by_the_states_of_their_data(cls):
    torch.manual_seed(0)
    agent = cls(model=model(), ewc_penalty=2.0)
    experience = offline()
    agent.grow(experience)
    agent.begin(experience)
    agent.end(experience)
    penalty = agent.consolidation.penalty(agent.model.backbone.actor)
    assert penalty.item() == 0
    with torch.no_grad():
        for p in agent.model.backbone.actor.parameters():
            p.add_(0.1)
    t = agent._scaled(rows_of(agent, experience))
    agent.ewc_penalty = 0.0
    torch.manual_seed(1)
    without = agent._loss(t)
    agent.ewc_penalty = 2.0
    torch.manual_seed(1)
    difference = agent._loss(t) - without
    expected = 2 * agent.consolidation.penalty(agent.model.backbone.actor)
    assert expected > 0
    assert torch.allclose(difference, expected, rtol=1e-3)


def rows_of(agent, experience):
    from clplat.data.transitions import unpack

    return unpack(agent.training_data(experience).inputs, A)


def test_an_environment_in_which_nothing_was_done_holds_nothing():
    agent = sac(ewc_penalty=2.0)
    agent.grow(online(0))
    agent.begin(online(0))
    agent.end(online(0))
    assert all(not f.any() for f in agent.consolidation.importance.values.values())


def test_states_are_those_of_this_environment_where_the_memory_keeps_others():
    memory = TransitionMemory(10, A)
    memory.add(torch.arange(7.0)[:, None].expand(7, 3))
    memory.add(100 + torch.arange(6.0)[:, None].expand(6, 3))
    drawn = memory.sample(500, newest=6)[:, 0]
    assert set(drawn.tolist()) == {100.0 + i for i in range(6)}
    assert set(memory.sample(500, newest=50)[:, 0].tolist()) == {3.0, 4.0, 5.0, 6.0, *(100.0 + i for i in range(6))}


def test_restarted_an_environment_is_learned_as_the_first_one_would_be():
    again = sac(restart=True)
    ends = through(again)
    alone = sac()
    alone.grow(online(1))
    alone.begin(online(1))
    torch.manual_seed(1)
    Loop(alone).act(12)
    assert same(bits(alone), [p for n, p in again.model.named_parameters()])
    assert not same(*ends)
    assert not again.carries_optimizer
    assert len(again.memory) == 12


def test_a_restart_is_resumed_with_the_weights_to_go_back_to():
    first = sac(restart=True)
    through(first, (12,))
    second = SAC(model=model(seed=5), batch=4, memory=50, lr=0.01, restart=True)
    second.grow(online(0))
    second.load_state_dict(first.state_dict())
    for agent in (first, second):
        agent.grow(online(1))
        agent.begin(online(1))
    assert same(bits(first), bits(second))


@pytest.mark.parametrize("more", [{"ewc_penalty": 1.0}, {"keep_memory": True}])
def test_restart_keeps_nothing(more):
    with pytest.raises(UserError, match=r"strategy\.restart: true, but"):
        sac(restart=True, **more)


def test_a_penalty_below_zero_is_refused():
    with pytest.raises(UserError, match=r"strategy\.ewc_penalty: -1 is out of range"):
        sac(ewc_penalty=-1)


def test_every_agent_has_the_options():
    agents = [e for e in discovery.entries("strategies").values() if e.kinds == ("interact",)]
    assert len(agents) >= 8
    for entry in agents:
        assert {"keep_memory", "ewc_penalty", "restart"} <= {o.name for o in discovery.options(entry)}, entry.name


def test_a_rate_of_zero_is_none_given_and_refused():
    with pytest.raises(UserError, match=r"strategy\.actor_lr: 0\.0 is out of range"):
        sac(actor_lr=0.0)
    assert sac().rates == {"critic": 0.01, "actor": 0.01, "temperature": 0.01}
