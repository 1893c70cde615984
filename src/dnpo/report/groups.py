"""Group the runs of a sweep by the options and settings that vary between them, apart from seeds."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dnpo.errors import DataError
from dnpo.settings import CONTENTS
from dnpo.tracking.neutral import find_neutral
from dnpo.tracking.reading import SFT, TrackedRun
from dnpo.wording import plural, short_number

# The options that distinguish runs are sought in this order.
FIRST = ("dnpo.sweep/regime", "dnpo.method", "dnpo.dsl", "dnpo.npo", "dnpo.data", "dnpo.model", "dnpo.judge")
NO_PARTS = ("dnpo.tracking", "dnpo.launch", "dnpo.sweep")
STARTS = ("dsl.start", "npo.start")

# Metrics that an unfinished run has tracked by iteration. The table names them without the prefix iteration/.
BY_ITERATION = (
    *(f"eval/{name}" for name in ("score", "score_greedy", "score_human", "win", "tie", "lose", "accuracy", "loss")),
    *(f"pairs/{name}" for name in ("pairs", "flipped", "flips", "identical", "unscored")),
    *("judge/verdicts", "judge/unscored", "judge/disagreement", "eval/unscored"),
    *("stagnation/ks", "stagnation/ks_critical", "generated/cut", "second/score", "leaderboard/average"),
    *(f"iteration/loss/{name}" for name in ("policy", "noise")),
    *(f"iteration/logps/{name}" for name in ("chosen", "rejected", "new")),
    *("iteration/margin/saturation", "iteration/npo/variance", "iteration/npo/shift", "seconds"),
)


@dataclass(frozen=True)
class Member:
    """A run, and the rows of its table that are used: one per policy."""

    run: TrackedRun
    rows: tuple[Mapping[str, Any], ...]

    def value(self, iteration: int | str, metric: str) -> float | None:
        """Return a metric of one policy; None if it was not measured."""
        value = next((row.get(metric) for row in self.rows if row["iteration"] == iteration), None)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    def values_by_iteration(self, metric: str) -> list[tuple[int | str, float]]:
        """Return the iterations after which a metric was measured, with its values."""
        values = [(row["iteration"], self.value(row["iteration"], metric)) for row in self.rows]
        return [(iteration, value) for iteration, value in values if value is not None]


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed, one per seed; in a branching sweep, one per seed and iteration."""

    label: str
    members: tuple[Member, ...]

    def at(self, iteration: int | str) -> dict[int, Member]:
        """Return the members that have this iteration, by seed."""
        return {m.run.seed: m for m in self.members if any(row["iteration"] == iteration for row in m.rows)}

    def values(self, iteration: int | str, metric: str) -> list[float]:
        """Return a metric after one iteration, one number per seed."""
        values = [member.value(iteration, metric) for member in self.at(iteration).values()]
        return [value for value in values if value is not None]

    @property
    def seeds(self) -> list[int]:
        """The seeds, sorted."""
        return sorted({member.run.seed for member in self.members})

    @property
    def options(self) -> tuple[str, str]:
        """The options of dsl and npo, which all members share."""
        run = self.members[0].run
        return run.option("dsl"), run.option("npo")

    @property
    def is_spin(self) -> bool:
        """Whether the group is SPIN: labels by origin, no noise."""
        return all(m.run.option("dsl") == "off" and m.run.option("npo") == "off" for m in self.members)


@dataclass(frozen=True)
class Groups:
    """The groups of a sweep.

    Attributes:
        varies: names of the options and settings that differ between groups.
        branching: whether only the last iteration of each run is used, because it branches off a common chain.
        missing: sentences about runs and iterations that are missing.
    """

    groups: tuple[Group, ...]
    varies: tuple[str, ...]
    branching: bool
    missing: tuple[str, ...] = field(default=())

    @property
    def iterations(self) -> list[int | str]:
        """The iterations of all groups in order, fine-tuning first."""
        every = {row["iteration"] for group in self.groups for member in group.members for row in member.rows}
        return sorted(every, key=lambda k: -1 if k == SFT else int(k))


def is_complete(run: TrackedRun) -> bool:
    """Return whether a run finished and wrote its summary."""
    try:
        return run.finished and bool(run.summary)
    except DataError:
        return False


def iteration_title(iteration: int | str) -> str:
    """Return a policy's name on the page: ``SFT``, or ``k = 1`` for the policy after iteration 1."""
    return SFT if iteration == SFT else f"k = {iteration}"


def rows_of(run: TrackedRun) -> tuple[Mapping[str, Any], ...]:
    """Return a run's table; for a run without a summary, the metrics that it tracked by iteration."""
    if is_complete(run):
        return tuple(run.table)
    rows: dict[int, dict[str, Any]] = {}
    for name in BY_ITERATION:
        for step, value in run.history(name):
            row = rows.setdefault(step, {"iteration": SFT if step < 0 else step})
            row[name.removeprefix("iteration/")] = value
    return tuple(rows[step] for step in sorted(rows))


def group_runs(runs: Sequence[TrackedRun]) -> Groups:
    """Sort runs into groups. Unfinished runs are left out and listed under ``missing``."""
    finished = [run for run in runs if is_complete(run)]
    branching = _is_branching(finished)
    left_out = {"seed", "iterations", *STARTS} if branching else {"seed"}
    names = _choose_names(finished, left_out)
    buckets: dict[tuple[str, ...], list[TrackedRun]] = {}
    for run in finished:
        buckets.setdefault(tuple(_value(run, name) for name in names), []).append(run)
    groups, repeated = [], 0
    for values, members in zip(_shorten(list(buckets)), buckets.values(), strict=True):
        newest = {(run.seed, run.params.get("iterations") if branching else ""): run for run in members}
        repeated += len(members) - len(newest)
        chosen = sorted(newest.values(), key=lambda run: (run.seed, _length(run), run.started))
        groups.append(Group(_label(names, values), tuple(_member(run, branching) for run in chosen)))
    missing = [*_list_unfinished(runs, finished), *_gaps(groups, branching)]
    if repeated:
        missing.append(f"Left out, because a newer run has the same settings and seed: {plural(repeated, 'run')}.")
    return Groups(tuple(groups), tuple(map(_short, names)), branching, tuple(missing))


def _is_branching(runs: Sequence[TrackedRun]) -> bool:
    """Return whether runs differ in their number of iterations, and those with parts begin with them at the last."""
    several = len({run.params.get("iterations") for run in runs}) > 1
    return several and any(starts(run) for run in runs) and all(map(is_branch, runs))


def is_branch(run: TrackedRun) -> bool:
    """Return whether labels and noise begin at a run's last iteration, which must be 1 or later; true of SPIN too."""
    last = _length(run) - 1
    return last >= 1 and all(start == last for start in starts(run))


def _length(run: TrackedRun) -> int:
    return int(run.params.get("iterations", 0))


def starts(run: TrackedRun) -> list[int]:
    """Return the iterations at which noise and labels by score begin, if the run has them."""
    return [int(run.params.get(name, 0)) for name in STARTS if not is_off(run, name)]


def is_off(run: TrackedRun, setting: str) -> bool:
    """Return whether the part that a setting belongs to, such as ``npo`` of ``npo.start``, is off in a run."""
    return (run.option(setting.split(".")[0]) or "off") == "off"


def _member(run: TrackedRun, branching: bool) -> Member:
    rows = rows_of(run)
    return Member(run, rows[-1:] if branching else rows)


def _value(run: TrackedRun, name: str) -> str:
    return run.tags.get(name, "") if name.startswith("dnpo.") else run.params.get(name, "")


def _choose_names(runs: Sequence[TrackedRun], left_out: set[str]) -> list[str]:
    """Choose a few options and settings that together distinguish all different runs, the best known first."""
    options = {f"dnpo.{part.split('@')[-1]}" for run in runs for part in run.summary.get("choices", {})}
    tags = sorted(options - set(FIRST) - set(NO_PARTS))
    params = sorted({name for run in runs for name in run.params})
    neutral = frozenset.intersection(*(find_neutral(run.params) for run in runs)) if runs else frozenset()
    contents = [name for name in params if name.endswith(f".{CONTENTS}")]
    names = [*FIRST, *tags, "iterations", *(name for name in params if name not in neutral and name not in contents)]
    chosen: list[str] = []
    for name in names:
        if name in left_out or name.endswith(".seed"):
            continue
        if _parts(runs, [*chosen, name]) > _parts(runs, chosen):
            chosen.append(name)
    for name in contents:
        with_it = _parts(runs, [*chosen, name])
        if with_it > _parts(runs, chosen):
            # prefer a path to a content hash if it distinguishes the same runs
            neighbours = [
                each for each in params if each.rpartition(".")[0] == name.rpartition(".")[0] and each in neutral
            ]
            same = [
                each
                for each in neighbours
                if _parts(runs, [*chosen, each]) == _parts(runs, [*chosen, each, name]) == with_it
            ]
            chosen.append(same[0] if same else name)
    return chosen


def _parts(runs: Iterable[TrackedRun], names: Sequence[str]) -> int:
    return len({tuple(_value(run, name) for name in names) for run in runs})


def _short(name: str) -> str:
    return name.removeprefix("dnpo.")


def _shorten(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Shorten the long numbers of a setting, such as those of a search, if they remain different."""
    columns = []
    for column in zip(*rows, strict=True):
        short = tuple(map(short_number, column))
        columns.append(short if len(set(short)) == len(set(column)) else column)
    return list(zip(*columns, strict=True)) if columns else list(rows)


def _label(names: Sequence[str], values: Sequence[str]) -> str:
    """Join the values into a label such as ``dnpo · npo.alpha=0.1``; the method is shown without its name."""
    shown = [(name, value) for name, value in zip(names, values, strict=True) if value]
    if not shown:
        return "all runs"
    return " · ".join(v if n == "dnpo.method" else f"{_short(n)}={v}" for n, v in shown)


def _list_unfinished(runs: Iterable[TrackedRun], finished: Sequence[TrackedRun]) -> list[str]:
    """Describe the unfinished runs, except those with the settings and options of a finished run."""
    ids, done = {run.id for run in finished}, [_identity(run) for run in finished]
    left = [run for run in runs if run.id not in ids and _identity(run) not in done]
    return [
        f"{run.name} (run {run.id[:8]}, seed {run.tags.get('dnpo.seed', '?')}) {describe_state(run)}." for run in left
    ]


def _identity(run: TrackedRun) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Return what identifies a run apart from its outcome: its settings and options."""
    neutral = find_neutral(run.params)
    settings = {name: value for name, value in run.params.items() if name not in neutral}
    return settings, {name: run.tags.get(name, "") for name in FIRST}


def describe_state(run: TrackedRun) -> str:
    """Return the state of a run as the end of a sentence."""
    known: Mapping[str, Callable[[], str]] = {
        "FAILED": lambda: "failed",
        "KILLED": lambda: "was interrupted",
        "RUNNING": lambda: "is still running, or its process was killed",
        "FINISHED": lambda: "finished" if is_complete(run) else "finished without a summary",
    }
    return known.get(run.status, lambda: f"has the status {run.status}")()


def _gaps(groups: Sequence[Group], branching: bool) -> list[str]:
    """Describe the seeds that a group lacks and another has; in a branching sweep also the iterations."""
    every = {row["iteration"] for group in groups for member in group.members for row in member.rows}
    seeds = {seed for group in groups for seed in group.seeds}
    gaps = []
    for group in groups:
        # without branches, how many iterations a run has is one of its settings
        iterations = every if branching else {row["iteration"] for member in group.members for row in member.rows}
        for seed in sorted(seeds):
            absent = sorted((iteration for iteration in iterations if seed not in group.at(iteration)), key=str)
            if len(absent) == len(iterations):
                gaps.append(f"{group.label} has no finished run with seed {seed}.")
            elif absent:
                gaps.append(
                    f"{group.label} with seed {seed} has nothing for {', '.join(map(iteration_title, absent))}."
                )
    return gaps
