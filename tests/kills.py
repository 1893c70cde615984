"""Kill runs at random moments, repeatedly: do they end with the same numbers as an undisturbed run?

    python -m tests.kills                            # 200 kills of slowed runs, and 40 in the first two seconds
    python -m tests.kills --kills 20 --early 5 --tracking off
    python -m tests.kills --kills 6 --early 0 --keep prompts sft -- method=spa     # later stages of other runs

A run that ends is compared with the undisturbed one; the next run begins in an empty folder. Judge, labels and
reference are slowed, so that many kills hit them. A kill within the first two seconds hits an empty folder; after each
of these kills the run is repeated, and must succeed.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.commands import Process, numbers, summary
from tests.delays import AT

RUN = ("scale=smoke",)
FIRST = 2.0  # seconds within which early kills come
BEFORE_STAGES = 0.15  # share of the other kills that come before a stage is computed
LONGEST = 300.0  # seconds that a whole run may take


def kill(process: Process, seconds: float) -> bool:
    """Kill a process after some seconds; return False if it has already ended."""
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.signal_group(signal.SIGKILL)
        process.communicate(timeout=60)
        return True
    return False


def wait_for_stage(process: Process, folder: Path) -> None:
    """Wait until a run computes a stage, or has ended."""
    while process.returncode is None and not (folder / AT).is_file():
        time.sleep(0.01)


def finish(folder: Path, *overrides: str, before: str = "") -> dict[str, Any]:
    """Run to the end, and return the summary."""
    process = Process(folder, *overrides, before=before)
    out, err = process.communicate(timeout=LONGEST)
    if process.returncode != 0:
        raise SystemExit(f"the run after a kill ended with {process.returncode}:\n{out}\n{err}")
    return summary(folder)


def kill_anywhere(
    root: Path, count: int, overrides: tuple[str, ...], expected: Any, moments: random.Random, keep: list[str]
) -> int:
    """Kill runs this many times; return how many runs ended with other numbers.

    Args:
        keep: stages of the undisturbed run that every run finds in its store.
    """
    hit: Counter[str] = Counter()
    ended = wrong = attempts = 0
    folder = root / "killed"
    while sum(hit.values()) < count or folder.is_dir():
        if not folder.is_dir():
            for stage in keep:
                shutil.copytree(root / "undisturbed" / "store" / stage, folder / "store" / stage)
        folder.mkdir(exist_ok=True)
        (folder / AT).unlink(missing_ok=True)
        process = Process(folder, *overrides, before="tests.delays.delay")
        if sum(hit.values()) >= count:  # all kills are done: let it end
            seconds = LONGEST
        elif moments.random() < BEFORE_STAGES:
            seconds = FIRST * moments.random()
        else:
            attempts += 1
            wait_for_stage(process, folder)
            seconds = 3 * moments.random() + attempts / 4  # later each time, so that runs also end on a slow machine
        if kill(process, seconds):
            hit[(folder / AT).read_text() if (folder / AT).is_file() else "before the first stage"] += 1
            continue
        if process.returncode != 0:
            raise SystemExit(f"a run after a kill ended with {process.returncode}:\n{''.join(process.communicate(1))}")
        ended += 1
        attempts = 0
        same = numbers(summary(folder)) == expected
        wrong += not same
        print(
            f"run {ended}: {sum(hit.values())} kills so far, {'same numbers' if same else 'OTHER NUMBERS'}", flush=True
        )
        shutil.rmtree(folder)
    where = ", ".join(f"{stage} {n}" for stage, n in hit.most_common())
    print(f"{sum(hit.values())} kills ({where}) of {ended} runs: {wrong} ended with other numbers")
    return wrong


def kill_early(root: Path, count: int, overrides: tuple[str, ...], expected: Any, moments: random.Random) -> int:
    """Kill this many runs in their first seconds; return how many failed when they were repeated."""
    wrong = killed = 0
    for number in range(count):
        folder = root / f"early-{number}"
        folder.mkdir()
        killed += kill(Process(folder, *overrides), FIRST * moments.random())
        try:
            same = numbers(finish(folder, *overrides)) == expected
            problem = "" if same else "OTHER NUMBERS"
        except (SystemExit, subprocess.TimeoutExpired) as error:
            problem = str(error)
        wrong += bool(problem)
        print(f"early {number}: {problem or 'same numbers'}", flush=True)
        shutil.rmtree(folder)
    print(f"{killed} kills within {FIRST:g} s in an empty folder: {wrong} runs did not end well afterwards")
    return wrong


def main() -> None:
    """Kill runs; exit with status 1 if one of them ends with other numbers than the undisturbed one."""
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--early", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--tracking", choices=("mlflow", "off"), default="mlflow")
    parser.add_argument("--keep", nargs="+", default=[], metavar="STAGE", help="stages that need no kills")
    parser.add_argument("overrides", nargs="*", help="of the runs, such as method=spa")
    given = parser.parse_args()
    overrides, moments = (*RUN, f"tracking={given.tracking}", *given.overrides), random.Random(given.seed)
    clock = time.monotonic()
    with tempfile.TemporaryDirectory() as there:
        root = Path(there)
        (root / "undisturbed").mkdir()
        expected = numbers(finish(root / "undisturbed", *overrides))
        wrong = kill_anywhere(root, given.kills, overrides, expected, moments, given.keep) if given.kills else 0
        wrong += kill_early(root, given.early, overrides, expected, moments) if given.early else 0
    print(f"{' '.join(overrides)}, {time.monotonic() - clock:,.0f} s")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
