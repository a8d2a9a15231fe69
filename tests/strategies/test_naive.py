import math

import pytest
import torch

from clplat.strategies.naive import Naive


def test_loss_by_hand(linear):
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    # the logits are (1, 0.5) and (0, 2.5)
    expected = (math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(2.5))) / 2
    loss = Naive(model=linear()).training_step((x, y), 0)
    assert abs(loss.item() - expected) < 1e-5


@pytest.mark.parametrize("size", [1, 7, 32])
def test_the_mean_in_one_operation_has_the_gradients_of_the_mean_of_losses(linear, size):
    """To the last bit: what a run learns does not depend on which of the two a strategy writes."""
    x, y = torch.randn(size, 2), torch.randint(2, (size,))
    losses, gradients = [], []
    for mean in (Naive.mean_loss, lambda s, x, y: s.mean(s.losses(x, y))):
        strategy = Naive(model=linear())
        (mean(strategy, x, y) * 0.37).backward()
        losses.append(mean(strategy, x, y).item())
        gradients.append([p.grad for p in strategy.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert all(map(torch.equal, *gradients))


def test_the_mean_is_of_the_losses_that_a_strategy_or_its_model_writes(linear):
    class Doubled(Naive):
        def losses(self, inputs, labels):
            return 2 * super().losses(inputs, labels)

    class Tripled(Naive):
        def mean(self, losses):
            return 3 * super().mean(losses)

    x, y = torch.eye(2), torch.tensor([0, 1])
    plain, doubled = Naive(model=linear()), Doubled(model=linear())
    assert Tripled(model=linear()).mean_loss(x, y).item() == pytest.approx(3 * plain.mean_loss(x, y).item())
    assert doubled.mean_loss(x, y).item() == pytest.approx(2 * plain.mean_loss(x, y).item())
    plain.model.losses = lambda inputs, labels: labels.float()
    assert plain.mean_loss(x, y).item() == 0.5


def test_a_ragged_batch_has_no_plain_mean(linear, monkeypatch):
    """Three samples on two processes, two of them here and one elsewhere: each counts a third."""
    strategy = Naive(model=linear())
    strategy.world_size, strategy.global_batch = 2, 3
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.add_(1))
    x, y = torch.eye(2), torch.tensor([0, 1])
    assert strategy.mean_loss(x, y).item() == pytest.approx(strategy.losses(x, y).sum().item() * 2 / 3)


def test_it_learns_and_forgets(experiences, model, drive):
    stream = experiences()
    strategy = drive(Naive(model=model(), lr=0.1), stream, epochs=20)
    accuracy = [(strategy.predict(x).argmax(1) == y).float().mean().item() for x, y in (e.train.all() for e in stream)]
    assert accuracy[-1] > 0.95
    assert accuracy[0] < 0.1


def test_resumes(experiences, model, resumes):
    assert resumes(lambda: Naive(model=model(), momentum=0.9), experiences())
