"""Hash a conversation. A fitted judge keeps the hashes of the conversations that it was trained on."""

import hashlib
from collections.abc import Sequence

from dnpo.records import Message


def hash_conversation(messages: Sequence[Message]) -> str:
    """Hash a conversation; case and spacing make no difference."""
    turns = [[turn["role"], " ".join(turn["content"].split()).casefold()] for turn in messages]
    return hashlib.sha256(repr(turns).encode()).hexdigest()[:16]
