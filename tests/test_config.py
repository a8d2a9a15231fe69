"""Configurations: what wins, what is refused and in which words, and that a resolved one resolves to itself."""

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from clplat.config import resolve as config_module
from clplat.config.resolve import expand, find_config, read_yaml, resolve
from clplat.config.settings import Config, LoopSettings, Part
from clplat.config.syntax import Option
from clplat.config.values import describe, parse_value
from clplat.errors import UserError

PATH_STRATEGY = '''
from clplat import Kind, Strategy


class Mine(Strategy):
    """Mine.

    Args:
        sizes: of something.
        needed: with no default.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "none"

    def __init__(self, *, needed: int, sizes: tuple[int, ...] = (1, 2), **base):
        super().__init__(**base)
'''


def faults(*argv: str, config: Any = None, **overrides: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        resolve(list(argv), config, **overrides)
    return list(caught.value.faults)


# --- what wins ----------------------------------------------------------------------------------------------------


def test_defaults_are_filled_in():
    config = resolve(["--strategy", "er"])
    assert isinstance(config, Config)
    assert config.strategy.options["memory"] == 500
    assert config.strategy.options["lr"] == 0.1  # of the base class
    assert (config.stream.name, config.backbone.name, config.head.name) == ("digits", "mlp", "growing")
    assert config.loop == LoopSettings()
    assert config.name == "er-digits-mlp"
    assert "seed" not in config.stream.options
    assert "model" not in config.strategy.options


def test_flags_win_over_overrides_over_the_file(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("strategy: {name: er, memory: 1, lr: 0.5, replay_batch: 7}\nloop: {max_epochs: 4}\nseed: 9\n")
    config = resolve(["--strategy.memory", "3", "--seed=5"], file, strategy={"name": "er", "memory": 2, "lr": 1e-2})
    assert config.strategy.options["memory"] == 3
    assert config.strategy.options["lr"] == 0.01
    assert config.strategy.options["replay_batch"] == 7
    assert config.loop.max_epochs == 4
    assert config.seed == 5
    assert config.name == "mine"


def test_naming_another_part_drops_the_options_of_the_old_one():
    layer = {"strategy": {"name": "er", "memory": 5, "lr": 0.3}, "backbone": {"name": "mlp", "hidden": [8]}}
    config = resolve(["--strategy", "naive"], layer)
    assert config.strategy.options["lr"] == 0.1
    assert "memory" not in config.strategy.options
    assert config.backbone.options["hidden"] == [8]
    same = resolve(["--strategy", "er", "--backbone", "mlp"], layer)
    assert same.strategy.options["memory"] == 5
    assert same.backbone.options["hidden"] == [8]


def test_options_of_the_default_part_are_dropped_with_it():
    layer = {"strategy": "naive", "backbone": {"hidden": [8]}}
    assert resolve(config=layer).backbone.options == {"hidden": [8]}
    assert "hidden" not in resolve(["--backbone", "cnn"], layer).backbone.options


def test_ways_to_write_a_key():
    dotted = resolve(config={"strategy.memory": 4, "strategy": "er", "loop.max_epochs": 2})
    nested = resolve(config={"strategy": {"name": "er", "memory": 4}, "loop": {"max_epochs": 2}})
    flags = resolve(["--strategy.name", "er", "--strategy.memory=4", "--loop.max_epochs", "2"])
    parts = resolve(strategy=Part("er", {"memory": 4}), loop=LoopSettings(max_epochs=2))
    assert dotted == nested == flags == parts


def test_a_bare_flag_is_true_and_entries_of_mappings_have_keys():
    config = resolve(
        ["--strategy", "naive", "--tracking.enabled", "--tracking.tags.team", "x", "--tracking.tags.who=y"]
    )
    assert config.tracking.enabled is True
    assert config.tracking.tags == {"team": "x", "who": "y"}


def test_a_stream_may_have_a_seed_of_its_own():
    config = resolve(["--strategy", "naive", "--stream.seed", "4", "--seed", "2"])
    assert (config.stream.options["seed"], config.seed) == (4, 2)


# --- round trip ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["--strategy", "er", "--strategy.memory", "5"],
        ["--strategy", "naive", "--loop.clip_norm", "1e-3", "--loop.checkpoint_seconds", "null", "--name", "a/b"],
        ["--strategy", "{path}:Mine", "--strategy.needed", "1", "--strategy.sizes", "[3,4]", "--stream.seed", "3"],
        ["--strategy", "naive", "--tracking.tags", '{"a": "1"}', "--data_root", "/x y", "--backbone.hidden", "[]"],
    ],
)
def test_a_resolved_configuration_resolves_to_itself(tmp_path: Path, argv: list[str]):
    (tmp_path / "mine.py").write_text(PATH_STRATEGY)
    config = resolve([a.replace("{path}", str(tmp_path / "mine.py")) for a in argv])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    again = resolve(config=file)
    assert again == config
    assert again.to_dict() == config.to_dict()


def test_a_path_is_resolved_so_that_it_holds_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.py").write_text(PATH_STRATEGY)
    monkeypatch.chdir(tmp_path)
    config = resolve(["--strategy", "mine.py:Mine", "--strategy.needed", "1"])
    assert config.strategy.name == f"{tmp_path.resolve()}/mine.py:Mine"
    assert config.strategy.options["sizes"] == (1, 2)
    assert config.name == "mine-digits-mlp"


# --- what is refused ----------------------------------------------------------------------------------------------


def test_all_faults_come_at_once():
    found = faults(
        "--strategy", "er", "--strategy.memry", "5", "--strategy.lr=abc", "--strategy.schedule", "cosin",
        "--max_epochs", "3", "--loop.batch_size", "0", "--fabric.devices", "9.5", "--seed", "-1", "--stream", "digit",
        "--stream.whatever", "1",
    )  # fmt: skip
    assert found == [
        "stream: unknown name 'digit' (did you mean digits?)",
        "strategy.memry: no such key (did you mean strategy.memory?)",
        "strategy.lr: 'abc' is not a float",
        "strategy.schedule: 'cosin' is not one of constant, cosine (did you mean cosine?)",
        "max_epochs: no such key (did you mean loop.max_epochs?)",
        "fabric.devices: '9.5' is not an int",
        "loop.batch_size: 0 is out of range (valid: ≥ 1)",
        "seed: -1 is out of range (valid: ≥ 0)",
    ]


@pytest.mark.parametrize(
    ("layer", "fault"),
    [
        ({}, "strategy: is required (known: "),
        ({"strategy": "ilraaaaa"}, "strategy: unknown name 'ilraaaaa'"),
        ({"strategy": "naiv"}, "strategy: unknown name 'naiv' (did you mean naive, acil?)"),
        ({"strategy": 3}, "strategy: 3 is not a name, or a mapping with a name"),
        ({"strategy": {"name": 3}}, "strategy: 3 is not a name"),
        ({"strategy": "naive", "loop": 3}, "loop: 3 is not a mapping of keys to values"),
        ({"strategy": "naive", "head": {"qqq": 1}}, "head.qqq: no such key (head takes: no options)"),
        ({"strategy": {"name": "naive", "lr": None}}, "strategy.lr: null is not a float"),
        ({"strategy": {"name": "naive", "lr": True}}, "strategy.lr: needs a value, a float"),
        ({"strategy": {"name": "naive", "lr": [1]}}, "strategy.lr: [1] is not a float"),
        ({"strategy": "naive", "loop": {"max_steps": "x"}}, "loop.max_steps: 'x' is not an int or null"),
        ({"strategy": "naive", "loop": {"clip_norm": 0}}, "loop.clip_norm: 0.0 is out of range (valid: > 0)"),
        ({"strategy": "naive", "fabric": {"threads": 0}}, "fabric.threads: 0 is out of range (valid: ≥ 1)"),
        ({"strategy": "naive", "tracking": {"enabled": "maybe"}}, "tracking.enabled: 'maybe' is not true or false"),
        ({"strategy": "naive", "name": "../up"}, "name: '../up' can't name a folder"),
        ({"strategy": "naive", "optimiser": "sgd"}, "optimiser: no such key (did you mean strategy.optimizer"),
        ({"strategy": "naive", "extends": "a.yaml"}, "extends: no such key"),
        ({"strategy": "naive", "backbone": {"hidden": "wide"}}, "backbone.hidden: 'wide' is not a list[int]"),
        ({"strategy": "naive", "runs": {}}, "runs: the configuration describes several runs; one is wanted"),
    ],
)  # fmt: skip
def test_a_fault_in_one_line(layer: dict[str, Any], fault: str):
    found = faults(config=layer)
    assert len(found) == 1
    assert found[0].startswith(fault)
    assert "\n" not in found[0]


def test_a_required_option_is_asked_for(tmp_path: Path):
    (tmp_path / "mine.py").write_text(PATH_STRATEGY)
    assert faults("--strategy", f"{tmp_path}/mine.py:Mine") == ["strategy.needed: is required (with no default.)"]


def test_stray_words_and_flags_without_a_value():
    assert faults("--strategy", "naive", "stray", "--seed") == [
        "stray: unexpected argument (options are written --key value)",
        "seed: needs a value, an int",
    ]


def test_nothing_named_in_a_configuration_is_imported_or_run(tmp_path: Path):
    (tmp_path / "evil.py").write_text(f"open(r'{tmp_path}/ran', 'w').close()\n")
    file = tmp_path / "evil.yaml"
    file.write_text(f"strategy: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n")
    assert "could not determine a constructor" in faults(config=file)[0]
    for text in ("strategy: os.system", "strategy: {name: er, memory: {class_path: os.system}}", "strategy: evil"):
        file.write_text(text)
        assert len(faults(config=file)) == 1
    assert not (tmp_path / "ran").exists()


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: 1\na: 2\n", "key 'a' is written twice"),
        ("- 1\n", "holds a list, not a mapping"),
        ("a: [1\n", "config: "),
        ("a: \x00", "config: "),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, fault: str):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_yaml(file)
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shipped_experiments_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("one/a", "two/a", "two/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text("strategy: naive\n")
    monkeypatch.setattr(config_module, "_EXPERIMENTS", (tmp_path / "away", tmp_path))
    assert find_config("one/a") == tmp_path / "one/a.yaml"
    assert find_config("b") == tmp_path / "two/b.yaml"
    assert resolve(config="b").name == "two/b"
    for name, message in {
        "a": "several experiments (one/a, two/a)",
        "two/c": "did you mean two/b",
        "zzzzzz": "neither",
    }.items():
        with pytest.raises(UserError) as caught:
            find_config(name)
        assert message in str(caught.value)


def test_a_run_folder_is_its_configuration(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("strategy: naive\nname: x\n")
    assert resolve(config=str(tmp_path)).name == "x"


@pytest.mark.parametrize("name", list(config_module.experiments()))
def test_every_shipped_experiment_has_no_fault(name: str):
    assert expand(config=name)


# --- several runs -------------------------------------------------------------------------------------------------


def test_runs_times_seeds():
    layer = {
        "name": "demo", "seeds": [0, 3], "strategy": {"name": "er", "memory": 9},
        "runs": {"naive": {"strategy": "naive"}, "small": {"strategy": {"memory": 2}}},
    }  # fmt: skip
    found = expand(config=layer)
    assert [(c.name, c.strategy.name, c.seed) for c in found] == [
        ("demo/naive", "naive", 0), ("demo/naive", "naive", 3), ("demo/small", "er", 0), ("demo/small", "er", 3),
    ]  # fmt: skip
    assert found[2].strategy.options["memory"] == 2
    assert [c.seed for c in expand([], layer, [7])] == [7, 7]
    assert [c.seed for c in expand(["--seed", "5"], layer)] == [5, 5]
    assert all(c.loop.max_epochs == 2 for c in expand(["--loop.max_epochs", "2"], layer))
    assert [c.name for c in expand(config=layer, seeds=[1], only=["small"])] == ["demo/small"]


def test_only_names_runs():
    layer = {"strategy": "naive", "runs": {"a": {}, "b": {}}}
    with pytest.raises(UserError, match=r"only: 'c' is no run of the configuration \(valid: a, b\)"):
        expand(config=layer, only=["a", "c"])
    with pytest.raises(UserError, match=r"only: 'a' is no run of the configuration \(valid: none: it has no runs:\)"):
        expand(config={"strategy": "naive"}, only=["a"])


def test_faults_of_all_runs_are_reported_once():
    layer = {"loop": {"max_epoch": 1}, "runs": {"a": {"strategy": "naive"}, "b": {"strategy": "er"}}, "seeds": "x"}
    with pytest.raises(UserError) as caught:
        expand(config=layer)
    assert [f.partition(":")[0] for f in caught.value.faults] == ["seeds", "loop.max_epoch"]
    with pytest.raises(UserError, match="is not a mapping of names to overrides"):
        expand(config={"strategy": "naive", "runs": ["a"]})


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type_", "given", "value"),
    [
        (float, "1e-3", 0.001),
        (float, 3, 3.0),
        (int, "7", 7),
        (int | None, "null", None),
        (str, "3", "3"),
        (str | None, None, None),
        (bool, "true", True),
        (Literal["a", "b"], "b", "b"),
        (tuple[int, ...], [1, 2], (1, 2)),
        (tuple[float, float], (0.5, 1), (0.5, 1.0)),
        (list[int] | None, "[1, 2]", [1, 2]),
        (dict[str, Any], {"a": 1}, {"a": 1}),
        (Any, {"a": [1]}, {"a": [1]}),
    ],
)
def test_values_become_their_type(type_: Any, given: Any, value: Any):
    parsed = parse_value(Option("x", type_, None), given)
    assert parsed == value
    assert type(parsed) is type(value)


def test_types_in_words():
    assert describe(int | None) == "an int or null"
    assert describe(Literal["a", "b"] | None) == "one of a, b or null"
    assert describe(list[int]) == "a list[int]"
    assert describe(Any) == "any value"


def test_objects_are_no_values():
    with pytest.raises(ValueError, match="is no plain value"):
        parse_value(Option("x", Any, None), object())


def test_a_folder_of_experiments_is_answered_with_what_is_in_it() -> None:
    with pytest.raises(UserError, match=r"'demo' is neither a file nor an experiment \(did you mean demo/digits\?\)"):
        find_config("demo")
