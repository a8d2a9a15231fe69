"""SimpleCIL by itself: class means of frozen features, compared by cosine."""

import numpy as np
import pytest
import torch
from summing import learn

from clplat import Data, Experience, Kind
from clplat.errors import UserError
from clplat.strategies.simplecil import SimpleCIL


@pytest.fixture
def model(model):
    """With features enough to tell the classes apart untrained."""
    return lambda **options: model(**{"hidden": (60,), **options})


def reference(features, labels, probe, classes):
    """Cosines (n, C) as the paper writes them, in NumPy."""
    found = np.full((len(probe), classes), -np.inf)
    for c in np.unique(labels):
        mean = features[labels == c].mean(0)
        found[:, c] = probe @ mean / (np.linalg.norm(probe, axis=1) * np.linalg.norm(mean))
    return found


def phi(strategy, x):
    with torch.no_grad():
        return strategy.model.eval().features(x).double().numpy()


def test_predictions_are_the_papers_to_double_precision(experiences, model):
    stream = experiences(2)
    strategy = learn(SimpleCIL(model=model().double()), stream, batch=5)
    x, y = (torch.cat(t) for t in zip(*(e.train.all() for e in stream), strict=True))
    probe = torch.randn(9, 5, dtype=torch.float64)
    expected = reference(phi(strategy, x.double()), y.numpy(), phi(strategy, probe), 4)
    found = strategy.eval().predict(probe)
    assert np.abs(found.numpy() - expected).max() < 1e-10


def test_lengths_of_features_and_of_means_do_not_matter(experiences, model):
    """A class of long features, or of many samples, is predicted no more often for that."""
    strategy = SimpleCIL(model=model())
    strategy.grow(Experience(0, "two", Kind.LEARN, None, classes=(0, 1)))
    long, short = torch.zeros(2, 60), torch.zeros(2, 60)
    long[:, 0], long[:, 1], short[:, 1] = 100.0, 50.0, 0.1
    strategy.prototypes.add(long.repeat(9, 1), torch.zeros(18, dtype=torch.int64))
    strategy.prototypes.add(short, torch.ones(2, dtype=torch.int64))
    asked = torch.zeros(1, 60)
    asked[0, 0], asked[0, 1] = 1.0, 3.0  # nearer in angle to the short one; its product with the long one is larger
    assert strategy.readout(asked).argmax(1).item() == 1
    assert torch.equal(strategy.readout(asked).argmax(1), strategy.readout(1000 * asked).argmax(1))


def test_a_class_that_comes_again_adds_to_its_prototype(experiences, model):
    data = experiences(1)[0].train
    whole = Experience(0, "whole", Kind.LEARN, data, classes=(0, 1))
    parts = [
        Experience(i, f"part-{i}", Kind.LEARN, data.subset(torch.arange(i, len(data), 2)), classes=(0, 1))
        for i in range(2)
    ]
    one, two = learn(SimpleCIL(model=model()), [whole]), learn(SimpleCIL(model=model()), parts)
    torch.testing.assert_close(one.prototypes.totals, two.prototypes.totals, rtol=1e-12, atol=1e-12)
    assert one.prototypes.counts.tolist() == two.prototypes.counts.tolist() == [12, 12]


def test_a_sample_counts_once_however_many_epochs(experiences, model, equal):
    one, three = (learn(SimpleCIL(model=model()), experiences(2), epochs=n) for n in (1, 3))
    assert equal(one.prototypes, three.prototypes)


def test_a_class_not_met_is_never_predicted(experiences, model):
    strategy = learn(SimpleCIL(model=model()), experiences(3)[1:2])  # classes 2 and 3: rows of 0 and 1 are empty
    logits = strategy.eval().predict(torch.randn(7, 5))
    assert logits[:, :2].isneginf().all()
    assert logits[:, 2:].isfinite().all()


def test_it_learns_and_leaves_the_backbone_alone(experiences, model):
    stream, strategy = experiences(3), SimpleCIL(model=model())
    before = {k: v.clone() for k, v in strategy.model.backbone.state_dict().items()}
    learn(strategy, stream)
    for e in stream:
        x, y = e.train.all()
        assert (strategy.eval().predict(x).argmax(1) == y).double().mean() > 0.7
    assert all(torch.equal(before[k], v) for k, v in strategy.model.backbone.state_dict().items())
    assert not any(p.requires_grad for p in strategy.parameters())


def test_resumes(experiences, model, equal):
    stream = experiences(3)
    whole, other = learn(SimpleCIL(model=model()), stream[:2]), SimpleCIL(model=model())
    for e in stream[:2]:
        other.grow(e)
    other.load_state_dict(whole.state_dict())
    ends = [learn(strategy, stream[2:]).prototypes for strategy in (whole, other)]
    assert equal(*ends)


def test_data_of_one_sample(model):
    data = Data(torch.randn(1, 5), torch.zeros(1, dtype=torch.int64))
    strategy = learn(SimpleCIL(model=model()), [Experience(0, "one", Kind.LEARN, data, classes=(0,))])
    assert strategy.eval().predict(data.inputs).argmax(1).tolist() == [0]


def test_refuses_what_is_out_of_range(model):
    with pytest.raises(UserError, match=r"strategy.chunk: 0 is out of range"):
        SimpleCIL(model=model(), chunk=0)
