"""The shape of the code: which room may import which, how long files and functions are, what strategies may not."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_FILE, MAX_FUNCTION = 400, 60
LONGER: dict[str, int] = {}  # file or file:function → its lines; each with a reason beside it

FOLDERS = ("clplat", "strategies", "streams", "benchmarks")


def sources(*folders: str) -> Iterator[Path]:
    """Python files, those behind the links in clplat/ only once."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.relative_to(ROOT).parts[:2] not in (("clplat", "strategies"), ("clplat", "streams")):
                yield path


def imports(path: Path) -> Iterator[str]:
    """Dotted names imported anywhere in a file, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules() -> dict[str, Path]:
    """The files of the platform by dotted name."""
    found = {}
    for path in sources("clplat"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def arrows() -> dict[str, set[str]]:
    """Each file of the platform with those it imports: inside functions, and for types only, too."""
    known = modules()
    found: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for target in imports(path):
            while target and target not in known:
                target = target.rpartition(".")[0]
            if target and target != name:
                found[name].add(target)
    return found


CONTRACT = "contract"
ROOMS = {  # what each may import beside itself; `docs/architecture.md` shows it
    CONTRACT: set[str](),
    "config": {CONTRACT},
    "data": {CONTRACT, "config"},
    "backbones": {CONTRACT, "config", "data"},
    "components": {CONTRACT, "data", "backbones"},
    "adapters": {CONTRACT, "backbones", "components"},
    "metrics": {CONTRACT},
    "erasure": {CONTRACT, "config", "components", "metrics"},
    "tracking": {CONTRACT, "config", "metrics"},
    "run": {CONTRACT, "config", "data", "backbones", "components", "adapters", "metrics", "erasure", "tracking"},
    "report": {CONTRACT, "config", "metrics", "erasure", "run"},
    "api": {CONTRACT, "config", "metrics", "erasure", "run", "report"},
    "launchers": {CONTRACT},
    "sweep": {CONTRACT, "config", "metrics", "tracking", "launchers", "run", "api"},
    "testing": {CONTRACT, "config", "data", "backbones", "components", "metrics", "run"},
    "commands": {
        CONTRACT,
        "config",
        "metrics",
        "erasure",
        "tracking",
        "launchers",
        "run",
        "report",
        "api",
        "sweep",
        "testing",
    },
    "cli": {CONTRACT, "commands"},
}
# The files at the top of clplat/ that users write against, and what these need.
_CONTRACT = ("stream", "inputs", "preprocessing", "writing", "strategy", "errors", "files", "lightning", "package")


def room(name: str) -> str:
    """The room of a module: its folder, or `contract`; `api`, `cli` and the package itself are rooms of one file."""
    first = name.removeprefix("clplat").removeprefix(".").partition(".")[0]
    return CONTRACT if first in _CONTRACT else first or "clplat"


def test_sources_are_found() -> None:
    assert len(list(sources(*FOLDERS))) > 50


def test_rooms_import_only_what_their_row_allows() -> None:
    found = arrows()
    rooms = {room(name) for name in found} - {"clplat", "__main__"}  # the package hands out names of every room
    assert rooms == ROOMS.keys(), "a folder or file without a row in ROOMS"
    broken = [
        f"{name} imports {target}: {room(name)} may not import {room(target)}"
        for name, targets in sorted(found.items())
        for target in sorted(targets)
        if room(name) in ROOMS and room(target) not in ROOMS[room(name)] | {room(name)}
    ]
    assert not broken, "\n".join(broken)


def test_the_picture_of_the_rooms_shows_the_imports_as_they_are() -> None:
    """To draw it anew: python docs/generate.py"""
    found: dict[str, set[str]] = {name: set() for name in ROOMS}
    for name, targets in arrows().items():
        if room(name) in ROOMS:
            found[room(name)] |= {room(target) for target in targets} - {room(name)}
    said = re.findall(r"<desc>.*?: (.*)\.</desc>", (ROOT / "docs" / "images" / "architecture.svg").read_text())
    drawn = {name: set(targets.split(", ")) - {"nothing"} for name, targets in re.findall(r"(\w+): ([^;]+)", said[0])}
    assert {name: drawn[name] for name in drawn if name not in ("strategies", "streams")} == found


def test_the_page_of_the_architecture_has_a_paragraph_for_each_room() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    said = re.findall(r"^### (\w+)\n\n(?:[^#\n].*\n)+?May import: (.*)\.$", page, re.MULTILINE)
    assert {name: set(may.split(", ")) - {"nothing"} for name, may in said} == ROOMS


def test_no_files_import_each_other_in_a_circle() -> None:
    sorter = graphlib.TopologicalSorter(arrows())
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        pytest.fail(" → ".join(reversed(error.args[1])))


def test_a_room_says_what_lives_in_it() -> None:
    folders = [name for name in ROOMS if (ROOT / "clplat" / name).is_dir()]
    assert len(folders) > 10
    for name in folders:
        said = ast.get_docstring(ast.parse((ROOT / "clplat" / name / "__init__.py").read_text()))
        assert said, name
        assert "import" in said, f"clplat/{name}/__init__.py does not say what may import what"


def test_the_platform_imports_no_strategy_stream_or_experiment() -> None:
    above = re.compile(r"^(clplat\.)?(strategies|streams|experiments)(\.|$)")
    guilty = [(p.name, n) for p in sources("clplat") for n in imports(p) if above.match(n)]
    assert not guilty


def test_strategies_and_streams_import_only_what_is_below() -> None:
    allowed = {"strategies": r"^clplat\.(strategies)\.", "streams": r"^clplat\.(streams)\."}
    for folder, own in allowed.items():
        for path in sources(folder):
            for name in imports(path):
                if re.match(r"^clplat\.(strategies|streams|experiments)\.", name):
                    assert re.match(own, name), f"{path.name} imports {name}"
                assert not re.match(r"^clplat\.(run|cli|commands|api|report|tracking|sweep)\.", name), path.name


@pytest.mark.parametrize("path", list(sources(*FOLDERS)), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_read_in_one_sitting(path: Path) -> None:
    text, name = path.read_text(), str(path.relative_to(ROOT))
    assert len(text.splitlines()) <= LONGER.get(name, MAX_FILE)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= LONGER.get(f"{name}:{node.name}", MAX_FUNCTION), f"{node.name} has {lines} lines"


def test_exceptions_are_still_needed() -> None:
    assert all((ROOT / key.partition(":")[0]).exists() for key in LONGER)


@pytest.mark.parametrize("path", list(sources("strategies")), ids=lambda p: p.stem)
def test_strategies_know_no_model_class_no_parameter_name_and_no_device(path: Path) -> None:
    text = path.read_text()
    for forbidden in (r"\.cuda\(", r"isinstance\(self\.model", r"type\(self\.model", r"\bdevice\s*=\s*[\"']cuda"):
        assert not re.search(forbidden, text), forbidden
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.fullmatch(r"[\w.]+\.(weight|bias)", node.value), f"parameter name {node.value!r}"


def test_a_folder_beside_the_package_does_not_shadow_mlflow() -> None:
    assert not list((ROOT / "mlflow").rglob("*.py"))


def test_nothing_is_pickled_or_loaded_unsafely() -> None:
    for path in sources(*FOLDERS):
        text = path.read_text()
        assert not re.search(r"\bimport (pickle|dill)\b|\bfrom (pickle|dill)\b", text), path
        assert not re.search(r"allow_pickle\s*=\s*True", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path


def test_public_functions_have_docstrings() -> None:
    """Public classes and functions say what they are; a method of a subclass may be described in its base."""
    missing = []
    for path in sources("clplat", "strategies", "streams"):
        for node in ast.parse(path.read_text()).body:
            own = isinstance(node, ast.ClassDef) and not node.bases
            for item in [node, *(node.body if own else [])]:
                if isinstance(item, ast.FunctionDef | ast.ClassDef) and not item.name.startswith("_"):
                    inside = path.parent.name == "commands" and item.name in ("main", "configure")
                    if ast.get_docstring(item) is None and not inside:
                        missing.append(f"{path.relative_to(ROOT)}:{item.name}")
    assert not missing, "\n".join(missing)
