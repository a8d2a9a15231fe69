import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clplat import Data, Experience, Kind
from clplat.backbones.base import Classifier
from clplat.backbones.language_model import language_model
from clplat.backbones.vit import vit_micro
from clplat.errors import UserError
from clplat.heads import Growing, Linear
from clplat.strategies import svd_orthogonal
from clplat.strategies.naive import Naive
from clplat.strategies.svd_orthogonal import SplitLinear, SVDOrthogonal, cosines, kept_rank, normalized
from clplat.stream import Answers

SHAPES = [(7, 5), (5, 7), (6, 6)]  # (o, d)


def split(shape=(7, 5), k=2, block="factored", dtype=torch.float32, seed=0):
    """A split layer and the weight it had."""
    torch.manual_seed(seed)
    layer = SplitLinear(nn.Linear(shape[1], shape[0], dtype=dtype), block)
    before = layer.weight.detach().clone()
    layer.split(k)
    return layer, before


def effective(layer):
    return (layer.weight + (layer.left * layer.scale) @ layer.right if len(layer.scale) else layer.weight).detach()


def svd(weight, k):
    """U_h, S_h, V_h, U_l, S_l, V_l in double precision, by NumPy."""
    u, s, vt = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    return u[:, :k], s[:k], vt[:k].T, u[:, k:], s[k:], vt[k:].T


def backward(layer, seed=1, rows=9):
    torch.manual_seed(seed)
    x = torch.randn(rows, layer.in_features, dtype=layer.weight.dtype)
    out = layer(x)
    (out.square().sum() + (out * torch.randn_like(out)).sum()).backward()


def train(layer, steps, optimizer, post=True, gradients=True, **options):
    """Steps on a fixed regression; returns the largest leak, ‖U_hᵀ U_l‖ or ‖V_lᵀ V_h‖, after any of them."""
    uh, _, vh, *_ = svd(effective(layer), layer.kept)
    uh, vh = torch.from_numpy(uh).float(), torch.from_numpy(vh).float()
    opt = optimizer([p for p in layer.parameters() if p.requires_grad], **options)
    x, y = torch.randn(32, layer.in_features), torch.randn(32, layer.out_features)
    worst = 0.0
    for _ in range(steps):
        opt.zero_grad()
        F.mse_loss(layer(x), y).backward()
        if gradients:
            layer.project_gradients()
        opt.step()
        if post:
            layer.project()
        if len(layer.scale):
            leak = max((uh.T @ layer.left).norm().item(), (layer.right @ vh).norm().item())
            worst = max(worst, leak)
    return worst


@pytest.fixture
def adamw():
    return lambda parameters, **o: torch.optim.AdamW(parameters, lr=1e-2, **o)


# --- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [0, 1, 4, 5])
def test_the_parts_are_the_weight(shape, k):
    layer, before = split(shape, k)
    torch.testing.assert_close(effective(layer), before, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(layer(torch.eye(shape[1])), before.T + layer.bias, atol=1e-6, rtol=1e-5)
    uh, sh, vh, ul, sl, vl = svd(before, k)
    np.testing.assert_allclose(layer.weight.detach().numpy(), (uh * sh) @ vh.T, atol=1e-6)
    np.testing.assert_allclose(layer.scale.detach().numpy(), sl, atol=1e-6)
    np.testing.assert_allclose(np.abs(np.sum(layer.left.detach().numpy() * ul, 0)), 1, atol=1e-5)
    np.testing.assert_allclose(np.abs(np.sum(layer.right.detach().numpy().T * vl, 0)), 1, atol=1e-5)
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 2, 4])  # by U_h, and where r − k < k on a side of r by the complement
def test_gradients_have_nothing_in_the_protected_spaces(shape, k):
    layer, before = split(shape, k)
    backward(layer)
    raw = [p.grad.clone() for p in (layer.left, layer.scale, layer.right)]
    assert all(g.abs().sum() > 0 for g in raw)  # the research scripts' factors get none
    layer.project_gradients()
    uh, _, vh, *_ = svd(before, k)
    assert np.abs(uh.T @ layer.left.grad.numpy()).max() < 1e-6 * raw[0].norm()
    assert np.abs(layer.right.grad.numpy() @ vh).max() < 1e-6 * raw[2].norm()
    assert torch.equal(layer.scale.grad, raw[1])
    np.testing.assert_allclose(layer.left.grad.numpy(), raw[0].numpy() - uh @ (uh.T @ raw[0].numpy()), atol=1e-4)
    np.testing.assert_allclose(layer.right.grad.numpy(), raw[2].numpy() - raw[2].numpy() @ vh @ vh.T, atol=1e-4)
    once = layer.left.grad.clone(), layer.right.grad.clone()
    layer.project_gradients()
    torch.testing.assert_close(layer.left.grad, once[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.right.grad, once[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(16, 12), (12, 16), (12, 12)])
@pytest.mark.parametrize("k", [3, 9])
def test_factors_stay_outside_whatever_the_optimizer(shape, k, adamw):
    layer, _ = split(shape, k)
    assert train(layer, 50, adamw, weight_decay=0.1) <= 1e-5


def test_without_the_second_projection_adam_leaves_the_space(adamw):
    assert train(split((16, 12), 6)[0], 50, adamw, post=False) > 1e-2
    # Gradients alone suffice for SGD, as momentum is linear.
    sgd = torch.optim.SGD
    assert train(split((16, 12), 6)[0], 50, sgd, post=False, lr=1e-2, momentum=0.9) < 1e-5
    assert train(split((16, 12), 6)[0], 50, sgd, post=False, gradients=False, lr=1e-2, momentum=0.9) > 1e-3


def test_inputs_in_the_protected_span_are_mapped_as_before(adamw):
    layer, before = split((16, 12), 6)
    uh, sh, vh, *_ = (torch.from_numpy(t).float() for t in svd(before, 6))
    inside, anywhere = (torch.randn(20, 6) @ vh.T), torch.randn(20, 12)
    train(layer, 100, adamw, weight_decay=0.1)
    after = effective(layer)
    torch.testing.assert_close(inside @ after.T, inside @ before.T, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(uh.T @ after, sh[:, None] * vh.T, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after @ vh, uh * sh, atol=1e-5, rtol=1e-4)
    assert (anywhere @ (after - before).T).norm(dim=1).mean() > 0.5


def test_the_paper_s_block_removes_less(adamw):
    layer, before = split((16, 12), 6, "paper")
    uh, _, vh, *_ = (torch.from_numpy(t).float() for t in svd(before, 6))
    backward(layer)
    gradient = layer.weight.grad.clone()
    layer.project_gradients()
    torch.testing.assert_close(layer.weight.grad, gradient - uh @ (uh.T @ gradient @ vh) @ vh.T, atol=1e-4, rtol=1e-5)
    layer.weight.grad = None
    train(layer, 50, adamw, weight_decay=0.1)
    change = effective(layer) - before
    assert (uh.T @ change @ vh).abs().max() < 1e-5
    assert (uh.T @ change).abs().max() > 1e-2
    assert (change @ vh).abs().max() > 1e-2


def test_energy_that_each_form_keeps_of_a_random_gradient():
    """At k = r/2 of 256 x 192: 82 % of the paper's, 32 % of the factored one."""
    torch.manual_seed(0)
    uh, _, vh, *_ = (torch.from_numpy(t) for t in svd(torch.randn(256, 192), 96))
    g = torch.randn(256, 192, dtype=torch.float64)
    paper = g - uh @ (uh.T @ g @ vh) @ vh.T
    both = (g - uh @ (uh.T @ g)) @ (torch.eye(192) - vh @ vh.T)
    assert (paper.norm() / g.norm()).square().item() == pytest.approx(0.82, abs=0.01)
    assert (both.norm() / g.norm()).square().item() == pytest.approx(0.32, abs=0.02)
    for block, projected in (("paper", paper), ("factored", None)):
        layer, _ = split((6, 6), 3, block)
        assert (layer.weight.requires_grad, len(layer.scale)) == ((True, 0) if projected is not None else (False, 3))


@pytest.mark.parametrize("block", ["factored", "paper"])
def test_all_kept_and_none_kept(block, adamw):
    layer, before = split((7, 5), 5, block)
    assert [n for n, p in layer.named_parameters() if p.requires_grad and p.numel()] == ["bias"]
    torch.testing.assert_close(effective(layer), before, atol=1e-6, rtol=1e-5)
    layer, before = split((7, 5), 0, block)
    backward(layer)
    trained = [p for p in layer.parameters() if p.grad is not None]
    raw = [p.grad.clone() for p in trained]
    layer.project_gradients()
    assert all(torch.equal(before, p.grad) for before, p in zip(raw, trained, strict=True))
    train(layer, 3, adamw)
    assert torch.linalg.matrix_rank(effective(layer) - before) == 5


@pytest.mark.parametrize("shape", SHAPES)
def test_merged_and_split_anew_it_is_the_same_function(shape, adamw):
    layer, before = split(shape, 2)
    train(layer, 20, adamw)
    x = torch.randn(11, shape[1])
    out, whole = layer(x), effective(layer)
    layer.merge()
    assert not len(layer.scale)
    assert layer.weight.requires_grad
    torch.testing.assert_close(layer(x), out, atol=1e-5, rtol=1e-5)
    assert (layer(x) - F.linear(x, before, layer.bias)).abs().max() > 0.1  # what was learned is not lost, as by unload
    layer.split(3)
    torch.testing.assert_close(layer(x), out, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(layer.scale.detach(), np.linalg.svd(whole.double().numpy())[1][3:], atol=1e-5)


def test_signs_of_singular_vectors_change_nothing():
    results = []
    for flip in (1.0, -1.0):
        layer, _ = split((7, 5), 2)
        with torch.no_grad():
            layer.left[:, 1] *= flip
            layer.right[1] *= flip
            layer.left_basis[:, 0] *= flip
            layer.right_basis[:, 0] *= flip
        start = effective(layer)
        backward(layer)
        layer.project_gradients()
        torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.01).step()
        layer.project()
        results.append((start, effective(layer)))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-6)


def test_projection_and_the_mean_over_processes_commute():
    whole, parts = split((7, 5), 2)[0], [split((7, 5), 2)[0] for _ in range(2)]
    x, y = torch.randn(8, 5), torch.randn(8, 7)
    F.mse_loss(whole(x), y).backward()
    whole.project_gradients()
    for k, part in enumerate(parts):
        F.mse_loss(part(x[4 * k :][:4]), y[4 * k :][:4]).backward()
        part.project_gradients()
    torch.testing.assert_close(whole.left.grad, (parts[0].left.grad + parts[1].left.grad) / 2, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(whole.right.grad, (parts[0].right.grad + parts[1].right.grad) / 2, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 4])
def test_outputs_and_gradients_are_those_of_peft(shape, k):
    """peft's `osf`: the same forward pass and projected gradients, to rounding."""
    from peft import OSFConfig, get_peft_model

    layer, before = split(shape, k)
    theirs = nn.Sequential(nn.Linear(shape[1], shape[0]))
    theirs[0].load_state_dict({"weight": before, "bias": layer.bias})
    wrapped = get_peft_model(theirs, OSFConfig(target_modules=["0"], effective_rank=k))
    x = torch.randn(9, shape[1])
    outputs = layer(x), wrapped(x)
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-6)
    for out in outputs:
        out.square().sum().backward()
    layer.project_gradients()
    factors = wrapped.base_model.model[0].osf_svd_params["default"]
    for mine, name in ((layer.left, "U_low"), (layer.scale, "S_low"), (layer.right, "V_low")):
        torch.testing.assert_close(mine.grad, factors[name].grad, atol=2e-5, rtol=1e-5)


def test_numbers_kept_for_a_square_matrix():
    """Beside the weight: p (o + d + 1) trained, and the smaller basis of each side; 3, 3 and 2 weights in all."""
    for share, multiple in ((0.25, 3.0), (0.5, 3.0), (0.75, 2.0)):
        layer, _ = split((64, 64), int(64 * share))
        free = 64 - int(64 * share)
        trained = sum(p.numel() for p in layer.parameters() if p.requires_grad) - 64
        assert trained == free * (64 + 64 + 1)
        total = sum(p.numel() for n, p in layer.named_parameters() if n not in ("bias", "scale"))
        assert total == multiple * 64 * 64


def test_half_precision_weights_have_factors_in_single_precision():
    layer, before = split((12, 12), 6, dtype=torch.bfloat16)
    assert layer.left.dtype == layer.right.dtype == layer.left_basis.dtype == torch.float32
    assert layer(torch.randn(3, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert (layer.left.T @ layer.left - torch.eye(6)).abs().max() < 1e-5
    torch.testing.assert_close(effective(layer), before.float(), atol=4e-3, rtol=1e-2)


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_cosines_are_of_the_features_that_both_have():
    x, y = torch.tensor([[3.0, 4.0, 9.0]]), torch.tensor([[4.0, 3.0]])
    assert cosines(x, y).item() == pytest.approx(24 / 25)


def test_importances_have_mean_one():
    assert normalized(torch.tensor([0.2, 0.4, -0.3])).tolist() == pytest.approx([1.0, 2.0, 0.0])
    assert normalized(torch.tensor([-0.2, -0.1])).tolist() == [1.0, 1.0]


def test_ranks_follow_importance(model):
    strategy = SVDOrthogonal(model=model(hidden=(40, 30, 20), features=50))
    ranks = [40, 30, 20]
    assert strategy._kept() == [math.floor(0.8 * r) for r in ranks]  # equal importances
    strategy.importance = [0.0, 1.0, 2.0]
    assert strategy._kept() == [4, 24, 20]  # 0.1 of 40; 0.8 of 30; 1.5 is cut to 1
    assert [kept_rank(f, 10) for f in (-0.5, 0, 0.31, 0.1 + 1 * (0.8 - 0.1), 1.7)] == [0, 0, 3, 8, 10]
    assert kept_rank(0.29, 100) == 29  # 0.29 · 100 is 28.999999999999996
    found = [kept_rank(0.1 + i / 10 * 0.7, 64) for i in range(30)]
    assert found == sorted(found)


@pytest.mark.parametrize(("ranks", "expected"), [("constant", [3, 3]), ("linear", [0, 2])])
def test_schedules(model, experiences, drive, ranks, expected):
    strategy = SVDOrthogonal(
        model=model(), ranks=ranks, target_retention=0.6, retention_per_task=0.2 + 1e-6, least_retention=0.0
    )
    kept = []
    drive(strategy, experiences(3), epochs=1, each_step=lambda s: kept.append(s._layers[0].kept))
    kept = [kept[i] for i in range(0, len(kept), len(kept) // 3)]
    assert kept[0] == 0
    assert kept[1:] == ([3, 3] if ranks == "constant" else [1, 2])
    assert strategy.facts["preserved_fraction"] == kept[2] / 5


def test_importance_is_that_of_the_experience_that_ended(model, experiences, drive):
    stream = experiences(2)
    strategy = SVDOrthogonal(model=model(hidden=(7, 6)), importance_samples=5, lr=1e-2)
    strategy._layers[0].weight.data[:5] += 2 * torch.eye(5)  # so that no cosine is negative
    strategy._layers[1].weight.data.abs_()
    drive(strategy, stream[:1])
    x = stream[0].train.all()[0][torch.arange(5) * 24 // 5].double()
    first, second = (layer.weight.detach().double() for layer in strategy._layers)
    hidden = (x @ first.T + strategy._layers[0].bias.double()).relu()
    raw = []
    for given, weight in ((x, first), (hidden, second)):
        out, n = given @ weight.T, min(weight.shape)
        a, b = given[:, :n], out[:, :n]
        raw.append(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)).mean())
    expected = torch.stack(raw)
    assert (expected > 0.01).all()
    torch.testing.assert_close(
        torch.tensor(strategy.importance, dtype=torch.float64), expected / expected.mean(), atol=1e-6, rtol=1e-6
    )
    assert strategy.training  # the modes are as they were, and no hook is left
    assert not any(layer._forward_pre_hooks for layer in strategy._layers)


# --- the strategy -----------------------------------------------------------------------------------------------------


def test_the_first_experience_is_fine_tuning(model, experiences, drive):
    stream = experiences(1)
    mine = drive(SVDOrthogonal(model=model(), optimizer="adamw", lr=1e-2), stream)
    plain = drive(Naive(model=model(), optimizer="adamw", lr=1e-2), stream)
    state = mine.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in plain.model.state_dict().items())


def update_by_hand(weights, x, y, k, rate, adam):
    """Weights after one step, in NumPy: from dL/dW of CE(head(relu(W x + b))) by the chain rule."""
    w, b, c, d = weights
    pre = x @ w.T + b
    h = np.maximum(pre, 0)
    logits = h @ c.T + d
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    error = (p - np.eye(len(c))[y]) / len(x)
    g = ((error @ c) * (pre > 0)).T @ x  # (o, d)
    uh, sh, vh, ul, sl, vl = svd(torch.from_numpy(w), k)
    du, dv, ds = g @ vl * sl, g.T @ ul * sl, np.diag(ul.T @ g @ vl)
    du, dv = du - uh @ (uh.T @ du), dv - vh @ (vh.T @ dv)
    step = (lambda grad: grad / (np.abs(grad) + 1e-8)) if adam else (lambda grad: grad)  # Adam's first step
    ul, vl, sl = ul - rate * step(du), vl - rate * step(dv), sl - rate * step(ds)
    ul, vl = ul - uh @ (uh.T @ ul), vl - vh @ (vh.T @ vl)
    after = (uh * sh) @ vh.T + (ul * sl) @ vl.T
    return after, b, c - rate * step(error.T @ h), d - rate * step(error.sum(0))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("width", [4, 5, 7])
def test_first_update_and_inference_by_hand(model, experiences, optimizer, width):
    stream = experiences(2)
    net = model(hidden=(width,)).double()
    strategy = SVDOrthogonal(model=net, optimizer=optimizer, lr=0.01, ranks="constant", target_retention=0.6)
    strategy.grow(stream[0])
    strategy.grow(stream[1])
    strategy.begin(stream[1])
    layer, head = strategy._layers[0], net.head
    weights = [t.detach().numpy().copy() for t in (effective(layer), layer.bias, head.weight, head.bias)]
    x, y = stream[1].train.all()
    optimizer_ = strategy.configure_optimizers()
    strategy.training_step((x.double(), y), 0).backward()
    strategy.on_after_backward()
    optimizer_.step()
    strategy.after_step()
    strategy.end(stream[1])
    k = kept_rank(0.6, min(width, 5))
    w, b, c, d = update_by_hand(weights, x.double().numpy(), y.numpy(), k, 0.01, optimizer == "adamw")
    np.testing.assert_allclose(layer.weight.detach().numpy(), w, atol=1e-9)
    np.testing.assert_allclose(head.weight.detach().numpy(), c, atol=1e-9)
    expected = np.maximum(x.double().numpy() @ w.T + b, 0) @ c.T + d
    np.testing.assert_allclose(strategy.predict(x.double()).detach().numpy(), expected, atol=1e-9)


def test_only_the_factors_and_the_head_learn_later(model, experiences):
    stream = experiences(2)
    for rest, learning in (("none", set()), ("norms", {"bias"}), ("all", {"bias"})):
        strategy = SVDOrthogonal(model=model(), train_rest=rest)
        strategy.grow(stream[0])
        strategy.begin(stream[0])
        assert all(p.requires_grad for p in strategy.parameters() if p.numel())
        strategy.grow(stream[1])
        strategy.begin(stream[1])
        named = strategy.model.backbone.named_parameters()
        assert {n.rpartition(".")[2] for n, p in named if p.requires_grad} == {"left", "scale", "right"} | learning
        assert all(p.requires_grad for p in strategy.model.head.parameters())
    images = Classifier(vit_micro((3, 8, 8), patch_size=4, dim=8, depth=1, heads=2), Growing(8, 4))
    for rest, count in (("none", 0), ("norms", 11), ("all", 13)):  # 6 of norms, 5 biases; positions, patches
        strategy = SVDOrthogonal(model=copy.deepcopy(images), train_rest=rest)
        strategy._met = 2
        strategy.begin(stream[1])
        named = dict(strategy.model.backbone.named_parameters())
        factors = [n for n in named if n.rpartition(".")[2] in ("left", "scale", "right")]
        assert len(factors) == 3 * 4
        assert sum(p.requires_grad for n, p in named.items() if n not in factors) == count, rest


def test_what_the_user_froze_is_neither_split_nor_trained(model, experiences, drive):
    net = model(hidden=(7, 6))
    first, second = net.backbone.layers("ffn").values()
    first.weight.requires_grad_(False)
    second.bias.requires_grad_(False)
    frozen = first.weight.clone(), second.bias.clone()
    strategy = drive(SVDOrthogonal(model=net, lr=1e-2, train_rest="all"), experiences(3))
    assert len(strategy._layers) == 1
    assert torch.equal(frozen[0], first.weight)
    assert torch.equal(frozen[1], second.bias)


@pytest.mark.parametrize("block", ["factored", "paper"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_task_leaves_the_protected_block(model, experiences, drive, block, optimizer):
    """Through the hooks as the loop calls them, with weight decay, momentum and clipping."""
    stream = experiences(2)
    options = {"momentum": 0.9} if optimizer == "sgd" else {}
    strategy = SVDOrthogonal(
        model=model(), block=block, optimizer=optimizer, lr=0.02, weight_decay=0.1, ranks="constant", **options
    )
    drive(strategy, stream[:1])
    layer = strategy._layers[0]
    before = layer.weight.detach().clone()
    drive(strategy, stream[1:], epochs=5, clip=1.0, accumulate=2)
    uh, _, vh, *_ = (torch.from_numpy(t).float() for t in svd(before, 4))
    change = (layer.weight - before).detach()
    assert change.norm() > 1e-2
    assert (uh.T @ change @ vh).abs().max() < 1e-5
    assert ((uh.T @ change).abs().max() < 1e-5) == (block == "factored")
    assert ((change @ vh).abs().max() < 1e-5) == (block == "factored")


def test_factors_move(model, experiences, drive):
    stream, found = experiences(2), []
    strategy = drive(SVDOrthogonal(model=model(), optimizer="sgd", lr=0.1, ranks="constant"), stream[:1])

    def note(s):
        found.append([p.detach().clone() for p in (s._layers[0].left, s._layers[0].scale, s._layers[0].right)])

    drive(strategy, stream[1:], each_step=note)
    assert all(not torch.equal(a, b) for a, b in zip(found[0], found[-1], strict=True))


def test_gap_is_logged(model, experiences, drive):
    strategy = drive(SVDOrthogonal(model=model(), ranks="constant", target_retention=0.4), experiences(1))
    s = np.linalg.svd(strategy._layers[0].weight.detach().double().numpy())[1]
    drive(strategy, experiences(2)[1:])
    assert strategy.measurements()["smallest_gap"] == pytest.approx((s[1] - s[2]) / s[0], abs=1e-5)
    assert strategy.measurements()["preserved_fraction"] == 2 / 5


@pytest.mark.parametrize("options", [{}, {"block": "paper"}, {"ranks": "linear", "train_rest": "norms"}])
def test_resumes(experiences, model, resumes, options):
    for head in (Growing, Linear):
        make = lambda head=head: SVDOrthogonal(model=model(head, hidden=(7, 6)), lr=0.01, **options)  # noqa: E731
        assert resumes(make, experiences())


def test_importance_is_of_a_decoder_too(monkeypatch):
    answers = Answers(torch.tensor([[5, 1], [6, 1]]), end=1, vocabulary=30, new_tokens=0)
    backbone = language_model((2, 9), family="t5", dim=16, depth=1, heads=2, vocabulary=30)
    strategy = SVDOrthogonal(model=backbone.assemble(None, answers))
    inputs = torch.full((4, 2, 9), -1, dtype=torch.int32)
    inputs[:, 0, :5] = torch.arange(20).view(4, 5) + 2
    data = Data(inputs, torch.tensor([0, 1, 0, 1]))
    monkeypatch.setattr(svd_orthogonal, "cosines", lambda x, y: torch.ones(1))
    strategy.end(Experience(index=0, name="a", kind=Kind.LEARN, train=data))
    assert len(strategy.importance) == len(backbone.layers("attention")) + len(backbone.layers("ffn")) > 10
    assert set(strategy.importance) == {1.0}  # every layer met the samples once


def test_importance_is_in_the_state(model):
    first, second = (SVDOrthogonal(model=model(hidden=(7, 6))) for _ in range(2))
    first.importance = [0.25, 1.75]
    second.load_state_dict(first.state_dict())
    assert second.importance == [0.25, 1.75]


def test_weights_of_a_model_that_was_never_split_load(model):
    strategy, plain = SVDOrthogonal(model=model()), model(seed=3)
    strategy.model.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(strategy._layers[0].weight, plain.backbone.layers("ffn")["net.0.0"].weight)


def test_layers_that_are_not_called_are_refused():
    class Bypassed(nn.Linear):
        pass

    net = Classifier(vit_micro((3, 8, 8), patch_size=4, dim=8, depth=1, heads=2), Growing(8, 4))
    net.backbone.net.blocks[0].attn.proj = Bypassed(8, 8)
    with pytest.raises(UserError, match=r"strategy.roles: net.blocks.0.attn.proj is a Bypassed; only plain"):
        SVDOrthogonal(model=net)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"least_retention": 1.5}, r"strategy.least_retention: 1.5 is out of range \(valid: in \[0, 1\]\)"),
        ({"roles": ["attention"]}, r"strategy.roles: \['attention'\] is out of range"),
        ({"importance_samples": 0}, r"strategy.importance_samples: 0 is out of range"),
        ({"block": "dense"}, r"strategy.block: 'dense' is out of range \(valid: factored or paper\)"),
    ],
)
def test_refuses_what_is_out_of_range(model, options, message):
    with pytest.raises(UserError, match=message):
        SVDOrthogonal(model=model(), **options)
