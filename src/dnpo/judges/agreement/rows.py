"""Rows that people have judged: a prompt, two responses, and which of them is better.

JSON lines with ``prompt`` (text, or a list of turns with ``role`` and ``content``), ``a``, ``b`` and ``label`` (``A``,
``B`` or ``tie``). A row may have ``votes``, one of these a person, the same number in every row and in the same order
of persons; an ``id``; and a verifiable ``answer``, for judges that need one. Other fields are ignored.
"""

import json
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnpo.errors import DataError
from dnpo.judges.agreement.stats import CATEGORIES
from dnpo.records import Message, Prompt
from dnpo.store import content_hash

EXPECTED = "expected one object a line with prompt, a, b and label (A, B or tie)"
_LABELS = {name.lower(): number for number, name in enumerate(CATEGORIES)}


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """One row. Labels are places in :data:`~dnpo.judges.agreement.stats.CATEGORIES`.

    Attributes:
        prompt: with ``a`` as its human response.
        b: the text of the other one.
        label: what people say as a whole.
        votes: what each of them says; empty where only the label is known.
    """

    prompt: Prompt
    b: str
    label: int
    votes: tuple[int, ...]


class Labelled:
    """A file of such rows.

    Args:
        path: the file, in UTF-8; blank lines are skipped.
    """

    def __init__(self, *, path: str) -> None:
        self.path = Path(path)

    def content(self) -> str:
        """What decides the rows, wherever the file lies.

        Raises:
            DataError: there is no such file.
        """
        if not self.path.is_file():
            raise DataError(f"data={self.path}: there is no such file; {EXPECTED}")
        return content_hash(self.path)

    def read(self) -> list[LabelledRow]:
        """The rows.

        Raises:
            DataError: there are none, or one cannot be used; names the file and the line.
        """
        rows: list[LabelledRow] = []
        seen: dict[str, str] = {}
        for where, raw in self._lines():
            row = _read_row(where, raw)
            if row.prompt.id in seen:
                raise DataError(
                    f"{where}: id {row.prompt.id!r} is that of {seen[row.prompt.id]} already; expected another"
                )
            seen[row.prompt.id] = where
            if rows and len(row.votes) != len(rows[0].votes):
                raise DataError(
                    f"{where}: {len(row.votes)} votes, but {len(rows[0].votes)} in the rows before; expected the same "
                    "number in every row, in the same order of persons, or votes in none"
                )
            rows.append(row)
        if not rows:
            raise DataError(f"data={self.path}: there are no rows in it; {EXPECTED}")
        return rows

    def _lines(self) -> Iterator[tuple[str, Any]]:
        try:
            lines = self.path.read_bytes().splitlines()
        except OSError as error:
            raise DataError(f"data={self.path}: {error.strerror}; {EXPECTED}") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield f"{self.path}:{number}", json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.path}:{number}: not JSON ({error}); {EXPECTED}") from error


def _read_row(where: str, raw: Any) -> LabelledRow:
    if not isinstance(raw, Mapping):
        raise DataError(f"{where}: {reprlib.repr(raw)} is not an object; {EXPECTED}")
    row = {field: value for field, value in raw.items() if value is not None}
    for field in ("prompt", "a", "b", "label"):
        if field not in row:
            raise DataError(f"{where}: no {field}; {EXPECTED} (the row has {', '.join(map(str, raw)) or 'nothing'})")
    votes = row.get("votes", [])
    if not isinstance(votes, list):
        raise DataError(f"{where}: votes is {reprlib.repr(votes)}; expected a list of A, B or tie, one a person")
    prompt = Prompt(
        id=str(row["id"]) if "id" in row else f"line {where.rpartition(':')[2]}",
        messages=_messages(where, row["prompt"]),
        human=_text(where, "a", row["a"]),
        answer=_text(where, "answer", row["answer"]) if "answer" in row else None,
    )
    named = [(f"votes[{i}]", vote) for i, vote in enumerate(votes)]
    label, *votes = (_label(where, field, value) for field, value in [("label", row["label"]), *named])
    return LabelledRow(prompt, _text(where, "b", row["b"]), label, tuple(votes))


def _messages(where: str, prompt: Any) -> list[Message]:
    """A text as one turn of the user, or turns as they are; the last is the user's, whom the responses answer."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": _text(where, "prompt", prompt)}]
    if not isinstance(prompt, list) or not prompt:
        raise DataError(f"{where}: prompt is {reprlib.repr(prompt)}; expected text, or turns with role and content")
    turns: list[Message] = []
    for i, turn in enumerate(prompt):
        if not isinstance(turn, Mapping) or turn.get("role") not in ("system", "user", "assistant"):
            raise DataError(
                f"{where}: prompt[{i}] is {reprlib.repr(turn)}; expected a turn with role (system, user or assistant) "
                "and content"
            )
        turns.append({"role": turn["role"], "content": _text(where, f"prompt[{i}].content", turn.get("content"))})
    if turns[-1]["role"] != "user":
        raise DataError(f"{where}: the last turn of prompt is the {turns[-1]['role']}'s; expected the user's")
    return turns


def _label(where: str, field: str, value: Any) -> int:
    if not isinstance(value, str) or value.lower() not in _LABELS:
        raise DataError(f"{where}: {field} is {reprlib.repr(value)}; expected A, B or tie")
    return _LABELS[value.lower()]


def _text(where: str, field: str, value: Any) -> str:
    """A text; responses may be empty, since judges meet such ones too.

    A bare true, false or number is a text that lost its quotes on the way through JSON: PandaLM's test set has some.
    """
    if isinstance(value, bool | int | float):
        value = str(value)
    if not isinstance(value, str) or (field == "prompt" and not value.strip()):
        raise DataError(f"{where}: {field} is {reprlib.repr(value)}; expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character: "\ud83d"
        raise DataError(f"{where}: {field} is not valid Unicode ({error.reason}); expected text") from error
    return value
