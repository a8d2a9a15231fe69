"""Reads classes, their constructors and docstrings from the syntax tree, so that names, help and validation of
options need no import of what they describe (torch alone takes seconds).

What the tree can't tell (a computed default, an annotation that is not a plain type) is None: the caller then asks
the imported object.
"""

from __future__ import annotations

import ast
import collections.abc
import functools
import importlib.util
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()  # default of an option that has none

_TYPES: dict[str, Any] = {t.__name__: t for t in (int, float, str, bool, list, dict, tuple)}
_TYPES |= {name: getattr(typing, name) for name in ("Any", "Literal", "Optional", "Union")}
_TYPES |= {"Sequence": collections.abc.Sequence, "Mapping": collections.abc.Mapping}
_PLAIN = (
    ast.Name,
    ast.Constant,
    ast.Subscript,
    ast.Tuple,
    ast.BinOp,
    ast.BitOr,
    ast.List,
    ast.Load,
    ast.UnaryOp,
    ast.USub,
)


@dataclass(frozen=True)
class Option:
    """One keyword argument of a part's constructor.

    Args:
        type: its annotation, as Python objects.
        default: or REQUIRED.
        help: its text in the docstring, on one line.
    """

    name: str
    type: Any
    default: Any
    help: str = ""


@dataclass(frozen=True, eq=False)
class Module:
    """A parsed file; `names` maps its top-level classes, functions and assigned values."""

    file: Path
    tree: ast.Module
    names: dict[str, ast.AST]
    imports: dict[str, tuple[str, int, str | None]]  # local name → (module, level, name in it)


@dataclass(frozen=True, eq=False)
class Class:
    """A class in the file it is written in."""

    module: Module
    node: ast.ClassDef


def read(file: Path) -> Module:
    """Parse a file (once, as long as it does not change).

    Raises:
        SyntaxError, OSError: as Python gives them.
    """
    return _read(file.resolve(), file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=512)
def _read(file: Path, _changed: int) -> Module:
    tree = ast.parse(file.read_bytes(), filename=str(file))
    names: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names[node.name] = node
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            names[node.target.id] = node.value
    imports: dict[str, tuple[str, int, str | None]] = {}
    for item in ast.walk(tree):
        if isinstance(item, ast.ImportFrom):
            imports |= {a.asname or a.name: (item.module or "", item.level, a.name) for a in item.names}
        elif isinstance(item, ast.Import):
            imports |= {a.asname or a.name: (a.name, 0, None) for a in item.names}
    return Module(file, tree, names, imports)


def file_of(module: str) -> Path | None:
    """The source file of a dotted module name, found without importing any of its packages."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for place in spec.submodule_search_locations or ():
        base = Path(place, *rest)
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file
    return None


def find_class(module: Module, name: str) -> Class | None:
    """The class that `name` stands for in a module, following imports (`from a import X`, `a.X`)."""
    if "." in name:
        prefix, name = name.rsplit(".", 1)
        target = module.imports.get(prefix)
        file = file_of(target[0]) if target and target[2] is None else None
        return _class_in(file, name)
    node = module.names.get(name)
    if isinstance(node, ast.ClassDef):
        return Class(module, node)
    if name not in module.imports:
        return None
    source, level, original = module.imports[name]
    if original is None:
        return None
    if level:
        base = module.file.parents[level - 1].joinpath(*source.split("."))
        file = next((f for f in (base.with_suffix(".py"), base / "__init__.py") if f.is_file()), None)
    else:
        file = file_of(source)
    return None if file == module.file else _class_in(file, original)


def _class_in(file: Path | None, name: str) -> Class | None:
    return None if file is None else find_class(read(file), name)


def lineage(cls: Class) -> Iterator[Class]:
    """The class and those of its bases whose source is found, nearest first."""
    yield cls
    for base in cls.node.bases:
        found = find_class(cls.module, ast.unparse(base))
        if found is not None:
            yield from lineage(found)


def class_value(cls: Class, name: str) -> ast.AST | None:
    """The expression assigned to a class attribute, here or in a base."""
    return next(class_values(cls, name), None)


def class_values(cls: Class, name: str) -> Iterator[ast.expr]:
    """The expressions assigned to a class attribute, here and then in its bases."""
    for owner in lineage(cls):
        for node in owner.node.body:
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                yield node.value
            if isinstance(node, ast.AnnAssign) and node.value is not None and ast.unparse(node.target) == name:
                yield node.value


def class_options(cls: Class) -> list[Option] | None:
    """Keyword arguments of a constructor, those reached through `**base` included; None where the tree can't tell."""
    owner, init = next(((c, f) for c in lineage(cls) if (f := _constructor(c)) is not None), (cls, None))
    if init is None or any(c.node.decorator_list for c in lineage(cls)):
        return None
    # An argument that a class takes again keeps its base's text, unless the class has one of its own.
    documented = [n for c in lineage(owner) for n in (c.node, _constructor(c)) if n is not None]
    own = _parameters(owner.module, init, _help_texts(*documented), skip_first=True)
    if own is None or init.args.kwarg is None:
        return own
    passed = _passed_to_super(init, init.args.kwarg.arg)
    bases = [b for base in owner.node.bases if (b := find_class(owner.module, ast.unparse(base))) is not None]
    if passed is None or len(owner.node.bases) != 1 or not bases:
        return None
    rest = class_options(bases[0])
    if rest is None:
        return None
    positional, named = passed
    taken = named | {o.name for o in own}
    return own + [o for o in rest[positional:] if o.name not in taken]


def function_options(module: Module, node: ast.FunctionDef) -> list[Option] | None:
    """Keyword arguments of a function; None where the tree can't tell."""
    if node.args.kwarg is not None:
        return None
    return _parameters(module, node, _help_texts(node), skip_first=False)


def _constructor(cls: Class) -> ast.FunctionDef | None:
    return next((n for n in cls.node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)


def _passed_to_super(init: ast.FunctionDef, kwargs: str) -> tuple[int, set[str]] | None:
    """What `super().__init__(a, name=..., **kwargs)` gives: how many by position, and which by name.

    None if `kwargs` is used in any other way.
    """
    uses = [n for n in ast.walk(init) if isinstance(n, ast.Name) and n.id == kwargs]
    for call in (n for n in ast.walk(init) if isinstance(n, ast.Call)):
        unpacked = [k for k in call.keywords if k.arg is None]
        if ast.unparse(call.func) != "super().__init__" or len(unpacked) != 1 or len(uses) != 1:
            continue
        if unpacked[0].value is uses[0] and not any(isinstance(a, ast.Starred) for a in call.args):
            return len(call.args), {k.arg for k in call.keywords if k.arg is not None}
    return None


def _parameters(
    module: Module, node: ast.FunctionDef, texts: dict[str, str], *, skip_first: bool
) -> list[Option] | None:
    plain = node.args.posonlyargs + node.args.args
    missing = [REQUIRED] * (len(plain) - len(node.args.defaults))
    pairs: list[tuple[ast.arg, Any]] = list(zip(plain, missing + node.args.defaults, strict=True))[int(skip_first) :]
    pairs += [
        (a, REQUIRED if d is None else d) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    ]
    if node.args.vararg is not None:
        return None
    options = []
    for arg, default in pairs:
        if default is not REQUIRED:
            try:
                default = literal(module, default)
            except ValueError:
                return None
        type_ = _type(module, arg.annotation)
        if type_ is None and default is not REQUIRED:
            return None
        # A required argument of some other type is one that the platform gives: a model, a shape.
        options.append(Option(arg.arg, Any if type_ is None else type_, default, texts.get(arg.arg, "")))
    return options


def literal(module: Module, node: ast.AST) -> Any:
    """Value of an expression of constants, or of a module's name that is assigned one.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(node, ast.Name) and node.id in module.names:
        node = module.names[node.id]
    try:
        return ast.literal_eval(node)
    except (TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _type(module: Module, node: ast.AST | None) -> Any:
    """Python object of an annotation of plain types; None for others."""
    if node is None:
        return None
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node = ast.parse(node.value, mode="eval").body
    if isinstance(node, ast.Name) and node.id not in _TYPES and isinstance(module.names.get(node.id), ast.expr):
        node = module.names[node.id]  # an alias: Choice = Literal["a", "b"]
    text = re.sub(r"\b(typing|t)\.", "", ast.unparse(node))
    tree = ast.parse(text, mode="eval").body
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    if not names <= _TYPES.keys() or not all(isinstance(n, _PLAIN) for n in ast.walk(tree)):
        return None
    try:
        return eval(compile(ast.Expression(tree), "<annotation>", "eval"), {"__builtins__": {}}, dict(_TYPES))
    except (TypeError, SyntaxError):
        return None


def docstring(node: ast.AST | None) -> str:
    """Docstring of a module, class or function; empty where it has none."""
    return (ast.get_docstring(node) or "") if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) else ""


def _help_texts(*nodes: ast.AST) -> dict[str, str]:
    texts: dict[str, str] = {}
    for node in nodes:
        texts = help_texts(docstring(node)) | texts  # the nearest wins
    return texts


def help_texts(doc: str) -> dict[str, str]:
    """Texts of the `Args:` section of a Google-style docstring (its indentation removed), each on one line."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", doc + "\n", re.M)
    if section is None:
        return {}
    lines = section[1].splitlines()
    indent = min((len(s) - len(s.lstrip()) for s in lines if s.strip()), default=0)
    texts: dict[str, str] = {}
    name = None
    for line in lines:
        start = re.match(r"(\w+)(?: \([^)]*\))?:\s*(.*)", line[indent:])
        if start and not line[indent:].startswith(" "):
            name = start[1]
            texts[name] = start[2].strip()
        elif name is not None and line.strip():
            texts[name] = f"{texts[name]} {line.strip()}".strip()
    return texts


def summary(doc: str) -> str:
    """First paragraph's first sentence of a docstring, on one line."""
    paragraph = " ".join(doc.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph)[0]
