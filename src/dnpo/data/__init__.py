"""Sources of prompts and human responses.

A source has two methods: ``identity()`` gives the plain values that decide what it reads (for the store), and
``read()`` gives its rows by split: ``train``, ``validation`` (for choosing settings) and ``test`` (for reporting).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from dnpo.records import Prompt

SPLITS = ("train", "validation", "test")
LongResponses = Literal["cut", "drop"]


class Source(Protocol):
    """A data source, configured by ``data=…``.

    ``max_response_tokens`` limits human and generated responses alike. Prompts over ``max_prompt_tokens`` are dropped;
    human responses over their limit are cut or dropped, by ``long_responses``. ``drawn_with_replacement`` is true if
    rows can repeat by design, so that the checks do not warn about it.
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

    def read(self) -> tuple[Mapping[str, Sequence[Prompt]], dict[str, Any]]:
        """Return the rows by split, and facts about them; ``removed`` counts the rows left out, by reason."""
