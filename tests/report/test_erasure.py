"""The erasure report: its numbers against the files they come from, what it says without a reference, the page."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from mixed import mixed_config
from safetensors.torch import load_file
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import roc_auc_score

import clplat
from clplat import Kind
from clplat.cli import main
from clplat.config import discovery
from clplat.errors import UserError
from clplat.metrics.forensics import which_were_erased
from clplat.report.erasure import build_erasure_page, write_erasure
from clplat.report.erasure_parts import percent
from clplat.report.evidence import evidence, guarantee

AUDIT = {"relearn_lr": 0.05, "relearn_samples": 20, "keep_scores": True}


def run(folder, seed, **more):
    config = mixed_config(folder) | {"seed": seed, "audit": AUDIT, **more}
    config["stream"] = config["stream"] | {"seed": 1}
    config["loop"] = config["loop"] | {"stop_after": 4}
    return clplat.run(config, quiet=True).run_dir


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run and another one on the same stream, of another seed: two models, samples the same."""
    folder = tmp_path_factory.mktemp("runs")
    return run(folder, 1), run(folder, 2)


@pytest.fixture
def copies(runs, tmp_path):
    """Copies to change."""
    made = tmp_path / "own", tmp_path / "oracle"
    for source, target in zip(runs, made, strict=True):
        shutil.copytree(source, target)
        (target / "seal.json").unlink()  # what follows changes files on purpose
    return made


def audit(run_dir, model):
    folder = run_dir / "audit" / "002"
    return load_file(folder / f"{model}.safetensors"), json.loads((folder / f"{model}.json").read_text())


def change(path, **new):
    path.write_text(json.dumps(json.loads(path.read_text()) | new))


# --- numbers ------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_scores(runs):
    (entry,) = evidence(*runs)["requests"]
    for model, (scores, numbers) in {"original": audit(runs[0], "original"), "unlearned": audit(runs[0], "unlearned"),
                                     "oracle": audit(runs[1], "unlearned")}.items():  # fmt: skip
        found = entry["models"][model]
        losses = {}
        for name in ("erased", "erased_test", "retained", "retained_test"):
            logits, labels = scores[f"{name}.logits"], scores[f"{name}.labels"]
            assert found[f"accuracy_{name}"] == (logits.argmax(1) == labels).double().mean().item()
            losses[name] = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
        both = torch.cat([losses["erased"], losses["erased_test"]])
        member = torch.arange(80) < 40
        assert found["loss_auc"] == pytest.approx(roc_auc_score(member, -both))
        assert found["model_sha256"] == numbers["model_sha256"]
        assert 0 <= found["forget_efficacy"] <= 1
        told = which_were_erased({k: v.numpy() for k, v in scores.items()})
        for key in ("forensic_unseen", "forensic_retained"):
            assert found[key] == told[key]
            assert found[key]["low"] <= found[key]["auc"] <= found[key]["high"]
    p, q = (s["retained_test.logits"].double().softmax(1).numpy()
            for s in (audit(runs[0], "unlearned")[0], audit(runs[1], "unlearned")[0]))  # fmt: skip
    apart = entry["against_oracle"]["retained_test"]
    assert apart["agreement"] == (p.argmax(1) == q.argmax(1)).mean()
    assert apart["js_divergence"] == pytest.approx(np.mean(jensenshannon(p, q, axis=1) ** 2))
    assert apart["activation_distance"] == pytest.approx(np.linalg.norm(p - q, axis=1).mean())


def test_gaps_and_tug_of_war_by_hand(runs):
    (entry,) = evidence(*runs)["requests"]
    u, r = entry["models"]["unlearned"], entry["models"]["oracle"]
    product = 1.0
    for key in ("accuracy_erased", "accuracy_retained", "accuracy_retained_test"):
        product *= 1 - abs(u[key] - r[key])
    assert entry["against_oracle"]["tug_of_war"] == pytest.approx(product)
    gaps = entry["against_oracle"]["gaps"]
    assert gaps["UA"] == pytest.approx(abs(u["accuracy_erased"] - r["accuracy_erased"]))
    assert gaps["MIA"] == pytest.approx(abs(u["forget_efficacy"] - r["forget_efficacy"]))
    assert entry["against_oracle"]["average_gap"] == pytest.approx(sum(gaps.values()) / 4)


def test_a_run_is_at_no_distance_from_itself(runs):
    (entry,) = evidence(runs[0], runs[0])["requests"]
    close = entry["against_oracle"]
    assert (close["tug_of_war"], close["average_gap"]) == (1, 0)
    assert all(close[s] == {"agreement": 1, "js_divergence": 0, "activation_distance": 0, "logit_difference": 0}
               for s in ("erased", "erased_test", "retained", "retained_test"))  # fmt: skip
    assert entry["relearning"]["anamnesis_index"] == {"value": 1.0, "bound": "exact"}


def test_the_anamnesis_index_has_the_oracles_time_below(copies):
    """Not the unlearned model's own once more."""
    own, oracle = copies
    curves = [0.0] * 4 + [1.0], [0.0] * 8 + [1.0]
    for folder, curve in zip(copies, curves, strict=True):
        file = folder / "audit" / "002" / "unlearned.json"
        change(file, relearn=json.loads(file.read_text())["relearn"] | {"accuracies": curve, "why": None})
    found = evidence(own, oracle)["requests"][0]["relearning"]
    assert found["unlearned"]["steps"] == 4
    assert found["oracle"]["steps"] == 8
    assert found["anamnesis_index"] == {"value": 0.5, "bound": "exact"}


def test_the_target_of_relearning_is_the_original_models(runs):
    (entry,) = evidence(*runs)["requests"]
    scores, _ = audit(runs[0], "original")
    at = audit(runs[0], "unlearned")[1]["relearn"]["positions"]
    assert len(at) == 20
    right = (scores["erased.logits"][at].argmax(1) == scores["erased.labels"][at]).double().mean().item()
    assert entry["relearning"]["target"] == pytest.approx(0.95 * right)


def test_other_settings_of_relearning_are_not_compared(copies):
    own, oracle = copies
    file = oracle / "audit" / "002" / "unlearned.json"
    tried = json.loads(file.read_text())["relearn"]
    change(file, relearn=tried | {"settings": tried["settings"] | {"lr": 9.0}})
    (entry,) = evidence(own, oracle)["requests"]
    assert entry["relearning"]["anamnesis_index"] is None
    assert "other settings" in entry["why_null"]["relearning.oracle"]


def test_the_curve_of_a_request_is_its_column(runs):
    found = evidence(runs[0])
    summary = json.loads((runs[0] / "summary.json").read_text())
    (entry,) = found["requests"]
    assert entry["accuracy_over_run"] == [row[2] for row in summary["accuracy_matrix"]]
    assert entry["metrics"]["forget_accuracy"] == summary["metrics"]["forget_accuracy"]
    assert entry["metrics"]["h_mean"] == pytest.approx(summary["metrics"]["h_mean"])
    assert found["summary"]["largest_relapse"] == pytest.approx(summary["metrics"]["relapse"])
    assert entry["seconds"] == pytest.approx(found["ledger"][2]["seconds"], abs=0.05)


# --- what is not known --------------------------------------------------------------------------------------------


def test_without_an_oracle_there_is_no_gap(runs):
    (entry,) = evidence(runs[0])["requests"]
    assert entry["models"]["oracle"] is None
    assert entry["against_oracle"] is None
    assert entry["why_null"]["oracle"] == "no reference: no oracle's run was given"
    assert entry["relearning"]["oracle"] is None
    assert "No reference run was given" in build_erasure_page(evidence(runs[0]))


def test_an_oracle_of_another_stream_is_refused(copies):
    own, oracle = copies
    summary = json.loads((oracle / "summary.json").read_text())
    summary["experiences"][0]["name"] = "other"
    (oracle / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match="is a run on another stream"):
        evidence(own, oracle)


def test_an_oracle_that_scored_other_samples_is_no_reference(copies):
    own, oracle = copies
    file = oracle / "audit" / "002" / "unlearned.safetensors"
    scores = load_file(file)
    scores["retained.rows"] = scores["retained.rows"].flip(0).contiguous()
    from safetensors.torch import save_file

    save_file(scores, file)
    (entry,) = evidence(own, oracle)["requests"]
    assert entry["models"]["oracle"] is None
    assert "scored other samples" in entry["why_null"]["oracle"]
    assert entry["why_null"]["relearning.oracle"] == entry["why_null"]["oracle"]


def test_a_run_without_audit_has_its_accuracies_and_says_so(copies):
    own, _ = copies
    shutil.rmtree(own / "audit")
    (entry,) = evidence(own)["requests"]
    assert entry["models"] == {"original": None, "unlearned": None, "oracle": None}
    assert "not audited" in entry["why_null"]["unlearned"]
    assert entry["accuracy_over_run"][-1] is not None
    assert write_erasure(own).is_file()


def test_no_request_no_report(tmp_path):
    config = mixed_config(tmp_path)
    config["loop"] |= {"stop_after": 2}
    result = clplat.run(config, quiet=True)
    assert evidence(result.run_dir) is None
    assert not (result.run_dir / "erasure.html").exists()


# --- the page -----------------------------------------------------------------------------------------------------


def test_a_run_leaves_page_and_numbers(runs):
    page, numbers = (runs[0] / "erasure.html").read_text(), json.loads((runs[0] / "erasure.json").read_text())
    entry = numbers["requests"][0]
    for shown in ("erase-0", "class:0", entry["rows_sha256"], entry["models"]["unlearned"]["model_sha256"],
                  numbers["run"]["config_sha256"][:12], "No guarantee beyond what is measured", "Refused requests",
                  percent(entry["models"]["unlearned"]["accuracy_erased_test"])):  # fmt: skip
        assert shown in page, shown
    assert not re.search(r"https?://|<link|@import|src=", page)
    assert "default-src 'none'" in page
    assert page.count("<svg") >= 3
    assert [e["kind"] for e in numbers["ledger"]] == ["learn", "learn", "forget", "adapt"]


def test_refused_requests_are_shown_with_their_reason(copies):
    own, _ = copies
    events = json.loads((own / "ledger.json").read_text())
    events.append(events[2] | {"index": 9, "name": "<again>", "outcome": "refused: class:0 is erased already"})
    (own / "ledger.json").write_text(json.dumps(events))
    found = evidence(own)
    assert [e["name"] for e in found["rejected"]] == ["<again>"]
    assert found["summary"]["requests_refused"] == 1
    page = build_erasure_page(found)
    assert "class:0 is erased already" in page
    assert "&lt;again&gt;" in page
    assert "<again>" not in page


def test_classes_are_called_by_their_names(copies):
    own, _ = copies
    change(own / "summary.json", class_names=["ankle <boot>", "1", "bag", "coat"])
    page = build_erasure_page(evidence(own))
    assert "<code>class:0</code> (ankle &lt;boot&gt;)" in page
    assert "ankle &lt;boot&gt;, 1</td>" in page  # the first experience, in the ledger
    assert "<boot>" not in page


def test_weights_that_came_trained_are_named(copies):
    own, _ = copies
    config = (own / "config.yaml").read_text()
    assert "nothing was brought along" in build_erasure_page(evidence(own))
    (own / "config.yaml").write_text(config.replace("name: mlp", "name: mlp\n  weights: imagenet.safetensors"))
    assert "backbone.weights: imagenet.safetensors" in build_erasure_page(evidence(own))


def test_exact_and_approximate_are_told_apart(runs):
    found = evidence(runs[0])
    found["run"]["guarantee"] = {"level": "exact", "statement": "the head alone", "data_access": "none"}
    page = build_erasure_page(found)
    assert '<span class="chip complete">exact</span> The head alone.' in page
    assert "<b>Data read to answer a request:</b> none." in page


@pytest.mark.parametrize("name", [n for n, e in discovery.entries("strategies").items() if Kind.FORGET in e.kinds])
def test_every_strategy_that_forgets_says_what_that_covers(name):
    said = guarantee(name)
    assert said["level"] in ("exact", "approximate")
    assert len(said["statement"]) > 20
    assert said["data_access"]


def test_what_an_unknown_strategy_covers_is_not_made_up():
    said = guarantee("Mine@python:0123456789ab")
    assert said["level"] == "approximate"
    assert (
        said["statement"]
        == said["data_access"]
        == "not known here: Mine@python:0123456789ab can't be found by its name"
    )


def test_the_command_adds_the_oracles_columns(copies, capsys):
    own, oracle = copies
    assert main(["report", str(own), "--oracle", str(oracle)]) == 0
    assert str(own / "erasure.html") in capsys.readouterr().out
    assert json.loads((own / "erasure.json").read_text())["oracle"]["seed"] == 2
    page = (own / "erasure.html").read_text()
    assert "the retrained model" in page
    assert "itself approximate: no retrained model" in page
    assert main(["report", str(own), str(oracle), "--oracle", str(oracle)]) == 2
    assert main(["report", str(own), "--oracle", str(own / "audit")]) == 2
    faults = capsys.readouterr().err.splitlines()
    assert "compares one run with another (2 are given)" in faults[0]
    assert "is not the folder of a run" in faults[1]


def test_an_oracle_named_in_the_configuration_is_compared_at_the_end(runs, copies, tmp_path, capsys):
    found = json.loads((run(tmp_path / "a", 1, audit=AUDIT | {"oracle": str(runs[1])}) / "erasure.json").read_text())
    assert found["requests"][0]["against_oracle"]["tug_of_war"] <= 1
    change(copies[1] / "summary.json", experiences=[])
    made = run(tmp_path / "b", 1, audit=AUDIT | {"oracle": str(copies[1])})
    assert json.loads((made / "erasure.json").read_text())["oracle"] is None
    assert "written without it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0"), (1, "100"), (0.9996, "&gt; 99.9"), (0.0004, "&lt; 0.1"), (0.1234, "12.3")]
)
def test_per_cent(share, text):
    assert percent(share) == f"{text}\N{NO-BREAK SPACE}%"
