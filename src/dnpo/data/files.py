"""Rows in files: JSON lines, CSV, Parquet or Arrow."""

import csv
import glob
import io
import json
import sys
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from dnpo.data.source import RawTable, Rows
from dnpo.errors import DataError
from dnpo.settings import place
from dnpo.store import content_hash


@dataclass(frozen=True, kw_only=True)
class Files(Rows):
    """Files of one format.

    Args:
        path: a file, a folder whose files of this format are read, or a pattern such as ``rows-*.jsonl``.
    """

    suffix: ClassVar[str]

    path: str = place()

    @property
    def setting(self) -> str:
        """As messages name it."""
        return f"data.path={self.path}"

    def _contents(self) -> Mapping[str, Any]:
        return {"format": self.suffix, "content": [content_hash(file) for file in self._files()]}

    def _files(self) -> list[Path]:
        """The files in the order of their names."""
        path = Path(self.path)
        if path.is_dir():
            found = [file for file in path.glob(f"*{self.suffix}") if file.is_file()]
            if not found:
                folders = sorted(f"{inner.name}/" for inner in path.iterdir() if inner.is_dir())
                raise DataError(
                    f"{self.setting}: there is no *{self.suffix} in this folder; give a file, or a folder that has some"
                    + (f" (there is {', '.join(folders)})" if folders else "")
                )
        else:
            found = [path] if path.exists() else [Path(name) for name in glob.glob(self.path)]
        for file in found:
            _open(self.setting, file).close()
        if not found:
            raise DataError(
                f"{self.setting}: No such file; expected a file, a folder of *{self.suffix}, or a pattern such as "
                f"rows-*{self.suffix}"
            )
        return sorted(found)


@dataclass(frozen=True, kw_only=True)
class _Text(Files):
    """Files that are read row by row."""

    @abstractmethod
    def _parse(self, file: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
        """The raw rows of a file, each with where it stands."""

    def _table(self) -> RawTable:
        raw: list[tuple[str, Any]] = []
        for file in self._files():
            with _open(self.setting, file) as stream:
                raw += self._parse(file, stream)
        columns = {str(name): None for _, row in raw if isinstance(row, Mapping) for name in row}
        return RawTable(columns, len(raw), lambda drawn: [raw[i] for i in drawn])


@dataclass(frozen=True, kw_only=True)
class JsonLines(_Text):
    """One JSON object a line; blank lines are skipped."""

    suffix: ClassVar[str] = ".jsonl"

    def _parse(self, file: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                raw = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 ({error.reason})") from error
            except (ValueError, RecursionError) as error:
                problem = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise DataError(f"{where}: not JSON ({problem}); expected one object a line") from error
            yield where, raw


@dataclass(frozen=True, kw_only=True)
class Csv(_Text):
    """Comma-separated values with a header; quoted cells may hold line ends, and empty cells count as absent."""

    suffix: ClassVar[str] = ".csv"

    def _parse(self, file: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
        csv.field_size_limit(sys.maxsize)
        reader = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True)
        where = f"{file}:1"
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise DataError(f"{where}: a column name stands twice in the header {', '.join(header)}")
            where = f"{file}:{reader.line_num + 1}"
            for cells in reader:
                start, where = where, f"{file}:{reader.line_num + 1}"  # a row begins after the end of the one before
                if len(cells) not in (0, len(header)):
                    raise DataError(f"{start}: {len(cells)} cells, but the header has {len(header)}")
                if cells:
                    yield start, {name: cell or None for name, cell in zip(header, cells, strict=True)}
        except csv.Error as error:
            raise DataError(f"{where}: not CSV ({error}); expected comma-separated values with a header") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 ({error.reason}), after line {reader.line_num}") from error


@dataclass(frozen=True, kw_only=True)
class _Columns(Files):
    """Files that Arrow reads."""

    @abstractmethod
    def _open_table(self, file: Path) -> tuple[list[str], Any]:
        """The names of all columns of a file, and a table of the ones that are read."""

    def _table(self) -> RawTable:
        import pyarrow as pa

        columns: dict[str, None] = {}
        places: list[str] = []
        tables = []
        for file in self._files():
            try:
                names, part = self._open_table(file)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{file}: cannot be read as {type(self).__name__} ({error})") from error
            columns |= dict.fromkeys(names)
            tables.append(part)
            places += [f"{file} row {i}" for i in range(len(part))]
        try:
            table = pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(f"{self.setting}: its files differ in the types of their columns ({error})") from error

        def rows(drawn: Sequence[int]) -> Iterable[tuple[str, Any]]:
            return zip((places[i] for i in drawn), table.take(drawn).to_pylist(), strict=True)

        return RawTable(columns, len(table), rows)


@dataclass(frozen=True, kw_only=True)
class Parquet(_Columns):
    """Parquet files."""

    suffix: ClassVar[str] = ".parquet"

    def _open_table(self, file: Path) -> tuple[list[str], Any]:
        import pyarrow.parquet as pq

        names = pq.read_schema(file).names
        return names, pq.read_table(file, columns=self._choose_columns(names), partitioning=None)


@dataclass(frozen=True, kw_only=True)
class Arrow(_Columns):
    """Arrow files, as ``datasets.Dataset.save_to_disk`` writes them into a folder."""

    suffix: ClassVar[str] = ".arrow"

    def _open_table(self, file: Path) -> tuple[list[str], Any]:
        import pyarrow as pa

        table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
        return table.column_names, table.select(self._choose_columns(table.column_names))


def _open(setting: str, file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as error:
        raise DataError(f"{setting}: {error.strerror} ({file})") from error
