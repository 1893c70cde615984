"""Time of curricula: weights of the worst distribution for a million pairs, and clusters of many embeddings.

    python -m benchmarks.curriculum          # 1,000,000 pairs; 100,000 rows × 384 in 300 clusters
    python -m benchmarks.curriculum --pairs 10000 --rows 5000

It prints CPU seconds (without making the pairs), the peak memory of the process, and counts of the result.
"""

import argparse
import random
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from dnpo.data.curriculum import Context
from dnpo.data.curriculum.prune import Prune
from dnpo.data.curriculum.robust import Robust
from dnpo.records import Pair


def make_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Pairs with implicit rewards whose differences are drawn from N(1, 2²) nats; every tenth pair has the same one."""
    draw = random.Random(seed)
    messages, ids = [{"role": "user", "content": "?"}], [1, 2]
    margins = [0.5 if i % 10 == 0 else draw.gauss(1, 2) for i in range(count)]
    return [
        Pair(f"row-{i}", messages, ids, "a", "b", ids, ids, "human", "policy@1", margin, 0.0, False)
        for i, margin in enumerate(margins)
    ]


def embed(pairs: Sequence[Pair]) -> np.ndarray:
    """No embeddings, since they are not needed here."""
    raise NotImplementedError


def timed(work: Callable[[], str], name: str) -> None:
    """Do the work, and print its CPU seconds, the peak of memory so far, and the text that it returns."""
    before = time.process_time()
    said = work()
    took = time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # from KiB
    print(f"{name}: {took:.2f} CPU s, peak {peak:.2f} GiB; {said}")


def weigh(pairs: Sequence[Pair], part: Robust) -> str:
    """Weigh pairs, and describe the result."""
    rows, counts = part(pairs, [], Context(0, 1, embed))
    return f"{len(rows):,} rows, " + ", ".join(f"{name} {value:,.6g}" for name, value in counts.items())


def make_embeddings(rows: int, width: int, topics: int = 500, seed: int = 0) -> np.ndarray:
    """Embeddings around topics of different sizes, with the spread of sentences."""
    draw = np.random.default_rng(seed)
    weights = 1 / np.arange(1, topics + 1)
    topic_N = draw.choice(topics, rows, p=weights / weights.sum())
    centre_TH = draw.normal(size=(topics, width)).astype(np.float32)
    return centre_TH[topic_N] + draw.normal(size=(rows, width)).astype(np.float32)


def prune(pairs: Sequence[Pair], part: Prune, embedding_NH: np.ndarray) -> str:
    """Prune pairs, whose embeddings are the rows, and describe the result."""
    rows, counts = part(pairs, [], Context(0, 1, lambda some: embedding_NH[[pair.prompt_ids[0] for pair in some]]))
    return f"{len(rows):,} pairs, " + ", ".join(f"{name} {value:,}" for name, value in counts.items())


def main() -> None:
    """Run ``python -m benchmarks.curriculum``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=100_000, help="embeddings to cluster (default %(default)s)")
    parser.add_argument("--width", type=int, default=384, help="of an embedding (default %(default)s)")
    parser.add_argument("--clusters", type=int, default=300, help="(default %(default)s)")
    parser.add_argument("--rules", nargs="+", default=["outlying", "alike", "alike_typical"])
    given = parser.parse_args()
    pairs = make_pairs(given.pairs)
    for epsilon in (0.05, 0.5, 1.0):
        part = Robust(epsilon=epsilon)
        timed(lambda part=part, rows=pairs: weigh(rows, part), f"robust, epsilon {epsilon}, {given.pairs:,} pairs")
    embedding_NH = make_embeddings(given.rows, given.width)
    some = [replace(pair, prompt_ids=[i]) for i, pair in enumerate(make_pairs(given.rows))]
    for rule in given.rules:
        part = Prune(rule=rule, clusters=given.clusters)
        timed(lambda part=part: prune(some, part, embedding_NH), f"prune, {rule}, {given.rows:,} × {given.width}")


if __name__ == "__main__":
    main()
