"""A laboratory for LLM self-improvement with synthetic preference data."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dnpo.api import Result, Settings, compose, run
    from dnpo.api import open_result as open

__all__ = ["Result", "Settings", "__version__", "compose", "open", "run"]


def __getattr__(name: str) -> Any:
    """Import the Python interface only when it is used, so that importing dnpo takes no time."""
    if name not in __all__:
        raise AttributeError(f"module 'dnpo' has no attribute {name!r}")
    return getattr(import_module("dnpo.api"), {"open": "open_result"}.get(name, name))
