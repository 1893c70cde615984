"""Make the rows of a stage shard by shard: memory holds one shard, and a killed run loses at most one."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dnpo.evaluate import Held
from dnpo.records import Prompt, Response, write
from dnpo.store import Report, write_json
from dnpo.tables import Rows, Writer, column, in_parts

SIZE = 4096  # prompts in a shard

Part = TypeVar("Part")
Facts = dict[str, Any]
Made = tuple[Mapping[str, Sequence[Any]], Facts]


class Shards:
    """The shards of one file, or of several that belong together. Once all are made, they become one file each.

    Until then they lie in ``shards/NAME``. A shard has a file with its facts, which is written last. What says that all
    are made is a hidden file, which the store removes when it closes the folder.

    Args:
        folder: the stage's folder.
        name: the name of the shards, which differs from others in the folder.
        kinds: the types of rows, by the names of the files.
    """

    def __init__(self, folder: Path, name: str, kinds: Mapping[str, type]) -> None:
        self.folder, self.kinds = folder, kinds
        self._shards, self._all = folder / "shards" / name, folder / f".{name}.json"

    @property
    def done(self) -> int:
        """The number of shards that an earlier run made."""
        return len(self._read_all() if self._all.is_file() else list(self._shards.glob("*.json")))

    def make(self, parts: Iterable[Part], work: Callable[[Part], Made]) -> list[Facts]:
        """Make the shards that are not there, join them, and return the facts of all.

        Args:
            parts: what each shard is made of; looked at only if some shard is missing.
            work: makes the rows of a shard, by file, and its facts, which must be plain values.
        """
        if not self._all.is_file():
            self._shards.mkdir(parents=True, exist_ok=True)
            found = [self._make(number, part, work) for number, part in enumerate(parts)]
            for name, kind in self.kinds.items():
                self._join(self.folder / f"{name}.parquet", kind, len(found))
            write_json(self._all, found)
        shutil.rmtree(self._shards, ignore_errors=True)
        if self._shards.parent.is_dir() and not any(self._shards.parent.iterdir()):
            self._shards.parent.rmdir()
        return self._read_all()

    def discard(self) -> None:
        """Remove the joined files, so that all shards are made again."""
        self._all.unlink()
        for name in self.kinds:
            (self.folder / f"{name}.parquet").unlink()

    def _make(self, number: int, part: Part, work: Callable[[Part], Made]) -> Facts:
        path = self._shards / f"{number:05d}.json"
        if not path.is_file():
            rows, facts = work(part)
            for name, kind in self.kinds.items():
                write(self._shards / f"{number:05d}-{name}.parquet", rows[name], kind)
            write_json(path, facts)
        found: Facts = json.loads(path.read_text())
        return found

    def _join(self, path: Path, kind: type, count: int) -> None:
        writer: Writer[Any]
        with Writer(path, kind) as writer:
            for number in range(count):
                writer.copy(self._shards / f"{number:05d}-{path.name}")

    def _read_all(self) -> list[Facts]:
        found: list[Facts] = json.loads(self._all.read_text())
        return found


class Candidates(NamedTuple):
    """Prompts of a shard, with what belongs to them.

    Attributes:
        held: the prompts, with the human responses.
        others: of each further sequence the rows with the ids of these prompts.
    """

    held: Held
    others: list[list[Any]]

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The prompts."""
        return self.held.prompts

    @property
    def human(self) -> Sequence[Response]:
        """The human responses."""
        return self.held.human


def divide(train: Held, size: int, *others: Iterable[Any]) -> Iterator[Candidates]:
    """Cut prompts into shards, each with the human responses and with the rows of other sequences.

    Args:
        size: prompts in a shard.
        others: rows with the ids of prompts, in the order of the prompts.

    Raises:
        ValueError: rows of another sequence are in another order, or have no prompt.
    """
    rest = [_Following(rows) for rows in others]
    for prompts, human in zip(in_parts(train.prompts, size), in_parts(train.human, size), strict=True):
        ids = {prompt.id for prompt in prompts}
        yield Candidates(Held(prompts, human), [following.up_to(ids) for following in rest])
    for following in rest:
        if following.next is not None:
            raise ValueError(f"{following.next.id}: its row does not follow the order of the prompts")


class _Following:
    """Rows in the order of prompts, handed out shard by shard."""

    def __init__(self, rows: Iterable[Any]) -> None:
        self._rows = iter(rows)
        self.next = next(self._rows, None)

    def up_to(self, ids: set[str]) -> list[Any]:
        """The next rows, as long as they have one of these ids."""
        found = []
        while self.next is not None and self.next.id in ids:
            found.append(self.next)
            self.next = next(self._rows, None)
        return found


class Portion:
    """Reports the progress of a shard as a part of the stage's.

    Args:
        report: the stage's.
        rows: the number of rows in the shard, in the stage's unit.
    """

    def __init__(self, report: Report, rows: int) -> None:
        self.report, self.rows = report, rows
        self._total = self._done = self._told = 0

    def begin(self, total: int, unit: str, done: int = 0) -> None:
        """Take the shard's total."""
        self._total = total
        self.advance(done)

    def advance(self, amount: int = 1) -> None:
        """Pass on a share of the rows."""
        self._done += amount
        told = self.rows * self._done // max(self._total, 1)
        self.report.advance(told - self._told)
        self._told = told

    def note(self, text: str) -> None:
        """Pass it on."""
        self.report.note(text)

    def status(self, text: str) -> None:
        """Pass it on."""
        self.report.status(text)

    def steps(self, rows: list[dict[str, float]]) -> None:
        """Pass them on."""
        self.report.steps(rows)


def split_by_source(rows: Rows[Any], source: str) -> tuple[Rows[Any], Rows[Any]]:
    """The rows of a source, and those of others."""
    sources = column(rows, "source")
    own = [i for i, each in enumerate(sources) if each == source]
    return rows.take(own), rows.take([i for i, each in enumerate(sources) if each != source])
