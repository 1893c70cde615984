"""Does a change of the code change a result? Compare the same seeded runs with two versions of the code.

    python -m benchmarks.unmoved --against FOLDER          # another checkout
    python -m benchmarks.unmoved --against FOLDER --keys   # stage keys have to be equal too

Each run is in an empty folder. All digits of a run's table except seconds are compared and, with ``--keys``, the keys
of its stages. The exit status is 1 if they differ.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RUNS = {
    "smoke": ["scale=smoke"],
    "fixed noise, adapters": ["scale=smoke", "npo=fixed", "model.lora.rank=4", "judge@second_judge=correct"],
    "labels by origin, matched": ["scale=smoke", "dsl=off", "npo=matched"],
}


def run(checkout: Path, overrides: list[str]) -> dict[str, Any]:
    """Run, and read ``summary.json``."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dnpo.train", *overrides, "tracking=off", "hydra.run.dir=out"]
        environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "DNPO_CONF": str(checkout / "conf")}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{checkout}: {' '.join(command[3:])} failed\n{done.stdout}{done.stderr}")
        found: dict[str, Any] = json.loads((Path(folder) / "out" / "summary.json").read_text())
        return found


def numbers(summary: dict[str, Any]) -> dict[str, Any]:
    """Every number of the table, by iteration and metric."""
    return {
        f"{row['iteration']}: {name}": value
        for row in summary["table"]
        for name, value in row.items()
        if name != "seconds"
    }


def keys(summary: dict[str, Any]) -> dict[str, str]:
    """The stages' keys, by title."""
    return {stage["title"]: stage["key"] for stage in summary["stages"]}


def main() -> None:
    """``python -m benchmarks.unmoved``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="a checkout of another version")
    parser.add_argument("--keys", action="store_true", help="stage keys have to be equal too")
    options = parser.parse_args()
    here = Path(__file__).resolve().parent.parent
    moved = False
    for name, overrides in RUNS.items():
        before, after = run(options.against.resolve(), overrides), run(here, overrides)
        compared = [("numbers", numbers(before), numbers(after))]
        compared += [("stage keys", keys(before), keys(after))] if options.keys else []
        for what, old, new in compared:
            different = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            print(f"{name}: {len(old)} {what}, {len(different)} differ", *different[:8], sep="\n    ")
            moved = moved or bool(different)
    sys.exit(moved)


if __name__ == "__main__":
    main()
