from copy import deepcopy

import numpy as np
import pytest
import torch
from agents import A, Loop, O, bits, model, offline, online, same, transitions

from clplat import Experience, Kind, UserError
from clplat.components.reinforcement import critic_loss
from clplat.strategies.cal_ql import CalQL
from clplat.strategies.cql import CQL
from clplat.strategies.rlpd import RLPD
from clplat.strategies.sac import SAC
from clplat.strategies.wsrl import WSRL

K, U = 9, 3


def wsrl(cls=WSRL, **options):
    small = {"model": model(critics=4), "batch": 4, "memory": 100, "penalty_actions": 2, "max_backup": 2, "updates": U}
    small |= {"warmup_steps": K} if cls is WSRL else {}
    return cls(**small | options)


def pretrained(**options):
    """WSRL and its loop after five offline steps, at the switch."""
    agent = wsrl(**options)
    experience = offline()
    agent.begin(experience)
    loop, rows = Loop(agent), agent.training_data(experience).all()[0]
    for k in range(5):
        loop.learn(rows[8 * k : 8 * k + 8], k)
    loop.critic_steps = loop.actor_steps = 0
    return agent, loop, experience


def test_nothing_moves_in_the_warm_up_and_every_step_is_stored():
    agent, loop, _ = pretrained()
    before, drawn = bits(agent, loop.optimizer), []
    agent.model.draw = lambda *args, inner=agent.model.draw: (drawn.append(1), inner(*args))[1]
    loop.act(K)
    assert same(before, bits(agent, loop.optimizer))
    assert len(agent.memory) == K
    assert len(drawn) == K  # actions come from the policy's samples
    loop.act(1)
    assert not same(before, bits(agent, loop.optimizer))


def test_u_critic_steps_and_one_of_the_actor_for_each_step_after_the_warm_up():
    _agent, loop, _ = pretrained()
    loop.act(K + 5)
    assert (loop.critic_steps, loop.actor_steps) == (U * 5, 5)


def test_updates_wait_for_one_batch_at_least():
    _agent, loop, _ = pretrained(warmup_steps=0)
    loop.act(4)
    assert loop.critic_steps == 0
    loop.act(1)
    assert (loop.critic_steps, loop.actor_steps) == (U, 1)


def test_after_the_switch_the_loss_is_the_td_error_alone():
    agent, loop, _ = pretrained()
    t = transitions(8)
    torch.manual_seed(2)
    before = agent._critic_loss(t)
    loop.act(K)
    torch.manual_seed(2)
    (after,) = (agent._critic_loss(t),)
    torch.manual_seed(2)
    plain = critic_loss(agent.model.q(t.observation, t.action), agent._target(t))
    assert after.item() == pytest.approx(plain.item(), abs=1e-6)
    assert before.item() != pytest.approx(after.item(), abs=1e-3)  # the weights are the same: the penalty is gone


def test_poisoned_offline_data_change_nothing_after_the_switch():
    runs = []
    for poison in (False, True):
        agent, loop, experience = pretrained()
        if poison:
            experience.train.inputs.fill_(float("nan"))
        torch.manual_seed(5)
        losses = loop.act(K + 4)
        assert all(x.isfinite() for x in losses)
        runs.append(bits(agent, loop.optimizer))
    assert same(*runs)


def test_networks_temperature_and_optimizer_go_on_and_the_memory_starts_empty():
    agent, loop, _ = pretrained()
    before = bits(agent, loop.optimizer)
    agent.begin(online())
    assert same(before, bits(agent, loop.optimizer))
    assert len(agent.memory) == len(agent.offline_data) == 0
    assert agent.carries_optimizer


def test_without_warm_up_and_data_it_is_plain_fine_tuning():
    """The online part of WSRL with K = 0, all critics in a target and no offline data is SAC's, bit for bit."""
    ends, plain = [], {"batch": 4, "memory": 100, "updates": U, "entropy_backup": False}
    for make in (lambda: wsrl(warmup_steps=0, target_members=None), lambda: SAC(model=model(critics=4), **plain)):
        agent = make()
        agent.learned_offline = 1
        agent.begin(online())
        torch.manual_seed(0)
        loop = Loop(agent)
        loop.act(9)
        ends.append(bits(agent, loop.optimizer))
    assert same(*ends)


def test_with_half_the_data_and_no_training_before_its_critics_step_as_rlpds():
    losses = []
    for cls, options in ((WSRL, {"retain": 0.5}), (RLPD, {})):
        more = {} if cls is WSRL else {"random_steps": K, "entropy_backup": False}
        shared = {"model": model(critics=4), "batch": 4, "memory": 100, "updates": U, "target_members": None}
        agent = cls(**shared | options | more | ({"warmup_steps": K} if cls is WSRL else {}))
        agent.begin(offline())
        agent.observed = K
        agent.memory.add(agent.offline_data.stored["rows"][:6] + 1)
        torch.manual_seed(7)
        losses.append(agent.training_step(None, 0).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_random_actions_for_warm_up_are_a_control():
    agent, loop, _ = pretrained(warmup_actions="random")
    actor = agent.model.backbone.actor
    for p in actor.parameters():
        p.data.zero_()
    actor.heads.bias.data[A:] = -30.0
    loop.act(K)
    stored = agent.memory.stored["rows"][:K, O : O + A]
    assert stored.std() > 0.2  # though the policy has one action
    assert np.abs(agent.act(np.zeros(O), True)).max() < 1e-3


def test_fewer_actions_may_be_drawn_for_targets_after_the_switch():
    agent, _loop, _ = pretrained(max_backup=6, online_max_backup=1)
    drawn = []
    agent.model.sample = lambda e, n=None, inner=agent.model.sample: (drawn.append(n), inner(e, n))[1]
    agent._target(transitions(4))
    agent.observed = 1
    agent._target(transitions(4))
    assert drawn == [6, None]


def test_cql_and_cal_ql_are_its_offline_phases():
    t = transitions(8)._replace(mc_return=torch.full((8,), 50.0))
    values = []
    for cls, options in ((WSRL, {"offline": "cql"}), (CQL, {}), (WSRL, {}), (CalQL, {})):
        agent = wsrl(cls, **options, **({} if cls is WSRL else {"target_members": 2}))
        torch.manual_seed(3)
        values.append(agent._critic_loss(t).item())
    assert values[0] == values[1]
    assert values[2] == values[3]
    assert values[0] != values[2]


@pytest.mark.parametrize(
    ("sequence", "started", "restart", "lacking"),
    [
        ([online()], False, False, "online"),
        ([offline(), online()], False, False, None),  # the second goes on from the first
        ([online(), offline()], False, False, "online"),
        ([offline(), online()], False, True, "online, which it begins anew (strategy.restart)"),
        ([offline(), offline()], False, True, None),
        ([online(), online()], True, True, None),
        ([online()], True, False, None),
    ],
)
def test_without_an_offline_phase_it_is_refused(sequence, started, restart, lacking):
    (*found,) = wsrl(restart=restart).faults(sequence, started)
    assert len(found) == (lacking is not None)
    assert all(f"nothing to start from in {lacking}: no offline data" in line for line in found)


def test_an_offline_phase_without_a_step_is_refused_and_anew_after_a_restart():
    agent = wsrl()
    agent.begin(offline())
    with pytest.raises(UserError, match=r"loop.max_epochs, loop.max_steps: no step was taken"):
        agent.handover(offline(), 0.0, None)
    for started in (False, True):
        agent = wsrl(restart=True)
        agent.grow(offline())
        if started:
            agent.before_start({})
        agent.begin(offline())
        agent.learned_offline += 5
        agent.begin(offline())
        assert agent.learned_offline == started


@pytest.mark.parametrize(("score", "warns"), [(-1200.0, True), (-1110.0, True), (-1000.0, False)])
def test_a_policy_no_better_than_random_is_told_of(score, warns):
    agent, _, _ = pretrained()
    experience = Experience(1, "pendulum", Kind.INTERACT, None, return_bounds=(-1200.0, -200.0))
    lines = agent.handover(experience, score, -1200.0)
    assert len(lines) == warns
    assert all("hardly more than random actions (-1200)" in line for line in lines)


@pytest.mark.parametrize("steps", [4, K + 3])
def test_it_goes_on_where_it_was_saved(steps):
    """In the warm-up, and after it: the next updates are the same, bit for bit."""
    agent, loop, _ = pretrained()
    loop.act(steps)
    saved = {k: v.clone() if torch.is_tensor(v) else v for k, v in agent.state_dict().items()}
    moments = deepcopy(loop.optimizer.state_dict())
    other = wsrl()
    other.load_state_dict(saved)
    second = Loop(other)
    second.optimizer.load_state_dict(moments)
    second.generator, second.at = np.random.default_rng(1), loop.at
    loop.generator = np.random.default_rng(1)
    for each in (loop, second):
        torch.manual_seed(11)
        each.act(10)
    assert same(bits(agent, loop.optimizer), bits(other, second.optimizer))
    assert agent.observed == other.observed
    assert other.learned_offline == agent.learned_offline == 5
    assert other.started == agent.started


@pytest.mark.parametrize(
    ("options", "match"),
    [({"warmup_steps": -1}, "strategy.warmup_steps"), ({"offline": "td3"}, "strategy.offline"),
     ({"online_max_backup": 0}, "strategy.online_max_backup")],
)  # fmt: skip
def test_bad_options_are_refused(options, match):
    with pytest.raises(UserError, match=match):
        wsrl(**options)
