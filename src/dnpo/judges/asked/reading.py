"""Read a judge's reply. An unambiguous reply gives a value; any other is a failure, and nothing is guessed."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Mode = Literal["score", "pairwise"]

# --- text around a reply

_THOUGHTS = [
    (f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "thoughts", "reasoning", "seed:think")
] + [("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"), ("<|channel|>analysis", "<|channel|>final<|message|>")]
_END = re.compile(r"(?:</s>|<eos>|<end_of_turn>|<\|[a-z_]{1,40}\|>)\Z", re.IGNORECASE)
_FENCE = re.compile(r"```(?:[a-z]*\s*\n|json)?(.+)```", re.IGNORECASE | re.DOTALL)
LONGEST = 4000  # characters; longer texts are not searched for boxes and tags
_BOXED = re.compile(r"\$*\s*\\boxed\{([^{}]*)\}\s*\$*")
_TAGGED = re.compile(r"<(score|rating|grade|winner|verdict)>([^<>]*)</\1>", re.IGNORECASE)


def drop_thought(reply: str) -> str:
    """Remove the thought from the beginning of a reply, as reasoning models write it.

    The thought's opening mark may be missing, since some templates write it into the prompt.

    Raises:
        ValueError: the thought does not end, nothing follows it, or there is another one.
    """
    for begins, ends in _THOUGHTS:
        opened = re.match(rf"\s*{re.escape(begins)}", reply, re.IGNORECASE)
        closed = re.search(re.escape(ends), reply, re.IGNORECASE)
        if opened and not closed:
            raise ValueError("nothing but an unfinished thought in the reply")
        if closed and (opened or not re.search(re.escape(begins), reply[: closed.start()], re.IGNORECASE)):
            rest = reply[closed.end() :]
            if _has_marks(rest):
                raise ValueError("more than one thought in the reply")
            if not rest.strip():
                raise ValueError("nothing after the thought in the reply")
            return rest
    if _has_marks(reply):
        raise ValueError("text before a thought in the reply")
    return reply


def _has_marks(text: str) -> bool:
    lower = text.lower()
    return any(mark.lower() in lower for pair in _THOUGHTS for mark in pair)


def _strip(reply: str) -> str:
    """Remove marks without meaning: end marks, a code fence, a box of LaTeX, a tag with the value's name."""
    text = reply.strip()
    while mark := _END.search(text[-60:]):
        text = text[: -len(mark.group())].rstrip()
    fenced = _FENCE.fullmatch(text)
    text = fenced.group(1).strip() if fenced else text
    if len(text) > LONGEST:
        return text
    text = _BOXED.sub(r"\1", text)
    tagged = _TAGGED.fullmatch(text)
    return tagged.group(2).strip() if tagged else text


# --- scores

_LEAD, _TAIL = r"(?:#{1,6}\s+)?[\s*_`\"'(\[]*", r"[\s*_`\"')\].]*"
_NUMBER = r"([0-9]+)(\.0+)?(?:[*_`)\]]*(?:\s*/\s*|\s+out\s+of\s+)(100))?"
_OF = r"(?:\s+(?:of|for)\s+(?:the|this)\s+(?:(?:given|above|assistant's|model's)\s+)?(?:answer|response))?"
_ALONE = re.compile(rf"{_LEAD}{_NUMBER}{_TAIL}", re.IGNORECASE)
_NAMED = re.compile(
    rf"{_LEAD}(?:(?:the|this|my|overall|final|total|quality)\s+)*(?:score|rating|grade){_OF}(?:\s+is)?"
    rf"[\s*_`:=\"'(\[]*{_NUMBER}{_TAIL}",
    re.IGNORECASE,
)
_SCORES = {"score", "rating", "grade"}
_OTHER_SCALE = r"\s*(?:/|\bout\s+of)\s*(?!100\b)[0-9]"
_SCALE = re.compile(r"max|scale|range|out.?of|^of$|possible", re.IGNORECASE)
_VERDICT = re.compile(r"\W*(?:-?[0-9.]+(?:\s*/\s*[0-9]+)?|A|B|TIE)\W*", re.IGNORECASE)
_RIVAL = re.compile(r"final|overall|total|adjusted|revised|updated|corrected|new_", re.IGNORECASE)


def read_score(reply: str, pattern: re.Pattern[str] | None = None) -> float:
    """The whole number from 0 to 100 that a reply gives.

    The number is written as ``83``, ``83.0`` or ``83/100``: alone, after the word score, rating or grade ("The score is
    83."), or in a JSON object under such a name (``{"score": 83, "reason": "…"}``). A closed thought at the beginning,
    marks around the number and a code fence are ignored. Anything else is a failure: two numbers, fractions, signs,
    numbers out of range, sentences that mention a number.

    Args:
        pattern: if it matches, its group is read instead of the whole reply; all matches must give the same value.

    Raises:
        ValueError: says what is wrong.
    """
    return _read(reply, pattern, _read_number)


def _read_number(text: str) -> float:
    inner = _value_of(text, _SCORES) if text.startswith("{") else text
    found = _ALONE.fullmatch(inner) or _NAMED.fullmatch(inner)
    if found is None:
        problem = "not one whole number alone" if re.search("[0-9]", text) else "no number"
        raise ValueError(f"{problem} in the reply")
    digits, point, of = found.groups()
    if len(digits) > 3 or int(digits) > 100:
        raise ValueError("a number outside 0-100 in the reply")
    if point and not of and int(digits) == 1:
        raise ValueError("1.0, which may be a share or 1 point of 100, in the reply")
    return float(digits)


# --- comparisons

_WHO = r"(?:(?:answer|response)\s+)?"
_WINNER = re.compile(rf"{_LEAD}{_WHO}(A|B|TIE){_TAIL}", re.IGNORECASE | re.ASCII)
_NAMED_WINNER = re.compile(
    rf"{_LEAD}(?:(?:the|my|final|overall)\s+)*(?:(?:better|best|preferred)(?:\s+(?:answer|response|one))?|winner|verdict)"
    rf"(?:\s+is|\s*[*_`]*[:=])[\s*_`\"'(\[]*{_WHO}(A|B|TIE){_TAIL}",
    re.IGNORECASE | re.ASCII,
)
_IS_BETTER = re.compile(
    rf"{_LEAD}(?:(?:answer|response)\s+[*_`\"']*)?(A|B)[*_`\"']*\s+is\s+(?:the\s+)?better"
    rf"(?:\s+(?:one|answer|response))?{_TAIL}",
    re.IGNORECASE | re.ASCII,
)
_WINNERS = {"better", "winner", "verdict"}


def read_winner(reply: str, pattern: re.Pattern[str] | None = None) -> float:
    """100 for A, 0 for B, 50 for a tie. The reply is that word, a sentence ("The better answer is A.") or JSON.

    Args:
        pattern: as for :func:`read_score`.

    Raises:
        ValueError: the reply has another form.
    """
    return _read(reply, pattern, _read_letter)


def _read_letter(text: str) -> float:
    if text.startswith("{"):
        found = re.fullmatch("(A|B|TIE)", _value_of(text, _WINNERS))
    else:
        found = _WINNER.fullmatch(text) or _NAMED_WINNER.fullmatch(text) or _IS_BETTER.fullmatch(text)
    if found is None:
        raise ValueError("neither A, B nor TIE alone in the reply")
    return {"A": 100.0, "B": 0.0, "TIE": 50.0}[found.group(1).upper()]


# --- both


def _read(reply: str, pattern: re.Pattern[str] | None, read: Any) -> float:
    text = drop_thought(reply)
    if pattern is not None:
        found = {match.group(1) or "" for match in pattern.finditer(text)}
        values: set[float] = {read(_strip(each)) for each in found}
        if len(values) > 1:
            raise ValueError("judge.pattern finds different values in the reply")
        if values:
            return values.pop()
    return float(read(_strip(text)))


class _Object(list[tuple[str, Any]]):
    """A JSON object as a list of pairs, so that repeated names are noticed."""


class _Literal(str):
    """A number of a JSON object, as its text."""


def _value_of(text: str, names: set[str]) -> str:
    """The value of a JSON object under one of these names, as text.

    Raises:
        ValueError: the text is not such an object, the object has none or several of the names, or the value is
            ambiguous because of another scale than 0 to 100 or another name such as ``final_score``.
    """
    try:
        found = json.loads(text, object_pairs_hook=_Object, parse_int=_Literal, parse_float=_Literal)
    except (ValueError, RecursionError):
        return text
    values = [value for name, value in found if name.casefold() in names]
    if len(values) != 1 or not isinstance(values[0], str):
        return text
    others = [(name, _plain(value)) for name, value in found if name.casefold() not in names]
    scales = {number for name, value in others if _SCALE.search(name) for number in re.findall("[0-9]+", value)}
    rivals = {value for name, value in others if _RIVAL.search(name) and _VERDICT.fullmatch(value)}
    # Other numbers in prose ("3 out of 4 causes") are not the score; a score on another scale is ambiguous.
    rescaled = re.search(rf"(?<![0-9.]){re.escape(values[0].strip())}{_OTHER_SCALE}", text, re.IGNORECASE)
    if scales - {"0", "100"} or rivals - {values[0]} or rescaled:
        raise ValueError("another value that may be meant, or another scale, in the reply")
    return values[0]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# --- log-probabilities


def read_expected_score(tokens: Sequence[Mapping[str, float]]) -> float:
    """The expected score: the mean over the likeliest tokens at the position of the number in the reply.

    Args:
        tokens: for each position of the reply, the log-probabilities of the likeliest tokens, the chosen one first.

    Raises:
        ValueError: :func:`read_score` cannot read the reply, or it does not begin with a number that is one token.
    """
    reply = [next(iter(top)) for top in tokens]
    number = read_score("".join(reply))
    at = next(i for i, token in enumerate(reply) if token.strip())
    if not re.fullmatch(r"\s*[0-9]+\s*", reply[at]):
        raise ValueError("the reply does not begin with a number")
    if int(reply[at]) != number:
        raise ValueError("the judge writes a number in several tokens; set judge.reading=text")
    mass: dict[int, float] = {}
    for token, logp in tokens[at].items():
        if re.fullmatch(r"\s*[0-9]{1,3}", token) and int(token) <= 100:
            mass[int(token)] = mass.get(int(token), 0.0) + _probability(logp)
    total = sum(mass.values())
    if not total > 0.0:  # NaN included
        raise ValueError("no probability on a number from 0 to 100")
    return min(sum(number * p for number, p in mass.items()) / total, 100.0)


def read_expected_winner(tokens: Sequence[Mapping[str, float]]) -> float:
    """100 × P(A) / (P(A) + P(B)), from the likeliest tokens at the reply's first word.

    Raises:
        ValueError: :func:`read_winner` cannot read the reply, or neither A nor B is among the likeliest tokens.
    """
    reply = [next(iter(top)) for top in tokens]
    read_winner("".join(reply))
    at = next(i for i, token in enumerate(reply) if token.strip())
    a, b = (sum(_probability(p) for token, p in tokens[at].items() if token.strip() == name) for name in "AB")
    if not a + b > 0.0:  # NaN included
        raise ValueError("neither A nor B among the likeliest tokens of the reply")
    return 100.0 * a / (a + b)


def _probability(logp: float) -> float:
    return math.exp(min(logp, 0.0)) if logp == logp else math.nan
