"""Run a module as on a machine that has torch, transformers, peft and Lightning, and what these need, but no more.

    python -m benchmarks.bare benchmarks.step --shape tiny

What else dnpo depends on is hidden, from its workers too: importing it fails, and it counts as not installed.
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
    """Finds what is installed, but for what is hidden."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
        """None for a hidden package, which says that it is not installed."""
        return None if fullname.partition(".")[0] in HIDDEN else super().find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, context: Any = None) -> Iterator[Distribution]:  # type: ignore[override]
        """Without the hidden ones: some libraries look here for what they may import."""
        for found in PathFinder.find_distributions(context or DistributionFinder.Context()):
            if found.metadata["Name"].lower() not in DISTRIBUTIONS:
                yield found


def hide() -> None:
    """Hide these packages from everything that is imported from now on.

    Raises:
        RuntimeError: one of them is imported already.
    """
    present = [name for name in HIDDEN if name in sys.modules]
    if present:
        raise RuntimeError(f"imported already: {', '.join(present)}")
    sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]


def hidden() -> bool:
    """Whether they are hidden here."""
    return Finder in sys.meta_path


if __name__ == "__main__":
    from benchmarks import bare

    bare.hide()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
