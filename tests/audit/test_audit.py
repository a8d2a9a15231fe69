"""The audit of requests: it scores the right samples, changes nothing, and comes out the same after a crash."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mixed import CENTRES, mixed_config
from safetensors.torch import load_file

import clplat
from clplat import Data, Experience, Kind
from clplat.config.resolve import resolve
from clplat.erasure.audit.audit import audit_dir
from clplat.erasure.audit.sandbox import relearn
from clplat.erasure.audit.sets import draw, sets_of
from clplat.errors import UserError
from clplat.run import checkpoint
from clplat.run.build import build_strategy, build_stream
from clplat.strategy import evaluating

LABELS = torch.arange(4).repeat_interleave(10)
INPUTS = CENTRES[LABELS] + 0.1 * torch.arange(40)[:, None]
TESTS = INPUTS + 0.01


def part(*classes, world=None):
    rows = torch.isin(LABELS, torch.tensor(classes)).nonzero()[:, 0]
    return {"train": Data(INPUTS, LABELS, rows, world), "test": Data(TESTS, LABELS, rows, world)}


def rows(pieces):
    return sorted(int(r) for p in pieces for r in p.data.row_ids())


def learn(index, *classes, world=None):
    return Experience(index, f"learn-{index}", Kind.LEARN, **part(*classes, world=world), classes=classes)


def forget(index, *classes):
    return Experience(index, f"forget-{index}", Kind.FORGET, **part(*classes), classes=classes,
                      request=tuple(f"class:{c}" for c in classes))  # fmt: skip


def of_class(*classes):
    return [r for c in classes for r in range(10 * c, 10 * c + 10)]


# --- what is scored -----------------------------------------------------------------------------------------------


def test_sets_of_class_requests():
    stream = [learn(0, 0, 1), learn(1, 2, 3), forget(2, 0), forget(3, 2)]
    first, second = sets_of(stream, 2), sets_of(stream, 3)
    for name, expected in {"erased": of_class(0), "erased_test": of_class(0), "retained": of_class(1, 2, 3),
                           "retained_test": of_class(1, 2, 3)}.items():  # fmt: skip
        assert rows(first[name]) == expected, name
    assert rows(second["retained"]) == rows(second["retained_test"]) == of_class(1, 3)
    assert all(p.data.inputs is TESTS for p in first["retained_test"] + first["erased_test"])
    assert {p.source for p in first["erased"]} == {2}


def test_a_class_that_is_taught_again_is_kept_again():
    stream = [learn(0, 0, 1), forget(1, 0), learn(2, 0), forget(3, 1)]
    assert rows(sets_of(stream, 3)["retained"]) == of_class(0)
    assert rows(sets_of(stream, 3)["retained_test"]) == of_class(0)
    assert rows(sets_of(stream, 1)["retained"]) == of_class(1)


def test_a_request_for_samples_takes_no_test_sample():
    few = Data(INPUTS, LABELS, torch.tensor([3, 12]))
    request = Experience(1, "forget-1", Kind.FORGET, few, few, request=("sample:3", "sample:12"))
    sets = sets_of([learn(0, 0, 1), request], 1)
    assert rows(sets["erased"]) == [3, 12]
    assert sets["erased_test"] == []
    assert rows(sets["retained"]) == [r for r in range(20) if r not in (3, 12)]
    assert rows(sets["retained_test"]) == of_class(0, 1)


def test_a_sample_seen_in_two_guises_is_two_samples():
    world = lambda x: -x  # noqa: E731
    stream = [learn(0, 0, 1), learn(1, 0, 1, world=world), forget(2, 0)]
    few = Data(INPUTS, LABELS, torch.tensor([13]))
    stream[2] = Experience(2, "forget-2", Kind.FORGET, few, few, request=("sample:13",))
    kept = sets_of(stream, 2)["retained"]
    assert [rows([p]) for p in kept] == [[r for r in range(20) if r != 13], of_class(0, 1)]


def test_a_class_that_is_erased_goes_in_every_guise():
    stream = [learn(0, 0, 1), learn(1, 0, 1, world=lambda x: -x), forget(2, 0)]  # the request names one guise
    sets = sets_of(stream, 2)
    for name in ("retained", "retained_test"):
        assert [rows([p]) for p in sets[name]] == [of_class(1), of_class(1)]


def test_a_sample_that_is_learned_twice_is_scored_once():
    stream = [learn(0, 0, 1), learn(1, 1, 2), forget(2, 0)]
    sets = sets_of(stream, 2)
    for name in ("retained", "retained_test"):
        assert rows(sets[name]) == of_class(1, 2)


def test_draws_are_without_replacement_and_repeat():
    pieces = sets_of([learn(0, 0, 1), learn(1, 2, 3), forget(2, 0)], 2)["retained"]
    chosen = rows(draw(pieces, 12, 5))
    assert len(set(chosen)) == 12
    assert set(chosen) < set(of_class(1, 2, 3))
    assert chosen == rows(draw(pieces, 12, 5)) != rows(draw(pieces, 12, 6))
    assert {LABELS[r].item() for r in chosen} == {1, 2, 3}  # not the first ones as they come
    assert rows(draw(pieces, 100, 5)) == of_class(1, 2, 3)


def test_draws_from_overlapping_sets_overlap():
    """What is drawn of the smaller set was drawn of the larger one, or takes the place of what it lacks."""
    stream = [learn(0, 0, 1), learn(1, 2, 3), forget(2, 0), forget(3, 1)]
    large, small = (rows(draw(sets_of(stream, i)["retained"], 12, 5)) for i in (2, 3))
    assert set(large) & set(of_class(2, 3)) <= set(small)
    assert len(small) == 12


def test_a_sequence_of_requests_is_scored_in_one_pass(tmp_path, monkeypatch):
    """Every sample once, whatever number of requests needs it."""
    import clplat.erasure.audit.audit

    scored = []
    original = clplat.erasure.audit.audit._score
    monkeypatch.setattr(
        clplat.erasure.audit.audit, "_score", lambda r, d, t: scored.append(d.row_ids().tolist()) or original(r, d, t)
    )
    stream = {
        "name": "unlearning",
        "base": "digits",
        "base_options": {"experiences": 1},
        "count": 3,
        "positions": "end",
    }
    config = mixed_config(tmp_path) | {"strategy": "gradient_ascent", "stream": stream, "head": "linear"}
    result = clplat.run(config | {"audit": {"keep_scores": True, "samples": 50, "relearn_steps": 0}}, quiet=True)
    before, rest = scored[:2], scored[2:]
    assert len(rest) == 2 * 3
    assert all(len(set(r)) == len(r) for r in scored)
    assert len(before[0]) < 3 * 100  # erased and retained samples of three requests overlap
    assert sorted(f.name for f in (result.run_dir / "audit").iterdir()) == ["001", "002", "003"]
    models = {
        json.loads((audit_dir(result.run_dir, i) / "original.json").read_text())["model_sha256"] for i in (1, 2, 3)
    }
    assert len(models) == 1


# --- beside the run -----------------------------------------------------------------------------------------------


def newest(run_dir: Path) -> dict:
    state, notes = checkpoint.load_newest(run_dir / "checkpoints")
    assert not notes
    return state


def same(a, b, path="") -> None:
    """Equal in every tensor, bit for bit, and every plain value but times and memory."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a.keys() - {"cost", "spent", "metrics_offset", "metrics_sha256", "config", "ledger"}:
            same(a[k], b[k], f"{path}/{k}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}/{i}")
    else:
        assert a == b, path


NOISY = """
import torch
from mixed import Mixed

class Noisy(Mixed):
    def predict(self, inputs, task=None):
        return super().predict(inputs, task) + 0.01 * torch.randn(1)

class Dropping(Mixed):
    def predict(self, inputs, task=None):
        return torch.nn.functional.dropout(super().predict(inputs, task), 0.5, self.training)
"""


@pytest.mark.parametrize("strategy", ["mixed", "noisy"])
def test_a_run_with_the_audit_is_the_run_without(strategy, tmp_path):
    """Weights, memories, every random state and what was measured; also of a strategy that draws when it predicts."""
    (tmp_path / "noisy.py").write_text(NOISY)
    named = {"strategy": f"{tmp_path / 'noisy.py'}:Noisy"} if strategy == "noisy" else {}
    with_, without = (
        clplat.run(mixed_config(tmp_path / str(on)), quiet=True, audit={"enabled": on}, **named) for on in (True, False)
    )
    assert audit_dir(with_.run_dir, 2).is_dir()
    assert not (without.run_dir / "audit").exists()
    same(newest(with_.run_dir), newest(without.run_dir))
    assert with_.metrics == without.metrics
    assert with_.summary["config_sha256"] == without.summary["config_sha256"]


def test_scores_are_those_of_the_model_after_the_request(tmp_path):
    (tmp_path / "noisy.py").write_text(NOISY)
    named = f"{tmp_path / 'noisy.py'}:Dropping"
    result = clplat.run(mixed_config(tmp_path), quiet=True, strategy=named, loop={"stop_after": 3})
    stream = build_stream(resolve(config=result.run_dir / "config.yaml"))
    scores = load_file(audit_dir(result.run_dir, 2) / "unlearned.safetensors")
    numbers = json.loads((audit_dir(result.run_dir, 2) / "unlearned.json").read_text())
    learner = clplat.load(result.run_dir)
    for name, data in (("erased", stream[2].train), ("erased_test", stream[2].test)):
        assert scores[f"{name}.rows"].tolist() == data.rows.tolist()
        inputs = stream.prepare(data.inputs[scores[f"{name}.rows"]], False)
        torch.testing.assert_close(scores[f"{name}.logits"], learner.predict(inputs), rtol=0, atol=0)
        assert scores[f"{name}.labels"].tolist() == data.targets().tolist()
    accuracy = (scores["erased_test.logits"].argmax(1) == scores["erased_test.labels"]).double().mean()
    assert result.accuracy_matrix[3][2] == pytest.approx(accuracy.item())
    assert numbers["sizes"] == {"erased": 40, "erased_test": 40, "retained": 120, "retained_test": 120}
    log = [json.loads(line)["metrics"] for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["audit/accuracy_erased_test"] == pytest.approx(accuracy.item())
    assert 0 <= log[-1]["audit/loss_auc"] <= 1


BIASED = """
import torch
from clplat.strategies.random_labels import RandomLabels

class Biased(RandomLabels):
    def predict(self, inputs, task=None):  # the last class, which is of another task, wins
        logits = self.model(inputs)
        return logits + 100 * (torch.arange(logits.shape[1]) == logits.shape[1] - 1)
"""


def test_relearning_begins_among_the_classes_of_the_task(tmp_path):
    """As the scores do; where all classes competed, all samples would be wrong at first."""
    (tmp_path / "biased.py").write_text(BIASED)
    base = {"scenario": "task", "experiences": 2, "train_per_class": 10, "test_per_class": 5}
    result = clplat.run(
        {
            "strategy": {"name": f"{tmp_path / 'biased.py'}:Biased", "lr": 0.1},
            "stream": {"name": "unlearning", "base_options": base, "requests": ["class:0"]},
            "backbone": {"name": "mlp", "hidden": [16]},
            "loop": {"max_steps": 20, "max_epochs": 4},
            "audit": {"keep_scores": True, "relearn_steps": 2},
            "tracking": {"enabled": False},
            "output": str(tmp_path / "runs"),
        },
        quiet=True,
    )
    scores = load_file(audit_dir(result.run_dir, 2) / "unlearned.safetensors")
    found = json.loads((audit_dir(result.run_dir, 2) / "unlearned.json").read_text())["relearn"]
    logits, labels = (scores[f"erased.{key}"][found["positions"]] for key in ("logits", "labels"))
    assert found["why"] is None
    assert found["accuracies"][0] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert found["accuracies"][0] > 0


def test_the_original_is_the_model_before_the_requests(tmp_path):
    result = clplat.run(mixed_config(tmp_path), quiet=True, loop={"stop_after": 3})
    before = clplat.run(mixed_config(tmp_path), quiet=True, loop={"stop_after": 2})
    scores = load_file(audit_dir(result.run_dir, 2) / "original.safetensors")
    stream = build_stream(resolve(config=result.run_dir / "config.yaml"))
    logits = clplat.load(before.run_dir).predict(stream.prepare(stream[2].train.all()[0], False))
    torch.testing.assert_close(scores["erased.logits"], logits, rtol=0, atol=0)
    hashes = [json.loads((audit_dir(result.run_dir, 2) / f"{m}.json").read_text())["model_sha256"]
              for m in ("original", "unlearned")]  # fmt: skip
    assert hashes[0] != hashes[1]


def test_no_set_is_larger_than_asked(tmp_path):
    audit = {"samples": 15, "relearn_samples": 5, "relearn_steps": 0}
    result = clplat.run(mixed_config(tmp_path), quiet=True, loop={"stop_after": 3}, audit=audit)
    scores = load_file(audit_dir(result.run_dir, 2) / "unlearned.safetensors")
    assert {len(v) for v in scores.values()} == {15}
    assert scores["retained.labels"].unique().tolist() == [1, 2, 3]
    assert "relearn" not in json.loads((audit_dir(result.run_dir, 2) / "unlearned.json").read_text())


def test_resumed_before_the_audit_it_is_written_again(tmp_path):
    config = mixed_config(tmp_path) | {"audit": {"keep_scores": True, "relearn_steps": 3}}
    config["loop"] |= {"checkpoint_every": 5, "stop_after": 3}
    result = clplat.run(config, quiet=True)
    crashed = tmp_path / "crashed"
    shutil.copytree(result.run_dir, crashed)
    shutil.rmtree(sorted((crashed / "checkpoints").iterdir())[-1])  # the one after the audit
    expected = {f.name: f.read_bytes() for f in audit_dir(crashed, 2).iterdir()}
    (crashed / "seal.json").unlink()  # a run that was killed has none
    for name in ("unlearned.json", "unlearned.safetensors"):
        (audit_dir(crashed, 2) / name).unlink()
    clplat.resume(crashed, quiet=True)
    assert {f.name: f.read_bytes() for f in audit_dir(crashed, 2).iterdir()} == expected
    assert len(expected) == 4


@pytest.mark.slow
def test_two_processes_score_every_sample_once(tmp_path):
    """Uneven shares: 40 and 120 samples in batches of 7."""
    two = {"fabric.devices": 2, "fabric.accelerator": "cpu", "loop.eval_batch_size": 7, "loop.stop_after": 3}
    result = clplat.run(mixed_config(tmp_path), quiet=True, **two)
    scores = load_file(audit_dir(result.run_dir, 2) / "unlearned.safetensors")
    stream, learner = build_stream(resolve(config=result.run_dir / "config.yaml")), clplat.load(result.run_dir)
    assert sorted(scores["retained.rows"].tolist()) == list(range(40, 160))
    for name, data in (("erased", stream[2].train), ("retained_test", stream[2].test)):
        inputs = stream.prepare(data.inputs[scores[f"{name}.rows"]], False)
        torch.testing.assert_close(scores[f"{name}.logits"], learner.predict(inputs), rtol=1e-5, atol=1e-5)


# --- relearning ---------------------------------------------------------------------------------------------------


def learner(**options):
    config = resolve(config=mixed_config(Path("unused")), **{f"strategy.{k}": v for k, v in options.items()})
    strategy = build_strategy(config, (2,), 4, seed=0)
    strategy.grow(learn(0, 0, 1, 2, 3))
    return strategy


def test_relearning_follows_the_gradient_on_copies_alone():
    strategy = learner(lr=0.3, momentum=0.5)
    for p in list(strategy.model.parameters())[:2]:
        p.requires_grad_(False)  # what the strategy freezes is trained too
    before = copy.deepcopy(strategy.state_dict())
    twin = copy.deepcopy(strategy).eval().requires_grad_(True)
    flags = [p.requires_grad for p in strategy.parameters()]
    random = torch.get_rng_state()
    with evaluating(strategy), torch.no_grad():
        found = relearn(strategy, INPUTS, LABELS, None, steps=6, lr=0.3)
    optimizer, expected = torch.optim.SGD(twin.parameters(), lr=0.3, momentum=0.5), []
    for step in range(7):
        logits = twin.predict(INPUTS)
        expected.append((logits.argmax(1) == LABELS).double().mean().item())
        if step < 6:
            optimizer.zero_grad()
            F.cross_entropy(logits, LABELS).backward()
            optimizer.step()
    assert found == {"accuracies": expected, "why": None}
    assert expected[-1] > expected[0]
    same(dict(strategy.state_dict()), dict(before))
    assert [p.requires_grad for p in strategy.parameters()] == flags
    assert all(p.grad is None for p in strategy.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert strategy.training


def test_relearning_ends_when_all_are_right():
    strategy = learner().eval()
    found = relearn(strategy, INPUTS[:1], strategy.predict(INPUTS[:1]).argmax(1), None, steps=50, lr=0.1)
    assert found["accuracies"] == [1.0]


@pytest.mark.parametrize(("replacement", "why"), [
    (lambda self, x: F.pad(self.model(x)[:, 1:], (1, 0), value=-torch.inf), "no probability at all"),
    (lambda self, x: self.model(x)[:, :2], "no probability at all"),
    (lambda self, x: self.model(x).detach(), "no gradient"),
    (lambda self, x: self.model(x) * torch.nan, "not finite"),
])  # fmt: skip
def test_what_can_not_be_relearned_says_why(replacement, why):
    strategy = learner().eval()
    strategy.predict = lambda x: replacement(strategy, x)
    found = relearn(strategy, INPUTS, LABELS, None, steps=5, lr=0.1)
    assert found["accuracies"] == []
    assert why in found["why"]


def test_bad_settings_are_refused():
    bad = {"samples": 0, "relearn_steps": -1, "relearn_lr": 0, "tolerance": 1, "oracle": "nowhere"}
    with pytest.raises(UserError) as caught:
        resolve(config=mixed_config(Path("unused")), audit=bad)
    assert len(caught.value.faults) == 5
    assert any("audit.oracle: nowhere is not the folder of a finished run" in f for f in caught.value.faults)
