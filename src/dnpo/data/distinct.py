"""Remove rows whose prompt repeats another's, and show two examples."""

import time
from collections.abc import Mapping, Sequence

from dnpo.data import SPLITS
from dnpo.data.duplicates import repeats
from dnpo.data.unusable import shown
from dnpo.escape import say
from dnpo.records import Prompt

EXAMPLES = 2
EXCERPT = 60  # characters
SILENT, INTERVAL = 5.0, 10.0  # seconds before the first line of progress, and between lines


def remove_duplicates(
    rows: Mapping[str, Sequence[Prompt]], threshold: float
) -> tuple[dict[str, list[Prompt]], dict[str, int], list[str]]:
    """Remove rows whose prompt resembles an earlier one.

    Test rows come before validation rows and these before training rows, so that nothing like a held-out prompt is
    trained on, and settings are not chosen on what is reported. Within a split, rows with pairs come before others.

    Returns:
        The rows that are left; how many were removed, by kind; and two examples, the near ones first.
    """
    ordered = [
        (split, prompt)
        for split in reversed(SPLITS)
        for prompt in sorted(rows[split], key=lambda prompt: prompt.rejected is None)
    ]
    removed = {"equal_to_earlier": 0, "equal_to_held_out": 0, "near_earlier": 0, "near_held_out": 0}
    examples: list[str] = []

    def remove(kind: str, i: int, earlier: int) -> None:
        held_out = ordered[i][0] == "train" != ordered[earlier][0]
        removed[f"{kind}_held_out" if held_out else f"{kind}_earlier"] += 1

    first: dict[tuple[str, ...], int] = {}
    equal = []
    for i, (_, prompt) in enumerate(ordered):
        earlier = first.setdefault(_conversation(prompt), i)
        if earlier != i:
            remove("equal_to", i, earlier)
            equal.append((i, earlier, 1.0))
    left = list(first.values())
    if threshold:
        found = repeats([_text(ordered[i][1]) for i in left], threshold, _Clock())
        for i, earlier, likeness in found:
            remove("near", left[i], left[earlier])
            if len(examples) < EXAMPLES:
                examples.append(_describe(ordered[left[i]][1], ordered[left[earlier]][1], likeness))
        dropped = {left[i] for i, _, _ in found}
        left = [i for i in left if i not in dropped]
    for i, earlier, likeness in equal[: EXAMPLES - len(examples)]:
        examples.append(_describe(ordered[i][1], ordered[earlier][1], likeness))
    kept = {split: {ordered[i][1].id for i in left if ordered[i][0] == split} for split in SPLITS}
    return {split: [row for row in rows[split] if row.id in kept[split]] for split in SPLITS}, removed, examples


class _Clock:
    """Reports on the standard error how far a long comparison is."""

    def __init__(self) -> None:
        self.next = time.monotonic() + SILENT

    def __call__(self, what: str, done: int, of: int) -> None:
        now = time.monotonic()
        if now >= self.next:
            self.next = now + INTERVAL
            say(f"{what}: {done:,} of {of:,}", error=True)


def _describe(one: Prompt, other: Prompt, likeness: float) -> str:
    """Describe two rows and their likeness, with a few words from where they begin to differ."""
    texts = [" ".join(_text(prompt).split()) for prompt in (one, other)]
    pairs = enumerate(zip(*texts, strict=False))
    differs = next((i for i, (a, b) in pairs if a != b), min(map(len, texts)))
    start = max(differs - EXCERPT // 3, 0)
    parts = [("…" if start else "") + shown(text[start : start + EXCERPT]) for text in texts]
    return f"{shown(one.id)} is like {shown(other.id)} ({likeness:.2f}: “{parts[0]}” and “{parts[1]}”)"


def _conversation(prompt: Prompt) -> tuple[str, ...]:
    return tuple(text for turn in prompt.messages for text in (turn["role"], turn["content"]))


def _text(prompt: Prompt) -> str:
    """A prompt's text without system turns, which may be long and shared by all prompts."""
    return "\n".join(turn["content"] for turn in prompt.messages if turn["role"] != "system")
