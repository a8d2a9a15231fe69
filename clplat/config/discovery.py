"""Finds the parts of a run by name: in the package's folders, third parties' entry points, or as `path.py:Class`.

Imports no torch: facts are read from the syntax tree, and a part is imported only by `load`.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clplat.config import syntax
from clplat.config.given import absent, is_given
from clplat.config.imported import options_in_file, options_of_object
from clplat.config.syntax import Option
from clplat.errors import UserError, users_code

GROUPS = ("strategies", "streams", "backbones", "heads", "merges")
ROOTS = {"strategies": "Strategy", "streams": "Stream", "merges": "Merge"}
KINDS = ("learn", "forget", "adapt", "interact")
# What the platform gives a constructor, and so no option of it.
GIVEN = {
    "strategies": {"model"},
    "streams": {"seed", "data_root"},
    "backbones": {"input_shape"},
    "heads": {"in_features", "num_classes"},
    "merges": set(),
}
_HOME = Path(__file__).parents[1]
_PACKAGES = {"merges": "components.merging"}  # of groups that have no folder of their own name


@dataclass(frozen=True)
class Entry:
    """What is known of a part without importing it.

    Args:
        name: as written on the command line.
        group: strategies, streams, backbones, heads or merges.
        file: its source.
        qualname: `package.module:Object`, or `/path/to/file.py:Object`.
        summary: first sentence of its docstring.
        kinds: kinds of experience a strategy handles, or a stream holds where it says so.
        paper: of a strategy or stream; empty where it names none.
        fault: why it can't be used (a syntax error, say), or empty.
        aliases: further names of a strategy, under which `find` knows it too.
        made: the part itself, where it was given in Python.
    """

    name: str
    group: str
    file: Path
    qualname: str
    summary: str = ""
    kinds: tuple[str, ...] = ()
    paper: str = ""
    fault: str = ""
    aliases: tuple[str, ...] = ()
    made: Any = None


def entries(group: str) -> dict[str, Entry]:
    """All parts of a group by name, sorted; ours first taken, a third party's of the same name as `name@package`."""
    if group not in GROUPS:
        raise UserError(f"group: unknown name '{group}'{did_you_mean(group, GROUPS)}")
    found = _own(group)
    for point, package in _entry_points(group):
        name = point.name if point.name not in found else f"{point.name}@{package}"
        found[name] = _third_party(group, name, point.value)
    return dict(sorted(found.items()))


def find(group: str, name: str, given: Mapping[str, Any] | None = None) -> Entry:
    """The entry of a registered name, or of `path/to/file.py:Class` (`:Class` may be left out if there is only one).

    Args:
        given: objects given in Python, by the names that stand for them.

    Raises:
        UserError: unknown name, with the nearest ones; no such file or class.
    """
    key = group_key(group)
    if is_given(name):
        if given is None or name not in given:
            raise UserError(absent(key, name))
        return Entry(name, group, Path(), name, made=given[name])
    if ".py" in name:
        return _from_path(group, name)
    known = _own(group, name) or entries(group)
    for entry in known.values() if name not in known else ():
        if name in entry.aliases:
            return entry
    if name not in known:
        near = did_you_mean(name, known)
        raise UserError(f"{key}: unknown name '{name}'" + (near or f" (known: {some(group, list(known))})"))
    return known[name]


def load(group: str, name: str) -> Any:
    """Import a part: the class of a strategy, stream, head or merge, the function of a backbone.

    Raises:
        UserError: unknown name, or the part can't be imported.
    """
    entry = find(group, name)
    if entry.fault:
        raise UserError(f"{group_key(group)}: '{name}' can't be used: {entry.fault}")
    module_name, _, attribute = entry.qualname.rpartition(":")
    with users_code(f"{group_key(group)}: "):
        module = _import_file(entry.file) if module_name.endswith(".py") else importlib.import_module(module_name)
    return getattr(module, attribute)


def options(entry: Entry) -> list[Option]:
    """What a user may set of a part, in the order of its constructor; read from the syntax tree where that can tell."""
    found: list[Option] | None
    if entry.made is not None:
        makes = inspect.isclass(entry.made) or inspect.isfunction(entry.made)
        found = (options_in_file(entry.made) or options_of_object(entry.made)) if makes else []
        return [o for o in found if o.name not in GIVEN[entry.group]]
    attribute = entry.qualname.rpartition(":")[2]
    module = syntax.read(entry.file)
    node = module.names.get(attribute)
    found = None
    if isinstance(node, ast.FunctionDef):
        found = syntax.function_options(module, node)
    elif (cls := syntax.find_class(module, attribute)) is not None:
        found = syntax.class_options(cls)
    if found is None:
        name = entry.qualname if entry.qualname.rpartition(":")[0].endswith(".py") else entry.name
        found = options_of_object(load(entry.group, name))
    return [o for o in found if o.name not in GIVEN[entry.group]]


def has_head(entry: Entry) -> bool:
    """Whether a backbone's logits come from a head: no class of its file sets `needs_head` to False."""
    if entry.made is not None:
        return getattr(entry.made, "needs_head", True)
    module = syntax.read(entry.file)
    classes = [syntax.Class(module, node) for node in module.names.values() if isinstance(node, ast.ClassDef)]
    facts = [syntax.class_value(cls, "needs_head") for cls in classes]
    return not any(isinstance(fact, ast.Constant) and fact.value is False for fact in facts)


def group_key(group: str) -> str:
    """Configuration key of a group: `strategies` → `strategy`."""
    return {"strategies": "strategy"}.get(group, group.removesuffix("s"))


def some(group: str, known: Sequence[str]) -> str:
    """The names of a group for a line of an error, which names the command that lists them where they are many."""
    more = len(known) - 12
    return ", ".join(known[:12]) + (f" and {more} more: clplat list {group}" if more > 0 else "") or "none"


def did_you_mean(word: str, known: Any, n: int = 3) -> str:
    """` (did you mean a, b?)`, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=n, cutoff=0.5)
    return f" (did you mean {', '.join(near)}?)" if near else ""


# --- the package's own folders ------------------------------------------------------------------------------------


def _own(group: str, name: str | None = None) -> dict[str, Entry]:
    """The package's parts of a group: all, or the one of that name, for which no other file is parsed."""
    if group == "heads":
        return {n: entry for n, entry in _heads().items() if name in (None, n)}
    return _backbones(name) if group == "backbones" else _one_per_file(group, name)


def _one_per_file(group: str, name: str | None) -> dict[str, Entry]:
    """Strategies, streams and merges: the file's stem is the name; a leading underscore marks machinery."""
    files = [f for f in sorted(_folder(group).glob("*.py")) if name in (None, f.stem)]
    return dict(_read_once(group, tuple((f, f.stat().st_mtime_ns) for f in files)))


def _folder(group: str) -> Path:
    return _HOME.joinpath(*_PACKAGES.get(group, group).split("."))


@functools.lru_cache(maxsize=256)
def _read_once(group: str, files: tuple[tuple[Path, int], ...]) -> dict[str, Entry]:
    """What is in files, as long as none of them changes: of every configuration that is read all are asked for."""
    public = [f for f, _ in files if not f.stem.startswith("_")]
    return {f.stem: _class_entry(group, f.stem, f, f"clplat.{_PACKAGES.get(group, group)}.{f.stem}") for f in public}


def _sources(folder: Path) -> list[Path]:
    return sorted(f for f in folder.glob("*.py") if not f.stem.startswith("_"))


def _class_entry(group: str, name: str, file: Path, module_name: str, attribute: str | None = None) -> Entry:
    """Entry of the class `attribute`, or of the one class in the file that derives from the group's base."""
    try:
        module = syntax.read(file)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        return Entry(name, group, file, module_name + ":", fault=f"{file.name}: syntax error in line {line}: {error}")
    if attribute is None:
        found = candidates(module, group)
        if len(found) != 1:
            what = f"{len(found)} public classes derive from {ROOTS[group]}" if found else (
                f"no public class derives from {ROOTS[group]}")  # fmt: skip
            return Entry(name, group, file, module_name + ":", fault=f"{file.name}: {what}; there must be one")
        attribute = found[0]
    cls = syntax.find_class(module, attribute)
    if cls is None:
        return Entry(name, group, file, module_name + ":", fault=f"{file.name}: has no class '{attribute}'")
    doc = syntax.docstring(cls.node) or syntax.docstring(module.tree)
    paper = syntax.class_value(cls, "paper")
    return Entry(
        name,
        group,
        file,
        f"{module_name}:{attribute}",
        syntax.summary(doc),
        _kinds(syntax.class_value(cls, "kinds")),
        paper.value if isinstance(paper, ast.Constant) and isinstance(paper.value, str) else "",
        aliases=_texts(syntax.class_value(cls, "aliases")),
    )


def candidates(module: syntax.Module, group: str) -> list[str]:
    """Public classes of a file that derive from the group's base."""
    found = []
    for name, node in module.names.items():
        if not isinstance(node, ast.ClassDef) or name.startswith("_"):
            continue
        _, *ancestors = syntax.lineage(syntax.Class(module, node))
        if any(c.node.name == ROOTS[group] for c in ancestors):
            found.append(name)
    return found


def _kinds(node: ast.AST | None) -> tuple[str, ...]:
    """Kinds named in `frozenset({Kind.LEARN, ...})`; all for `frozenset(Kind)`."""
    if node is None:
        return ()
    text = ast.unparse(node)
    if text in ("frozenset(Kind)", "set(Kind)"):
        return KINDS
    named = {n.attr.lower() for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    return tuple(k for k in KINDS if k in named)


def _texts(node: ast.AST | None) -> tuple[str, ...]:
    """Texts written in a tuple or list."""
    items = node.elts if isinstance(node, ast.Tuple | ast.List) else ()
    return tuple(n.value for n in items if isinstance(n, ast.Constant) and isinstance(n.value, str))


def _backbones(wanted: str | None) -> dict[str, Entry]:
    """Public functions annotated `-> Backbone` in clplat/backbones; or the one that is wanted."""
    found = {}
    for file in _sources(_HOME / "backbones"):
        if wanted is not None and f"def {wanted}(".encode() not in file.read_bytes():
            continue
        for name, node in syntax.read(file).names.items():
            if not isinstance(node, ast.FunctionDef) or name.startswith("_") or node.returns is None:
                continue
            returned = ast.unparse(node.returns).strip("'\"").rpartition(".")[2]
            if returned == "Backbone" and wanted in (None, name):
                text = syntax.summary(syntax.docstring(node))
                found[name] = Entry(name, "backbones", file, f"clplat.backbones.{file.stem}:{name}", text)
    return found


def _heads() -> dict[str, Entry]:
    """Public classes of backbones/heads.py, `GrowingHead` or `Growing` as `growing`; a base called `Head` is none."""
    file = _HOME / "backbones" / "heads.py"
    found = {}
    for cls, node in syntax.read(file).names.items() if file.is_file() else ():
        name = cls.lower().removesuffix("head")
        if isinstance(node, ast.ClassDef) and not cls.startswith("_") and name:
            found[name] = Entry(
                name, "heads", file, f"clplat.backbones.heads:{cls}", syntax.summary(syntax.docstring(node))
            )
    return found


# --- third parties ------------------------------------------------------------------------------------------------


def _entry_points(group: str) -> list[tuple[Any, str]]:
    from importlib.metadata import entry_points

    return [(p, p.dist.name if p.dist else "?") for p in entry_points(group=f"clplat.{group}")]


def _third_party(group: str, name: str, value: str) -> Entry:
    module_name, _, attribute = value.partition(":")
    file = syntax.file_of(module_name)
    if file is None:
        return Entry(name, group, Path(), value, fault=f"its module '{module_name}' is not installed as a Python file")
    if group == "backbones":
        node = syntax.read(file).names.get(attribute)
        text = syntax.summary(syntax.docstring(node)) if isinstance(node, ast.FunctionDef) else ""
        return Entry(name, group, file, value, text)
    return _class_entry(group, name, file, module_name, attribute or None)


def _from_path(group: str, name: str) -> Entry:
    """A file the user names. Relative to the working directory."""
    key = group_key(group)
    text, _, attribute = name.partition(".py")
    file = Path(text + ".py").expanduser().resolve()
    attribute = attribute.removeprefix(":")
    if not file.is_file():
        raise UserError(f"{key}: '{name}': there is no file {file}")
    own = _folder(group).resolve()
    if file.parent == own and file.stem in entries(group):
        # The same file under two module names would make two classes of it.
        known = entries(group)[file.stem]
        if not attribute or known.qualname.endswith(f":{attribute}"):
            return known
    if group == "backbones" and attribute:
        entry = Entry(name, group, file, f"{file}:{attribute}")
        if not isinstance(syntax.read(file).names.get(attribute), ast.FunctionDef):
            raise UserError(f"{key}: {file.name} has no function '{attribute}'")
        return entry
    if group not in ROOTS and not attribute:
        raise UserError(f"{key}: '{name}': say which object of the file, as path/to/file.py:Name")
    entry = _class_entry(group, name, file, str(file), attribute or None)
    if entry.fault:
        raise UserError(f"{key}: {entry.fault}")
    return entry


@functools.cache
def _import_file(file: Path) -> Any:
    name = f"clplat_user_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
