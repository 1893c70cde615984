"""Parse text files into raw rows, each with its location. A file's kind is found from its first bytes, not its name."""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from dnpo.data.rows import FIELDS
from dnpo.data.unusable import RowError, shown
from dnpo.errors import DataError

GZIP = b"\x1f\x8b"
KINDS = {
    b"PK\x03\x04": "a zip archive (or an Excel file)",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"PAR1": "a Parquet file (data=parquet)",
    b"ARROW1": "an Arrow file (data=arrow)",
    b"\xff\xfe": "a text in UTF-16",
    b"\xfe\xff": "a text in UTF-16",
    b"version https://git-lfs": "a pointer of Git LFS (git lfs pull fetches the file itself)",
}
SEPARATORS = (";", "\t", "|")  # in addition to the comma
BLANK = b"\xef\xbb\xbf \t\r\n"
DAMAGES = (OSError, EOFError, zlib.error)  # errors of reading a stream, such as a truncated gzip file
UTF_8 = (
    "save the file in UTF-8; if it is in Latin-1 or Windows-1252, iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW does that"
)
OBJECTS = "expected one object a line, or one list of objects"


def open_file(setting: str, file: Path) -> BinaryIO:
    """Open a file.

    Args:
        setting: the setting that names the file, such as ``data.path=rows.jsonl``, for messages.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        return file.open("rb")
    except OSError as error:
        raise DataError(f"{setting}: {error.strerror} ({file})") from error


def open_text(setting: str, file: Path) -> BinaryIO:
    """Open a text file, decompressed if it is a gzip file.

    Args:
        setting: as in :func:`open_file`.

    Raises:
        DataError: it cannot be opened, or is not a text file.
    """
    stream = open_file(setting, file)
    start = stream.read(32)
    stream.seek(0)
    for mark, kind in KINDS.items():
        if start.startswith(mark):
            stream.close()
            remedy = "; iconv -f UTF-16 -t UTF-8 FILE > NEW converts it" if "UTF-16" in kind else ""
            raise DataError(f"{file}: is {kind}; expected text in UTF-8, plain or gzip{remedy}")
    return cast(BinaryIO, gzip.GzipFile(fileobj=stream)) if start.startswith(GZIP) else stream


def parse_json(file: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Parse one object per line, or one list of objects; blank lines are skipped.

    Yields:
        Locations and raw rows; for a line that is not JSON a ``RowError``.

    Raises:
        DataError: the file is damaged, or is a single object or a broken list over several lines.
    """
    unread = _lines(file, stream)
    lines = list(_up_to_first_row(unread))
    first = _parse_line(lines[-1]) if lines else {}
    if not isinstance(first, Mapping):
        lines += unread
        whole = _parse_line(b"".join(lines))
        if isinstance(whole, list):
            yield from ((f"{file} row {i}", row) for i, row in enumerate(whole))
            return
        if isinstance(whole, Mapping):
            names = ", ".join(map(shown, whole)) or "nothing in it"
            raise DataError(f"{file}: is one object, with {names}; {OBJECTS}")
        if isinstance(first, RowError) and b"".join(lines).lstrip(BLANK).startswith(b"[") and len(lines) > 1:
            raise DataError(f"{file}: {whole}")
    for number, line in enumerate(chain(lines, unread), 1):
        if line.strip():
            yield f"{file}:{number}", _parse_line(line)


def parse_csv(file: Path, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Parse values with a header. The separator is the comma, or another one if the header has that and no comma.

    Yields:
        Locations and raw rows, whose empty cells count as absent; for a row with more or fewer cells than the header a
        ``RowError``.

    Raises:
        DataError: the file is damaged or not CSV.
    """
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    where, number = f"{file}:1", 0
    try:
        head = text.readline()
        reader = csv.reader(chain([head] if head else [], text), delimiter=_separator(head), strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            names = ", ".join(map(shown, header))
            raise DataError(f"{where}: a column name occurs twice in the header {names}")
        number = reader.line_num
        where = f"{file}:{number + 1}"
        for cells in reader:
            number = reader.line_num
            start, where = where, f"{file}:{number + 1}"  # a row begins after the end of the one before
            if len(cells) not in (0, len(header)):
                problem = f"{len(cells)} cells, but the header has {len(header)}{_doubt(header)}"
                yield start, RowError("more or fewer cells than the header", problem)
            elif cells:
                yield start, {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise DataError(f"{where}: not CSV ({error}); expected comma-separated values with a header") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 ({error.reason}), after line {number}; {UTF_8}") from error
    except DAMAGES as error:
        raise DataError(f"{file}: cannot be read to its end ({error}), after line {number}") from error


def _separator(head: str) -> str:
    """The separator: the comma, or another one if it alone fits the header better.

    Another one fits better if the header has it but no comma, or if it splits the header into at least two known names,
    and twice as many as the comma does.
    """
    cells = next(csv.reader([head]), [])
    others = [mark for mark in SEPARATORS if len(cells) == 1 and mark in cells[0]]
    if len(cells) > 1:
        known = {mark: len({*next(csv.reader([head], delimiter=mark), [])} & {*FIELDS}) for mark in (",", *SEPARATORS)}
        others = [mark for mark in SEPARATORS if known[mark] >= max(2, 2 * known[","])]
    return others[0] if len(others) == 1 else ","


def explain_separator(mark: str) -> str:
    """Advise on a header that has a comma and perhaps another separator."""
    return (
        f"If {mark!r} separates the cells, and the comma belongs to a name in the header: put that name in quotes "
        "without a comma, or save the file with commas between cells"
    )


def _doubt(header: list[str]) -> str:
    marks = [mark for mark in SEPARATORS if any(mark in name for name in header)]
    return f". {explain_separator(marks[0])}" if marks else ""


def _lines(file: Path, stream: BinaryIO) -> Iterator[bytes]:
    try:
        yield from stream
    except DAMAGES as error:
        raise DataError(f"{file}: cannot be read to its end ({error})") from error


def _up_to_first_row(lines: Iterator[bytes]) -> Iterator[bytes]:
    for line in lines:
        yield line
        if line.strip(BLANK):
            return


def _parse_line(line: bytes) -> Any:
    """Parse a line; an error is returned."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RowError("not UTF-8", f"not UTF-8 ({error.reason}); {UTF_8}")
    except (ValueError, RecursionError) as error:
        problem: object = error
        if isinstance(error, json.JSONDecodeError):
            line_number = f"line {error.lineno}, " if error.lineno > 1 else ""
            problem = f"{error.msg}, {line_number}column {error.colno}"
        return RowError("not JSON", f"not JSON ({problem}); {OBJECTS}")
