"""What all strategies that adapt at test time have in common: robustness, phases, state."""

import copy
import dataclasses

import pytest
import torch
from tta import CLASSES, SGD, cnn, experience, images, moved, started, step, vit, weights

from clplat import Data, Kind, Stream
from clplat.components.norms import BatchNorm, batch_of, make_adaptable, set_statistics
from clplat.errors import UserError
from clplat.run.evaluation import Evaluator
from clplat.strategies.bn_adapt import BNAdapt
from clplat.strategies.cotta import CoTTA
from clplat.strategies.eata import EATA
from clplat.strategies.rmt import RMT
from clplat.strategies.rotta import RoTTA
from clplat.strategies.sar import SAR
from clplat.strategies.source import Source
from clplat.strategies.tent import Tent
from clplat.strategy import evaluating

MAKE = {
    "source": lambda model: Source(model=model),
    "bn_adapt": lambda model: BNAdapt(model=model),
    "tent": lambda model: Tent(model=model, **SGD),
    "eata": lambda model: EATA(model=model, margin=2.0, redundancy=2.0, fisher_weight=0.0, **SGD),
    "sar": lambda model: SAR(model=model, margin=2.0, **SGD),
    "rotta": lambda model: RoTTA(model=model, memory=6, update_every=3, **SGD),
    "rmt": lambda model: RMT(model=model, contrast_weight=0.0, source_weight=0.0, **SGD),
    "cotta": lambda model: CoTTA(model=model, augmentations=2, gate=2.0, **SGD),
}
STEPPING = [n for n in MAKE if n not in ("source", "bn_adapt")]
ODD = {
    "one image": lambda: images(1),
    "all equal": lambda: images(1).expand(6, -1, -1, -1),
    "all constant": lambda: torch.full((6, 3, 8, 8), 0.5, dtype=torch.float64),
    "not a number": lambda: images(6).masked_fill(images(6) < 0.2, float("nan")),
    "one image not a number": lambda: torch.cat(
        [images(5), torch.full((1, 3, 8, 8), float("nan"), dtype=torch.float64)]
    ),
    "infinite": lambda: images(6).masked_fill(images(6) < 0.2, float("inf")),
    "huge": lambda: images(6) * 1e300,
}


def made(name, **model):
    torch.manual_seed(0)
    return MAKE[name](cnn(**model))


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", MAKE)
def test_odd_batches_do_not_corrupt_the_model(name, odd):
    mine = made(name)
    optimizer, x = started(mine), ODD[odd]()
    for number in range(2):
        step(mine, optimizer, images(seed=number))
    prediction, _ = step(mine, optimizer, x)
    assert prediction.shape == (len(x), CLASSES)
    if odd != "huge":
        assert prediction.isfinite().all()
    assert all(v.isfinite().all() for v in weights(mine).values() if v.is_floating_point())
    after, _ = step(mine, optimizer, images(seed=3))
    assert after.isfinite().all()


@pytest.mark.parametrize("name", MAKE)
def test_an_empty_batch_changes_nothing(name):
    mine = made(name)
    optimizer = started(mine)
    step(mine, optimizer, images())
    before, kept = weights(mine), copy.deepcopy(getattr(mine, "kept", None))
    prediction, stepped = step(mine, optimizer, images(0))
    assert prediction.shape == (0, CLASSES)
    assert not stepped
    assert moved(before, mine) == []
    assert repr(getattr(mine, "kept", None)) == repr(kept)


@pytest.mark.parametrize("name", MAKE)
def test_the_source_stays_and_what_should_move_moves(name):
    mine = made(name)
    start, optimizer = weights(mine.model), started(mine)
    for number in range(4):
        step(mine, optimizer, images(seed=number))
    assert bool(moved(start, mine.model)) == (name in STEPPING)
    source = getattr(mine, "source", None)
    if name in ("cotta", "rmt", "rotta"):
        assert moved(start, source.model) == []
    elif source is not None:
        kept = {k.replace("/", "."): v for k, v in source.values.items()}
        assert kept
        assert all(torch.equal(v, start[k]) for k, v in kept.items())


@pytest.mark.parametrize("name", MAKE)
def test_learning_and_adapting_take_turns(name):
    mine = made(name, dtype=torch.float32)
    frozen = mine.model.backbone.conv1.weight.requires_grad_(False)
    trained = [p.requires_grad for p in mine.model.parameters()]
    data = Data(images(8, torch.float32), torch.arange(8) % CLASSES)
    for index, kind in enumerate((Kind.LEARN, Kind.ADAPT, Kind.LEARN, Kind.ADAPT)):
        e = experience(index, kind, data)
        mine.train()
        mine.grow(e)
        mine.begin(e)
        optimizer = mine.configure_optimizers() if any(p.requires_grad for p in mine.parameters()) else None
        norms = [m for m in mine.model.modules() if isinstance(m, BatchNorm)]
        if kind is Kind.LEARN:
            assert [p.requires_grad for p in mine.model.parameters()] == trained
            assert all(m.statistics is None for m in norms)
            before = norms[0].running_mean.clone()
            mine.training_step((data.inputs, data.labels), 0).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert not torch.equal(norms[0].running_mean, before)
        else:
            assert not frozen.requires_grad
            source = weights(mine.model)
            step(mine, optimizer, data.inputs)
            if hasattr(mine, "_reset"):
                mine._reset()
                assert [k for k in moved(source, mine.model) if "running" not in k or name == "rotta"] == []
        mine.end(e)


@pytest.mark.parametrize("name", STEPPING)
def test_state_is_enough_to_go_on_with(name):
    whole = made(name)
    for index in range(2):
        optimizer = started(whole, index)
        for number in range(3):
            step(whole, optimizer, images(seed=10 * index + number))
        whole.end(experience(index))
        if index == 0:
            state = copy.deepcopy(whole.state_dict())
    torch.manual_seed(1)
    other = MAKE[name](cnn(seed=5))
    other.train()
    other.grow(experience(0))
    other.load_state_dict(state, strict=True)
    optimizer = started(other, 1)
    for number in range(3):
        step(other, optimizer, images(seed=10 + number))
    assert moved(weights(whole), other) == []


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_the_size_of_evaluation_batches_changes_no_figure(name, monkeypatch):
    data = Data(images(20), torch.arange(20) % CLASSES)
    adapting = dataclasses.replace(experience(train=data), test=data)
    stream, outcomes = Stream([adapting], num_classes=CLASSES, input_shape=(3, 8, 8)), []
    for size in (3, 20):
        mine = made(name)
        optimizer = started(mine)
        step(mine, optimizer, images(seed=9))
        logits, inner = [], mine.predict
        monkeypatch.setattr(
            mine, "predict", lambda x, inner=inner, logits=logits: logits.append(inner(x)) or logits[-1]
        )
        Evaluator(stream, device=torch.device("cpu"), batch_size=size)(mine)
        outcomes.append(torch.cat(logits))
        assert (mine.evaluation_batch is None) == (name in ("source", "rotta"))
    torch.testing.assert_close(*outcomes, atol=1e-10, rtol=0)


# --- batch normalisation ----------------------------------------------------------------------------------------------


def test_groups_have_statistics_of_their_own():
    model, x = cnn().eval(), images(12)
    make_adaptable(model)
    set_statistics(model, "batch")
    with batch_of(groups=3):
        together = model(x)
    torch.testing.assert_close(together, torch.cat([model(part) for part in x.split(4)]), atol=1e-10, rtol=0)
    assert not torch.allclose(together, model(x))


def test_in_its_place_nothing_changes():
    ours, plain, x = cnn(), cnn(), images()
    assert make_adaptable(ours) == sum(isinstance(m, torch.nn.BatchNorm2d) for m in plain.modules()) > 5
    assert make_adaptable(ours) > 5  # again: nothing to do
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for mode in (True, False):
        assert torch.equal(ours.train(mode)(x), plain.train(mode)(x))
    assert moved(weights(plain), ours) == []


def test_refuses_a_batch_norm_that_it_does_not_know():
    class Own(torch.nn.BatchNorm2d):
        pass

    for layer in (Own(3), torch.nn.BatchNorm2d(3, track_running_stats=False)):
        with pytest.raises(UserError, match="backbone"):
            make_adaptable(torch.nn.Sequential(layer))


def test_norm_layers_are_asked_for():
    for name in ("tent", "eata", "rotta"):
        with pytest.raises(UserError, match="adapts normalisation layers"):
            MAKE[name](torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["cotta", "rotta"])
def test_inputs_outside_of_what_is_augmented_are_told_once(name, recwarn):
    inside, outside = made(name), made(name)
    optimizer = started(inside)
    step(inside, optimizer, images())
    assert not recwarn
    optimizer = started(outside)
    with pytest.warns(UserWarning, match=r"inputs reach from -.* \[0, 1\]"):
        step(outside, optimizer, images() * 4 - 2)
    step(outside, optimizer, images() * 4 - 2)
    assert not recwarn


# --- what the first gradients hold ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("network", [cnn, vit])
def test_a_closed_gate_starts_from_rounding_and_says_so_once(network, dtype, recwarn):
    mine = CoTTA(model=network(dtype), gate=0.0)
    optimizer = started(mine)
    told = r"CoTTA: the gradient of step 1 is rounding, of norm \de-\d+, and Adam makes whole steps of it"
    with pytest.warns(UserWarning, match=told):
        step(mine, optimizer, images(dtype=dtype))
    for number in range(3):
        step(mine, optimizer, images(dtype=dtype, seed=number))
    assert not recwarn


def test_certain_predictions_leave_nothing_to_follow():
    model = cnn()
    with torch.no_grad():
        model.head.weight *= 1e4
    mine = Tent(model=model, **SGD)
    optimizer = started(mine)
    with pytest.warns(UserWarning, match=r"Tent: the gradient of step 1 is rounding, .* nothing moves"):
        step(mine, optimizer, images())


@pytest.mark.parametrize("name", STEPPING)
def test_gradients_that_hold_something_are_not_told(name, recwarn):
    mine = made(name)
    optimizer = started(mine)
    for number in range(3):
        step(mine, optimizer, images(seed=number))
    assert not recwarn


def test_a_rate_of_zero_moves_nothing_by_rounding(recwarn):
    mine = CoTTA(model=cnn(), gate=0.0, adapt_lr=0.0)
    step(mine, started(mine), images())
    assert not recwarn


# --- the authors' training mode ---------------------------------------------------------------------------------------


def dropping(dtype=torch.float64):
    model = cnn(dtype)
    model.backbone.layer1.insert(0, torch.nn.Dropout(0.5))
    return model


@pytest.mark.parametrize("name", STEPPING)
def test_training_mode_drops_while_adapting_and_never_in_evaluation(name):
    make, x = type(made(name)), images(6)
    torch.manual_seed(0)
    sourceless = {"eata": {"fisher_weight": 0.0}, "rmt": {"contrast_weight": 0.0, "source_weight": 0.0}}
    mine = make(model=dropping(), training_mode=True, **sourceless.get(name, {}), **SGD)
    optimizer = started(mine)
    assert any(m.training for m in mine.model.modules() if isinstance(m, torch.nn.Dropout))
    assert not torch.allclose(mine.model(x), mine.model(x))
    again = [mine.adapt_step(x) for _ in range(2)]
    first, second = (out[0] if isinstance(out, tuple) else out for out in again)
    assert torch.equal(first, second) == (name == "rotta")  # whose authors predict in evaluation mode
    step(mine, optimizer, x)
    with evaluating(mine):
        assert torch.equal(mine.predict(x), mine.predict(x))
    assert not torch.allclose(mine.model(x), mine.model(x))  # on again


def test_with_dropout_a_closed_gate_has_a_gradient(recwarn):
    mine = CoTTA(model=dropping(), gate=0.0, training_mode=True)
    step(mine, started(mine), images())
    assert not recwarn


def test_training_mode_is_refused_where_nothing_drops():
    for model in (cnn(), torch.nn.Sequential(torch.nn.LayerNorm(2), torch.nn.Dropout(0.0))):
        with pytest.raises(UserError, match=r"strategy\.training_mode: True .* this backbone drops nothing"):
            Tent(model=model, training_mode=True)


@pytest.mark.parametrize("gate", [2.0, 0.0])
def test_what_changes_images_refuses_texts_before_it_runs(gate, monkeypatch):
    """CoTTA does without changed images where its gate is closed."""
    strategy, asked = CoTTA(model=cnn(), gate=gate, **SGD), [experience()]
    assert strategy.faults(asked, False) == []
    monkeypatch.setattr(strategy.model.backbone, "reads_tokens", True, raising=False)
    said = ["strategy: CoTTA adapts by changed images, which texts have not (valid: tent, eata, sar)"]
    assert strategy.faults(asked, False) == (said if gate else [])
    assert strategy.faults([experience(kind=Kind.LEARN)], False) == []
    assert MAKE["tent"](strategy.model).faults(asked, False) == []
