"""Live training with a slow judge: how much faster is it to judge one rollout while the policy trains on another?

    python -m benchmarks.overlap                 # 0.3 s a call
    python -m benchmarks.overlap --latency 1 --rounds 5

It runs ``method=online_dpo`` with the tests' judge server, with rollout.ahead_by=0 and 1 in turns, each with a new
ledger. The time is the wall clock of the training stage. All runs with the same setting must end with the same numbers.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path

from tests.commands import numbers, succeed, summary
from tests.judge_server import judge_server

RUN = (
    *("scale=smoke", "tracking=off", "method=online_dpo", "iterations=1", "judge=openai", "judge.model=judge"),
    *("judge.structured=off", "judge.concurrency=64", "eval.judge=${typical.judge}", "rollout.temperature=2"),
    # judging a rollout takes about as long as making it and training on it, which gives the largest gain
    *("data.train=768", "trainer.batch_size=32", "rollout.prompts=32", "rollout.every=6"),
)


def main() -> None:
    """Print the seconds of both, and their ratio."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__.splitlines()[0])
    parser.add_argument("--latency", type=float, default=0.3, help="seconds of a call")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--faults", default="none")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    seconds: dict[int, list[float]] = {0: [], 1: []}
    found: dict[int, list[object]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory() as there, judge_server(latency=given.latency, faults=given.faults) as server:
        root = Path(there)
        address = (f"judge.base_url={server.base_url}", "judge.key_from=NO_KEY")
        shared = root / "shared"
        shared.mkdir()
        succeed(shared, *RUN, *address, *given.overrides, "iterations=1", NO_KEY="any")  # data and fine-tuning
        for number in range(given.rounds):
            for ahead_by in seconds:
                folder = root / f"{number}-{ahead_by}"
                for stage in ("prompts", "sft"):
                    shutil.copytree(shared / "store" / stage, folder / "store" / stage)
                own = (*given.overrides, f"rollout.ahead_by={ahead_by}")
                succeed(folder, *RUN, *address, *own, NO_KEY="any")
                (manifest,) = (folder / "store" / "optimise").glob("*/manifest.json")
                seconds[ahead_by].append(json.loads(manifest.read_text())["seconds"])
                found[ahead_by].append(numbers(summary(folder)))
                print(f"ahead_by={ahead_by}: {seconds[ahead_by][-1]:.1f} s", flush=True)
    for ahead_by, some in found.items():
        same = all(each == some[0] for each in some)
        print(f"ahead_by={ahead_by}: {'the same numbers in all rounds' if same else 'OTHER NUMBERS'}")
    waiting, meanwhile = (statistics.median(seconds[ahead_by]) for ahead_by in (0, 1))
    print(f"median {waiting:.1f} s waiting, {meanwhile:.1f} s ahead: {waiting / meanwhile:.2f} times as fast")


if __name__ == "__main__":
    main()
