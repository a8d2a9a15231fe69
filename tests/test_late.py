"""Requests made of a finished run through the Python API."""

import json
import shutil

import pytest
import torch

import clplat
from clplat.errors import UserError

CONFIG = {
    "strategy": {"name": "acu", "width": 64},
    "stream": {"name": "unlearning", "base": "digits", "requests": ["class:3"]},
    "backbone": {"name": "mlp", "hidden": [30]},
    "loop": {"batch_size": 128, "representation": False, "checkpoint_seconds": None},
    "tracking": {"enabled": False},
}


@pytest.fixture(scope="module")
def run_once(tmp_path_factory):
    return clplat.run({**CONFIG, "output": str(tmp_path_factory.mktemp("runs"))}, quiet=True).run_dir


@pytest.fixture
def finished(run_once, tmp_path):
    """A finished run of one's own."""
    return shutil.copytree(run_once, tmp_path / "finished")


def rows(run_dir):
    """Training rows of class 5 in the run's stream."""
    from clplat.config.resolve import resolve
    from clplat.run.build import build_stream

    data = build_stream(resolve(config=run_dir / "config.yaml"))[0].train
    return (data.labels == 5).nonzero()[:, 0].tolist()


def everything(run_dir):
    """All that a refused request must leave as it was; the ledger notes it."""
    return {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file() and p.name not in ("run.lock", "ledger.json")}


def test_a_request_is_a_further_experience_of_the_run(finished):
    before = clplat.load(finished)
    after = clplat.forget(finished, "class:7")
    assert before.ridge.counts[7] > 0
    assert after.ridge.counts[7] == 0
    assert after.predict(torch.rand(4, 1, 8, 8))[:, 7].isneginf().all()
    assert torch.equal(clplat.load(finished).ridge.weight, after.ridge.weight)
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert [e["name"] for e in summary["experiences"]][-2:] == ["forget-0", "forget-1"]
    matrix = summary["accuracy_matrix"]
    assert {len(row) for row in matrix} == {len(matrix) - 1}
    assert matrix[-2][-1] > 0.5  # measured where the request started from
    assert matrix[-1][-1] == 0.0
    assert matrix[1][-1] is None
    assert summary["metrics"]["forget_accuracy"] == 0.0
    events = json.loads((finished / "ledger.json").read_text())
    events = events["events"] if isinstance(events, dict) else events
    assert [e["request"] for e in events[-2:]] == [["class:3"], ["class:7"]]
    assert events[-1]["outcome"] == "done"


def test_samples_are_erased_as_if_never_learned(finished, tmp_path):
    """The learner after two late requests is that of a stream that held the same requests."""
    mine = rows(finished)[:3]
    clplat.forget(finished, [f"sample:{r}" for r in mine])
    late = clplat.forget(finished, ["class:5"])
    listed = ["class:3", [f"sample:{r}" for r in mine], "class:5"]
    config = {**CONFIG, "stream": {**CONFIG["stream"], "requests": listed}, "output": str(tmp_path / "b")}
    planned = clplat.load(clplat.run(config, quiet=True).run_dir)
    for name, tensor in planned.ridge.state_dict().items():
        assert torch.equal(late.ridge.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ([], "names nothing to erase"),
        ("class:3", "class:3 is erased already"),
        ("class:12", "class:12 was never learned"),
        (["class:1", "class:1"], "names class:1 2 times"),
        ("sample:999999", "sample:999999 was never learned"),
        ("experience:nonesuch", "experience:nonesuch was never learned"),
        ("klass:1", "is no id"),
        ("user:99999", "user:99999 is unknown"),
    ],
)
def test_what_the_ledger_refuses_changes_nothing(finished, request_, message):
    before = everything(finished)
    with pytest.raises(UserError, match=message):
        clplat.forget(finished, request_)
    assert everything(finished) == before


def test_the_same_request_twice_is_refused(finished):
    clplat.forget(finished, "class:7")
    before = everything(finished)
    with pytest.raises(UserError, match="class:7 is erased already"):
        clplat.forget(finished, "class:7")
    assert everything(finished) == before


def test_a_request_refused_by_the_strategy_is_struck_out(finished, monkeypatch):
    from clplat.strategies.acu import ACU

    def refuse(self, experience):
        raise UserError("no")

    before = clplat.load(finished)
    monkeypatch.setattr(ACU, "end", refuse)
    with pytest.raises(UserError, match="no"):
        clplat.forget(finished, "class:7")
    monkeypatch.undo()
    after = clplat.load(finished)
    assert all(torch.equal(t, after.ridge.state_dict()[k]) for k, t in before.ridge.state_dict().items())
    assert clplat.forget(finished, "class:8").ridge.counts[[7, 8]].gt(0).tolist() == [True, False]


def test_an_interrupted_request_is_gone_on_with(finished, monkeypatch):
    from clplat.strategies.acu import ACU

    def stop(self, experience):
        raise KeyboardInterrupt

    monkeypatch.setattr(ACU, "end", stop)
    with pytest.raises(KeyboardInterrupt):
        clplat.forget(finished, "class:7")
    monkeypatch.undo()
    with pytest.raises(UserError, match="is not finished: go on with it first"):
        clplat.forget(finished, "class:8")
    clplat.resume(finished, quiet=True)
    assert clplat.load(finished).ridge.counts[7] == 0


def test_runs_that_cannot_be_asked(tmp_path):
    with pytest.raises(UserError, match="is no run directory"):
        clplat.forget(tmp_path, "class:1")
    config = {**CONFIG, "strategy": "naive", "stream": "digits", "loop": {"max_steps": 1}, "output": str(tmp_path)}
    run_dir = clplat.run(config, quiet=True).run_dir
    with pytest.raises(UserError, match="Naive does not handle kind 'forget'"):
        clplat.forget(run_dir, "class:1")
