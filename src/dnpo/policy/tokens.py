"""Tokenise text so that text from the data can never become a control token.

A tokenizer recognises special tokens everywhere, even in a question or a response: ``<|im_end|>`` in the data would end
the turn, and a forged turn could follow. So a rendering is first tokenised as a whole. If a control token is found in
the text of a turn, the text is split inside this token, and the parts are tokenised separately. Text without control
tokens is not split.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from dnpo.policy.template import Span, Text

ANCHOR = "\n"  # written before every part but the first: SentencePiece adds a space at the start of a text
TURNS = ("user", "assistant", "user")


class Token(NamedTuple):
    """A token and the position of its text."""

    id: int
    start: int
    end: int


def tokenize(tokenizer: PreTrainedTokenizerBase, text: Text, stop_ids: Sequence[int] = ()) -> list[int]:
    """Tokenise a text without special tokens around it, and return the token ids.

    Args:
        stop_ids: tokens that end a sample, in addition to the tokenizer's special tokens.
    """
    return [token.id for token in _part(tokenizer, text, stop_ids)[1]]


def tokenize_many(tokenizer: Any, texts: Sequence[Text], stop_ids: Sequence[int] = ()) -> list[list[int]]:
    """Tokenise many texts in one call of the tokenizer; texts that must be split are tokenised one by one."""
    if not texts or not tokenizer.is_fast:
        return [tokenize(tokenizer, text, stop_ids) for text in texts]
    control = _control(tokenizer, str(tokenizer.chat_template), len(tokenizer), tuple(stop_ids))
    none = {"return_token_type_ids": False, "return_attention_mask": False}
    encoded = tokenizer([text.text for text in texts], add_special_tokens=False, **none)
    found: list[list[int]] = []
    for text, encoding, ids in zip(texts, encoded.encodings, encoded["input_ids"], strict=True):
        special = [Token(id, *encoding.token_to_chars(i)) for i, id in enumerate(ids) if id in control]
        made = any(True for _ in _made(tokenizer, text, special, stop_ids))
        found.append(tokenize(tokenizer, text, stop_ids) if made else ids)
    return found


def wrap(tokenizer: Any, *texts: str, **options: Any) -> Any:
    """Tokenise a text or a pair of texts, with the tokenizer's special tokens around but not within the texts."""
    cuts = [_part(tokenizer, Text(text, (Span(0, 0, len(text)),)), ())[0] for text in texts]
    if not any(cuts):
        return tokenizer(*texts, **options)
    parts = [[text[a:b] for a, b in pairwise([0, *sorted(c), len(text)])] for text, c in zip(texts, cuts, strict=True)]
    return tokenizer(*parts, is_split_into_words=True, **options)


def control_texts(tokenizer: PreTrainedTokenizerBase, text: Text, stop_ids: Sequence[int] = ()) -> list[str]:
    """The strings in the texts of turns that would become control tokens."""
    tokens = list(_tokens(tokenizer, text.text, set()))
    return [text.text[token.start : token.end] for token in _made(tokenizer, text, tokens, stop_ids)]


def _part(tokenizer: Any, text: Text, stop_ids: Sequence[int]) -> tuple[set[int], list[Token]]:
    """The positions at which a text must be split, and the resulting tokens."""
    cuts: set[int] = set()
    while True:
        tokens = list(_tokens(tokenizer, text.text, cuts))
        made = {token.start + 1 for token in _made(tokenizer, text, tokens, stop_ids)}
        if made <= cuts:
            return cuts, tokens
        cuts |= made


def begin(tokenizer: Any, ids: list[int]) -> list[int]:
    """Prepend the beginning-of-sequence token, if the tokenizer puts one before every text."""
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos] and list(tokenizer("")["input_ids"])[:1] == [bos]:
        return [bos, *ids]
    return ids


def _made(tokenizer: Any, text: Text, tokens: Sequence[Token], stop_ids: Sequence[int]) -> Iterator[Token]:
    """The control tokens that overlap the texts of turns, without surrounding white space."""
    control = _control(tokenizer, str(tokenizer.chat_template), len(tokenizer), tuple(stop_ids))
    if not tokenizer.is_fast:  # a slow tokenizer does not give the positions of tokens
        tokens = list(_spelled(text, control))
    for token in tokens:
        if token.id not in control:
            continue
        shown = text.text[token.start : token.end]
        start = token.start + len(shown) - len(shown.lstrip())
        end = token.start + len(shown.rstrip())
        if token.id == tokenizer.unk_token_id and shown.strip() != tokenizer.unk_token:
            continue  # an unknown character
        # a single character cannot be split; it is an ordinary character that the tokenizer also uses, say, as padding
        if end - start > 1 and any(a < end and start < b for _, a, b in text.contents):
            yield Token(token.id, start, end)


def _spelled(text: Text, control: Mapping[int, str]) -> Iterator[Token]:
    """The texts of control tokens in the texts of turns. Of two that overlap, the longer one counts, or the first."""
    longest_first = sorted(control, key=lambda i: -len(control[i]))
    ids = {control[i]: i for i in reversed(longest_first)}
    pattern = re.compile("|".join(map(re.escape, sorted(ids, key=len, reverse=True))) or "(?!)")
    for _, start, end in text.contents:
        for match in pattern.finditer(text.text, start, end):
            yield Token(ids[match.group()], *match.span())


@lru_cache(maxsize=8)
def _control(tokenizer: Any, template: str, size: int, stop_ids: tuple[int, ...]) -> Mapping[int, str]:
    """The texts, by id, of tokens that are special, end a sample, or are written by the template around turns.

    Args:
        template, size: the tokenizer's template and number of tokens, to distinguish cached results.
    """
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= added.keys() & {*tokenizer.all_special_ids, *stop_ids}
    for roles in (TURNS, TURNS[:1]):
        try:
            turns = [{"role": role, "content": "x"} for role in roles]
            written = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # such turns cannot be rendered; fewer turns may be
            continue
        ids = tokenizer(written, add_special_tokens=False)["input_ids"]
        special |= {i for i in ids if i in added and not added[i].isspace()}
        break
    return {i: added[i] for i in sorted(special)}


def _tokens(tokenizer: Any, text: str, cuts: set[int]) -> Iterator[Token]:
    """The tokens of a text that is split at some positions."""
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
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    for token, (a, b) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        yield Token(token, start + a, start + b)
