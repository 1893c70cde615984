"""List the stages of a store with their sizes, inputs and the runs that need them, and remove stages."""

import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dnpo import disk
from dnpo.errors import StoreError
from dnpo.store.manifests import PARTIAL, find_damage, list_folders, manifest, path_of_lock
from dnpo.store.remote import Remote

REMOVED = ".removed"  # folder in a store: a stage is moved there in one step before its files are deleted


@dataclass(frozen=True)
class Entry:
    """One folder of the store.

    Attributes:
        name: ``STAGE/KEY``, or ``STAGE/KEY.partial`` for an unfinished stage.
        size: in bytes.
        damage: how names and sizes of its files differ from what was written; empty for unfinished stages.
        content: the manifest; empty if there is none that can be read.
    """

    folder: Path
    name: str
    size: int
    damage: tuple[str, ...]
    content: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        """Whether the stage is finished."""
        return not self.name.endswith(PARTIAL)

    @property
    def key(self) -> str:
        """The stage's key."""
        return self.folder.name.removesuffix(PARTIAL)

    @property
    def inputs(self) -> list[str]:
        """The names of the stages that it was made from."""
        return list(self.content.get("inputs", {}).values())


def read_store(root: Path) -> list[Entry]:
    """Read the entries of a store, by name.

    Raises:
        StoreError: there is no store.
    """
    if not root.is_dir():
        raise StoreError(f"store={root}: there is no such folder; expected the store of your runs")
    return [_read(folder) for folder in list_folders(root)]


def read_remote(remote: Remote, names: Collection[str], digests: bool) -> list[Entry]:
    """Read the entries of a remote store, by name.

    Args:
        names: names of the entries to read; empty: all.
        digests: whether to read all files, or only compare sizes.

    Raises:
        StoreError: the store has no stage with one of the names.
        Gone: it does not answer.
    """
    there, entries = remote.names(), []
    for name in names or there:
        if name not in there:
            raise StoreError(f"{name}: {remote.address} has no such stage; expected STAGE/KEY, as list shows it")
        content, damage = remote.find_damage(name, digests)
        size = sum(file["size"] for file in content.get("files", {}).values())
        entries.append(Entry(Path(name), name, size, tuple(damage), content))
    return entries


def select(entries: Iterable[Entry], names: Iterable[str]) -> list[Entry]:
    """Return the entries with these names.

    Raises:
        StoreError: the store has none of this name.
    """
    known = {entry.name: entry for entry in entries}
    for name in names:
        if name not in known:
            raise StoreError(f"{name}: the store has no such stage; expected STAGE/KEY, as list shows it")
    return [known[name] for name in names]


def find_needs(entries: Collection[Entry], runs: Mapping[str, Collection[str]]) -> dict[str, list[str]]:
    """Return the runs that need each entry, because they name its stage or a stage that was made from it.

    Args:
        runs: the keys of the stages that each run names.
    """
    by_name = {entry.name: entry for entry in entries}
    needs: dict[str, list[str]] = {entry.name: [] for entry in entries}
    for run, keys in runs.items():
        ahead = [entry for entry in entries if entry.key in keys]
        seen: set[str] = set()
        while ahead:
            entry = ahead.pop()
            if entry.name not in seen:
                seen.add(entry.name)
                needs[entry.name].append(run)
                ahead += [by_name[name] for name in entry.inputs if name in by_name]
    return needs


def remove(entry: Entry) -> None:
    """Remove an entry. It disappears from the store in one step, so a killed removal leaves no damaged stage.

    Raises:
        StoreError: a run is computing it.
    """
    root = entry.folder.parent.parent
    path = path_of_lock(root, entry.folder.parent.name, entry.key)
    path.parent.mkdir(exist_ok=True)
    aside = root / REMOVED / f"{entry.folder.parent.name}-{entry.folder.name}.{os.getpid()}"
    aside.parent.mkdir(exist_ok=True)
    try:
        with FileLock(path, timeout=0):
            entry.folder.replace(aside)
            disk.flush(entry.folder.parent)
    except Timeout:
        raise StoreError(f"{entry.name}: a run is computing it; it was not removed") from None
    for left in aside.parent.iterdir():  # including the remains of a killed removal
        shutil.rmtree(left)


def _read(folder: Path) -> Entry:
    name = f"{folder.parent.name}/{folder.name}"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if name.endswith(PARTIAL):
        return Entry(folder, name, size, (), {})
    damage = tuple(find_damage(folder, digests=False))
    try:
        content = manifest(folder)
    except StoreError:  # ``damage`` describes it
        content = {}
    return Entry(folder, name, size, damage, content)
