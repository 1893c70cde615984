"""Remove rows whose prompt repeats another's, and show two examples."""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter

from dnpo.data import SPLITS
from dnpo.data.duplicates import repeats
from dnpo.data.unusable import shown
from dnpo.escape import say
from dnpo.records import Message, Prompt
from dnpo.tables import take, values

EXAMPLES = 2
EXCERPT = 60  # characters
SILENT, INTERVAL = 5.0, 10.0  # seconds before the first line of progress, and between lines


def remove_duplicates(
    rows: Mapping[str, Sequence[Prompt]], threshold: float
) -> tuple[dict[str, Sequence[Prompt]], dict[str, int], list[str]]:
    """Remove rows whose prompt resembles an earlier one.

    Test rows come first, then validation rows, then training rows. So no prompt like a held-out one is trained on, and
    settings are not chosen on prompts like the reported ones. Within a split, rows with pairs come before others.

    Returns:
        The rows that are left; how many were removed, by kind; and two examples, near-duplicates first.
    """
    ordered: list[tuple[str, int]] = []  # splits, and numbers in them
    for split in reversed(SPLITS):
        unpaired = [other is None for other in values(rows[split], "rejected")]
        ordered += [(split, i) for i in sorted(range(len(unpaired)), key=unpaired.__getitem__)]
    removed = {"equal_to_earlier": 0, "equal_to_held_out": 0, "near_earlier": 0, "near_held_out": 0}
    examples: list[str] = []

    def remove(kind: str, i: int, earlier: int) -> None:
        held_out = ordered[i][0] == "train" != ordered[earlier][0]
        removed[f"{kind}_held_out" if held_out else f"{kind}_earlier"] += 1

    def find(i: int) -> Prompt:
        split, number = ordered[i]
        return rows[split][number]

    def conversations() -> Iterator[Sequence[Message]]:
        for split, some in groupby(ordered, key=itemgetter(0)):
            yield from values(take(rows[split], [number for _, number in some]), "messages")

    first: dict[bytes, int] = {}
    equal = []
    for i, messages in enumerate(conversations()):
        earlier = first.setdefault(_hash(messages), i)
        if earlier != i:
            remove("equal_to", i, earlier)
            equal.append((i, earlier, 1.0))
    left = list(first.values())
    if threshold:
        texts = list(map(_text, conversations()))
        found = repeats([texts[i] for i in left], threshold, _Clock())
        del texts
        for i, earlier, likeness in found:
            remove("near", left[i], left[earlier])
            if len(examples) < EXAMPLES:
                examples.append(_describe(find(left[i]), find(left[earlier]), likeness))
        dropped = {left[i] for i, _, _ in found}
        left = [i for i in left if i not in dropped]
    for i, earlier, likeness in equal[: EXAMPLES - len(examples)]:
        examples.append(_describe(find(i), find(earlier), likeness))
    kept: dict[str, list[int]] = {split: [] for split in SPLITS}
    for i in left:
        kept[ordered[i][0]].append(ordered[i][1])
    return {split: take(rows[split], sorted(some)) for split, some in kept.items()}, removed, examples


class _Clock:
    """Reports the progress of a long comparison on the standard error."""

    def __init__(self) -> None:
        self.next = time.monotonic() + SILENT

    def __call__(self, what: str, done: int, of: int) -> None:
        now = time.monotonic()
        if now >= self.next:
            self.next = now + INTERVAL
            say(f"{what}: {done:,} of {of:,}", error=True)


def _describe(one: Prompt, other: Prompt, likeness: float) -> str:
    """Describe two rows and their likeness, with the words at which they begin to differ."""
    texts = [" ".join(_text(prompt.messages).split()) for prompt in (one, other)]
    pairs = enumerate(zip(*texts, strict=False))
    differs = next((i for i, (a, b) in pairs if a != b), min(map(len, texts)))
    start = max(differs - EXCERPT // 3, 0)
    parts = [("…" if start else "") + shown(text[start : start + EXCERPT]) for text in texts]
    return f"{shown(one.id)} is like {shown(other.id)} ({likeness:.2f}: “{parts[0]}” and “{parts[1]}”)"


def _hash(messages: Sequence[Message]) -> bytes:
    """A hash of a conversation, which takes less memory than its text."""
    texts = [text for turn in messages for text in (turn["role"], turn["content"])]
    return hashlib.blake2b(repr(texts).encode(), digest_size=16).digest()


def _text(messages: Sequence[Message]) -> str:
    """A prompt's text without system turns, which may be long and shared by all prompts."""
    return "\n".join(turn["content"] for turn in messages if turn["role"] != "system")
