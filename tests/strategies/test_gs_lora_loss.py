"""The loss of `gs_lora`: its terms by hand, its gradient, and what the group lasso does."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from gs_lora_bench import SHAPE, asked, blocks_of, erased_batch, forget, learn, make, pool, reference, run, step_loss

from clplat.adapters.groups import group_norms, shrink
from clplat.components.losses import hinge

# --- the loss and its gradient, against float64 -----------------------------------------------------------------------


@pytest.mark.parametrize("bound", [30.0, 0.01], ids=["below the bound", "beyond it"])
@pytest.mark.parametrize(("beta", "alpha"), [(0.7, 0.3), (0.7, 0.0), (0.0, 0.3), (0.0, 0.0)])
def test_loss_and_gradient_agree_with_the_equation_in_float64(bound, beta, alpha):
    strategy, retained, _ = asked(forgetting=[beta], sparsity=alpha, bound=bound, rank=2, lora_alpha=3.0)
    fx, fy = erased_batch(strategy)
    rx, ry = retained.batch(torch.arange(6))
    loss = step_loss(strategy, retained)
    loss.backward()
    leaves, _, logits = reference(strategy)
    ce_r, ce_f = F.cross_entropy(logits(rx), ry), F.cross_entropy(logits(fx), fy)
    lasso = sum(torch.sqrt(sum((p**2).sum() for p in group)) for group in blocks_of(leaves))
    expected = ce_r + beta * torch.relu(bound - ce_f) + alpha * lasso
    expected.backward()
    assert (ce_f.item() < bound) == (bound == 30.0)
    assert set(fy.tolist()) == {1}
    assert 1 not in ry.tolist()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for name, pair in strategy.lora.factors(strategy.adapter).items():
        for mine, theirs in zip(pair, leaves[name], strict=True):
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_bounded_loss_and_gradient_are_zero_at_the_bound_and_minus_the_gradient_below():
    strategy = make()
    losses = torch.tensor([1.0, 3.0, 5.0], requires_grad=True)
    for bound, value, slope in ((3.0, 0.0, 0.0), (2.0, 0.0, 0.0), (4.0, 1.0, -1 / 3)):
        losses.grad = None
        loss = hinge(strategy.mean(bound - losses), 1)
        loss.backward()
        assert loss.item() == pytest.approx(value)  # of the batch's mean, not of each sample
        torch.testing.assert_close(losses.grad, torch.full((3,), slope))


@pytest.mark.parametrize(("other", "slope"), [(6.0, 0.0), (3.5, -0.5), (-1.0, -0.5)])
def test_the_bound_is_held_against_the_mean_of_all_processes(monkeypatch, other, slope):
    strategy = make()
    strategy.world_size, strategy.global_batch = 2, 4
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.add_(3.0 - other))  # the other process's mean gap
    mine = 5.0 if other < 0 else 2.0  # one process is beyond 3, both together are or are not
    losses = torch.tensor([mine - 0.5, mine + 0.5], requires_grad=True)
    hinge(strategy.mean(3.0 - losses), 2).backward()
    torch.testing.assert_close(losses.grad, torch.full((2,), slope))


def test_without_its_terms_the_gradient_is_that_of_the_retained_batch():
    strategy, retained, _ = asked(forgetting=[0.0], sparsity=0.0)
    raw, labels = retained.batch(torch.arange(6))
    step_loss(strategy, retained).backward()
    mine = [p.grad.clone() for p in strategy.lora.parameters_of(strategy.adapter)]
    strategy.zero_grad()
    F.cross_entropy(strategy.model(raw), labels).backward()
    for a, p in zip(mine, strategy.lora.parameters_of(strategy.adapter), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-5, atol=1e-5)


# --- the group lasso --------------------------------------------------------------------------------------------------


def groups_of(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [[(2, 3), (4, 2)], [(2, 5)]]
    return [[torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in g] for g in shapes]


def test_group_norms_by_hand_and_their_gradient():
    groups = groups_of()
    norms = group_norms(groups)
    by_hand = [math.sqrt(sum(float((p.detach() ** 2).sum()) for p in g)) for g in groups]
    torch.testing.assert_close(norms, torch.tensor(by_hand, dtype=torch.float64))
    norms.sum().backward()
    for group, norm in zip(groups, by_hand, strict=True):
        for p in group:
            torch.testing.assert_close(p.grad, p.detach() / norm)


@pytest.mark.parametrize("factor", [-2.0, 0.5, 3.0])
def test_lasso_is_homogeneous_of_degree_one(factor):
    scaled = [[factor * p for p in g] for g in groups_of()]
    torch.testing.assert_close(group_norms(scaled).sum(), abs(factor) * group_norms(groups_of()).sum())


def test_lasso_is_zero_only_where_all_is_and_its_gradient_is_finite_there():
    groups = [[torch.zeros(2, 3, requires_grad=True), torch.zeros(4, 2, requires_grad=True)]]
    group_norms(groups).sum().backward()
    assert group_norms(groups).item() == 0
    assert all((p.grad == 0).all() for p in groups[0])
    with torch.no_grad():
        groups[0][1][0, 0] = 1e-3
    assert group_norms(groups).item() > 0


def test_fresh_factors_have_a_finite_gradient():
    strategy, retained, _ = asked(stir=False, sparsity=0.1)
    step_loss(strategy, retained).backward()
    for a, b in strategy.lora.factors(strategy.adapter).values():
        assert a.grad.isfinite().all()
        assert b.grad.isfinite().all()
        assert not b.any()


def test_shrinking_is_the_proximal_step():
    groups = [[p.detach() for p in g] for g in groups_of()]
    before = copy.deepcopy(groups)
    norms = group_norms(before)
    by = float(norms.min()) * 0.4
    shrink(groups, by)
    for group, old, norm in zip(groups, before, norms, strict=True):
        for p, q in zip(group, old, strict=True):
            torch.testing.assert_close(p, q * (1 - by / norm))
    shrink(groups, 1e3)
    assert all((p == 0).all() for g in groups for p in g)
    shrink(groups, 1e3)  # of zeros: zeros
    assert all((p == 0).all() for g in groups for p in g)


@pytest.mark.parametrize("grouping", ["block", "lora", "matrix"])
def test_a_large_weight_with_the_proximal_step_leaves_the_model_as_it_was(grouping):
    data, x = pool(), torch.randn(5, *SHAPE)
    strategy = make(sparsity=1e6, proximal=True, grouping=grouping)
    run(strategy, learn(data), epochs=3)
    strategy.eval()
    before = strategy.predict(x)
    run(strategy, forget(data, (1,)), epochs=2)
    strategy.eval()
    assert torch.equal(strategy.predict(x), before)
    assert strategy.norms == [0.0] * {"block": 3, "lora": 6, "matrix": 12}[grouping]
    assert strategy.measurements()["zero_groups"] == 1.0


def test_a_larger_weight_makes_more_groups_zero():
    shares = []
    for alpha in (0.0, 0.4, 4.0):
        strategy = make(sparsity=alpha, proximal=True, lora_alpha=2.0)
        run(strategy, learn(pool()), epochs=3)
        run(strategy, forget(pool(), (1,)), epochs=30)
        shares.append(sum(strategy.norms))
    assert shares[0] > shares[1] > shares[2]


def test_without_the_proximal_step_a_large_weight_shrinks_the_groups():
    norms = []
    for alpha in (0.0, 10.0):
        strategy = make(sparsity=alpha, forget_optimizer="sgd", forget_lr=0.01)
        run(strategy, learn(pool()), epochs=3)
        run(strategy, forget(pool(), (1,)), epochs=20)
        norms.append(max(strategy.norms))
    assert norms[1] < 0.15 < norms[0]  # about one step of the rate · weight around zero


def test_no_sparsity_in_the_first_epochs():
    strategy, retained, _ = asked(sparsity=0.5, sparsity_warmup=2, forgetting=[0.0])
    lasso = 0.5 * group_norms(strategy.lora.groups(strategy.adapter)).sum().item()
    losses = [step_loss(strategy, retained, batch_idx=k).item() for k in (0, 1, 0, 1, 0, 1)]
    assert losses[:4] == pytest.approx([losses[0]] * 4)
    assert losses[4:] == pytest.approx([losses[0] + lasso] * 2, rel=1e-5)
