"""Compare responses with verifiable answers.

0-100 points: correctness 60, completeness 25 (the share of the words in ``Prompt.needs`` that are mentioned), form 15
(a capital or digit at the beginning, one full stop at the end, no word twice in a row; 5 each).
"""

import re
from collections import Counter
from itertools import pairwise

from dnpo.records import Prompt

_MARKERS = {"is", "are", "equals", ":"}
_TOKEN = re.compile(r"(?<!\w)[-−]?\d+(?:\.\d+)?|[^\W_]+|:")


def points(prompt: Prompt, text: str) -> float:
    """Give points to a response by the rules at the head of this file; the prompt must have an answer."""
    return 60.0 * correct(prompt, text) + 25.0 * completeness(prompt, text) + form(text)


def correct(prompt: Prompt, text: str) -> bool:
    """Whether the response is the prompt's answer, see :func:`is_right`."""
    return is_right(prompt.answer, text)


def is_right(expected: str | None, text: str) -> bool:
    """Whether a text is the expected answer, or ends with it directly after "is", "are", "equals" or a colon.

    Only words and numbers are compared, in lower case.
    """
    if expected is None:
        return False
    tokens, answer = _tokens(text), _tokens(expected)
    before = tokens[: len(tokens) - len(answer)]
    return bool(answer) and tokens[len(before) :] == answer and (not before or before[-1] in _MARKERS)


def read_answer(text: str) -> str:
    """Find the answer of a response.

    The answer is the words and numbers after the last "is", "are", "equals" or colon. If there is none of these, it is
    all words and numbers; without any words or numbers it is "".
    """
    tokens = _tokens(text)
    last = max((place for place, token in enumerate(tokens) if token in _MARKERS), default=-1)
    return " ".join(tokens[last + 1 :])


def completeness(prompt: Prompt, text: str) -> float:
    """The share of the prompt's needed words that the response mentions, each as often as needed."""
    needed = Counter(w for need in prompt.needs for w in words(need))
    if not needed:
        return 1.0
    return (needed & Counter(words(text))).total() / needed.total()


def form(text: str) -> float:
    """0, 5, 10 or 15 points for initial capital, full stop and no repeated word; 0 for an empty response."""
    tokens = words(text)
    if not tokens:
        return 0.0
    capital = text[0].isupper() or text[0].isdigit()
    stop = text.endswith(".") and len(re.findall(r"\.(?!\d)", text)) == 1
    stutters = any(a == b for a, b in pairwise(tokens))
    return 5.0 * (capital + stop + (not stutters))


def words(text: str) -> list[str]:
    """The words and numbers of a text, numbers with their sign and decimals, in lower case."""
    return [token for token in _tokens(text) if token != ":"]


def _tokens(text: str) -> list[str]:
    return [token.lower().replace("−", "-") for token in _TOKEN.findall(text)]
