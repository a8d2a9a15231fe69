"""Actor and critics of an agent: a policy over actions in [-1, 1]^a, and an ensemble of state-action values.

Source   SAC: Haarnoja et al., ICML 2018, arXiv:1801.01290 and 1812.05905. Ensembles with layer norm: RLPD, Ball
         et al., ICML 2023, arXiv:2302.02948. Encoder: DrQ, Yarats et al., ICLR 2021, arXiv:2004.13649.
    a = tanh(u),  u ~ N(μ(s), σ(s)²)       log π(a|s) = log N(u) − Σ 2 (log 2 − u − softplus(−2u))
    hidden layer: Linear, LayerNorm (ε = 1e-6), ReLU        Q_i(s, a), i = 1 … N        temperature = softplus(ρ)

Shapes: B observations, o numbers of one, a of an action, d features of an encoder, H units, N critics, M of them asked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.backbones.base import Backbone, Classifier, Head, image_shape, require
from clplat.backbones.vit import vit_micro
from clplat.data.transitions import unpack
from clplat.errors import UserError
from clplat.stream import Actions, Answers

EPSILON = 1e-6  # of layer norm, as published (Flax's default)
STD_RANGE = (1e-5, 10.0)
INSIDE = (
    1 - 1e-5
)  # actions of a data set are cut to ±this before their log-density is asked for: that of ±1 is infinite


class Critics(nn.Module):
    """N networks of one shape, run as one: each layer is one batched matrix product.

    Args:
        inputs: o + a, or d + a.
        hidden: H of each layer.
        members: N.
        layer_norm: normalise each hidden layer, each network its own.
        last_gain: of the orthogonal initialisation of the last hidden layer; all others have √2.
    """

    def __init__(
        self, inputs: int, hidden: Sequence[int], members: int, layer_norm: bool = True, last_gain: float = math.sqrt(2)
    ) -> None:
        super().__init__()
        self.members, self.layer_norm = members, layer_norm
        sizes = list(itertools.pairwise([inputs, *hidden, 1]))
        gains = [math.sqrt(2)] * len(sizes)
        if hidden:
            gains[-2] = last_gain
        made = [
            torch.stack([nn.init.orthogonal_(torch.empty(b, a), gain).T for _ in range(members)])
            for (a, b), gain in zip(sizes, gains, strict=True)
        ]
        self.weights = nn.ParameterList([w.contiguous() for w in made])  # (N, in, out)
        self.biases = nn.ParameterList([torch.zeros(members, 1, b) for _, b in sizes])
        normed = list(hidden) if layer_norm else []
        self.gains = nn.ParameterList([torch.ones(members, 1, h) for h in normed])
        self.shifts = nn.ParameterList([torch.zeros(members, 1, h) for h in normed])

    def forward(self, inputs: Tensor, members: Tensor | None = None, frozen: bool = False) -> Tensor:
        """Values (N, B) for inputs (B, o + a).

        Args:
            members: (M,) indices of the networks to ask, (M, B) values; None asks all.
            frozen: no gradient reaches the networks, only the inputs.
        """

        def use(parameter: Tensor) -> Tensor:
            parameter = parameter.detach() if frozen else parameter
            return parameter if members is None else parameter[members]

        count = self.members if members is None else len(members)
        hidden = inputs.expand(count, *inputs.shape)
        *layers, (weight, bias) = zip(self.weights, self.biases, strict=True)
        for number, layer in enumerate(layers):
            hidden = torch.baddbmm(use(layer[1]), hidden, use(layer[0]))  # (N, B, H)
            if self.layer_norm:
                hidden = F.layer_norm(hidden, hidden.shape[-1:], eps=EPSILON)
                # Half the time of addcmul, forward and backward; so is vecdot below next to a product of one column.
                hidden = (hidden * use(self.gains[number])).add_(use(self.shifts[number]))
            hidden = F.relu(hidden, inplace=True)
        return torch.linalg.vecdot(hidden, use(weight).mT) + use(bias)[..., 0]


class Actor(nn.Module):
    """A diagonal Gaussian squashed by tanh.

    Args:
        inputs: o, or d.
        hidden: H of each layer, one at least.
        actions: a.
        layer_norm, last_gain: as in `Critics`.
        shared_std: one logarithm of the deviation for all observations (0 at first), instead of a head of its own.
    """

    def __init__(
        self, inputs: int, hidden: Sequence[int], actions: int, layer_norm: bool, last_gain: float, shared_std: bool
    ) -> None:
        super().__init__()
        layers = []
        for number, (a, b) in enumerate(itertools.pairwise([inputs, *hidden]), start=1):
            norm = [nn.LayerNorm(b, EPSILON)] if layer_norm else []
            gain = last_gain if number == len(hidden) else math.sqrt(2)
            layers.append(nn.Sequential(_linear(a, b, gain), *norm, nn.ReLU()))
        self.trunk = nn.Sequential(*layers)
        self.heads = _linear(
            hidden[-1], actions if shared_std else 2 * actions, math.sqrt(2), parts=1 + (not shared_std)
        )
        self.shared_log_std = nn.Parameter(torch.zeros(actions)) if shared_std else None

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (B, a) of u, before tanh, for inputs (B, o)."""
        mean = self.heads(self.trunk(inputs))
        if self.shared_log_std is not None:
            log_std = self.shared_log_std.expand_as(mean)
        else:
            mean, log_std = mean.chunk(2, -1)
        return mean, log_std.exp().clamp(*STD_RANGE)


def _linear(inputs: int, outputs: int, gain: float, parts: int = 1) -> nn.Linear:
    """A layer of `parts` orthogonal blocks of rows, without bias at first."""
    layer = nn.Linear(inputs, outputs)
    for rows in layer.weight.data.chunk(parts):
        nn.init.orthogonal_(rows, gain)
    nn.init.zeros_(layer.bias)
    return layer


def log_density(noise: Tensor, u: Tensor, std: Tensor) -> Tensor:
    """log π(tanh u), (...,), for u = μ + σ noise; all (..., a)."""
    constant = 0.5 * math.log(2 * math.pi) + 2 * math.log(2)
    return (2 * (u + F.softplus(-2 * u)) - 0.5 * noise.square() - std.log() - constant).sum(-1)


class Valued(nn.Module):
    """An encoder of observations and the critics on top of it: what learns from rewards, and what a target copies."""

    def __init__(self, encoder: nn.Module, critics: Critics) -> None:
        super().__init__()
        self.encoder, self.critics = encoder, critics


class ActorCritic(Backbone):
    """Everything of an agent but its memory: actor, critics, their slow copy, temperature.

    Built when the stream tells how many numbers an action has (`assemble`). Features are the actor's last hidden layer.
    """

    needs_head = False

    def __init__(self, input_shape: tuple[int, ...], encoder: nn.Module, width: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.input_shape, self._encoder, self.width, self._options = input_shape, [encoder], width, options
        self.embed_dim = options["actor_hidden"][-1]

    def assemble(self, head: Head | None, answers: Answers | Actions | None) -> Agent:
        if not isinstance(answers, Actions):
            raise UserError(
                "backbone: actor_critic acts, but this stream asks for no actions (valid: a stream of environments)"
            )
        o, width, self.actions = self._options, self.width, answers.size
        shared = (o["layer_norm"], o["last_gain"])
        self.actor = Actor(width, o["actor_hidden"], self.actions, *shared, o["std"] == "shared")
        critics = Critics(width + self.actions, o["critic_hidden"], o["critics"], *shared)
        self.valued = Valued(self._encoder.pop(), critics)
        self.target = deepcopy(self.valued).requires_grad_(False)
        self.rho = nn.Parameter(torch.tensor(math.log(math.expm1(o["temperature"]))))
        return Agent(self)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.actor.trunk)

    def role(self, name: str) -> Literal["ffn"] | None:
        return "ffn" if name.startswith("actor.trunk") else None

    def encode(self, observation: Tensor, target: bool = False) -> Tensor:
        """(B, d) of observations (B, ...), by the critics' encoder or by its slow copy."""
        return (self.target if target else self.valued).encoder(
            observation.reshape(len(observation), *self.input_shape)
        )

    def features(self, inputs: Tensor) -> Tensor:
        return self.actor.trunk(self.encode(inputs).detach())


class Agent(Classifier):
    """What strategies hold: the policy and its values. Its only part is the backbone; the head has nothing.

    Encoded observations are (B, d); where pixels are encoded, the encoder learns from the critics alone.
    """

    backbone: ActorCritic

    def __init__(self, backbone: ActorCritic) -> None:
        no_head: Any = nn.Identity()
        super().__init__(backbone, no_head)

    @property
    def actions(self) -> int:
        """Numbers of an action, a."""
        return self.backbone.actions

    @property
    def critics(self) -> int:
        """N."""
        return self.backbone.valued.critics.members

    @property
    def width(self) -> int:
        """Numbers of an encoded observation, d."""
        return self.backbone.width

    @property
    def temperature(self) -> Tensor:
        """Weight of the entropy, > 0; a scalar."""
        return F.softplus(self.backbone.rho)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by what they learn from: critic (with the encoder), actor, temperature."""
        b = self.backbone
        return {"critic": list(b.valued.parameters()), "actor": list(b.actor.parameters()), "temperature": [b.rho]}

    def forward(self, inputs: Tensor, task: int | Tensor | None = None) -> Tensor:
        """The policy's mode (B, a) for observations (B, ...)."""
        return self.backbone.actor(self.encode(inputs).detach())[0].tanh()

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        return self(inputs)

    def grow(self, experience: Any) -> None:
        """Nothing: an agent has no classes."""

    def losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """−log π(a|s), (B,), of packed transitions (B, w): what imitating them minimises. Labels are not looked at."""
        t = unpack(inputs, self.actions)
        return -self.log_prob(self.encode(t.observation).detach(), t.action)

    def encode(self, observation: Tensor, target: bool = False) -> Tensor:
        """Encoded observations (B, d)."""
        return self.backbone.encode(observation, target)

    def sample(self, encoded: Tensor, draws: int | None = None) -> tuple[Tensor, Tensor]:
        """Actions (B, a) and their log-density (B,); with `draws` n: (B, n, a) and (B, n)."""
        mean, std = self.backbone.actor(encoded)
        if draws is not None:
            mean, std = (t.unsqueeze(1).expand(-1, draws, -1) for t in (mean, std))
        noise = torch.randn_like(mean)
        u = mean + std * noise
        return u.tanh(), log_density(noise, u, std)

    def draw(self, encoded: Tensor) -> Tensor:
        """Actions (B, a) alone."""
        mean, std = self.backbone.actor(encoded)
        return (mean + std * torch.randn_like(mean)).tanh()

    def log_prob(self, encoded: Tensor, action: Tensor) -> Tensor:
        """log π(a|s), (B,), of actions (B, a)."""
        u, (mean, std) = action.clamp(-INSIDE, INSIDE).atanh(), self.backbone.actor(encoded)
        return log_density((u - mean) / std, u, std)

    def q(
        self,
        encoded: Tensor,
        action: Tensor,
        *,
        members: Tensor | None = None,
        frozen: bool = False,
        target: bool = False,
    ) -> Tensor:
        """Values (M, B) of actions (B, a); (M, B, n) of n actions (B, n, a) for each observation.

        Args:
            members: (M,) which critics; None: all N.
            frozen: no gradient reaches the critics.
            target: ask the slow copy.
        """
        critics = (self.backbone.target if target else self.backbone.valued).critics
        shape = action.shape[:-1]
        if action.ndim == 3:
            encoded = encoded.unsqueeze(1).expand(-1, action.shape[1], -1)
        inputs = torch.cat([encoded, action], -1).flatten(0, -2)
        return critics(inputs, members, frozen).unflatten(1, shape)

    @torch.no_grad()
    def follow(self, rate: float) -> None:
        """Move the slow copy: target ← target + rate (critics − target); 1 copies, 0 leaves it."""
        target, own = self.backbone.target, self.backbone.valued
        torch._foreach_lerp_(list(target.parameters()), [p.detach() for p in own.parameters()], rate)


class Convolutions(nn.Module):
    """DrQ's encoder of pixels: four 3x3 convolutions (the first halves the image), then Linear, LayerNorm, tanh."""

    def __init__(self, shape: tuple[int, int, int], width: int, features: int) -> None:
        super().__init__()
        widths = [shape[0]] + [width] * 4
        layers: list[nn.Module] = []
        for number, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(a, b, 3, stride=1 if number else 2), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        flat = self.convolutions(torch.zeros(1, *shape)).shape[1]
        self.project = nn.Sequential(nn.Linear(flat, features), nn.LayerNorm(features), nn.Tanh())

    def forward(self, inputs: Tensor) -> Tensor:
        """Features (B, d) of images (B, C, H, W)."""
        return self.project(self.convolutions(inputs))


def actor_critic(
    input_shape: tuple[int, ...],
    actor_hidden: list[int] = [256, 256],  # noqa: B006
    critic_hidden: list[int] = [256, 256],  # noqa: B006
    critics: int = 2,
    layer_norm: bool = True,
    last_gain: float = math.sqrt(2),
    std: Literal["head", "shared"] = "head",
    temperature: float = 1.0,
    encoder: Literal["none", "cnn", "vit"] = "none",
    encoder_width: int = 32,
    features: int = 50,
) -> Backbone:
    """Actor, critics and temperature of an agent.

    Args:
        input_shape: of an observation: (o,), or (channels, height, width) with an encoder.
        actor_hidden: width of each hidden layer, > 0, one at least.
        critic_hidden: width of each hidden layer, > 0.
        critics: N ≥ 1, networks of the ensemble.
        layer_norm: in the hidden layers of actor and critics.
        last_gain: of the orthogonal initialisation of their last hidden layers, > 0; WSRL publishes 0.01.
        std: the actor's deviation depends on the observation (head), or is one for all (shared).
        temperature: at first, > 0.
        encoder: of pixels, which learns from the critics' loss alone.
        encoder_width: channels of the cnn, or features of the vit (a multiple of 4), > 0.
        features: d of the cnn, > 0.
    """
    for key, widths in (("actor_hidden", actor_hidden), ("critic_hidden", critic_hidden)):
        require(key, widths, all(w > 0 for w in widths) and (bool(widths) or key == "critic_hidden"), "widths > 0")
    require("critics", critics, critics >= 1, "≥ 1")
    require("last_gain", last_gain, last_gain > 0, "> 0")
    require("std", std, std in ("head", "shared"), "head, shared")
    require("temperature", temperature, temperature > 0, "> 0")
    require("encoder", encoder, encoder in ("none", "cnn", "vit"), "none, cnn, vit")
    options = {"actor_hidden": actor_hidden, "critic_hidden": critic_hidden, "critics": critics, "std": std}
    options |= {"layer_norm": layer_norm, "last_gain": last_gain, "temperature": temperature}
    if encoder == "none":
        require("encoder", encoder, len(input_shape) == 1, "cnn or vit, since observations are images")
        return ActorCritic(input_shape, nn.Identity(), input_shape[0], options)
    require("encoder_width", encoder_width, encoder_width > 0, "> 0")
    shape = image_shape(input_shape, f"actor_critic with encoder {encoder}")
    if encoder == "vit":
        net = vit_micro(shape, dim=encoder_width)
        return ActorCritic(shape, net, net.embed_dim, options)
    require("features", features, features > 0, "> 0")
    return ActorCritic(shape, Convolutions(shape, encoder_width, features), features, options)
