"""ACIL by itself: the closed form from a frozen backbone, each sample once."""

import numpy as np
import pytest
import torch

from clplat import Data, Experience, Kind, Stream
from clplat.backbones.heads import NCM
from clplat.components.frozen import frozen_features, in_chunks
from clplat.errors import UserError
from clplat.run.evaluation import Evaluator
from clplat.strategies.acil import ACIL


@pytest.fixture
def model(model):
    """With features enough to tell the classes apart untrained."""
    return lambda **options: model(**{"hidden": (60,), **options})


def make(model, **options):
    torch.manual_seed(0)
    return ACIL(model=model(), **{"width": 20, **options})


def learn(strategy, experiences, batch=8, epochs=1, drop=0):
    """What the loop does; the last `drop` batches never come."""
    for e in experiences:
        strategy.train()
        strategy.grow(e)
        strategy.begin(e)
        for _ in range(epochs):
            batches = torch.arange(len(e.train)).split(batch)
            for positions in batches[: len(batches) - drop]:
                raw, labels = e.train.batch(positions)
                strategy.raw, strategy.global_batch = raw, len(raw)
                assert strategy.training_step((strategy.prepare(raw), labels), 0) is None
        strategy.end(e)
    return strategy


def features(strategy, x):
    """h in NumPy, from the backbone's own features."""
    with torch.no_grad():
        phi = strategy.model.eval().features(x)
    return np.maximum(phi.double().numpy() @ strategy.expansion.numpy(), 0)


def closed_form(strategy, experiences, gamma=0.1):
    x, y = (torch.cat(t) for t in zip(*(e.train.all() for e in experiences), strict=True))
    h = features(strategy, x)
    return np.linalg.solve(h.T @ h + gamma * np.eye(h.shape[1]), h.T @ np.eye(6)[y.numpy()])


def test_the_head_is_the_closed_form_of_all_data(experiences, model):
    stream = experiences(3)
    strategy = learn(make(model), stream)
    assert np.abs(strategy.ridge.weight.numpy() - closed_form(strategy, stream)).max() < 1e-4  # float32 features
    x = stream[1].train.all()[0]
    expected = features(strategy, x) @ strategy.ridge.weight.numpy()
    torch.testing.assert_close(strategy.eval().predict(x), torch.from_numpy(expected), atol=1e-5, rtol=1e-5)


def test_batches_order_and_classes_do_not_matter(experiences, model):
    stream = experiences(3)
    ends = [learn(make(model, bits=14), stream, batch=b).ridge for b in (1, 5, 100)]
    ends.append(learn(make(model, bits=14), stream[::-1]).ridge)
    for other in ends[1:]:
        assert torch.equal(other.gram.tril(), ends[0].gram.tril())
        assert torch.equal(other.weight, ends[0].weight)


def test_a_sample_counts_once_however_many_epochs(experiences, model, equal):
    one = learn(make(model), experiences(2))
    three = learn(make(model), experiences(2), epochs=3)
    assert equal(one.ridge, three.ridge)
    assert one.ridge.counts.tolist() == [12, 12, 12, 12]


def test_backbone_and_expansion_stay_bit_for_bit(experiences, model):
    strategy = make(model)
    before = {k: v.clone() for k, v in strategy.model.backbone.state_dict().items()} | {"E": strategy.expansion.clone()}
    learn(strategy, experiences(2))
    after = strategy.model.backbone.state_dict() | {"E": strategy.expansion}
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(p.requires_grad for p in strategy.parameters())
    bound = 60**-0.5
    assert strategy.expansion.abs().max() <= bound
    assert strategy.expansion.std() == pytest.approx(bound / 3**0.5, rel=0.15)


@pytest.mark.parametrize("chunk", [7, 13, 16])
def test_features_do_not_depend_on_the_batch(model, chunk):
    """Kernels are chosen by the size of a batch, and by the row where it is no multiple of theirs; last bits differ."""
    strategy = make(lambda: model(hidden=(400, 300)))
    x = torch.randn(100, 5)
    whole = frozen_features(strategy.model, x, chunk)
    for rows in (torch.arange(100).split(1), torch.arange(100).split(13), torch.randperm(100).split(40)):
        parts = torch.cat([frozen_features(strategy.model, x[r], chunk) for r in rows])
        assert torch.equal(parts, whole[torch.cat(rows)])
    assert frozen_features(strategy.model, x[:0], chunk).shape == (0, 300)
    assert in_chunks(lambda t: t + len(t), torch.zeros(5, 2), chunk).eq(16).all()


def test_dropout_and_augmentation_are_off(experiences, model):
    strategy = make(model)
    strategy._prepare = Stream([], num_classes=6, input_shape=(5,), augment=lambda x: x + 1).prepare
    strategy.train()
    x = torch.randn(4, 5)
    assert torch.equal(strategy.prepare(x), x)
    strategy.model.backbone.register_forward_hook(lambda m, i, o: torch.dropout(o, 0.5, m.training))
    strategy.model.train()
    a, b = (frozen_features(strategy.model, x, 8) for _ in range(2))
    assert torch.equal(a, b)
    assert strategy.model.training


def test_learning_cut_short_is_noted(experiences, model):
    assert learn(make(model), experiences(1)).whole
    assert not learn(make(model), experiences(1), drop=1).whole


def test_resumes(experiences, model, equal):
    stream = experiences(3)
    whole = learn(make(model), stream[:2])
    other = make(model)
    for e in stream[:2]:
        other.grow(e)
    other.load_state_dict(whole.state_dict())
    assert equal(learn(whole, stream[2:]).ridge, learn(other, stream[2:]).ridge)


# --- evaluation -------------------------------------------------------------------------------------------------------


class Counted(ACIL):
    """Counts the samples that its backbone is run on."""

    run = 0

    def grow(self, experience):
        super().grow(experience)
        if not hasattr(self, "hooked"):
            self.hooked = self.model.backbone.register_forward_hook(
                lambda m, i, o: setattr(self, "run", self.run + len(o))
            )


def scored(stream):
    """The same experiences, each scored on its own training data."""
    return [Experience(e.index, e.name, Kind.LEARN, e.train, e.train, classes=e.classes) for e in stream]


def test_evaluation_runs_the_backbone_once_for_each_sample(experiences, model):
    stream = scored(experiences(3))
    strategy = learn(Counted(model=model(), width=20), stream[:1])
    evaluate = Evaluator(Stream(stream, num_classes=6, input_shape=(5,)), device=torch.device("cpu"), batch_size=10)
    strategy.run = 0
    first = evaluate(strategy)
    assert strategy.run == 72
    assert first[0] > 0.9
    assert first[1:] == [0.0, 0.0]
    learn(strategy, stream[1:])
    strategy.run = 0
    second = evaluate(strategy)
    assert strategy.run == 0  # and the new head is asked all the same
    assert min(second) > 0.9
    other = learn(Counted(model=model(seed=1), width=20), stream[:1])
    other.run = 0
    evaluate(other)
    assert other.run == 72  # another strategy's features are its own


def test_evaluation_equals_predicting(experiences, model):
    stream = scored(experiences(3))
    strategy = learn(make(model), stream)
    evaluate = Evaluator(Stream(stream, num_classes=6, input_shape=(5,)), device=torch.device("cpu"), batch_size=7)
    expected = []
    for e in stream:
        x, y = e.train.all()
        expected.append((strategy.eval().predict(x).argmax(1) == y).double().mean().item())
    assert evaluate(strategy) == expected
    assert evaluate(strategy) == expected


def test_another_frozen_learner_reads_out_of_its_head(experiences, model):
    """A nearest-mean learner needs no line of its own for it."""

    class Prototypes(ACIL):
        readout = ACIL.__mro__[1].readout

    strategy = Prototypes(model=model(head=NCM), width=20)
    stream = scored(experiences(2))
    for e in stream:
        strategy.grow(e)
        strategy.model.head.update(strategy.model.features(e.train.all()[0]), e.train.targets())
    x = stream[0].train.all()[0]
    assert torch.equal(strategy.predict(x), strategy.model.predict(x))
    evaluate = Evaluator(Stream(stream, num_classes=6, input_shape=(5,)), device=torch.device("cpu"), batch_size=7)
    assert evaluate(strategy) == evaluate(strategy)
    assert evaluate(strategy)[0] > 0.8


def test_class_means_that_would_not_be_asked_are_refused(experiences, model):
    from clplat.run.evaluation import renew_means

    stream = experiences(1)
    strategy = ACIL(model=model(head=NCM), width=20)
    strategy.grow(stream[0])
    with pytest.raises(UserError, match="has class means, but ACIL predicts past it"):
        renew_means(strategy, stream[0].train, 8)


def test_worlds_are_applied_before_features_are_kept(experiences, model):
    stream = scored(experiences(2, worlds=(lambda x: x, lambda x: -x)))
    strategy = learn(make(model), stream)
    evaluate = Evaluator(Stream(stream, num_classes=6, input_shape=(5,)), device=torch.device("cpu"), batch_size=7)
    assert min(evaluate(strategy)) > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "strategy.width: 0 is out of range"),
        ({"gamma": -1.0}, "strategy.gamma: -1.0 is out of range"),
        ({"bits": 30}, "strategy.bits: 30 is out of range"),
        ({"chunk": 0}, "strategy.chunk: 0 is out of range"),
    ],
)
def test_refuses_what_is_out_of_range(model, options, message):
    with pytest.raises(UserError, match=message):
        make(model, **options)


def test_data_of_one_sample(model):
    data = Data(torch.randn(1, 5), torch.zeros(1, dtype=torch.int64))
    strategy = learn(make(model), [Experience(0, "one", Kind.LEARN, data, classes=(0,))])
    assert strategy.eval().predict(data.inputs).argmax(1).tolist() == [0]
