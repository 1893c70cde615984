"""Check chat template and tokens, on rows rendered and encoded as in the stages."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from dnpo.errors import ModelError
from dnpo.policy.template import Span, Text, render
from dnpo.policy.tokenizer import encode, human_response
from dnpo.policy.tokens import control_texts, tokenize
from dnpo.records import Prompt, Response
from dnpo.running.gate.finding import OWN_ERROR, Finding

Cut = Callable[[PreTrainedTokenizerBase, Prompt, list[int], int], Response]

TEMPLATE = "model.chat_template"


class EncodedRow(NamedTuple):
    """A row with the token ids of its prompt and of the whole human response, encoded as in the stages."""

    prompt: Prompt
    prompt_ids: list[int]
    ids: list[int]


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Prompt], stop_ids: Sequence[int]
) -> list[EncodedRow]:
    """Encode rows that passed the check of the template."""
    return [EncodedRow(row, *encode(tokenizer, row.messages, row.human, stop_ids)) for row in rows]


def template(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Prompt]) -> Finding:
    """Check that the training text begins with the prompt used in generation, and contains every turn."""
    broken: list[tuple[Prompt, str]] = []
    for row in rows:
        try:
            render(tokenizer, row.messages, row.human)
        except ModelError as error:
            broken.append((row, str(error)))
    if broken:
        first, problem = broken[0]
        text = f"in {len(broken):,} of {len(rows):,} rows, the first is {first.id}: {problem}"
        return Finding("template", "stop", text, TEMPLATE)
    text = f"training text begins with the prompt of generation, and has the text of every turn, in {len(rows):,} rows"
    return Finding("template", "pass", text)


def training_text(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], rows: Sequence[Prompt]) -> Finding:
    """Check that the training text is only prompt, response and end: other text would reveal human responses."""
    ends = [str(tokenizer.decode([i])) for i in stop_ids]
    special = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    more, leads = [], Counter[str]()
    for row in rows:
        rendered = render(tokenizer, row.messages, row.human)
        leads[rendered.lead] += 1
        before_end = min((rendered.after.partition(end)[0] for end in ends if end), key=len, default=rendered.after)
        for token in special:
            before_end = before_end.replace(token, "")
        if before_end.strip():
            more.append((row, before_end))
    if more:
        first, found = more[0]
        text = (
            f"in {len(more):,} of {len(rows):,} rows, the first is {first.id}, the template writes {found[:40]!r} "
            "between response and end: human responses would have it and samples would not"
        )
        return Finding("training text", "stop", text, TEMPLATE)
    text = f"it is prompt, response and end, and nothing else, in {len(rows):,} rows"
    if not any(leads):
        return Finding("training text", "pass", text)
    lead, count = Counter({lead: count for lead, count in leads.items() if lead}).most_common(1)[0]
    text += f"; {lead[:40]!r}, which the template writes before {count:,} of the responses, is part of the prompt"
    if len(leads) == 1:
        return Finding("training text", "pass", text)
    text += ", and so prompts of one data set end in different ways"
    return Finding("training text", "warn", text, f"{TEMPLATE}, model.template_arguments, or the data")


def control_tokens(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], rows: Sequence[Prompt]) -> Finding:
    """Count the rows whose text contains the text of control tokens."""
    spelled, first = 0, ""
    for row in rows:
        found = control_texts(tokenizer, render(tokenizer, row.messages, row.human).whole, stop_ids)
        first = first or (f"{row.id} with {found[0]}" if found else "")
        spelled += bool(found)
    if spelled:
        text = (
            f"{spelled:,} of {len(rows):,} rows have the text of control tokens, the first is {first}; it is "
            "tokenised as ordinary text, and ends no turn"
        )
        return Finding("control tokens", "warn", text, "the data, if it should not be there")
    return Finding("control tokens", "pass", f"none of {len(rows):,} rows contains the text of a control token")


def one_bos(tokenizer: PreTrainedTokenizerBase, rows: Sequence[EncodedRow]) -> Finding:
    """Check that a row has one beginning-of-sequence token, at its beginning."""
    bos = cast(int | None, tokenizer.bos_token_id)
    if bos is None:
        return Finding("one BOS", "pass", "the tokenizer has no beginning-of-sequence token, and no row has one")
    name = str(tokenizer.bos_token)
    twice = [row for row in rows if row.prompt_ids[:2] == [bos, bos]]
    if twice:
        text = f"{len(twice):,} of {len(rows):,} prompts begin with {name} twice; the template must put it once"
        return Finding("one BOS", "stop", text, TEMPLATE)
    # If BOS and EOS are the same token, the other occurrences are ends.
    again = [r for r in rows if bos in [*r.prompt_ids[1:], *r.ids]] if bos != tokenizer.eos_token_id else []
    if again:
        text = (
            f"{name} occurs again inside {len(again):,} of {len(rows):,} rows, the first is {again[0].prompt.id}: the "
            "template puts it before every turn"
        )
        return Finding("one BOS", "warn", text, TEMPLATE)
    first = sum(row.prompt_ids[:1] == [bos] for row in rows)
    text = f"{first:,} of {len(rows):,} prompts begin with {name}, and no row has another"
    return Finding("one BOS", "pass", text)


def one_eos(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], rows: Sequence[EncodedRow]) -> Finding:
    """Check that a whole human response has one end token, at its end, and none inside its text."""
    stops = set(stop_ids)
    wrong = [row for row in rows if [i in stops for i in row.ids] != [False] * (len(row.ids) - 1) + [True]]
    if wrong:
        text = (
            f"{len(wrong):,} of {len(rows):,} responses do not have exactly one end, at their end; the first is "
            f"{wrong[0].prompt.id}, which ends with {tokenizer.decode(wrong[0].ids[-3:])!r}"
        )
        return Finding("one EOS", "stop", text, TEMPLATE)
    # An end that is not a special token, such as a line break, ends a response even in the middle of its text.
    early = [row for row in rows if stops & set(_tokenize_content(tokenizer, row.prompt.human, stop_ids))]
    if early:
        text = (
            f"{len(early):,} of {len(rows):,} responses have the text of a token that ends a response, and are cut "
            f"there; the first is {early[0].prompt.id}"
        )
        return Finding("one EOS", "warn", text, "the data (remove that text)")
    ends = " or ".join(sorted({str(tokenizer.decode([row.ids[-1]])) for row in rows}))
    return Finding("one EOS", "pass", f"each of {len(rows):,} responses ends with one {ends}")


def no_eos_where_cut(
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    rows: Sequence[EncodedRow],
    limit: int,
    cut: Cut = human_response,
) -> Finding:
    """Check that only complete responses have an end token; otherwise the end would reveal who wrote them.

    Every row is tried twice, cut at the limit and at half its length, since it is possible that no row reaches the
    limit.
    """
    wrong = []
    for row in rows:
        for most in {limit, max(min(limit, len(row.ids) // 2), 1)}:
            response = cut(tokenizer, row.prompt, row.ids, most)
            ended = bool(response.token_ids) and response.token_ids[-1] in stop_ids
            whole = len(row.ids) <= most
            if ended != whole or (response.finish == "eos") != whole or len(response.token_ids) > most:
                wrong.append(row)
                break
    if wrong:
        text = (
            f"{len(wrong):,} of {len(rows):,} human responses, the first is {wrong[0].prompt.id}, end differently "
            f"from samples: a cut one must have no end-of-sequence token, and a whole one must have one; {OWN_ERROR}"
        )
        return Finding("no EOS where cut", "stop", text)
    return Finding("no EOS where cut", "pass", f"{len(rows):,} responses, cut on purpose, end without one")


def ends_of_model(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], rows: Sequence[EncodedRow]) -> Finding:
    """Check that the tokenizer's end-of-sequence token is one of the model's too.

    Args:
        ends: end-of-sequence tokens in the model's configuration and generation settings.
        rows: rows with whole human responses.
    """
    eos = cast(int, tokenizer.eos_token_id)
    own = f"{tokenizer.eos_token} ({eos})"
    setting = "eos_token of the tokenizer, or eos_token_id in the model's generation_config.json"
    if not ends:
        text = f"the model names no end-of-sequence token, so only the tokenizer's {own} ends a sample"
        return Finding("EOS of the model", "warn", text, setting)
    named = ", ".join(f"{tokenizer.decode([end])} ({end})" for end in ends)
    if eos in ends:
        return Finding("EOS of the model", "pass", f"the tokenizer's {own} is among the model's: {named}")
    text = f"the tokenizer's is {own}, the model's {named}"
    if all(row.ids[-1] in ends for row in rows):
        text += "; the template ends responses with the model's, so nothing depends on the tokenizer's"
        return Finding("EOS of the model", "warn", text, setting)
    text += ": human responses would end with one and the model's own with the other, which gives away who wrote them"
    return Finding("EOS of the model", "stop", text, setting)


def seam(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Prompt], stop_ids: Sequence[int] = ()) -> Finding:
    """Check that prompt and response have the same tokens together and separately; warn if a token spans both."""
    moved, other = [], 0
    for row in rows:
        rendered = render(tokenizer, row.messages, row.human)
        before, after, whole = (
            tokenize(tokenizer, text, stop_ids) for text in (rendered.prompt, rendered.rest, rendered.whole)
        )
        if whole[: len(before)] != before:
            moved.append((row, next(i for i, (a, b) in enumerate(zip([*before, -1], whole, strict=False)) if a != b)))
        elif whole[len(before) :] != after:
            other += 1
    if moved:
        first, at = moved[0]
        text = (
            f"in {len(moved):,} of {len(rows):,} rows a token reaches over the end of the prompt (the first is "
            f"{first.id}, at token {at}); there the response is tokenised by itself, so that in training it follows "
            "the same prompt tokens as in sampling"
        )
        return Finding("seam", "warn", text, f"{TEMPLATE} (let the prompt end with a special token or a new line)")
    if other:
        text = (
            f"in {other:,} of {len(rows):,} rows a response by itself has other tokens than after its prompt: it is "
            "tokenised after its prompt, as a sample is"
        )
        return Finding("seam", "pass", text)
    return Finding(
        "seam", "pass", f"prompt and response have the same tokens together and apart, in {len(rows):,} rows"
    )


def _tokenize_content(tokenizer: PreTrainedTokenizerBase, text: str, stop_ids: Sequence[int]) -> list[int]:
    return tokenize(tokenizer, Text(text, (Span(0, 0, len(text)),)), stop_ids)
