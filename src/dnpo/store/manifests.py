"""The manifest of a finished stage: its settings, origin and files; writing it and checking the stage against it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dnpo import disk
from dnpo.errors import StoreError
from dnpo.store.files import find_changes, list_files, to_json

MANIFEST = "manifest.json"
PARTIAL = ".partial"  # suffix of the folder in which an unfinished stage works
CHECKSUM = "checksum"
# fields of the manifests of earlier versions, which had neither files nor a checksum
EARLIER = {"stage", "title", "key", "version", "settings", "inputs", "facts", "started", "seconds"}


def list_folders(root: Path) -> list[Path]:
    """List the folders of all stages of a store, finished ones and others."""
    kinds = [kind for kind in root.glob("*") if kind.is_dir() and not kind.name.startswith(".")]
    return sorted(each for kind in kinds for each in kind.glob("*") if each.is_dir())


def path_of_lock(root: Path, name: str, key: str) -> Path:
    """Return the file that is locked while a stage is computed or removed."""
    return root / ".locks" / f"{name}-{key}.lock"


def seal(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest into a stage's folder, with every file's size and SHA-256, once all files are on the disk."""
    whole = {**content, "files": list_files(folder, MANIFEST)}
    aside = disk.name_aside(folder / MANIFEST)
    aside.write_text(to_json({**whole, CHECKSUM: _checksum(whole)}), encoding="utf-8")
    disk.replace(aside, folder / MANIFEST)


def manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of the stage in this folder: settings, inputs, origin, time and duration.

    Raises:
        StoreError: it is missing, or has changed since it was written.
    """
    try:
        return _read(folder)
    except ValueError as problem:
        raise StoreError(f"{folder}: is damaged: {problem}. {advise(folder.parent.parent, [folder])}") from problem


def find_damage(folder: Path, digests: bool) -> list[str]:
    """List the differences between the stage in this folder and what was written; empty if there are none.

    If an earlier version wrote the stage, the manifest lists no files and only the manifest is checked.

    Args:
        digests: whether to compare digests, which reads all files, or only names and sizes.
    """
    try:
        content = _read(folder)
        return list(_compare(folder, content, digests))
    except ValueError as problem:
        return [str(problem)]
    except OSError as error:
        return [f"{error.filename or folder} cannot be read ({error.strerror})"]


def expect_whole(stages: Mapping[Path, str], digests: bool = True) -> None:
    """Refuse stages that have changed since they were written.

    Args:
        stages: titles by folder.
        digests: whether to compare digests, which reads all files, or only names and sizes.

    Raises:
        StoreError: names every damaged stage, its files, and the command that removes it.
    """
    damaged = {folder: damage for folder in stages if (damage := find_damage(folder, digests))}
    if not damaged:
        return
    lines = [
        f"{folder.parent.name}/{folder.name} ({stages[folder]}) is damaged: {'; '.join(damage)}"
        for folder, damage in damaged.items()
    ]
    root = next(iter(damaged)).parent.parent
    raise StoreError("\n       ".join([f"store={root}: {lines[0]}", *lines[1:], advise(root, list(damaged))]))


def is_sealed(folder: Path) -> bool:
    """Whether the manifest lists the stage's files. Earlier manifests do not, so the files cannot be verified."""
    return "files" in manifest(folder)


def advise(root: Path, folders: list[Path]) -> str:
    """Advise on damaged stages."""
    names = " ".join(f"{folder.parent.name}/{folder.name}" for folder in folders)
    return (
        f"{'It is' if len(folders) == 1 else 'They are'} not used: dnpo store remove {names} store="
        f"{root} yes=true removes {'it' if len(folders) == 1 else 'them'}, and the next run makes "
        f"{'it' if len(folders) == 1 else 'them'} again"
    )


def parse(text: str) -> dict[str, Any]:
    """Parse a manifest; a ValueError says what is wrong with it."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{MANIFEST} is not a manifest")
    if set(content) == EARLIER:
        return content
    whole = {name: value for name, value in content.items() if name != CHECKSUM}
    if content.get(CHECKSUM) != _checksum(whole) or to_json(content) != text:
        raise ValueError(f"{MANIFEST} has other contents than were written (its checksum differs)")
    return content


def _read(folder: Path) -> dict[str, Any]:
    """Read a manifest; a ValueError says what is wrong with it."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from error
    return parse(text)


def _compare(folder: Path, content: Mapping[str, Any], digests: bool) -> Iterator[str]:
    name = f"{content['stage']}/{content['key']}"
    if name != f"{folder.parent.name}/{folder.name.removesuffix(PARTIAL)}":
        yield f"{MANIFEST} is that of {name}"
    if "files" in content:
        yield from find_changes(folder, content["files"], MANIFEST, digests)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(content).encode()).hexdigest()
