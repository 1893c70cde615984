"""Bring raw rows into one form: parse turns that are written as text, and rename roles."""

import ast
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dnpo.data.rows import CONVERSATIONS

SIDES = ("prompt", "response", "chosen", "rejected")
NO_ROLES: Mapping[str, str] = MappingProxyType({})


def plain_row(raw: Any, roles: Mapping[str, str] = NO_ROLES) -> Any:
    """Return a raw row with its turns as lists, and with roles under their usual names.

    In CSV files, a conversation is a text. It is parsed if it is a list in JSON or in Python's notation. A prompt is
    parsed likewise. A response is parsed if its prompt is such a text, if there is no prompt, or if it begins with the
    prompt's text.

    Args:
        roles: the usual names of other roles, such as ``{narrator: user}``.
    """
    if not isinstance(raw, Mapping):
        return raw
    row = dict(raw)
    for field in CONVERSATIONS:
        row |= {field: found} if (found := _list_of(row.get(field))) is not None else {}
    prompt = _turns_of(row.get("prompt"))
    for field in SIDES[1:]:
        turns = _turns_of(row.get(field))
        if turns and (prompt or row.get("prompt") is None or _content(turns[0]) == row["prompt"]):
            row[field] = turns
    row |= {"prompt": prompt} if prompt else {}
    for field in (*CONVERSATIONS, *SIDES) if roles else ():
        if isinstance(row.get(field), list):
            row[field] = [_rename(turn, roles) for turn in row[field]]
    return row


def _list_of(value: Any) -> list[Any] | None:
    """Parse a list in JSON or in Python's notation; None if the text is not a list."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list):
            return found
    return None


def _turns_of(value: Any) -> list[Any] | None:
    """Parse turns written as text; None unless each has a role and a content."""
    turns = _list_of(value)
    return turns if turns and all(isinstance(turn, Mapping) and _is_turn(turn) for turn in turns) else None


def _is_turn(turn: Mapping[str, Any]) -> bool:
    return {"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys()


def _content(turn: Mapping[str, Any]) -> Any:
    return turn["content"] if "content" in turn else turn["value"]


def _rename(turn: Any, roles: Mapping[str, str]) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    key = "from" if turn.get("role") is None else "role"
    name = str(turn.get(key)).strip().lower()
    return {**turn, key: roles[name]} if name in roles else turn
