"""Turn raw rows of any supported form into prompts with human responses.

* ``prompt`` and ``response``: each a text, or turns with role and content.
* ``messages``: a conversation, of which ``turns`` selects prompt and response. In a row without any of the other forms,
  ``conversations`` (as in ShareGPT, with from and value) or ``conversation`` is read in the same way.
* ``prompt``, ``chosen`` and ``rejected``, plain or conversational (TRL's preference formats): ``chosen`` is taken as
  the human response. Conversational sides may hold the whole conversation; then ``prompt`` may be absent. If a row has
  a pair and ``messages``, the pair is read. ``rejected`` may be absent or an empty list. Both sides may have ratings,
  under any of the names in ``SCORES``.

Turns may be written as JSON text (``forms.py``). A row that has two forms with different contents is refused.

A row may have an ``id`` (or a ``prompt_id``, as in UltraChat), a verifiable ``answer`` and a ``family``, as text or
number. Null fields count as absent, and other fields are ignored.
"""

import dataclasses
import hashlib
import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NoReturn

from dnpo.data.turns import TURNS, is_blank, is_parts, read_text, read_turns
from dnpo.data.unusable import RowError, Unusable, has_names, make_rows
from dnpo.records import Message, Prompt
from dnpo.tables import Collector, Rows

Field = Literal[
    "id", "prompt", "response", "messages", "chosen", "rejected", "chosen_score", "rejected_score", "answer", "family"
]
Turns = Literal["first", "all"]
CONVERSATIONS = ("messages", "conversations", "conversation")
# The names in dnpo (also in exported pairs), in UltraFeedback (binarised), and three in distilabel.
SCORES = {
    side: (f"{side}_score", f"score_{side}", f"{side}_rating", f"rating_{side}", f"{side}-rating")
    for side in ("chosen", "rejected")
}
PAIRED = ("rejected", *SCORES["chosen"], *SCORES["rejected"])  # fields that only data with pairs or ratings have
FIELDS = ("id", "prompt_id", "prompt", "response", *CONVERSATIONS, "chosen", *PAIRED, "answer", "family")
FORMS = "expected prompt and response, messages, or prompt and chosen"


def check_rows(rows: Iterable[tuple[str, Any]], turns: Turns) -> tuple[Rows[Prompt], int, Unusable]:
    """Turn raw rows, each with its location such as ``some.jsonl:3``, into prompts with unique ids.

    A row with the id of an earlier row is left out if the rows are equal; otherwise it cannot be used. A ``prompt_id``
    identifies a prompt rather than a row, so a hash of the row is added to it.

    Returns:
        The prompts, the number of repeated rows left out, and the rows that cannot be used.
    """
    known: dict[str, tuple[bytes, str]] = {}  # by id: hash and place of the row
    repeated = 0

    def make(where: str, raw: Any) -> Prompt | None:
        nonlocal repeated
        prompt = prompt_of(raw, turns)
        content = _hash(prompt)
        other = known.get(prompt.id, (content, ""))[0] != content
        if other and raw.get("id") is None and raw.get("prompt_id") is not None:
            own = _content_id(prompt.messages, prompt.human, prompt.rejected)
            prompt = dataclasses.replace(prompt, id=f"{prompt.id}-{own}")
            content = _hash(prompt)
        mine = content, where
        earlier, there = known.setdefault(prompt.id, mine)
        if known[prompt.id] is mine:
            return prompt
        if earlier == content:
            repeated += 1
            return None
        raise RowError(
            "the id of another row",
            f"{there} has the same id {prompt.id!r} but other contents; expected another id{_hint('id')}"
            if raw.get("id") is not None
            else f"{there} has the same prompt and response but another answer, family or score; remove one of the two "
            "rows, or give both an id",
        )

    bad = Unusable()
    found: Collector[Prompt] = Collector(Prompt)
    for prompt in make_rows(rows, make, bad):
        found.add(prompt)
    return found.finish(), repeated, bad


def _hash(prompt: Prompt) -> bytes:
    """A hash of a whole row, which takes less memory than the row."""
    return hashlib.blake2b(repr(prompt).encode(), digest_size=16).digest()


def prompt_of(raw: Any, turns: Turns) -> Prompt:
    """Turn one raw row into a prompt.

    Raises:
        RowError: the row cannot be used; names the field and what was expected.
    """
    if not isinstance(raw, Mapping):
        raise RowError("is not an object", f"{reprlib.repr(raw)} is not an object; {FORMS}")
    row = {field: raw[field] for field in FIELDS if raw.get(field) is not None}
    if row.get("rejected") == []:
        del row["rejected"]
    paired = {"chosen", "rejected"} <= set(row)
    conversation = "" if paired else _conversation_field(row)
    _check_forms(row)
    _refuse_half_a_pair(row, conversation or "response")
    if conversation:
        *messages, last = _conversation(conversation, row[conversation], turns)
    else:
        chosen = paired or ("chosen" in row and "response" not in row)
        *messages, last = _sides("chosen" if chosen else "response", row, raw)
    human = last["content"]
    rejected = _rejected(row, raw, messages, human) if paired else None
    known_by = "id" if "id" in row else "prompt_id"
    return Prompt(
        id=_label(known_by, row[known_by]) if known_by in row else _content_id(messages, human, rejected),
        messages=messages,
        human=human,
        family=_label("family", row["family"], empty=True) if "family" in row else "",
        answer=_label("answer", row["answer"], whole=False) if "answer" in row else None,
        rejected=rejected,
        human_score=_score("chosen", row),
        rejected_score=_score("rejected", row) if paired else None,
    )


def _conversation_field(row: Mapping[str, Any]) -> str:
    """The field with the row's conversation, or "" if the row has another form, which precedes ShareGPT's fields."""
    sides = "chosen" in row or {"prompt", "response"} <= set(row)
    first, *others = CONVERSATIONS
    if row.get(first) not in (None, []):
        return first
    return "" if sides else next((field for field in (*others, first) if field in row), "")


def _check_forms(row: Mapping[str, Any]) -> None:
    """Refuse a row that has two forms with different contents, since only one of them would be read."""
    talks = {field: _texts(row[field]) for field in CONVERSATIONS if isinstance(row.get(field), list) and row[field]}
    sides = {field: texts[-1] for field in ("prompt", "response", "chosen") if (texts := _texts(row.get(field)))}
    for field, texts in talks.items():
        for side, text in sides.items():
            if side == "chosen" and "response" in sides:
                continue
            if text not in texts:
                _refuse_forms(field, side, f"{field} does not contain {side} ({reprlib.repr(text)})")
    for field, texts in list(talks.items())[1:]:
        first = next(iter(talks))
        if texts != talks[first]:
            _refuse_forms(first, field, f"{first} and {field} are not the same")
    if {"response", "chosen"} <= sides.keys() and sides["response"] != sides["chosen"]:
        _refuse_forms("response", "chosen", "response and chosen are not the same")


def _refuse_forms(one: str, other: str, why: str) -> NoReturn:
    name = "messages" if one in CONVERSATIONS else one
    raise RowError(
        f"{one} and {other} differ",
        f"the row has {one} and {other}, and {why}; data.columns='{{{name}: null}}' or '{{{other}: null}}' says which "
        "to leave unread",
    )


def _texts(value: Any) -> list[str]:
    """The texts of a field, one for each turn, without surrounding white space."""
    if isinstance(value, str):
        return [value.strip()] if not is_blank(value) else []
    if is_parts(value):
        return ["".join(str(part.get("text") or "") for part in value).strip()]
    turns = [turn for turn in value if isinstance(turn, Mapping)] if isinstance(value, list) else []
    contents = (turn["content"] if turn.get("content") is not None else turn.get("value") for turn in turns)
    return [text for content in contents for text in _texts(content if isinstance(content, str | list) else None)]


def _refuse_half_a_pair(row: Mapping[str, Any], form: str) -> None:
    """Refuse a row that has a rejected response and another form, but no chosen response."""
    if "rejected" in row and "chosen" not in row and form in row:
        raise RowError(
            "rejected without chosen",
            f"rejected, but no chosen; if {form} is the chosen one, data.columns='{{chosen: {form}}}' says so, and "
            "'{rejected: null}' leaves rejected out",
        )


def _rejected(row: Mapping[str, Any], raw: Mapping[str, Any], messages: list[Message], human: str) -> str:
    """The rejected response of a row with a pair, whose chosen response is ``human``.

    Raises:
        RowError: it is not a response, belongs to another conversation, or is equal to the chosen one.
    """
    *before, last = _sides("rejected", row, raw)
    if before != messages:
        raise RowError(
            "chosen and rejected differ before their last turns",
            "chosen and rejected differ before their last turns; expected two responses to one conversation",
        )
    if last["content"] == human:
        raise RowError(
            "chosen and rejected are the same", f"chosen and rejected are both {reprlib.repr(human)}; expected two"
        )
    return last["content"]


def _score(side: str, row: Mapping[str, Any]) -> float | None:
    """The rating of one side of a pair, if the row has one.

    Raises:
        RowError: it is not a number, or two columns have different ones.
    """
    found = {field: _number(field, row[field]) for field in SCORES[side] if field in row}
    if len(set(found.values())) > 1:
        names = " and ".join(found)
        choice = f"data.columns='{{{side}_score: {next(iter(found))}}}' chooses one"
        raise RowError(f"{names} differ", f"{names} differ ({', '.join(map(str, found.values()))}); {choice}")
    return next(iter(found.values()), None)


def _number(field: str, value: Any) -> float:
    """A finite number, given as a number or (in CSV) as text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"{field} is not a number", f"{field} is {reprlib.repr(value)}; expected a number, or null")
    return number


def _sides(field: str, row: Mapping[str, Any], raw: Mapping[str, Any]) -> list[Message]:
    """The turns of a row whose ``field`` has the response, or prompt and response."""
    response = row.get(field)
    talks = isinstance(response, list) and not is_parts(response)
    for missing in ("prompt", field):
        if missing not in row and not (missing == "prompt" and talks):
            raise RowError(f"no {missing}", f"no {missing}; {FORMS} (the row has {has_names(raw)})")
    if "prompt" not in row:
        return _conversation(field, response, "all")
    prompt = _prompt_turns(row["prompt"])
    if not isinstance(response, list) or not talks:
        return [*prompt, {"role": "assistant", "content": read_text(field, response)}]
    if len(response) > 1:
        whole = _conversation(field, response, "all")
        if whole[: len(prompt)] != prompt:
            raise RowError(
                f"{field} does not begin with the prompt",
                f"{field} does not begin with the prompt; expected one assistant turn, or the conversation with the "
                "prompt's turns first",
            )
        return whole
    return [*prompt, *read_turns(field, response, ("assistant",))]


def _prompt_turns(prompt: Any) -> list[Message]:
    """The turns of a prompt, of which the last is a user turn; a text is a single user turn."""
    if not isinstance(prompt, list) or is_parts(prompt):
        return [{"role": "user", "content": read_text("prompt", prompt)}]
    turns = list(read_turns("prompt", prompt))
    if not turns or turns[-1]["role"] != "user":
        reason = "prompt does not end with a user turn"
        raise RowError(reason, f"{reason}; expected text, or {TURNS}, the last a user's")
    return turns


def _conversation(field: str, messages: Any, turns: Turns) -> list[Message]:
    """Split a conversation into prompt and response: the first answer, or the last one with all turns before it."""
    found: list[Message] = []
    end = 0
    for turn in read_turns(field, messages):
        found.append(turn)
        if turn["role"] == "assistant":
            end = len(found)
            if turns == "first":
                break
    if not end:
        reason = f"{field} has no user turn followed by an assistant turn"
        raise RowError(reason, reason)
    return found[:end]


def _label(field: str, value: Any, *, whole: bool = True, empty: bool = False) -> str:
    """The text of an id, a family or an answer, which may be a number.

    Args:
        whole: whether a number must be whole.
        empty: whether it may be blank.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    elif isinstance(value, float) and math.isfinite(value):
        if value == int(value):
            value = str(int(value))
        elif not whole:
            value = str(value)
    try:
        return read_text(field, value, empty=empty)
    except RowError as error:
        words = ", such as the word 'true' or 'yes', as responses say it" if isinstance(value, bool) else ""
        raise RowError(error.reason, f"{error}{words}{_hint(field)}") from error


def _hint(field: str) -> str:
    """Advice on leaving out a column, for messages."""
    return f"; data.columns='{{{field.removeprefix('prompt_')}: null}}' leaves the column out"


def _content_id(messages: list[Message], human: str, rejected: str | None = None) -> str:
    """The id of a row without one: a hash of its contents."""
    responses = [human] if rejected is None else [human, rejected]
    content = json.dumps([*([turn["role"], turn["content"]] for turn in messages), *responses])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
