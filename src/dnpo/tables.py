"""Read and write Parquet files of rows: all rows at once, or millions of rows that become objects only when needed.

A row as an object takes some kilobytes, so a million of them do not fit into memory. :class:`Rows` reads one row group
at a time, and only the columns that are asked for. :class:`Writer` writes rows as they come.

A file of rows is one table whose schema follows from the dataclass, so that empty lists and missing scores keep their
type.
"""

import dataclasses
import types
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Literal,
    Self,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

from dnpo import disk
from dnpo.errors import StoreError
from dnpo.records import Message

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from _typeshed import DataclassInstance

Row = TypeVar("Row", bound="DataclassInstance")
Each = TypeVar("Each")

GROUP = 4096  # rows in a row group, the part of a file that is read at once


def write(path: Path, rows: Sequence[Row], kind: type[Row]) -> None:
    """Write rows to a Parquet file, which is complete or does not exist."""
    import pyarrow.parquet as pq

    aside = disk.name_aside(path)
    try:
        with pq.ParquetWriter(aside, schema(kind), write_page_checksum=True) as file:
            for first in range(0, max(len(rows), 1), GROUP):
                file.write_table(to_table(rows[first : first + GROUP], kind))
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    disk.replace(aside, path)


def to_table(rows: Sequence[Row], kind: type[Row]) -> "pa.Table":
    """The Arrow table of rows."""
    import pyarrow as pa

    columns = {f.name: [getattr(row, f.name) for row in rows] for f in dataclasses.fields(kind)}
    return pa.table(columns, schema=schema(kind))


def read(path: Path, kind: type[Row]) -> list[Row]:
    """Read the rows that :func:`write` wrote.

    Raises:
        StoreError: the file is damaged.
    """
    import pyarrow.parquet as pq

    with undamaged(path):
        return [kind(**row) for row in pq.read_table(path, page_checksum_verification=True).to_pylist()]


@contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Turn Arrow's errors for a damaged file into an error that names the file.

    Raises:
        StoreError: the file is damaged.
    """
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, TypeError) as error:  # OSError: a checksum differs
        raise StoreError(f"{path}: is damaged ({error}); remove it, and the same command makes it again") from error


def read_all(paths: Iterable[Path], kind: type[Row]) -> list[Row]:
    """Read several files of rows, in the order given."""
    return [row for path in paths for row in read(path, kind)]


def schema(kind: type) -> "pa.Schema":
    """The Arrow schema of a row type, from its annotations."""
    import pyarrow as pa

    return pa.schema([(name, _arrow(hint)) for name, hint in get_type_hints(kind).items()])


def _arrow(hint: Any) -> "pa.DataType":
    import pyarrow as pa

    if hint == Message:
        return pa.struct([("role", pa.string()), ("content", pa.string())])
    if get_origin(hint) is Literal:
        return pa.string()
    if get_origin(hint) is list:
        return pa.list_(_arrow(get_args(hint)[0]))
    if get_origin(hint) in (Union, types.UnionType):
        return _arrow(next(arg for arg in get_args(hint) if arg is not type(None)))
    return {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}[hint]


# --- sequences


@dataclass(frozen=True, slots=True)
class _Group:
    """A row group.

    Attributes:
        rows: how many rows it has.
        read: reads some columns of it.
        row: reads the values of one row, if the group is in memory.
    """

    rows: int
    read: "Callable[[Sequence[str] | None], pa.Table]"
    row: Callable[[int], list[Any]] | None = None


class Rows(Sequence[Row]):
    """A sequence of rows in Parquet files or in memory; reading it in order keeps one row group at a time in memory.

    Args:
        kind: the type of a row. A field without a column gets its default, or an empty value if it has none.
        groups: the row groups.
        numbers: which rows of the groups belong to the sequence, by number; None: all.
    """

    def __init__(self, kind: type[Row], groups: Sequence[_Group], numbers: "range | np.ndarray | None" = None) -> None:
        self.kind, self._groups = kind, groups
        self._ends = list(accumulate(group.rows for group in groups))
        total = self._ends[-1] if groups else 0
        self._numbers: range | np.ndarray = range(total) if numbers is None else numbers
        self._last: tuple[int, list[Row]] = (-1, [])

    @classmethod
    def open(cls, paths: Iterable[Path], kind: type[Row], columns: Sequence[str] | None = None) -> Self:
        """The rows of several files, in the order given.

        Args:
            columns: the fields to read; None: all.
        """
        import pyarrow.parquet as pq

        groups = []
        for path in paths:
            with undamaged(path):
                found = pq.read_metadata(path)
            for number in range(found.num_row_groups):
                read = partial(_read_group, path, number, columns)
                groups.append(_Group(found.row_group(number).num_rows, read))
        return cls(kind, groups)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> "Rows[Row]": ...

    def __getitem__(self, index: int | slice) -> "Row | Rows[Row]":
        if isinstance(index, slice):
            return self._view(self._numbers[index])
        number = int(self._numbers[index])
        group = bisect_right(self._ends, number)
        at = number - self._ends[group] + self._groups[group].rows
        read_row = self._groups[group].row
        if read_row is not None:
            return self.kind(*read_row(at))
        if self._last[0] != group:
            self._last = (-1, [])  # free the memory first
            self._last = (group, _make(self._groups[group].read(None), self.kind))
        return self._last[1][at]

    def __iter__(self) -> Iterator[Row]:
        for table in self._tables(None):
            yield from _make(table, self.kind)

    def take(self, numbers: "Sequence[int] | np.ndarray") -> "Rows[Row]":
        """The rows with these numbers, in this order."""
        import numpy as np

        return self._view(np.asarray(self._numbers)[np.asarray(numbers, np.int64)])

    def values(self, name: str) -> Iterator[Any]:
        """The values of a field, row by row."""
        return (value for table in self._tables([name]) for value in _values(table.column(name)))

    def column(self, name: str) -> list[Any]:
        """The values of a field in all rows."""
        return list(self.values(name))

    def lengths(self, name: str) -> "np.ndarray":
        """The lengths of a list in all rows."""
        import numpy as np
        import pyarrow.compute as pc

        parts = [pc.list_value_length(table.column(name)).to_numpy() for table in self._tables([name])]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def load(self, columns: Sequence[str]) -> "Rows[Row]":
        """The same rows in memory, with these fields alone; single rows are read fast, in any order."""

        def keep(table: "pa.Table") -> _Group:
            read = _reader(table, self.kind)
            return _Group(len(table), lambda names: table if names is None else table.select(names), read)

        return Rows(self.kind, [keep(_narrow(table)) for table in self._tables(columns)])

    def _view(self, numbers: "range | np.ndarray") -> "Rows[Row]":
        return Rows(self.kind, self._groups, numbers)

    def _tables(self, columns: Sequence[str] | None) -> "Iterator[pa.Table]":
        """The rows as Arrow tables, each from one row group."""
        import numpy as np

        if not len(self):
            return
        if isinstance(self._numbers, range) and self._numbers.step == 1:
            for group, end in zip(self._groups, self._ends, strict=True):
                first = max(self._numbers.start - (end - group.rows), 0)
                last = min(self._numbers.stop - (end - group.rows), group.rows)
                if first < last:
                    yield group.read(columns).slice(first, last - first)
            return
        numbers = np.asarray(self._numbers)
        where = np.searchsorted(self._ends, numbers, side="right")
        borders = [0, *(np.flatnonzero(np.diff(where)) + 1).tolist(), len(numbers)]
        for first, last in pairwise(borders):
            group = self._groups[where[first]]
            yield group.read(columns).take(numbers[first:last] - (self._ends[where[first]] - group.rows))


def _read_group(path: Path, number: int, among: Sequence[str] | None, columns: Sequence[str] | None) -> "pa.Table":
    """Read a row group, and verify the checksums of its pages.

    Args:
        among: the fields that the sequence has.
        columns: the fields to read now; None: all of ``among``.
    """
    import pyarrow.parquet as pq

    with undamaged(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        names = [name for name in columns or among or file.schema_arrow.names if name in file.schema_arrow.names]
        return file.read_row_group(number, columns=names)


def _narrow(table: "pa.Table") -> "pa.Table":
    """The table with token ids of 32 bits."""
    import pyarrow as pa

    wide, short = pa.list_(pa.int64()), pa.list_(pa.int32())
    return table.cast(pa.schema([field.with_type(short) if field.type == wide else field for field in table.schema]))


def _make(table: "pa.Table", kind: type[Row]) -> list[Row]:
    """Make the rows of a table."""
    known = set(table.column_names)
    columns = [
        _values(table.column(name)) if name in known else [empty() for _ in range(len(table))]
        for name, empty in _empty(kind)
    ]
    return [kind(*values) for values in zip(*columns, strict=True)]


def _reader(table: "pa.Table", kind: type[Row]) -> Callable[[int], list[Any]]:
    """Make a function that returns the values of a table's row, given its number; values as in :func:`_make`."""
    known = set(table.column_names)
    fields = [_field_reader(table.column(name) if name in known else None, empty) for name, empty in _empty(kind)]
    return lambda number: [read(number) for read in fields]


def _field_reader(column: "pa.ChunkedArray | None", empty: Callable[[], Any]) -> Callable[[int], Any]:
    """Make a function that returns a column's value, given the row's number; without a column, an empty value.

    Values stay in Arrow's memory. Lists of integers are read through NumPy, an order of magnitude faster than by Arrow.
    """
    import pyarrow as pa

    if column is None:
        return lambda number: empty()
    array: Any = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    whole = not array.null_count and pa.types.is_list(array.type) and not array.values.null_count
    if whole and pa.types.is_integer(array.type.value_type):
        elements, borders = array.values.to_numpy(), array.offsets.to_numpy()
        return lambda number: elements[borders[number] : borders[number + 1]].tolist()
    return lambda number: array[number].as_py()


@cache
def _empty(kind: type) -> list[tuple[str, Callable[[], Any]]]:
    """For each field of a row, a function that makes a missing value: the default, or an empty value of its type."""
    import pyarrow as pa

    made: list[tuple[str, Callable[[], Any]]] = []
    for field, column in zip(dataclasses.fields(kind), schema(kind), strict=True):
        value: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            made.append((field.name, field.default_factory))
            continue
        if value is dataclasses.MISSING:
            value = "" if pa.types.is_string(column.type) else False if pa.types.is_boolean(column.type) else None
        if value is None and pa.types.is_list(column.type):
            made.append((field.name, list))
        else:
            made.append((field.name, partial(lambda value: value, value)))
    return made


def _values(column: "pa.ChunkedArray") -> list[Any]:
    """The values of a column. Arrow's own way makes an object of every element first and takes ten times as long."""
    return [value for chunk in column.chunks for value in _plain(chunk)]


def _plain(array: Any) -> list[Any]:
    import pyarrow as pa

    kind = array.type
    if array.null_count:
        return list(array.to_pylist())
    if pa.types.is_list(kind):
        elements, borders = _plain(array.flatten()), array.offsets.to_numpy()
        starts = (borders - borders[0]).tolist()
        return [elements[first:end] for first, end in pairwise(starts)]
    if pa.types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        return [
            dict(zip(names, values, strict=True))
            for values in zip(*(_plain(array.field(i)) for i in range(kind.num_fields)), strict=True)
        ]
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return list(array.to_numpy().tolist())
    return list(array.to_pylist())


class Writer(Generic[Row]):
    """Writes rows into a Parquet file as they arrive. The file appears only when the block ends without an error."""

    def __init__(self, path: Path, kind: type[Row]) -> None:
        self.path, self.kind = path, kind
        self._rows: list[Row] = []

    def __enter__(self) -> Self:
        import pyarrow.parquet as pq

        self._aside = disk.name_aside(self.path)
        self._file = pq.ParquetWriter(self._aside, schema(self.kind), write_page_checksum=True)
        return self

    def add(self, rows: Iterable[Row]) -> None:
        """Write rows."""
        self._rows += rows
        while len(self._rows) >= GROUP:
            self._write()

    def copy(self, path: Path) -> None:
        """Write the rows of another file."""
        self._write()
        for table in Rows.open([path], self.kind)._tables(None):
            self._file.write_table(table)

    def _write(self) -> None:
        if self._rows:
            self._file.write_table(to_table(self._rows[:GROUP], self.kind))
            del self._rows[:GROUP]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._write()
        self._file.close()
        if kind is None:
            disk.replace(self._aside, self.path)
        else:
            self._aside.unlink(missing_ok=True)


class Collector(Generic[Row]):
    """Keeps rows in memory as compressed Parquet, which takes a tenth of the memory of objects."""

    def __init__(self, kind: type[Row]) -> None:
        self.kind = kind
        self._rows: list[Row] = []
        self._groups: list[_Group] = []

    def add(self, row: Row) -> None:
        """Keep a row."""
        self._rows.append(row)
        if len(self._rows) == GROUP:
            self._pack()

    def finish(self) -> Rows[Row]:
        """All rows, in the order in which they were added."""
        if self._rows:
            self._pack()
        return Rows(self.kind, self._groups)

    def _pack(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        packed = pa.BufferOutputStream()
        pq.write_table(to_table(self._rows, self.kind), packed, compression="zstd")
        self._groups.append(_Group(len(self._rows), partial(_unpack, packed.getvalue())))
        self._rows = []


def _unpack(packed: "pa.Buffer", columns: Sequence[str] | None) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.read_table(pa.BufferReader(packed), columns=columns)


class Made(Sequence[Each]):
    """A sequence whose items are made when they are read.

    Args:
        count: number of items.
        make: makes the item with a given number.
    """

    def __init__(self, count: int, make: Callable[[int], Each]) -> None:
        self._numbers, self._make = range(count), make

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Each: ...

    @overload
    def __getitem__(self, index: slice) -> list[Each]: ...

    def __getitem__(self, index: int | slice) -> Each | list[Each]:
        if isinstance(index, slice):
            return [self._make(i) for i in self._numbers[index]]
        return self._make(self._numbers[index])


def take(rows: Sequence[Each], numbers: "Sequence[int] | np.ndarray") -> Sequence[Each]:
    """The rows with these numbers, in this order."""
    if isinstance(rows, Rows):
        return rows.take(numbers)
    return [rows[i] for i in numbers]


def values(rows: Sequence[Any], name: str) -> Iterator[Any]:
    """The values of a field, row by row."""
    return rows.values(name) if isinstance(rows, Rows) else (getattr(row, name) for row in rows)


def column(rows: Sequence[Any], name: str) -> list[Any]:
    """The values of a field in all rows."""
    return list(values(rows, name))


def lengths(rows: Sequence[Any], name: str) -> list[int]:
    """The lengths of a list in all rows."""
    return list(rows.lengths(name).tolist()) if isinstance(rows, Rows) else [len(getattr(row, name)) for row in rows]


def with_ids(rows: Sequence[Each], ids: Collection[str]) -> Sequence[Each]:
    """The rows with one of these ids."""
    return take(rows, [i for i, id in enumerate(column(rows, "id")) if id in ids])


def in_parts(rows: Iterable[Each], size: int) -> Iterator[list[Each]]:
    """Cut rows into lists of at most this many."""
    left = iter(rows)
    while part := list(islice(left, size)):
        yield part
