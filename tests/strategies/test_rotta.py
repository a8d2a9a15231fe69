"""RoTTA against float64 references.

Against the authors' code (BIT-DA/RoTTA 67e34c9, run apart, ResNet-20, five updates with SGD, the same augmented
memory): samples of the same ages held, largest difference of weights, predictions, teacher and statistics 1.3e-10 in
float64 and 3.3e-6 in float32.
"""

import math

import pytest
import torch
from tta import CLASSES, SGD, cnn, images, moved, started, step, vit, weights

from clplat.components.balanced import place
from clplat.errors import UserError
from clplat.strategies import rotta as module
from clplat.strategies.rotta import RoTTA


def make(model=cnn, **options):
    return RoTTA(model=model(), **{"memory": 8, "update_every": 12, "share": 0.2, "slow_rate": 0.3, **SGD, **options})


def take(memory, new, size, classes):
    """The paper's memory, class by class: {class: [[name, uncertainty, age]]} takes one sample after the other."""

    def score(age, uncertainty):
        return 1 / (1 + math.exp(-age / size)) + uncertainty / math.log(classes)

    for name, label, uncertainty in new:
        full = sum(map(len, memory.values())) >= size
        if len(memory[label]) >= size / classes:
            among = [label]
        elif full:
            longest = max(map(len, memory.values()))
            among = [c for c in memory if len(memory[c]) == longest]
        else:
            among = []
        worst = max(((score(a, u), c, n) for c in among for n, u, a in memory[c]), default=None)
        if worst is None or worst[0] > score(0, uncertainty):
            if worst is not None:
                memory[worst[1]] = [item for item in memory[worst[1]] if item[0] != worst[2]]
            memory[label].append([name, uncertainty, 0])
        for items in memory.values():
            for item in items:
                item[2] += 1


def test_memory_keeps_what_the_paper_keeps():
    generator = torch.Generator().manual_seed(0)
    for size, classes in ((8, 4), (7, 3), (3, 5)):
        held, names, memory = [], [], {c: [] for c in range(classes)}
        for batch in range(12):
            labels = torch.randint(classes, (6,), generator=generator).tolist()
            unsure = torch.rand(6, generator=generator, dtype=torch.float64).tolist()
            new = [(f"{batch}.{k}", c, u) for k, (c, u) in enumerate(zip(labels, unsure, strict=True))]
            kept = place(held, [[c, u, 0] for _, c, u in new], size, classes)
            names = [(names + [n for n, _, _ in new])[k] for k in kept]
            take(memory, new, size, classes)
            expected = {n: (float(c), u, a) for c, items in memory.items() for n, u, a in items}
            assert dict(zip(names, [(float(c), u, a) for c, u, a in held], strict=True)) == expected
            assert len(held) <= size


def test_a_class_is_bounded_before_the_memory_is_full():
    held = []
    assert place(held, [[0, 0.5, 0] for _ in range(5)], 7, 4) != list(range(5))
    assert len(held) == 2  # of one class ⌈7 / 4⌉, as in the authors' code, though five more would fit
    place(held, [[1, 0.5, 0]], 7, 4)
    assert len(held) == 3


def followed(model, share):
    """A model of torch's own layers whose batch norms follow, and normalise by, what `model.follow(x)` is given."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    state = {"on": False}

    def hook(layer, args, output):
        if not state["on"]:
            return output
        (x,) = args
        mean = (1 - share) * layer.running_mean + share * x.mean((0, 2, 3))
        var = (1 - share) * layer.running_var + share * x.var((0, 2, 3), unbiased=False)
        layer.running_mean, layer.running_var = mean.detach(), var.detach()
        shape = (1, -1, 1, 1)
        normal = (x - mean.view(shape)) / (var.view(shape) + layer.eps).sqrt()
        return normal * layer.weight.view(shape) + layer.bias.view(shape)

    for m in norms:
        m.register_forward_hook(hook)

    def follow(x):
        state["on"] = True
        out = model(x)
        state["on"] = False
        return out

    return model.eval(), follow, [p for m in norms for p in m.parameters()]


def test_updates_agree_with_the_reference(monkeypatch):
    augmented, inner = [], module.augment
    monkeypatch.setattr(module, "augment", lambda *a: augmented.append(inner(*a)) or augmented[-1])
    mine, losses = make(), []
    loss_of = mine._loss
    monkeypatch.setattr(mine, "_loss", lambda: losses.append(loss_of()) or losses[-1])
    optimizer = started(mine)
    student, follow_student, adapted = followed(cnn(), 0.2)
    teacher, follow_teacher, slow = followed(cnn(), 0.2)
    velocity, updates = [torch.zeros_like(p) for p in adapted], 0
    for number in range(6):
        x = images(6, seed=number)
        prediction, stepped = step(mine, optimizer, x)
        torch.testing.assert_close(prediction, teacher(x).detach(), atol=1e-10, rtol=0)
        assert stepped == (number % 2 == 1)  # every 12 images
        if not stepped:
            continue
        updates += 1
        memory, ages = mine.kept["images"], torch.tensor([a for _, _, a in mine.kept["facts"]], dtype=x.dtype) / 8
        t, z = follow_teacher(memory).detach(), follow_student(augmented[-1])
        loss = (-(t.softmax(1) * z.log_softmax(1)).sum(1) * (torch.exp(-ages) / (1 + torch.exp(-ages)))).mean()
        torch.testing.assert_close(losses[-1], loss, atol=0, rtol=1e-10)  # ages are weighed in double precision, too
        for p, v, g in zip(adapted, velocity, torch.autograd.grad(loss, adapted), strict=True):
            v.mul_(0.9).add_(g)
            p.data -= 0.05 * v
        for p, q in zip(slow, adapted, strict=True):
            p.data = 0.7 * p.data + 0.3 * q.data
    assert updates == mine.measurements()["updates"] == 3
    for ours, theirs in ((mine.model, student), (mine.teacher.model, teacher)):
        for name, value in theirs.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(ours.state_dict()[name], value, atol=1e-10, rtol=0)
    torch.testing.assert_close(mine.predict(x), teacher(x), atol=1e-10, rtol=0)


def test_limits():
    still = make(share=0.0, slow_rate=0.0)
    before, optimizer = weights(still.teacher.model), started(still)
    for number in range(4):
        step(still, optimizer, images(6, seed=number))
    assert moved(before, still.teacher.model) == []
    assert len(still.kept["images"]) == len(still.kept["facts"]) <= 8
    assert max(sum(c == k for c, _, _ in still.kept["facts"]) for k in range(CLASSES)) <= 2


def test_a_vit_adapts_its_layer_norms():
    mine = make(vit)
    before, optimizer = weights(mine.model), started(mine)
    for number in range(2):
        step(mine, optimizer, images(6, dtype=torch.float32, seed=number))
    changed = moved(before, mine.model)
    assert changed
    assert all("norm" in name for name in changed)


def test_refuses_values_out_of_range():
    for name, value in (("memory", 0), ("share", 1.5), ("slow_rate", -1.0), ("update_every", 0)):
        with pytest.raises(UserError, match=rf"strategy\.{name}"):
            make(**{name: value})
