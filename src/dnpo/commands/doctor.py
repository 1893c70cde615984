"""Report what is installed, which device there is, and what is missing: ``dnpo doctor``."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from dnpo import __version__
from dnpo.errors import DnpoError
from dnpo.escape import say, tell
from dnpo.settings import conf_folder

KEYS = ("OPENAI_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_URI")
PROGRAMS = {"bwrap": "a sandbox for judge=code", "pdflatex": "typesets the tables of dnpo figures"}
LEAST_FREE = 5  # GB of free disk; with less, a run is likely to fill the disk


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``dnpo doctor``; the exit status is 1 if something is missing that every run needs.

    Args:
        arguments: the command's; None: those of the process.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given:
        say("usage: dnpo doctor\n\nWhat is installed, which device there is, and what is missing.")
        sys.exit(0 if {"-h", "--help"} & set(given) else 2)
    say(f"dnpo {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    problems = [*_packages(), *_settings(), *_device(), *_room()]
    _extras()
    _surroundings()
    say("\n" + ("Nothing that a run needs is missing." if not problems else "To fix:"))
    for problem in problems:
        tell(f"  {problem}")
    sys.exit(1 if problems else 0)


def _packages() -> Iterator[str]:
    """Show the packages that every run needs; yield the problems with them."""
    say("\npackages")
    for requirement in _requirements(""):
        found = _version(requirement.name)
        state = (
            "missing"
            if found is None
            else ""
            if requirement.specifier.contains(found, prereleases=True)
            else "unsuitable"
        )
        say(
            f"  {requirement.name:20} {found or '–':14} {state or 'ok'}"
            + (f": needs {requirement.specifier}" if state else "")
        )
        if state:
            yield f"{requirement.name}: {state}; pip install '{requirement.name}{requirement.specifier}'"


def _extras() -> None:
    say("\nextras (pip install 'dnpo[NAME]')")
    for extra in sorted(each for each in _extra_names() if each != "dev"):
        lacking = [each.name for each in _requirements(extra) if _version(each.name) is None]
        say(f"  {extra:20} " + (f"missing: {', '.join(lacking)}" if lacking else "ok"))


def _settings() -> Iterator[str]:
    say("\nsettings")
    try:
        say(f"  conf                 {conf_folder()}")
    except DnpoError as error:
        say(f"  conf                 {error}")
        yield str(error)


def _device() -> Iterator[str]:
    say("\ndevice")
    try:
        import torch
    except ImportError as error:
        say(f"  torch cannot be imported: {error}")
        yield f"torch cannot be imported: {error}"
        return
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            say(f"  cuda:{number}               {about.name}, {about.total_memory / 1e9:.0f} GB")
    else:
        built = "" if torch.version.cuda else "; this torch is built without CUDA"
        say(f"  cpu                  {os.cpu_count()} cores (no GPU found{built})")


def _room() -> Iterator[str]:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    say(f"  disk                 {free:.0f} GB free in this folder")
    if not os.access(Path.cwd(), os.W_OK):
        yield "this folder cannot be written to; runs write outputs/, store/ and mlflow.db"
    elif free < LEAST_FREE:
        yield f"this folder has only {free:.1f} GB free; store=FOLDER puts finished stages elsewhere"


def _surroundings() -> None:
    say("\nsurroundings")
    for name in KEYS:  # never the value: it may be a secret
        say(f"  {name:20} {'set' if os.environ.get(name) else 'not set'}")
    for name, purpose in PROGRAMS.items():
        say(f"  {name:20} {'found' if shutil.which(name) else f'not found ({purpose})'}")


def _requirements(extra: str) -> list[Requirement]:
    """The requirements of dnpo itself, or of an extra."""
    found = []
    for text in requires("dnpo") or ():
        requirement = Requirement(text)
        named = requirement.marker is not None and "extra" in str(requirement.marker)
        if named == bool(extra) and (requirement.marker is None or requirement.marker.evaluate({"extra": extra})):
            found.append(requirement)
    return found


def _extra_names() -> set[str]:
    from importlib.metadata import metadata

    return set(metadata("dnpo").get_all("Provides-Extra") or ())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
