import copy
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_hnet import SMALL, make

from clplat.components.lookahead import simulated_step
from clplat.errors import UserError
from clplat.strategies.dp_hnet import DPHNet
from clplat.strategies.hnet import HNet


@pytest.fixture
def experiences(experiences):
    """Those of all strategies, each a task of its own."""
    return lambda *a, **k: [replace(e, task=e.index) for e in experiences(*a, **k)]


# --- the regulariser --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", ["factors", "stored", "recomputed"])
def test_first_step_of_a_task_has_no_regulariser(experiences, model, drive, held):
    strategy, stream = make(model, held_outputs=held), experiences(3)
    drive(strategy, stream[:2])
    strategy.grow(stream[2])
    strategy.begin(stream[2])
    change = strategy._change()
    assert change.item() == 0
    gradients = torch.autograd.grad(change, list(strategy.model.generator.parameters()), allow_unused=True)
    assert all(g is None or not g.any() for g in gradients)


@pytest.mark.parametrize("held", ["factors", "stored", "recomputed"])
@pytest.mark.parametrize("cls", [HNet, DPHNet])
def test_under_autocast_the_regulariser_is_in_single_precision_and_starts_at_zero(experiences, model, drive, cls, held):
    small = SMALL | ({} if cls is HNet else {"hidden": 6})
    if cls is DPHNet and held == "factors":
        return
    torch.manual_seed(0)
    strategy = cls(model=model(), **small, held_outputs=held, lr=0.05, beta=0.5)
    stream = experiences(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drive(strategy, stream[:1])
    strategy.grow(stream[1])
    strategy.begin(stream[1])
    theta = list(strategy.model.generator.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        change = strategy._change()
    # Zero but for rounding: a batch of one and of several may sum in another order. In bfloat16 it would be 4e-3.
    assert change.item() < 1e-9
    gradients = [g for g in torch.autograd.grad(change, theta, allow_unused=True) if g is not None]
    assert all(float(g.abs().max()) < 1e-4 for g in gradients)
    with torch.no_grad():
        for p in theta:
            p += 1e-3  # which bfloat16 would hardly tell
    exact = strategy._change()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert strategy._change().dtype == torch.float32
        assert strategy._change().item() == pytest.approx(exact.item(), rel=0.01)
        if cls is HNet:  # called as it is, it would compute in bfloat16 (an LSTM, not on every processor)
            assert not torch.equal(strategy.model.omega(0), strategy.model.generator(*strategy.model.tasks([0]))[0])
    assert exact > 0


def test_regulariser_by_an_independent_computation(experiences, model, drive):
    """The loss is cross-entropy plus β / (t − 1) Σ ‖ω*_j − h(e_j)‖² with ω*_j noted when task t begins."""
    stream, noted = experiences(3), {}
    for held in ("factors", "stored", "recomputed"):
        strategy = drive(make(model, held_outputs=held), stream[:2])
        strategy.grow(stream[2])
        strategy.begin(stream[2])
        once = [strategy.model.omega(j).detach().clone() for j in range(2)]
        with torch.no_grad():
            for p in strategy.model.generator.parameters():
                p += 0.1
        x, y = stream[2].train.all()
        now = [strategy.model.omega(j) for j in range(2)]
        expected = (
            F.cross_entropy(strategy.model(x), y)
            + 0.5 * sum((a - b).square().sum() for a, b in zip(once, now, strict=True)) / 2
        )
        strategy.raw, strategy.global_batch = x, len(x)
        noted[held] = strategy.training_step((x, y), 0)
        torch.testing.assert_close(noted[held], expected)
    torch.testing.assert_close(noted["stored"], noted["recomputed"], atol=1e-5, rtol=1e-5)


def test_held_outputs_carry_no_gradient(experiences, model, drive):
    strategy = drive(make(model, held_outputs="stored"), experiences(2))
    assert not strategy.held.outputs.requires_grad
    strategy = drive(make(model, held_outputs="recomputed"), experiences(2))
    assert not any(p.requires_grad for p in strategy.held.before.parameters())


def test_no_regulariser_is_training_in_sequence(experiences, model, drive, equal):
    """β = 0 bit for bit: the generator trained by hand on the task's loss alone."""
    stream = experiences(3)
    strategy = drive(make(model, beta=0.0), stream)
    other = make(model, beta=0.0)
    other.training_step = lambda batch, k: F.cross_entropy(other.model(batch[0]), batch[1])
    drive(other, stream)
    assert equal(strategy, other)
    assert not equal(strategy, drive(make(model, beta=0.5), stream))


def test_a_large_beta_holds_old_weights(experiences, model, drive):
    stream, found = experiences(2), []
    # The bound of stable steps is lr · β · curvature < 2, hence the small rate.
    for beta in (0.0, 1000.0):
        strategy = drive(make(model, beta=beta, lr=1e-5, optimizer="adam"), stream[:1], epochs=3)
        once = strategy.model.omega(0).detach().clone()
        drive(strategy, stream[1:], epochs=40)
        found.append((strategy.model.omega(0) - once).norm().item())
    assert found[1] < 0.05 * found[0]


def test_old_embeddings_keep_their_bits_and_the_new_one_gets_no_gradient_of_it(experiences, model, drive):
    strategy, stream = make(model), experiences(3)
    drive(strategy, stream[:2])
    old = [c.detach().clone() for c in strategy.model.codes]
    drive(strategy, stream[2:])
    assert all(torch.equal(a, b) for a, b in zip(old, strategy.model.codes[:2], strict=True))
    change = strategy._change()
    assert torch.autograd.grad(change, strategy.model.codes[2], allow_unused=True) == (None,)
    assert not any(c.requires_grad for c in strategy.model.codes[:2])
    assert not torch.equal(old[1], strategy.model.codes[2])


def test_a_random_part_of_the_tasks_is_unbiased(experiences, model, drive):
    strategy = drive(make(lambda: model(classes=8), held_outputs="stored"), experiences(4, per_class=4))
    strategy.held.drawn = lambda _: [0, 1, 2]
    whole = strategy._change()
    parts = []
    for rows in itertools.combinations(range(3), 2):
        strategy.held.drawn = lambda _, rows=rows: list(rows)
        parts.append(strategy._change())
    torch.testing.assert_close(sum(parts) / len(parts), whole)


def test_tasks_are_drawn_anew_in_each_step(experiences, model, drive):
    strategy = drive(make(lambda: model(classes=8), sampled_tasks=2), experiences(4, per_class=4))
    assert strategy.held.steps == 8  # one batch an epoch
    drawn = set()
    for step in range(30):
        strategy.held.steps = step
        rows = strategy.held.drawn(3)
        assert len(set(rows)) == 2
        drawn.add(tuple(sorted(rows)))
    assert drawn == {(0, 1), (0, 2), (1, 2)}


def test_own_rows_leave_other_heads_free(experiences, model, drive):
    strategy = drive(make(model, own_rows=True, held_outputs="stored"), experiences(2))
    target, held = strategy.model.target, strategy.held.outputs.clone()
    weight, bias = [s for s in target.slices if s.rows]
    assert (weight.rows, bias.rows) == (6, 6)
    before = strategy._change()
    strategy.held.outputs[0, weight.offset + 2 * 7 : weight.end] += 5  # rows 2 to 5, of other tasks
    strategy.held.outputs[0, bias.offset + 2 : bias.end] -= 5
    torch.testing.assert_close(strategy._change(), before, atol=0, rtol=0)
    strategy.held.outputs.copy_(held)
    strategy.held.outputs[0, weight.offset] += 5  # row 0, of task 0
    assert strategy._change() > before + 1


# --- lookahead --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),  # writes into gradients
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    ],
)
def test_simulated_step_is_the_step(optimizer):
    parameters = [
        torch.nn.Parameter(torch.randn(3, 2)),
        torch.nn.Parameter(torch.randn(4)),
        torch.nn.Parameter(torch.ones(1)),
    ]
    real = optimizer(parameters)
    for _ in range(3):
        for p in parameters[:2]:  # the third one has no gradient
            p.grad = torch.randn_like(p)
        state, start = copy.deepcopy(real.state_dict()), [p.detach().clone() for p in parameters]
        gradients = [p.grad.clone() for p in parameters[:2]]
        changes = simulated_step(real, parameters)
        assert all(torch.equal(a, b) for a, b in zip(start, parameters, strict=True))
        assert all(torch.equal(a, p.grad) for a, p in zip(gradients, parameters, strict=False))
        for key, values in state["state"].items():
            for name, value in values.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(real.state_dict()["state"][key][name]))
        real.step()
        for a, p, change in zip(start, parameters, changes, strict=True):
            assert torch.equal(p - a, change)
    assert not changes[2].any()


def test_lookahead_regularises_where_the_step_leads(experiences, model, drive):
    """The gradient added is that of β R at θ + Δθ, and θ itself is not moved by looking."""
    stream = experiences(2)
    strategy = drive(make(model, lookahead=True, optimizer="adam"), stream[:1])
    strategy.grow(stream[1])
    strategy.begin(stream[1])
    optimizer = strategy.configure_optimizers()
    x, y = stream[1].train.all()
    strategy.raw, strategy.global_batch = x, len(x)
    strategy.training_step((x, y), 0).backward()
    theta = list(strategy.model.generator.parameters())
    start, gradients = [p.detach().clone() for p in theta], [p.grad.clone() for p in theta]
    # By hand: one real step on a copy, then the regulariser's gradient there.
    other = copy.deepcopy(strategy)
    ahead = torch.optim.Adam(other.model.generator.parameters(), lr=0.05)
    for p, g in zip(other.model.generator.parameters(), gradients, strict=True):
        p.grad = g.clone()
    ahead.step()
    extra = torch.autograd.grad(0.5 * other._change(), list(other.model.generator.parameters()))
    assert any(e.any() for e in extra)  # already in the first step of the task, unlike without lookahead
    strategy.on_before_optimizer_step(optimizer)
    for p, a, g, e in zip(theta, start, gradients, extra, strict=True):
        assert torch.equal(p, a)
        torch.testing.assert_close(p.grad, g + e)


def test_lookahead_without_a_step_is_no_lookahead(experiences, model, drive):
    stream = experiences(2)
    strategy = drive(make(model, lookahead=True), stream[:1])
    strategy.grow(stream[1])
    strategy.begin(stream[1])
    strategy.on_before_optimizer_step(strategy.configure_optimizers())  # no gradients: Δθ = 0, and so R = 0
    assert all(p.grad is None or not p.grad.any() for p in strategy.model.generator.parameters())


# --- platform ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"held_outputs": "factors"},
        {"held_outputs": "stored", "own_rows": True},
        {"held_outputs": "recomputed", "sampled_tasks": 1},
        {"lookahead": True, "optimizer": "adam", "lr": 0.01},
        {"infer": "network", "memory": 12, "replay_batch": 4},
    ],
)
def test_resumes(experiences, model, resumes, options):
    assert resumes(lambda: make(model, **options), experiences(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, r"strategy.beta: -1.0 is out of range \(valid: ≥ 0\)"),
        ({"chunk": 0}, r"strategy.chunk: 0 is out of range"),
        ({"sampled_tasks": 0}, r"strategy.sampled_tasks: 0 is out of range"),
        ({"own_rows": True}, r"held_outputs: 'factors' is out of range \(valid: stored, recomputed with own_rows\)"),
        ({"rank": 2}, r"strategy.role: the backbone has no 'attention' layers for adapters of rank 2"),
    ],
)
def test_refuses_what_is_out_of_range(model, options, message):
    with pytest.raises(UserError, match=message):
        make(model, **options)
