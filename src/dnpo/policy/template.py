"""Render conversations with the chat template, and locate the texts of the turns in the result.

Templates that change the data silently are refused: those that leave out or cut a turn, or write the current time.
"""

import json
import re
import string
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple, cast

from jinja2 import Environment, TemplateError, meta, nodes
from transformers import PreTrainedTokenizerBase

from dnpo.errors import ModelError
from dnpo.records import Message

# For tokenizers without a chat template. The response begins on a new line.
PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + '\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
SETTING = "model.chat_template"
HEAD = re.compile(  # a line that sets a variable or the time, as put_in_force writes it
    r"{% set (?P<name>\w+) = ((?!%}).)*%}\n|{% macro strftime_now\(format\) %}.*{% endmacro %}\n"
)
CLOCK = "strftime_now"  # the function with which templates of transformers read the time
CHANCE = {"random", "lipsum"}  # names in Jinja with random results
NO_SYSTEM = (
    "; it takes no system turn: give a model.chat_template that puts its text before the user's, or put it there "
    "in the data"
)
PRIVATE = (0xF0000, 0x100000)  # first of the private-use characters that mark turns, two for each turn


class Span(NamedTuple):
    """The position of a turn's text; ``turn`` is its number."""

    turn: int
    start: int
    end: int


@dataclass(frozen=True)
class Text:
    """A rendering, or a part of one.

    Attributes:
        text: the whole text.
        contents: positions of the texts of turns, without surrounding white space.
    """

    text: str
    contents: tuple[Span, ...] = ()

    def cut(self, start: int, end: int) -> "Text":
        """The part between two positions."""
        spans = (Span(turn, max(a, start) - start, min(b, end) - start) for turn, a, b in self.contents)
        return Text(self.text[start:end], tuple(span for span in spans if span.start < span.end))

    def then(self, text: str) -> "Text":
        """Append text of the template."""
        return Text(self.text + text, self.contents)


class Rendered(NamedTuple):
    """A conversation with a response, as training text.

    Attributes:
        whole: the whole rendering.
        at: the end of the prompt, where a policy begins to sample, and the start of the response.
        lead: text, such as an empty thought, that the template writes before every response but not in the generation
            prompt; here it is the end of the prompt.
        after: the text after the response.
    """

    whole: Text
    at: int
    lead: str
    after: str

    @property
    def prompt(self) -> Text:
        """The prompt, up to where a policy begins to sample."""
        return self.whole.cut(0, self.at)

    @property
    def rest(self) -> Text:
        """The response, and the text after it."""
        return self.whole.cut(self.at, len(self.whole.text))


def put_in_force(
    tokenizer: Any,
    chat_template: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    date: str | None = None,
    setting: str = "model",
) -> None:
    """Set a tokenizer's chat template, with arguments and date written into it, so that they are saved with it.

    Args:
        chat_template: replaces the tokenizer's template; a tokenizer without any gets :data:`PLAIN_TEMPLATE`.
        arguments: variables of the template, such as ``enable_thinking``.
        date: the present date for the template, in ISO format, optionally with a time.
        setting: dotted name of the settings, for messages.

    Raises:
        ModelError: the template does not read such a variable or a date, or the date is not valid.
    """
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    if not arguments and date is None:
        return
    template = _current(tokenizer, f"{setting}.chat_template")
    names = {*(arguments or {}), *([CLOCK] if date is not None else [])}
    template = _without_head(template, names)
    head = ""
    for name, value in (arguments or {}).items():
        if name in ("messages", "add_generation_prompt", CLOCK) or not name.isidentifier():
            raise ModelError(f"{setting}.template_arguments.{name}: expected the name of a variable of the template")
        if name not in _variables(template, setting):
            raise ModelError(f"{setting}.template_arguments.{name}: the chat template reads no variable of this name")
        head += f"{{% set {name} = {_literal(value)} %}}\n"
    if date is not None:
        if CLOCK not in _variables(template, setting):
            raise ModelError(f"{setting}.template_date={date}: the chat template does not read the clock")
        try:
            head += _stop_clock(datetime.fromisoformat(date))
        except ValueError as error:
            raise ModelError(f"{setting}.template_date={date}: expected a date such as 2026-01-31") from error
    tokenizer.chat_template = head + template


def _current(tokenizer: Any, setting: str) -> str:
    """The template that a tokenizer would use."""
    try:
        return str(tokenizer.get_chat_template())
    except Exception as error:  # the tokenizer has several templates but no default, or its class has no templates
        raise ModelError(f"{setting}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error


def _without_head(template: str, names: Container[str]) -> str:
    """A template without the lines at its head that set these names, which an earlier run may have added."""
    kept = ""
    while line := HEAD.match(template):
        kept += line[0] if (line["name"] or CLOCK) not in names else ""
        template = template[line.end() :]
    return kept + template


def _variables(template: str, setting: str) -> set[str]:
    """The variables that a template reads but does not set."""
    try:
        return meta.find_undeclared_variables(_parse(template))
    except TemplateError as error:
        raise ModelError(f"{setting}.chat_template: {error}") from error


def _parse(template: str) -> nodes.Template:
    known = Environment(extensions=["jinja2.ext.loopcontrols"])  # only for parsing; transformers adds one more tag
    return known.parse(re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template))


def _literal(value: Any) -> str:
    """Write a plain value in Jinja's syntax, which is JSON except for null."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(name))}: {_literal(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _stop_clock(now: datetime) -> str:
    """Write a macro that replaces ``strftime_now``. Jinja removes the line break after it."""
    values = {f"%{code}": now.strftime(f"%{code}") for code in string.ascii_letters}
    values |= {f"%-{code}": str(int(now.strftime(f"%{code}"))) for code in "dHIjmMSy"}
    values["%s"] = str(int(now.replace(tzinfo=UTC).timestamp()))  # independent of the machine's time zone
    steps = "".join(f"|replace({_literal(code)}, {_literal(value)})" for code, value in values.items())
    percent = _literal(chr(PRIVATE[0]))
    value = f"format|replace('%%', {percent}){steps}|replace({percent}, '%')"
    return f"{{% macro {CLOCK}(format) %}}{{{{ {value} }}}}{{% endmacro %}}\n"


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], response: str) -> Rendered:
    """Render a conversation with its response, and split it where sampling begins.

    Raises:
        ModelError: the template cannot render it, loses a part of it, or renders the prompt differently in training and
            in generation.
    """
    prompt = _apply(tokenizer, messages, True, SETTING)
    whole = render_turns(tokenizer, [*messages, {"role": "assistant", "content": response}])
    if not whole.text.startswith(prompt):
        at = next((i for i, (a, b) in enumerate(zip(prompt, whole.text, strict=False)) if a != b), len(whole.text))
        raise ModelError(
            "model: the chat template renders training text differently from generation text, so the policy would be "
            f"trained on prompts it never sees. They differ from character {at} on: generation has "
            f"{prompt[at:][:40]!r}, training has {whole.text[at:][:40]!r}. Set model.chat_template or "
            "model.template_arguments, or correct the tokenizer's template"
        )
    own = [span for span in whole.contents if span.turn == len(messages) and span.start >= len(prompt)]
    start, end = (own[0].start, own[0].end) if own else (len(prompt), len(prompt))
    before = whole.text[len(prompt) : start]
    lead = _lead(tokenizer, messages, prompt) if before else ""
    if not before.startswith(lead) and before.isspace():
        lead = ""  # only white space precedes the response, which contains the rest of the lead
    if not before.startswith(lead):
        raise ModelError(
            f"{SETTING}: writes {lead!r} before other responses and {before!r} before this one, {response[:40]!r}; "
            "the text before a response must not depend on it"
        )
    return Rendered(whole, len(prompt + lead), lead, whole.text[end:])


def _lead(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt: str) -> str:
    """The text that the template writes between the generation prompt and every response.

    Spaces at the end of this text belong to the response: as in samples, the first word's token includes its space.
    """
    whole = render_turns(tokenizer, [*messages, {"role": "assistant", "content": "x"}])
    start = next((s.start for s in whole.contents if s.turn == len(messages) and s.start >= len(prompt)), len(prompt))
    return whole.text[len(prompt) : start].rstrip(" ")


def render_turns(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation: bool = False, setting: str = SETTING
) -> Text:
    """Render a conversation, and locate the texts of its turns.

    Args:
        generation: whether to append the beginning of the assistant's next turn.
        setting: the setting that messages name.

    Raises:
        ModelError: the template cannot render it, leaves out or changes the text of a turn, or writes text that depends
            on the time or is random.
    """
    text = _apply(tokenizer, messages, generation, setting)
    _check_clock(tokenizer, messages, generation, setting, text)
    cores = [message["content"].strip() for message in messages]
    base = next((b for b in PRIVATE if not _has_between(cores, b, b + 2 * len(cores))), 0)
    marked = [
        {**message, "content": message["content"].replace(core, f"{chr(base + 2 * i)}{core}{chr(base + 2 * i + 1)}", 1)}
        for i, (message, core) in enumerate(zip(messages, cores, strict=True))
    ]
    try:
        found = _marks(_apply(tokenizer, marked, generation, setting), base, len(cores))
    except ModelError:  # the template refuses turns with such characters
        found = "", {}
    if found[0] != text and _apply(tokenizer, messages, generation, setting) != text:
        raise ModelError(f"{setting}: renders the same conversation in two ways, at random or depending on the time")
    spans: list[Span] = []
    for i, core in enumerate(cores):
        if core and (found[0] != text or i in found[1]):
            spans += _find(text, core, i, found[1][i] if found[0] == text else [], spans)
        if core and not any(span.turn == i for span in spans):
            advice = _advise(tokenizer, messages, generation, setting) if i == 0 else ""
            raise ModelError(
                f"{setting}: leaves out or changes the text of turn {i + 1} of {len(cores)} ({messages[i]['role']}): "
                f"{core[:40]!r} with its {len(core):,} characters is not in its output{advice}"
            )
    return Text(text, tuple(sorted(spans, key=lambda span: span.start)))


class _Now:
    """Replaces the time when a template asks for it, and records each use, such as writing or comparing it.

    It is not a string, so code that needs a string raises an error, and every use is noticed.
    """

    def __init__(self, text: str, uses: list[str]) -> None:
        self._text, self._uses = text, uses

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        self._uses.append(name)
        return getattr(self._text, name)

    def __hash__(self) -> int:
        return hash(_noted("__str__")(self))

    def __eq__(self, other: object) -> bool:
        return bool(_noted("__eq__")(self, other))


def _noted(name: str) -> Callable[..., Any]:
    def use(self: _Now, *given: Any) -> Any:
        self._uses.append(name)
        if name in ("__int__", "__float__"):
            return {"__int__": int, "__float__": float}[name](self._text)
        if name == "__radd__":
            return given[0] + self._text
        return getattr(self._text, name)(*(str(each) if isinstance(each, _Now) else each for each in given))

    return use


for _name in (
    "str",
    "int",
    "float",
    "len",
    "iter",
    "contains",
    "getitem",
    "add",
    "radd",
    "mod",
    "mul",
    "rmul",
    "format",
):
    setattr(_Now, f"__{_name}__", _noted(f"__{_name}__"))
for _name in ("lt", "le", "gt", "ge"):
    setattr(_Now, f"__{_name}__", _noted(f"__{_name}__"))


def _check_clock(tokenizer: Any, messages: Sequence[Message], generation: bool, setting: str, text: str) -> None:
    """Refuse a template that uses the current time, unless a fixed date is set, or that is random.

    Any use of the time is refused, even if it does not change the present text.

    Args:
        text: the rendering at the present time.
    """
    template = _current(tokenizer, setting)
    if drawn := CHANCE & _words(template):
        raise ModelError(f"{setting}: is random ({', '.join(sorted(drawn))}), so prompts would change each time")
    if CLOCK not in template or f"macro {CLOCK}(" in template:
        return
    uses: list[str] = []
    compiled = _compile(template)
    compiled.globals[CLOCK] = lambda form: _Now(datetime.now().strftime(form), uses)
    settings = {**tokenizer.special_tokens_map, "tools": None, "documents": None, "add_generation_prompt": generation}
    with suppress(Exception):  # raised if a string is needed, since _Now is not a string
        if compiled.render(messages=[dict(message) for message in messages], **settings) == text and not uses:
            return
    remedy = "model.template_date" if setting == SETTING else "judge.template_date (in a fit template_date)"
    raise ModelError(
        f"{setting}: reads the clock ({CLOCK}), so prompts would change from day to day without a change of "
        f"stage keys; set {remedy}, for example to 2026-01-31"
    )


@lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    """Compile a template as transformers does, but separately from the one that transformers caches."""
    theirs: Any = import_module("transformers.utils.chat_template_utils")
    return theirs._cached_compile_jinja_template(template)


@lru_cache(maxsize=16)
def _words(template: str) -> set[str]:
    """The filters and undefined variables that a template uses."""
    try:
        tree = _parse(template)
    except TemplateError:
        return set()  # rendering reports the error
    filters = {node.name for node in tree.find_all(nodes.Filter)}
    return filters | {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}


def _has_between(texts: Sequence[str], first: int, last: int) -> bool:
    """Whether any text has a character from ``first`` to ``last``, code points beyond ASCII."""
    return any(first <= ord(char) <= last for text in texts if not text.isascii() for char in text)


def _marks(marked: str, base: int, turns: int) -> tuple[str, dict[int, list[tuple[int, int]]]]:
    """Remove the marks from a rendering of marked turns; return the text and the spans between marks, by turn."""
    plain: list[str] = []
    at, opened = 0, {}
    found: dict[int, list[tuple[int, int]]] = {}
    for piece in re.split(f"([{chr(base)}-{chr(base + 2 * turns - 1)}])", marked):
        number = ord(piece) - base if len(piece) == 1 else -1
        if not 0 <= number < 2 * turns:
            plain.append(piece)
            at += len(piece)
            continue
        turn, closes = divmod(number, 2)
        pairs = found.setdefault(turn, [])
        if not closes:
            opened[turn] = at
        elif turn in opened:
            pairs.append((opened.pop(turn), at))
    return "".join(plain), found


def _find(text: str, core: str, turn: int, marks: Sequence[tuple[int, int]], before: Sequence[Span]) -> list[Span]:
    """Locate a turn's text by its marks, or by its first occurrence after the earlier turns."""
    spans = [Span(turn, start, end) for start, end in marks]
    if any(text[span.start : span.end] == core for span in spans):
        return spans
    start = text.find(core, before[-1].end if before else 0)
    return [Span(turn, start, start + len(core))] if start >= 0 else []


def _apply(
    tokenizer: Any,
    messages: Sequence[Message],
    generation: bool,
    setting: str,
) -> str:
    try:
        return cast(
            str, tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)
        )
    except Exception as error:  # a template can raise any error
        advice = _advise(tokenizer, messages, generation, setting)
        raise ModelError(f"{setting}: cannot render {[m['role'] for m in messages]} ({error}){advice}") from error


def _advise(tokenizer: Any, messages: Sequence[Message], generation: bool, setting: str) -> str:
    """Advice if a template can render a conversation only without its system turn; "" if it cannot even then.

    A judge's question then has no system turn, and needs no advice.
    """
    if setting != SETTING or len(messages) < 2 or messages[0]["role"] != "system":
        return ""
    try:
        _apply(tokenizer, messages[1:], generation, setting)
    except ModelError:
        return ""
    return NO_SYSTEM
