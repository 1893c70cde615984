"""Recognise conversations again, such as those that a judge was fitted on."""

import hashlib
from collections.abc import Sequence

from dnpo.records import Message


def hash_conversation(messages: Sequence[Message]) -> str:
    """Hash a conversation; case and white space make no difference. 16 hexadecimal digits."""
    turns = [[turn["role"], " ".join(turn["content"].split()).casefold()] for turn in messages]
    return hashlib.sha256(repr(turns).encode()).hexdigest()[:16]
