"""Count unusable rows by reason, with their locations."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from dnpo.errors import DataError

BadRows = Literal["fail", "drop"]
Row = TypeVar("Row")


class RowError(DataError):
    """A row cannot be used.

    Attributes:
        reason: the problem, without the row's values, so that rows with the same problem are counted together.
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass
class Unusable:
    """Counts of rows that cannot be used.

    Attributes:
        counts: number of rows by reason.
        places: location of the first row for each reason.
        first: location, problem and expectation of the very first such row; "" if there is none.
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
        """Return the number of rows and the location of the first for each reason, as plain values."""
        return {reason: {"rows": count, "first": self.places[reason]} for reason, count in self.counts.items()}

    def refuse(self, total: int, advice: str = "") -> None:
        """Raise an error if a row cannot be used.

        Args:
            total: number of all rows.
            advice: how to continue without such rows, if possible.

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
    """Make rows from raw ones, and count those that cannot be used.

    Args:
        raw: locations and raw rows; a row that could not be parsed is a ``RowError``.
        make: makes a row, or returns None to leave it out; raises a ``RowError`` if it cannot be used.
    """
    bad = Unusable()
    return list(make_rows(raw, make, bad)), bad


def make_rows(raw: Iterable[tuple[str, Any]], make: Callable[[str, Any], Row | None], bad: Unusable) -> Iterator[Row]:
    """Make rows one by one, as :func:`read_rows` does; ``bad`` counts the rows that cannot be used."""
    for where, each in raw:
        try:
            if isinstance(each, RowError):
                raise each
            made = make(where, each)
        except RowError as error:
            bad.add(where, error)
        else:
            if made is not None:
                yield made


def has_names(raw: Mapping[Any, Any]) -> str:
    """List the names in a raw row that have a value, for messages."""
    return ", ".join(shown(name) for name, value in raw.items() if value is not None) or "nothing"


def shown(name: Any) -> str:
    """Make a name from a file safe for messages, with any characters."""
    text = str(name)
    return text if text.isprintable() else ascii(text)[1:-1]
