"""Rows that people have judged: a prompt, two responses, and a label that says which one is better.

JSON lines with ``prompt`` (text, or a list of turns with ``role`` and ``content``), ``a``, ``b`` and ``label`` (``A``,
``B`` or ``tie``). A row may have ``votes``, one label for each person, with the same persons in the same order in every
row; an ``id``; and a verifiable ``answer``, for judges that need one. Other fields are ignored.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnpo.data.parsing import open_text, parse_json
from dnpo.data.turns import is_parts, read_text, read_turn
from dnpo.data.unusable import RowError, has_names, read_rows
from dnpo.errors import DataError
from dnpo.judges.agreement.stats import CATEGORIES
from dnpo.records import Message, Prompt
from dnpo.store import content_hash

EXPECTED = "expected one object a line with prompt, a, b and label (A, B or tie)"
_LABELS = {name.lower(): number for number, name in enumerate(CATEGORIES)}


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """One row. Labels are indices of :data:`~dnpo.judges.agreement.stats.CATEGORIES`.

    Attributes:
        prompt: with ``a`` as its human response.
        b: the text of the other response.
        label: the common label of all persons.
        votes: each person's label; empty if only the common one is known.
    """

    prompt: Prompt
    b: str
    label: int
    votes: tuple[int, ...]


class Labelled:
    """A file of labelled rows.

    Args:
        path: the file, in UTF-8; blank lines are skipped.
    """

    def __init__(self, *, path: str) -> None:
        self.path = Path(path)

    def content(self) -> str:
        """A hash of the file's content, which determines the rows; the path does not.

        Raises:
            DataError: there is no such file.
        """
        self._check()
        return content_hash(self.path)

    def _check(self) -> None:
        if not self.path.is_file():
            raise DataError(f"data={self.path}: there is no such file; {EXPECTED}")

    def read(self) -> list[LabelledRow]:
        """The rows.

        Raises:
            DataError: there are none, or some cannot be used; names the file and the line, and counts them by reason.
        """
        self._check()
        seen: dict[str, str] = {}
        votes: list[int] = []

        def make(where: str, raw: Any) -> LabelledRow:
            row = _read_row(where, raw)
            if row.prompt.id in seen:
                text = f"{seen[row.prompt.id]} has the same id {row.prompt.id!r}; expected another"
                raise RowError("the id of another row", text)
            seen[row.prompt.id] = where
            votes.append(len(row.votes))
            if votes[0] != votes[-1]:
                raise RowError(
                    "another number of votes",
                    f"{votes[-1]} votes, but {votes[0]} in the rows before; expected the same number in every row, in "
                    "the same order of persons, or votes in none",
                )
            return row

        with open_text(f"data={self.path}", self.path) as stream:
            raw = list(parse_json(self.path, stream))
        rows, bad = read_rows(raw, make)
        bad.refuse(len(raw))
        if not rows:
            raise DataError(f"data={self.path}: there are no rows in it; {EXPECTED}")
        return rows


def _read_row(where: str, raw: Any) -> LabelledRow:
    if not isinstance(raw, Mapping):
        raise RowError("is not an object", f"{reprlib.repr(raw)} is not an object; {EXPECTED}")
    row = {field: value for field, value in raw.items() if value is not None}
    for field in ("prompt", "a", "b", "label"):
        if field not in row:
            raise RowError(f"no {field}", f"no {field}; {EXPECTED} (the row has {has_names(raw)})")
    votes = row.get("votes", [])
    if not isinstance(votes, list):
        text = f"votes is {reprlib.repr(votes)}; expected a list of A, B or tie, one a person"
        raise RowError("votes is not a list", text)
    prompt = Prompt(
        id=read_text("id", str(row["id"])) if "id" in row else f"line {where.replace(' row ', ':').rpartition(':')[2]}",
        messages=_messages(row["prompt"]),
        human=_response("a", row["a"]),
        answer=_response("answer", row["answer"]) if "answer" in row else None,
    )
    named = [(f"votes[{i}]", vote) for i, vote in enumerate(votes)]
    label, *votes = (_label(field, value) for field, value in [("label", row["label"]), *named])
    return LabelledRow(prompt, _response("b", row["b"]), label, tuple(votes))


def _messages(prompt: Any) -> list[Message]:
    """Turn a text into one turn of the user; keep a list of turns, whose last must be the user's."""
    if isinstance(prompt, str) or is_parts(prompt):
        return [{"role": "user", "content": read_text("prompt", prompt)}]
    if not isinstance(prompt, list) or not prompt:
        text = f"prompt is {reprlib.repr(prompt)}; expected text, or turns with role and content"
        raise RowError("prompt is neither text nor turns", text)
    read = [read_turn("prompt", i, turn, ("system", "user", "assistant")) for i, turn in enumerate(prompt)]
    turns = [turn for turn in read if turn is not None]
    if not turns or turns[-1]["role"] != "user":
        whose = f"the last turn of prompt is the {turns[-1]['role']}'s" if turns else "prompt is empty"
        raise RowError("prompt does not end with a user turn", f"{whose}; expected the user's")
    return turns


def _label(field: str, value: Any) -> int:
    if not isinstance(value, str) or value.lower() not in _LABELS:
        text = f"{field} is {reprlib.repr(value)}; expected A, B or tie"
        raise RowError(f"{field.partition('[')[0]} is none of A, B or tie", text)
    return _LABELS[value.lower()]


def _response(field: str, value: Any) -> str:
    """Read a response. It may be empty, since judges get such responses too.

    A bare true, false or number is read as a text whose quotes are missing: PandaLM's test set has some.
    """
    return read_text(field, str(value) if isinstance(value, bool | int | float) else value, empty=True)
