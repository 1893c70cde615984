"""Find near-duplicate texts by the Jaccard index of their shingles, the sets of three successive words.

The search is exact and deterministic, by prefix filtering (Chaudhuri, Ganti and Kaushik 2006). If the Jaccard index of
two sets is at least t, a share t of the larger set is in the smaller one. So with all shingles in one fixed order, the
first few shingles of both sets have one in common, and only texts that share one of these are compared. Rare shingles
come first in the order, so few pairs are compared. MinHash would miss some pairs and cost more at such thresholds.
"""

import math
import re
import zlib
from array import array
from collections import defaultdict
from collections.abc import Sequence

WIDTH = 3
# Words and symbols, without punctuation: "C++" differs from "C" and 2 + 2 from 2 - 2, but full stops are ignored.
WORD = re.compile(r"""\w+|[^\w\s.,;:!?'"`´‘’“”„«»()\[\]{}…]""")
BUCKETS = 1 << 20  # of the counts that order the shingles; shingles may share one, since any order is valid
ROUNDING = 1e-9


def shingles(text: str) -> frozenset[str]:
    """All sequences of three words, or all words of a shorter text; case, punctuation and spaces are ignored."""
    words = WORD.findall(text.casefold())
    found = {" ".join(words[i : i + WIDTH]) for i in range(len(words) - WIDTH + 1)}
    return frozenset(found or {" ".join(words) or text.strip()})


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """|A ∩ B| / |A ∪ B|."""
    common = len(one & other)
    return common / (len(one) + len(other) - common)


def near(ours: Sequence[str], others: Sequence[str], threshold: float) -> list[tuple[int, int, float]]:
    """All pairs of one of ``ours`` and one of ``others`` at or above the threshold, as (ours, others, Jaccard index).

    Args:
        threshold: above 0, and at most 1.
    """
    index = _Index(others, threshold)
    for j in range(len(others)):
        index.add(j)
    return [(i, j, likeness) for i, text in enumerate(ours) for j, likeness in index.like(text)]


def repeats(texts: Sequence[str], threshold: float) -> list[tuple[int, int, float]]:
    """Every text that resembles an earlier one, with the first such text that is not itself a repeat."""
    index = _Index(texts, threshold)
    found = []
    for i, text in enumerate(texts):
        like = index.like(text)
        if like:
            found.append((i, *like[0]))
        else:
            index.add(i)
    return found


class _Index:
    """An index of texts by the shingles of their prefix: a similar text shares at least one of them."""

    def __init__(self, texts: Sequence[str], threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold {threshold}: expected a number above 0, at most 1")
        self.texts, self.threshold = texts, threshold
        self.meetings: defaultdict[str, list[int]] = defaultdict(list)
        self.sizes: list[int] = []
        self.counts = array("L", bytes(array("L").itemsize * BUCKETS))
        for text in texts:
            some = shingles(text)
            self.sizes.append(len(some))
            for shingle in some:
                self.counts[zlib.crc32(shingle.encode()) % BUCKETS] += 1

    def add(self, i: int) -> None:
        """Add text ``i`` to the index."""
        for shingle in self._prefix(shingles(self.texts[i])):
            self.meetings[shingle].append(i)

    def like(self, text: str) -> list[tuple[int, float]]:
        """The added texts at the threshold or above, in the order of their numbers, each with its likeness."""
        mine = shingles(text)
        least, most = self.threshold * len(mine) - ROUNDING, len(mine) / self.threshold + ROUNDING
        met = {i for s in self._prefix(mine) for i in self.meetings.get(s, ()) if least <= self.sizes[i] <= most}
        likeness = [(i, jaccard(mine, shingles(self.texts[i]))) for i in sorted(met)]
        return [(i, share) for i, share in likeness if share >= self.threshold - ROUNDING]

    def _prefix(self, some: frozenset[str]) -> list[str]:
        """The first shingles in the common order: enough that any two similar texts share one of them."""
        length = len(some) - math.ceil(self.threshold * len(some) - ROUNDING) + 1
        return sorted(some, key=self._place)[:length]

    def _place(self, shingle: str) -> tuple[int, str]:
        return self.counts[zlib.crc32(shingle.encode()) % BUCKETS], shingle
