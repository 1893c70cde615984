"""Time of ``dnpo report`` on a sweep of 60 runs, and of ``import torch`` in the same rounds.

    python -m benchmarks.report
    python -m benchmarks.report --folder FOLDER   # make the sweep there, or measure the one that is there
    python -m benchmarks.report --folder FOLDER --sweep main   # a sweep of yours, tracked in FOLDER/mlflow.db

The sweep is the ablation at ``scale=smoke``: 60 real runs, which share most stages. Making it takes some minutes.
Seconds are those of the whole command with log=false; CPU seconds are also right on a busy machine.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import RESULTS, Facts, progress, save, summary, table

ROUNDS = 5
RUNS = 60
TARGET = 6.0  # seconds
DATABASE = "mlflow.db"


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description="Time of dnpo report.", allow_abbrev=False)
    parser.add_argument("--folder", type=Path, help="where the sweep is, or is made (default: a temporary folder)")
    parser.add_argument("--sweep", default="ablation", help="its name (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "report.json", help="JSON file to write")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as aside:
        folder = (given.folder or Path(aside)).resolve()
        if not (folder / DATABASE).exists():
            make_sweep(folder)
        commands = {
            "import torch": ["-c", "import torch"],
            "dnpo report": ["-m", "dnpo", "report", given.sweep, "log=false", f"out={Path(aside) / 'report.html'}"],
        }
        rounds: dict[str, list[Facts]] = {name: [] for name in commands}
        for number in range(ROUNDS):
            for name, arguments in commands.items():
                progress(f"round {number + 1} of {ROUNDS}: {name}")
                rounds[name].append(measure(arguments, folder))
        progress("")
    print(rounds["dnpo report"][-1].pop("printed"))
    rows = [
        [name, *(summary([each[of] for each in found]) for of in ("wall", "cpu"))] for name, found in rounds.items()
    ]
    print(table(["median (quartiles)", "seconds", "CPU seconds"], rows))
    print(f"target of dnpo report with {RUNS} runs: at most {TARGET:g} s")
    save(given.out, {"rounds": rounds, "target": TARGET})


def make_sweep(folder: Path) -> None:
    """Make the sweep with the command that a user would give."""
    folder.mkdir(parents=True, exist_ok=True)
    print(f"making {RUNS} runs in {folder}", flush=True)
    command = [sys.executable, "-m", "dnpo", "sweep", "ablation", "scale=smoke", f"tracking.uri=sqlite:///{DATABASE}"]
    with (folder / "sweep.log").open("w") as log:
        subprocess.run(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, check=True)


def measure(arguments: list[str], folder: Path) -> Facts:
    """Run a Python process; return its seconds and CPU seconds, and what it printed."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder / DATABASE}"}
    clock, before = time.perf_counter(), os.times()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    wall, after = time.perf_counter() - clock, os.times()
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall": wall, "cpu": cpu, "printed": done.stdout.strip()}


if __name__ == "__main__":
    main()
