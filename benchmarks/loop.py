"""Seconds of every stage of the default run, and the saving by shared stages in sweeps.

    python -m benchmarks.loop                              # a whole run into an empty store
    python -m benchmarks.loop --against ../other/src       # before and after, in turns
    python -m benchmarks.loop --sweep                      # an α sweep and the ablation, against their runs alone
    python -m benchmarks.loop --rounds 1 -- scale=smoke    # anything after -- goes to dnpo.train

The seconds of a stage are the wall clock while it was computed, from its manifest. Start-up and tracking count only for
the whole run. The run's CPU seconds are printed too, which a busy machine disturbs less.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import ROOT, Facts

ALPHAS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
METHODS = ("spin", "dsl", "npo", "dnpo", "fixed_noise")
BRANCHES = (1, 2, 3)
WHOLE = "whole run"
CPU = "whole run, CPU"


def main() -> None:
    """Measure, print, write."""
    parser = harness.common_arguments("loop", "Seconds of every stage of the default run.")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each checkout (default: 2)")
    parser.add_argument("--against", type=Path, metavar="SRC", help="src of another checkout, with conf next to it")
    parser.add_argument("--sweep", action="store_true", help="what sharing stages saves")
    parser.add_argument("overrides", nargs="*", help="settings of dnpo.train, after --")
    given = parser.parse_args()
    found = _sweeps(given) if given.sweep else _run(given)
    out = given.out.with_stem(f"{given.out.stem}-sweep") if given.sweep else given.out
    harness.save(out, {"overrides": given.overrides, **found})


def train(source: Path, store: Path, arguments: list[str], threads: int) -> tuple[float, float]:
    """Run dnpo.train from the checkout whose ``src`` is given; return wall-clock and CPU seconds."""
    environment = {**os.environ, "PYTHONPATH": str(source), "DNPO_CONF": str(source.parent / "conf")}
    environment |= {"OMP_NUM_THREADS": str(threads), "MLFLOW_DISABLE_TELEMETRY": "true"}
    settings = ["tracking=off", f"threads={threads}", f"store={store}"]
    command = [sys.executable, "-m", "dnpo.train", *arguments, *settings]
    clock, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+") as log:
        done = subprocess.run(command, env=environment, cwd=store.parent, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read()[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - clock, cpu


def manifests(store: Path) -> dict[str, Facts]:
    """Read the manifests of all finished stages, by NAME/KEY."""
    return {
        str(path.parent.relative_to(store)): json.loads(path.read_text()) for path in store.glob("*/*/manifest.json")
    }


# --- a run ------------------------------------------------------------------------------------------------------------


def _run(given: argparse.Namespace) -> Facts:
    checkouts = {"this": ROOT / "src"} | ({"other": given.against.resolve()} if given.against else {})
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for i in range(given.rounds):
        for name, source in checkouts.items():
            harness.progress(f"round {i + 1} of {given.rounds}: {name}")
            runs[name].append(_stages(source, given))
    harness.progress("")
    stages = [stage for stage in runs["this"][0] if stage not in (WHOLE, CPU)] + [WHOLE, CPU]
    stages = [*(s for r in runs.values() for s in r[0] if s not in stages), *stages]
    rows, ratios = [], []
    for stage in stages:
        seconds = {name: [run[stage] for run in its if stage in run] for name, its in runs.items()}
        rows.append([stage, *(harness.summary(s) if s else "" for s in seconds.values())])
        if given.against and all(seconds.values()):
            ratios.append(harness.ratio(stage, seconds["this"], seconds["other"]))
            rows[-1].append(harness.ratio_row(ratios[-1])[2])
        elif given.against:
            rows[-1].append("")
    print(f"seconds by stage, all iterations together, median (quartiles) of {given.rounds}\n")
    print(harness.table(["stage", *checkouts, *(["this / other, by round"] if given.against else [])], rows))
    return {"runs": runs, "ratios": ratios}


def _stages(source: Path, given: argparse.Namespace) -> dict[str, float]:
    """Run with an empty store; return seconds by verb, in the order in which the verbs began."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        wall, cpu = train(source, store, [f"hydra.run.dir={folder}/run", *given.overrides], given.threads)
        found: dict[str, float] = {}
        for stage in sorted(manifests(store).values(), key=lambda m: m["started"]):
            found[stage["stage"]] = found.get(stage["stage"], 0.0) + stage["seconds"]
    return {**found, "all stages": sum(found.values()), WHOLE: wall, CPU: cpu}


# --- sweeps -----------------------------------------------------------------------------------------------------------


def _sweeps(given: argparse.Namespace) -> Facts:
    alphas = ",".join(map(str, ALPHAS))
    sweeps: dict[str, list[list[str]]] = {
        f"α sweep, {len(ALPHAS)} points": [[f"npo.alpha={alphas}"]],
        f"ablation, {len(METHODS)} variants at {len(BRANCHES)} branches": [
            [f"method={','.join(METHODS)}", f"iterations={k + 1}", f"dsl.start={k}", f"npo.start={k}"] for k in BRANCHES
        ],
    }
    found = {name: _sweep(name, multiruns, given) for name, multiruns in sweeps.items()}
    rows = [
        [name, f"{f['runs']}", f"{f['together']:,.1f}", f"{f['alone']:,.1f}", f"{f['together'] / f['alone']:.3f}"]
        for name, f in found.items()
    ]
    print("seconds of all stages, computed once for the whole sweep or once for each run\n")
    print(harness.table(("sweep", "runs", "together", "alone", "ratio"), rows))
    return {"sweeps": found}


def _sweep(name: str, multiruns: list[list[str]], given: argparse.Namespace) -> Facts:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number, arguments in enumerate(multiruns):
            harness.progress(f"{name}: {' '.join(arguments)}")
            swept = ["-m", f"hydra.sweep.dir={folder}/multirun-{number}", *arguments, *given.overrides]
            train(ROOT / "src", root / "store", swept, given.threads)
        harness.progress("")
        stages = manifests(root / "store")
        summaries = [json.loads(p.read_text()) for p in sorted(root.glob("multirun-*/*/summary.json"))]
    alone = [sum(stages[stage]["seconds"] for stage in _find_needs(summary, stages)) for summary in summaries]
    return {
        "runs": len(alone),
        "together": sum(stage["seconds"] for stage in stages.values()),
        "alone": sum(alone),
        "alone_median": statistics.median(alone),
        "stages": len(stages),
    }


def _find_needs(summary: dict[str, Any], stages: dict[str, Facts]) -> set[str]:
    """Find the stages of a run, and all stages that they were computed from."""
    found: set[str] = set()
    todo = [f"{stage['stage']}/{stage['key']}" for stage in summary["stages"]]
    while todo:
        stage = todo.pop()
        if stage not in found:
            found.add(stage)
            todo += stages[stage]["inputs"].values()
    return found


if __name__ == "__main__":
    main()
