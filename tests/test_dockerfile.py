"""The Dockerfile: it has the README's two commands, and hadolint has no objections. It is not built here."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "Dockerfile"


def instructions() -> dict[str, list[str]]:
    """The arguments of each kind of instruction."""
    found: dict[str, list[str]] = {}
    for line in FILE.read_text().replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            kind, _, rest = line.partition(" ")
            found.setdefault(kind, []).append(rest.strip())
    return found


def hadolint() -> str:
    """The linter of the extra ``dev``, or any other."""
    beside = Path(sys.executable).with_name("hadolint")
    found = str(beside) if beside.is_file() else shutil.which("hadolint")
    if found is None:
        pytest.skip("hadolint is not installed")
    return found


def lint(text: str) -> list[str]:
    done = subprocess.run([hadolint(), "--format", "json", "-"], input=text, capture_output=True, text=True)
    return [each["code"] for each in json.loads(done.stdout)]


def test_it_has_the_commands_of_the_readme() -> None:
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    python -m ")]
    first, second = (re.sub(r"\s+# .*", "", line).strip() for line in lines[:2])
    install, _, run = first.partition(" && ")
    found = instructions()
    assert found["RUN"] == [install.replace("pip install", "pip install --no-cache-dir")]
    assert json.loads(found["CMD"][-1]) == run.split()
    assert any(line.startswith("#") and f"dnpo {second}" in line for line in FILE.read_text().splitlines())


def test_its_python_is_a_supported_version() -> None:
    (image,) = instructions()["FROM"]
    version = re.fullmatch(r"python:(3\.\d+)-slim-\w+", image)
    assert version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"Programming Language :: Python :: {version[1]}" in project["classifiers"]


def test_it_says_that_it_is_not_built_here() -> None:
    assert "NOT\n# BUILT" in FILE.read_text()


def test_files_of_runs_and_tools_are_not_in_the_image() -> None:
    ignored = set((ROOT / ".dockerignore").read_text().split())
    assert ".git" in ignored
    for line in (ROOT / ".gitignore").read_text().splitlines():
        if line and not line.startswith("#"):
            name = line.strip("/")
            assert name in ignored or f"**/{name}" in ignored, line
    for part in ("src", "conf", "analysis", "tests", "README.md", "LICENSE", "constraints.txt", "pyproject.toml"):
        assert part not in ignored


def test_hadolint_has_no_objections() -> None:
    assert lint(FILE.read_text()) == []
    assert "DL3006" in lint("FROM python\n"), "it objects to nothing"
