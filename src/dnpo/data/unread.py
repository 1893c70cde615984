"""Find columns with text, so that unread ones can be reported."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

# More than one word, or two characters of a script that puts no spaces between words (Japanese, Chinese, Thai).
TEXT = "\\S\\s+\\S|[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]{2}"
_TEXT = re.compile(TEXT)


def holds_text(value: Any) -> bool:
    """Whether a value is, or contains, a text of more than one word."""
    if isinstance(value, str):
        return _TEXT.search(value) is not None
    if isinstance(value, Mapping):
        return any(map(holds_text, value.values()))
    return isinstance(value, list) and any(map(holds_text, value))


def may_hold_text(schema: "pa.Schema", names: Collection[str]) -> list[str]:
    """The given columns of an Arrow schema that have strings, and no binary values such as pictures."""
    return [name for name in names if "binary" not in str(kind := schema.field(name).type) and "string" in str(kind)]


def columns_with_text(table: "pa.Table") -> list[str]:
    """The columns of an Arrow table in which a value contains text."""
    import pyarrow.compute as pc

    def match(part: Any) -> bool:
        return bool(pc.any(pc.match_substring_regex(part, TEXT)).as_py())

    return [
        name
        for name in table.column_names
        if any(match(part) for chunk in table.column(name).chunks for part in _strings(chunk))
    ]


def _strings(array: Any) -> Iterator[Any]:
    """The arrays of strings within an Arrow array."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        yield array
    elif pa.types.is_struct(kind):
        for i in range(kind.num_fields):
            yield from _strings(array.field(i))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from _strings(pc.list_flatten(array))
