"""The base class of sources that read users' rows: columns, sampling, splits and duplicates.

:mod:`dnpo.data.rows` defines the forms of rows. Rows that are not drawn are not checked.
"""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

from dnpo.data import SPLITS, LongResponses
from dnpo.data.distinct import remove_duplicates
from dnpo.data.forms import NO_ROLES, plain_row
from dnpo.data.parsing import SEPARATORS, explain_separator
from dnpo.data.rows import CONVERSATIONS, FIELDS, FORMS, PAIRED, SCORES, Field, Turns, check_rows
from dnpo.data.turns import UNKNOWN_ROLE, is_blank, read_text
from dnpo.data.unusable import BadRows, RowError, shown
from dnpo.errors import DataError, SettingsError
from dnpo.records import Prompt
from dnpo.seeding import derive
from dnpo.settings import Count, Fraction, Natural, nearest

Role = Literal["system", "user", "assistant"]
SIDES = ("prompt", "response", "chosen", "rejected")  # fields that must have different columns
VERSION = 4  # part of stage keys; must be raised when a change of the code gives other rows for the same files


class RawTable(NamedTuple):
    """Raw rows of a source.

    Attributes:
        columns: the names of the columns.
        total: the number of rows.
        rows: reads some rows by number, each with its location.
        texts: returns the columns, among the given ones, that contain text.
    """

    columns: Collection[str]
    total: int
    rows: Callable[[Sequence[int]], Iterable[tuple[str, Any]]]
    texts: Callable[[Collection[str]], Collection[str]]


@dataclass(frozen=True, kw_only=True)
class Rows(ABC):
    """The base class of sources that read users' rows.

    Args:
        columns: the columns of fields that have other names in the data, such as ``{prompt: instruction}``; a list of
            columns is joined; with null, the column of the field's name is not read.
        join: text between the parts of a list of columns; parts without text are left out.
        bad_rows: ``fail`` if a row cannot be used, or ``drop`` such rows and count them.
        turns: how to read ``messages``: ``first`` takes the first user turn and its answer; ``all`` takes the last
            answer, with all turns before it as its prompt.
        roles: the usual names of unknown roles, such as ``{narrator: user}``.
        sample: number of rows to draw; 0 takes all.
        holdout: share of the rows held out, half for validation and half for test, by a hash of the id.
        near_duplicates: remove rows whose prompt resembles an earlier or a held-out row's at least this much, by the
            Jaccard index of their sets of three successive words. System turns, and sequences that many prompts have,
            do not count. 0 removes equal prompts only.
        seed: seed of the sample.
        max_prompt_tokens: longer prompts are dropped.
        max_response_tokens: maximum length of responses.
        long_responses: ``cut`` cuts longer human responses as samples are cut, ``drop`` drops their rows.

    Raises:
        SettingsError: the columns of a field are not valid, or belong to another field too.
    """

    drawn_with_replacement: ClassVar[bool] = False

    columns: dict[Field, str | list[str] | None] | None = None
    join: str = "\n\n"
    bad_rows: BadRows = "fail"
    turns: Turns = "first"
    roles: dict[str, Role] | None = None
    sample: Natural = 0
    holdout: Fraction = 0.1
    near_duplicates: Fraction = 0.9
    seed: Natural = 0
    max_prompt_tokens: Count
    max_response_tokens: Count
    long_responses: LongResponses = "cut"

    @property
    @abstractmethod
    def setting(self) -> str:
        """The setting that locates the rows, as messages name it, such as ``data.path=…``."""

    def __post_init__(self) -> None:
        for field, column in (self.columns or {}).items():
            if column == [] or (field == "messages" and isinstance(column, list)):
                several = "" if field == "messages" else " or several"
                raise SettingsError(f"columns.{field}={column}: expected one column{several}, or null")
            if isinstance(column, list) and len({*column}) < len(column):
                raise SettingsError(f"columns.{field}={column}: names a column twice, whose text would be doubled")
        sides = {field: column for field, column in (self.columns or {}).items() if field in SIDES and column}
        for field, column in sides.items():
            other = next((name for name, its in sides.items() if name != field and its == column), None)
            if other is not None:
                raise SettingsError(f"columns.{field}={column}: is also the column of {other}; expected another")

    @property
    def _columns(self) -> dict[Field, list[str]]:
        """The columns of each field that is mapped."""
        named = dict(self.columns or {})
        return {ours: [] if at is None else [at] if isinstance(at, str) else at for ours, at in named.items()}

    @property
    def _hidden(self) -> set[str]:
        """Columns that are not read as the field of their name, since that field is mapped to another column.

        If columns are given for one form of row, the columns of other forms are hidden too.
        """
        mapped = self._columns
        named = {field for field, columns in mapped.items() if columns}
        hidden = {*mapped, *(column for columns in mapped.values() for column in columns)}
        if "messages" in mapped or {"prompt", "response", "chosen"} & named:
            hidden |= {*CONVERSATIONS}
        if "messages" in named:
            hidden |= {*SIDES}
        if "chosen" in named:
            hidden |= {"response"}
        elif {"response", "messages"} & named:
            hidden |= {*PAIRED}
        for side, names in SCORES.items():
            if f"{side}_score" in mapped:
                hidden |= {*names}
        if "id" in mapped and not mapped["id"]:
            hidden |= {"prompt_id"}
        return hidden

    @abstractmethod
    def _contents(self) -> Mapping[str, Any]:
        """The values that determine the rows before any are drawn."""

    @abstractmethod
    def _table(self) -> RawTable:
        """The rows that :meth:`_draw` draws from."""

    def identity(self) -> Mapping[str, Any]:
        """The values that decide the rows; if all rows are taken, the seed is not among them."""
        return {
            **self._contents(),
            "rows": VERSION,
            "columns": dict(self.columns or {}),
            "turns": self.turns,
            "sample": self.sample,
            "holdout": self.holdout,
            "near_duplicates": self.near_duplicates,
            **({"seed": self.seed} if self.sample else {}),
            **({"join": self.join} if any(len(columns) > 1 for columns in self._columns.values()) else {}),
            **({"bad_rows": self.bad_rows} if self.bad_rows != "fail" else {}),
            **({"roles": dict(self.roles)} if self.roles else {}),
        }

    def read(self) -> tuple[dict[str, Sequence[Prompt]], dict[str, Any]]:
        """Return the rows by split, and the numbers of rows and of duplicates removed.

        Raises:
            DataError: there are no rows or fewer than ``sample``, a row cannot be used, or a split gets no rows.
        """
        rows, facts = self._by_split
        return dict(rows), dict(facts)

    @cached_property
    def _by_split(self) -> tuple[dict[str, Sequence[Prompt]], dict[str, Any]]:
        """Split the rows by their ids, so that adding rows moves none to another split."""
        table = self._table()
        drawn = self._draw(table.total)
        self._check_columns(table.columns)
        raw_rows = ((where, self._rename(raw)) for where, raw in table.rows(drawn))
        prompts, repeated, bad = check_rows(raw_rows, self.turns)
        if self.bad_rows == "fail":
            unknown = any(reason.endswith(UNKNOWN_ROLE.format("")) for reason in bad.counts)
            mapping = "data.roles='{NAME: user}' (or assistant, system) names such a role; " if unknown else ""
            bad.refuse(len(drawn), f"{mapping}data.bad_rows=drop leaves out rows that cannot be used")
        if not prompts:
            bad.refuse(len(drawn))
        numbers: dict[str, list[int]] = {split: [] for split in SPLITS}
        for number, id in enumerate(prompts.values("id")):
            place = _fraction(id)
            held = "validation" if place < self.holdout / 2 else "test"
            numbers[held if place < self.holdout else "train"].append(number)
        split_rows = {split: prompts.take(some) for split, some in numbers.items()}
        fell = [f"{len(some):,} into {split}" for split, some in numbers.items()]
        rows, removed, examples = remove_duplicates(split_rows, self.near_duplicates)
        lost = sum(removed.values())
        cause = f"data.near_duplicates={self.near_duplicates}"
        such = f", as {'; '.join(examples)}" if examples else ""
        unread = sorted(map(shown, table.texts(self._choose_others(table.columns))))
        for split, left in rows.items():
            if not left:
                raise DataError(
                    f"data.holdout={self.holdout}: none of the {len(prompts):,} rows is left for {split}. A hash of "
                    f"its id decides a row's split: here {', '.join(fell)}. Change data.holdout, or take more rows"
                    + (f" ({cause} removed {lost:,} of these{such})" if lost else "")
                    + (f". {', '.join(unread)}: unread text; data.columns may join it" if unread else "")
                )
        sizes = {f"{split}_rows": len(some) for split, some in rows.items()}
        return rows, {
            "removed": {"repeated": repeated, **removed},
            "examples": examples,
            **({"unusable": bad.facts()} if bad.counts else {}),
            "unread": unread,
            **sizes,
        }

    def _check_columns(self, columns: Collection[str]) -> None:
        for ours, theirs in self._columns.items():
            for column in theirs:
                if column not in columns:
                    near = nearest(column, map(shown, columns))
                    raise DataError(f"data.columns.{ours}={column}: there is no such column in {self.setting}.{near}")
        names = ({*columns} - self._hidden) | {ours for ours, theirs in self._columns.items() if theirs}
        if columns and not ({*CONVERSATIONS, "chosen"} & names or {"prompt", "response"} <= names):
            example = "{prompt: …, response: …}"
            if {"instruction", "output"} <= names:
                example = (
                    f"{{prompt: {'[instruction, input]' if 'input' in names else 'instruction'}, response: output}}"
                )
            marks = [mark for mark in SEPARATORS if any(mark in name for name in columns)]
            doubt = f". {explain_separator(marks[0])}" if len(columns) > 1 and marks else ""
            raise DataError(
                f"{self.setting}: it has the columns {', '.join(map(shown, columns))}; {FORMS}. If they have other "
                f"names, give data.columns='{example}'{doubt}"
            )

    def _choose_columns(self, columns: Iterable[str]) -> list[str]:
        """The columns that are read."""
        wanted = {column for columns in self._columns.values() for column in columns} | ({*FIELDS} - self._hidden)
        return [name for name in columns if name in wanted]

    def _choose_others(self, columns: Collection[str]) -> list[str]:
        """The unread columns, except those left out on purpose: fields set to null, and an unused ``rejected``."""
        unplugged = {field for field, columns in self._columns.items() if not columns}
        read = {*self._choose_columns(columns), *unplugged, "rejected"}
        return [name for name in columns if name not in read]

    def _rename(self, raw: Any) -> Any:
        """Rename a raw row's columns to the names of their fields, and bring its turns into one form."""
        roles = {name.strip().lower(): role for name, role in (self.roles or NO_ROLES).items()}
        if not (self._columns and isinstance(raw, Mapping)):
            return plain_row(raw, roles)
        kept = {name: value for name, value in raw.items() if name not in self._hidden}
        try:
            return plain_row(kept | {ours: self._value(raw, theirs) for ours, theirs in self._columns.items()}, roles)
        except RowError as error:
            return error

    def _value(self, raw: Mapping[str, Any], columns: Sequence[str]) -> Any:
        """The value of a field: its column's value, or the joined texts of several columns."""
        if len(columns) < 2:
            return raw.get(columns[0]) if columns else None
        texts = []
        for column in columns:
            value = raw.get(column)
            if isinstance(value, int) and not isinstance(value, bool):
                value = str(value)
            if value is not None:
                texts.append(read_text(column, value, empty=True))
        return self.join.join(text for text in texts if not is_blank(text)) or None

    def _draw(self, total: int) -> Sequence[int]:
        """Draw the numbers of the rows to take, in ascending order."""
        if not total:
            raise DataError(f"{self.setting}: there are no rows in it; {FORMS}")
        if self.sample > total:
            raise DataError(f"data.sample={self.sample}: more than the {total:,} rows in {self.setting}; 0 takes all")
        if not self.sample:
            return range(total)
        return sorted(random.Random(derive(self.seed, "sample")).sample(range(total), self.sample))


def _fraction(name: str) -> float:
    """Map an id to a fixed number in [0, 1)."""
    return (int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 11) / 2**53
