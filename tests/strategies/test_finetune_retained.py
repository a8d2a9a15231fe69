import pytest
import torch

from clplat import Experience, Kind
from clplat.errors import UserError
from clplat.strategies.finetune_retained import FinetuneRetained
from clplat.strategies.naive import Naive


def accuracy(strategy, data):
    x, y = data.all()
    return (strategy.eval().predict(x).argmax(1) == y).float().mean().item()


def test_learning_is_plain_training(experiences, model, drive, equal):
    stream = experiences()
    assert equal(drive(FinetuneRetained(model=model()), stream).model, drive(Naive(model=model()), stream).model)


@pytest.mark.parametrize("memory", [None, 24])
def test_a_request_is_plain_training_on_what_is_kept_of_the_rest(
    memory, experiences, model, drive, answer, request_for, equal
):
    stream, seen = experiences(3), []
    strategy = drive(FinetuneRetained(model=model(), memory=memory), stream)
    gone = request_for(3, stream[1], (2,))
    before = {k: v.clone() for k, v in strategy.model.state_dict().items()}
    answer(strategy, gone, epochs=1, each_step=lambda x, y, loss: seen.append((x, y)))
    labels = torch.cat([y for _, y in seen])
    assert len(labels) == (60 if memory is None else 20)  # 4 of each of 6 classes, less those of class 2
    assert sorted(set(labels.tolist())) == [0, 1, 3, 4, 5]
    plain = Naive(model=model())
    for e in stream:
        plain.grow(e)
    plain.model.load_state_dict(before)
    optimizer = plain.configure_optimizers()
    for x, y in seen:
        optimizer.zero_grad()
        plain.global_batch = len(x)
        plain.training_step((x, y), 0).backward()
        optimizer.step()
    assert equal(strategy.model, plain.model)


def test_erased_samples_are_not_trained_on(experiences, model, drive, answer, request_for):
    (e,) = experiences(1)
    gone, seen = request_for(1, e, rows=e.train.row_ids()[:20]), []
    strategy = drive(FinetuneRetained(model=model(), memory=None), [e])
    answer(strategy, gone, epochs=1, each_step=lambda x, y, loss: seen.append(x))
    assert torch.equal(torch.cat(seen).sort(0).values, e.train.all()[0][20:].sort(0).values)


def test_forgetting_comes_with_training_on_the_rest(experiences, model, drive, answer, request_for):
    (e,) = experiences(1)
    strategy = drive(FinetuneRetained(model=model(), lr=0.2), [e], epochs=10)
    gone = request_for(1, e, (0,))
    kept = e.train.subset((e.train.targets() == 1).nonzero()[:, 0])
    x = gone.train.all()[0]
    before = strategy.eval().predict(x).softmax(1)[:, 0].mean().item()
    answer(strategy, gone, epochs=20)
    assert strategy.eval().predict(x).softmax(1)[:, 0].mean().item() < before
    assert accuracy(strategy, kept) == 1.0


def test_an_erased_class_can_be_learned_again(experiences, model, drive, answer, request_for):
    (e,) = experiences(1)
    strategy = drive(FinetuneRetained(model=model(), lr=0.2), [e], epochs=5)
    gone = request_for(1, e, (0,))
    answer(strategy, gone, epochs=60)
    drive(strategy, [Experience(2, "again", Kind.LEARN, gone.train, classes=(0,))], epochs=20)
    assert accuracy(strategy, gone.train) > 0.9
    assert set(strategy.memory.data().labels.tolist()) == {0, 1}


def test_when_nothing_is_left_there_is_no_step(experiences, model, drive, answer, request_for):
    (e,) = experiences(1)
    for memory in (None, 24):
        strategy, steps = drive(FinetuneRetained(model=model(), memory=memory), [e]), []
        answer(strategy, request_for(1, e, (0, 1)), each_step=lambda *a, steps=steps: steps.append(a))
        assert not steps


def test_a_memory_smaller_than_the_classes_is_the_users_mistake(experiences, model, drive):
    with pytest.raises(UserError, match=r"strategy.memory: 3 has no room for 4 classes"):
        drive(FinetuneRetained(model=model(), memory=3), experiences())
    with pytest.raises(UserError, match="memory: 0 is out of range"):
        FinetuneRetained(model=model(), memory=0)


def test_resumes(experiences, model, resumes):
    assert resumes(lambda: FinetuneRetained(model=model(), memory=10), experiences())
