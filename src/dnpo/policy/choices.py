"""Ask a policy to choose between A and B, and read its choice from the logits of its next token.

Only the logits of the two letters are computed, at the last position of each question: S × 2 numbers. The common
beginning of several questions, such as all questions about one prompt, is read once.

Shapes: S questions, H hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import cast

import torch
from torch import Tensor

from dnpo.errors import ModelError
from dnpo.policy.model import SCORED_TOKENS, Policy
from dnpo.policy.packing import pack_shared
from dnpo.policy.question import LETTERS, ask
from dnpo.policy.tokenizer import encode
from dnpo.records import Message


class Choices:
    """Asks a policy questions with two choices, all by one template.

    Args:
        policy: the policy; only its tokenizer and configuration are read before a question is asked.
        template: as :func:`~dnpo.policy.question.check_template` accepts it.

    Raises:
        ModelError: a letter is not a single token in its replies.
    """

    def __init__(self, policy: Policy, template: str) -> None:
        self.policy, self.template = policy, template
        self.letters = find_letters(policy, template)

    @property
    def context(self) -> int:
        """The maximum number of tokens that the policy reads."""
        return int(getattr(self.policy.causal_lm.config, "max_position_embeddings", 0) or 10**9)

    def encode(self, messages: Sequence[Message], first: str, second: str) -> list[int]:
        """The token ids of a question, up to the beginning of the reply."""
        asked = ask(self.template, messages, first, second)
        return encode(self.policy.tokenizer, asked, LETTERS[0], self.policy.stop_ids)[0]

    @torch.no_grad()
    def probabilities(self, groups: Sequence[Sequence[list[int]]]) -> list[list[float]]:
        """The probability of A after each question, by the softmax over the logits of A and B.

        Args:
            groups: questions as token ids. Equal questions are read once. The common beginning of a group's questions
                is read once too, which changes results only by rounding.
        """
        distinct = [list(map(list, dict.fromkeys(map(tuple, group)))) for group in groups]
        found: list[dict[tuple[int, ...], float]] = [{} for _ in groups]
        letter = self.letters[0]
        for some in _batches(distinct):
            prompts: list[list[int]] = []
            rests: list[list[int]] = []
            first: list[int] = []
            for _, asked in groupby(some, key=lambda place: place[0]):
                questions = [distinct[number][i] for number, i in asked]
                shared = _common(questions)
                first += [len(prompts) if shared else len(prompts) + s for s in range(len(questions))]
                prompts += [ids[: max(shared, 1)] for ids in questions]
                # a letter is appended to each sequence, so that the hidden state that predicts it is computed
                rests += [[*ids[max(shared, 1) :], letter] for ids in questions]
            batch = pack_shared(prompts, rests, first).to(self.policy.device)
            with self.policy.evaluating():
                hidden_SH = self.policy.hidden(batch)[batch.completions_S.cumsum(0) - 1]
            for (number, i), p in zip(some, self._choose(hidden_SH), strict=True):
                found[number][tuple(distinct[number][i])] = p
        return [[known[tuple(ids)] for ids in group] for group, known in zip(groups, found, strict=True)]

    def _choose(self, hidden_SH: Tensor) -> list[float]:
        """P(A) against B from the states that predict the reply; only two rows of the output head are read."""
        head, letters = self.policy.head, list(self.letters)
        bias_2 = None if head.bias_V is None else head.bias_V[letters]
        logits_S2 = replace(head, weight_VH=head.weight_VH[letters], bias_V=bias_2).logits(hidden_SH)
        return cast(list[float], logits_S2.double().softmax(-1)[:, 0].tolist())


def _common(questions: Sequence[list[int]]) -> int:
    """The number of tokens at the beginning that all questions share."""
    first, last = min(questions), max(questions)
    return next((t for t, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _batches(groups: Sequence[Sequence[list[int]]]) -> Iterator[list[tuple[int, int]]]:
    """Yield batches of questions as (group, number), groups of short questions first."""
    some: list[tuple[int, int]] = []
    total = 0
    for number in sorted(range(len(groups)), key=lambda n: max(map(len, groups[n]), default=0)):
        for i, ids in enumerate(groups[number]):
            if some and total + len(ids) > SCORED_TOKENS:
                yield some
                some, total = [], 0
            some.append((number, i))
            total += len(ids)
    if some:
        yield some


def find_letters(policy: Policy, template: str) -> tuple[int, int]:
    """The first tokens of replies that choose A or B.

    Raises:
        ModelError: a letter is not a single token.
    """
    tokenizer = policy.tokenizer
    asked = ask(template, [{"role": "user", "content": "?"}], "1", "2")
    found: list[int] = []
    for letter in LETTERS:
        _, ids = encode(tokenizer, asked, letter, policy.stop_ids)
        shown = str(tokenizer.decode(ids[:1], skip_special_tokens=True)).strip()
        if shown != letter or ids[0] in (tokenizer.unk_token_id, *found):
            tokens = tokenizer.convert_ids_to_tokens(ids)
            raise ModelError(
                f"judge=self: the reply {letter!r} does not begin with a separate token in this tokenizer (it has "
                f"{tokens}), so there is no logit to read a choice from; with model=tiny, model.question=… trains the "
                "tokenizer on the template too"
            )
        found.append(ids[0])
    return found[0], found[1]
