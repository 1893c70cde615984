"""How long curricula take: weights against the worst distribution for a million pairs, clusters of many embeddings.

    python -m benchmarks.curriculum                # 1,000,000 pairs
    python -m benchmarks.curriculum --pairs 10000

Printed are CPU seconds without the making of the pairs, the peak of memory in the process, and what became of them.
"""

import argparse
import random
import resource
import time
from collections.abc import Callable, Sequence

import numpy as np

from dnpo.data.curriculum import Context
from dnpo.data.curriculum.robust import Robust
from dnpo.records import Pair


def make_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Pairs with implicit rewards whose differences are normal, 1 ± 2 nats; every tenth of them has the same one."""
    draw = random.Random(seed)
    messages, ids = [{"role": "user", "content": "?"}], [1, 2]
    margins = [0.5 if i % 10 == 0 else draw.gauss(1, 2) for i in range(count)]
    return [
        Pair(f"row-{i}", messages, ids, "a", "b", ids, ids, "human", "policy@1", margin, 0.0, False)
        for i, margin in enumerate(margins)
    ]


def embed(pairs: Sequence[Pair]) -> np.ndarray:
    """No embeddings: nothing here asks for them."""
    raise NotImplementedError


def timed(work: Callable[[], str], name: str) -> None:
    """Do the work, and print its CPU seconds, the peak of memory so far, and what it says."""
    before = time.process_time()
    said = work()
    took = time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # from KiB
    print(f"{name}: {took:.2f} CPU s, peak {peak:.2f} GiB; {said}")


def weigh(pairs: Sequence[Pair], part: Robust) -> str:
    """Weigh pairs, and say what became of them."""
    rows, counts = part(pairs, [], Context(0, 1, embed))
    return f"{len(rows):,} rows, " + ", ".join(f"{name} {value:,.6g}" for name, value in counts.items())


def main() -> None:
    """Run ``python -m benchmarks.curriculum``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    given = parser.parse_args()
    pairs = make_pairs(given.pairs)
    for epsilon in (0.05, 0.5, 1.0):
        part = Robust(epsilon=epsilon)
        timed(lambda part=part: weigh(pairs, part), f"robust, epsilon {epsilon}, {given.pairs:,} pairs")


if __name__ == "__main__":
    main()
