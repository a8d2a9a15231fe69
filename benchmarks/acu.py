"""A request to forget next to learning anew without it: 100 of 20,000 samples, 4,096 expanded features, 100 classes.

Both sides start from the same backbone features (512 numbers a sample, float32, normally distributed) and the same E
and γ, and end with the same head: the largest relative difference stands in the note. By hand: h = relu(φE) of the
samples left in batches of 4,096, hᵀh and hᵀy in float64, Cholesky, two triangular solves. A request is answered when
the head is in force; settled, when the sums and the inverse are up to date too, which the next request needs. Both
are timed on one thread, by the processor's clock, which neighbours on a shared machine disturb least.

Through the backbone, a ResNet-32 on images of 32 x 32: the features of the samples left made anew (a request that
brings its features next to it; one whose samples go through the backbone too can't gain more than 20,000/100), and
the network trained anew by SGD for `EPOCHS` passes (the authors train it for 300). Costs for each image are measured
in batches of 100 and multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Row, clock, paired

LEARNED, ERASED, FEATURES, WIDTH, CLASSES, GAMMA, BATCH, EPOCHS = 20_000, 100, 512, 4096, 100, 0.1, 4096, 10


CPU = torch.device("cpu")


def timed(work: Callable[[], Any], device: torch.device = CPU) -> float:
    """Milliseconds of one call."""
    read = clock(device)
    started = read()
    work()
    return read() - started


class Both:
    """A learner that has learned `learned` samples, and the loop by hand over those that are left.

    Args:
        learned: samples.
        width: expanded features.
        device: where both are.
        options: of the learner.
    """

    def __init__(self, learned: int, width: int = WIDTH, device: torch.device = CPU, **options: Any) -> None:
        from clplat import Experience, Kind
        from clplat.backbones.base import Classifier
        from clplat.backbones.heads import Linear
        from clplat.backbones.mlp import mlp
        from clplat.strategies.acu import ACU

        torch.manual_seed(0)
        model = Classifier(mlp((FEATURES,), []), Linear(FEATURES, CLASSES))  # no layer: inputs are the features
        self.learner = ACU(model=model, width=width, gamma=GAMMA, **options)
        self.learner.grow(Experience(0, "all", Kind.LEARN, None, classes=tuple(range(CLASSES))))
        self.device, self.learner = device, self.learner.to(device)
        self.inputs, self.labels = torch.randn(learned, FEATURES), torch.randint(CLASSES, (learned,))
        self.inputs, self.labels = self.inputs.to(device), self.labels.to(device)
        self.erased = 0
        ridge = self.learner.ridge
        for x, y in zip(self.inputs.split(BATCH), self.labels.split(BATCH), strict=True):
            ridge.add(self.learner._expand(x), y)
        self.solving = timed(ridge.solve, device)

    def answer(self) -> tuple[float, float]:
        """Milliseconds until the next request is answered, and until it is settled."""
        learner, rows = self.learner, slice(self.erased, self.erased + ERASED)
        self.erased += ERASED
        ridge, found = learner.ridge, list[Any]()
        counts = ridge.counts - torch.bincount(self.labels[rows], minlength=CLASSES)

        def answer() -> None:
            h = learner._expanded(self.inputs[rows])
            found.extend(ridge.answer(h, self.labels[rows], counts))

        answered = timed(answer, self.device)
        return answered, answered + timed(lambda: ridge.settle(*found), self.device)

    def by_hand(self) -> tuple[float, Tensor]:
        """Milliseconds of solving anew for the samples that are left, and the head."""
        found = list[Tensor]()

        def solve() -> None:
            width, expansion = self.learner.ridge.width, self.learner.expansion
            a, b = (torch.zeros(width, k, dtype=torch.float64, device=self.device) for k in (width, CLASSES))
            left = self.inputs[self.erased :].split(BATCH), self.labels[self.erased :].split(BATCH)
            for x, y in zip(*left, strict=True):
                h = self.learner.ridge.rounded(torch.relu_(x.double() @ expansion))
                a.addmm_(h.T, h)
                b.addmm_(h.T, torch.nn.functional.one_hot(y, CLASSES).double())
            a.diagonal().add_(GAMMA)
            found.append(torch.cholesky_solve(b, torch.linalg.cholesky(a)))

        return timed(solve, self.device), found[0]

    def off(self, weight: Tensor) -> float:
        """Relative distance of the learner's head from `weight`."""
        return float((self.learner.ridge.weight - weight).norm() / weight.norm())


def backbone_ms() -> tuple[float, float]:
    """Milliseconds of a ResNet-32 for one image: its features, and a training step."""
    from clplat.backbones.cnn import resnet32

    net, images = resnet32((3, 32, 32)), torch.randn(ERASED, 3, 32, 32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def step() -> None:
        with torch.enable_grad():
            net.train().features(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    works: tuple[Callable[[], Any], ...] = (lambda: net.eval().features(images), step)
    return tuple(min(timed(work) for _ in range(5)) / ERASED for work in works)  # type: ignore[return-value]


def row(name: str, ours: list[float], base: list[float], at_least: float | None = None, note: str = "") -> Row:
    """Paired by hand over clplat: how many times faster the request is."""
    found = paired(name, "ms", ours, base, "ratio", None if at_least is None else 1 / at_least, note)
    faster = f"{1 / found.median:.0f} times faster" + (f", at least {at_least:.0f} asked" if at_least else "")
    found.note = f"{faster}; {note}" if note else faster
    return found


def rows(quick: bool = False) -> list[Row]:
    """Answer and settling next to solving anew; next to the backbone besides; and with twice the samples learned."""
    torch.set_grad_enabled(False)
    learned, width, rounds = (2_000, 512, 2) if quick else (LEARNED, WIDTH, 5)
    both, answered, settled, base = Both(learned, width), list[float](), list[float](), list[float]()
    assert len(both.learner.ridge.inverse), "the features are too ill-conditioned for the inverse"
    both.answer()  # sets up
    worst = 0.0
    for _ in range(rounds):
        a, s = both.answer()
        milliseconds, weight = both.by_hand()
        worst = max(worst, both.off(weight))
        answered.append(a)
        settled.append(s)
        base.append(milliseconds)
    features, training = backbone_ms()
    left = len(both.inputs) - both.erased
    extracted, trained = ([b + c * left for b in base] for c in (features, EPOCHS * training))
    asked = [a + features * ERASED for a in answered]
    twice = Both(2 * learned, width)
    twice.answer()
    more = [twice.answer()[0] for _ in range(rounds)]
    torch.set_grad_enabled(True)
    what = f"request of {ERASED} of {learned}, d = {width}"
    return [
        row(f"{what}: answered", answered, base, None if quick else 100, f"heads differ by {worst:.1e} at most"),
        row(f"{what}: settled", settled, base),
        row(f"{what}: answered, features made anew by hand", answered, extracted),
        row(f"{what}: answered with its features made, by hand too", asked, extracted),
        row(f"{what}: answered with its features made, network trained anew", asked, trained, None if quick else 1000),
        paired(f"{what}: answered, next to twice the samples learned", "ms", answered, more, "ratio"),
    ]
