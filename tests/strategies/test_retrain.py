import torch

from clplat import Data, Experience, Kind
from clplat.strategies.joint import Joint
from clplat.strategies.naive import Naive
from clplat.strategies.retrain import Retrain


def accuracy(strategy, data):
    x, y = data.all()
    return (strategy.eval().predict(x).argmax(1) == y).float().mean().item()


def test_learning_is_plain_training(experiences, model, drive, equal):
    stream = experiences()
    assert equal(drive(Retrain(model=model()), stream).model, drive(Naive(model=model()), stream).model)


def test_a_request_goes_back_to_the_first_weights(experiences, model, drive, answer, request_for):
    stream, fresh = experiences(2), model()
    strategy = drive(Retrain(model=model()), stream)
    answer(strategy, request_for(2, stream[0], (0,)), epochs=0)
    for name, value in fresh.backbone.state_dict().items():
        assert torch.equal(strategy.model.backbone.state_dict()[name], value)


def test_it_is_joint_training_on_what_is_left(experiences, model, drive, answer, request_for, equal):
    """Asked to forget half of what one experience taught, it ends as a learner that never met that half."""
    (whole,) = experiences(1)
    rows = whole.train.row_ids()[::2]
    left = whole.train.row_ids()[1::2]
    strategy = drive(Retrain(model=model(), lr=0.1), [whole])
    answer(strategy, request_for(1, whole, rows=rows), epochs=4)
    never = Retrain(model=model(), lr=0.1)
    torch.manual_seed(whole.index)
    never.train()
    never.grow(whole)  # the head's rows are drawn as for the one that met all
    only = Data(whole.train.inputs, whole.train.labels, left)
    torch.manual_seed(101)
    answer(Stand(never, only), Experience(1, "forget-1", Kind.FORGET, only), epochs=4)
    assert equal(strategy.model, never.model)


class Stand:
    """A strategy whose request is answered by training on `data`, from the weights it has."""

    def __init__(self, strategy, data):
        self.__dict__.update(inner=strategy, data=data)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def grow(self, experience):
        pass

    begin = grow

    def training_data(self, experience):
        return self.data


def test_only_retained_data_are_trained_on(experiences, model, drive, answer, request_for):
    stream, seen = experiences(3), []
    strategy = drive(Retrain(model=model()), stream)
    gone = request_for(3, stream[1], (2,))
    answer(strategy, gone, epochs=1, each_step=lambda x, y, loss: seen.append((x, y)))
    labels = torch.cat([y for _, y in seen])
    assert sorted(set(labels.tolist())) == [0, 1, 3, 4, 5]
    assert len(labels) == 5 * 12
    sample = request_for(4, stream[0], rows=stream[0].train.row_ids()[:3])
    seen.clear()
    answer(strategy, sample, epochs=1, each_step=lambda x, y, loss: seen.append((x, y)))
    inputs = torch.cat([x for x, _ in seen])
    assert len(inputs) == 5 * 12 - 3
    erased = sample.train.all()[0]
    assert not (inputs[:, None] == erased[None]).all(2).any()


def test_nothing_erased_is_kept(experiences, model, drive, answer, request_for):
    stream = experiences(2)
    strategy = answer(drive(Retrain(model=model()), stream), request_for(2, stream[0], (0, 1)))
    assert set(strategy.retained.stored["labels"].tolist()) == {2, 3}
    answer(strategy, request_for(3, stream[1], (2, 3)))  # nothing is left: no step, and no error
    assert len(strategy.retained) == 0


def test_it_forgets_the_class_and_nothing_else(experiences, model, drive, answer, request_for):
    stream = experiences(2)
    strategy = drive(Retrain(model=model(), lr=0.2), stream, epochs=10)
    gone = request_for(2, stream[0], (0,))
    answer(strategy, gone, epochs=30)
    assert accuracy(strategy, gone.train) == 0.0
    for e in stream:
        kept = e.train.subset((e.train.targets() != 0).nonzero()[:, 0])
        assert accuracy(strategy, kept) > 0.9


def test_an_erased_class_can_be_learned_again(experiences, model, drive, answer, request_for):
    stream = experiences(1)
    strategy = drive(Retrain(model=model(), lr=0.2), stream, epochs=10)
    gone = request_for(1, stream[0], (0,))
    answer(strategy, gone, epochs=20)
    again = Experience(2, "again", Kind.LEARN, gone.train, classes=(0,))
    drive(strategy, [again], epochs=10)
    assert accuracy(strategy, gone.train) > 0.9
    assert len(strategy.retained) == len(stream[0].train)
    answer(strategy, request_for(3, stream[0], (1,)), epochs=20)
    assert accuracy(strategy, gone.train) > 0.9  # retrained with what was learned again


def test_the_rest_is_as_joint_would_have_it(experiences, model, drive, answer, request_for):
    """Data, order apart: what a request leaves is what `joint` holds of a stream without it."""
    stream = experiences(2)
    strategy = answer(drive(Retrain(model=model()), stream), request_for(2, stream[0], (0,)), epochs=1)
    parts = [e.train.subset((e.train.targets() != 0).nonzero()[:, 0]) for e in stream]
    joint = drive(Joint(model=model()),
                  [Experience(i, f"e{i}", Kind.LEARN, p, classes=stream[i].classes) for i, p in enumerate(parts)],
                  epochs=1)  # fmt: skip
    assert torch.equal(strategy.retained.stored["inputs"], joint.seen.stored["inputs"])
    assert torch.equal(strategy.retained.stored["labels"], joint.seen.stored["labels"])
