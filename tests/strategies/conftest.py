"""A small stream, a small model, and the loop in its barest form, so that a strategy is tested by itself."""

import copy

import pytest
import torch

from clplat import Data, Experience, Kind
from clplat.backbones.base import Classifier
from clplat.backbones.heads import Growing, Linear
from clplat.backbones.mlp import mlp
from clplat.data.batches import epoch_order
from clplat.run import checkpoint


def _experiences(count=3, per_class=12, features=5, worlds=()):
    """`count` experiences of two classes each: Gaussian clouds around distant means."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(2 * count).repeat_interleave(per_class)
    means = 2 * torch.randn(2 * count, features, generator=generator)
    inputs = means[labels] + 0.5 * torch.randn(len(labels), features, generator=generator)
    found = []
    for k in range(count):
        classes = (2 * k, 2 * k + 1)
        rows = torch.arange(len(labels))[(labels // 2) == k]
        data = Data(inputs, labels, rows, world=worlds[k] if worlds else None)
        found.append(Experience(index=k, name=f"e{k}", kind=Kind.LEARN, train=data, classes=classes))
    return found


def _model(head=Growing, hidden=(7,), seed=0, features=5, classes=6):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Classifier(mlp((features,), list(hidden)), head(hidden[-1] if hidden else features, classes))


def _drive(strategy, experiences, *, batch=8, epochs=2, accumulate=1, clip=None, each_step=None, start=0):
    """What the runner does to a strategy that learns. `each_step(strategy)` is called after each optimizer step."""
    for e in experiences:
        torch.manual_seed(e.index)
        strategy.train()
        strategy.grow(e)
        if e.index < start:  # as a resume does: structure only
            continue
        strategy.begin(e)
        optimizer, data = strategy.configure_optimizers(), strategy.training_data(e)
        for epoch in range(epochs):
            batches = epoch_order(len(data), 0, e.index, epoch, torch.device("cpu")).split(batch)
            for k, positions in enumerate(batches):
                raw, labels = data.batch(positions)
                strategy.raw, strategy.global_batch = raw, len(raw)
                (strategy.training_step((strategy.prepare(raw), labels), k) / accumulate).backward()
                strategy.on_after_backward()
                if (k + 1) % accumulate and k + 1 < len(batches):
                    continue
                if clip:
                    torch.nn.utils.clip_grad_norm_(strategy.parameters(), clip)
                strategy.on_before_optimizer_step(optimizer)
                optimizer.step()
                optimizer.zero_grad()
                strategy.after_step()
                if each_step:
                    each_step(strategy)
        strategy.end(e)
    return strategy


def _answer(strategy, request, *, batch=8, epochs=5, each_step=None):
    """What the runner does to a strategy that is asked to forget; `each_step(x, y, loss)` is called for each batch."""
    torch.manual_seed(100 + request.index)
    strategy.train()
    strategy.grow(request)
    strategy.begin(request)
    data, optimizer = strategy.training_data(request), strategy.configure_optimizers()
    for epoch in range(epochs):
        order = epoch_order(len(data), 0, request.index, epoch, torch.device("cpu"))
        for k, positions in enumerate(order.split(batch) if len(order) else ()):
            raw, labels = data.batch(positions)
            strategy.raw, strategy.rows, strategy.global_batch = raw, data.row_ids()[positions], len(raw)
            loss = strategy.forget_step((strategy.prepare(raw), labels), k)
            if each_step:
                each_step(raw, labels, loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            strategy.after_step()
    strategy.end(request)
    return strategy


def _request(index, learned, classes=(), rows=None):
    """A request for all of `classes`, or for `rows`, of the experience `learned`."""
    data = learned.train
    kept = torch.isin(data.targets(), torch.tensor(classes)) if rows is None else torch.isin(data.row_ids(), rows)
    ids = [f"class:{c}" for c in classes] or [f"sample:{r}" for r in rows.tolist()]
    part = data.subset(kept.nonzero()[:, 0])
    return Experience(index, f"forget-{index}", Kind.FORGET, part, classes=tuple(classes), request=tuple(ids))


def _equal(a, b):
    """Whether two modules hold the same values, bit for bit."""
    mine, theirs = a.state_dict(), b.state_dict()
    if mine.keys() != theirs.keys():
        return False
    kept = {k for k, v in mine.items() if isinstance(v, torch.Tensor | int)}
    if any(torch.as_tensor(mine[k]).shape != torch.as_tensor(theirs[k]).shape for k in kept):
        return False
    if any(mine[k] != theirs[k] for k in mine.keys() - kept):
        return False
    return all(torch.allclose(torch.as_tensor(mine[k]), torch.as_tensor(theirs[k]), 0, 0, equal_nan=True) for k in kept)


def _resumes(make, experiences, **settings):
    """Whether the state after the first experience, loaded into a fresh strategy, leads to the same end."""
    whole = make()
    _drive(whole, experiences[:1], **settings)
    state = copy.deepcopy(whole.state_dict())
    checkpoint.flatten(dict(state), {})  # refuses what can't be saved
    other = make()
    other.grow(experiences[0])
    other.load_state_dict(state, strict=True)
    for strategy in (whole, other):
        _drive(strategy, experiences[1:], **settings)
    middle = make()  # and the state at the very end, loaded after replaying the growth
    for e in experiences:
        middle.grow(e)
    middle.load_state_dict(whole.state_dict(), strict=True)
    return _equal(whole, other) and _equal(whole, middle)


@pytest.fixture
def experiences():
    return _experiences


@pytest.fixture
def model():
    return _model


@pytest.fixture
def drive():
    return _drive


@pytest.fixture
def answer():
    return _answer


@pytest.fixture
def request_for():
    return _request


@pytest.fixture
def forgets_and_learns_again():
    """Asks of a strategy with a memory and a copy `before`: a class goes, the other stays, and the first comes back."""

    def ask(strategy, epochs):
        def accuracy(data):
            x, y = data.all()
            return (strategy.eval().predict(x).argmax(1) == y).float().mean().item()

        (e,) = _experiences(1)
        _drive(strategy, [e], epochs=10)
        gone, kept = _request(1, e, (0,)), e.train.subset((e.train.targets() == 1).nonzero()[:, 0])
        _answer(strategy, gone, epochs=epochs)
        assert accuracy(gone.train) == 0.0
        assert accuracy(kept) == 1.0
        assert set(strategy.memory.data().labels.tolist()) == {1}
        _drive(strategy, [Experience(2, "again", Kind.LEARN, gone.train, classes=(0,))], epochs=30)
        assert strategy.before is None
        assert accuracy(gone.train) > 0.9

    return ask


@pytest.fixture
def equal():
    return _equal


@pytest.fixture
def resumes():
    return _resumes


@pytest.fixture
def linear():
    """A linear model of 2 inputs and 2 classes with fixed weights, and no backbone layer."""

    def make(weight=((1.0, 0.0), (0.0, 2.0)), bias=(0.0, 0.5)):
        model = Classifier(mlp((2,), []), Linear(2, 2))
        with torch.no_grad():
            model.head.weight.copy_(torch.tensor(weight))
            model.head.bias.copy_(torch.tensor(bias))
        return model

    return make


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
