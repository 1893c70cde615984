"""From text to token ids, so that what comes from the data cannot make a control token.

A tokenizer finds its special tokens wherever their text stands, in a question or a response too: there ``<|im_end|>``
would end a turn, and what follows would be a turn of its own. So a rendering is tokenised as a whole; where a control
token lies in the text of a turn, the text is parted inside of it and the parts are tokenised apart. Text without any
has the tokens of the whole.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from dnpo.policy.template import Span, Text

ANCHOR = "\n"  # before a part inside a text, since SentencePiece puts a space before what begins one
TURNS = ("user", "assistant", "user")


class Token(NamedTuple):
    """A token and where its text stands."""

    id: int
    start: int
    end: int


def tokenize(tokenizer: PreTrainedTokenizerBase, text: Text, stop_ids: Sequence[int] = ()) -> list[int]:
    """The token ids of a text; no special token is put before or behind it.

    Args:
        stop_ids: tokens that end a sample, beside those that the tokenizer calls special.
    """
    return [token.id for token in _part(tokenizer, text, stop_ids)[1]]


def wrap(tokenizer: Any, *texts: str, **options: Any) -> Any:
    """What a tokenizer makes of a text, or of a pair, with the special tokens that it puts around them and no other."""
    cuts = [_part(tokenizer, Text(text, (Span(0, 0, len(text)),)), ())[0] for text in texts]
    if not any(cuts):
        return tokenizer(*texts, **options)
    parts = [[text[a:b] for a, b in pairwise([0, *sorted(c), len(text)])] for text, c in zip(texts, cuts, strict=True)]
    return tokenizer(*parts, is_split_into_words=True, **options)


def control_texts(tokenizer: PreTrainedTokenizerBase, text: Text, stop_ids: Sequence[int] = ()) -> list[str]:
    """What stands in the texts of turns and would be a control token by itself."""
    tokens = list(_tokens(tokenizer, text.text, set()))
    return [text.text[token.start : token.end] for token in _made(tokenizer, text, tokens, stop_ids)]


def _part(tokenizer: Any, text: Text, stop_ids: Sequence[int]) -> tuple[set[int], list[Token]]:
    """Where a text has to be parted, and its tokens then."""
    cuts: set[int] = set()
    while True:
        tokens = list(_tokens(tokenizer, text.text, cuts))
        made = {token.start + 1 for token in _made(tokenizer, text, tokens, stop_ids)}
        if made <= cuts:
            return cuts, tokens
        cuts |= made


def begin(tokenizer: Any, ids: list[int]) -> list[int]:
    """Token ids with the beginning-of-sequence token before them, if the tokenizer puts one before every text."""
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos] and list(tokenizer("")["input_ids"])[:1] == [bos]:
        return [bos, *ids]
    return ids


def _made(tokenizer: Any, text: Text, tokens: Sequence[Token], stop_ids: Sequence[int]) -> Iterator[Token]:
    """The control tokens that lie in the texts of turns, wholly or in part, without white space around them."""
    control = _control(tokenizer, str(tokenizer.chat_template), len(tokenizer), tuple(stop_ids))
    if not tokenizer.is_fast:  # it does not say where its tokens stand
        tokens = list(_spelled(text, control))
    for token in tokens:
        if token.id not in control:
            continue
        shown = text.text[token.start : token.end]
        start = token.start + len(shown) - len(shown.lstrip())
        end = token.start + len(shown.rstrip())
        if token.id == tokenizer.unk_token_id and shown.strip() != tokenizer.unk_token:
            continue  # a character that the tokenizer does not know
        # one character cannot be parted: it is an ordinary one that the tokenizer uses to pad, say
        if end - start > 1 and any(a < end and start < b for _, a, b in text.contents):
            yield Token(token.id, start, end)


def _spelled(text: Text, control: Mapping[int, str]) -> Iterator[Token]:
    """The texts of control tokens in the texts of turns, of two that overlap the longer one or the first."""
    longest_first = sorted(control, key=lambda i: -len(control[i]))
    ids = {control[i]: i for i in reversed(longest_first)}
    pattern = re.compile("|".join(map(re.escape, sorted(ids, key=len, reverse=True))) or "(?!)")
    for _, start, end in text.contents:
        for match in pattern.finditer(text.text, start, end):
            yield Token(ids[match.group()], *match.span())


@lru_cache(maxsize=8)
def _control(tokenizer: Any, template: str, size: int, stop_ids: tuple[int, ...]) -> Mapping[int, str]:
    """Texts of the tokens that are special, end a sample, or are written by the template around turns; by id.

    Args:
        template, size: what else it depends on: the tokenizer's template and its number of tokens.
    """
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= added.keys() & {*tokenizer.all_special_ids, *stop_ids}
    for roles in (TURNS, TURNS[:1]):
        try:
            turns = [{"role": role, "content": "x"} for role in roles]
            written = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # such turns cannot be rendered: perhaps fewer can; without a template none
            continue
        ids = tokenizer(written, add_special_tokens=False)["input_ids"]
        special |= {i for i in ids if i in added and not added[i].isspace()}
        break
    return {i: added[i] for i in sorted(special)}


def _tokens(tokenizer: Any, text: str, cuts: set[int]) -> Iterator[Token]:
    """The tokens of a text that is parted at some places."""
    for start, end in pairwise([0, *sorted(cuts), len(text)]):
        piece = text[start:end]
        if start == 0:
            yield from _read(tokenizer, piece, 0)
            continue
        anchor, ids = list(_read(tokenizer, ANCHOR, 0)), list(_read(tokenizer, ANCHOR + piece, start - len(ANCHOR)))
        if [token.id for token in ids[: len(anchor)]] == [token.id for token in anchor]:
            yield from ids[len(anchor) :]
        else:
            yield from _read(tokenizer, piece, start)


def _read(tokenizer: Any, text: str, start: int) -> Iterator[Token]:
    if not tokenizer.is_fast:
        yield from (Token(i, start, start) for i in tokenizer(text, add_special_tokens=False)["input_ids"])
        return
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    for token, (a, b) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        yield Token(token, start + a, start + b)
