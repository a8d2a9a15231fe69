"""A step of strategies next to loops by hand with the same passes, penalties and memories: what clplat adds to each.

ViT-tiny with 4 blocks and random weights on digits, batches of 32, SGD. Both sides take the same batches from the same
weights; those that replay draw their own samples, the others must end with the same losses. A turn is an experience
(see `in_turn.py`); what is done once an experience (teachers, importances) is no step, and is not counted.

Shapes: B samples of a batch, M replayed, C classes, P parameters.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.hand import Reservoir
from benchmarks.in_turn import Hand, Ours, Work, compare
from benchmarks.networks import Images, of_classes, with_head
from benchmarks.timing import Row

CLASSES, BATCH, REPLAY, SLOTS, RATE, LIMIT = 10, 32, 16, 64, 0.01, 1 / 0.95  # of the time of a step


class Loop(Hand):
    """Plain training by hand, and what a method may add to it."""

    options: dict[str, Any] = {}  # noqa: RUF012 - of the strategy, so that it does the same

    def __init__(self, net: Any, work: Work) -> None:
        sample = torch.zeros(work.data[0][0].numel() + CLASSES)  # a sample, and its logits for those who keep them
        super().__init__(net, of_classes, work, lambda parameters: torch.optim.SGD(parameters, lr=RATE))
        self.kept, self.weights = Reservoir(sample, SLOTS, REPLAY), list(net.parameters())

    def begin(self) -> None: ...

    def step_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y)

    def before_step(self) -> None: ...

    def after_step(self) -> None: ...

    def end(self) -> None: ...

    def keep(self, x: Tensor, y: Tensor, logits: Tensor) -> None:
        self.kept.add(torch.cat([x.flatten(1), logits.detach()], 1), y)

    def replayed(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, y = self.kept.sample()
        return rows[:, :-CLASSES].view(-1, *like.shape[1:]), y, rows[:, -CLASSES:]

    def train(self, optimizer: torch.optim.Optimizer, batches: Iterable[Tensor]) -> None:
        (inputs, labels), losses = self.data, list[Tensor]()
        self.begin()
        for rows in batches:
            loss = self.step_loss(inputs[rows], labels[rows])
            loss.backward()
            self.before_step()
            optimizer.step()
            self.after_step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            self.meter.advance()
        self.meter.losses.append(torch.stack(losses).mean().item())
        self.end()


class Derpp(Loop):
    options = {"memory": SLOTS, "replay_batch": REPLAY}  # noqa: RUF012

    def step_loss(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.kept.seen:
            new = self.net(x)
            loss = F.cross_entropy(new, y)
        else:
            (mx, _, mz), (lx, ly, _) = self.replayed(x), self.replayed(x)
            new, match, label = self.net(torch.cat([x, mx, lx])).split([len(x), REPLAY, REPLAY])
            loss = F.cross_entropy(new, y) + 0.1 * F.mse_loss(match, mz) + 0.5 * F.cross_entropy(label, ly)
        self.keep(x, y, new)
        return loss


class ErAce(Loop):
    options = Derpp.options

    def step_loss(self, x: Tensor, y: Tensor) -> Tensor:
        absent = torch.ones(CLASSES, dtype=torch.bool)
        absent[y] = False
        if not self.kept.seen:
            new, replayed = self.net(x), torch.zeros(())
        else:
            mx, my, _ = self.replayed(x)
            new, old = self.net(torch.cat([x, mx])).split([len(x), REPLAY])
            replayed = F.cross_entropy(old, my)
        self.keep(x, y, new)
        return F.cross_entropy(new.masked_fill(absent, -torch.inf), y) + replayed


class Lwf(Loop):
    """The teacher is the network as it was before the turn; T = 2."""

    teacher: Any = None
    met = False

    def begin(self) -> None:
        if self.met:
            self.teacher = copy.deepcopy(self.net).requires_grad_(False).eval()
        self.met = True

    def step_loss(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        if self.teacher is None:
            return loss
        student, target = ((z / 2).log_softmax(1) for z in (logits, self.teacher(x)))
        return loss + F.kl_div(student, target, reduction="batchmean", log_target=True)


class Ewc(Loop):
    """Fisher information of batches, added up without decay, around the last weights."""

    options = {"penalty": 1.0, "mode": "online", "online_decay": 1.0, "fisher_batch": BATCH}  # noqa: RUF012
    held: list[tuple[nn.Parameter, Tensor, Tensor]] | None = None

    def step_loss(self, x: Tensor, y: Tensor) -> Tensor:
        loss = super().step_loss(x, y)
        return loss if self.held is None else loss + sum((f * (p - c).square()).sum() for p, f, c in self.held)

    def end(self) -> None:
        importance = [torch.zeros_like(p) for p in self.weights] if self.held is None else [f for _, f, _ in self.held]
        self.net.eval()
        for x, y in zip(*(part.split(BATCH) for part in self.data), strict=True):
            found = torch.autograd.grad(F.cross_entropy(self.net(x), y), self.weights)
            for f, g in zip(importance, found, strict=True):
                f += g.square() / self.work.steps
        self.net.train()
        centre = [p.detach().clone() for p in self.weights]
        self.held = list(zip(self.weights, importance, centre, strict=True))


class Si(Loop):
    """c = 0.1, ξ = 0.1; the gradient of the loss alone is the whole one less the penalty's."""

    def begin(self) -> None:
        if not hasattr(self, "importance"):
            self.importance = [torch.zeros_like(p) for p in self.weights]
            self.path = [torch.zeros_like(p) for p in self.weights]
        self.anchor = [p.detach().clone() for p in self.weights]

    def step_loss(self, x: Tensor, y: Tensor) -> Tensor:
        held = zip(self.weights, self.importance, self.anchor, strict=True)
        return super().step_loss(x, y) + 0.1 * sum((o * (p - a).square()).sum() for p, o, a in held)

    @torch.no_grad()
    def before_step(self) -> None:
        self.before = [p.clone() for p in self.weights]
        held = zip(self.weights, self.importance, self.anchor, strict=True)
        self.gradients = [p.grad - 0.2 * o * (p - a) for p, o, a in held if p.grad is not None]

    @torch.no_grad()
    def after_step(self) -> None:
        for w, g, p, b in zip(self.path, self.gradients, self.weights, self.before, strict=True):
            w -= g * (p - b)

    @torch.no_grad()
    def end(self) -> None:
        for o, w, p, a in zip(self.importance, self.path, self.weights, self.anchor, strict=True):
            o.add_(w / ((p - a).square() + 0.1)).clamp_(min=0)
            w.zero_()


class Agem(Loop):
    """The memory is filled between turns."""

    options = Derpp.options
    reference: Tensor | None = None

    def step_loss(self, x: Tensor, y: Tensor) -> Tensor:
        if self.kept.seen:
            mx, my, _ = self.replayed(x)
            found = torch.autograd.grad(F.cross_entropy(self.net(mx), my), self.weights)
            self.reference = torch.cat([g.flatten() for g in found])
        return super().step_loss(x, y)

    @torch.no_grad()
    def before_step(self) -> None:
        if (r := self.reference) is not None:
            g = torch.cat([p.grad.flatten() for p in self.weights if p.grad is not None])
            if (product := g @ r) < 0:
                parts = (g - product / (r @ r) * r).split([p.numel() for p in self.weights])
                for p, part in zip(self.weights, parts, strict=True):
                    p.grad = part.view_as(p)

    def end(self) -> None:
        self.keep(*self.data, torch.zeros(len(self.data[1]), CLASSES))


class Olora(Loop):
    """peft's adapters, one a turn and all in use, whose inputs' directions are kept off those before; λ1 = 0.5."""

    options = {"projections": [], "dropout": 0.0, "alpha": 8.0, "optimizer": "sgd"}  # noqa: RUF012

    def turn(self, number: int) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(number)
        config = LoraConfig(r=8, lora_alpha=8, lora_dropout=0.0, target_modules=["qkv", "attn.proj"])
        inject_adapter_in_model(config, self.net.trunk, f"task{number}")
        del self.net.trunk.peft_config
        layers = [m for m in self.net.trunk.modules() if hasattr(m, "lora_A") and hasattr(m, "set_adapter")]
        for layer in layers:
            layer.set_adapter(list(layer.lora_A))
        learned = [(n, p) for n, p in self.net.named_parameters() if f"task{number}." in n or n.startswith("head")]
        self.net.requires_grad_(False)
        for _, parameter in learned:
            parameter.requires_grad_(True)
        self.pairs = []
        for layer in layers if number else []:
            past = torch.cat([layer.lora_A[f"task{k}"].weight.detach() for k in range(number)])
            self.pairs.append((past, layer.lora_A[f"task{number}"]))
        self.train(self.make([p for _, p in learned]), self.batches(number))

    def step_loss(self, x: Tensor, y: Tensor) -> Tensor:
        loss = super().step_loss(x, y)
        if not self.pairs:
            return loss
        past, new = torch.stack([p for p, _ in self.pairs]), torch.stack([a.weight for _, a in self.pairs])
        return loss + 0.5 * (past @ new.mT).abs().sum()


class Slca(Loop):
    """Two rates, and the classes at hand alone; features of every class are drawn for its head between turns."""

    options = {"lr": RATE, "align_epochs": 0, "momentum": 0.9}  # noqa: RUF012

    def turn(self, number: int) -> None:
        torch.manual_seed(number)
        slow = {"params": list(self.net.trunk.parameters()), "lr": 0.01 * RATE}
        optimizer = torch.optim.SGD([slow, {"params": list(self.net.head.parameters())}], lr=RATE, momentum=0.9)
        self.train(optimizer, self.batches(number))

    def step_loss(self, x: Tensor, y: Tensor) -> Tensor:
        present = torch.ones(CLASSES, dtype=torch.bool)
        return F.cross_entropy(self.net(x).masked_fill(~present, -torch.inf), y)


LOOPS = {"derpp": Derpp, "er_ace": ErAce, "lwf": Lwf, "ewc": Ewc, "si": Si, "agem": Agem, "olora": Olora, "slca": Slca}
REPLAYS = ("derpp", "er_ace", "agem")


def rows(quick: bool = False) -> list[Row]:
    """A row for each strategy; `quick` takes one block and few samples."""
    from benchmarks.hand import digits
    from clplat.backbones.vit import vit_tiny
    from clplat.config import discovery

    x, y = digits()
    found, size, device = [], 64 if quick else 256, torch.device("cpu")
    for name, loop in LOOPS.items():
        torch.manual_seed(0)
        work = Work((x[:size], y[:size]), CLASSES, BATCH, device, rounds=2 if quick else 9)
        pair = with_head(vit_tiny((1, 8, 8), depth=1 if quick else 4), CLASSES, Images, device)
        strategy = discovery.load("strategies", name)(model=pair.model, **{"lr": RATE} | loop.options)
        hand: Any = loop(pair.net, work)
        hand.memory = hand.kept if name in REPLAYS else None  # whose losses can't be compared
        found.append(compare(f"step, {name}, with its passes", Ours(strategy, work), hand, None if quick else LIMIT))
        print(f"{found[-1].name}: {found[-1].median:.3f} {found[-1].note}", file=sys.stderr, flush=True)
    return found
