"""Parts are found in the folders, through entry points and at paths; facts come from the syntax tree."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from clplat.config import discovery, syntax
from clplat.config.imported import options_of_object
from clplat.errors import UserError

STRATEGY = '''
"""A method."""
from typing import Literal

from clplat import Kind, Strategy

WEIGHT = 0.5


class _Base(Strategy):
    paper = "arXiv:0000.00001"

    def __init__(self, *, slow_decay: float = WEIGHT, **base):
        """
        Args:
            slow_decay: weight of the old copy, in [0, 1]. It is
                explained on two lines.
        """
        super().__init__(**base)


class Third(_Base):
    """Third-party method. With a second sentence.

    Args:
        rank: of the update, ≥ 1.
        target: what to adapt.
    """

    kinds = frozenset({Kind.LEARN, Kind.FORGET})

    def __init__(self, *, rank: int, target: Literal["attention", "ffn"] = "ffn", lr: float = 0.7, **base):
        super().__init__(lr=lr, momentum=0.0, **base)

    def training_step(self, batch, batch_idx):
        return None

    def forget_step(self, batch, batch_idx):
        return None
'''


@pytest.fixture
def third(tmp_path: Path) -> Path:
    path = tmp_path / "third.py"
    path.write_text(STRATEGY)
    return path


def test_files_of_the_folders_are_the_names():
    for group in ("strategies", "streams"):
        folder = Path(discovery.__file__).parents[1] / group
        stems = {f.stem for f in folder.glob("*.py") if not f.stem.startswith("_")}
        assert stems <= set(discovery.entries(group))
        assert {"naive", "er"} <= stems if group == "strategies" else "digits" in stems
    assert "mlp" in discovery.entries("backbones")
    assert {"growing", "linear"} <= set(discovery.entries("heads"))
    assert "" not in discovery.entries("heads")


@pytest.mark.parametrize("group", discovery.GROUPS)
def test_every_shipped_part_is_usable_and_documented(group: str):
    for name, entry in discovery.entries(group).items():
        assert entry.fault == ""
        assert entry.summary, name
        options = discovery.options(entry)
        assert [o.name for o in options if not o.help] == [], name
        assert not {o.name for o in options} & discovery.GIVEN[group]
        if group == "strategies":
            assert entry.kinds, name
            assert entry.paper, name


def test_facts_come_from_the_syntax_tree(third: Path):
    entry = discovery.find("strategies", f"{third}:Third")
    assert entry.kinds == ("learn", "forget")
    assert entry.paper == "arXiv:0000.00001"  # of the base class
    assert entry.summary == "Third-party method."
    assert discovery.find("strategies", str(third)) == discovery.find("strategies", str(third))


def test_options_follow_base_into_its_bases(third: Path):
    options = {o.name: o for o in discovery.options(discovery.find("strategies", f"{third}:Third"))}
    assert list(options)[:4] == ["rank", "target", "lr", "slow_decay"]
    assert options["rank"].default is syntax.REQUIRED
    assert options["rank"].help == "of the update, ≥ 1."
    assert options["slow_decay"].default == 0.5  # a constant of the module
    assert options["slow_decay"].help == "weight of the old copy, in [0, 1]. It is explained on two lines."
    assert options["lr"].default == 0.7
    assert options["lr"].help.startswith("learning rate")  # of Strategy
    assert options["weight_decay"].default == 0.0
    assert "momentum" not in options  # given to the base by name: not the user's
    assert "model" not in options


def test_the_tree_and_the_imported_class_agree():
    for name in ("er", "naive"):
        entry = discovery.entries("strategies")[name]
        imported = options_of_object(discovery.load("strategies", name))
        read = {o.name: (o.type, o.default, o.help) for o in discovery.options(entry)}
        assert read == {o.name: (o.type, o.default, o.help) for o in imported if o.name != "model"}


def test_what_the_tree_cannot_tell_is_asked_of_the_class(tmp_path: Path):
    path = tmp_path / "odd.py"
    path.write_text(STRATEGY.replace("WEIGHT = 0.5", "WEIGHT = sum([0.25, 0.5])"))
    entry = discovery.find("strategies", f"{path}:Third")
    cls = syntax.find_class(syntax.read(path), "Third")
    assert cls is not None
    assert syntax.class_options(cls) is None
    assert {o.name: o.default for o in discovery.options(entry)}["slow_decay"] == 0.75


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("def __init__(self, **base):\n        base.setdefault('b', 3)\n        super().__init__(**base)", None),
        ("def __init__(self, *, a: int = 1, **base):\n        super().__init__(**base)", ["a", "b", "c"]),
        ("def __init__(self, *, a: int = 1, **base):\n        super().__init__(a, **base)", ["a", "c"]),
        ("def __init__(self, a: int = -1, *rest):\n        pass", None),
        ("x = 1", ["b", "c"]),
    ],
)  # fmt: skip
def test_arguments_reached_through_super(tmp_path: Path, body: str, found: list[str] | None):
    path = tmp_path / "m.py"
    path.write_text(
        f"class A:\n    def __init__(self, b: int = 1, c: int | None = None): ...\n\nclass B(A):\n    {body}\n"
    )
    cls = syntax.find_class(syntax.read(path), "B")
    assert cls is not None
    options = syntax.class_options(cls)
    assert (options if options is None else [o.name for o in options]) == found


def test_loading_a_path_imports_it_once(third: Path):
    cls = discovery.load("strategies", f"{third}:Third")
    assert cls.__name__ == "Third"
    assert discovery.load("strategies", f"{third}:Third") is cls


def test_a_path_into_our_own_folder_is_the_registered_class():
    path = Path(discovery.__file__).parent.parent / "strategies" / "er.py"
    assert discovery.find("strategies", f"{path}:ER") == discovery.entries("strategies")["er"]


@pytest.mark.parametrize(
    ("group", "name", "message"),
    [
        ("strategies", "naiv", "strategy: unknown name 'naiv' (did you mean naive"),
        ("streams", "qqqqqqqq", "stream: unknown name 'qqqqqqqq' (known: "),
        ("strategies", "no/such.py:X", "strategy: 'no/such.py:X': there is no file "),
        ("heads", "{tmp}/empty.py", "say which object of the file, as path/to/file.py:Name"),
        ("strategies", "{tmp}/empty.py", "empty.py: no public class derives from Strategy; there must be one"),
        ("strategies", "{tmp}/empty.py:Gone", "strategy: empty.py: has no class 'Gone'"),
        ("backbones", "{tmp}/empty.py:gone", "backbone: empty.py has no function 'gone'"),
        ("strategies", "{tmp}/broken.py:X", "strategy: broken.py: syntax error in line 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_found_is_said(tmp_path: Path, group: str, name: str, message: str):
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "broken.py").write_text("x = 1\ndef (\n")
    with pytest.raises(UserError) as caught:
        discovery.find(group, name.replace("{tmp}", str(tmp_path)))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_unknown_group():
    with pytest.raises(UserError, match="did you mean strategies"):
        discovery.entries("strategy")


def test_a_part_of_ours_is_found_without_reading_the_others(monkeypatch: pytest.MonkeyPatch):
    """They are looked up before the first step of every run."""
    named = {"strategies": "er", "streams": "digits", "backbones": "vit_tiny", "heads": "linear", "merges": "none"}
    whole = {group: discovery.entries(group)[name] for group, name in named.items()}
    discovery._read_once.cache_clear()
    monkeypatch.setattr(discovery, "entries", None)
    monkeypatch.setattr(syntax, "read", lambda file, read=syntax.read: asked.append(file) or read(file))
    for group, name in named.items():
        asked: list[Path] = []
        assert discovery.find(group, name) == whole[group]
        beside = {f for f in asked if f.parent == whole[group].file.parent and not f.stem.startswith("_")}
        assert beside == {whole[group].file}


def test_two_strategies_in_one_file_are_a_fault(tmp_path: Path):
    path = tmp_path / "two.py"
    path.write_text(STRATEGY + "\n\nclass Fourth(Third):\n    pass\n")
    with pytest.raises(UserError, match="2 public classes derive from Strategy"):
        discovery.find("strategies", str(path))


def test_entry_points_of_third_parties(third: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(third.parent))
    points = [
        SimpleNamespace(name="third", value="third:Third", dist=SimpleNamespace(name="acme")),
        SimpleNamespace(name="er", value="third:Third", dist=SimpleNamespace(name="acme")),
        SimpleNamespace(name="away", value="not_installed.mod:X", dist=SimpleNamespace(name="gone")),
    ]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points if group == "clplat.strategies" else [])
    found = discovery.entries("strategies")
    assert found["third"].paper == "arXiv:0000.00001"
    assert found["er"].file.name == "er.py"  # ours is not replaced
    assert found["er@acme"].qualname == "third:Third"
    assert "not installed" in found["away"].fault
    assert "third" not in sys.modules
    assert discovery.load("strategies", "third").__name__ == "Third"
    with pytest.raises(UserError, match=r"strategy: 'away' can't be used"):
        discovery.load("strategies", "away")
    sys.modules.pop("third")


@pytest.mark.parametrize("group", ["strategies", "streams"])
def test_the_folders_refuse_their_bare_name(group: str):
    root = Path(discovery.__file__).parent.parent
    if not (root / group).is_dir():
        pytest.skip("no checkout")
    done = subprocess.run(
        [sys.executable, "-c", f"import {group}"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"import clplat.{group}" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("ImportError")


def test_listing_and_help_import_no_torch():
    code = """
import json, sys
from clplat.cli import main
from clplat.errors import UserError
codes = [main(a) for a in (["--help"], ["list"], ["list", "--json"], ["run", "--help"],
         ["run", "--strategy", "er", "--help"], ["sweep", "--help"], ["report", "nowhere"])]
heavy = [m for m in ("torch", "numpy", "lightning", "mlflow", "matplotlib", "sklearn") if m in sys.modules]
print(json.dumps([codes, heavy]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[0, 0, 0, 0, 0, 0, 2], []]
