import torch

from clplat.backbones.heads import Linear
from clplat.strategies.gdumb import GDumb
from clplat.strategies.naive import Naive


def test_it_learns_from_the_memory_alone_and_from_scratch(experiences, model, drive, equal):
    """The weights are those of fine-tuning the untrained model on what is remembered, bit for bit."""
    stream = experiences(2)
    strategy = drive(GDumb(model=model(Linear), memory=10), stream)
    plain = Naive(model=model(Linear))
    plain.training_data = lambda experience: strategy.memory.data()
    assert equal(strategy.model, drive(plain, stream[1:]).model)


def test_rows_of_a_growing_head_go_back_to_their_first_values(experiences, model):
    stream, strategy = experiences(2), GDumb(model=model(), memory=6)
    started = []
    for e in stream:
        strategy.grow(e)
        started.append(strategy.model.head.weight.detach().clone())
        strategy.begin(e)
        with torch.no_grad():
            for p in strategy.model.parameters():
                p.add_(1.0)
    strategy.begin(stream[1])
    assert torch.equal(strategy.model.head.weight[:2], started[0])
    assert torch.equal(strategy.model.head.weight[2:], started[1][2:])


def test_the_memory_holds_as_many_of_each_class(experiences, model, drive):
    strategy = drive(GDumb(model=model(), memory=12), experiences(), epochs=1)
    assert torch.bincount(strategy.memory.data().labels).tolist() == [2] * 6


def test_it_remembers(experiences, model, drive):
    stream = experiences()
    strategy = drive(GDumb(model=model(), memory=24), stream, epochs=30)
    accuracy = [(strategy.predict(x).argmax(1) == y).float().mean().item() for x, y in (e.train.all() for e in stream)]
    assert min(accuracy) > 0.6  # without memory it ends at 0


def test_resumes(experiences, model, resumes):
    assert resumes(lambda: GDumb(model=model(), memory=9), experiences())
