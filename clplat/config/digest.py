"""Digests of objects that a run is given in Python, by which a resumed run tells that it is given the same ones.

Imports no torch: tensors and streams are known where torch is loaded already.
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from clplat.errors import is_users

_LEFT_OUT = frozenset(
    ("__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__abstractmethods__",
     "__firstlineno__", "__static_attributes__", "_abc_impl")
)  # fmt: skip


def digest(value: Any) -> str:
    """Twelve hexadecimal digits that stand for what `value` is.

    Arrays, tensors and frames by their content; objects by their class and what they hold; classes and functions of the
    user's by what their source compiles to, with their defaults and the functions and constants of their file that
    they name (comments and places do not count); those of installed packages by their names.

    Raises:
        TypeError: it, or something in it, has no content that could be told (a lock, an open file).
    """
    return _Digest().of(value).hex()[:12]


class _Digest:
    """Digests of objects from those of their parts: what is shared, and what is there twice, read alike."""

    def __init__(self) -> None:
        self.known = dict[int, bytes]()
        self.alive: list[Any] = []  # ids stand for objects only while these live

    def of(self, value: Any) -> bytes:
        """Of `value`; within itself, an object is a mark."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes):
            return _hash(type(value).__name__, repr(value).encode())
        if isinstance(value, Enum):
            return _hash("enum", str(value).encode())
        if id(value) not in self.known:
            self.known[id(value)] = b"itself"
            self.alive.append(value)
            self.known[id(value)] = self._object(value)
        return self.known[id(value)]

    def _all(self, kind: str, parts: Iterable[Any]) -> bytes:
        return _hash(kind, *map(self.of, parts))

    def _object(self, value: Any) -> bytes:
        torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
        if torch is not None and isinstance(value, torch.Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            return _hash(f"tensor {value.dtype} {tuple(value.shape)} {value.requires_grad}", flat.numpy())
        if numpy is not None and isinstance(value, numpy.ndarray):
            if value.dtype.hasobject:
                return self._all(f"array {value.shape}", value.reshape(-1).tolist())
            flat = numpy.ascontiguousarray(value).reshape(-1).view("u1")
            return _hash(f"array {value.dtype.str} {value.shape}", flat)
        if type(value) in (list, tuple):
            return self._all(type(value).__name__, value)
        if isinstance(value, set | frozenset):
            return _hash("set", *sorted(map(self.of, value)))
        if isinstance(value, Mapping):
            return _hash("mapping", *sorted(self.of(k) + self.of(v) for k, v in value.items()))
        if hasattr(value, "to_numpy"):  # a frame or a series
            return self._all(type(value).__name__, [[str(c) for c in getattr(value, "columns", ())], value.to_numpy()])
        if isinstance(value, type):
            return self._class(value)
        return self._code_or_state(value)

    def _code_or_state(self, value: Any) -> bytes:
        kind = type(value).__name__
        if isinstance(value, types.ModuleType):
            return _hash(kind, value.__name__.encode())
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return self._all(kind, [value.__func__, value.__self__])
        if isinstance(value, staticmethod | classmethod):
            return self._all(kind, [value.__func__])
        if isinstance(value, property):
            return self._all(kind, [value.fget, value.fset])
        if isinstance(value, functools.partial):
            return self._all(kind, [value.func, value.args, value.keywords])
        reduced = value.__reduce_ex__(4)  # what it would be copied from
        if isinstance(reduced, str):
            return _hash("name", f"{type(value).__module__}.{reduced}".encode())
        make, args, state, items, pairs = (*reduced, *[None] * 5)[:5]
        if isinstance(state, dict):  # what mode a network is in is no part of what it is
            state = {k: v for k, v in state.items() if k != "training"}
        return self._all(kind, [make, args, state, [*(items or ())], [*(pairs or ())]])

    def _class(self, cls: type) -> bytes:
        if not _own(cls):
            return _hash("class", f"{cls.__module__}.{cls.__qualname__}".encode())
        members = {name: value for name, value in vars(cls).items() if name not in _LEFT_OUT}
        return self._all(f"class {cls.__name__}", [cls.__bases__, members])

    def _function(self, function: types.FunctionType) -> bytes:
        if _installed(function.__module__, function.__code__.co_filename):
            return _hash("function", f"{function.__module__}.{function.__qualname__}".encode())
        code = self._code(function.__code__, function.__globals__)
        cells = [_content(cell) for cell in function.__closure__ or ()]
        return _hash("function", code, self._all("given", [function.__defaults__, function.__kwdefaults__, cells]))

    def _code(self, code: types.CodeType, names: dict[str, Any]) -> bytes:
        inner = [self._code(c, names) for c in code.co_consts if isinstance(c, types.CodeType)]
        plain = [c for c in code.co_consts if not isinstance(c, types.CodeType)]
        named = {n: names[n] for n in code.co_names if isinstance(names.get(n), _NAMED)}
        parts = [code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, plain, named]
        return _hash("code", self._all("parts", parts), *inner)


def _hash(kind: str, *parts: Any) -> bytes:
    """Of parts of bytes, each behind its length."""
    sha = hashlib.sha256(kind.encode())
    for part in parts:
        view = memoryview(part)
        sha.update(f" {view.nbytes} ".encode())
        sha.update(view)
    return sha.digest()


_NAMED = (bool, int, float, str, tuple, type, types.FunctionType)  # of a function's file, counted where it names them


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None


def _own(cls: type) -> bool:
    """Whether the user has written a class: of a script or notebook, or in a file that is in no installed package."""
    if vars(builtins).get(cls.__name__) is cls:
        return False
    functions = [f for f in vars(cls).values() if inspect.isfunction(f)]
    module = sys.modules.get(cls.__module__)
    if not functions and not hasattr(module, "__file__") and cls.__module__ in sys.builtin_module_names:
        return False
    file = functions[0].__code__.co_filename if functions else getattr(module, "__file__", None) or "<unknown>"
    return not _installed(cls.__module__, file)


def _installed(module: str | None, file: str) -> bool:
    return (module or "").partition(".")[0] == "clplat" or not is_users(file)
