"""Paths among settings, changed so that what others may read does not name the folders of this machine."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ABSOLUTE = re.compile(r"(sqlite:///|file://|file:|)((?:/|~)[^/\n]*/[^\n]+)")


def change_paths(value: Any, change: Callable[[str], str]) -> Any:
    """Change the absolute paths in a tree of settings, such as that of ``data.path``; all else stays."""
    if isinstance(value, Mapping):
        return {key: change_paths(each, change) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [change_paths(each, change) for each in value]
    found = ABSOLUTE.fullmatch(str(value)) if isinstance(value, str | Path) else None
    return value if found is None else f"{found[1]}{change(found[2])}"


def last_part(path: str) -> str:
    """Return the name of a file or folder, without the folders above it."""
    return Path(path).name


def from_here(path: str) -> str:
    """Return a path relative to the current directory."""
    return os.path.relpath(Path(path).expanduser())


def override_from_here(override: str) -> str:
    """Make the path in ``setting=path`` relative to the current directory, if it is absolute."""
    name, equals, value = override.partition("=")
    return f"{name}{equals}{change_paths(value, from_here)}"
