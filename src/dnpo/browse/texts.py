"""Read columns of Parquet files, search texts, and prepare values for JSON."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dnpo.escape import for_terminal
from dnpo.tables import undamaged

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHOWN = 300  # characters of a text in a list


def read_columns(path: Path, columns: Sequence[str]) -> pa.Table:
    """Read those of the columns that the file has, and verify their checksums.

    Raises:
        StoreError: the file is damaged.
    """
    # pq.read_table would bring pandas, which takes longer than reading
    with undamaged(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        known = file.schema_arrow.names
        return file.read(columns=[name for name in columns if name in known]).combine_chunks()


def numbers(table: pa.Table, name: str, default: float = math.nan) -> "NDArray[np.float32]":
    """A column of numbers or truth values; NaN where there is none, the default if the file lacks the column."""
    if name not in table.column_names:
        return np.full(len(table), default, np.float32)
    column = table.column(name).cast(pa.float32())
    found: NDArray[np.float32] = column.to_numpy(zero_copy_only=False)
    return found


def contains(column: Any, text: str) -> "NDArray[np.bool_]":
    """Whether each text of a column contains another text, ignoring case."""
    hits = pc.fill_null(pc.match_substring(column, text, ignore_case=True), False)
    found: NDArray[np.bool_] = hits.to_numpy(zero_copy_only=False)
    return found


def messages_contain(column: Any, text: str) -> "NDArray[np.bool_]":
    """Whether any message of each conversation contains a text."""
    found = np.zeros(len(column), bool)
    hits = contains(pc.struct_field(pc.list_flatten(column), "content"), text)
    found[pc.list_parent_indices(column).to_numpy()[hits]] = True
    return found


def plain(value: Any) -> float | None:
    """A number for JSON; None if it is not finite."""
    return float(value) if math.isfinite(value) else None


def visible(text: str | None) -> str:
    """A text whose control characters are visible."""
    return for_terminal(text or "")


def beginning(text: str | None) -> str:
    """The beginning of a text, for a list."""
    return visible(text if text is None or len(text) <= SHOWN else f"{text[:SHOWN]}…")


def conversation(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The messages of a conversation."""
    return [{name: visible(value) for name, value in message.items()} for message in messages]


def last_message(messages: Sequence[dict[str, str]]) -> str:
    """The beginning of the last message of a conversation."""
    return beginning(messages[-1]["content"]) if messages else ""


def page_of(rows: "NDArray[np.int64]", page: int, size: int) -> list[int]:
    """The rows on a page, counted from 1."""
    shown: list[int] = rows[(page - 1) * size : page * size].tolist()
    return shown
