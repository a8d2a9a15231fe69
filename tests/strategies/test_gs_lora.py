"""What a request to `gs_lora` moves, which samples it sees, and its state; `test_gs_lora_loss.py` has the loss."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gs_lora_bench import CLASSES, SHAPE, asked, forget, learn, make, network, pool, run, step_loss

from clplat.adapters import LoRA
from clplat.backbones.vit import vit_micro
from clplat.data.batches import some_of_each
from clplat.errors import UserError

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
        torch.testing.assert_close(strategy.predict(x), before, rtol=1e-5, atol=1e-5)
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
    for chance in (2.0, 3.0):
        options = {"forgetting": [1.0], "sparsity": 0.0, "bound_chance": chance}
        given, retained, _ = asked(bound=chance * math.log(CLASSES), **options)
        told, *_ = asked(bound=None, **options)
        x, y = retained.batch(torch.arange(6))
        loss = step_loss(told, retained)
        torch.testing.assert_close(loss, step_loss(given, retained))
        assert loss > F.cross_entropy(told.model(x), y)  # below the bound


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
