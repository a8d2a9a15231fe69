import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gs_lora_bench import (
    CLASSES,
    SHAPE,
    asked,
    blocks_of,
    erased_batch,
    forget,
    learn,
    make,
    network,
    pool,
    reference,
    run,
    step_loss,
)

from clplat.adapters import LoRA
from clplat.backbones.vit import vit_micro
from clplat.errors import UserError
from clplat.strategies.gs_lora import group_norms, shrink, some_of_each

# --- the loss and its gradient, against float64 -----------------------------------------------------------------------


@pytest.mark.parametrize("bound", [30.0, 0.01], ids=["below the bound", "beyond it"])
@pytest.mark.parametrize(("beta", "alpha"), [(0.7, 0.3), (0.7, 0.0), (0.0, 0.3), (0.0, 0.0)])
def test_loss_and_gradient_agree_with_the_equation_in_float64(bound, beta, alpha):
    strategy, retained, _ = asked(forgetting=[beta], sparsity=alpha, bound=bound, rank=2, lora_alpha=3.0)
    fx, fy = erased_batch(strategy)
    rx, ry = retained.batch(torch.arange(6))
    loss = step_loss(strategy, retained)
    loss.backward()
    leaves, logits = reference(strategy)
    ce_r, ce_f = F.cross_entropy(logits(rx), ry), F.cross_entropy(logits(fx), fy)
    lasso = sum(torch.sqrt(sum((p**2).sum() for p in group)) for group in blocks_of(leaves))
    expected = ce_r + beta * torch.relu(bound - ce_f) + alpha * lasso
    expected.backward()
    assert (ce_f.item() < bound) == (bound == 30.0)
    assert set(fy.tolist()) == {1}
    assert 1 not in ry.tolist()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    for name, pair in strategy.lora.factors(strategy.adapter).items():
        for mine, theirs in zip(pair, leaves[name], strict=True):
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


def test_bounded_loss_and_gradient_are_zero_at_the_bound_and_minus_the_gradient_below():
    strategy = make()
    losses = torch.tensor([1.0, 3.0, 5.0], requires_grad=True)
    for bound, value, slope in ((3.0, 0.0, 0.0), (2.0, 0.0, 0.0), (4.0, 1.0, -1 / 3)):
        losses.grad = None
        loss = strategy._bounded(losses, bound)
        loss.backward()
        assert loss.item() == pytest.approx(value)  # of the batch's mean, not of each sample
        torch.testing.assert_close(losses.grad, torch.full((3,), slope))


@pytest.mark.parametrize(("other", "slope"), [(6.0, 0.0), (3.5, -0.5), (-1.0, -0.5)])
def test_the_bound_is_held_against_the_mean_of_all_processes(monkeypatch, other, slope):
    strategy = make()
    strategy.world_size, strategy.global_batch = 2, 4
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.add_(other))  # the other process's mean
    mine = 5.0 if other < 0 else 2.0  # one process is beyond 3, both together are or are not
    losses = torch.tensor([mine - 0.5, mine + 0.5], requires_grad=True)
    strategy._bounded(losses, 3.0).backward()
    torch.testing.assert_close(losses.grad, torch.full((2,), slope))


def test_without_its_terms_the_gradient_is_that_of_the_retained_batch():
    strategy, retained, _ = asked(forgetting=[0.0], sparsity=0.0)
    raw, labels = retained.batch(torch.arange(6))
    step_loss(strategy, retained).backward()
    mine = [p.grad.clone() for p in strategy.lora.parameters_of(strategy.adapter)]
    strategy.zero_grad()
    F.cross_entropy(strategy.model(raw), labels).backward()
    for a, p in zip(mine, strategy.lora.parameters_of(strategy.adapter), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-5, atol=1e-6)


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


# --- what moves, and when ---------------------------------------------------------------------------------------------


def test_everything_outside_the_factors_is_bitwise_unchanged_until_the_merge():
    data, moved = pool(), []
    strategy = make()
    run(strategy, learn(data), epochs=2)
    request = forget(data, (1,))
    strategy.grow(request)
    before = {k: v.clone() for k, v in strategy.model.state_dict().items()}

    def compare(strategy):
        now = strategy.model.state_dict()
        moved.append({k for k in before if not torch.equal(now[k], before[k])})

    strategy.request -= 1  # `run` grows again
    run(strategy, request, epochs=3, each_step=compare)
    factors = {k for k in before if ".lora_" in k}
    assert all(m <= factors for m in moved)
    assert moved[-1] == factors
    after = strategy.model.state_dict()
    merged = {k for k in before if not torch.equal(after[k], before[k])} - factors
    assert merged == {f"backbone.{n}.base_layer.weight" for n in strategy.lora.layers}


def test_only_the_factors_are_trainable_in_a_request_and_all_else_is_afterwards():
    data = pool()
    strategy = make()
    everything = sum(p.requires_grad for p in strategy.parameters())
    run(strategy, learn(data), epochs=1)
    request = forget(data, (1,))
    strategy.grow(request)
    trainable = {id(p) for p in strategy.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in strategy.lora.parameters_of("request")}
    assert sum(p.numel() for p in strategy.lora.parameters_of("request")) == 3 * 2 * 2 * (8 + 32)
    strategy.begin(request)
    strategy.training_data(request)
    strategy.end(request)
    strategy.grow(learn(data, index=2))
    assert sum(p.requires_grad for p in strategy.parameters()) == everything
    assert not any(p.requires_grad for p in strategy.lora.parameters_of("request"))


@pytest.mark.parametrize(("dim", "depth", "heads", "count"), [(512, 6, 8, 245_760), (768, 12, 12, 737_280)])
def test_trainable_parameters_of_the_published_networks(dim, depth, heads, count):
    lora = LoRA(vit_micro((3, 8, 8), patch_size=8, dim=dim, depth=depth, heads=heads), "ffn", rank=8, alpha=1.0)
    lora.add("request")
    assert sum(p.numel() for p in lora.parameters_of("request")) == count


def test_outputs_are_those_of_the_merged_model_after_reinitialisation_and_before_the_merge():
    data, x = pool(), torch.randn(5, *SHAPE)
    strategy = make()
    run(strategy, learn(data), epochs=2)
    for number, erased in enumerate(((0,), (1,)), start=1):
        strategy.eval()
        before = strategy.predict(x)
        request = forget(data, erased, index=number)
        strategy.grow(request)
        strategy.begin(request)
        strategy.eval()
        torch.testing.assert_close(strategy.predict(x), before, rtol=1e-6, atol=1e-6)
        strategy.request -= 1
        run(strategy, request, epochs=2, steps=4)  # not ended yet
        strategy.eval()
        unmerged = strategy.predict(x)
        assert not torch.allclose(unmerged, before, atol=1e-4)
        strategy.end(request)
        torch.testing.assert_close(strategy.predict(x), unmerged, rtol=1e-5, atol=1e-5)
        assert strategy.lora.active == ()  # inference costs nothing more


def test_factors_are_made_anew_in_the_bounds_of_the_first_and_of_later_requests():
    data = pool()
    strategy = make()
    run(strategy, learn(data), epochs=1)
    for number, erased, slope in ((1, (0,), 5), (2, (1,), 50)):
        run(strategy, forget(data, erased, index=number), epochs=2)
        request = forget(data, (2,), index=3)
        strategy.grow(request)
        strategy.request = number
        strategy.begin(request)
        for a, b in strategy.lora.factors("request").values():
            assert 0.5 < a.abs().max() / math.sqrt(6 / ((1 + slope) * a.shape[1])) <= 1
            assert not b.any()


def test_a_request_erases_and_keeps_the_rest():
    data = pool(per_class=30)
    strategy = make(memory=40, lora_alpha=2.0, lr=0.05, forget_lr=0.02)
    run(strategy, learn(data), epochs=30)

    def accuracy(classes):
        strategy.eval()
        rows = torch.isin(data.labels, torch.tensor(classes))
        return (strategy.predict(data.inputs[rows]).argmax(1) == data.labels[rows]).float().mean().item()

    assert accuracy([0, 1, 2, 3]) > 0.95
    run(strategy, forget(data, (1,)), epochs=25)
    assert accuracy([1]) < 0.05
    assert accuracy([0, 2, 3]) > 0.9
    run(strategy, forget(data, (3,), index=2), epochs=25)
    assert accuracy([1, 3]) < 0.05
    assert accuracy([0, 2]) > 0.9


def test_where_the_user_froze_the_layers_each_request_keeps_an_adapter():
    data, model = pool(), network()
    model.backbone.requires_grad_(False)
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    strategy = make(model=model)
    run(strategy, learn(data), epochs=2)
    for number, erased in enumerate(((0,), (1,)), start=1):
        run(strategy, forget(data, erased, index=number), epochs=2)
    assert list(strategy.lora.adapters) == ["request_1", "request_2"] == list(strategy.lora.active)
    after = {k.replace(".base_layer.", "."): v for k, v in model.backbone.state_dict().items()}
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert all(b.any() for a in strategy.lora.adapters for _, b in strategy.lora.factors(a).values())


# --- which samples ----------------------------------------------------------------------------------------------------


def test_retained_and_erased_are_disjoint_and_cover_what_was_learned():
    data = pool()
    strategy = make(memory=40)
    run(strategy, learn(data), epochs=1)
    gone = set()
    for number, erased in enumerate(((2,), (0, 3)), start=1):
        request = forget(data, erased, index=number)
        strategy.grow(request)
        strategy.begin(request)
        retained = set(strategy.training_data(request).targets().tolist())
        now = set(strategy._erased.targets().tolist())
        assert now == set(erased)
        assert not retained & now
        assert not retained & gone
        assert retained | now | gone == set(range(CLASSES))
        strategy.end(request)
        gone |= now
    assert len(strategy.memory) == 10  # those of class 1


def test_samples_to_erase_come_round_shuffled_each_as_often():
    strategy, _, _ = asked()
    seen = [x.flatten().tolist() for _ in range(5) for x in strategy._next(4)[0]]  # 20 of 10 samples
    one, two = seen[:10], seen[10:]
    assert sorted(one) == sorted(two)
    assert len({tuple(x) for x in one}) == 10
    assert one != two


def test_a_batch_to_erase_is_as_large_as_the_retained_one():
    strategy, retained, _ = asked()
    sizes = []
    features = strategy.model.features
    strategy.model.features = lambda x: sizes.append(len(x)) or features(x)
    step_loss(strategy, retained, size=5)
    assert sizes == [10]
    assert strategy.drawn == 5


def test_shots_are_drawn_per_class_and_for_each_request_anew():
    data = pool()
    strategy = make(memory=40, shots=4)
    run(strategy, learn(data), epochs=1)
    strategy.grow(forget(data, (1,)))
    strategy.begin(forget(data, (1,)))
    retained = strategy.training_data(forget(data, (1,)))
    assert torch.bincount(retained.targets()).tolist() == [4, 0, 4, 4]
    assert torch.bincount(strategy._erased.targets()).tolist() == [0, 4]
    again = strategy.training_data(forget(data, (1,)))  # as on resume
    assert torch.equal(again.rows, retained.rows)
    strategy.request += 1
    assert not torch.equal(strategy.training_data(forget(data, (1,))).rows, retained.rows)


def test_some_of_each_draws_uniformly():
    labels = torch.tensor([0] * 5 + [1] * 2 + [3] * 7)
    counts = torch.zeros(len(labels))
    for seed in range(600):
        rows = some_of_each(labels, 3, seed)
        assert torch.bincount(labels[rows]).tolist() == [3, 2, 0, 3]
        assert rows.tolist() == sorted(set(rows.tolist()))
        counts[rows] += 1
    assert ((counts[:5] / 600 - 3 / 5).abs() < 0.08).all()
    assert ((counts[7:] / 600 - 3 / 7).abs() < 0.08).all()


def test_missing_classes_leave_no_sample():
    data = pool()
    strategy = make(memory=30, missing=[0, 2])
    run(strategy, learn(data), epochs=1)
    assert strategy.memory.data().targets().unique().tolist() == [1, 3]
    run(strategy, forget(data, (1,)), epochs=1)
    assert strategy.memory.data().targets().unique().tolist() == [3]


def test_a_memory_with_nothing_left_trains_on_what_is_to_be_erased():
    data = pool()
    strategy = make(forgetting=[1.0], sparsity=0.0, bound=50.0)
    run(strategy, learn(data, (1,)), epochs=2)
    losses = run(strategy, forget(data, (1,)), epochs=20)
    assert losses[-1] < losses[0]  # bound − CE falls as CE rises


def test_the_weight_of_a_request_is_that_of_its_number():
    strategy = make(forgetting=[0.1, 0.2])
    weights = []
    for k in range(4):
        strategy.request = k + 1
        weights.append(strategy._weight)
    assert weights == [0.1, 0.2, 0.2, 0.2]


def test_default_bound_is_a_multiple_of_guessing():
    assert make(bound=None).bound == pytest.approx(2 * math.log(CLASSES))
    assert make(bound=None, bound_chance=3.0).bound == pytest.approx(3 * math.log(CLASSES))


def test_learning_and_requests_have_optimizers_of_their_own():
    data = pool()
    strategy = make(optimizer="sgd", lr=0.3, momentum=0.5, weight_decay=0.01, schedule="constant", warmup=0.2)
    strategy.grow(learn(data))
    sgd = strategy.configure_optimizers()
    assert type(sgd).__name__ == "SGD"
    assert (sgd.defaults["lr"], sgd.defaults["weight_decay"], strategy.warmup) == (0.3, 0.01, 0.2)
    strategy.grow(forget(data, (1,)))
    adamw = strategy.configure_optimizers()
    assert type(adamw).__name__ == "AdamW"
    assert (adamw.defaults["lr"], adamw.defaults["weight_decay"]) == (0.01, 0.05)
    assert (strategy.schedule, strategy.warmup) == ("cosine", 0.0)
    strategy.grow(learn(data, index=2))
    assert (type(strategy.configure_optimizers()).__name__, strategy.schedule, strategy.warmup) == (
        "SGD",
        "constant",
        0.2,
    )


def test_replay_in_learning_joins_the_batch():
    data = pool()
    strategy = make(replay_batch=3)
    run(strategy, learn(data, (0, 1)), epochs=1)
    sizes = []
    forward = strategy.model.forward
    strategy.model.forward = lambda x: sizes.append(len(x)) or forward(x)
    run(strategy, learn(data, (2, 3), index=1), epochs=1, steps=1)
    assert sizes == [6 + 3]


# --- state ------------------------------------------------------------------------------------------------------------


def test_a_merged_state_with_factors_that_are_not_zero_is_refused():
    data = pool()
    strategy = make()
    run(strategy, learn(data), epochs=1)
    saved = {}

    def keep(strategy):
        saved.update({k: v.clone() for k, v in strategy.state_dict().items() if ".lora_" in k})

    run(strategy, forget(data, (1,)), epochs=2, each_step=keep)
    other = make()
    for e in (learn(data), forget(data, (1,))):
        other.grow(e)
    other.load_state_dict(strategy.state_dict())
    x = torch.randn(3, *SHAPE)
    other.eval()
    strategy.eval()
    assert torch.equal(other.predict(x), strategy.predict(x))
    with pytest.raises(UserError, match="count twice"):
        other.load_state_dict({**strategy.state_dict(), **saved})


def test_no_sample_to_erase_is_held_after_a_request():
    data = pool()
    strategy = make()
    run(strategy, learn(data), epochs=1)
    run(strategy, forget(data, (1,)), epochs=1)
    assert strategy._erased is None
    held = {tuple(x.flatten().tolist()) for x in strategy.memory.stored["inputs"]}
    assert not held & {tuple(x.flatten().tolist()) for x in data.inputs[data.labels == 1]}


@pytest.mark.parametrize(
    ("bad", "key"),
    [
        ({"forgetting": []}, "forgetting"),
        ({"forgetting": [-1.0]}, "forgetting"),
        ({"bound": 0.0}, "bound"),
        ({"sparsity": -1.0}, "sparsity"),
        ({"memory": 3}, "memory"),
        ({"shots": 0}, "shots"),
        ({"missing": [4]}, "missing"),
        ({"grouping": "model"}, "grouping"),
        ({"forget_lr": 0.0}, "forget_lr"),
        ({"rank": 0}, "rank"),
    ],
)
def test_options_out_of_range_are_refused(bad, key):
    with pytest.raises(UserError, match=f"strategy.{key}"):
        make(**bad)


def test_sample_requests_leave_their_class_in_the_memory():
    data = pool()
    strategy = make(memory=40)
    run(strategy, learn(data), epochs=1)
    request = replace(forget(data, (1,)), classes=(), request=("sample:12",), train=data.subset(torch.tensor([12])))
    run(strategy, request, epochs=1)
    assert torch.bincount(strategy.memory.data().targets()).tolist() == [10, 9, 10, 10]
