import torch

from clplat.strategies.cumulative import Cumulative
from clplat.strategies.joint import Joint
from clplat.strategies.naive import Naive


def test_it_trains_on_the_union(experiences, model, drive):
    stream = experiences()
    sizes = []
    for cls in (Joint, Cumulative):
        strategy = cls(model=model())
        for e in stream:
            drive(strategy, [e], epochs=1)
            data = strategy.training_data(e)
            sizes.append(len(data))
            assert sorted(set(data.targets().tolist())) == list(range(2 * e.index + 2))
    assert sizes == [24, 48, 72, 24, 48, 72]


def test_what_an_experience_does_to_its_inputs_is_kept(experiences, model, drive):
    stream = experiences(2, worlds=(lambda x: x + 100, lambda x: x - 100))
    strategy = drive(Cumulative(model=model(), lr=1e-6), stream, epochs=1)
    inputs, labels = strategy.training_data(stream[1]).all()
    assert (inputs[labels < 2] > 50).all()
    assert (inputs[labels >= 2] < -50).all()


def test_joint_starts_from_the_initial_weights(experiences, model, drive, equal):
    stream, start = experiences(2), model()
    strategy = drive(Joint(model=model()), stream[:1])
    assert not equal(strategy.model, start)
    strategy.grow(stream[1])
    strategy.begin(stream[1])
    fresh = model()
    torch.manual_seed(0)
    fresh.grow(stream[0])
    for name, value in fresh.backbone.state_dict().items():
        assert torch.equal(strategy.model.backbone.state_dict()[name], value)
    assert torch.equal(strategy.model.head.weight[:2], fresh.head.weight)


def test_cumulative_goes_on_from_where_it_was(experiences, model, drive, equal):
    stream = experiences(2)
    strategy = drive(Cumulative(model=model()), stream[:1])
    before = {k: v.clone() for k, v in strategy.model.backbone.state_dict().items()}
    strategy.grow(stream[1])
    strategy.begin(stream[1])
    assert all(torch.equal(v, strategy.model.backbone.state_dict()[k]) for k, v in before.items())


def test_the_first_experience_is_naive(experiences, model, drive, equal):
    stream = experiences(1)
    expected = drive(Naive(model=model()), stream).model
    assert equal(drive(Joint(model=model()), stream).model, expected)
    assert equal(drive(Cumulative(model=model()), stream).model, expected)


def test_nothing_is_forgotten(experiences, model, drive):
    stream = experiences()
    for cls in (Joint, Cumulative):
        strategy = drive(cls(model=model()), stream, epochs=20)
        for e in stream:
            x, y = e.train.all()
            assert (strategy.predict(x).argmax(1) == y).float().mean() > 0.85


def test_resumes(experiences, model, resumes):
    assert resumes(lambda: Joint(model=model()), experiences())
    assert resumes(lambda: Cumulative(model=model()), experiences())
