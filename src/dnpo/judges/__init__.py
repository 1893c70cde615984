"""Judges: rows in, verdicts out; they know nothing of training.

A judge is called with prompts and with responses to them (of any source, in any order) and returns one verdict a
response, in the same order. A response it cannot judge gets no score, with the reason; a failure is never a score.
"""

from collections.abc import Sequence
from typing import Protocol

from dnpo.records import Prompt, Response, Verdict


class Judge(Protocol):
    """What ``judge=…`` configures. ``gives_scores`` is false for the absent judge."""

    gives_scores: bool

    def accepts(self, prompts: Sequence[Prompt]) -> str | None:
        """Why this judge cannot judge these prompts, or None if it can; asked before anything is computed."""

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Verdict]:
        """One verdict a response."""
