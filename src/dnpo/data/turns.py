"""Texts and turns in raw rows.

A turn has ``role`` and ``content``, or ``from`` and ``value`` as in ShareGPT's files. The content is a text, or a list
of parts of type text. System turns without text are left out.
"""

import re
import reprlib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dnpo.data.unusable import RowError
from dnpo.records import Message
from dnpo.settings import nearest

UNKNOWN_ROLE = "{} has a role with an unknown name"
TURNS = "a list of turns with role and content"
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "ai", "bot", "chatbot"), "assistant"),
    **dict.fromkeys(("bard", "bing", "claude", "gemini", "palm", "llama", "mistral", "deepseek", "qwen"), "assistant"),
}
VERSIONS = re.compile(r"(?:chat)?gpt[-_ ]?\d.*")  # gpt4, gpt-3.5-turbo: an assistant
TOOL_ROLES = {"tool", "function", "tool_call", "tool_response", "function_call", "function_response", "observation"}
CALLS = ("tool_calls", "function_call")
TEXT_PARTS = ("text", "input_text", "output_text")
NOTHING = ("Cc", "Cf", "Cn", "Co", "Mn", "Me")  # combining marks are invisible without a letter
LOST = {"\ufffc", "\ufffd"}  # replacements of undecodable bytes
# Invisible letters and marks: fillers, joiners, variation selectors, the blank pattern of Braille.
INVISIBLE = {
    *"\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0",
    *map(chr, [*range(0xFE00, 0xFE10), *range(0xE0000, 0xE1000)]),
}


def is_blank(text: str) -> bool:
    """Whether a text has no content: only spaces, control characters, zero-width, direction and combining marks.

    Characters for private use, and replacements of undecodable bytes, are no content either.
    """
    return all(
        char.isspace() or unicodedata.category(char) in NOTHING or char in INVISIBLE or char in LOST for char in text
    )


def read_text(place: str, value: Any, *, field: str = "", empty: bool = False) -> str:
    """Return a value that must be text.

    Args:
        place: its name in messages, such as ``messages[2].content``.
        field: its name in the reason of the error, if different.
        empty: whether the text may be blank.

    Raises:
        RowError: it is not text, is blank, or is not valid Unicode.
    """
    field = field or place
    if is_parts(value):
        value = "".join(_read_part(f"{place}[{i}]", field, part) for i, part in enumerate(value))
    if not isinstance(value, str):
        raise RowError(f"{field} is not text", f"{place} is {reprlib.repr(value)}; expected text")
    if not empty and is_blank(value):
        raise RowError(f"{field} is empty", f"{place} is empty; expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can contain half of a character: "\ud83d"
        text = f"{place} is not valid Unicode ({error.reason}); expected text"
        raise RowError(f"{field} is not valid Unicode", text) from error
    return value


def is_parts(value: Any) -> bool:
    """Whether a value is a list of parts, which have a type. (Turns have a role instead.)"""
    return isinstance(value, list) and bool(value) and all(_is_part(each) for each in value)


def _is_part(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("type"), str) and not {"role", "from"} & set(value)


def _read_part(place: str, field: str, part: Mapping[str, Any]) -> str:
    if part["type"] not in TEXT_PARTS:
        text = f"{place} is of type {part['type']!r}; expected parts of type text"
        raise RowError(f"{field} has parts that are not text", text)
    return read_text(f"{place}.text", part.get("text"), field=field, empty=True)


def read_turn(field: str, i: int, turn: Any, wanted: Sequence[str], *, empty: bool = False) -> Message | None:
    """Return turn ``i`` of a field, or None for a system turn without text.

    Args:
        wanted: the roles that it may have.
        empty: whether its text may be blank.

    Raises:
        RowError: it is not a turn, has another role, calls a tool, or has no text.
    """
    place = f"{field}[{i}]"
    if not isinstance(turn, Mapping):
        text = f"{place} is {reprlib.repr(turn)}; expected a turn with role and content"
        raise RowError(f"{field} has something that is not a turn", text)
    key = "from" if turn.get("role") is None and turn.get("from") is not None else "role"
    given = turn.get(key)
    name = given.strip().lower() if isinstance(given, str) else ""
    called = [call for call in CALLS if turn.get(call)]
    if called or name in TOOL_ROLES:
        what = f"{place} has {called[0]}" if called else f"{place}.{key} is {given!r}"
        raise RowError(f"{field} has a tool call", f"{what}: a tool call; expected text alone")
    role = "assistant" if VERSIONS.fullmatch(name) else ROLES.get(name)
    if role is None and name:
        text = f"{place}.{key} is {reprlib.repr(given)}; expected {' or '.join(wanted)}.{nearest(name, ROLES)}"
        raise RowError(UNKNOWN_ROLE.format(field), text)
    if role is None or role not in wanted:
        opens = role == "assistant" and "assistant" not in wanted and "system" in wanted
        why = ": an assistant opens the conversation" if opens else ""
        reason = f"{field}: an assistant opens the conversation" if opens else f"{field} has a turn of another role"
        raise RowError(reason, f"{place}.{key} is {given!r}{why}; expected {' or '.join(wanted)}")
    words = "value" if turn.get("content") is None and turn.get("value") is not None else "content"
    content = turn.get(words)
    if role == "system" and (content in (None, []) or (isinstance(content, str) and is_blank(content))):
        return None
    content = "" if content == [] else content
    return {"role": role, "content": read_text(f"{place}.{words}", content, field=f"a turn of {field}", empty=empty)}


def read_turns(field: str, turns: Any, wanted: Sequence[str] = ("system", "user")) -> Iterator[Message]:
    """Yield turns one by one: a system turn if any, then user and assistant alternating.

    Raises:
        RowError: the value is not a list of such turns.
    """
    if not isinstance(turns, list):
        as_text = ", or such a list as JSON text" if isinstance(turns, str) else ""
        raise RowError(
            f"{field} is not a list of turns", f"{field} is {reprlib.repr(turns)}; expected {TURNS}{as_text}"
        )
    if not turns:
        raise RowError(f"{field} is empty", f"{field} is empty; expected {TURNS}")
    for i, turn in enumerate(turns):
        message = read_turn(field, i, turn, wanted)
        if message is None:
            continue
        yield message
        if message["role"] != "system":
            wanted = ("assistant",) if message["role"] == "user" else ("user",)
