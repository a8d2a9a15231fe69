import math

import torch

from clplat.strategies.derpp import DERpp, logit_distance


def test_logit_distance_by_hand():
    logits = torch.tensor([[1.0, 2.0, 9.0], [0.0, 4.0, 9.0]])
    stored = torch.tensor([[0.0, 0.0], [3.0, float("nan")]])  # the second sample had one logit when it was stored
    assert logit_distance(logits, stored).item() == ((1 + 4) / 2 + 9 / 1) / 2


def test_a_head_that_masks_classes_still_has_a_finite_gradient():
    logits = torch.tensor([[1.0, -torch.inf, -torch.inf]], requires_grad=True)
    distance = logit_distance(logits, torch.tensor([[3.0, -torch.inf, float("nan")]]))
    distance.backward()
    assert distance.item() == 4
    assert logits.grad.tolist() == [[-4.0, 0.0, 0.0]]


def test_loss_by_hand(linear):
    strategy = DERpp(model=linear(), memory=4, replay_batch=3, logit_weight=0.3, label_weight=0.7)
    strategy.memory.add(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), logits=torch.tensor([[0.0, 1.5]]))
    strategy.raw = x = torch.tensor([[0.0, 1.0]])
    loss = strategy.training_step((x, torch.tensor([0])), 0)
    new, replayed = math.log(1 + math.exp(2.5)), math.log(1 + math.exp(-0.5))  # logits (0, 2.5) and (1, 0.5)
    assert abs(loss.item() - (new + 0.3 * (1 + 1) / 2 + 0.7 * replayed)) < 1e-5


def test_logits_are_stored_as_they_were(experiences, model, drive):
    steps = []
    strategy = DERpp(model=model(), memory=50)
    before = {}

    def note(s):
        steps.append(len(s.memory))
        if len(steps) == 1:
            before["logits"] = s.memory.stored["logits"][: len(s.memory)].clone()

    drive(strategy, experiences(1), epochs=1, each_step=note)
    assert torch.equal(strategy.memory.stored["logits"][: steps[0]], before["logits"])
    now = strategy.predict(strategy.memory.stored["inputs"][: steps[0]])
    assert not torch.allclose(now, before["logits"], atol=1e-3)


def test_a_growing_head_matches_only_what_was_there(experiences, model, drive):
    strategy = drive(DERpp(model=model(), memory=100), experiences(2), epochs=1)
    logits, labels = strategy.memory.stored["logits"], strategy.memory.stored["labels"]
    held = torch.arange(100) < len(strategy.memory)
    assert logits.shape[1] == 4
    assert logits[held & (labels < 2)][:, 2:].isnan().all()
    assert not logits[held & (labels >= 2)].isnan().any()


def test_zero_weights_leave_the_new_loss_alone(experiences, model, drive):
    from clplat.strategies.naive import Naive

    stream = experiences()
    plain, zero = Naive(model=model()), DERpp(model=model(), logit_weight=0, label_weight=0)
    a, b = drive(plain, stream).model.state_dict(), drive(zero, stream).model.state_dict()
    # one forward of 72 rows instead of 8: the same to rounding
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


def test_it_remembers(experiences, model, drive):
    stream = experiences()
    strategy = drive(DERpp(model=model(), memory=30, replay_batch=8), stream, epochs=20)
    accuracy = [(strategy.predict(x).argmax(1) == y).float().mean().item() for x, y in (e.train.all() for e in stream)]
    assert min(accuracy) > 0.6  # without memory it ends at 0


def test_resumes(experiences, model, resumes):
    assert resumes(lambda: DERpp(model=model(), memory=9, replay_batch=4), experiences())
