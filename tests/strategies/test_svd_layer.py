import numpy as np
import pytest
import torch
import torch.nn.functional as F
from svd import effective, split, svd
from torch import nn

SHAPES = [(7, 5), (5, 7), (6, 6)]  # (o, d)


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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [0, 1, 4, 5])
def test_the_parts_are_the_weight(shape, k):
    layer, before = split(shape, k)
    torch.testing.assert_close(effective(layer), before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer(torch.eye(shape[1])), before.T + layer.bias, atol=1e-5, rtol=1e-5)
    uh, sh, vh, ul, sl, vl = svd(before, k)
    np.testing.assert_allclose(layer.weight.detach().numpy(), (uh * sh) @ vh.T, atol=1e-5)
    np.testing.assert_allclose(layer.scale.detach().numpy(), sl, atol=1e-5)
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
    uh, _, vh, *_ = svd(before, k)  # in float64; the layer's basis and gradients are float32, 6e-8 an operation
    assert np.abs(uh.T @ layer.left.grad.numpy()).max() < 1e-5 * raw[0].norm()
    assert np.abs(layer.right.grad.numpy() @ vh).max() < 1e-5 * raw[2].norm()
    assert torch.equal(layer.scale.grad, raw[1])
    np.testing.assert_allclose(layer.left.grad.numpy(), raw[0].numpy() - uh @ (uh.T @ raw[0].numpy()), atol=1e-3)
    np.testing.assert_allclose(layer.right.grad.numpy(), raw[2].numpy() - raw[2].numpy() @ vh @ vh.T, atol=1e-3)
    once = layer.left.grad.clone(), layer.right.grad.clone()
    layer.project_gradients()
    torch.testing.assert_close(layer.left.grad, once[0], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(layer.right.grad, once[1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("shape", [(16, 12), (12, 16), (12, 12)])
@pytest.mark.parametrize("k", [3, 9])
def test_factors_stay_outside_whatever_the_optimizer(shape, k, adamw):
    layer, _ = split(shape, k)
    assert train(layer, 50, adamw, weight_decay=0.1) <= 1e-4


def test_without_the_second_projection_adam_leaves_the_space(adamw):
    assert train(split((16, 12), 6)[0], 50, adamw, post=False) > 1e-2
    # Gradients alone suffice for SGD, as momentum is linear.
    sgd = torch.optim.SGD
    assert train(split((16, 12), 6)[0], 50, sgd, post=False, lr=1e-2, momentum=0.9) < 1e-4
    assert train(split((16, 12), 6)[0], 50, sgd, post=False, gradients=False, lr=1e-2, momentum=0.9) > 1e-3


def test_inputs_in_the_protected_span_are_mapped_as_before(adamw):
    layer, before = split((16, 12), 6)
    uh, sh, vh, *_ = (torch.from_numpy(t).float() for t in svd(before, 6))
    inside, anywhere = (torch.randn(20, 6) @ vh.T), torch.randn(20, 12)
    train(layer, 100, adamw, weight_decay=0.1)
    after = effective(layer)
    torch.testing.assert_close(inside @ after.T, inside @ before.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(uh.T @ after, sh[:, None] * vh.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after @ vh, uh * sh, atol=1e-4, rtol=1e-4)
    assert (anywhere @ (after - before).T).norm(dim=1).mean() > 0.5


def test_the_paper_s_block_removes_less(adamw):
    layer, before = split((16, 12), 6, "paper")
    uh, _, vh, *_ = (torch.from_numpy(t).float() for t in svd(before, 6))
    backward(layer)
    gradient = layer.weight.grad.clone()
    layer.project_gradients()
    torch.testing.assert_close(layer.weight.grad, gradient - uh @ (uh.T @ gradient @ vh) @ vh.T, atol=1e-3, rtol=1e-5)
    layer.weight.grad = None
    train(layer, 50, adamw, weight_decay=0.1)
    change = effective(layer) - before
    assert (uh.T @ change @ vh).abs().max() < 1e-4
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
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


def test_projection_and_the_mean_over_processes_commute():
    whole, parts = split((7, 5), 2)[0], [split((7, 5), 2)[0] for _ in range(2)]
    x, y = torch.randn(8, 5), torch.randn(8, 7)
    F.mse_loss(whole(x), y).backward()
    whole.project_gradients()
    for k, part in enumerate(parts):
        F.mse_loss(part(x[4 * k :][:4]), y[4 * k :][:4]).backward()
        part.project_gradients()
    torch.testing.assert_close(whole.left.grad, (parts[0].left.grad + parts[1].left.grad) / 2, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(whole.right.grad, (parts[0].right.grad + parts[1].right.grad) / 2, atol=1e-6, rtol=1e-5)


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
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    for out in outputs:
        out.square().sum().backward()
    layer.project_gradients()
    factors = wrapped.base_model.model[0].osf_svd_params["default"]
    for mine, name in ((layer.left, "U_low"), (layer.scale, "S_low"), (layer.right, "V_low")):
        torch.testing.assert_close(mine.grad, factors[name].grad, atol=1e-4, rtol=1e-5)


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
