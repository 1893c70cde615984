"""The text of a question with two choices, A and B: which response is the better one?"""

from collections.abc import Sequence
from string import Formatter

from dnpo.errors import SettingsError
from dnpo.records import Message

LETTERS = ("A", "B")
FIELDS = ("question", "y1", "y2")
TINY = "{question} A: {y1} B: {y2} Better:"


def check_template(template: str, setting: str) -> None:
    """Check that a template shows the conversation and both responses.

    Args:
        setting: dotted name of the template's setting, for messages.

    Raises:
        SettingsError: a field is missing, or there are other fields.
    """
    expected = f"expected a text with {', '.join(f'{{{field}}}' for field in FIELDS)}, such as {TINY!r}"
    try:
        parts = [(field, form, conversion) for _, field, form, conversion in Formatter().parse(template)]
    except ValueError as error:
        raise SettingsError(f"{setting}={template!r}: {error}; {expected}") from error
    found = [field for field, _, _ in parts if field is not None]
    if sorted(found) != sorted(FIELDS) or any(form or conversion for _, form, conversion in parts):
        raise SettingsError(f"{setting}={template!r}: {expected}, each once")


def ask(template: str, messages: Sequence[Message], first: str, second: str) -> list[Message]:
    """The conversation that asks which of two responses to ``messages`` is the better one.

    A single turn is shown as it is; several turns are shown with their roles.
    """
    if len(messages) == 1:
        shown = messages[0]["content"]
    else:
        shown = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)
    return [{"role": "user", "content": template.format(question=shown, y1=first, y2=second)}]


def frame(template: str) -> str:
    """The text of a template without its fields."""
    return template.format(question="", y1="", y2="")
