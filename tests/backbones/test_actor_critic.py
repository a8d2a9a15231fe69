import math

import pytest
import torch
import torch.nn.functional as F

from clplat.backbones.actor_critic import Critics, actor_critic, log_density
from clplat.errors import UserError
from clplat.stream import Actions

O, A = 3, 2


def agent(shape=(O,), actions=A, seed=0, **options):
    torch.manual_seed(seed)
    options = {"actor_hidden": [8], "critic_hidden": [8, 8]} | options
    return actor_critic(shape, **options).assemble(None, Actions(actions))


@pytest.mark.parametrize("layer_norm", [True, False])
def test_the_ensemble_is_its_members_one_by_one(layer_norm):
    torch.manual_seed(0)
    critics = Critics(5, [7, 6], members=3, layer_norm=layer_norm).double()
    for p in critics.parameters():
        p.data = torch.randn_like(p)
    x = torch.randn(4, 5, dtype=torch.float64)
    values = critics(x)
    for i in range(3):
        h = x
        for layer in range(2):
            h = h @ critics.weights[layer][i] + critics.biases[layer][i]
            if layer_norm:
                centred = h - h.mean(1, keepdim=True)
                h = (
                    centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
                )  # Flax's, as published; torch's is 1e-5
                h = h * critics.gains[layer][i] + critics.shifts[layer][i]
            h = h.clamp(min=0)
        alone = (h @ critics.weights[2][i] + critics.biases[2][i])[:, 0]
        assert torch.allclose(values[i], alone, atol=1e-9, rtol=1e-9)
    some = torch.tensor([2, 0, 2])
    assert torch.allclose(critics(x, some), values[some], atol=1e-12)


def test_values_of_normalised_critics_are_bounded_however_far_the_input():
    torch.manual_seed(0)
    critics = Critics(4, [16], members=2)
    far = 1e6 * torch.randn(50, 4)
    out, bias = critics.weights[-1], critics.biases[-1]
    bound = out.norm(dim=1) * math.sqrt(16) + bias[:, 0].abs()  # (N, 1)
    assert (critics(far).abs() <= bound * (1 + 1e-5)).all()
    assert (Critics(4, [16], members=2, layer_norm=False)(far).abs() > bound).any()


def test_hidden_layers_are_normalised_before_their_gain():
    torch.manual_seed(0)
    seen = []
    critics = Critics(4, [32], members=2)
    norm = F.layer_norm

    def watched(*args, **options):
        seen.append(norm(*args, **options))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "layer_norm", watched)
        critics(torch.randn(10, 4))
    assert len(seen) == 1
    assert torch.allclose(seen[0].mean(-1), torch.zeros(2, 10), atol=1e-5)
    assert torch.allclose(seen[0].var(-1, unbiased=False), torch.ones(2, 10), atol=1e-3)


def test_log_density_integrates_to_one():
    actions = torch.linspace(-1, 1, 200_003, dtype=torch.float64)[1:-1]
    u = actions.atanh().unsqueeze(1)
    for mean, std in ((0.0, 1.0), (0.7, 0.4)):
        density = log_density((u - mean) / std, u, torch.full((1,), std, dtype=torch.float64)).exp()
        assert torch.trapezoid(density, actions).item() == pytest.approx(1, abs=1e-3)


def test_log_density_agrees_with_torch_distributions():
    torch.manual_seed(0)
    u, mean, std = torch.randn(5, A).double(), torch.randn(5, A).double(), torch.rand(5, A).double() + 0.1
    normal = torch.distributions.Normal(mean, std)
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    assert torch.allclose(log_density((u - mean) / std, u, std), squashed.log_prob(u.tanh()).sum(1), atol=1e-9)


def test_the_slow_copy_follows():
    model = agent()
    target, own = model.backbone.target, model.backbone.valued
    before = [p.clone() for p in target.parameters()]
    for p in own.parameters():
        p.data += 1
    model.follow(0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, target.parameters(), strict=True))
    model.follow(0.25)
    for old, new, source in zip(before, target.parameters(), own.parameters(), strict=True):
        assert torch.allclose(new, 0.75 * old + 0.25 * source, atol=1e-6)
    model.follow(1.0)
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), target.parameters(), strict=True))
    assert not any(p.requires_grad for p in target.parameters())


def test_frozen_critics_pass_the_gradient_to_the_action_alone():
    model = agent()
    action = torch.zeros(4, A, requires_grad=True)
    model.q(torch.randn(4, O), action, frozen=True).sum().backward()
    assert action.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


def test_several_actions_of_an_observation_are_scored_as_one_by_one():
    model = agent(critics=3)
    seen, actions = torch.randn(4, O), torch.randn(4, 5, A)
    values = model.q(seen, actions)
    assert values.shape == (3, 4, 5)
    for k in range(5):
        assert torch.allclose(values[..., k], model.q(seen, actions[:, k]), atol=1e-6)
    drawn, log_prob = model.sample(seen, 6)
    assert drawn.shape == (4, 6, A)
    assert log_prob.shape == (4, 6)
    assert not torch.equal(drawn[:, 0], drawn[:, 1])


def test_the_density_of_a_drawn_action_is_that_of_asking_for_it():
    model = agent().double()
    seen = torch.randn(5, O, dtype=torch.float64)
    action, log_prob = model.sample(seen)
    assert torch.allclose(model.log_prob(seen, action), log_prob, atol=1e-6)
    assert model.log_prob(seen, torch.ones(5, A, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("encoder", ["cnn", "vit"])
def test_an_encoder_of_pixels_learns_from_the_critics_alone(encoder):
    model = agent((3, 16, 16), encoder=encoder, encoder_width=8, features=10)
    seen = torch.rand(4, 3, 16, 16)
    assert model(seen).shape == (4, A)
    model(seen).sum().backward()
    encoder_parameters = list(model.backbone.valued.encoder.parameters())
    assert encoder_parameters
    assert all(p.grad is None for p in encoder_parameters)
    model.q(model.encode(seen.flatten(1)), torch.zeros(4, A)).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder_parameters)


def test_temperature_starts_where_it_is_told_and_shared_deviation_at_one():
    model = agent(temperature=0.3, std="shared")
    assert model.temperature.item() == pytest.approx(0.3)
    _, std = model.backbone.actor(torch.randn(4, O))
    assert torch.equal(std, torch.ones(4, A))


def test_last_gain_scales_the_last_hidden_layer_only():
    small, plain = agent(last_gain=0.01), agent()
    a, b = small.backbone.valued.critics.weights, plain.backbone.valued.critics.weights
    assert torch.equal(a[0], b[0])
    assert torch.allclose(a[1], b[1] * 0.01 / math.sqrt(2), atol=1e-7)
    assert torch.equal(a[2], b[2])


@pytest.mark.parametrize(
    ("shape", "options", "match"),
    [
        ((O,), {"critics": 0}, "backbone.critics: 0"),
        ((O,), {"actor_hidden": []}, "backbone.actor_hidden"),
        ((O,), {"temperature": 0.0}, "backbone.temperature"),
        ((3, 8, 8), {}, "backbone.encoder: 'none'"),
        ((O,), {"encoder": "cnn"}, "takes images"),
    ],
)
def test_bad_options_are_refused(shape, options, match):
    with pytest.raises(UserError, match=match):
        actor_critic(shape, **options)


def test_a_stream_without_actions_is_refused():
    with pytest.raises(UserError, match="asks for no actions"):
        actor_critic((O,)).assemble(None, None)
