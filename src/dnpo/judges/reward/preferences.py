"""Preferences: which of two responses to a conversation is better, from a JSON lines file.

A row has ``chosen``, ``rejected`` and ``prompt``. The prompt is a text or a list of turns; a response is a text, or a
list of turns that ends with the assistant's. Where the responses' lists begin with the conversation, it has to be the
same in both, and ``prompt`` may be missing. Other fields are ignored.
"""

import json
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dnpo.errors import DataError
from dnpo.records import Message
from dnpo.seeding import derive
from dnpo.settings import Fraction

FORMS = "expected prompt, chosen and rejected"


@dataclass(frozen=True)
class Preference:
    """A conversation up to the response, and two responses to it."""

    messages: list[Message]
    chosen: str
    rejected: str

    @property
    def conversation(self) -> str:
        """The conversation as one text, to tell whether it is another's."""
        return json.dumps([[turn["role"], turn["content"]] for turn in self.messages])


class Preferences:
    """A file of preferences, split by a hash of the conversation, so that none is on both sides.

    Args:
        path: the file, in UTF-8.
        holdout: share of the conversations held out.
    """

    def __init__(self, *, path: str, holdout: Fraction = 0.2) -> None:
        self.path, self.holdout = Path(path), holdout

    def read(self) -> tuple[list[Preference], list[Preference]]:
        """Rows to train on, and rows held out.

        Raises:
            DataError: the file cannot be read, a row cannot be used, or one of the two sides has no rows.
        """
        try:
            with self.path.open("rb") as stream:
                rows = [_preference(where, raw) for where, raw in self._parse(stream)]
        except OSError as error:
            raise DataError(f"data.path={self.path}: {error.strerror}; expected a file of JSON lines") from error
        sides: tuple[list[Preference], list[Preference]] = ([], [])
        for row in rows:
            sides[derive(0, "preference", row.conversation) / 2**63 < self.holdout].append(row)
        for side, rest in zip(("training", "the held-out rows"), sides, strict=True):
            if not rest:
                raise DataError(
                    f"data.holdout={self.holdout:g}: none of the {len(rows):,} rows of {self.path} is left for {side}; "
                    "change it, or take more rows"
                )
        return sides

    def _parse(self, stream: IO[bytes]) -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    yield f"{self.path}:{number}", json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{self.path}:{number}: not JSON ({error}); expected one object a line") from error


def _preference(where: str, raw: Any) -> Preference:
    if not isinstance(raw, Mapping):
        raise DataError(f"{where}: {reprlib.repr(raw)} is not an object; {FORMS}")
    for field in ("chosen", "rejected"):
        if raw.get(field) is None:
            raise DataError(f"{where}: no {field}; {FORMS} (the row has {', '.join(map(str, raw)) or 'nothing'})")
    given = _turns(where, "prompt", raw["prompt"], "user") if raw.get("prompt") is not None else []
    before, responses = [], []
    for field in ("chosen", "rejected"):
        turns = _turns(where, field, raw[field], "assistant")
        responses.append(turns[-1]["content"])
        before.append(turns[:-1])
    if before[0] != before[1]:
        raise DataError(f"{where}: chosen and rejected answer different conversations; expected the same")
    if not given and not before[0]:
        raise DataError(f"{where}: no prompt, and chosen has no turns before the response; {FORMS}")
    if given and before[0] and before[0][-len(given) :] != given:
        raise DataError(f"{where}: prompt is not what chosen answers; expected the same turns")
    if responses[0] == responses[1]:
        raise DataError(f"{where}: chosen and rejected are the same; expected a better and a worse response")
    return Preference(before[0] or given, *responses)


def _turns(where: str, field: str, value: Any, last: str) -> list[Message]:
    """A text as one turn, or turns of which the last has that role."""
    if isinstance(value, str):
        value = [{"role": last, "content": value}]
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {field} is {reprlib.repr(value)}; expected text, or a list of turns")
    turns: list[Message] = []
    for i, turn in enumerate(value):
        role = turn.get("role") if isinstance(turn, Mapping) else None
        wanted = ("system", "user", "assistant") if i < len(value) - 1 else (last,)
        if not isinstance(role, str) or role not in wanted:
            raise DataError(f"{where}: {field}[{i}].role is {role!r}; expected {' or '.join(wanted)}")
        content = turn.get("content")
        if not isinstance(content, str) or (not content.strip() and last == "user"):
            raise DataError(f"{where}: {field}[{i}].content is {reprlib.repr(content)}; expected text")
        turns.append({"role": role, "content": content})
    return turns
