"""Regenerate a segment of the human responses (SAPO paper, section 3.2 and algorithm 1).

The human response to a prompt x is cut into A, B and C. A policy continues x ‖ A with B′, and C follows unchanged:
y⁻ = A ‖ B′ ‖ C. Everything is done on token ids; no text is tokenised again.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dnpo.generate import Ahead
from dnpo.generate.hf import complete, draw, make_warp, memory_for, number_samples, record
from dnpo.policy.model import SCORED_TOKENS, Policy, by_length
from dnpo.policy.packing import pack
from dnpo.records import Prompt, Response
from dnpo.seeding import derive
from dnpo.store import Report

REDRAWS = 8  # further draws of a segment that is unchanged
LOGITS = 2**26  # entries of logits in memory at once


class Cut(NamedTuple):
    """The tokens of a response before a segment, in the segment, and after it."""

    before: list[int]
    segment: list[int]
    after: list[int]


def cut(response: Response, length: int, seed: int) -> Cut:
    """Cut a segment of ``length`` tokens out of a response.

    It begins at each token of the response with equal probability, and is shorter if it reaches the end. If a response
    has at most ``length`` tokens, the segment is the whole response.

    Args:
        seed: seed of the segment's beginning, together with the id of the response.
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

    A segment with tokens after it is replaced by the same number of tokens, without stop tokens. A segment at the end
    is replaced by a sample: up to a stop token, or cut at the limit. If the result is the human response, the segment
    is drawn again, up to ``REDRAWS`` times. A segment that is the whole response is drawn only once, and equals the
    sample of ``hf.sample``.

    Args:
        policy: the policy that generates.
        prompts: prompts with ``token_ids``; if one occurs several times, the same segment is sampled several times.
        human: the human responses to the prompts, in any order.
        sampling: how to sample; ``samples`` is not read here.
        length: number of tokens of a segment.
        source: ``source`` of the responses.
        limit: maximum number of tokens of a response; no human response may be longer.
        seed: seed of segments and samples, together with the prompts' ids.
        report: receives the progress.

    Returns:
        The responses that differ from the human ones, in the order of the prompts, with their log-probabilities under
        the policy; and counts: of ``segments``, of draws that were ``redrawn``, and of segments that were ``dropped``
        because all draws gave the human response.
    """
    response_of = {response.id: response for response in human}
    cut_at = min(sampling.max_tokens or limit, limit)
    rows = [
        _Row(prompt, number, parts, len(parts.segment) if parts.after else max(cut_at - len(parts.before), 1))
        for prompt, number in number_samples(prompts)
        for parts in [cut(response_of[prompt.id], length, seed)]
    ]
    with policy.evaluating(), memory_for(sampling):
        segments = _draw(policy, rows, sampling, seed, report)
        same = [i for i, row in enumerate(rows) if segments[i] == row.parts.segment and not row.is_whole]
        again = _redraw(policy, [rows[i] for i in same], sampling, seed)
        for i, segment in zip(same, _draw(policy, again, sampling, seed, None), strict=True):
            segments[i] = segment
    made = [row.parts.before + new + row.parts.after for row, new in zip(rows, segments, strict=True)]
    stops = policy.stop_ids
    ends = [ids[-1] in stops for ids in made]
    if sampling.append_eos:
        for i, row in enumerate(rows):
            if not ends[i] and not row.parts.after:
                made[i] = [*made[i][: limit - 1], stops[0]]
    responses = record(policy, [(row.prompt, row.number) for row in rows], made, ends, source)
    new = [each for each in responses if each.token_ids != response_of[each.id].token_ids]
    counts = {"segments": len(rows), "redrawn": sum(row.attempt for row in again), "dropped": len(rows) - len(new)}
    return new, counts


class _Row(NamedTuple):
    """A draw of a segment.

    Attributes:
        prompt: the prompt.
        number: the number of its sample.
        parts: the human response.
        limit: maximum number of tokens of the new segment.
        attempt: number of earlier draws.
        begun: the first tokens of the new segment that are already drawn.
    """

    prompt: Prompt
    number: int
    parts: Cut
    limit: int
    attempt: int = 0
    begun: Sequence[int] = ()

    @property
    def is_whole(self) -> bool:
        """Whether the segment is the whole response."""
        return not self.parts.before and not self.parts.after

    @property
    def context(self) -> list[int]:
        """The tokens that the policy continues."""
        return self.prompt.token_ids + self.parts.before

    def stream(self, seed: int) -> int:
        """The random stream of the draw; the first draw has the same stream as in ``hf.sample``."""
        again = (self.attempt,) if self.attempt else ()
        return derive(seed, "redraw" if again else "sample", self.prompt.id, self.number, *again)


def _draw(policy: Policy, rows: Sequence[_Row], sampling: Ahead, seed: int, report: Report | None) -> list[list[int]]:
    """Draw the missing tokens of each new segment."""
    segments, stops = [list(row.begun) for row in rows], set(policy.stop_ids)
    going = [i for i, new in enumerate(segments) if not new or (len(new) < rows[i].limit and new[-1] not in stops)]
    some = [rows[i] for i in going]
    drawn = complete(
        policy,
        [row.context for row in some],
        sampling,
        [row.limit for row in some],
        [row.stream(seed) for row in some],
        report,
        endless={n for n, row in enumerate(some) if row.parts.after},
        begun=[segments[i] for i in going],
    )
    for i, segment in zip(going, drawn, strict=True):
        segments[i] = segment
    return segments


@torch.no_grad()
def _redraw(policy: Policy, rows: Sequence[_Row], sampling: Ahead, seed: int) -> list[_Row]:
    """Draw segments again, each until it differs from the old one; a draw ends at the first token that differs.

    While a draw repeats the old segment, the policy reads the old segment's tokens. So one pass over the old segment
    gives the logits of all draws.

    Returns:
        For each segment the draw that differs, or else the last draw.
    """
    found = [row._replace(attempt=REDRAWS, begun=row.parts.segment) for row in rows]
    warp, head = make_warp(sampling), policy.head
    tokens = min(SCORED_TOKENS, LOGITS // len(head.weight_VH))
    for some in by_length([len(row.context) + len(row.parts.segment) for row in rows], tokens):
        batch = pack([rows[i].context for i in some], [rows[i].parts.segment for i in some])
        logits_NV = head.logits(policy.hidden(batch.to(policy.device)))
        places = [(i, t) for i in some for t in range(len(rows[i].parts.segment))]
        logits_NV[[[n] for n, (i, _) in enumerate(places) if rows[i].parts.after], policy.stop_ids] = -torch.inf
        for attempt in range(1, 1 + REDRAWS):
            row_of = {i: rows[i]._replace(attempt=attempt) for i, _ in places}
            stream_of = {i: row.stream(seed) for i, row in row_of.items()}
            drawn = draw(logits_NV, [(stream_of[i], t) for i, t in places], warp)
            differing = set()
            for (i, t), token in zip(places, drawn, strict=True):
                old = rows[i].parts.segment
                if token != old[t] and i not in differing:
                    differing.add(i)
                    found[i] = row_of[i]._replace(begun=[*old[:t], token])
            keep = [n for n, (i, _) in enumerate(places) if i not in differing]
            if not keep:
                break
            places, logits_NV = [places[n] for n in keep], logits_NV[keep]
    return found
