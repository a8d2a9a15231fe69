from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from clplat.components.hypernetwork import Recurrent, output_change
from clplat.errors import UserError
from clplat.strategies.dp_hnet import DPHNet, fisher

SMALL = {"embedding": 4, "chunk": 25, "chunk_embedding": 3, "hidden": 6}


@pytest.fixture
def experiences(experiences):
    """Those of all strategies, each a task of its own."""
    return lambda *a, **k: [replace(e, task=e.index) for e in experiences(*a, **k)]


def make(model, **options):
    torch.manual_seed(0)
    return DPHNet(model=model(), **{**SMALL, "lr": 0.05, "beta": 0.5, **options})


def recurrent(sizes=25, size=98, hold_states=0.0):
    torch.manual_seed(0)
    return Recurrent(size, 4, sizes, 3, 6, hold_states)


def test_parameters_are_counted_as_specified():
    generator = recurrent()
    expected = 4 * 6 * (4 + 3 + 6 + 2) + 25 * (6 + 1) + 4 * 3
    assert sum(p.numel() for p in generator.parameters()) == expected


@pytest.mark.parametrize("sizes", [25, [40, 40, 10, 8]])
def test_pieces_depend_on_those_before_them_only(sizes):
    generator, codes = recurrent(sizes), torch.randn(2, 4)
    ends = [25, 50, 75, 98] if sizes == 25 else [40, 80, 90, 98]
    before = generator(codes, 0)
    assert before.shape == (2, 98)
    start_pieces = generator.pieces[0].detach().clone()
    for k in range(4):
        with torch.no_grad():
            generator.pieces[0].copy_(start_pieces)
            generator.pieces[0][k] += 1
        after = generator(codes, 0)
        start = 0 if k == 0 else ends[k - 1]
        assert torch.equal(after[:, :start], before[:, :start])
        for a, b in zip([0, *ends[:-1]][k:], ends[k:], strict=True):
            assert not torch.allclose(after[:, a:b], before[:, a:b])


def test_without_recurrence_pieces_are_independent():
    """Recurrent weights and the forget path at zero: piece k is V (o_k tanh(i_k g_k)) + b of [e; c_k] alone."""
    generator, codes = recurrent(), torch.randn(2, 4)
    cell, head = generator.cells[0], generator.heads[0][0]
    with torch.no_grad():
        cell.weight_hh_l0.zero_()
        cell.weight_ih_l0[6:12].zero_()
        cell.bias_ih_l0[6:12] = -1e9
    pieces = []
    for c in generator.pieces[0]:
        x = torch.cat([codes, c.expand(2, -1)], 1)
        i, _, g, o = (x @ cell.weight_ih_l0.T + cell.bias_ih_l0 + cell.bias_hh_l0).split(6, 1)
        pieces.append(head(o.sigmoid() * (i.sigmoid() * g.tanh()).tanh()))
    torch.testing.assert_close(generator(codes, 0), torch.cat(pieces, 1)[:, :98])


def test_growth_keeps_the_weights_of_earlier_tasks(experiences, model, drive):
    stream = experiences(3)
    strategy = drive(make(model, grow_every=2), stream[:2])
    before = [strategy.model.omega(j).clone() for j in range(2)]
    drive(strategy, stream[2:])
    assert strategy.model.levels == [0, 0, 1]
    assert strategy._old == []  # nothing left that could move
    assert all(torch.equal(strategy.model.omega(j), before[j]) for j in range(2))
    with torch.no_grad():  # the new cell takes the frozen one's states
        after = strategy.model.omega(2)
        strategy.model.generator.pieces[0] += 1
    assert not torch.allclose(strategy.model.omega(2), after)


def test_growth_frees_the_new_cell_only(experiences, model):
    strategy, stream = make(model, grow_every=1), experiences(2)
    for e in stream:
        strategy.grow(e)
    trained = {n for n, p in strategy.model.generator.named_parameters() if p.requires_grad}
    assert trained
    assert all(".1" in n for n in trained)


def test_fisher_by_a_loop_over_samples(experiences, model, monkeypatch):
    monkeypatch.setattr("clplat.components.fisher.VALUES_AT_ONCE", 300)  # so that several chunks are needed
    strategy, stream = make(model), experiences(1)
    strategy.grow(stream[0])
    x, y = stream[0].train.all()
    omega, total = strategy.model.omega(0).detach().requires_grad_(), 0.0
    for i in range(7):
        loss = F.cross_entropy(strategy.model.logits(omega, x[i : i + 1], 0), y[i : i + 1])
        total = total + torch.autograd.grad(loss, omega)[0] ** 2 / 7
    torch.testing.assert_close(fisher(strategy.model, 0, x[:7], y[:7]), total)


def test_importance_is_the_fisher_information_scaled_to_mean_one(experiences, model, drive):
    strategy, stream = make(model), experiences(2)
    drive(strategy, stream)
    torch.testing.assert_close(strategy.fisher.mean(1), torch.ones(2))
    x, y = stream[1].train.all()
    strategy.eval()
    found = fisher(strategy.model, 1, x, y)
    torch.testing.assert_close(strategy.fisher[1], found / found.mean())
    assert not strategy.fisher[0, : 5 * 7].eq(strategy.fisher[1, : 5 * 7]).all()


def test_importance_one_is_the_plain_regulariser_and_zero_is_none(experiences, model, drive):
    strategy = drive(make(model), experiences(2))
    outputs, held = strategy.model.generator.outputs(*strategy.model.tasks([0])), strategy.held.outputs
    assert strategy._change() != output_change(outputs, held)
    strategy.fisher.fill_(1)
    torch.testing.assert_close(strategy._change(), output_change(outputs, held))
    plain = drive(make(model, fisher_samples=0), experiences(2))
    torch.testing.assert_close(
        plain._change(), output_change(plain.model.generator.outputs(*plain.model.tasks([0])), plain.held.outputs)
    )
    strategy.fisher.zero_()
    assert strategy._change() == 0


def test_states_are_held_too(experiences, model, drive):
    strategy = drive(make(model, hold_states=4.0, fisher_samples=0), experiences(2))
    generator, tasks = strategy.model.generator, strategy.model.tasks([0])
    states = generator.states(*tasks)
    with torch.no_grad():
        once = strategy.held.outputs[:, generator.size :] / 2
        weights = strategy.held.outputs[:, : generator.size]
    expected = (generator(*tasks) - weights).square().sum() + 4 * (states.flatten(1) - once).square().sum()
    torch.testing.assert_close(strategy._change(), expected)


def test_first_step_has_no_regulariser(experiences, model, drive):
    strategy, stream = make(model), experiences(2)
    drive(strategy, stream[:1])
    strategy.grow(stream[1])
    strategy.begin(stream[1])
    change = strategy._change()
    assert change.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(change, list(strategy.model.generator.parameters())))


@pytest.mark.parametrize("infer", ["entropy", "network"])
def test_learns_and_keeps(experiences, model, drive, infer):
    stream = experiences(3)
    options = {"optimizer": "adam", "lr": 0.01, "beta": 2.0, "infer": infer, "memory": 20, "replay_batch": 6}
    strategy = drive(make(model, **options), stream, epochs=40).eval()
    for e in stream:
        x, y = e.train.all()
        assert (strategy.predict(x, e.task).argmax(1) == y).float().mean() > 0.9


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layerwise": True, "hold_states": 1.0},
        {"grow_every": 1},
        {"grow_every": 2, "held_outputs": "recomputed", "fisher_samples": 0, "lookahead": True},
    ],
)
def test_resumes(experiences, model, resumes, options):
    assert resumes(lambda: make(model, **options), experiences(3))


def test_refuses_what_is_out_of_range(model):
    with pytest.raises(UserError, match=r"strategy.grow_every: 0 is out of range \(valid: ≥ 1, or null\)"):
        make(model, grow_every=0)
    with pytest.raises(UserError, match=r"strategy.held_outputs: 'factors' is out of range \(valid: stored or recomp"):
        make(model, held_outputs="factors")
