import families
import pytest
import torch

from clplat import Data, Experience, Kind
from clplat.backbones.base import Classifier
from clplat.backbones.heads import Growing
from clplat.backbones.mlp import mlp
from clplat.backbones.vit import vit_micro
from clplat.errors import UserError
from clplat.strategies.locft_bf import LocFTBF
from clplat.strategies.naive import Naive


def make(net, **options):
    return LocFTBF(model=net, **{"optimizer": "sgd", "lr": 0.05, **options})


def moved(net, drive, stream, **options):
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    drive(make(net, **options), stream)
    return {n for n, p in net.named_parameters() if n in before and not torch.equal(p[: len(before[n])], before[n])}


@pytest.mark.parametrize("block", [0, 2, -1])
def test_one_matrix_and_the_head_change(block, experiences, model, drive):
    net = model(hidden=(7, 6, 5))
    found = moved(net, drive, experiences(1), block=block)
    assert {n for n in found if not n.startswith("head.")} == {f"backbone.net.{block % 3}.0.weight"}


def test_the_block_is_a_late_one_and_the_layer_its_last(experiences, model, drive):
    def trained(**options):
        backbone = vit_micro((3, 8, 8), patch_size=4, dim=8, depth=4, heads=2)
        make(Classifier(backbone, Growing(8, 6)), **options)
        return [n for n, p in backbone.named_parameters() if p.requires_grad]

    assert trained() == ["net.blocks.2.mlp.fc2.weight"]  # ⌊0.7 · 4⌋
    whole = trained(tuned="block", block=1)
    assert whole
    assert all(n.startswith("net.blocks.1.") for n in whole)
    assert {"net.blocks.1.norm1.bias", "net.blocks.1.attn.qkv.weight"} <= set(whole)


def test_with_answers_in_words_nothing_else_changes(drive):
    stream = families.texts()
    net = families.model("llama", stream)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    drive(make(net), list(stream))
    changed = [n for n, p in net.named_parameters() if not torch.equal(p, before[n])]
    assert len(changed) == 1
    assert changed[0].endswith("mlp.down_proj.weight")


def test_of_one_matrix_it_is_plain_fine_tuning(experiences, model, drive, equal):
    nets = [model(hidden=(7, 6)), model(hidden=(7, 6))]
    drive(make(nets[0], known=0.0), experiences(2))
    for name, parameter in nets[1].backbone.named_parameters():
        parameter.requires_grad_(name == "net.1.0.weight")
    drive(Naive(model=nets[1], lr=0.05), experiences(2))
    assert equal(*nets)


def known(sizes, level, net, epochs=1):
    """A strategy, and whether it made a step of each batch, for losses of these sizes that it is given."""
    strategy = make(net, known=level)
    strategy.begin(Experience(0, "e", Kind.LEARN, None))
    steps = []
    for epoch in sizes:
        for index, values in enumerate(epoch):
            strategy.mean_loss = lambda x, y, v=values: torch.tensor(v, requires_grad=True).mean()
            strategy.global_batch = len(values)
            batch = torch.zeros(len(values), 5), torch.zeros(len(values), dtype=torch.int64)
            steps.append(strategy.training_step(batch, index) is not None)
    return strategy, steps


def test_a_batch_that_is_known_has_no_step(model):
    strategy, steps = known([[[0.3, 0.1], [0.05, 0.1], [0.2, 0.0]]], 0.1, model())
    assert steps == [True, False, True]  # means 0.2, 0.075, 0.1
    assert strategy.measurements() == {"batches_known": 1.0}


def test_after_an_epoch_whose_mean_is_known_nothing_has(model):
    first = [[0.02] * 8, [0.3] * 2]  # mean 0.076 over samples; of batches it would be 0.16
    strategy, steps = known([first, [[0.5], [0.5]]], 0.1, model())
    assert steps == [False, True, False, False]
    assert known([[[0.2]], [[0.5]]], 0.1, model())[1] == [True, True]
    assert known([[[0.9]], [[0.11]], [[0.5]]], 0.2, model())[1] == [True, False, False]  # each epoch's own mean
    strategy.begin(Experience(1, "f", Kind.LEARN, None))
    strategy.mean_loss = lambda x, y: torch.tensor(0.5, requires_grad=True)
    assert strategy.training_step((torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64)), 0) is not None


def test_breadth_first_keeps_both_of_two_edits_where_depth_first_forgets_one(drive):
    """Two prompts in conflict, one after the other in an experience each, and together in one."""
    x, y = torch.tensor([[1.0, 0.0], [1.0, 0.2]]), torch.tensor([0, 1])

    def learned(groups):
        torch.manual_seed(0)
        net = Classifier(mlp((2,), [16]), Growing(16, 2))
        net.grow(Experience(0, "all", Kind.LEARN, None, classes=(0, 1)))
        stream = [
            Experience(k, f"e{k}", Kind.LEARN, Data(x, y, torch.tensor(rows)), classes=(0, 1))
            for k, rows in enumerate(groups)
        ]
        strategy = drive(make(net, optimizer="adam", lr=0.05, known=0.0), stream, epochs=150)
        return (strategy.eval().predict(x).argmax(1) == y).tolist()

    assert learned([[0, 1]]) == [True, True]
    assert learned([[0], [1]]) == [False, True]


def test_resumes(experiences, model, resumes):
    assert resumes(lambda: make(model()), experiences(2))


def test_refuses_what_it_cannot_do(model):
    with pytest.raises(UserError, match="backbone: has no blocks of which one could be chosen"):
        make(model(hidden=()))
    with pytest.raises(UserError, match=r"strategy.block: 2 is out of range \(valid: -2 to 1\)"):
        make(model(hidden=(7, 6)), block=2)
    with pytest.raises(UserError, match=r"strategy.known: -1 is out of range"):
        make(model(), known=-1)
