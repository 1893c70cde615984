"""A Markdown page with blocks that commands write, each between two comments.

For example ``<!-- claims -->`` and ``<!-- end of claims -->``.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from dnpo.errors import SettingsError


def marks(block: str) -> tuple[str, str]:
    """The comments around a block of a page."""
    return f"<!-- {block} -->", f"<!-- end of {block} -->"


def expect(path: Path, blocks: Collection[str]) -> None:
    """Check that a page has a place for each of the blocks.

    Raises:
        SettingsError: it cannot be read, or does not have both marks of a block.
    """
    text = _read(path)
    for block in blocks:
        _split(path, text, block)


def content(path: Path, block: str) -> str:
    """What a page has between the marks of a block; "" if it does not have both marks.

    Raises:
        SettingsError: the page cannot be read.
    """
    text = _read(path)
    first, last = marks(block)
    return text.partition(first)[2].partition(last)[0].strip() if last in text.partition(first)[2] else ""


def write(path: Path, contents: Mapping[str, str]) -> None:
    """Replace what a page has between the marks of each block, as the page is now.

    Raises:
        SettingsError: it cannot be read, or does not have both marks of a block.
    """
    text = _read(path)
    for block, written in contents.items():
        before, after = _split(path, text, block)
        first, last = marks(block)
        text = f"{before}{first}\n\n{written}\n{last}{after}"
    path.write_text(text, encoding="utf-8")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SettingsError(f"page={path}: cannot be read ({error})") from error


def _split(path: Path, text: str, block: str) -> tuple[str, str]:
    """What is before and after a block."""
    before, first, rest = text.partition(marks(block)[0])
    _, last, after = rest.partition(marks(block)[1])
    if not (first and last):
        raise SettingsError(f"page={path}: expected a line {marks(block)[0]} and, below it, {marks(block)[1]}")
    return before, after
