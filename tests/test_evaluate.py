"""`loop.evaluate`: which test sets are scored, and that no score depends on the others."""

import json
from pathlib import Path

import pytest
from mixed import mixed_config

import clplat


def run(tmp_path, evaluate, strategy="naive", scenario="class", **loop):
    result = clplat.run(
        {
            "stream": {"name": "digits", "experiences": 4, "scenario": scenario},
            "backbone": {"name": "mlp", "hidden": [16]},
            "loop": {"evaluate": evaluate, "eval_batch_size": 50, **loop},
            "strategy": strategy,
            "tracking": {"enabled": False},
            "output": str(tmp_path / evaluate),
        },
        quiet=True,
    )
    return result.summary | {"run_dir": result.run_dir}


EXPECTED = {
    "seen": [[], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3]],
    "last": [[], [0], [1], [2], [0, 1, 2, 3]],
}


# acil's features are kept from batch to batch; permuted test sets share no batch
@pytest.mark.parametrize(("strategy", "scenario"), [("naive", "class"), ("acil", "class"), ("naive", "permuted")])
def test_scores_are_those_among_all_and_the_others_are_null(tmp_path, strategy, scenario):
    whole = run(tmp_path, "all", strategy, scenario)
    for evaluate, rows in EXPECTED.items():
        found = run(tmp_path, evaluate, strategy, scenario)
        for i, asked in enumerate(rows):
            expected = [a if j in asked else None for j, a in enumerate(whole["accuracy_matrix"][i])]
            assert found["accuracy_matrix"][i] == expected
        for name in ("average_accuracy", "plasticity", "backward_transfer"):
            assert found["metrics"][name] == whole["metrics"][name]
        null = {"forward_transfer"} | ({"forgetting", "stability"} if evaluate == "last" else set())
        assert null <= {n for n, why in found["why_null"].items() if "not measured" in why}


def test_an_earlier_end_scores_all_that_was_met(tmp_path):
    rows = run(tmp_path, "last", stop_after=2)["accuracy_matrix"]
    assert [[j for j, a in enumerate(row) if a is not None] for row in rows] == [[], [0], [0, 1]]


def test_evaluations_inside_leave_out_what_is_to_come(tmp_path):
    found = run(tmp_path, "seen", eval_every=5)
    lines = [json.loads(line) for line in (Path(found["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
    points = [{n for n in line["metrics"] if n.startswith("anytime/split_")} for line in lines]
    named = [{f"anytime/split_{j}" for j in range(k + 1)} for k in range(4)]
    assert all(names in named for names in points if names)
    assert [names for names in named if names not in points] == []


def test_a_request_is_scored_before_it_and_after(tmp_path):
    config = mixed_config(tmp_path)
    whole = clplat.run(config, quiet=True).summary
    kinds = [e["kind"] for e in whole["experiences"]]
    config["loop"]["evaluate"] = "seen"
    config["output"] = str(tmp_path / "seen")
    found = clplat.run(config, quiet=True).summary
    j = kinds.index("forget")
    assert found["accuracy_matrix"][j][j] is not None
    for name in ("forget_drop", "retain_accuracy", "h_mean"):
        assert found["metrics"][name] == whole["metrics"][name]
