"""Reads a configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from clplat.errors import UserError


def read_yaml(path: Path) -> dict[str, Any]:
    """A configuration file as a mapping; a key written twice is a fault.

    Raises:
        UserError: not readable, not YAML, or not a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader: plain values only
    except OSError as error:
        raise UserError(f"config: can't read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"config: {where}: {what}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"config: {path} holds a {type(content).__name__}, not a mapping of keys to values")
    return content


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [k.value for k, _ in node.value if isinstance(k, yaml.ScalarNode) and k.value != "<<"]
        for key in {k for k in keys if keys.count(k) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is written twice", node.start_mark)
        return super().construct_mapping(node, deep)
