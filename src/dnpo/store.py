"""Finished stages, found again by a hash of their settings and inputs.

A stage is a pure function of its settings and inputs. Its key is a hash of its name, version, settings and the keys of
its inputs, so a rerun finds what an earlier run finished, and runs that share a prefix share its work. A stage works in
``<key>.partial`` (what a killed run left there is continued) and its folder gets its final name only when it is whole.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from dnpo.errors import Declined, DnpoError, SettingsError

MANIFEST = "manifest.json"
LAYOUT, KEYS = ".layout", "2"  # file in a store that says how its keys are made; raised when all keys change at once


class Report(Protocol):
    """Receives the progress of a stage."""

    def begin(self, total: int, unit: str, done: int = 0) -> None:
        """Say how many ``unit`` there are to do, and how many an earlier run has done."""

    def advance(self, amount: int = 1) -> None:
        """Say that so many more are done."""

    def note(self, text: str) -> None:
        """Say something worth a line."""

    def status(self, text: str) -> None:
        """Show a few words next to the progress bar, until the next call."""

    def steps(self, rows: list[dict[str, float]]) -> None:
        """Hand over metrics of training steps, each row with its ``step``."""


Work = Callable[[Path, Mapping[str, Path], Report], dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """One piece of work and everything its result depends on.

    Attributes:
        name: the verb, such as ``generate``; also the folder in the store.
        title: what people read; not part of the key.
        version: raised by hand whenever a change of the code changes results.
        settings: plain values that can change the result, and no others.
        inputs: stages whose results it reads.
        aids: stages whose results only save work. Not in the key; the stage runs without one that declines.
        work: called with its folder, the folders of its inputs and a report; writes results into its folder and
            returns facts worth keeping in the manifest. Called again after a kill, it finds what it left there.
    """

    name: str
    title: str
    version: int
    settings: Mapping[str, Any]
    inputs: Mapping[str, "Stage"]
    work: Work
    aids: Mapping[str, "Stage"] = field(default_factory=dict)

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


class Store:
    """A folder of finished stages, safe for several runs at once."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.computed: set[str] = set()  # keys of the stages that this object computed, and did not find

    def open(self, note: Callable[[str], None]) -> None:
        """Create the folder, and say once that what was stored under keys of an earlier layout is computed again.

        Raises:
            SettingsError: the folder cannot be written to.
        """
        stages = sorted({manifest.parent.parent.name for manifest in self.root.glob(f"*/*/{MANIFEST}")})
        mark = self.root / LAYOUT
        known = mark.read_text().strip() if mark.is_file() else ""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if known != KEYS:
                mark.write_text(f"{KEYS}\n")
        except OSError as error:
            raise SettingsError(f"store={self.root}: {error.strerror}; expected a folder to write to") from error
        if stages and known != KEYS:
            note(
                f"store={self.root}: its stages ({', '.join(stages)}) were stored under keys of an earlier version of "
                "dnpo; they are computed again. The old folders are no longer read and can be removed"
            )

    def folder(self, stage: Stage) -> Path:
        """Where the result of a stage is, or will be."""
        return self.root / stage.name / stage.key

    def partial(self, stage: Stage) -> Path:
        """Where a stage that is not finished works."""
        return self.root / stage.name / f"{stage.key}.partial"

    def has(self, stage: Stage) -> bool:
        """Whether the result is there."""
        return (self.folder(stage) / MANIFEST).is_file()

    def get(self, stage: Stage, report: Report) -> Path:
        """The folder of the stage's result, computed if it is not there.

        Two runs that need the same stage at once compute it once: the second waits for the first.
        """
        folder = self.folder(stage)
        if self.has(stage):
            return folder
        inputs = {name: self.get(needed, report) for name, needed in stage.inputs.items()}
        for name, aid in stage.aids.items():
            try:
                inputs[name] = self.get(aid, report)
            except Declined as why:
                with suppress(OSError):  # what is not empty is an earlier run's, who may go on with it
                    self.partial(aid).rmdir()
                if str(why):
                    report.note(str(why))
        with self._lock(stage, report):
            if not self.has(stage):
                self._compute(stage, inputs, report)
        return folder

    def _compute(self, stage: Stage, inputs: Mapping[str, Path], report: Report) -> None:
        if self.folder(stage).exists():
            raise DnpoError(f"store: {self.folder(stage)} has no {MANIFEST}, so it is no finished stage; remove it")
        partial = self.partial(stage)
        partial.mkdir(parents=True, exist_ok=True)
        started, clock = datetime.now(UTC), time.monotonic()
        facts = stage.work(partial, inputs, report)
        manifest = {
            "stage": stage.name,
            "title": stage.title,
            "key": stage.key,
            "version": stage.version,
            "settings": stage.settings,
            "inputs": {name: f"{needed.name}/{needed.key}" for name, needed in stage.inputs.items()},
            "facts": facts,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - clock, 3),
        }
        write_json(partial / MANIFEST, manifest)
        partial.replace(self.folder(stage))
        self.computed.add(stage.key)

    @contextmanager
    def _lock(self, stage: Stage, report: Report) -> Iterator[None]:
        path = self.root / ".locks" / f"{stage.name}-{stage.key}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)  # an flock: the system frees it when its holder is killed
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report.note(f"another run is computing {stage.title} ({stage.key}); waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of the stage in this folder: settings, inputs, time and duration."""
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return content


def write_json(path: Path, content: Any) -> None:
    """Write JSON to a file that appears whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    aside.replace(path)


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of a folder's file names and contents; the same wherever it lies."""
    if not path.exists():
        raise FileNotFoundError(path)
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(b"" if file == path else str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
