import copy

import pytest
import torch

from clplat import Experience, Kind
from clplat.backbones.base import Classifier
from clplat.backbones.cnn import slim_resnet18
from clplat.backbones.heads import Linear
from clplat.backbones.mlp import mlp
from clplat.components.generated import Target
from clplat.components.hypernetwork import Chunked, factored_change, output_change
from clplat.strategies.hnet import HNet


def chunked(size=98, chunk=25, hidden=(6,), seed=0):
    torch.manual_seed(seed)
    return Chunked(size, 4, chunk, 3, list(hidden), "relu", "default").double()


def moved(generator, seed=1, by=0.05):
    """The same generator a little further, and how it was."""
    before = copy.deepcopy(generator).requires_grad_(False)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in generator.parameters():
            p += by * torch.randn_like(p)
    return generator, before


# --- the generator and the target -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "chunk"), [(98, 25), (100, 25), (7, 25), (5, 1)])
def test_pieces_make_up_all_weights_and_only_the_last_is_cut(size, chunk):
    generator = chunked(size, chunk)
    codes = torch.randn(2, 4).double()
    assert len(generator.pieces) == -(-size // chunk)
    rows = [torch.cat([generator.net(torch.cat([e, c])) for c in generator.pieces])[:size] for e in codes]
    torch.testing.assert_close(generator(codes, 0), torch.stack(rows))


def test_target_runs_with_the_weights_it_is_given(model):
    plain = model()
    plain.grow(Experience(0, "all", Kind.LEARN, None, classes=tuple(range(6))))
    omega = torch.cat([p.detach().flatten() for p in plain.parameters()])
    x = torch.randn(3, 5)
    expected, features = plain(x), plain.features(x)
    target = Target(plain)
    assert target.size == len(omega)
    assert not list(target.parameters())  # nothing generated is held
    torch.testing.assert_close(target.call("forward", omega, {}, x, 0), expected)
    torch.testing.assert_close(target.call("features", omega, {}, x), features)


def test_constants_are_where_generated_numbers_start():
    target = Target(Classifier(slim_resnet18((3, 8, 8), width=2), Linear(16, 4)))
    weights = target.weights(torch.zeros(target.size))
    assert (weights["model.backbone.bn1.weight"] == 1).all()
    assert (weights["model.backbone.conv1.weight"] == 0).all()


@pytest.mark.parametrize(
    ("inputs", "hidden", "classes", "tasks", "options", "size", "pieces", "total"),
    [  # of the dossier, from hypercl's settings
        (784, [400, 400], 10, 5, (42000, 96, 96, [10, 10]), 478410, 12, 465672),
        (1024, [1000, 1000], 100, 10, (78000, 24, 8, [25, 25]), 2126100, 28, 2029939),
        (1024, [1000, 1000], 1000, 100, (7500, 128, 12, [200, 250, 350]), 3027000, 404, 2816448),
    ],
)
def test_compression_is_that_of_the_listed_configurations(inputs, hidden, classes, tasks, options, size, pieces, total):
    chunk, embedding, chunk_embedding, widths = options
    net = Classifier(mlp((inputs,), hidden), Linear(hidden[-1], classes))
    strategy = HNet(model=net, embedding=embedding, chunk=chunk, chunk_embedding=chunk_embedding, hidden=widths, beta=0)
    for t in range(tasks):
        strategy.grow(Experience(t, f"e{t}", Kind.LEARN, None, classes=(0,), task=t))
    assert strategy.model.target.size == size
    assert len(strategy.model.generator.pieces) == pieces
    assert strategy.measurements()["compression"] == total / size


@pytest.mark.parametrize(
    ("size", "options", "pieces", "total"),
    [  # ZenkeNet and ResNet-32 of the dossier, six tasks
        (1276508, (48, 5500, 80, [100, 150, 200], "relu", "xavier"), 233, 1182678),
        (468540, (32, 7000, 32, [], "relu", "xavier"), 67, 457336),
    ],
)
def test_generators_for_convolutional_targets_have_the_listed_sizes(size, options, pieces, total):
    with torch.device("meta"):
        generator = Chunked(size, *options)
    assert len(generator.pieces) == pieces
    assert sum(p.numel() for p in generator.parameters()) + 6 * options[0] == total


# --- the regulariser --------------------------------------------------------------------------------------------------


def test_output_change_by_hand():
    outputs, held = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[0.0, 4.0], [0.0, -2.0]])
    assert output_change(outputs, held).item() == (1 + 4 + 0 + 9) / 2
    assert output_change(outputs, held, torch.ones(2, 2)).item() == (1 + 4 + 0 + 9) / 2
    assert output_change(outputs, held, torch.tensor([[2.0, 0.0], [0.0, 1.0]])).item() == (2 + 9) / 2


@pytest.mark.parametrize(("size", "chunk", "hidden"), [(98, 25, (6,)), (100, 25, (6,)), (7, 25, (6,)), (98, 25, ())])
def test_factored_change_is_the_change_of_all_outputs(size, chunk, hidden):
    now, before = moved(chunked(size, chunk, hidden))
    codes = torch.randn(3, 4).double()
    plain = output_change(now(codes, 0), before(codes, 0))
    factored = factored_change(now.factors(codes, 0), before.factors(codes, 0), size)
    torch.testing.assert_close(factored, plain)
    parameters = list(now.parameters())
    for a, b in zip(torch.autograd.grad(factored, parameters), torch.autograd.grad(plain, parameters), strict=True):
        torch.testing.assert_close(a, b)


def test_change_of_a_linear_generator_is_a_quadratic_form():
    # ω of piece k is W [e; c_k], so R = (1/m) Σ_jk ‖(W − W*) [e_j; c_k]‖².
    now, before = chunked(100, 25, ()), None
    with torch.no_grad():
        now.net[0].bias.zero_()
    before = copy.deepcopy(now)
    with torch.no_grad():
        now.net[0].weight += torch.randn_like(now.net[0].weight)
    codes = torch.randn(3, 4).double()
    step = now.net[0].weight - before.net[0].weight
    inputs = [torch.cat([e, c]) for e in codes for c in now.pieces]
    second = sum(torch.outer(v, v) for v in inputs)
    form = torch.einsum("ca,ab,cb->", step, second, step) / 3
    torch.testing.assert_close(output_change(now(codes, 0), before(codes, 0)), form)
    torch.testing.assert_close(factored_change(now.factors(codes, 0), before.factors(codes, 0), 100), form)
