"""Rows in files: JSON lines, CSV, Parquet or Arrow."""

import glob
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, TypeVar

from dnpo.data.parsing import open_file, open_text, parse_csv, parse_json
from dnpo.data.source import RawTable, Rows
from dnpo.data.unread import columns_with_text, holds_text, may_hold_text
from dnpo.data.unusable import shown
from dnpo.errors import DataError
from dnpo.settings import place
from dnpo.store import content_hash
from dnpo.tables import GROUP

if TYPE_CHECKING:
    import pyarrow as pa

Each = TypeVar("Each")


@dataclass(frozen=True, kw_only=True)
class Files(Rows):
    """Files of one format.

    Args:
        path: a file, a folder whose files of this format are read, or a pattern such as ``rows-*.jsonl``.
    """

    suffix: ClassVar[str]
    packed: ClassVar[tuple[str, ...]] = ()  # suffixes of compressed files that are read too

    path: str = place()

    @property
    def setting(self) -> str:
        """The setting, as messages name it."""
        return f"data.path={self.path}"

    @property
    def suffixes(self) -> list[str]:
        """The suffixes of the files that are read in a folder."""
        return [self.suffix, *(self.suffix + ending for ending in self.packed)]

    def _contents(self) -> Mapping[str, Any]:
        return {"format": self.suffix, "content": [content_hash(file) for file in self._files()]}

    def _files(self) -> list[Path]:
        """The files in the order of their names."""
        path = Path(self.path)
        if path.is_dir():
            found = [file for suffix in self.suffixes for file in path.glob(f"*{suffix}") if file.is_file()]
            if not found:
                inner = sorted(path.iterdir(), key=lambda each: (each.is_file(), each.name))
                others = [each.name if each.is_file() else f"{each.name}/" for each in inner]
                there = ", ".join(map(shown, others[:5])) + (", …" if len(others) > 5 else "")
                raise DataError(
                    f"{self.setting}: there is no *{self.suffix} in this folder; give a file, or a folder that has some"
                    + (f" (there is {there})" if others else "")
                )
            packed = next((file for file in found if file.suffix == ".gz" and file.with_suffix("") in found), None)
            if packed is not None:
                raise DataError(f"{self.setting}: {packed.with_suffix('').name} exists plain and packed; remove one")
        else:
            found = [path] if path.exists() else [Path(name) for name in glob.glob(self.path)]
        if not found:
            raise DataError(
                f"{self.setting}: No such file; expected a file, a folder of *{self.suffix}, or a pattern such as "
                f"rows-*{self.suffix}"
            )
        for file in found:
            open_file(self.setting, file).close()
        return sorted(found)


@dataclass(frozen=True, kw_only=True)
class _Text(Files):
    """Files that are read row by row, plain or as gzip files."""

    packed: ClassVar[tuple[str, ...]] = (".gz",)

    @abstractmethod
    def _parse(self, file: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
        """Yield the raw rows of a file, each with its location."""

    def _table(self) -> RawTable:
        """Read the files to find their columns. The rows are read again later, since all at once would fill memory."""
        files = self._files()
        columns: dict[str, None] = {}
        texts: set[str] = set()
        total = 0
        for _, row in self._read(files):
            total += 1
            for name, value in row.items() if isinstance(row, Mapping) else ():
                columns[str(name)] = None
                if name not in texts and holds_text(value):
                    texts.add(name)
        return RawTable(columns, total, lambda drawn: _choose(self._read(files), drawn), texts.intersection)

    def _read(self, files: Iterable[Path]) -> Iterator[tuple[str, Any]]:
        for file in files:
            with open_text(self.setting, file) as stream:
                yield from self._parse(file, stream)


def _choose(rows: Iterable[Each], drawn: Sequence[int]) -> Iterator[Each]:
    """The rows with these numbers, in ascending order."""
    wanted = iter(drawn)
    number = next(wanted, None)
    for i, row in enumerate(rows):
        if i == number:
            yield row
            number = next(wanted, None)


@dataclass(frozen=True, kw_only=True)
class JsonLines(_Text):
    """One JSON object per line, or one list of objects; blank lines are skipped."""

    suffix: ClassVar[str] = ".jsonl"

    def _parse(self, file: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
        return parse_json(file, stream)


@dataclass(frozen=True, kw_only=True)
class Csv(_Text):
    """Comma-separated values with a header; quoted cells may contain line ends, and empty cells count as absent."""

    suffix: ClassVar[str] = ".csv"

    def _parse(self, file: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
        return parse_csv(file, stream)


@dataclass(frozen=True, kw_only=True)
class _Columns(Files):
    """Files that are read by Arrow."""

    @abstractmethod
    def _open_table(self, file: Path) -> tuple["pa.Schema", Callable[[list[str]], "pa.Table"]]:
        """The schema of a file, and a function that reads some of its columns."""

    def _read_file(self, file: Path) -> tuple[list[str], "pa.Table", list[str]]:
        """Return the names of all columns, a table of the columns that are read, and the unread columns with text."""
        import pyarrow as pa

        try:
            schema, read = self._open_table(file)
            names = schema.names
            if len(set(names)) < len(names):
                raise DataError(f"{file}: a column name occurs twice among {', '.join(map(shown, names))}")
            table, others = read(self._choose_columns(names)), may_hold_text(schema, self._choose_others(names))
            table.validate(full=True)  # otherwise invalid UTF-8 would be found only when it is used
            return names, table, columns_with_text(read(others)) if others else []
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise DataError(f"{file}: cannot be read as {type(self).__name__} ({error})") from error

    def _table(self) -> RawTable:
        import pyarrow as pa

        columns: dict[str, None] = {}
        files = self._files()
        tables = []
        texts: dict[str, None] = {}
        for file in files:
            names, part, others = self._read_file(file)
            columns |= dict.fromkeys(names)
            texts |= dict.fromkeys(others)
            tables.append(part)
        try:
            table = pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(f"{self.setting}: its files differ in the types of their columns ({error})") from error

        def rows(drawn: Sequence[int]) -> Iterator[tuple[str, Any]]:
            places = (f"{file} row {i}" for file, part in zip(files, tables, strict=True) for i in range(len(part)))
            raw = (row for batch in table.to_batches(GROUP) for row in batch.to_pylist())
            return _choose(zip(places, raw, strict=True), drawn)

        return RawTable(columns, len(table), rows, lambda names: [name for name in names if name in texts])


@dataclass(frozen=True, kw_only=True)
class Parquet(_Columns):
    """Parquet files."""

    suffix: ClassVar[str] = ".parquet"

    def _open_table(self, file: Path) -> tuple["pa.Schema", Callable[[list[str]], "pa.Table"]]:
        import pyarrow.parquet as pq

        return pq.read_schema(file), lambda names: pq.read_table(file, columns=names, partitioning=None)


@dataclass(frozen=True, kw_only=True)
class Arrow(_Columns):
    """Arrow files, as ``datasets.Dataset.save_to_disk`` writes them into a folder."""

    suffix: ClassVar[str] = ".arrow"

    def _open_table(self, file: Path) -> tuple["pa.Schema", Callable[[list[str]], "pa.Table"]]:
        import pyarrow as pa

        table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
        return table.schema, table.select
