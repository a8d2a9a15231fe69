"""What a sweep searches of each strategy unless it is told."""

import json

import pytest
import yaml
from sweeping import objective, write

from clplat.cli import main
from clplat.config import discovery
from clplat.errors import UserError
from clplat.sweep.plan import read_plan
from clplat.sweep.ranges import searched, span
from clplat.sweep.space import Span
from clplat.sweep.study import sweep
from clplat.sweep.unwritten import plan_of_flags
from clplat.testing.streams import TinyStream
from clplat.testing.subject import Subject

STRATEGIES = sorted(discovery.entries("strategies"))
UNTUNED = {"simplecil"}  # no option of theirs changes what they compute


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_takes_what_is_searched_of_it(name):
    """There are ranges, the defaults lie in them, and the constructor accepts both ends of each."""
    entry = discovery.find("strategies", name)
    spans = {key: span(key, value) for key, value in searched(entry).items()}
    assert bool(spans) == (name not in UNTUNED)
    defaults = {o.name: o.default for o in discovery.options(entry)}
    assert [key for key, one in spans.items() if not one.holds(defaults[key])] == []
    try:
        subject = Subject(name)
        stream = TinyStream(subject.cls.kinds)
        for end in (0, -1):
            subject.build(stream, **{**subject.options(), **{key: one.ends()[end] for key, one in spans.items()}})
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def test_a_class_has_the_ranges_of_its_bases_but_for_what_it_takes_away(tmp_path):
    assert set(searched(discovery.find("strategies", "acu"))) == {"gamma"}  # `acil` takes lr away
    file = tmp_path / "mine.py"
    ranges = "{'replay_batch': [1, 2], 'none': (0, 1)}"
    file.write_text(f"from clplat.strategies.er import ER\n\nclass Mine(ER):\n    searched = {ranges}\n")
    entry = discovery.find("strategies", f"{file}:Mine")
    assert searched(entry) == {"lr": (1e-3, 1.0, "log"), "replay_batch": [1, 2]}
    made = discovery.Entry("x", "strategies", file, "x", made=discovery.load("strategies", f"{file}:Mine"))
    assert searched(made) == searched(entry)


@pytest.mark.parametrize("declared", [(1.0,), (2.0, 1.0), (0, 1, "log"), (0, 1, "linear"), "all", [], [[1]]])
def test_what_is_no_range(declared):
    with pytest.raises(UserError, match=r"^strategy: searched\['lr'\]"):
        span("lr", declared)


def test_a_file_without_a_space_searches_what_the_strategy_declares(tmp_path):
    path = write(tmp_path, strategy={"name": "si", "lr": 0.02}, loop={"batch_size": 16})
    config = yaml.safe_load(path.read_text())
    del config["sweep"]["space"]
    path.write_text(yaml.safe_dump(config))
    plan = read_plan(path, ["--strategy.damping", "0.2"], None)
    assert plan.space == {
        "strategy.lr": Span(low=1e-3, high=1.0, log=True), "strategy.penalty": Span(low=0.01, high=10.0, log=True)
    }  # fmt: skip
    result = sweep(path, run=objective, quiet=True)
    assert result.trials[0]["params"]["strategy.lr"] == 0.02  # the default is the file's


def test_flags_of_the_section(tmp_path):
    plan = read_plan(write(tmp_path), ["--sweep.seeds", "[3, 4]", "--sweep.metric=[plasticity, stability]"], None)
    assert (plan.seeds, plan.metrics, plan.keys) == ([3, 4], ["plasticity", "stability"], [])
    with pytest.raises(UserError, match=r"^sweep\.sampeler: no such key"):
        read_plan(write(tmp_path), ["--sweep.sampeler", "tpe"], None)


def test_without_a_file_the_strategy_says_what_is_searched_and_the_backbone_fits_it():
    plan, notes = plan_of_flags(["--strategy", "ilora", "--stream", "digits", "--strategy.lr", "0.01"], 3)
    assert plan.base["strategy"] == {"name": "ilora", "lr": 0.01}
    assert plan.base["stream"] == {"name": "digits", "validation": 0.1}
    assert plan.base["backbone"] == "vit_micro"
    assert set(plan.space) == {"strategy.dropout", "strategy.slow_decay", "strategy.consistency_weight"}
    assert plan.study == "ilora-digits-vit_micro-sweep"
    assert [n.partition(":")[0] for n in notes] == ["stream.validation", "backbone", *["searched"] * 3]


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ([], r"^sweep: give a configuration with a `sweep:` section, or --strategy NAME"),
        (["--strategy", "naive", "--strategy.lr", "0.1"], r"^sweep\.space: is empty: flags fix all that naive"),
        (["--strategy", "ilora", "--backbone", "mlp"], r"^backbone: has no linear layers of role attention"),
        (["--strategy", "nave"], r"^strategy: unknown name 'nave'"),
        (["--strategy", "naive", "--loop.evaluate_on", "test"], r"test labels"),
        (["--strategy", "naive", "--sweep.sampler", "cma"], r"^sweep\.sampler: 'cma' is not valid"),
    ],
)
def test_faults_without_a_file(flags, fault):
    with pytest.raises(UserError, match=fault):
        sweep(None, flags)


def test_a_sweep_without_a_file_runs(tmp_path, capsys):
    flags = ["--loop.max_steps", "2", "--loop.representation", "false", "--tracking.enabled", "false"]
    assert main(["sweep", "--strategy", "naive", "--trials", "2", "--output", str(tmp_path), *flags]) == 0
    out = capsys.readouterr().out
    assert "searched: strategy.lr 0.001 to 1 (log)" in out
    facts = json.loads((tmp_path / "naive-digits-mlp-sweep" / "sweep.json").read_text())
    assert [t["state"] for t in facts["trials"]] == ["complete", "complete"]
    best = yaml.safe_load((tmp_path / "naive-digits-mlp-sweep" / "best.yaml").read_text())
    assert best["loop"] == {"max_steps": 2, "representation": False}
