"""Find near-duplicate texts by the Jaccard index of their sets of three successive words.

Sequences that occur in more than one text in twenty (``COMMON``) and in more than ``MANY`` texts belong to a template
that many texts share, so they do not show similarity. They are left out of the sets, except in a text that has no
others.

The search is exact and deterministic, by prefix filtering (Chaudhuri, Ganti and Kaushik 2006). If the Jaccard index of
two sets is at least t, a share t of the larger set is in the smaller one. So if the members of all sets are sorted in
one order, the first few members of two such sets include a common one, and only texts for which this is true are
compared. Rare members come first in the order, so few texts are compared. No common member comes before the first one
in either sorted set, so the shorter of the two remainders limits their number. If it is too short, the texts are not
compared (positional filtering; Xiao et al. 2008). MinHash would miss some pairs and cost more at such thresholds.
"""

import math
import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

WIDTH = 3
COMMON, MANY = 0.05, 20
# Words and symbols, without punctuation: "C++" differs from "C" and 2 + 2 from 2 - 2, but full stops are ignored.
WORD = re.compile(r"""\w+|[^\w\s.,;:!?'"`´‘’“”„«»()\[\]{}…]""")
ROUNDING = 1e-9
CHUNK = 1 << 20

Progress = Callable[[str, int, int], None]
"""Receives the name of a task, the amount done, and the total."""


def near(ours: Sequence[str], others: Sequence[str], threshold: float) -> list[tuple[int, int, float]]:
    """All pairs of a text in ``ours`` and one in ``others`` at or above the threshold: (ours, others, Jaccard index).

    Args:
        threshold: above 0, and at most 1.
    """
    index = _Index([*others, *ours], threshold)
    for j in range(len(others)):
        index.add(j)
    return [(i, j, likeness) for i in range(len(ours)) for j, likeness in index.like(len(others) + i)]


def repeats(texts: Sequence[str], threshold: float, progress: Progress | None = None) -> list[tuple[int, int, float]]:
    """Every text that resembles an earlier one, with the first similar text that is not a repetition itself."""
    index = _Index(texts, threshold, progress)
    found = []
    for i in range(len(texts)):
        like = index.like(i)
        if like:
            found.append((i, *like[0]))
        else:
            index.add(i)
        if progress is not None:
            progress("comparing prompts", i + 1, len(texts))
    return found


class _Sets(NamedTuple):
    """The sets of all texts, one after the other.

    Attributes:
        members: numbers of three-word sequences, the rarest first, sorted within each text.
        starts: where each text begins, and where the last one ends.
        shared: the smallest number of a sequence that is in more than one text.
    """

    members: "np.ndarray"
    starts: "np.ndarray"
    shared: int


class _Index:
    """An index of texts by the members of their prefixes: the prefixes of similar texts have a member in common."""

    def __init__(self, texts: Sequence[str], threshold: float, progress: Progress | None = None) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold {threshold}: expected a number above 0, at most 1")
        self.threshold = threshold
        self.sets = _make_sets(texts, progress)
        # By member, then by the size of the set and the member's place in it: both decide whether texts are compared.
        self.meetings: defaultdict[int, dict[tuple[int, int], list[int]]] = defaultdict(dict)

    def add(self, i: int) -> None:
        """Add text ``i`` to the index."""
        size = self._size(i)
        for place, member in self._prefix(i):
            self.meetings[member].setdefault((size, place), []).append(i)

    def like(self, i: int) -> list[tuple[int, float]]:
        """The added texts at the threshold or above, in the order of their numbers, each with its likeness to ``i``."""
        mine, share = self._size(i), self.threshold / (1 + self.threshold)
        least, most = self.threshold * mine - ROUNDING, mine / self.threshold + ROUNDING
        met: set[int] = set()
        for place, member in self._prefix(i):
            for (size, there), some in self.meetings.get(member, {}).items():
                left = min(mine - place, size - there)
                if least <= size <= most and left >= share * (mine + size) - ROUNDING:
                    met.update(some)
        if not met:
            return []
        members = set(self._members(i))
        found = []
        for j in sorted(met):
            common = len(members.intersection(self._members(j)))
            likeness = common / (mine + self._size(j) - common)
            if likeness >= self.threshold - ROUNDING:
                found.append((j, likeness))
        return found

    def _size(self, i: int) -> int:
        return int(self.sets.starts[i + 1] - self.sets.starts[i])

    def _members(self, i: int) -> list[int]:
        found: list[int] = self.sets.members[self.sets.starts[i] : self.sets.starts[i + 1]].tolist()
        return found

    def _prefix(self, i: int) -> list[tuple[int, int]]:
        """The first members, in the common order, that other texts have too, each with its place.

        The prefix is long enough that any two similar texts share one of its members.
        """
        size, start = self._size(i), int(self.sets.starts[i])
        length = size - math.ceil(self.threshold * size - ROUNDING) + 1
        first: list[int] = self.sets.members[start : start + length].tolist()
        return [(place, member) for place, member in enumerate(first) if member >= self.sets.shared]


def _make_sets(texts: Sequence[str], progress: Progress | None) -> _Sets:
    """Number every sequence of three words, or all words of a shorter text. Case, marks and spaces are ignored."""
    import numpy as np

    words, ends = _number_words(texts, progress)
    sequences = _number_sequences(words)
    del words
    inside = np.ones(len(sequences) + WIDTH - 1, bool)
    for back in range(1, WIDTH):
        inside[ends - back] = False  # a sequence that begins there reaches into the next text
    lengths = np.diff(ends, prepend=0) - (WIDTH - 1)
    rows = np.repeat(np.arange(len(texts), dtype=np.uint64), lengths) << np.uint64(32)
    rows |= sequences[inside[: len(sequences)]]
    del sequences, inside
    rows, members = _split(_sort_distinct(rows))

    counts = np.bincount(members)
    own = ~(counts > max(len(texts) * COMMON, MANY))[members]
    kept = own | (np.bincount(rows[own], minlength=len(texts)) == 0)[rows]
    rows, members = rows[kept], members[kept]

    counts = np.bincount(members)
    order = np.argsort(counts, kind="stable")
    ranks = np.empty(len(order), np.uint64)
    ranks[order] = np.arange(len(order), dtype=np.uint64)
    shared = int(np.searchsorted(counts[order], 2))
    rows, members = _split(_sort_distinct(rows.astype(np.uint64) << np.uint64(32) | ranks[members]))
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(texts)))])
    return _Sets(members, starts, shared)


def _number_words(texts: Sequence[str], progress: Progress | None) -> tuple["np.ndarray", "np.ndarray"]:
    """Number the words of all texts, and say where each text ends; texts of fewer than three words are padded."""
    import numpy as np

    numbers: defaultdict[str, int] = defaultdict()
    numbers.default_factory = numbers.__len__
    words, ends = array("I"), array("q")
    for i, text in enumerate(texts):
        found = WORD.findall(text.casefold()) or [text.strip()]
        words.extend(map(numbers.__getitem__, [""] * (WIDTH - len(found)) + found))
        ends.append(len(words))
        if progress is not None:
            progress("reading prompts", i + 1, len(texts))
    return np.array(words, np.uint32), np.array(ends, np.int64)


def _number_sequences(words: "np.ndarray") -> "np.ndarray":
    """Number each sequence of three words: first its first two words, then the number of these with the third word."""
    import numpy as np

    numbers = words
    for shift in range(1, WIDTH):
        codes = numbers[:-1].astype(np.uint64) << np.uint64(32) | words[shift:]
        distinct = _sort_distinct(codes.copy())
        numbers = np.empty(len(codes), np.uint32)
        for start in range(0, len(codes), CHUNK):
            numbers[start : start + CHUNK] = np.searchsorted(distinct, codes[start : start + CHUNK])
    return numbers


def _sort_distinct(values: "np.ndarray") -> "np.ndarray":
    """Sort values in place, and return each once."""
    import numpy as np

    values.sort()
    first = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=first[1:])
    return values[first]


def _split(pairs: "np.ndarray") -> tuple["np.ndarray", "np.ndarray"]:
    """The upper and the lower 32 bits of numbers."""
    import numpy as np

    return (pairs >> np.uint64(32)).astype(np.uint32), pairs.astype(np.uint32)
