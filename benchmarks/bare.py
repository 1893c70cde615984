"""Run a module as if only torch, transformers, peft, Lightning and their own dependencies were installed.

    python -m benchmarks.bare benchmarks.step --shape tiny

dnpo's other dependencies are hidden from the module and from its workers: importing them fails, and they count as not
installed.
"""

import runpy
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, DistributionFinder
from typing import Any

HIDDEN = (
    *("pydantic", "hydra", "omegaconf", "pyarrow", "mlflow", "datasets", "openai"),
    *("scipy", "matplotlib", "rich", "trl"),
)
DISTRIBUTIONS = {*HIDDEN, "hydra-core"}


class Finder(PathFinder):
    """Find installed modules, except for the hidden ones."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Return None for a hidden package, as if it were not installed."""
        return None if fullname.partition(".")[0] in HIDDEN else super().find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, context: Any = None) -> Iterator[Distribution]:  # type: ignore[override]
        """Yield the distributions that are not hidden; some libraries look here to see what they can import."""
        for found in PathFinder.find_distributions(context or DistributionFinder.Context()):
            if found.metadata["Name"].lower() not in DISTRIBUTIONS:
                yield found


def hide() -> None:
    """Hide the packages.

    Raises:
        RuntimeError: one of them has been imported.
    """
    present = [name for name in HIDDEN if name in sys.modules]
    if present:
        raise RuntimeError(f"imported already: {', '.join(present)}")
    sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]


def is_hidden() -> bool:
    """Whether the packages are hidden in this process."""
    return Finder in sys.meta_path


if __name__ == "__main__":
    from benchmarks import bare

    bare.hide()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
