"""Where prompts and human responses come from.

A source has two methods: ``identity()`` gives the plain values that decide what it reads (for the store), and
``read()`` gives its rows by split: ``train``, ``validation`` (for choosing settings) and ``test`` (for reporting).
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from dnpo.records import Prompt

SPLITS = ("train", "validation", "test")
LongResponses = Literal["cut", "drop"]


class Source(Protocol):
    """What ``data=…`` configures. ``max_prompt_tokens`` and ``max_response_tokens`` hold for both sides of a pair.

    Longer prompts are dropped; ``long_responses`` says what becomes of longer human responses. Set
    ``drawn_with_replacement`` where rows can repeat, so that the checks do not warn of it.
    """

    @property
    def max_prompt_tokens(self) -> int: ...
    @property
    def max_response_tokens(self) -> int: ...
    @property
    def long_responses(self) -> LongResponses: ...
    @property
    def drawn_with_replacement(self) -> bool: ...

    def identity(self) -> Mapping[str, Any]:
        """Plain values that decide the rows: contents, never paths."""

    def read(self) -> tuple[dict[str, list[Prompt]], dict[str, Any]]:
        """Rows by split, and facts about them; ``removed`` counts the rows that were left out, by reason."""
