import math

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

from clplat.errors import UserError
from clplat.strategies.gs_lora import GSLoRA
from clplat.strategies.gs_lora_pp import GSLoRAPP, divergence


def kl(p, e):
    """KL(softmax p ‖ softmax e) of two vectors, by its definition, in float64."""
    p, e = (t.double().exp() / t.double().exp().sum() for t in (p, e))
    return float((p * (p / e).log()).sum())


# --- the prototype term -----------------------------------------------------------------------------------------------


def test_divergence_by_its_definition():
    p, e = torch.randn(4, 6), torch.randn(4, 6)
    expected = torch.tensor([kl(a, b) for a, b in zip(p, e, strict=True)])
    torch.testing.assert_close(divergence(p, e).double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_divergence_is_zero_at_the_prototype_never_negative_and_blind_to_constants():
    p, e = torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64)
    assert (divergence(p, e) >= 0).all()
    torch.testing.assert_close(divergence(e, e), torch.zeros(50, dtype=torch.float64))
    torch.testing.assert_close(divergence(p, e + 7.0), divergence(p, e))
    assert (divergence(p, e) - divergence(e, p)).abs().max() > 1e-2  # and not symmetric


@pytest.mark.parametrize("bound", [30.0, 1e-4], ids=["below the bound", "beyond it"])
@pytest.mark.parametrize(("forgetting", "retaining"), [(0.7, 0.0), (0.0, 0.9), (0.7, 0.9)])
def test_loss_and_gradient_agree_with_the_equation_in_float64(bound, forgetting, retaining):
    strategy, retained, _ = asked(
        GSLoRAPP, prototype_forgetting=forgetting, prototype_retaining=retaining, prototype_bound=bound,
        forgetting=[0.5], sparsity=0.2, bound=9.0, lora_alpha=3.0,
    )  # fmt: skip
    fx, fy = erased_batch(strategy)
    rx, ry = retained.batch(torch.arange(6))
    loss = step_loss(strategy, retained)
    loss.backward()
    leaves, features, logits = reference(strategy)
    prototypes = strategy.prototypes.double()
    er, ef = features(rx), features(fx)
    ce_r, ce_f = F.cross_entropy(logits(rx), ry), F.cross_entropy(logits(fx), fy)

    def apart(e, y):
        p, q = torch.softmax(prototypes[y], 1), torch.softmax(e, 1)
        return (p * (p.log() - q.log())).sum(1).mean()

    lasso = sum(torch.sqrt(sum((p**2).sum() for p in group)) for group in blocks_of(leaves))
    pull = forgetting * torch.relu(bound - apart(ef, fy)) + retaining * apart(er, ry)
    expected = ce_r + 0.5 * torch.relu(9.0 - ce_f) + 0.2 * lasso + pull
    expected.backward()
    assert (apart(ef, fy).item() < bound) == (bound == 30.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for name, pair in strategy.lora.factors(strategy.adapter).items():
        for mine, theirs in zip(pair, leaves[name], strict=True):
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-3, atol=2e-6)


def test_without_prototypes_and_average_it_is_gs_lora():
    data = pool()
    plus, plain = make(GSLoRAPP, prototype_forgetting=0.0, predict_with="raw"), make(GSLoRA)
    for strategy in (plus, plain):
        run(strategy, learn(data), epochs=2)
        run(strategy, forget(data, (1,)), epochs=3)
    theirs = plain.model.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in plus.model.state_dict().items())


# --- prototypes -------------------------------------------------------------------------------------------------------


def test_prototypes_are_mean_features_before_the_request_of_what_is_erased_and_retained():
    data = pool()
    strategy = make(GSLoRAPP, memory=16)
    run(strategy, learn(data), epochs=2)
    request = forget(data, (1,))
    strategy._prepare = lambda raw, training: raw + 3.0 * training  # augmented in training only
    strategy.train()
    strategy.grow(request)
    strategy.begin(request)
    assert strategy.training
    strategy._prepare = None
    retained, erased = strategy.memory.data().all(), request.train.all()
    strategy.eval()
    for c in range(CLASSES):
        x, y = erased if c == 1 else retained
        with torch.no_grad():
            mean = strategy.model.features(x[y == c]).mean(0)
        torch.testing.assert_close(strategy.prototypes[c], mean, rtol=1e-5, atol=1e-5)
    before = strategy.prototypes.clone()
    strategy.request -= 1
    run(strategy, request, epochs=2, each_step=lambda s: torch.testing.assert_close(s.prototypes, before))


def test_prototypes_of_a_later_request_come_from_the_model_as_it_stands_then():
    data = pool()
    strategy = make(GSLoRAPP, memory=16)
    run(strategy, learn(data), epochs=2)
    run(strategy, forget(data, (1,)), epochs=3)
    first = strategy.prototypes.clone()
    second = forget(data, (0,), index=2)
    strategy.grow(second)
    strategy.begin(second)
    strategy.eval()
    x, y = strategy.memory.data().all()
    with torch.no_grad():
        torch.testing.assert_close(
            strategy.prototypes[2], strategy.model.features(x[y == 2]).mean(0), rtol=1e-5, atol=1e-5
        )
    assert not torch.allclose(strategy.prototypes[2], first[2], atol=1e-4)


# --- the average ------------------------------------------------------------------------------------------------------


def effective(strategy):
    """W + Σ s B A of every adapted layer, in float64."""
    lora = strategy.lora
    found = {}
    for name, layer in lora.base_layers().items():
        found[name] = layer.weight.detach().double()
        for adapter in lora.active:
            a, b = (p.detach().double() for p in lora.factors(adapter)[name])
            found[name] = found[name] + lora.scale(adapter) * b @ a
    return found


def test_the_average_is_of_merged_weights_at_the_end_of_each_epoch_from_the_start_on():
    data, epochs = pool(), []
    strategy = make(GSLoRAPP, average_start=2, average_decay=0.75, memory=16)
    run(strategy, learn(data), epochs=2)
    steps = []

    def note(strategy):
        steps.append(strategy.epoch)
        epochs[strategy.epoch :] = [effective(strategy)]

    run(strategy, forget(data, (1,)), epochs=5, each_step=note)
    assert strategy.average.count == 3  # after epochs 2, 3, 4
    for slow, name in zip(strategy.average.weights, strategy.lora.layers, strict=True):
        expected = epochs[2][name]
        for k in (3, 4):
            expected = 0.75 * expected + 0.25 * epochs[k][name]
        torch.testing.assert_close(slow.double(), expected, rtol=1e-5, atol=1e-5)


def test_predictions_are_the_average_models_and_training_goes_on_from_the_raw_weights():
    data, x = pool(), torch.randn(5, *SHAPE)
    strategy = make(GSLoRAPP, average_start=0, average_decay=0.5)
    run(strategy, learn(data), epochs=2)
    run(strategy, forget(data, (1,)), epochs=4)
    strategy.eval()
    raw = {k: v.clone() for k, v in strategy.model.state_dict().items()}
    predicted = strategy.predict(x)
    assert all(torch.equal(v, raw[k]) for k, v in strategy.model.state_dict().items())  # put back
    plain = network()
    state = {k.replace(".base_layer.", "."): v for k, v in raw.items() if ".lora_" not in k}
    state |= {f"backbone.{n}.weight": w for n, w in zip(strategy.lora.layers, strategy.average.weights, strict=True)}
    plain.load_state_dict(state)
    plain.eval()
    torch.testing.assert_close(predicted, plain(x), rtol=1e-5, atol=1e-5)
    strategy.predict_with = "raw"
    assert not torch.allclose(strategy.predict(x), predicted, atol=1e-5)
    torch.testing.assert_close(strategy.predict(x), strategy.model(x))


def test_the_average_does_not_outlive_its_request():
    data, x = pool(), torch.randn(5, *SHAPE)
    strategy = make(GSLoRAPP, average_start=0)
    run(strategy, learn(data), epochs=1)
    run(strategy, forget(data, (1,)), epochs=2)
    assert strategy.average.count == 2
    strategy.grow(learn(data, index=2))
    strategy.eval()
    assert strategy.average.count == 0
    torch.testing.assert_close(strategy.predict(x), strategy.model(x))


def test_predicting_within_a_request_leaves_what_is_trained():
    strategy, retained, _ = asked(GSLoRAPP, average_start=0)
    strategy.average.update()
    trained = strategy.lora.trained
    with torch.no_grad():
        strategy.predict(torch.randn(2, *SHAPE))
    assert strategy.lora.trained == trained
    assert strategy.lora.active == trained
    step_loss(strategy, retained).backward()
    assert all(p.grad is not None for p in strategy.lora.parameters_of("request"))


def test_prototypes_and_averages_are_never_trained():
    data = pool()
    strategy = make(GSLoRAPP, average_start=0)
    run(strategy, learn(data), epochs=1)
    for e in (forget(data, (1,)), learn(data, (0,), index=2)):
        strategy.grow(e)
        names = {n for n, p in strategy.named_parameters() if p.requires_grad}
        assert not any(n.startswith(("prototypes", "average")) for n in names)


@pytest.mark.parametrize(
    "bad",
    [{"prototype_forgetting": -1.0}, {"prototype_retaining": -1.0}, {"prototype_bound": 0.0}, {"average_decay": 1.5},
     {"average_start": -1}, {"predict_with": "both"}],
    ids=lambda b: next(iter(b)),
)  # fmt: skip
def test_options_out_of_range_are_refused(bad):
    with pytest.raises(UserError, match=f"strategy.{next(iter(bad))}"):
        make(GSLoRAPP, **bad)


def test_a_request_erases_and_keeps_the_rest():
    data = pool(per_class=30)
    strategy = make(GSLoRAPP, memory=40, lora_alpha=2.0, lr=0.05, forget_lr=0.02, average_start=15)
    run(strategy, learn(data), epochs=30)
    run(strategy, forget(data, (1,)), epochs=30)
    strategy.eval()
    for kind in ("average", "raw"):
        strategy.predict_with = kind
        right = (strategy.predict(data.inputs).argmax(1) == data.labels).float()
        assert right[data.labels == 1].mean() < 0.05
        assert right[data.labels != 1].mean() > 0.9
    assert math.isfinite(strategy.measurements()["zero_groups"])
