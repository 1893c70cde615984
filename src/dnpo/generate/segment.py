"""Regenerate a segment of the human responses (SAPO paper, section 3.2 and algorithm 1).

The human response to a prompt x is cut into A, B and C. A policy continues x ‖ A with B′, and C follows unchanged:
y⁻ = A ‖ B′ ‖ C. Everything is done on token ids; no text is tokenised again.
"""

from collections.abc import Sequence
from typing import NamedTuple

from dnpo.generate import Ahead
from dnpo.generate.hf import complete, memory_for, number_samples, record
from dnpo.policy.model import Policy
from dnpo.records import Prompt, Response
from dnpo.seeding import derive
from dnpo.store import Report

REDRAWS = 8  # further draws of a segment that came out as it was


class Cut(NamedTuple):
    """The tokens of a response: those before a segment, the segment, and those after it."""

    before: list[int]
    segment: list[int]
    after: list[int]


def cut(response: Response, length: int, seed: int) -> Cut:
    """Cut a segment of ``length`` tokens out of a response.

    It begins at each token of the response with equal probability, and is shorter if it reaches the end. A response
    of at most ``length`` tokens is a segment as a whole.

    Args:
        seed: decides where the segment begins, together with the id of the response.
    """
    ids = response.token_ids
    start = derive(seed, "segment", response.id) % len(ids) if length < len(ids) else 0
    return Cut(ids[:start], ids[start : start + length], ids[start + length :])


def regenerate(
    policy: Policy,
    prompts: Sequence[Prompt],
    human: Sequence[Response],
    sampling: Ahead,
    *,
    length: int,
    source: str,
    limit: int,
    seed: int,
    report: Report,
) -> tuple[list[Response], dict[str, int]]:
    """Regenerate a segment of the human response to each prompt.

    A segment with tokens after it becomes one of as many tokens, none of which is a stop token. A segment at the end
    becomes a sample: up to a stop token, or cut at the limit. If the result is the human response, the segment is drawn
    again, up to ``REDRAWS`` times. A segment that is the whole response is drawn only once, and gives exactly what
    ``hf.sample`` gives.

    Args:
        policy: the policy that generates.
        prompts: prompts with ``token_ids``; if one occurs several times, the same segment is sampled several times.
        human: the human responses to the prompts, in any order.
        sampling: how to sample; ``samples`` is not read here.
        length: number of tokens of a segment.
        source: ``source`` of the responses.
        limit: maximum number of tokens of a response; no human one is longer.
        seed: decides segments and samples, together with the prompts' ids.
        report: receives the progress.

    Returns:
        The responses that differ from the human ones, in the order of the prompts, with their log-probabilities under
        the policy; and counts: of ``segments``, of draws that were ``redrawn``, and of segments that were ``dropped``
        because all draws gave the human response.
    """
    response_of = {response.id: response for response in human}
    rows = [_Row(*row, cut(response_of[row[0].id], length, seed)) for row in number_samples(prompts)]
    made: dict[int, list[int]] = {}
    draws, waiting = 0, list(range(len(rows)))
    for attempt in range(1 + REDRAWS):
        drawn = _draw(policy, [rows[i] for i in waiting], sampling, limit, seed, attempt, report)
        made |= zip(waiting, drawn, strict=True)
        draws += len(waiting)
        waiting = [i for i in waiting if made[i] == rows[i].human and not rows[i].is_whole]
        if not waiting:
            break
    ends = [made[i][-1] in policy.stop_ids for i in range(len(rows))]
    if sampling.append_eos:
        for i, row in enumerate(rows):
            if not ends[i] and not row.parts.after:
                made[i] = [*made[i][: limit - 1], policy.stop_ids[0]]
    numbered = [(row.prompt, row.number) for row in rows]
    responses = record(policy, numbered, [made[i] for i in range(len(rows))], ends, source)
    new = [response for response, row in zip(responses, rows, strict=True) if response.token_ids != row.human]
    return new, {"segments": len(rows), "redrawn": draws - len(rows), "dropped": len(rows) - len(new)}


class _Row(NamedTuple):
    """The human response to a prompt, cut; and the number of the sample that is to be made of it."""

    prompt: Prompt
    number: int
    parts: Cut

    @property
    def human(self) -> list[int]:
        """The tokens of the response."""
        return self.parts.before + self.parts.segment + self.parts.after

    @property
    def is_whole(self) -> bool:
        """Whether the segment is the whole response."""
        return not self.parts.before and not self.parts.after

    def stream(self, seed: int, attempt: int) -> int:
        """The random stream of a draw; the first one is that of ``hf.sample``."""
        if attempt:
            return derive(seed, "redraw", self.prompt.id, self.number, attempt)
        return derive(seed, "sample", self.prompt.id, self.number)


def _draw(
    policy: Policy, rows: Sequence[_Row], sampling: Ahead, limit: int, seed: int, attempt: int, report: Report
) -> list[list[int]]:
    """Draw the segment of each row, and put it between the tokens before and after it."""
    cut_at = min(sampling.max_tokens or limit, limit)
    with policy.evaluating(), memory_for(sampling):
        drawn = complete(
            policy,
            [row.prompt.token_ids + row.parts.before for row in rows],
            sampling,
            [len(row.parts.segment) if row.parts.after else max(cut_at - len(row.parts.before), 1) for row in rows],
            [row.stream(seed, attempt) for row in rows],
            None if attempt else report,
            {i for i, row in enumerate(rows) if row.parts.after},
        )
    return [row.parts.before + segment + row.parts.after for row, segment in zip(rows, drawn, strict=True)]
