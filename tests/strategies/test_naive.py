import math

import torch

from clplat.strategies.naive import Naive


def test_loss_by_hand(linear):
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    # the logits are (1, 0.5) and (0, 2.5)
    expected = (math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(2.5))) / 2
    loss = Naive(model=linear()).training_step((x, y), 0)
    assert abs(loss.item() - expected) < 1e-5


def test_it_learns_and_forgets(experiences, model, drive):
    stream = experiences()
    strategy = drive(Naive(model=model(), lr=0.1), stream, epochs=20)
    accuracy = [(strategy.predict(x).argmax(1) == y).float().mean().item() for x, y in (e.train.all() for e in stream)]
    assert accuracy[-1] > 0.95
    assert accuracy[0] < 0.1


def test_resumes(experiences, model, resumes):
    assert resumes(lambda: Naive(model=model(), momentum=0.9), experiences())
