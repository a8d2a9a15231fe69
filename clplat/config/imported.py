"""Options of parts that are objects: imported, since their source does not tell, or given in Python."""

from __future__ import annotations

import inspect
import typing
from pathlib import Path
from typing import Any

from clplat.config import syntax
from clplat.config.syntax import Option


def options_in_file(part: Any) -> list[Option] | None:
    """Options of a class at the top of a file, read there; None of any other."""
    try:
        file = Path(inspect.getsourcefile(part) or "")
    except (TypeError, OSError):  # of a notebook
        return None
    if not inspect.isclass(part) or part.__qualname__ != part.__name__ or not file.is_file():
        return None
    cls = syntax.find_class(syntax.read(file), part.__name__)
    return None if cls is None else syntax.class_options(cls)


def options_of_object(part: Any) -> list[Option]:
    """Options of an imported class or function: its own parameters, then those behind `**base`."""
    owners = [c for c in inspect.getmro(part) if "__init__" in vars(c)] if inspect.isclass(part) else [part]
    found: dict[str, Option] = {}
    documented: dict[str, str] = {}
    for owner in reversed(inspect.getmro(part) if inspect.isclass(part) else [part]):
        documented |= syntax.help_texts(inspect.cleandoc(owner.__doc__ or ""))
    for owner in owners:
        function = owner.__init__ if inspect.isclass(owner) else owner
        texts = documented | syntax.help_texts(inspect.cleandoc(function.__doc__ or ""))
        try:
            hints = typing.get_type_hints(function)
        except NameError:  # of a class written within a function
            hints = {}
        more = False
        for name, parameter in list(inspect.signature(function).parameters.items())[int(inspect.isclass(owner)) :]:
            if parameter.kind is parameter.VAR_KEYWORD:
                more = True
            elif parameter.kind is not parameter.VAR_POSITIONAL and name not in found:
                default = syntax.REQUIRED if parameter.default is parameter.empty else parameter.default
                if default is syntax.REQUIRED and owner is not owners[0]:
                    continue  # the class gives it to its base
                found[name] = Option(name, hints.get(name, Any), default, texts.get(name, ""))
        if not more:
            break
    return list(found.values())
