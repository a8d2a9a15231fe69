"""RMT against float64 references.

Against the authors' code (mariodoebler/test-time-adaptation 8b2ed63, run apart on a small CNN and a small ViT, the same
augmented and source images, SGD and Adam, with and without warm-up): after four steps largest difference of predictions
1e-14, of weights, teacher and projector 3e-15 (ViT with Adam, some of whose gradients are rounding: 2e-11).
"""

import copy

import pytest
import torch
from tta import CLASSES, SGD, batch_statistics, cnn, experience, images, moved, started, step, weights

from clplat import Data, Kind
from clplat.backbones.clip import clip
from clplat.errors import UserError
from clplat.strategies.rmt import RMT
from clplat.stream import Answers

SOURCE = Data(images(20, seed=9), torch.arange(20) % 3)  # the fourth class has no image


def make(**options):
    torch.manual_seed(0)
    given = {"memory": 40, "source_batch": 5, "slow_decay": 0.7, "projection": 5, **SGD, **options}
    return RMT(model=cnn(), **given).double()


def taught(strategy, data=SOURCE):
    """`strategy` after a learn experience that changed nothing but its memory."""
    e = experience(0, Kind.LEARN, data)
    strategy.train()
    strategy.grow(e)
    strategy.begin(e)
    strategy.end(e)
    return strategy


def noted(strategy, name):
    """What a method of `strategy` gives from now on."""
    found, inner = [], getattr(strategy, name)
    setattr(strategy, name, lambda *a: found.append(inner(*a)) or found[-1])
    return found


def symmetric(z, t):
    p, q = z.softmax(1), t.softmax(1)
    return -(q * p.log()).sum(1) / 2 - (p * q.log()).sum(1) / 2


def contrast(views, temperature):
    """Pair by pair: `views[b][i]` of length 1."""
    everything = [(b, i) for b in range(len(views)) for i in range(3)]
    terms = []
    for b, i in everything:
        rest = sum((views[b][i] @ views[c][j] / temperature).exp() for c, j in everything if (c, j) != (b, i))
        for j in range(3):
            if j != i:
                terms.append(-((views[b][i] @ views[b][j] / temperature).exp() / rest).log())
    return sum(terms) / len(terms)


def slow(teacher, student):
    with torch.no_grad():
        for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
            old.mul_(0.7).add_(new, alpha=0.3)


def test_steps_agree_with_the_reference():
    mine = taught(make(contrast_weight=0.5, source_weight=0.8, temperature=0.2))
    augmented, drawn = noted(mine, "_augmented"), noted(mine, "_drawn")
    student, teacher, projector = batch_statistics(cnn()), batch_statistics(cnn()), copy.deepcopy(mine.projector)
    optimizer = started(mine, 1)
    with torch.no_grad():
        features = cnn().eval().features(SOURCE.inputs)  # by the statistics of the source
        prototypes = torch.stack([features[SOURCE.labels == c].mean(0) for c in range(3)])
    torch.testing.assert_close(mine.prototypes[:3], prototypes, atol=1e-12, rtol=0)
    assert not mine.prototypes[3].any()
    parameters = [*student.parameters(), *projector.requires_grad_(True).parameters()]
    reference = torch.optim.SGD(parameters, lr=SGD["adapt_lr"], momentum=0.9)
    for number in range(3):
        x = images(4, seed=20 + number)
        prediction, _ = step(mine, optimizer, x)
        f, other = student.features(x), student.features(augmented[-1])
        z, t = student.head(f), teacher(x).detach()
        torch.testing.assert_close(prediction, z.detach() + t, atol=1e-10, rtol=0)
        loss = (symmetric(z, t) + symmetric(student.head(other), t)).mean() / 2
        near = [max(prototypes, key=lambda p, g=g: torch.cosine_similarity(p, g, dim=0).item()) for g in f]
        triples = zip(near, f, other, strict=True)
        views = [[torch.nn.functional.normalize(projector(v), dim=0) for v in triple] for triple in triples]
        (s, y, _), cross = drawn[-1], torch.nn.functional.cross_entropy
        loss = loss + 0.5 * contrast(views, 0.2) + 0.8 * cross(student(s), y)
        reference.zero_grad()
        loss.backward()
        reference.step()
        slow(teacher, student)
        for one, two in ((mine.model, student), (mine.teacher.model, teacher), (mine.projector, projector)):
            for a, b in zip(one.parameters(), two.parameters(), strict=True):
                torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    assert len(drawn[-1][0]) == 5
    mine.eval()
    torch.testing.assert_close(mine.predict(x), (student(x) + teacher(x)).detach(), atol=1e-10, rtol=0)


def test_warm_up_agrees_with_the_reference_and_leaves_no_gradient():
    mine = taught(make(warmup_steps=3))
    drawn, projector = noted(mine, "_drawn"), weights(mine.projector)
    student, teacher = batch_statistics(cnn()), batch_statistics(cnn())
    optimizer = started(mine, 1)
    reference = torch.optim.SGD(student.parameters(), lr=1.0, momentum=0.9)
    for k, (s, _, _) in enumerate(drawn):
        reference.param_groups[0]["lr"] = SGD["adapt_lr"] * (k + 1) / 3
        reference.zero_grad()
        symmetric(student(s), teacher(s).detach()).mean().backward()
        reference.step()
        slow(teacher, student)
    assert len(drawn) == 3
    for one, two in ((mine.model, student), (mine.teacher.model, teacher)):
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    assert all(p.grad is None for p in mine.parameters())
    assert moved(projector, mine.projector) == []
    first = next(iter(optimizer.param_groups[0]["params"]))
    torch.testing.assert_close(
        optimizer.state[first]["momentum_buffer"], reference.state[next(student.parameters())]["momentum_buffer"]
    )
    assert optimizer.param_groups[0]["lr"] == SGD["adapt_lr"]


def test_a_reset_takes_the_projector_along():
    mine = taught(make(reset="experience"))
    before, projector, optimizer = weights(mine.model), weights(mine.projector), started(mine, 1)
    step(mine, optimizer, images())
    assert moved(projector, mine.projector)
    started(mine, 2)
    assert moved(before, mine.model) == []
    assert moved(before, mine.teacher.model) == []
    assert moved(projector, mine.projector) == []


@pytest.mark.parametrize("option", ["contrast_weight", "source_weight", "warmup_steps"])
def test_says_which_option_needs_source_images(option):
    without = {"contrast_weight": 0.0, "source_weight": 0.0}
    with pytest.raises(UserError, match=rf"strategy.{option}: 1 needs source images"):
        started(make(**(without | {option: 1})))
    mine = make(**without)  # the teacher alone
    optimizer = started(mine)
    prediction, stepped = step(mine, optimizer, images())
    assert stepped
    assert prediction.shape == (6, CLASSES)
    assert not any(p.requires_grad for p in mine.projector.parameters())


def test_without_a_projector_features_are_compared_as_they_are():
    mine = taught(make(projection=None))
    optimizer = started(mine, 1)
    assert sum(p.numel() for p in mine.projector.parameters()) == 0
    assert step(mine, optimizer, images())[1]


def test_a_class_without_images_is_no_prototype():
    mine, x = make(projection=None), torch.tensor([[-1.0, 0.5, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    mine.prototypes[0, 0] = 1.0  # further away than the zeros of the others
    views = [torch.nn.functional.normalize(torch.stack([mine.prototypes[0], x[0], x[0]]))]
    torch.testing.assert_close(mine._contrast(x, x), contrast(views, 0.1), atol=1e-10, rtol=0)


def test_a_model_that_answers_in_words_is_refused():
    backbone = clip((3, 8, 8), dim=16, depth=1, heads=2, patch_size=4, vocabulary=40)
    model = backbone.assemble(None, Answers(torch.tensor([[1, 10, 2], [1, 11, 2]]), 2, 40, 0))
    with pytest.raises(UserError, match="answers in words, and it is features beside a head"):
        RMT(model=model)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("memory", 0), ("source_batch", 0), ("slow_decay", 1.1), ("contrast_weight", -1.0), ("source_weight", -1.0)),
        *(("temperature", 0.0), ("projection", 0), ("warmup_steps", -1)),
    ],
)
def test_refuses_values_out_of_range(option, value):
    with pytest.raises(UserError, match=rf"strategy.{option}: {value} is out of range"):
        make(**{option: value})


def test_a_reset_goes_with_no_warm_up():
    with pytest.raises(UserError, match=r"strategy.warmup_steps: 2 is out of range"):
        make(reset="batch", warmup_steps=2)
