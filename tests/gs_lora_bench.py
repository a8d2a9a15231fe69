"""A tiny transformer that learns and is asked to forget: what the tests of `gs_lora` and `gs_lora_pp` share."""

import torch

from clplat import Data, Experience, Kind
from clplat.backbones.base import Classifier
from clplat.backbones.heads import Linear
from clplat.backbones.vit import vit_micro
from clplat.data.batches import epoch_order
from clplat.strategies.gs_lora import GSLoRA

CLASSES, SHAPE = 4, (3, 4, 4)


def network(seed=0, dim=8, depth=3, heads=2):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = vit_micro(SHAPE, patch_size=2, dim=dim, depth=depth, heads=heads)
        return Classifier(backbone, Linear(dim, CLASSES))


def pool(per_class=10, classes=CLASSES, seed=2):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(per_class)
    centres = 2 * torch.randn(classes, *SHAPE, generator=generator)
    return Data(centres[labels] + 0.5 * torch.randn(len(labels), *SHAPE, generator=generator), labels)


def learn(data, classes=range(CLASSES), index=0):
    rows = torch.isin(data.labels, torch.tensor(list(classes))).nonzero()[:, 0]
    part = Data(data.inputs, data.labels, rows)
    return Experience(index, f"learn{index}", Kind.LEARN, part, classes=tuple(classes))


def forget(data, classes, index=1):
    rows = torch.isin(data.labels, torch.tensor(classes)).nonzero()[:, 0]
    request = tuple(f"class:{c}" for c in classes)
    part = Data(data.inputs, data.labels, rows)
    return Experience(index, f"forget{index}", Kind.FORGET, part, classes=tuple(classes), request=request)


def make(cls=GSLoRA, model=None, **options):
    torch.manual_seed(0)
    given = {"rank": 2, "memory": 16, "lr": 0.1, "forget_lr": 0.01, "bound": 3.0, **options}
    return cls(model=network() if model is None else model, **given)


def run(strategy, experience, *, epochs=2, batch=6, steps=None, each_step=None):
    """What the runner does to one experience; returns the losses."""
    torch.manual_seed(100 + experience.index)
    strategy.train()
    strategy.grow(experience)
    strategy.begin(experience)
    data, losses = strategy.training_data(experience), []
    optimizer = strategy.configure_optimizers()
    step = strategy.training_step if experience.kind is Kind.LEARN else strategy.forget_step
    for epoch in range(epochs):
        order = epoch_order(len(data), 0, experience.index, epoch, torch.device("cpu"))
        for k, positions in enumerate(order.split(batch)):
            if steps is not None and len(losses) == steps:
                return losses
            raw, labels = data.batch(positions)
            strategy.__dict__.update(raw=raw, rows=positions, global_batch=len(raw))
            loss = step((raw, labels), k)
            optimizer.zero_grad()
            loss.backward()
            strategy.on_before_optimizer_step(optimizer)
            optimizer.step()
            strategy.after_step()
            losses.append(loss.item())
            if each_step:
                each_step(strategy)
    strategy.end(experience)
    return losses


def asked(cls=GSLoRA, stir=True, **options):
    """A strategy that has learned, and one step into a request: factors that are not zero, nothing stepped yet."""
    data = pool()
    strategy = make(cls, **options)
    run(strategy, learn(data), epochs=4)
    request = forget(data, (1,))
    strategy.grow(request)
    strategy.begin(request)
    retained = strategy.training_data(request)
    if stir:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in strategy.lora.parameters_of(strategy.adapter):
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    strategy.eval()
    return strategy, retained, request


def step_loss(strategy, retained, size=6, batch_idx=0):
    raw, labels = retained.batch(torch.arange(size))
    strategy.__dict__.update(raw=raw, global_batch=size)
    return strategy.forget_step((raw, labels), batch_idx)


def erased_batch(strategy, size=6):
    """The samples to erase that the next step will draw."""
    drawn = strategy.drawn
    batch = strategy._next(size)
    strategy.drawn = drawn
    return batch


def reference(strategy):
    """Float64 copies of the factors, by layer, and features and logits of the plain network with W + s B A of them."""
    scale = strategy.lora.alpha / strategy.lora.rank
    pairs = strategy.lora.factors(strategy.adapter)
    leaves = {n: [p.detach().double().requires_grad_() for p in pair] for n, pair in pairs.items()}
    plain = network().double()
    state = {
        k.replace(".base_layer.", "."): v.double() for k, v in strategy.model.state_dict().items() if ".lora_" not in k
    }
    plain.load_state_dict(state)

    def features(x):
        weights = {
            f"{n}.weight": plain.backbone.get_parameter(f"{n}.weight").detach() + scale * b @ a
            for n, (a, b) in leaves.items()
        }
        return torch.func.functional_call(plain.backbone, weights, (x.double(),))

    return leaves, features, lambda x: plain.head(features(x))


def blocks_of(leaves, depth=3):
    return [[p for n, pair in leaves.items() if f"blocks.{k}." in n for p in pair] for k in range(depth)]
