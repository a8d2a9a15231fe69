"""On which data a sweep tunes: four protocols, and no test data in any of them."""

import json
import re
import textwrap

import pytest
import yaml
from sweeping import write

import clplat
from clplat.sweep.protocol import Protocol
from clplat.sweep.study import sweep

GUARDED = """
    import dataclasses
    from clplat.streams.digits import Digits

    class Sealed:
        def __getattribute__(self, name):
            raise RuntimeError("test data were touched")

        def __len__(self):
            raise RuntimeError("test data were touched")

    class Guarded(Digits):
        def __init__(self, *, seed, data_root=None, **options):
            super().__init__(seed=seed, data_root=data_root, **options)
            self.experiences = tuple(dataclasses.replace(e, test=Sealed()) for e in self)
"""
QUICK = {"loop": {"max_steps": 2, "representation": False}, "tracking": {"enabled": False}}
SPACE = {"strategy.lr": {"low": 0.01, "high": 0.1}}


def measure(config, run_dir):
    """A figure that tells the stream, the seed and how far the stream goes."""
    value = {"digits": 0.5, "rotated": 0.7}[config["stream"]["name"]] + config["seed"] / 100
    seconds = 1.0 + config["loop"].get("stop_after", 0)
    return {"metrics": {"average_accuracy": value}, "cost": {"train_seconds": seconds, "train_flops": 1e6}}


@pytest.mark.parametrize("protocol", ["end_of_stream", {"first": 2}])
def test_test_data_reach_no_sweep(tmp_path, protocol):
    """Neither the check, nor a run, its record, its checkpoint, its summary or what is said of a study."""
    file = tmp_path / "guarded.py"
    file.write_text(textwrap.dedent(GUARDED))
    stream = {"name": f"{file}:Guarded", "validation": 0.2}
    section = {"trials": 2, "space": SPACE, "protocol": protocol, "metric": ["plasticity", "stability"]}
    result = sweep(write(tmp_path, section, stream=stream, strategy="er", **QUICK), quiet=True)
    assert [t["state"] for t in result.trials] == ["complete", "complete"]
    with pytest.raises(Exception, match="test data were touched"):  # by a run that is no trial, they are
        clplat.run(result.best_config, quiet=True)


def test_the_default_protocol_is_called_optimistic_wherever_it_says_a_figure(tmp_path, capsys):
    result = sweep(write(tmp_path, {"space": SPACE, "seeds": [0, 1]}, loop={}), run=measure)
    facts = json.loads((result.folder / "sweep.json").read_text())
    for text in (
        capsys.readouterr().out, (result.folder / "report.md").read_text(), result.best_config.read_text(),
        facts["protocol"],
    ):  # fmt: skip
        assert "end-of-stream validation (optimistic" in text.replace("End", "end")
    assert facts["effort"] == "4 trials, 8 runs, 8 s in training and evaluation, 8e+06 FLOPs"
    assert facts["effort"] in result.best_config.read_text()
    told = yaml.safe_load(result.best_config.read_text())["tracking"]["tags"]["tuned"]  # by each run of it, too
    assert told == f"study {facts['study']}: {facts['protocol']}; {facts['effort']}"


def test_a_run_says_how_its_configuration_was_tuned(tmp_path):
    config = {"strategy": "naive", "output": str(tmp_path / "runs"), "stream": {"train_per_class": 5}, **QUICK}
    tracking = {"enabled": False, "tags": {"tuned": "study demo: on validation data"}}
    result = clplat.run({**config, "tracking": tracking}, quiet=True)
    assert json.loads((result.run_dir / "summary.json").read_text())["tuned"] == "study demo: on validation data"


def test_the_first_experiences_are_tuned_on_and_the_best_runs_all(tmp_path):
    seen = []

    def run(config, run_dir):
        seen.append(config["loop"]["stop_after"])
        return measure(config, run_dir)

    result = sweep(write(tmp_path, {"space": SPACE, "protocol": {"first": 2}}, loop={}), run=run, quiet=True)
    assert seen == [2] * 4
    best = result.best_config.read_text()
    assert "# Tuned on the first 2 experiences." in best
    assert "stop_after" not in best


def test_another_stream_is_tuned_on_and_the_best_is_of_the_own_one(tmp_path):
    seen = []

    def run(config, run_dir):
        seen.append(config["stream"])
        return measure(config, run_dir)

    other = {"name": "rotated", "base": "digits"}
    result = sweep(write(tmp_path, {"space": SPACE, "protocol": {"stream": other}}, loop={}), run=run, quiet=True)
    assert seen == [other] * 4
    assert yaml.safe_load(result.best_config.read_text())["stream"] == {"name": "digits"}
    assert "# Tuned on another stream (rotated) and transferred." in result.best_config.read_text()


def test_what_adapts_is_tuned_by_its_errors_on_another_stream(tmp_path):
    """Which holds nothing back, since it learns nothing: it is scored as its data arrive, and on nothing else."""
    base = {"name": "corruptions", "samples": 16, "source": False, "corruptions": ["fog"]}
    section = {"space": {"strategy.neighbours": {"choices": [1, 3]}}, "sampler": "grid", "metric": "online_error",
               "protocol": {"stream": {**base, "corruptions": ["contrast"]}}}  # fmt: skip
    path = write(tmp_path, section, stream=base, strategy="lame", tracking={"enabled": False})
    result = sweep(path, quiet=True)
    assert {t["state"] for t in result.trials} == {"complete"}
    assert all(0 < t["value"] <= 1 for t in result.trials)
    (run,) = (result.folder / "trial-0000").rglob("summary.json")
    assert all(score is None for row in json.loads(run.read_text())["accuracy_matrix"] for score in row)


def test_one_configuration_for_all_streams_is_judged_by_their_mean(tmp_path):
    folders = []

    def run(config, run_dir):
        folders.append(run_dir)
        return measure(config, run_dir)

    section = {"space": SPACE, "seeds": [0, 2], "protocol": {"streams": ["digits", {"name": "rotated"}]}}

    def named(config, run_dir):
        stream = config["stream"]
        return run({**config, "stream": {"name": stream} if isinstance(stream, str) else stream}, run_dir)

    result = sweep(write(tmp_path, section, loop={}), run=named, quiet=True)
    assert result.best_value == pytest.approx(0.61)
    assert len(set(folders)) == 4 * 4
    best = yaml.safe_load(result.best_config.read_text())
    assert best["runs"] == {"digits": {"stream": "digits"}, "rotated": {"stream": {"name": "rotated"}}}
    assert "stream" not in best


@pytest.mark.parametrize(
    ("streams", "told"),
    [
        (["digits", {"name": "digits", "scenario": "task"}], "digits-1, digits-2: scenario task"),
        (
            [{"name": "digits", "validation": 0.1, "blurry": 0.2}, "images", {"name": "digits", "validation": 0.1}],
            "digits-1: blurry 0.2, images, digits-2",
        ),
    ],
)
def test_streams_of_one_name_are_told_with_what_sets_them_apart(streams, told):
    assert f"one configuration for {len(streams)} streams ({told});" in str(Protocol(streams=tuple(streams)))


@pytest.mark.parametrize(
    ("section", "keys", "fault"),
    [
        ({"protocol": "best"}, [], r"^sweep\.protocol: 'best' is not valid \(valid: end_of_stream, \{first: K\}"),
        ({"protocol": {"first": 0}}, [], r"^sweep\.protocol\.first: 0 is out of range"),
        ({"protocol": {"first": 2, "stream": "digits"}}, [], r"^sweep\.protocol: .* is not valid"),
        ({"protocol": {"stream": 3}}, [], r"^sweep\.protocol\.stream: 3 is not a stream"),
        ({"protocol": {"stream": "digitz"}}, [], r"^sweep\.protocol\.stream: unknown name 'digitz'"),
        ({"protocol": {"streams": []}}, [], r"^sweep\.protocol\.streams: \[\] is not a list of streams"),
        (
            {"protocol": {"streams": ["digits", {"name": "digits"}]}},
            [],
            r"^sweep\.protocol\.streams: .* is there twice",
        ),
        ({"protocol": {"stream": "rotated"}}, ["--stream.seed", "3"], r"flags of the stream have no effect"),
        ({"protocol": {"stream": {"name": "digits", "validation": 0.2}}}, [], r"is the configuration's own stream"),
        (
            {"protocol": {"first": 5}},
            [],
            r"^sweep\.protocol\.first: 5 is out of range \(valid: 1\.\.4, of 5",
        ),
        (
            {"protocol": {"first": 2}, "metric": "last"},
            [],
            r"^sweep\.metric: last reads experiences beyond",
        ),
        ({"metric": "online_error"}, [], r"^sweep\.metric: online_error is scored on labels of test data"),
    ],
)
def test_faults(tmp_path, section, keys, fault):
    path = write(tmp_path, {"space": SPACE, **section}, stream={"name": "digits", "validation": 0.2})
    with pytest.raises(clplat.errors.UserError) as caught:
        sweep(path, keys, quiet=True)
    assert any(re.search(fault, line) for line in caught.value.faults)
    assert not (tmp_path / "runs").exists()
