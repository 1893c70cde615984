"""Sizes and digests of a stage's files, to check that they have not changed since they were written."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dnpo import disk
from dnpo.threads import map_in_threads

RACY = 0.1  # seconds: a file written this recently could change again without a different time of change
_DIGESTS: dict[tuple[int, ...], str] = {}  # digests of files that this process has read, by inode, size and times


def to_json(content: Any) -> str:
    """Return JSON as it is written to files."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, content: Any) -> None:
    """Write JSON to a file that is complete or does not exist."""
    aside = disk.name_aside(path)
    aside.write_text(to_json(content), encoding="utf-8")
    disk.replace(aside, path)


def content_hash(path: Path) -> str:
    """SHA-256 of a file's contents, or of a folder's file names and contents; the folder's own path does not count.

    Raises:
        FileNotFoundError: there is no such file or folder.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(b"" if file == path else str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def fingerprint(folder: Path) -> str:
    """SHA-256 of the names and digests of a folder's files; files that were digested before are not read again."""
    lines = [f"{digest(path)}  {name}\n" for name, path in _files(folder).items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digest(path: Path) -> str:
    """SHA-256 of a file. It is read once in a process, and again when its size or its time of change differs."""
    found = path.stat()
    known = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    if known not in _DIGESTS:
        with path.open("rb") as stream:
            value = hashlib.file_digest(stream, "sha256").hexdigest()
        if time.time() - max(found.st_mtime, found.st_ctime) < RACY:
            return value
        _DIGESTS[known] = value
    return _DIGESTS[known]


def list_files(folder: Path, omitted: str) -> dict[str, dict[str, Any]]:
    """Return size in bytes and SHA-256 of each file in a folder, by its relative path, once all are on the disk.

    Hidden files that killed processes left are removed.

    Args:
        omitted: name of a file in the folder that is not listed.
    """
    for left in [path for path in folder.rglob(".*") if path.is_file()]:
        left.unlink()
    files = {name: path for name, path in _files(folder).items() if name != omitted}
    for path in (*files.values(), *(each for each in (folder, *folder.rglob("*")) if each.is_dir())):
        disk.flush(path)
    return {name: {"size": path.stat().st_size, "sha256": digest(path)} for name, path in files.items()}


def find_changes(folder: Path, listed: Mapping[str, Mapping[str, Any]], omitted: str, digests: bool) -> Iterator[str]:
    """Describe how the files of a folder differ from a list of them.

    Args:
        omitted: name of a file in the folder that is not listed.
        digests: whether to compare digests, which reads all files, or only names and sizes.
    """
    there = _files(folder)
    for name in sorted(listed.keys() - there.keys()):
        yield f"{name} is missing"
    for name in sorted(there.keys() - listed.keys() - {omitted}):
        yield f"{name} was not written by it"
    whole = []
    for name in sorted(there.keys() & listed.keys()):
        size = there[name].stat().st_size
        if size != listed[name]["size"]:
            yield f"{name} has {size:,} bytes instead of {listed[name]['size']:,}"
        else:
            whole.append(name)
    if digests:
        digested = map_in_threads(digest, [there[name] for name in whole], os.cpu_count() or 1)
        for name, value in zip(whole, digested, strict=True):
            if value != listed[name]["sha256"]:
                yield f"{name} has other contents than were written (its SHA-256 differs)"


def _files(folder: Path) -> dict[str, Path]:
    """The files of a folder by relative path, without hidden ones, which no stage reads."""
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file() or path.is_symlink()}
    return {each.as_posix(): path for each, path in sorted(found.items()) if not path.name.startswith(".")}
