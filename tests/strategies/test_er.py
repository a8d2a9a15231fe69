import math

import pytest
import torch

from clplat.errors import UserError
from clplat.strategies.er import ER
from clplat.strategies.naive import Naive


def test_loss_by_hand(linear):
    strategy = ER(model=linear(), memory=4, replay_batch=3)
    strategy.memory.add(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))  # every replayed sample is this one
    strategy.raw = x = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    loss = strategy.training_step((x, torch.tensor([0, 0])), 0)
    replayed, new = math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(2.5))  # logits (1, 0.5) and (0, 2.5)
    assert abs(loss.item() - (2 * new + 3 * replayed) / 5) < 1e-5


def test_the_first_batch_is_not_replayed_against_itself(linear):
    strategy = ER(model=linear(), memory=4, replay_batch=3)
    strategy.raw = x = torch.tensor([[0.0, 1.0]])
    loss = strategy.training_step((x, torch.tensor([1])), 0)
    assert abs(loss.item() - math.log(1 + math.exp(-2.5))) < 1e-5
    assert len(strategy.memory) == 1


def test_memory_keeps_stored_inputs_of_new_samples_only(linear):
    strategy = ER(model=linear(), memory=100, replay_batch=5)
    strategy._prepare = lambda raw, training: raw.float() + 1
    seen = []
    for k in range(4):
        strategy.raw = torch.full((2, 2), k, dtype=torch.uint8)
        seen += [k, k]
        strategy.training_step((strategy.prepare(strategy.raw), torch.tensor([k % 2, k % 2])), k)
    assert strategy.memory.stored["inputs"][:, 0].tolist()[: len(strategy.memory)] == seen
    assert strategy.memory.sample(1)[0].dtype == torch.uint8


def test_replayed_samples_are_prepared(linear):
    strategy = ER(model=linear(), memory=4, replay_batch=1)
    strategy._prepare = lambda raw, training: raw.float() * 10
    strategy.raw = torch.tensor([[1, 0]], dtype=torch.uint8)
    for _ in range(2):  # the second step replays the first
        loss = strategy.training_step((strategy.prepare(strategy.raw), torch.tensor([0])), 0)
    assert abs(loss.item() - math.log(1 + math.exp(0.5 - 10))) < 1e-5


def test_replay_batch_zero_is_naive(experiences, model, drive, equal):
    stream = experiences()
    er = drive(ER(model=model(), replay_batch=0), stream)
    assert equal(er.model, drive(Naive(model=model()), stream).model)


def test_it_remembers(experiences, model, drive):
    stream = experiences()
    strategy = drive(ER(model=model(), memory=60, replay_batch=8), stream, epochs=20)
    accuracy = [(strategy.predict(x).argmax(1) == y).float().mean().item() for x, y in (e.train.all() for e in stream)]
    assert min(accuracy) > 0.6  # without memory it ends at 0
    labels = strategy.memory.stored["labels"]
    assert len(labels.unique()) == 6


def test_resumes(experiences, model, resumes):
    assert resumes(lambda: ER(model=model(), memory=9, replay_batch=4), experiences())


def test_refuses_a_memory_of_none(model):
    with pytest.raises(UserError, match="memory: 0"):
        ER(model=model(), memory=0)
    with pytest.raises(UserError, match=r"replay_batch: -1 is out of range \(valid: ≥ 0\)"):
        ER(model=model(), replay_batch=-1)
