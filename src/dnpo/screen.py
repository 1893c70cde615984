"""Tables on the terminal that show every text literally: markup and control characters in it have no effect."""

from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dnpo.escape import for_terminal


class ScreenTable(Table):
    """A table whose title, headings and cells are shown literally; a ``Text`` keeps its style."""

    def __init__(self, title: str | None = None, **options: Any) -> None:
        options = {"title_justify": "left", "header_style": "bold", "pad_edge": False, "box": None, **options}
        super().__init__(title=None if title is None else Text(for_terminal(title), style="table.title"), **options)

    def add_column(self, header: RenderableType = "", *given: Any, **options: Any) -> None:
        """Add a column with a literal heading."""
        super().add_column(literal(header), *given, **options)

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row of literal cells."""
        super().add_row(*map(literal, cells), **options)


def literal(cell: Any) -> Any:
    """Return a string as text without markup; anything else as it is."""
    return Text(for_terminal(cell)) if isinstance(cell, str) else cell
