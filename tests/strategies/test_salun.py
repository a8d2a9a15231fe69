import copy

import numpy as np
import pytest
import torch

from clplat import Experience, Kind
from clplat.errors import UserError
from clplat.strategies.naive import Naive
from clplat.strategies.salun import SalUn, salient


def accuracy(strategy, data):
    x, y = data.all()
    return (strategy.eval().predict(x).argmax(1) == y).float().mean().item()


def gradient_of(net, data):
    """Independent: of a linear model in float64, the gradient of the mean cross-entropy, (C, D) and (C,)."""
    x, y = (t.numpy() for t in data.all())
    x = x.astype(np.float64)
    z = x @ net.head.weight.detach().numpy().T + net.head.bias.detach().numpy()
    residual = np.exp(z) / np.exp(z).sum(1, keepdims=True) - np.eye(z.shape[1])[y]
    return residual.T @ x / len(x), residual.mean(0)


@pytest.mark.parametrize("share", [0.5, 0.25, 1.0])
def test_the_mask_is_where_the_gradient_on_what_is_erased_is_largest(share, experiences, model, drive, request_for):
    stream = experiences(2)  # of two classes the gradients would be equal in size
    strategy = drive(SalUn(model=model(hidden=()), saliency=share, memory=12), stream).double()
    gone = request_for(2, stream[0], (0,))
    strategy._prepare = lambda raw, augmented: raw.double()
    strategy.grow(gone)
    strategy.begin(gone)
    sizes = [np.abs(g) for g in gradient_of(strategy.model, gone.train)]
    ordered = np.sort(np.concatenate([s.ravel() for s in sizes]))
    threshold = ordered[len(ordered) - int(share * len(ordered))]
    for found, size in zip(strategy.mask.values.values(), sizes, strict=True):
        np.testing.assert_array_equal(found.numpy() > 0, size >= threshold)
    for origin, parameter in zip(strategy.origin.values.values(), strategy.model.parameters(), strict=True):
        assert torch.equal(origin, parameter)
    assert strategy.measurements() == {"salient": pytest.approx(share, abs=1 / len(ordered))}


def test_what_has_no_gradient_is_never_salient():
    assert salient(torch.tensor([0.0, 3.0, 0.0, 0.0, 1.0]), 0.6).tolist() == [False, True, False, False, True]
    assert salient(torch.tensor([2.0, 3.0, 4.0, 1.0]), 0.5).tolist() == [False, True, True, False]
    assert salient(torch.tensor([2.0, 3.0, 4.0, 1.0]), 0.1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_only_salient_weights_move_whatever_the_optimizer_does(
    optimizer, experiences, model, drive, answer, request_for
):
    """Weight decay and momentum, too: the mask of gradients alone would let the former through."""
    (e,) = experiences(1)
    strategy = drive(SalUn(model=model(), memory=12, optimizer=optimizer, lr=0.02, weight_decay=0.1), [e])
    gone, masks = request_for(1, e, (0,)), []
    before = [p.detach().clone() for p in strategy.model.parameters()]
    note = lambda *_: masks.append([m.clone() > 0 for m in strategy.mask.values.values()])  # noqa: E731
    answer(strategy, gone, each_step=note)
    assert all(all(torch.equal(a, b) for a, b in zip(masks[0], m, strict=True)) for m in masks)
    for parameter, old, mask in zip(strategy.model.parameters(), before, masks[0], strict=True):
        assert torch.equal(parameter[~mask], old[~mask])
        assert (parameter[mask] != old[mask]).all()
    kept = [*strategy.mask.values.values(), *strategy.origin.values.values()]
    assert not any(bool(t.any()) for t in kept)  # nothing of the model before the request is held after it


def test_loss_by_hand(linear):
    strategy = SalUn(model=linear(), memory=4, replay_batch=3, retain_weight=0.4)
    strategy.memory.add(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), rows=torch.tensor([5]))
    strategy.global_batch = 1
    loss = strategy.forget_step((torch.tensor([[0.0, 1.0]]), torch.tensor([0])), 0)
    new, replayed = (torch.tensor([[0.0, 2.5]]).double(), torch.tensor([[1.0, 0.5]]).double())
    expected = -new.log_softmax(1)[0, 0] - 0.4 * replayed.log_softmax(1)[0, 0]
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_request_resumed_in_its_middle_has_the_same_mask(experiences, model, drive, request_for):
    (e,) = experiences(1)
    strategy = drive(SalUn(model=model(), memory=12), [e])
    gone = request_for(1, e, (0,))
    strategy.grow(gone)
    strategy.begin(gone)
    other = SalUn(model=model(), memory=12)
    for x in (e, gone):
        other.grow(x)
    other.load_state_dict(copy.deepcopy(strategy.state_dict()), strict=True)
    for one, two in zip(strategy.mask.values.values(), other.mask.values.values(), strict=True):
        assert torch.equal(one, two)
    assert other.measurements() == strategy.measurements()


def test_learning_is_plain_training(experiences, model, drive, equal):
    stream = experiences()
    assert equal(drive(SalUn(model=model()), stream).model, drive(Naive(model=model()), stream).model)


def test_it_forgets_the_class_and_learns_it_again(experiences, model, drive, answer, request_for):
    stream = experiences(1)
    strategy = drive(SalUn(model=model(), lr=0.2, memory=24, replay_batch=8), stream, epochs=10)
    gone = request_for(1, stream[0], (0,))
    kept = stream[0].train.subset((stream[0].train.targets() == 1).nonzero()[:, 0])
    answer(strategy, gone, epochs=20)
    assert accuracy(strategy, gone.train) == 0.0
    assert accuracy(strategy, kept) == 1.0
    drive(strategy, [Experience(2, "again", Kind.LEARN, gone.train, classes=(0,))], epochs=20)
    assert accuracy(strategy, gone.train) > 0.9


@pytest.mark.parametrize(("option", "value"), [("saliency", 0), ("saliency", 1.5), ("retain_weight", -1)])
def test_refuses_values_out_of_range(option, value, model):
    with pytest.raises(UserError, match=rf"strategy.{option}: {value} is out of range"):
        SalUn(model=model(), **{option: value})
