"""By what a conversation is recognised, for those who have to say later which ones they have seen."""

import hashlib
from collections.abc import Sequence

from dnpo.records import Message


def hash_conversation(messages: Sequence[Message]) -> str:
    """A hash of a conversation, the same whatever its case and spaces."""
    said = [[turn["role"], " ".join(turn["content"].split()).casefold()] for turn in messages]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]
