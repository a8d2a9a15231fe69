import numpy as np
import pytest
import torch
from agents import (
    PIXELS,
    A,
    Loop,
    O,
    bits,
    encoder_gradients,
    model,
    offline,
    online,
    pixel_transitions,
    pixels,
    same,
    transitions,
)

from clplat import UserError
from clplat.backbones.base import Classifier
from clplat.backbones.heads import Linear
from clplat.backbones.mlp import mlp
from clplat.data.transitions import pack
from clplat.strategies.sac import SAC


def sac(**options):
    return SAC(**{"model": model(), "batch": 4, "memory": 50} | options)


def quiet(agent, mean=0.3):
    """Make the policy draw one action, whatever the observation."""
    actor = agent.model.backbone.actor
    for p in actor.parameters():
        p.data.zero_()
    actor.heads.bias.data[:A] = mean
    actor.heads.bias.data[A:] = -30.0
    return torch.full((A,), mean).tanh()


def test_target_by_hand():
    agent = sac(model=model(critics=3), entropy_backup=False, gamma=0.9, reward_scale=2.0, reward_bias=-1.0)
    action, t = quiet(agent), transitions(14)
    y = agent._target(agent._scaled(t))
    critics = agent.model.backbone.target.critics
    for b in range(14):
        inputs = torch.cat([t.next_observation[b], action])[None]
        least = min(critics(inputs)[i, 0].item() for i in range(3))
        expected = 2 * t.reward[b].item() - 1 + (0.0 if t.terminated[b] else 0.9 * least)
        assert y[b].item() == pytest.approx(expected, abs=1e-4)
    ended = t.terminated == 1
    assert ended.any()
    assert (t.truncated == 1).any()  # these bootstrap: the loop above has seen them
    assert torch.equal(y[ended], 2 * t.reward[ended] - 1)


def apart(agent, seed=3):
    """Give the slow copy weights of its own; at first they are those of the critics."""
    g = torch.Generator().manual_seed(seed)
    for p in agent.model.backbone.target.parameters():
        p.data += torch.randn(p.shape, generator=g)


def test_the_slow_copy_and_those_critics_that_were_drawn_make_the_target():
    agent, t = sac(model=model(critics=5), entropy_backup=False, target_members=2), transitions(6)
    apart(agent)
    torch.manual_seed(1)
    y = agent._target(t)
    torch.manual_seed(1)
    action, _ = agent.model.sample(t.next_observation)
    drawn = torch.randint(5, (2,))
    inputs = torch.cat([t.next_observation, action], 1)
    of_all = agent.model.backbone.target.critics(inputs)
    least = of_all[drawn].amin(0)
    assert not torch.equal(least, of_all.amin(0))  # others are lower somewhere
    assert torch.allclose(y, t.reward + 0.99 * (1 - t.terminated) * least, atol=1e-5)


def test_pixels_of_a_target_go_through_the_slow_copy_of_the_encoder():
    agent = SAC(model=pixels(), batch=4, memory=50, entropy_backup=False)
    apart(agent)
    t = pixel_transitions(4)
    torch.manual_seed(1)
    y = agent._target(t)
    torch.manual_seed(1)
    action, _ = agent.model.sample(agent.model.encode(t.next_observation))
    slow = agent.model.backbone.target
    seen = slow.encoder(t.next_observation.reshape(4, *PIXELS))
    value = slow.critics(torch.cat([seen, action], 1)).amin(0)
    assert torch.allclose(y, t.reward + 0.99 * (1 - t.terminated) * value, atol=1e-5)


def test_the_actors_loss_leaves_the_encoder_of_pixels_alone():
    agent = SAC(model=pixels(), batch=4, memory=50)
    agent._actor_loss(pixel_transitions(4)).backward()
    assert encoder_gradients(agent) == []
    assert all(p.grad is not None for p in agent.model.groups()["actor"])
    agent._critic_loss(pixel_transitions(4)).backward()
    assert encoder_gradients(agent)


def test_entropy_counts_in_the_target_where_it_is_asked_for():
    t = transitions(6)
    with_entropy, without = sac(), sac(entropy_backup=False)
    torch.manual_seed(1)
    a = with_entropy._target(t)
    torch.manual_seed(1)
    b = without._target(t)
    torch.manual_seed(1)
    _, log_prob = with_entropy.model.sample(t.next_observation)
    expected = -0.99 * (1 - t.terminated) * with_entropy.model.temperature * log_prob
    assert torch.allclose(a - b, expected, atol=1e-5)


def test_one_critic_makes_an_ordinary_target_and_both_of_two_the_lesser():
    t = transitions(6)
    for options in ({"target_members": None}, {"target_members": 1}):
        agent = sac(model=model(critics=1), **options)
        torch.manual_seed(1)
        y = agent._target(t)
        torch.manual_seed(1)
        action, log_prob = agent.model.sample(t.next_observation)
        q = agent.model.q(t.next_observation, action, target=True)[0]
        assert torch.allclose(y, t.reward + 0.99 * (1 - t.terminated) * (q - agent.model.temperature * log_prob))


def test_the_best_of_several_actions_counts():
    agent = sac(model=model(critics=3), entropy_backup=False, max_backup=5)
    t = transitions(6)
    torch.manual_seed(1)
    y = agent._target(t)
    torch.manual_seed(1)
    actions, _ = agent.model.sample(t.next_observation, 5)
    best = agent.model.q(t.next_observation, actions, target=True).amin(0).amax(1)
    assert torch.allclose(y, t.reward + 0.99 * (1 - t.terminated) * best)


def test_a_subset_of_critics_is_asked_anew_each_time():
    agent = sac(model=model(critics=6), target_members=2)
    drawn = [tuple(agent._members().tolist()) for _ in range(50)]
    assert all(len(d) == 2 for d in drawn)
    assert len(set(drawn)) > 10
    assert any(a == b for a, b in drawn)  # with replacement


def test_critics_learn_before_the_actor_and_each_alone():
    agent = sac(updates=3)
    loop = Loop(agent)
    loop.act(4)
    before = {name: [p.clone() for p in ps] for name, ps in agent.model.groups().items()}
    assert loop.critic_steps == loop.actor_steps == 0
    loop.act(1)
    assert (loop.critic_steps, loop.actor_steps) == (3, 1)
    for name, ps in agent.model.groups().items():
        assert any(not torch.equal(a, b) for a, b in zip(before[name], ps, strict=True)), name
    loop.act(6)
    assert (loop.critic_steps, loop.actor_steps) == (3 * 7, 7)


def test_one_draw_is_split_into_the_batches_of_the_critics():
    """U · B transitions are drawn once; each critic step takes its own B of them, the actor's all."""
    agent = sac(updates=3)
    loop = Loop(agent)
    loop.act(5)
    draws, batches = [], []
    agent._draw = lambda n, inner=agent._draw: (draws.append(rows := inner(n)), rows)[1]
    agent._critic_loss = lambda t, inner=agent._critic_loss: (batches.append(t.reward), inner(t))[1]
    agent._actor_loss = lambda t, inner=agent._actor_loss: (batches.append(t.reward), inner(t))[1]
    for index in range(4):
        loop.learn(None, index)
    (rows,) = draws
    reward = rows[:, O + A]
    assert [b.tolist() for b in batches] == [*(part.tolist() for part in reward.split(4)), reward.tolist()]


def test_the_actors_step_takes_all_batches_and_leaves_the_critics():
    agent = sac(updates=2)
    loop, seen = Loop(agent), []
    agent._actor_loss = lambda t, inner=agent._actor_loss: (seen.append(len(t.reward)), inner(t))[1]
    loop.act(5)
    assert seen == [2 * 4]
    critics = [p.clone() for p in agent.model.groups()["critic"]]
    loop.learn(None, 2)
    assert same(critics, list(agent.model.groups()["critic"]))


def test_the_slow_copy_moves_after_critic_steps_alone():
    agent = sac(polyak=1.0)
    loop = Loop(agent)
    loop.act(5)
    target, own = agent.model.backbone.target, agent.model.backbone.valued
    assert same(list(target.parameters()), list(own.parameters()))
    agent.model.follow = lambda rate: pytest.fail("it moved after the actor's step")
    loop.learn(None, 1)


def test_first_steps_are_random_and_nothing_is_learned():
    agent = sac(random_steps=6)
    quiet(agent)
    loop, before = Loop(agent), bits(agent)
    loop.act(6)
    assert same(before, bits(agent))
    actions = agent.memory.stored["rows"][:6, O : O + A]
    assert len(actions.unique()) == 6 * A  # though the policy has one action
    assert (actions.abs() <= 1).all()
    assert np.allclose(agent.act(np.zeros(O), True), np.tanh(0.3), atol=1e-3)  # from here on it acts
    loop.act(1)
    assert loop.actor_steps == 1


def test_acting_takes_one_observation_or_several():
    agent = sac()
    one, several = agent.act(np.zeros(O), False), agent.act(np.zeros((5, O)), False)
    assert one.shape == (A,)
    assert several.shape == (5, A)
    assert np.allclose(several, one, atol=1e-6)
    assert not np.allclose(agent.act(np.zeros(O), True), one)


@pytest.mark.parametrize("keep", [True, False])
def test_the_memory_starts_empty_in_a_new_environment_unless_it_is_kept(keep):
    agent = sac(keep_memory=keep)
    agent.begin(online(0))
    Loop(agent).act(3)
    agent.begin(online(1))
    assert len(agent.memory) == (3 if keep else 0)
    assert agent.observed == 0


def test_offline_steps_move_all_at_once_from_the_data():
    agent = sac()
    experience = offline()
    agent.begin(experience)
    loop, data = Loop(agent), agent.training_data(experience)
    loop.learn(data.all()[0][:8])
    assert (loop.critic_steps, loop.actor_steps) == (1, 1)
    assert len(agent.offline_data) == 0


def test_half_of_each_batch_comes_from_the_data_where_they_are_retained():
    agent = sac(retain=0.5, updates=3)
    experience = offline()
    agent.begin(experience)
    Loop(agent).act(4)
    rows = agent._draw(3)
    of_data = {tuple(r) for r in experience.train.inputs[:, :O].tolist()}
    origin = [tuple(r) in of_data for r in rows[:, :O].tolist()]
    assert origin == [True, True, False, False] * 3


def test_probing_leaves_the_generator_and_the_learner_alone():
    agent = sac()
    t, before, state = transitions(10), bits(agent), torch.get_rng_state()
    found = agent.probe(t)
    assert found["q"].shape == found["td_error"].shape == (10,)
    assert (found["td_error"] >= 0).all()
    assert torch.equal(state, torch.get_rng_state())
    assert same(before, bits(agent))
    assert torch.equal(found["td_error"], agent.probe(t)["td_error"])


def test_returns_are_in_the_units_of_training():
    agent = sac(gamma=0.5, reward_scale=2.0, reward_bias=1.0)
    rows = agent.training_data(offline(7)).all()[0]
    r = 2 * transitions(7).reward + 1
    assert rows[6, -1].item() == pytest.approx(r[6].item(), rel=1e-5)
    assert rows[5, -1].item() == pytest.approx((r[5] + 0.5 * r[6]).item(), rel=1e-5)
    assert rows[4, -1].item() == pytest.approx(r[4].item(), rel=1e-5)  # the first episode was cut off here


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"gamma": 1.0}, "strategy.gamma: 1.0"),
        ({"retain": 1.0}, "strategy.retain"),
        ({"target_members": 3}, "strategy.target_members: 3 .*1 to 2"),
        ({"actor_lr": -1.0}, "strategy.actor_lr"),
        ({"updates": 0}, "strategy.updates"),
        ({"model": Classifier(mlp((O,), [4]), Linear(4, 2))}, "valid: backbone actor_critic"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(UserError, match=match):
        sac(**options)


def test_one_update_is_that_of_stable_baselines3():
    """Critics, slow copies and actor after one update from equal weights, on one batch, with equal noise."""
    gymnasium = pytest.importorskip("gymnasium", reason="needs the extra rl")
    sb3 = pytest.importorskip("stable_baselines3", reason="needs the development group")
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    env = gymnasium.make("Pendulum-v1")
    options = {"net_arch": [8, 8]}
    theirs = sb3.SAC("MlpPolicy", env, ent_coef=0.2, learning_rate=1e-3, policy_kwargs=options, device="cpu", seed=0)
    theirs.set_logger(Logger(None, []))
    from clplat.backbones.actor_critic import actor_critic
    from clplat.stream import Actions

    backbone = actor_critic((3,), [8, 8], [8, 8], critics=2, layer_norm=False, temperature=0.2)
    mine = SAC(model=backbone.assemble(None, Actions(1)), lr=1e-3, batch=16)
    _copy(theirs, mine.model.backbone)
    g = torch.Generator().manual_seed(0)
    seen, following = torch.randn(16, 3, generator=g), torch.randn(16, 3, generator=g)
    action, reward = 2 * torch.rand(16, 1, generator=g) - 1, torch.randn(16, generator=g)
    ended = (torch.arange(16) % 5 == 0).float()
    batch = ReplayBufferSamples(seen, action, following, ended[:, None], reward[:, None])
    theirs.replay_buffer.sample = lambda *args, **kwargs: batch
    noise = torch.randn(2, 16, 1, generator=g)
    draws = iter([noise[0], noise[1]])  # theirs asks for the actor's action first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributions.Normal, "rsample", lambda d, shape=(): d.mean + d.stddev * next(draws))
        theirs.train(gradient_steps=1, batch_size=16)
        draws = iter([noise[1], noise[0]])
        patch.setattr(torch, "randn_like", lambda t: next(draws))
        from clplat.data.transitions import Transitions

        zeros = torch.zeros(16)
        mine.memory.add(pack(Transitions(seen, action, reward, following, ended, zeros, zeros)))
        patch.setattr(type(mine.memory), "sample", lambda memory, n: memory.stored["rows"][:16])
        loop = Loop(mine)
        loop.learn(None, 0)
        loop.learn(None, 1)
    other = SAC(model=actor_critic((3,), [8, 8], [8, 8], layer_norm=False).assemble(None, Actions(1)))
    _copy(theirs, other.model.backbone)
    for part in ("actor", "valued", "target"):
        for (name, a), (_, b) in zip(
            getattr(mine.model.backbone, part).named_parameters(),
            getattr(other.model.backbone, part).named_parameters(),
            strict=True,
        ):
            assert torch.allclose(a, b, atol=2e-5), f"{part}.{name}"


def _copy(theirs, backbone):
    """Their weights into ours."""
    actor = theirs.actor
    pairs = [(backbone.actor.trunk[i][0], actor.latent_pi[2 * i]) for i in range(2)]
    for own, other in pairs:
        own.load_state_dict(other.state_dict())
    for name in ("weight", "bias"):
        theirs_both = [getattr(layer, name).data for layer in (actor.mu, actor.log_std)]
        getattr(backbone.actor.heads, name).data.copy_(torch.cat(theirs_both))
    for own, other in ((backbone.valued.critics, theirs.critic), (backbone.target.critics, theirs.critic_target)):
        for i, net in enumerate((other.qf0, other.qf1)):
            for layer in range(3):
                own.weights[layer].data[i] = net[2 * layer].weight.data.T
                own.biases[layer].data[i, 0] = net[2 * layer].bias.data
