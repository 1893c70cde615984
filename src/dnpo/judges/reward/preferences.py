"""Preferences in a JSON lines file: which of two responses to a conversation is better.

A row has ``chosen``, ``rejected`` and ``prompt``. The prompt is a text or a list of turns; a response is a text, or a
list of turns that ends with the assistant's. If the responses' lists begin with the conversation, it must be the same
in both, and ``prompt`` may be missing. Other fields are ignored.
"""

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnpo.data.forms import plain_row
from dnpo.data.parsing import open_text, parse_json
from dnpo.data.turns import is_parts, read_text, read_turn
from dnpo.data.unusable import RowError, has_names, read_rows
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
        """The conversation as one text, for comparisons."""
        return json.dumps([[turn["role"], turn["content"]] for turn in self.messages])


class Preferences:
    """A file of preferences, split by a hash of the conversation, so that no conversation is in both parts.

    Args:
        path: the file, in UTF-8.
        holdout: share of the conversations held out.
    """

    def __init__(self, *, path: str, holdout: Fraction = 0.2) -> None:
        self.path, self.holdout = Path(path), holdout

    def read(self) -> tuple[list[Preference], list[Preference]]:
        """Rows to train on, and rows held out.

        Raises:
            DataError: the file cannot be read, a row cannot be used (such rows are counted by reason), or one of the
                two parts has no rows.
        """
        with open_text(f"data.path={self.path}", self.path) as stream:
            raw = list(parse_json(self.path, stream))
        rows, bad = read_rows(raw, lambda where, each: _preference(plain_row(each)))
        bad.refuse(len(raw))
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


def _preference(raw: Any) -> Preference:
    if not isinstance(raw, Mapping):
        raise RowError("is not an object", f"{reprlib.repr(raw)} is not an object; {FORMS}")
    for field in ("chosen", "rejected"):
        if raw.get(field) is None:
            raise RowError(f"no {field}", f"no {field}; {FORMS} (the row has {has_names(raw)})")
    given = _turns("prompt", raw["prompt"], "user") if raw.get("prompt") is not None else []
    before, responses = [], []
    for field in ("chosen", "rejected"):
        turns = _turns(field, raw[field], "assistant")
        responses.append(turns[-1]["content"])
        before.append(turns[:-1])
    if before[0] != before[1]:
        problem = "chosen and rejected answer different conversations"
        raise RowError(problem, f"{problem}; expected the same")
    if not given and not before[0]:
        raise RowError("no prompt", f"no prompt, and chosen has no turns before the response; {FORMS}")
    if given and before[0] and before[0][-len(given) :] != given:
        raise RowError(
            "prompt is not what chosen answers", "prompt is not what chosen answers; expected the same turns"
        )
    if responses[0] == responses[1]:
        problem = "chosen and rejected are the same"
        raise RowError(problem, f"{problem}; expected a better and a worse response")
    return Preference(before[0] or given, *responses)


def _turns(field: str, value: Any, last: str) -> list[Message]:
    """Read a text as one turn, or turns of which the last has this role. Only a response may be empty."""
    if isinstance(value, str) or is_parts(value):
        return [{"role": last, "content": read_text(field, value, empty=last == "assistant")}]
    if not isinstance(value, list) or not value:
        text = f"{field} is {reprlib.repr(value)}; expected text, or a list of turns"
        raise RowError(f"{field} is neither text nor turns", text)
    turns: list[Message] = []
    for i, turn in enumerate(value):
        wanted = ("system", "user", "assistant") if i < len(value) - 1 else (last,)
        message = read_turn(field, i, turn, wanted, empty=last == "assistant")
        if message is not None:
            turns.append(message)
    return turns
