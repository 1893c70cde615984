"""Rows that cannot be used: each is named by its place, and all are counted by reason."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from dnpo.errors import DataError

BadRows = Literal["fail", "drop"]
Row = TypeVar("Row")


class RowError(DataError):
    """A row cannot be used.

    Attributes:
        reason: what is wrong, without the row's own values, so that rows with the same fault count together.
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass
class Unusable:
    """How many rows cannot be used, by reason.

    Attributes:
        counts: rows by reason.
        places: of each reason the place of its first row.
        first: the first of all such rows: its place, what is wrong and what was expected; "" if there are none.
    """

    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    first: str = ""

    def add(self, where: str, error: RowError) -> None:
        """Count a row."""
        self.counts[error.reason] = self.counts.get(error.reason, 0) + 1
        self.places.setdefault(error.reason, where)
        self.first = self.first or f"{where}: {error}"

    def facts(self) -> dict[str, Any]:
        """Return for each reason how many rows there are and where the first is, as plain values."""
        return {reason: {"rows": count, "first": self.places[reason]} for reason, count in self.counts.items()}

    def refuse(self, total: int, advice: str = "") -> None:
        """Raise an error if a row cannot be used.

        Args:
            total: how many rows there are.
            advice: how to go on without such rows, if that is possible.

        Raises:
            DataError: names the first such row, and counts them all by reason.
        """
        bad = sum(self.counts.values())
        if not bad:
            return
        lines = [self.first]
        if bad > 1:
            lines += [f"{bad:,} of {total:,} rows cannot be used:", *list_reasons(self.facts())]
        raise DataError("\n       ".join([*lines, advice] if advice else lines))


def list_reasons(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Describe each reason, the commonest first, such as ``12: response is empty (the first is rows.jsonl:7)``."""
    ordered = sorted(facts.items(), key=lambda each: -each[1]["rows"])
    return [f"{some['rows']:,}: {reason} (the first is {some['first']})" for reason, some in ordered]


def read_rows(raw: Iterable[tuple[str, Any]], make: Callable[[str, Any], Row | None]) -> tuple[list[Row], Unusable]:
    """Make rows of raw ones, each with its place, and count those that cannot be used.

    Args:
        raw: places and raw rows; a ``RowError`` stands for a row that could not even be parsed.
        make: makes a row, or None where it is to be left out; raises a ``RowError`` if that is impossible.
    """
    rows: list[Row] = []
    bad = Unusable()
    for where, each in raw:
        try:
            if isinstance(each, RowError):
                raise each
            made = make(where, each)
        except RowError as error:
            bad.add(where, error)
        else:
            if made is not None:
                rows.append(made)
    return rows, bad


def has_names(raw: Mapping[Any, Any]) -> str:
    """List the names in a raw row that have a value, for messages."""
    return ", ".join(shown(name) for name, value in raw.items() if value is not None) or "nothing"


def shown(name: Any) -> str:
    """Return a name from a file as messages can show it, whatever characters it has."""
    text = str(name)
    return text if text.isprintable() else ascii(text)[1:-1]
