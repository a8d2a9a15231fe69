"""U-LiRA's shadow models: the right samples in each, the run left as it is, what can't be done refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import clplat
from clplat import Data, Experience, Kind, Stream
from clplat.cli import main
from clplat.config.resolve import resolve
from clplat.config.settings import StartSettings
from clplat.erasure.audit.audit import audit_dir
from clplat.errors import DivergedError, UserError
from clplat.metrics.membership import logit_confidences
from clplat.report.evidence import evidence
from clplat.run import shadows
from clplat.run.build import build_stream
from clplat.run.launch import make_fabric

MODELS = ("original", "unlearned")
INPUTS = torch.arange(24.0)[:, None]
LABELS = torch.arange(24) % 2
TESTS = 100 + torch.arange(8.0)[:, None]
TEST_LABELS = torch.arange(8) % 2


def stream_of(request, rows):
    """Two learn experiences of twelve samples each, and a request."""
    made = [
        Experience(
            i,
            f"learn-{i}",
            Kind.LEARN,
            Data(INPUTS, LABELS, torch.arange(12 * i, 12 * i + 12)),
            Data(TESTS, TEST_LABELS, torch.arange(4 * i, 4 * i + 4)),
            classes=(0, 1),
        )
        for i in range(2)
    ]
    erased = Data(INPUTS, LABELS, torch.tensor(rows))
    return Stream([*made, Experience(2, "forget-0", Kind.FORGET, erased, erased, request=request)], num_classes=2,
                  input_shape=(1,))  # fmt: skip


def chosen(rows, tests, homes):
    inputs = torch.cat([INPUTS[rows], TESTS[tests]])
    labels = torch.cat([LABELS[rows], TEST_LABELS[tests]])
    return shadows.Candidates(inputs, labels, torch.tensor(rows), torch.tensor(homes), {}, "")


def held(data):
    return sorted(data.batch(torch.arange(len(data)))[0][:, 0].tolist())


def test_a_shadow_model_learns_and_forgets_its_half_of_the_candidates():
    """Erased ones that it has not are nowhere; those never seen that it has are learned where they belong."""
    stream = stream_of(("sample:3", "sample:14"), [3, 14])
    found = shadows.shadow_stream(stream, 2, chosen([3, 14], [1, 6], [0, 1]), np.array([False, True, True, False]))
    assert held(found[0].train) == [*[float(r) for r in range(12) if r != 3], 101]
    assert held(found[1].train) == [float(r) for r in range(12, 24)]
    assert held(found[2].train) == [14, 101]
    assert found[2].request == ("sample:14", "sample:24")  # the row of the first one that was added
    assert all(e.test is None and e.valid is None for e in found)
    first, last = found[0].train, found[2].train
    assert first.inputs is last.inputs
    assert first.labels[24] == TEST_LABELS[1]
    assert held(stream[0].train) == [float(r) for r in range(12)]  # the stream itself is as it was


def test_erased_samples_that_are_no_candidates_are_erased_by_every_shadow_model():
    stream = stream_of(("sample:3", "sample:4", "sample:14"), [3, 4, 14])
    found = shadows.shadow_stream(stream, 2, chosen([3, 14], [1], [0]), np.array([False, False, True]))
    assert held(found[2].train) == [4, 101]
    assert found[2].request == ("sample:4", "sample:24")


def test_later_experiences_are_left_out():
    stream = stream_of(("sample:3",), [3])
    stream.experiences = (*stream.experiences, replace(stream[1], index=3, name="more"))
    assert len(shadows.shadow_stream(stream, 2, chosen([3], [1], [0]), np.array([True, False]))) == 3


CONFIG = {
    "strategy": "finetune_retained", "backbone": {"name": "mlp", "hidden": [8]}, "head": "linear", "seed": 1,
    "stream": {"name": "unlearning", "unit": "sample", "size": 24, "base_options": {"experiences": 2}},
    "loop": {"max_steps": 3, "batch_size": 64}, "tracking": {"enabled": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run without shadow models and with four."""
    folder = tmp_path_factory.mktemp("runs")
    audit = {"relearn_steps": 0, "keep_scores": True}
    return [clplat.run(CONFIG, quiet=True, output=str(folder / str(n)), audit=audit | {"shadows": n}).run_dir
            for n in (0, 4)]  # fmt: skip


def request_of(run_dir):
    (entry,) = evidence(run_dir)["requests"]
    return entry


@pytest.mark.slow
def test_the_report_has_numbers_interval_count_and_cost(runs):
    entry = request_of(runs[1])
    found = entry["lira"]
    assert found == json.loads((audit_dir(runs[1], entry["index"]) / "lira.json").read_text())
    assert (found["shadows"], found["erased"], found["unseen"]) == (4, 24, 24)
    assert found["seconds"] > 0
    for model in MODELS:
        assert found[model]["low"] <= found[model]["auc"] <= found[model]["high"]
    page = (runs[1] / "erasure.html").read_text()
    assert "4 shadow models in" in page
    assert "An attacker with 4 shadow models" in page
    assert request_of(runs[0])["why_null"]["lira"].startswith("no shadow models were made")


@pytest.mark.slow
def test_the_run_is_the_same_with_and_without(runs):
    digests = [request_of(r)["models"]["unlearned"]["model_sha256"] for r in runs]
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_the_scores_attacked_are_those_of_the_candidates(runs):
    """Sample by sample: by the run's own learner, which the request has left."""
    config = resolve(config=runs[0] / "config.yaml")
    stream = build_stream(config)
    index = request_of(runs[0])["index"]
    found = shadows.candidates(config, stream, index, audit_dir(runs[0], index))
    learner = clplat.load(runs[0])
    with torch.no_grad():
        logits = learner.predict(stream.prepare(found.inputs, False))
    np.testing.assert_allclose(
        found.target["unlearned"], logit_confidences(logits.numpy(), found.labels.numpy()), rtol=1e-3, atol=1e-4
    )
    tests = {e.index: e.test.inputs[e.test.row_ids()] for e in stream if e.kind is Kind.LEARN}
    for sample, home in zip(found.inputs[24:], found.homes.tolist(), strict=True):
        assert (tests[home] == sample).flatten(1).all(1).any()


@pytest.mark.slow
def test_a_shadow_model_that_fails_is_said_and_leaves_the_run(runs, tmp_path, monkeypatch):
    def diverges(*_):
        raise DivergedError("loss is not finite")

    monkeypatch.setattr(shadows, "_shadow", diverges)
    folder = Path(shutil.copytree(runs[0], tmp_path / "run"))
    config = resolve(config=folder / "config.yaml")
    shadows.attack(replace(config, audit=replace(config.audit, shadows=4)), folder, None)
    entry = request_of(folder)
    assert entry["lira"] is None
    assert entry["why_null"]["lira"] == "a shadow model could not be made (loss is not finite)"


def test_what_can_t_be_done_is_refused_before_anything_runs(tmp_path, capsys):
    for count in (2, 5):
        with pytest.raises(UserError, match=f"audit.shadows: {count} is out of range"):
            clplat.run(CONFIG, quiet=True, output=str(tmp_path), audit={"shadows": count})
    with pytest.raises(UserError, match=r"audit.shadows: 4, but audit.enabled is false \(valid: 0"):
        clplat.run(CONFIG, quiet=True, output=str(tmp_path), audit={"shadows": 4, "enabled": False})
    with pytest.raises(UserError, match=r"but audit.enabled is false"):
        clplat.run(CONFIG, dry_run=True, output=str(tmp_path), audit={"shadows": 4, "enabled": False})
    assert not list(tmp_path.iterdir())
    (tmp_path / "faulty.yaml").write_text(yaml.safe_dump(CONFIG | {"audit": {"shadows": 4, "enabled": False}}))
    assert main(["validate", str(tmp_path / "faulty.yaml")]) == 2
    assert "audit.shadows: 4, but audit.enabled is false" in capsys.readouterr().err
    config = resolve(config=CONFIG | {"audit": {"shadows": 4}})
    stream = build_stream(config)
    assert shadows.faults(config, stream) == []
    assert "start.run" in shadows.faults(replace(config, start=StartSettings(run="other")), stream)[0]
    stream.experiences = tuple(e for e in stream if e.kind is Kind.LEARN)
    assert "holds no request" in shadows.faults(config, stream)[0]


def test_a_dry_run_of_what_makes_shadow_models_takes_its_two_steps(tmp_path):
    """It ends early by itself, which is no reason to refuse what the run itself would do."""
    result = clplat.run(CONFIG, quiet=True, dry_run=True, output=str(tmp_path), audit={"shadows": 4})
    assert len(result.accuracy_matrix) == 2  # before anything, and after the first experience


def test_before_a_request_is_before_all_that_come_in_a_row(monkeypatch):
    """As the run's audit has it: of two requests, both scores are of the second, the first's before either."""
    config = resolve(config=CONFIG | {"stream": CONFIG["stream"] | {"count": 2, "size": 4, "positions": "end"}})
    stream, stops = build_stream(config), []
    assert [e.kind for e in stream] == [Kind.LEARN, Kind.LEARN, Kind.FORGET, Kind.FORGET]
    monkeypatch.setattr(shadows.Runner, "run", lambda self: stops.append(self.loop.stop_after))
    monkeypatch.setattr(shadows.audit, "logits_of", lambda *_: torch.zeros(4, 10))
    fabric = make_fabric(config.fabric)
    fabric.launch()
    erased = stream[3].train
    picked = shadows.Candidates(erased.inputs[:4], erased.labels[:4], erased.rows, torch.zeros(0), {}, "")
    assert set(shadows._shadow(config, stream, 3, picked, 0, fabric)) == {"original", "unlearned"}
    assert stops == [2, 4]


@pytest.mark.slow
def test_every_shadow_model_has_a_seed_of_its_own_and_none_the_runs(runs, tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(shadows, "_shadow", lambda *a: seeds.append(a[4]) or {m: np.zeros(48) for m in MODELS})
    folder = Path(shutil.copytree(runs[0], tmp_path / "run"))
    config = resolve(config=folder / "config.yaml")
    shadows.attack(replace(config, audit=replace(config.audit, shadows=4)), folder, None)
    assert len({config.seed, *seeds}) == 5
