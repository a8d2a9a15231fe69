import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from clplat.backbones import heads
from clplat.backbones.base import Head
from clplat.errors import MissingError, UserError
from clplat.stream import Experience, Kind

D, C = 6, 5
STREAM = [((0, 1), 0), ((2,), 1), ((3, 4), 2)]
ALL = [heads.Linear, heads.Growing, heads.Masked, heads.Taskwise, heads.Cosine, heads.NCM]
TRAINED = [h for h in ALL if h is not heads.NCM]


def experience(classes, task=0):
    return Experience(index=0, name="e", kind=Kind.LEARN, train=None, classes=tuple(classes), task=task)


def grown(cls, upto=3):
    head = cls(D, C)
    for classes, task in STREAM[:upto]:
        head.grow(experience(classes, task))
    return head


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_every_public_class_is_tested():
    public = [v for v in vars(heads).values() if isinstance(v, type) and v.__module__ == heads.__name__]
    assert public == ALL
    assert all(issubclass(h, Head) for h in public)


@pytest.mark.parametrize(("cls", "columns"), [(h, C if h in ALL[:1] + ALL[2:4] else 3) for h in ALL])
def test_shape_after_two_experiences(cls, columns):
    assert grown(cls, 2)(torch.randn(7, D)).shape == (7, columns)


@pytest.mark.parametrize("cls", ALL)
def test_grow_keeps_old_rows_bitwise_and_is_idempotent(cls):
    head = grown(cls, 2)
    if cls is heads.NCM:
        head.update(torch.randn(20, D), torch.randint(3, (20,)))
    before = copy.deepcopy(head.state_dict())
    head.grow(experience((2,), 1))
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())
    head.grow(experience((3, 4), 2))
    for name, old in before.items():
        if name in ("seen",):
            continue
        new = head.state_dict()[name]
        assert torch.equal(new[: len(old)] if old.dim() else new, old), name


@pytest.mark.parametrize("cls", [heads.Growing, heads.Taskwise, heads.Cosine])
def test_new_rows_start_as_linear_does(cls):
    head = cls(400, 200)
    head.grow(experience(range(200)))
    bound = 400**-0.5
    assert head.weight.abs().max() <= bound
    assert head.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize("cls", ALL)
def test_replayed_growth_loads_strictly_and_grows_on(cls):
    head = grown(cls, 2)
    if cls is heads.NCM:
        head.update(torch.randn(20, D), torch.randint(3, (20,)))
    again = grown(cls, 2)
    again.load_state_dict(head.state_dict(), strict=True)
    x = torch.randn(4, D)
    assert torch.equal(again(x), head(x))
    old = copy.deepcopy(again.state_dict())
    again.grow(experience((3, 4), 2))
    name = "means" if cls is heads.NCM else "weight"
    assert torch.equal(again.state_dict()[name][: len(old[name])], old[name])


def test_ungrown_structure_does_not_load():
    with pytest.raises(RuntimeError, match="size mismatch"):
        grown(heads.Growing, 1).load_state_dict(grown(heads.Growing, 2).state_dict(), strict=True)


@pytest.mark.parametrize("cls", TRAINED)
def test_gradients_reach_every_parameter(cls):
    head = grown(cls).train()
    labels = torch.tensor([3, 4, 3])
    F.cross_entropy(head(torch.randn(3, D)), labels).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("cls", ALL)
def test_growth_keeps_dtype_and_frozen_state(cls):
    head = cls(D, C).double()
    head.requires_grad_(False)
    for classes, task in STREAM:
        head.grow(experience(classes, task))
    assert {t.dtype for t in head.state_dict().values() if t.is_floating_point()} <= {torch.float64}
    assert not any(p.requires_grad for p in head.parameters())


def test_growth_keeps_device():
    head = heads.Growing(D, C).to("meta")
    head.grow(experience((0, 1)))
    assert head.weight.device.type == "meta"


def test_linear_is_linear():
    torch.manual_seed(3)
    head = heads.Linear(D, C)
    torch.manual_seed(3)
    reference = nn.Linear(D, C)
    x = torch.randn(4, D)
    assert torch.equal(head(x), reference(x))


def test_classes_out_of_range_are_refused():
    with pytest.raises(UserError, match="class 5"):
        heads.Growing(D, C).grow(experience((4, 5)))


@pytest.mark.parametrize("classes", [0, -1])
def test_stream_without_classes_is_refused(classes):
    with pytest.raises(UserError, match="num_classes"):
        heads.Linear(D, classes)


def test_masked_is_linear_on_seen_classes_and_minus_infinity_elsewhere():
    head = grown(heads.Masked, 2)
    x = torch.randn(4, D)
    for mode in (True, False):
        logits = head.train(mode)(x)
        assert torch.equal(logits[:, :3], F.linear(x, head.weight, head.bias)[:, :3])
        assert (logits[:, 3:] == -torch.inf).all()
    F.cross_entropy(head(x), torch.tensor([0, 1, 2, 0])).backward()
    assert (head.weight.grad[3:] == 0).all()
    assert (head.weight.grad[:3] != 0).any()


def test_taskwise_restricts_to_the_classes_of_the_task():
    head = grown(heads.Taskwise).eval()
    x = torch.randn(4, D)
    rows = F.linear(x, head.weight, head.bias)
    for classes, task in STREAM:
        logits = head(x, task)
        assert torch.equal(logits[:, list(classes)], rows[:, list(classes)])
        others = [c for c in range(C) if c not in classes]
        assert (logits[:, others] == -torch.inf).all()


def test_taskwise_without_a_task():
    head = grown(heads.Taskwise, 2)
    x = torch.randn(4, D)
    assert torch.equal(head.train()(x), head(x, 1))
    with pytest.raises(UserError, match="task"):
        head.eval()(x)
    assert (head(x, 2) == -torch.inf).all()


def test_taskwise_has_own_rows_where_tasks_share_classes():
    head = heads.Taskwise(D, 2)
    for task in range(3):
        head.grow(experience((0, 1), task))
    head.grow(experience((0, 1), 1))
    assert head.weight.shape == (6, D)
    x = torch.randn(4, D)
    logits = [head(x, task) for task in range(3)]
    rows = F.linear(x, head.weight, head.bias)
    assert all(torch.equal(logits[t], rows[:, 2 * t : 2 * t + 2]) for t in range(3))
    F.cross_entropy(logits[1], torch.tensor([0, 1, 0, 1])).backward()
    assert (head.weight.grad[[0, 1, 4, 5]] == 0).all()


def test_cosine_ignores_lengths():
    head = grown(heads.Cosine)
    x = torch.randn(4, D)
    reference = torch.stack([10.0 * F.cosine_similarity(x, w[None]) for w in head.weight], dim=1)
    assert torch.allclose(head(x), reference, atol=1e-5)
    assert torch.allclose(head(7 * x), head(x), atol=1e-5)
    with pytest.raises(UserError, match=r"head\.scale"):
        heads.Cosine(D, C, scale=0)


def test_ncm_equals_a_slow_reference():
    head = grown(heads.NCM)
    features, labels = torch.randn(300, D), torch.randint(4, (300,))
    for part in torch.arange(300).split(37):
        head.update(features[part], labels[part])
    x = torch.randn(8, D)
    assert torch.equal(head(x), F.linear(x, head.weight, head.bias))  # trained as a linear layer
    logits = head.predict(x)
    for b in range(8):
        for c in range(4):
            mean = features[labels == c].double().mean(0)
            assert logits[b, c].item() == pytest.approx(-((x[b].double() - mean) ** 2).sum().item(), rel=1e-4)
    assert head.counts.tolist() == [*torch.bincount(labels, minlength=4).tolist(), 0]
    assert (logits[:, 4] == -torch.inf).all()


def test_ncm_means_are_made_anew_for_the_classes_named_only():
    head = grown(heads.NCM)
    features, labels = torch.randn(60, D), torch.arange(60) % 2
    head.update(features, labels)
    old = head.means.clone()
    head.renew(torch.tensor([1]))
    assert (head.predict(features)[:, 1] == -torch.inf).all()
    for part in torch.arange(60).split(20):
        head.update(3 + features[part][labels[part] == 1], labels[part][labels[part] == 1])
    assert torch.allclose(head.means[1], 3 + old[1], atol=1e-5)
    assert torch.equal(head.means[0], old[0])


def test_the_means_of_erased_classes_are_erased_by_the_loop(make_runner):
    """After a request for class 0 nothing of its mean is in the head, and it is predicted no more."""
    runner = make_runner(head="ncm", **{"loop.eval_every": None, "loop.stop_after": 3})
    runner.run()
    head = runner.strategy.model.head
    assert not head.means[0].any()
    assert head.counts.tolist()[0] == 0
    assert bool(head.means[1:].abs().sum(1).all())
    assert bool(runner.strategy.predict(runner.stream[1].test.all()[0])[:, 0].isneginf().all())


def test_ncm_is_exact_far_from_the_origin():
    head = heads.NCM(D, 2)
    head.grow(experience((0, 1)))
    head.update(1000 + torch.tensor([[0.0] * D, [0.5] * D]), torch.tensor([0, 1]))
    assert head.predict(torch.full((1, D), 1000.0)).tolist() == [[0.0, pytest.approx(-0.25 * D)]]


def test_linear_takes_the_last_layer_of_a_file(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"fc.weight": torch.ones(C, D), "fc.bias": torch.zeros(C), "conv.weight": torch.zeros(2)}, path)
    head = heads.Linear(D, C, weights=str(path))
    assert torch.equal(head.weight, torch.ones(C, D))
    assert head.weight.requires_grad
    with pytest.raises(UserError, match=r"head\.weights: .* does not fit"):
        heads.Linear(D + 1, C, weights=str(path))
    save_file({"conv.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"head\.weights: .* has no last layer"):
        heads.Linear(D, C, weights=str(path))
    with pytest.raises(MissingError, match=r"head\.weights: no file"):
        heads.Linear(D, C, weights=str(tmp_path / "none.safetensors"))
