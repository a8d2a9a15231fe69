"""A batch of CoTTA next to the same update written as the paper tells it: one augmentation and one pass at a time.

ResNet-20, CIFAR's settings with the gate open: 32 augmentations, Adam. By hand the augmentations are torchvision's, one
after the other, as are the teacher's passes, the averages and the restoration, tensor by tensor. Both sides start from
the same weights and take the same batches in turn; times on a CPU are the processor's, which neighbours on a shared
machine disturb least.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Row, clock, paired

CPU = torch.device("cpu")
AUGMENTATIONS, RATE, DECAY, RESTORE = 32, 0.001, 0.999, 0.01


def _model(device: torch.device) -> Any:
    from clplat.backbones.base import Classifier
    from clplat.backbones.cnn import resnet20
    from clplat.backbones.heads import Linear

    torch.manual_seed(0)
    return Classifier(resnet20((3, 32, 32)), Linear(64, 10)).to(device)


def _transforms() -> Callable[[Tensor], Tensor]:
    """One augmentation of a batch, drawn anew in each call, from torchvision's parts."""
    import torchvision.transforms as T
    import torchvision.transforms.functional as F
    from torchvision.transforms import InterpolationMode

    ranges = ((0.6, 1.4), (0.7, 1.3), (0.5, 1.5), (-0.06, 0.06), (0.7, 1.3))
    changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue, F.adjust_gamma)
    bilinear, reach = InterpolationMode.BILINEAR, (1 / 16, 1 / 16)
    after = T.Compose(
        [
            T.Pad(16, padding_mode="edge"),
            T.RandomAffine((-15, 15), translate=reach, scale=(0.9, 1.1), interpolation=bilinear),
            T.GaussianBlur(5, (0.001, 0.5)),
            T.CenterCrop(32),
            T.RandomHorizontalFlip(),
        ]
    )

    def transform(x: Tensor) -> Tensor:
        x = x.clamp(0, 1)
        for k in torch.randperm(5).tolist():
            low, high = ranges[k]
            x = changes[k](x.clamp(1e-8, 1.0), float(torch.empty(()).uniform_(low, high)))
        x = after(x)
        return (x + 0.005 * torch.randn_like(x)).clamp(0, 1)

    return transform


def by_hand(x: Tensor) -> Callable[[], float]:
    """Takes one update on `x` per call; returns milliseconds."""
    model = _model(x.device)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    teacher, anchor = copy.deepcopy(model).requires_grad_(False), copy.deepcopy(model).requires_grad_(False)
    source = {name: p.clone() for name, p in anchor.named_parameters()}
    optimizer, transform, read = torch.optim.Adam(model.parameters(), lr=RATE), _transforms(), clock(x.device)

    def update() -> float:
        started = read()
        logits = model(x)
        with torch.no_grad():
            sure = float(anchor(x).softmax(1).amax(1).mean())
            plain = teacher(x)
            target = torch.stack([teacher(transform(x)) for _ in range(AUGMENTATIONS)]).mean(0) if sure < 2 else plain
        (-(target.softmax(1) * logits.log_softmax(1)).sum(1)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), model.parameters(), strict=True):
                slow.copy_(DECAY * slow + (1 - DECAY) * fast)
            for name, p in model.named_parameters():
                mask = (torch.rand_like(p) < RESTORE).float()
                p.copy_(source[name] * mask + p * (1 - mask))
        return read() - started

    return update


def ours(x: Tensor) -> Callable[[], float]:
    """The same with `cotta`."""
    from clplat import Experience, Kind
    from clplat.strategies.cotta import CoTTA

    strategy = CoTTA(model=_model(x.device), augmentations=AUGMENTATIONS, gate=2.0, adapt_lr=RATE).to(x.device)
    experience = Experience(0, "adapt", Kind.ADAPT, None, classes=tuple(range(10)))
    strategy.train()
    strategy.grow(experience)
    strategy.begin(experience)
    optimizer = strategy.configure_optimizers()
    strategy.raw, strategy.global_batch = x, len(x)
    read = clock(x.device)

    def update() -> float:
        started = read()
        _, loss = strategy.adapt_step(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        strategy.after_step()
        return read() - started

    return update


def rows(quick: bool = False, device: torch.device = CPU) -> list[Row]:
    """One row for each size of the batch: not slower than by hand."""
    found = []
    for batch in (8,) if quick else (16, 64) if device.type == "cpu" else (64, 200):
        x = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
        sides, times = (ours(x), by_hand(x)), (list[float](), list[float]())
        for round_ in range(2 if quick else 6):
            for k in (0, 1) if round_ % 2 else (1, 0):
                taken = sides[k]()
                if round_ or quick:  # the first round sets up
                    times[k].append(taken)
        limit, name = None if quick else 1.0, f"CoTTA, a batch of {batch}, {AUGMENTATIONS} augmentations"
        found.append(paired(name, "ms", *times, "ratio", limit))
    return found
