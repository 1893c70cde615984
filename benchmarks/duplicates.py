"""Measure how long ``data=jsonl`` takes to find near-duplicates among prompts that fill in the same form.

    python -m benchmarks.duplicates
    python -m benchmarks.duplicates --rows 20000 --share 0.4

A prompt is the form's words followed by random words. Prints CPU seconds, the peak memory of the process, and the
number of rows removed.
"""

import argparse
import random
import resource
import time

from dnpo.data.duplicates import repeats


def make_prompts(rows: int, form: int, own: int, share: float, seed: int = 0) -> list[str]:
    """Make prompts.

    Args:
        rows: how many.
        form: words of the form.
        own: words after the form, drawn at random from 5,000.
        share: share of prompts that begin with the form; the others begin with as many random words.
    """
    draw = random.Random(seed)
    words = " ".join(f"form{i}" for i in range(form))

    def begin(i: int) -> str:
        return words if i < share * rows else " ".join(f"any{draw.randrange(10**6)}" for _ in range(form))

    return [f"{begin(i)} {' '.join(f'own{draw.randrange(5000)}' for _ in range(own))}" for i in range(rows)]


def main() -> None:
    """Run ``python -m benchmarks.duplicates``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--form", type=int, default=151, help="words of the form (default %(default)s)")
    parser.add_argument("--own", type=int, default=12, help="random words after the form (default %(default)s)")
    parser.add_argument(
        "--share", type=float, default=1.0, help="share of prompts that begin with the form (default %(default)s)"
    )
    parser.add_argument("--threshold", type=float, default=0.9)
    given = parser.parse_args()
    prompts = make_prompts(given.rows, given.form, given.own, given.share)
    before = time.process_time()
    found = repeats(prompts, given.threshold)
    took = time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # from KiB
    print(f"{given.rows:,} prompts: {took:.1f} CPU s, peak {peak:.2f} GiB, {len(found):,} removed")


if __name__ == "__main__":
    main()
