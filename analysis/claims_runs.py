"""The policies of tracked runs as CSV, and the time that went into them, to be kept when the runs are gone."""

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.claims_assess import in_force
from analysis.claims_registered import origins
from analysis.keeping import csv_of
from analysis.selection import method_of
from dnpo.tracking.reading import TrackedRun
from dnpo.wording import duration

DIGITS = 6


def policies(runs: Sequence[TrackedRun], arms: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    """One row for each policy, with its seed, options and all of its metrics, ordered by seed.

    A policy that several runs share has one row. Until the parts that define a run's arm have started, its policies
    belong to another arm, whose runs give these rows.

    Args:
        runs: finished runs of one sweep.
        arms: the options and settings by which arms are recognised; each is a column if a run has it.
    """
    names = list(dict.fromkeys(name for tags in arms.values() for name in tags))
    rows: dict[str, dict[str, Any]] = {}
    for run in sorted(runs, key=lambda run: (run.seed, run.started)):
        head = {"run": run.id, "commit": " ".join(sorted(origins(run))), "seed": run.seed}
        options = {name: run.option(name) or run.params.get(name) for name in names}
        unknown = [f"{run.id}/{row['iteration']}" for row in run.table]  # of a run from before policies were listed
        for policy, row in zip(run.summary.get("policies", unknown), run.table, strict=True):
            if in_force(run, row["iteration"]):
                numbers = {name: _short(value) for name, value in row.items() if isinstance(value, int | float)}
                place = {"policy": policy, "iteration": row["iteration"]}
                rows.setdefault(policy, head | options | place | numbers)
    shown = [name for row in rows.values() for name, value in row.items() if value not in (None, "")]
    columns = list(dict.fromkeys(shown))
    return [{name: row.get(name) for name in columns} for row in rows.values()]


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def to_csv(runs: Sequence[TrackedRun], arms: Mapping[str, Mapping[str, str]]) -> str:
    """The rows of :func:`policies` as CSV."""
    return csv_of(policies(runs, arms))


def newest(runs: Sequence[TrackedRun]) -> list[TrackedRun]:
    """Leave out runs that were made again, as after adding a measurement: same method, seed, iterations and policies.

    Args:
        runs: the newest first.
    """
    kept: dict[tuple[Any, ...], TrackedRun] = {}
    for run in runs:
        policies = tuple(run.summary.get("policies", [run.id]))
        kept.setdefault((method_of(run), run.seed, run.params.get("iterations", ""), policies), run)
    return list(kept.values())


def describe_work(runs: Sequence[TrackedRun]) -> str:
    """How long the stages of runs took, and how much longer they would have without sharing; "" if it is unknown."""
    stages = [each for run in runs for each in run.summary.get("stages", [])]
    computed = sum({each["key"]: float(each["seconds"]) for each in stages}.values())
    if not computed:
        return ""
    alone = sum(float(each["seconds"]) for each in stages)
    return f"{duration(computed)} of computing, {alone / computed:.1f} times as much without shared stages"
