"""How long near-duplicates take: prompts that fill in one form, as ``data=jsonl`` finds them.

    python -m benchmarks.duplicates
    python -m benchmarks.duplicates --rows 20000 --share 0.4

Each prompt has the form's words and then words of its own. Printed are CPU seconds, the peak of memory in the process,
and how many rows are removed.
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
        own: words after them that are the prompt's own, drawn from 5,000.
        share: of the prompts with the form; the others have as many words at random instead.
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
    parser.add_argument("--own", type=int, default=12, help="words of a prompt's own (default %(default)s)")
    parser.add_argument("--share", type=float, default=1.0, help="of the prompts with the form (default %(default)s)")
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
