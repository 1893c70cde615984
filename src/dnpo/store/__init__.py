"""Finished stages, stored under a hash of their settings and inputs.

A stage is a pure function of its settings and inputs. Its key is a hash of its name, version, settings and the keys of
its inputs. So a rerun finds the stages that an earlier run finished, and runs with the same first stages share them. A
stage works in ``<key>.partial``, where the work of a killed run is continued. The folder gets its final name only when
it is complete and on the disk. Its manifest lists every file; a stage that has changed since it was written is reported
and never used.

    python -m dnpo.store list|verify|remove|publish
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from filelock import FileLock, Timeout

from dnpo import disk
from dnpo.errors import Declined, DiskError, DnpoError, SettingsError, StoreError
from dnpo.store import provenance
from dnpo.store.files import content_hash, fingerprint, write_json
from dnpo.store.manifests import (
    MANIFEST,
    PARTIAL,
    advise,
    expect_whole,
    find_damage,
    is_sealed,
    list_folders,
    manifest,
    path_of_lock,
    seal,
)
from dnpo.store.remote import Gone, Remote, bring_into

__all__ = [
    "MANIFEST",
    "Compute",
    "Made",
    "Remote",
    "Report",
    "Stage",
    "Store",
    "Verify",
    "Work",
    "advise",
    "compute_here",
    "content_hash",
    "expect_whole",
    "find_damage",
    "fingerprint",
    "manifest",
    "write_json",
]

Verify = Literal["digests", "sizes"]  # what is compared for a finished stage's files, in addition to their names
LARGE = 10**10  # bytes; reading more than this is announced
ELSEWHERE = "expected a folder to write to"
LAYOUT, KEYS = ".layout", "2"  # file with the version of the store's keys, which is raised when all keys change


class Report(Protocol):
    """Receives the progress of a stage."""

    def begin(self, total: int, unit: str, done: int = 0) -> None:
        """Announce the total, in units of this name, and how many of them an earlier run has done."""

    def advance(self, amount: int = 1) -> None:
        """Report that ``amount`` more units are done."""

    def note(self, text: str) -> None:
        """Print a line about the stage."""

    def status(self, text: str) -> None:
        """Show a few words next to the progress bar, until the next call."""

    def steps(self, rows: list[dict[str, float]]) -> None:
        """Pass on metrics of training steps, each row with its ``step``."""


Work = Callable[[Path, Mapping[str, Path], Report], dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """One piece of work and everything its result depends on.

    Attributes:
        name: the verb, such as ``generate``; also the folder in the store.
        title: its name for people; not in the key.
        version: must be raised whenever a change of the code changes results.
        settings: the plain values that can change the result, and only these.
        inputs: stages whose results it reads.
        caches: stages whose results only save work. Not in the key; if one declines, the stage runs without it.
        device: the device that computes it, as in ``device=…``; not in the key.
        shared: whether several processes can share the work, see ``ranks.py``; not in the key.
        work: called with its folder, the folders of its inputs and a report; writes results into its folder and returns
            facts for the manifest. After a kill it is called again, and finds the files that it left there.
    """

    name: str
    title: str
    version: int
    settings: Mapping[str, Any]
    inputs: Mapping[str, "Stage"]
    work: Work
    caches: Mapping[str, "Stage"] = field(default_factory=dict)
    device: str = ""
    shared: bool = False

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits of the SHA-256 of everything the result depends on."""
        content = {
            "name": self.name,
            "version": self.version,
            "settings": self.settings,
            "inputs": {name: stage.key for name, stage in self.inputs.items()},
        }
        text = json.dumps(content, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Made(NamedTuple):
    """The outcome of a stage's work: facts for the manifest, and the origin of the result."""

    facts: dict[str, Any]
    made_by: dict[str, str]


Compute = Callable[[Stage, Path, Mapping[str, Path], Report], Made]


def compute_here(stage: Stage, folder: Path, inputs: Mapping[str, Path], report: Report) -> Made:
    """Do a stage's work in this process."""
    facts = stage.work(folder, inputs, report)
    return Made(facts, provenance.describe(stage.device))


class Store:
    """A folder of finished stages, safe for several runs at once.

    Args:
        root: the folder.
        verify: what is compared when a process first uses a stage; names and sizes are compared at every use.
        remote: a store shared with other machines: its stages are fetched, and computed stages are published there.
        compute: does the work of a stage.
    """

    def __init__(
        self,
        root: Path,
        verify: Verify = "digests",
        remote: Remote | None = None,
        compute: Compute = compute_here,
    ) -> None:
        self.root, self.verify, self.remote, self.compute = root.absolute(), verify, remote, compute
        self._unpublished: dict[str, None] = {}  # names of stages that the remote store did not accept, in order
        self._damaged: set[str] = set()  # names of stages that are damaged in the remote store
        self._warned = False
        self.computed: set[str] = set()  # keys of the stages that this object computed instead of reusing

    def open(self, note: Callable[[str], None]) -> None:
        """Create the folder, and note once if stages under keys of an earlier layout will be computed again.

        Raises:
            SettingsError: the folder cannot be written to.
        """
        stages = sorted({folder.parent.name for folder in list_folders(self.root)})
        mark = self.root / LAYOUT
        try:
            known = mark.read_text(errors="replace").strip() if mark.is_file() else ""
            self.root.mkdir(parents=True, exist_ok=True)
            if known != KEYS:
                mark.write_text(f"{KEYS}\n")
        except OSError as error:
            raise SettingsError(f"store={self.root}: {error.strerror}; {ELSEWHERE}") from error
        if stages and known and not known.isdecimal():
            note(f"store={self.root}: {LAYOUT} was damaged and has been written again; stages are found by their keys")
        elif stages and known != KEYS:
            note(
                f"store={self.root}: its stages ({', '.join(stages)}) were stored by an earlier version of dnpo; those "
                f"whose keys have changed are computed again. dnpo store remove store={self.root} shows "
                "which folders no tracked run needs"
            )

    def exchange(self, stages: Iterable[Stage], note: Callable[[str], None]) -> None:
        """Fetch the stages that only the remote store has, and publish those that only this one has."""
        fetched = published = 0
        for stage in {stage.key: stage for stage in stages}.values():
            if self.remote is None or self.remote.lost:
                break
            if self.folder(stage).exists():
                published += self._publish(stage, note)
            elif self.writable:
                with self._explain(stage), self._lock(stage, note):
                    fetched += not self.folder(stage).exists() and self._fetch(stage, note)
        if self.remote is not None and fetched + published:
            note(f"store.remote={self.remote.address}: fetched {fetched}, published {published} finished stages")

    def is_remote(self, stage: Stage) -> bool:
        """Whether the remote store has the result; False if there is no remote store, or if it does not answer."""
        try:
            return self.remote is not None and self.remote.read_manifest(f"{stage.name}/{stage.key}") is not None
        except (Gone, StoreError):
            return False

    def close(self, note: Callable[[str], None]) -> None:
        """Note what could not be published, and how to publish it later."""
        if self.remote is not None and self._unpublished:
            note(
                f"store.remote={self.remote.address}: not published: {', '.join(self._unpublished)}. Publish later "
                f"with dnpo store publish store={self.root} remote={self.remote.address}"
            )

    def check(self, stages: Iterable[Stage], note: Callable[[str], None], everything: bool = True) -> None:
        """Check that stored stages have not changed, and note those that cannot be checked.

        Args:
            everything: whether to compare digests too, if the store's setting says so.

        Raises:
            StoreError: stages are damaged; the message names them all.
            SettingsError: stages are missing, and the store cannot be written to.
        """
        stages = list(stages)
        there = {self.folder(stage): stage.title for stage in stages if self.folder(stage).exists()}
        expect_whole(there, digests=False)
        earlier = [f"{folder.parent.name}/{folder.name}" for folder in there if not is_sealed(folder)]
        if earlier:
            note(
                f"store={self.root}: these stages were written by an earlier version of dnpo, without digests of their "
                f"files, and are used unverified: {', '.join(earlier)}. To have them made again: dnpo store "
                f"remove {' '.join(earlier)} store={self.root} needed=true"
            )
        if everything and len(there) < len({stage.key for stage in stages}) and not self.writable:
            raise SettingsError(f"store={self.root}: cannot be written to, and not all stages are there; {ELSEWHERE}")
        if everything and self.verify == "digests":
            size = sum(file["size"] for folder in there for file in manifest(folder).get("files", {}).values())
            if size > LARGE:
                note(f"reading {size / 1e9:,.0f} GB of finished stages to verify them; verify=sizes does not")
            expect_whole(there, digests=True)

    @property
    def writable(self) -> bool:
        """Whether new stages can be written. A store that has all stages of a run need not be writable."""
        return os.access(self.root, os.W_OK)

    def folder(self, stage: Stage) -> Path:
        """The folder of a stage's result, which may not exist yet."""
        return self.root / stage.name / stage.key

    def partial(self, stage: Stage) -> Path:
        """The folder in which an unfinished stage works."""
        return self.root / stage.name / f"{stage.key}{PARTIAL}"

    def has(self, stage: Stage) -> bool:
        """Whether the result is stored.

        Raises:
            StoreError: it is stored, but names or sizes of its files have changed since it was written.
        """
        folder = self.folder(stage)
        if not folder.exists():
            return False
        expect_whole({folder: stage.title}, digests=False)
        return True

    def get(self, stage: Stage, report: Report) -> Path:
        """Return the folder of the stage's result, computed if necessary.

        If two runs need the same stage at the same time, the second waits for the first.

        Raises:
            StoreError: the stage or one of its inputs has changed since it was written.
            DiskError: the disk is full or refuses to write.
        """
        folder = self.folder(stage)
        if folder.exists():
            expect_whole({folder: stage.title}, digests=self.verify == "digests")
            return folder
        if self.remote is not None and not self.remote.lost:
            with self._explain(stage), self._lock(stage, report.note):
                if self.has(stage) or self._fetch(stage, report.note):
                    return folder
        inputs = {name: self.get(needed, report) for name, needed in stage.inputs.items()}
        for name, cache in stage.caches.items():
            try:
                inputs[name] = self.get(cache, report)
            except Declined as why:
                with suppress(OSError):  # if it is not empty, an earlier run left it and can continue
                    self.partial(cache).rmdir()
                if str(why):
                    report.note(str(why))
        with self._explain(stage), self._lock(stage, report.note), self._lease(stage, report.note):
            if not self.has(stage) and not self._fetch(stage, report.note):
                self._compute(stage, inputs, report)
                self._publish(stage, report.note)
        return folder

    def _lease(self, stage: Stage, note: Callable[[str], None]) -> AbstractContextManager[None]:
        if self.remote is None or self.remote.lost or self.has(stage):
            return nullcontext()
        return self.remote.lease(f"{stage.name}/{stage.key}", note)

    def _fetch(self, stage: Stage, note: Callable[[str], None]) -> bool:
        """Fetch a stage from the remote store if it has it; return whether it was fetched."""
        name = f"{stage.name}/{stage.key}"
        if self.remote is None or name in self._damaged:
            return False
        try:
            content = self.remote.read_manifest(name)
            if content is not None:
                bring_into(self.folder(stage), self.root, name, self.remote, content)
            return content is not None
        except StoreError as damage:
            self._damaged.add(name)
            note(f"{damage}. It is computed here, and not published")
        except Gone:
            self._warn(note)
        return False

    def _publish(self, stage: Stage, note: Callable[[str], None]) -> bool:
        """Publish a finished stage in the remote store; return whether it was the first to do so."""
        name, content = f"{stage.name}/{stage.key}", manifest(self.folder(stage))
        if self.remote is None or "files" not in content:
            return False
        try:
            return self.remote.publish(name, content, self.folder(stage))
        except Gone:
            self._unpublished[name] = None
            self._warn(note)
            return False

    def _warn(self, note: Callable[[str], None]) -> None:
        if not self._warned and self.remote is not None:
            self._warned = True
            note(
                f"warning: store.remote={self.remote.address} cannot be used ({self.remote.lost}). The run "
                "continues with its local store, and lists unpublished stages at its end"
            )

    def _compute(self, stage: Stage, inputs: Mapping[str, Path], report: Report) -> None:
        partial = self.partial(stage)
        partial.mkdir(parents=True, exist_ok=True)
        started, clock = datetime.now(UTC), time.monotonic()
        made = self.compute(stage, partial, inputs, report)
        content = {
            "stage": stage.name,
            "title": stage.title,
            "key": stage.key,
            "version": stage.version,
            "settings": stage.settings,
            "inputs": {name: f"{needed.name}/{needed.key}" for name, needed in stage.inputs.items()},
            "facts": made.facts,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - clock, 3),
            "made_by": made.made_by,
        }
        seal(partial, content)
        partial.replace(self.folder(stage))
        disk.flush(partial.parent)
        self.computed.add(stage.key)

    @contextmanager
    def _explain(self, stage: Stage) -> Iterator[None]:
        """Turn errors of the disk into messages."""
        try:
            yield
        except (DnpoError, Declined):
            raise
        except Exception as error:
            words = disk.explain(error, self.root)
            if words is None:
                raise
            raise DiskError(
                f"store={self.root}: {stage.title} ({self.partial(stage)}) cannot go on: {words}. Finished stages are "
                "kept, and the same command continues this one"
            ) from error

    @contextmanager
    def _lock(self, stage: Stage, note: Callable[[str], None]) -> Iterator[None]:
        path = path_of_lock(self.root, stage.name, stage.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)  # an flock: the system frees it when its owner is killed
        try:
            lock.acquire(timeout=0)
        except Timeout:
            note(f"another run is computing {stage.title} ({stage.key}); waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
