"""Raw rows in any of the supported forms → prompts with their human responses.

* ``prompt`` and ``response``: each a text, or turns with role and content.
* ``messages``: a conversation, from which ``turns`` says what to take.
* ``prompt``, ``chosen`` and ``rejected``, plain or conversational (TRL's preference formats): ``chosen`` is taken as
  the human response, and ``rejected`` is not read. A conversational ``chosen`` may hold the whole conversation.

A row may have an ``id`` (or a ``prompt_id``, as UltraChat has), a verifiable ``answer`` and a ``family``. Fields that
are null count as absent, and other fields are ignored.
"""

import dataclasses
import hashlib
import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from dnpo.errors import DataError
from dnpo.records import Message, Prompt

Field = Literal["id", "prompt", "response", "messages", "chosen", "answer", "family"]
Turns = Literal["first", "all"]
FIELDS = ("id", "prompt_id", "prompt", "response", "messages", "chosen", "answer", "family")
FORMS = "expected prompt and response, messages, or prompt and chosen"
TURNS = "a list of turns with role and content"


def check_rows(rows: Iterable[tuple[str, Any]], turns: Turns) -> tuple[list[Prompt], int]:
    """Prompts from raw rows, each with where it stands, such as ``some.jsonl:3``; every id stands once.

    A row that repeats another row of its id is left out; one that contradicts it is an error. A ``prompt_id`` names a
    prompt and not a row, so there a hash of the row is added to the id.

    Returns:
        The prompts, and how many rows were left out.

    Raises:
        DataError: the first row that cannot be used, or that has the id of another.
    """
    prompts: dict[str, Prompt] = {}
    places: dict[str, str] = {}
    repeated = 0
    for where, raw in rows:
        prompt = prompt_of(where, raw, turns)
        if prompts.get(prompt.id, prompt) != prompt and raw.get("id") is None and raw.get("prompt_id") is not None:
            prompt = dataclasses.replace(prompt, id=f"{prompt.id}-{_content_id(prompt.messages, prompt.human)}")
        if prompt.id not in prompts:
            prompts[prompt.id], places[prompt.id] = prompt, where
        elif prompts[prompt.id] == prompt:
            repeated += 1
        else:
            there = places[prompt.id]
            raise DataError(
                f"{where}: id {prompt.id!r} is that of {there} already, which says something else; expected another id"
                if raw.get("id") is not None
                else f"{where}: prompt and response are those of {there}, but answer or family are not; remove one of "
                "them, or give both an id"
            )
    return list(prompts.values()), repeated


def prompt_of(where: str, raw: Any, turns: Turns) -> Prompt:
    """One raw row as a prompt.

    Raises:
        DataError: names the place and the field, and says what was expected.
    """
    if not isinstance(raw, Mapping):
        raise DataError(f"{where}: {reprlib.repr(raw)} is not an object; {FORMS}")
    row = {field: raw[field] for field in FIELDS if raw.get(field) is not None}
    if "messages" in row:
        *messages, last = _conversation(where, "messages", row["messages"], turns)
    else:
        *messages, last = _sides(where, row, raw)
    human = last["content"]
    known_by = "id" if "id" in row else "prompt_id"
    name = row.get(known_by)
    if name is None:
        name = _content_id(messages, human)
    elif isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    return Prompt(
        id=_text(where, known_by, name),
        messages=messages,
        human=human,
        family=_text(where, "family", row.get("family", ""), empty=True),
        answer=_text(where, "answer", row["answer"]) if "answer" in row else None,
    )


def _sides(where: str, row: Mapping[str, Any], raw: Mapping[str, Any]) -> list[Message]:
    """The turns of a row with a prompt and a response to it, or with a chosen side that holds both."""
    field = "response" if "response" in row or "chosen" not in row else "chosen"
    response = row.get(field)
    for missing in ("prompt", field):
        if missing not in row and not (missing == "prompt" and isinstance(response, list)):
            has = ", ".join(str(name) for name, value in raw.items() if value is not None) or "nothing"
            raise DataError(f"{where}: no {missing}; {FORMS} (the row has {has})")
    if "prompt" not in row:
        return _conversation(where, field, response, "all")
    prompt = _prompt_turns(where, row["prompt"])
    if not isinstance(response, list):
        return [*prompt, {"role": "assistant", "content": _text(where, field, response)}]
    if len(response) != 1:
        whole = _conversation(where, field, response, "all")
        if whole[: len(prompt)] != prompt:
            raise DataError(
                f"{where}: {field} does not begin with the prompt; expected one assistant turn, or the conversation "
                "with the prompt's turns first"
            )
        return whole
    return [*prompt, *_turns(where, field, response, ("assistant",))]


def _prompt_turns(where: str, prompt: Any) -> list[Message]:
    """A prompt's turns, the last of them a user's; a text is one."""
    if not isinstance(prompt, list):
        return [{"role": "user", "content": _text(where, "prompt", prompt)}]
    turns = list(_turns(where, "prompt", prompt))
    if not turns or turns[-1]["role"] != "user":
        raise DataError(f"{where}: prompt does not end with a user turn; expected text, or {TURNS}, the last a user's")
    return turns


def _conversation(where: str, field: str, messages: Any, turns: Turns) -> list[Message]:
    """The prompt's turns and the assistant's answer: the first answer, or the last with all turns before it."""
    found: list[Message] = []
    end = 0
    for turn in _turns(where, field, messages):
        found.append(turn)
        if turn["role"] == "assistant":
            end = len(found)
            if turns == "first":
                break
    if not end:
        raise DataError(f"{where}: {field} has no user turn followed by an assistant turn")
    return found[:end]


def _turns(where: str, field: str, turns: Any, wanted: tuple[str, ...] = ("system", "user")) -> Iterator[Message]:
    """Turns one by one: the system's if any, then the user and the assistant in turn."""
    if not isinstance(turns, list):
        raise DataError(f"{where}: {field} is {reprlib.repr(turns)}; expected {TURNS}")
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise DataError(f"{where}: {field}[{i}] is {reprlib.repr(turn)}; expected a turn with role and content")
        role = turn.get("role")
        if role not in wanted:
            raise DataError(f"{where}: {field}[{i}].role is {role!r}; expected {' or '.join(wanted)}")
        yield {"role": role, "content": _text(where, f"{field}[{i}].content", turn.get("content"))}
        if role != "system":
            wanted = ("assistant",) if role == "user" else ("user",)


def _text(where: str, field: str, value: Any, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {field} is {reprlib.repr(value)}; expected text")
    if not empty and not value.strip():
        raise DataError(f"{where}: {field} is empty; expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character: "\ud83d"
        raise DataError(f"{where}: {field} is not valid Unicode ({error.reason}); expected text") from error
    return value


def _content_id(messages: list[Message], human: str) -> str:
    """The id of a row without one: a hash of its contents."""
    content = json.dumps([*([turn["role"], turn["content"]] for turn in messages), human])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
