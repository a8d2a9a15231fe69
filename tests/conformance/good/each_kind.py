"""Small strategies that pass the suite, one for each kind without learning before it, and one for all kinds."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clplat import Experience, Kind, Strategy, second_gradient, trainable
from clplat.components.gradients import as_vector, overwrite
from clplat.components.memory import Reservoir
from clplat.components.transitions import TransitionMemory
from clplat.data.transitions import pack_step, unpack


class Ascent(Strategy):
    """Forgets by making what is to be erased less likely, as far as chance."""

    kinds = frozenset({Kind.FORGET})
    paper = "none: an example"

    def forget_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return self.mean(-F.cross_entropy(self.model(x), y, reduction="none").clamp(max=1.5))


class Entropy(Strategy):
    """Adapts by making its predictions surer (Tent)."""

    kinds = frozenset({Kind.ADAPT})
    paper = "arXiv:2006.10726"

    def adapt_step(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(inputs)
        return logits.detach(), self.mean(-(logits.softmax(1) * logits.log_softmax(1)).sum(1))


class Imitator(Strategy):
    """Imitates the data with the policy of an agent's network, and says nowhere that it needs one."""

    kinds = frozenset({Kind.INTERACT})
    paper = "none: an example"
    carries_optimizer = True

    def act(self, observation: Any, explore: bool) -> Any:
        seen = torch.as_tensor(observation)
        with torch.no_grad():
            encoded = self.model.encode(seen if seen.ndim == 2 else seen[None])
            action = self.model.draw(encoded) if explore else self.model(encoded)
        return (action if seen.ndim == 2 else action[0]).numpy()

    def observe(self, transition: Any) -> int:
        return 0

    def training_step(self, batch: tuple[Tensor, Tensor] | None, batch_idx: int) -> Tensor | None:
        return None if batch is None else self.losses(*batch).mean()


class Actor(Strategy):
    """Learns to act from the sign of what an action changed.

    Args:
        memory: transitions kept.
        noise: share of random actions, in [0, 1].
    """

    kinds = frozenset({Kind.INTERACT})
    paper = "none: an example"

    def __init__(self, *, memory: int = 30, noise: float = 0.3, **base: Any) -> None:
        super().__init__(**base)
        self.transitions, self.noise = Reservoir(memory), noise

    def act(self, observation: Any, explore: bool) -> int:
        if explore and torch.rand(()) < self.noise:
            return int(torch.randint(2, ()))
        with torch.no_grad():
            return int(self.model(torch.as_tensor(observation)[None])[0, :2].argmax())

    def observe(self, transition: Any) -> int:
        before, after = (abs(float(o.flat[0])) for o in (transition.observation, transition.next_observation))
        better = transition.action if after < before else 1 - transition.action
        self.transitions.add(torch.as_tensor(transition.observation)[None], torch.tensor([better]))
        return 1

    def training_step(self, batch: tuple[Tensor, Tensor] | None, batch_idx: int) -> Tensor | None:
        if batch is not None and batch[1] is None:  # what others did in the environment
            return None
        x, y = self.transitions.sample(8) if batch is None else batch
        return self.mean(F.cross_entropy(self.model(x), y, reduction="none"))


class Leaner(Strategy):
    """Leans the way that brought it nearer to the middle; actions are vectors.

    Args:
        memory: transitions kept.
        noise: deviation of what is added to actions in training, ≥ 0.
    """

    kinds = frozenset({Kind.INTERACT})
    paper = "none: an example"

    def __init__(self, *, memory: int = 30, noise: float = 0.3, **base: Any) -> None:
        super().__init__(**base)
        self.transitions, self.noise = TransitionMemory(memory, 1), noise

    def act(self, observation: Any, explore: bool) -> np.ndarray:
        seen = torch.as_tensor(observation)
        with torch.no_grad():
            action = self._leaning(seen if seen.ndim == 2 else seen[None])
        if explore:
            action = (action + self.noise * torch.randn(action.shape)).clamp(-1, 1)
        return (action if seen.ndim == 2 else action[0]).numpy()

    def observe(self, transition: Any) -> int:
        self.transitions.add(pack_step(transition))
        return 1

    def training_step(self, batch: tuple[Tensor, Tensor] | None, batch_idx: int) -> Tensor:
        t = unpack(self.transitions.sample(8) if batch is None else batch[0], 1)
        nearer = t.next_observation[:, :1].abs() < t.observation[:, :1].abs()
        return (self._leaning(t.observation) - torch.where(nearer, t.action, -t.action)).square().mean()

    def _leaning(self, observation: Tensor) -> Tensor:
        return self.model(observation)[:, :1].tanh()


class Everything(Ascent, Entropy, Actor):
    """Handles all four kinds."""

    kinds = frozenset(Kind)
    paper = "none: an example"


class Prototypes(Strategy):
    """Nearest mean of the features, which are never trained."""

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:1611.07725"

    def __init__(self, **base: Any) -> None:
        super().__init__(**base)
        self.model.requires_grad_(False)
        self.register_buffer("sums", torch.zeros(0))
        self.register_buffer("counts", torch.zeros(0))

    def grow(self, experience: Any) -> None:
        more = max(experience.classes) + 1 - len(self.counts)
        if more > 0:
            width = self.model.backbone.embed_dim
            self.sums = torch.cat([self.sums.reshape(-1, width), torch.zeros(more, width)])
            self.counts = torch.cat([self.counts, torch.zeros(more)])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        features = self.model.features(x)
        sums = torch.zeros_like(self.sums).index_add(0, y, features.float())
        counts = torch.bincount(y, minlength=len(self.counts)).float()
        if self.world_size > 1:
            torch.distributed.all_reduce(sums)
            torch.distributed.all_reduce(counts)
        self.sums += sums
        self.counts += counts

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        if not len(self.counts):
            return inputs.new_zeros(len(inputs), 0)
        means = self.sums / self.counts.clamp(min=1)[:, None]
        return -torch.cdist(self.model.features(inputs).float(), means)


class Projected(Strategy):
    """A-GEM with names of its own: how many samples its reference is of is no option that the suite knows.

    Args:
        kept: samples kept.
        reference: samples of the reference gradient, in each process.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:1812.00420"

    def __init__(self, *, kept: int = 12, reference: int = 6, **base: Any) -> None:
        super().__init__(**base)
        self.past, self.reference = Reservoir(kept), reference
        self.against: Tensor | None = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        self.against = None
        if len(self.past):
            inputs, labels, _ = self.past.sample(self.reference)
            self.against = self._gradient(F.cross_entropy(self.model(self.prepare(inputs)), labels))
        return self.mean(F.cross_entropy(self.model(x), y, reduction="none"))

    def _gradient(self, loss: Tensor) -> Tensor:
        return second_gradient(loss, list(trainable(self.model).values()), self.world_size)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.against is None:
            return
        parameters = list(trainable(self.model).values())
        mine = as_vector(parameters)
        if (product := mine @ self.against) < 0:
            overwrite(parameters, mine - product / self.against.square().sum() * self.against)

    def end(self, experience: Experience) -> None:
        self.past.fill(experience.train)
