"""The origin of a result: versions, commit, device, threads. Keys do not include it, so each result records it."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dnpo import ranks
from dnpo.wording import plural

# packages that results depend on, if they are installed
PACKAGES = (
    *("dnpo", "torch", "numpy", "transformers", "tokenizers", "safetensors", "peft", "pytorch-lightning", "datasets"),
    *("bitsandbytes", "pyarrow", "scipy", "huggingface-hub", "jinja2", "openai"),
    *("lm_eval", "sacrebleu", "rouge-score", "sentence-transformers"),
)
NAMES = {"python": "Python", "commit": "commit", "device": "device", "threads": "threads", "ranks": "ranks"}


def describe(device: str = "") -> dict[str, str]:
    """Describe this process: versions and commit, device and threads once torch is imported, and ranks if several.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; "" if none is used.
    """
    torch: Any = sys.modules.get("torch")
    found = {"python": platform.python_version(), **versions(), "commit": commit()}
    if torch is not None and device:
        found |= {"device": _device(torch, device), "threads": str(torch.get_num_threads())}
    if ranks.world() > 1:
        found["ranks"] = str(ranks.world())
    return found


@cache
def versions() -> Mapping[str, str]:
    """Return the versions of the packages that results depend on, without importing them."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # it belongs to an extra
            continue
    return installed


@cache
def commit() -> str:
    """Return the git commit of this code's checkout, with ``+`` if it has local changes; "" outside a checkout."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def differences(made_by: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, list[str]]]:
    """Return the differences between the origins of several stages: the titles of the stages, by name and value.

    Args:
        made_by: the origin of each stage, as :func:`describe` recorded it, by title. Names that an origin lacks are
            ignored.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for title, made in made_by.items():
        for name, value in made.items():
            found.setdefault(name, {}).setdefault(value, []).append(title)
    return {name: values for name, values in found.items() if len(values) > 1}


def warn(differing: Mapping[str, Mapping[str, list[str]]]) -> list[str]:
    """Return a line for each difference: its values, the most common one first, and the stages with the others."""
    lines = []
    for name, values in differing.items():
        usual, *others = sorted(values, key=lambda value: -len(values[value]))
        rest = ", ".join(f"{value or 'unknown'} ({', '.join(values[value])})" for value in others)
        lines.append(
            f"{NAMES.get(name, name)} {usual or 'unknown'} ({plural(len(values[usual]), 'stage')}), but {rest}"
        )
    return lines


def _device(torch: Any, setting: str) -> str:
    kind = setting if setting != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return f"cpu ({platform.machine()})" if kind == "cpu" else str(torch.cuda.get_device_name(kind))


def find_cwd(summary: Mapping[str, Any], run: Path) -> str:
    """Return the working folder of a run, to which the paths in its settings are relative.

    Args:
        summary: the content of ``summary.json``, which gives the working folder relative to the run's folder.
            Summaries of earlier versions give its absolute path.
        run: the run's folder.
    """
    return str(os.path.normpath(run.absolute() / summary["cwd"]))
