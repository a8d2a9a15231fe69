import math

import torch

from clplat import Experience, Kind
from clplat.backbones.heads import Growing, Linear, Taskwise
from clplat.strategies.lwf import LwF, distillation
from clplat.strategies.naive import Naive


def test_distillation_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3), 0.0]])
    # at T = 2 the teacher says (3/4, 1/4), the student (1/2, 1/2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert abs(distillation(student, teacher, 2.0).item() - expected) < 1e-5


def test_loss_by_hand(linear):
    strategy = LwF(model=linear(), distill=0.5, temperature=2.0)
    strategy.grow(Experience(0, "a", Kind.LEARN, None, classes=(0, 1)))
    strategy.grow(Experience(1, "b", Kind.LEARN, None, classes=(0, 1)))
    with torch.no_grad():
        strategy.model.head.bias[1] += 1  # the student has moved: logits (0, 3.5), the teacher's (0, 2.5)
    loss = strategy.training_step((torch.tensor([[0.0, 1.0]]), torch.tensor([0])), 0)
    p, q = 1 / (1 + math.exp(-1.25)), 1 / (1 + math.exp(-1.75))
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert abs(loss.item() - (math.log(1 + math.exp(3.5)) + 0.5 * kl)) < 1e-5


def test_zero_weight_is_naive(experiences, model, drive, equal):
    stream = experiences()
    assert equal(drive(LwF(model=model(), distill=0), stream).model, drive(Naive(model=model()), stream).model)


def test_the_first_experience_is_naive(experiences, model, drive, equal):
    stream = experiences(1)
    assert equal(drive(LwF(model=model()), stream).model, drive(Naive(model=model()), stream).model)


def test_the_teacher_is_the_model_before_this_experience_and_stays(experiences, model, drive):
    stream = experiences(2)
    strategy = drive(LwF(model=model(), distill=3.0), stream[:1])
    before = {k: v.clone() for k, v in strategy.model.state_dict().items()}
    drive(strategy, stream[1:])
    teacher = strategy.teacher.model.state_dict()
    assert all(torch.equal(teacher[k], before[k]) for k in before)
    assert teacher["head.weight"].shape[0] == 2
    assert not any(p.requires_grad for p in strategy.teacher.parameters())
    assert not any(m.training for m in strategy.teacher.modules())


def test_it_holds_the_old_outputs(experiences, model, drive):
    stream = experiences(2)

    def drift(strategy):
        drive(strategy, stream[:1], epochs=10)
        x = stream[1].train.all()[0]
        before = strategy.predict(x)[:, :2].softmax(1)
        drive(strategy, stream[1:], epochs=10)
        return (strategy.predict(x)[:, :2].softmax(1) - before).abs().mean().item()

    assert drift(LwF(model=model(), distill=5.0)) < 0.5 * drift(LwF(model=model(), distill=0.0))


def test_a_head_with_rows_for_all_classes_is_distilled_on_old_ones_only(experiences, model):
    stream, losses = experiences(3), []
    x, y = stream[1].train.all()
    for change in (0.0, 5.0):
        strategy = LwF(model=model(Linear), distill=1.0)
        strategy.grow(stream[0])
        strategy.grow(stream[1])
        with torch.no_grad():
            strategy.teacher.model.head.bias[4] += change  # a class that the teacher has never met
        losses.append(strategy.training_step((x, y), 0).item())
    assert losses[0] == losses[1]


def test_resumes(experiences, model, resumes):
    for head in (Growing, Linear):
        assert resumes(lambda head=head: LwF(model=model(head)), experiences())


def test_replayed_samples_are_in_both_terms(experiences, model):
    """The loss of a batch and what is replayed with it is that of the two as one batch, without a memory."""
    stream, found = experiences(2), []
    for replay_batch in (3, 0):
        strategy = LwF(model=model(Linear), distill=0.7, replay_batch=replay_batch, memory=4).double()
        strategy.grow(stream[0])
        strategy.grow(stream[1])
        with torch.no_grad():
            strategy.model.head.bias[1] += 1
        x, y = stream[1].train.all()
        held = torch.linspace(-1, 1, 5, dtype=torch.float64)[None]
        strategy.raw = x.double()
        if replay_batch:
            strategy.memory.add(held, torch.tensor([1]))
            found.append(strategy.training_step((x.double(), y), 0).item())
            assert strategy.memory.seen == 1 + len(x)
        else:
            assert strategy.memory is None
            joint = torch.cat([x.double(), held.expand(3, 5)]), torch.cat([y, torch.tensor([1, 1, 1])])
            found.append(strategy.training_step(joint, 0).item())
    assert abs(found[0] - found[1]) < 1e-10


def test_with_replay_it_remembers_and_resumes(experiences, model, drive, resumes):
    stream = experiences()
    strategy = drive(LwF(model=model(), memory=60, replay_batch=8), stream, epochs=20)
    accuracy = [(strategy.predict(x).argmax(1) == y).float().mean().item() for x, y in (e.train.all() for e in stream)]
    assert min(accuracy) > 0.6
    for head in (Linear, Taskwise):
        assert resumes(lambda head=head: LwF(model=model(head), memory=9, replay_batch=4), experiences())
