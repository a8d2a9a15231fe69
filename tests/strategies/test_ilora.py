import math

import pytest
import torch
from small_ilora import PLAIN, make, values
from torch import nn

from clplat.backbones.heads import NCM, Growing, Linear
from clplat.components.ema import Slow
from clplat.components.paths import barrier, path_losses
from clplat.components.per_parameter import trainable
from clplat.errors import UserError
from clplat.run.evaluation import renew_means
from clplat.strategies.ilora import ILoRA
from clplat.strategies.lora import SequentialLoRA

# --- the slow copy ----------------------------------------------------------------------------------------------------


def test_decay_limits(model, experiences, drive):
    def same(s):
        assert all(torch.equal(a, b) for a, b in values(s).values())

    drive(make(model(), slow_decay=0.0), experiences(2), each_step=same)
    found = []
    strategy = make(model(), slow_decay=1.0, slow_warmup=False)
    drive(strategy, experiences(1), each_step=lambda s: found.append(values(s)))
    assert len(found) > 2
    assert all(torch.equal(found[0][n][1], found[-1][n][1]) for n in found[0])
    assert any(not torch.equal(*found[-1][n]) for n in found[0])


def test_the_slow_copy_moves(model, experiences, drive):
    """In the code the method comes from it stays where it was made."""
    start, end = [], []
    strategy = make(model(), slow_decay=0.9)
    strategy.slow.grow = lambda m, inner=strategy.slow.grow: (inner(m), start.append(values(strategy)))
    drive(strategy, experiences(1), epochs=5)
    end = values(strategy)
    ups = [n for n in end if "lora_B" in n]
    assert ups
    for n in ups:
        assert torch.equal(*start[0][n])  # a copy, A and all, not a second draw
        assert not torch.equal(end[n][1], start[0][n][1])
        assert 0 < (end[n][1] - end[n][0]).norm() < (start[0][n][0] - end[n][0]).norm()


def test_it_forgets_its_start_geometrically():
    slow, net = Slow(), nn.Linear(3, 2).double()
    slow.grow(net)
    begin = slow.named()["weight"].clone()
    with torch.no_grad():
        net.weight += 1
    decays = [0.3, 0.5, 0.9, 0.9]
    for decay in decays:
        slow.update(net, decay)
    torch.testing.assert_close(slow.named()["weight"] - net.weight, math.prod(decays) * (begin - net.weight))


def test_the_warm_rule(model, experiences, drive):
    used = []
    strategy = make(model(), slow_decay=0.6)
    update = strategy.slow.update
    strategy.slow.update = lambda m, decay: (used.append(decay), update(m, decay))
    drive(strategy, experiences(2), epochs=1)
    assert used == [0.5, 0.6, 0.6] * 2  # k starts anew in each task
    mean = []
    strategy = make(model(), slow_decay=1.0)
    strategy.slow.grow = lambda m, inner=strategy.slow.grow: (inner(m), mean.append(values(strategy)))
    drive(strategy, experiences(1), each_step=lambda s: mean.append(values(s)))
    for n in mean[0]:
        plain = torch.stack([m[n][0] for m in mean]).mean(0)
        torch.testing.assert_close(mean[-1][n][1], plain, atol=1e-5, rtol=1e-5)


def test_new_rows_start_as_the_model_s_and_old_ones_stay(model, experiences, drive):
    stream = experiences(2)
    strategy = drive(make(model(), slow_decay=0.9), stream[:1])
    before = strategy.slow.named()["head.weight"].clone()
    strategy.grow(stream[1])
    after = strategy.slow.named()["head.weight"]
    assert torch.equal(after[:2], before)
    assert torch.equal(after[2:], strategy.model.head.weight[2:])
    assert not torch.equal(before, strategy.model.head.weight[:2])


def test_it_is_kept_in_single_precision():
    slow, net = Slow(), nn.Linear(3, 2).bfloat16()
    slow.grow(net)
    with torch.no_grad():
        net.weight += 1
    before = slow.named()["weight"].clone()
    slow.update(net, 0.9999)
    assert slow.named()["weight"].dtype == torch.float32
    assert (slow.named()["weight"] > before).all()


def test_no_gradient_reaches_it_nor_the_backbone(model, experiences, drive):
    stream, net = experiences(2), model()
    backbone = {n: p.detach().clone() for n, p in net.backbone.named_parameters()}
    strategy = drive(make(net), stream)
    strategy.raw, strategy.global_batch = stream[1].train.all()[0], 24
    strategy.training_step(stream[1].train.all(), 0).backward()
    assert all(p.grad is None and not p.requires_grad for p in strategy.slow.parameters())
    assert all(torch.equal(p, net.backbone.get_parameter(n.replace("0.0.", "0.0.base_layer."))) for n, p in
               backbone.items())  # fmt: skip


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mse", "one_sided"])
def test_first_update_and_inference_by_hand(model, experiences, form):
    """One SGD step of the second task and the slow copy's step, in double precision from the written equations."""
    stream = experiences(2)
    strategy = make(model().double(), consistency=form, consistency_weight=0.8, alpha=6.0, slow_decay=0.7, memory=6)
    strategy.grow(stream[0])
    strategy.double()
    x, y = (t[:8] for t in stream[1].train.all())
    x, (mx, my) = x.double(), (t[:6] for t in stream[0].train.all())
    strategy.memory.add(mx.double(), my)
    strategy.grow(stream[1])
    strategy.double()
    strategy.begin(stream[1])
    strategy.insert = "after"
    net, layer = strategy.model, strategy.model.backbone.net[0][0]
    ((a, b),) = strategy.adapters.factors("fast").values()
    nn.init.normal_(b)
    live = [a, b, net.head.weight, net.head.bias]
    for p in strategy.slow.parameters():
        p.data += 0.1 * torch.randn_like(p)
    named = strategy.slow.named()
    slow = [named[n].clone() for n in trainable(net)]
    assert [n.rpartition(".")[0][-11:] for n in list(trainable(net))[:2]] == ["lora_A.fast", "lora_B.fast"]
    fast = [p.detach().clone().requires_grad_() for p in live]

    def run(v, inputs):
        hidden = (inputs @ (layer.base_layer.weight + 3 * v[1] @ v[0]).T + layer.base_layer.bias).relu()
        return hidden, hidden @ v[2].T + v[3]

    def ce(logits, labels):
        return -(logits[torch.arange(len(labels)), labels] - logits.exp().sum(1).log()).mean()

    gap = run(slow, mx.double())[0].detach() - run(fast, mx.double())[0]
    gap = gap.clamp(min=0) if form == "one_sided" else gap
    loss = (ce(run(fast, x)[1], y) + ce(run(fast, mx.double())[1], my)) / 2 + 0.8 * gap.square().mean() / 2
    gradients = torch.autograd.grad(loss, fast)
    after = [v - 0.05 * g for v, g in zip(fast, gradients, strict=True)]
    slow = [0.5 * s + 0.5 * f for s, f in zip(slow, after, strict=True)]  # λ_1 = min(1/2, 0.7)

    strategy.raw, strategy.global_batch = x, len(x)
    optimizer = strategy.configure_optimizers()
    mine = strategy.training_step((x, y), 0)
    mine.backward()
    optimizer.step()
    strategy.after_step()
    torch.testing.assert_close(mine, loss, atol=1e-7, rtol=0)
    for p, expected in zip(live, after, strict=True):
        torch.testing.assert_close(p, expected, atol=1e-7, rtol=0, check_dtype=False)
    torch.testing.assert_close(strategy.predict(x), run(slow, x)[1], atol=1e-7, rtol=0)


def test_without_replay_and_consistency_it_is_sequential_lora(model, experiences, drive):
    stream, mine, theirs = experiences(3), [], []
    note = lambda found: lambda s: found.append([p.detach().clone() for p in trainable(s.model).values()])  # noqa: E731
    drive(make(model(), memory=0, consistency_weight=0.0), stream, each_step=note(mine))
    drive(SequentialLoRA(model=model(), **PLAIN), stream, each_step=note(theirs))
    assert all(torch.equal(a, b) for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=True))


def test_passes_through_the_model(model, experiences, drive):
    """One a step in the first task; three from the second on, of which the slow one is in evaluation."""
    stream, calls = experiences(2), []
    strategy = make(model())
    strategy.model.backbone.register_forward_pre_hook(
        lambda m, x: calls.append((len(x[0]), m.training, torch.is_grad_enabled()))
    )
    drive(strategy, stream[:1], epochs=1)
    assert calls == [(8, True, True)] * 3
    assert len(strategy.memory) == 12
    assert strategy.slow.steps == 3
    calls.clear()
    drive(strategy, stream[1:], epochs=1)
    assert calls == [(8, True, True), (8, True, True), (8, False, False)] * 3
    calls.clear()
    strategy.consistency_weight = 0.0
    drive(strategy, stream[1:], epochs=1)
    assert calls == [(8, True, True)] * 6


@pytest.mark.parametrize(("replay", "size"), [(None, 8), (5, 5), (40, 12)])
def test_as_many_are_replayed_as_are_new(model, experiences, drive, replay, size):
    strategy = drive(make(model(), replay_batch=replay), experiences(1))
    drawn, inner = [], strategy.memory.sample_distinct
    strategy.memory.sample_distinct = lambda total: drawn.append(inner(total)[0]) or inner(total)
    drive(strategy, experiences(2)[1:], epochs=1)
    assert [len(d) for d in drawn] == [size] * 3
    assert all(len(d.unique(dim=0)) == size for d in drawn)


def test_new_samples_are_stored_before_or_after(model, experiences):
    stream = experiences(2)
    for insert, expected in (("before", 24), ("after", 12)):
        strategy, seen = make(model(), insert=insert, memory=100), []
        for e in stream:
            strategy.grow(e)
        strategy.memory.add(*(t[:12] for t in stream[0].train.all()))
        inner = strategy.memory.sample_distinct
        strategy.memory.sample_distinct = lambda total, inner=inner, s=strategy, seen=seen: (
            seen.append(len(s.memory)),
            inner(total),
        )[1]
        x, y = (t[:12] for t in stream[1].train.all())
        strategy.raw, strategy.global_batch = x, 12
        strategy.training_step((x, y), 0)
        assert seen == [expected]
        assert len(strategy.memory) == 24


def test_who_predicts(model, experiences, drive):
    stream, x = experiences(1), torch.randn(9, 5)
    slow, fast = (drive(make(model(), slow_decay=0.9, eval_adapter=e), stream).eval() for e in ("slow", "fast"))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(values(slow).values(), values(fast).values(), strict=True))
    assert torch.equal(fast.predict(x), fast.model(x))
    assert not torch.allclose(slow.predict(x), slow.model(x), atol=1e-4)
    with torch.no_grad():
        for n, p in trainable(slow.model).items():
            p.copy_(slow.slow.named()[n])
    torch.testing.assert_close(slow.predict(x), slow.model(x))
    assert slow.measurements() == {"slow_distance": 0.0}
    assert fast.measurements()["slow_distance"] > 1e-3


def test_class_means_are_of_the_features_that_predict(model, experiences, drive):
    """As the loop makes them after an experience: with the slow parameters, since these predict."""
    stream, found = experiences(1), {}
    for who in ("slow", "fast"):
        strategy = drive(make(model(NCM), slow_decay=1.0, slow_warmup=False, eval_adapter=who), stream, epochs=5)
        renew_means(strategy, stream[0].train, 7)
        found[who] = strategy.model.head.means
        x, y = stream[0].train.all()
        assert strategy.predict(x).shape == (24, 2)
        assert "predict" not in vars(strategy.model.head)  # nothing is left behind
    with torch.no_grad():
        fast = strategy.model.features(x)
        for n, p in trainable(strategy.model).items():
            p.copy_(strategy.slow.named()[n])
        slow = strategy.model.features(x)
    for features, who in ((fast, "fast"), (slow, "slow")):
        torch.testing.assert_close(found[who], torch.stack([features[y == c].mean(0) for c in (0, 1)]))
    assert not torch.allclose(found["slow"], found["fast"], atol=1e-3)


def test_the_slow_copy_is_reset_on_request(model, experiences, drive):
    for reset in (True, False):
        strategy = drive(make(model(), slow_decay=0.9, reset_slow=reset), experiences(1))
        assert all(torch.equal(*pair) for pair in values(strategy).values()) == reset


def test_defaults_are_those_of_the_code():
    from clplat.backbones.base import Classifier
    from clplat.backbones.vit import vit_micro

    net = Classifier(vit_micro((3, 8, 8), patch_size=4, dim=8, depth=1, heads=2), Growing(8, 6))
    strategy = ILoRA(model=net)
    lora = strategy.adapters
    assert (lora.rank, lora.alpha, lora.dropout) == (8, 32.0, 0.1)
    assert lora.layers == ("net.blocks.0.attn.qkv", "net.blocks.0.attn.proj")
    assert (strategy.memory.size, strategy.slow_decay, strategy.consistency_weight) == (500, 0.25, 1.0)
    assert (strategy.lr, strategy.consistency, strategy.eval_adapter) == (1e-4, "mse", "slow")


# --- connectivity -----------------------------------------------------------------------------------------------------


def test_losses_along_the_path_between_two_states(model, experiences, drive):
    stream = experiences(2)
    strategy = drive(make(model()), stream)
    (x, y), pairs = stream[0].train.all(), values(strategy)
    start, end = ({n: pair[i] for n, pair in pairs.items()} for i in (1, 0))
    found = path_losses(strategy.model, start, end, x, y, points=5)
    assert len(found) == 5
    strategy.eval()
    torch.testing.assert_close(found[-1], strategy.losses(x, y).mean())
    torch.testing.assert_close(found[0], torch.nn.functional.cross_entropy(strategy.predict(x), y))
    assert barrier(torch.tensor([1.0, 4.0, 3.0])) == 2.0
    assert barrier(torch.tensor([1.0, 0.5, 3.0])) == 0.0


def test_memory_beside_the_samples_is_one_set_of_adapters(model, experiences, drive):
    stream = experiences(3)
    sizes = []
    strategy = make(model())
    for e in stream:
        drive(strategy, [e])
        head = sum(p.numel() for p in strategy.model.head.parameters())
        sizes.append(sum(p.numel() for p in strategy.slow.parameters()) - head)
    assert sizes == [sum(p.numel() for p in strategy.adapters.parameters_of("fast"))] * 3


@pytest.mark.parametrize("options", [{}, {"insert": "after", "consistency": "one_sided", "slow_decay": 0.99}])
def test_resumes(experiences, model, resumes, options):
    for head in (Growing, Linear):
        assert resumes(lambda head=head: make(model(head), **options), experiences())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slow_decay": 1.5}, r"strategy.slow_decay: 1.5 is out of range \(valid: in \[0, 1\]\)"),
        ({"memory": -1}, r"strategy.memory: -1 is out of range \(valid: ≥ 0\)"),
        ({"replay_batch": 0}, r"strategy.replay_batch: 0 is out of range \(valid: ≥ 1, or null\)"),
        ({"consistency": "l1"}, r"strategy.consistency: 'l1' is out of range"),
    ],
)
def test_refuses_what_is_out_of_range(model, options, message):
    with pytest.raises(UserError, match=message):
        make(model(), **options)
