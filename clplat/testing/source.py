"""What can be told from a part's source: arguments that are ignored or not documented."""

from __future__ import annotations

import ast
import inspect
import textwrap

from clplat.config import syntax
from clplat.strategy import Strategy


def argument_faults(cls: type, root: type = Strategy, given: frozenset[str] = frozenset()) -> list[str]:
    """One line for each constructor argument between `cls` and `root` that has no effect or no documentation.

    Args:
        given: arguments that the platform gives and that need not be used.
    """
    owners = [c for c in cls.__mro__ if issubclass(c, root)]
    trees = {owner: ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0] for owner in owners}
    read = {n.attr for t in trees.values() for n in ast.walk(t) if isinstance(n, ast.Attribute) and _loads(n)}
    texts: dict[str, str] = {}  # of all classes: one that takes an argument again may leave the text to its base
    for owner in owners:
        texts |= syntax.help_texts(inspect.cleandoc(owner.__doc__ or ""))
        texts |= syntax.help_texts(inspect.cleandoc(vars(owner).get("__init__", owner).__doc__ or ""))
    faults = []
    for owner in owners:
        init = next((n for n in _body(trees[owner]) if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if init is None or owner is root:
            continue
        for argument in [*init.args.posonlyargs, *init.args.args, *init.args.kwonlyargs][1:]:
            if argument.arg in given:
                continue
            name = f"{owner.__name__}({argument.arg})"
            if not _used(init, argument.arg, read):
                faults.append(f"{name} is accepted and ignored")
            if argument.arg != "model" and not texts.get(argument.arg):
                faults.append(f"{name} is not in the docstring's Args")
    return faults


def _body(node: ast.stmt) -> list[ast.stmt]:
    return node.body if isinstance(node, ast.ClassDef) else []


def _loads(node: ast.Attribute | ast.Name) -> bool:
    return isinstance(node.ctx, ast.Load)


def _used(init: ast.FunctionDef, argument: str, read: set[str]) -> bool:
    """Whether an argument does more than being checked, or kept under a name that nothing reads."""
    idle: set[ast.AST] = set()
    for node in ast.walk(init):
        if (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("require")) or (
            isinstance(node, ast.If) and all(isinstance(s, ast.Raise) for s in node.body) and not node.orelse
        ):
            idle.update(ast.walk(node))
        elif isinstance(node, ast.Assign):
            for target, value in _pairs(node):
                if isinstance(target, ast.Attribute) and isinstance(value, ast.Name) and target.attr not in read:
                    idle.add(value)
    return any(isinstance(n, ast.Name) and n.id == argument and n not in idle for n in ast.walk(init))


def _pairs(node: ast.Assign) -> list[tuple[ast.expr, ast.expr]]:
    """(target, value) of an assignment, taken apart where both sides are tuples of one length."""
    found = []
    for target in node.targets:
        value = node.value
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            found += list(zip(target.elts, value.elts, strict=True))
        else:
            found.append((target, value))
    return found
