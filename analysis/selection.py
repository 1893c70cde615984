"""Select the runs that are compared. A *cell* is a method at an iteration with a seed; each cell has one run.

A **chain** is a run of one method from its beginning; all its iterations are cells. A **branch** is SPIN up to its own
last iteration, which is the method's; only that iteration is a cell (the ablation protocol of the DNPO paper).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dnpo import palette
from dnpo.errors import DataError, DnpoError
from dnpo.report.groups import is_branch, is_off, starts
from dnpo.tracking.earlier import TARGET, knows
from dnpo.tracking.neutral import find_neutral
from dnpo.tracking.reading import FINISHED, SFT, Database, TrackedRun, describe_assumed
from dnpo.wording import plural, ranges

Iteration = int | str

SPIN, DSL, NPO, DNPO = palette.SPIN.name, palette.DSL.name, palette.NPO.name, palette.DNPO.name
FIXED, CONSTANT = palette.FIXED.name, palette.CONSTANT.name
METHODS = {options: method.name for options, method in palette.METHODS.items()}
BEGINNING = (SFT, 0)  # iterations that every method shares with SPIN

COMPARED = ("iterations", "seed")  # these may differ between the runs of a comparison
# Settings of measures that few figures show.
MEASURES = ("second_judge.", "eval.texts", "eval.leaderboard")
DISTINGUISHING = ("dsl.", "npo.")  # these may differ between methods, not within one
# If all methods are compared, only these settings must agree: they decide the first policy and the measurements.
COMMON = (
    "data.",
    "model.",
    "sft.",
    "sft_rows",
    "eval.",
    *(f"generate.{name}" for name in ("_target_", "temperature", "top_")),
)
JUDGED = "eval.judge"  # only the judge that evaluates counts; it may be the labelling one
SHOWN = 6


class Absent(DnpoError):
    """The runs lack the data that a figure or table needs."""


@dataclass(frozen=True)
class Cells:
    """The runs that are used, by method, iteration and seed, and notes on the runs left out."""

    runs: Mapping[tuple[str, Iteration, int], TrackedRun]
    notes: tuple[str, ...] = ()

    @property
    def methods(self) -> list[str]:
        """The methods in the order of the paper, SPIN first."""
        order = list(dict.fromkeys([*METHODS.values(), *palette.RIVALS]))
        names = dict.fromkeys(method for method, _, _ in self.runs)
        return sorted(names, key=lambda name: order.index(name) if name in order else len(order))

    @property
    def iterations(self) -> list[Iteration]:
        """The iterations: SFT, then 0, 1, …"""
        return sorted({k for _, k, _ in self.runs}, key=lambda k: -1 if k == SFT else int(k))

    @property
    def seeds(self) -> list[int]:
        """The seeds of all cells."""
        return sorted({seed for _, _, seed in self.runs})

    @property
    def missing(self) -> list[str]:
        """The cells that a full grid of these methods, iterations and seeds lacks."""
        return [
            f"{method} {spell(k)} seed {seed}"
            for method in self.methods
            for k in self.iterations
            for seed in self.seeds
            if (method, k, seed) not in self.runs
        ]

    @property
    def used(self) -> list[TrackedRun]:
        """The runs of all cells, each once."""
        return list({run.id: run for run in self.runs.values()}.values())

    def of(self, method: str, iteration: Iteration, seeds: Iterable[int] | None = None) -> list[TrackedRun]:
        """A method's runs that have the iteration, in the order of their seeds."""
        return [
            self.runs[method, iteration, seed]
            for seed in (self.seeds if seeds is None else seeds)
            if (method, iteration, seed) in self.runs
        ]

    def seeds_of(self, *sides: tuple[str, Iteration]) -> list[int]:
        """The seeds that all of these methods have at these iterations."""
        return [seed for seed in self.seeds if all((*side, seed) in self.runs for side in sides)]

    def at_end(self, method: str, seeds: Iterable[int] | None = None) -> list[TrackedRun]:
        """A method's runs, in the order of their seeds, if only the last iteration of each run is a cell."""
        of = {seed: run for (each, _, seed), run in self.runs.items() if each == method}
        return [of[seed] for seed in (self.seeds if seeds is None else seeds) if seed in of]

    def only(
        self, methods: Sequence[str] | None = None, iterations: Callable[[Iteration], bool] | None = None
    ) -> "Cells":
        """Keep the cells of these methods at these iterations.

        Raises:
            Absent: no cell is left.
        """
        runs = {
            (method, k, seed): run
            for (method, k, seed), run in self.runs.items()
            if (methods is None or method in methods) and (iterations is None or iterations(k))
        }
        if not runs:
            raise Absent(f"the selection has no {' or '.join(methods or ['such cell'])}; {self._has()}")
        return replace(self, runs=runs)

    def needs(self, *methods: str) -> None:
        """Refuse cells that lack one of these methods.

        Raises:
            Absent: a method is missing.
        """
        for method in methods:
            if method not in self.methods:
                raise Absent(f"the selection has no run of {method}; {self._has()}")

    def _has(self) -> str:
        return f"it has {', '.join(self.methods)} at {', '.join(map(spell, self.iterations))}"


@dataclass(frozen=True)
class Runs:
    """The runs of a selection.

    Attributes:
        finished: the finished runs.
        notes: notes on the runs left out.
        asked: the selection in words.
    """

    finished: tuple[TrackedRun, ...]
    notes: tuple[str, ...]
    asked: str

    def chains(self, matters: Sequence[str] = ()) -> Cells:
        """All iterations of every run.

        Args:
            matters: settings of measures (some of ``MEASURES``) that must agree too, because the measures are shown.

        Raises:
            DataError: the runs differ in other settings than those that are compared.
        """
        cells = self._cells(
            self.finished, lambda run: [row["iteration"] for row in run.table], differing_starts=False, matters=matters
        )
        late = sorted({k for run in cells.used for k in starts(run) if k > 1})
        begins = (
            [f"labels and noise begin at iteration {', '.join(map(str, late))}; before that the runs are SPIN's"]
            if late
            else []
        )
        return replace(cells, notes=(*cells.notes, *begins))

    def branches(self, matters: Sequence[str] = ()) -> Cells:
        """The last iteration of every run that left the SPIN chain there, and of SPIN itself.

        Raises:
            Absent: no run branches off.
            DataError: the runs differ in other settings than those that are compared.
        """
        branched = [run for run in self.finished if is_branch(run)]
        if all(method_of(run) == SPIN for run in branched):
            raise Absent(
                f"{self.asked} has no run that branches off the SPIN chain at its last iteration (dsl.start=last, "
                "npo.start=last), as in the sweeps ablation and fixed_vs_trainable"
            )
        cells = self._cells(branched, lambda run: [run.last["iteration"]], differing_starts=True, matters=matters)
        if len(branched) < len(self.finished):
            left_out = plural(len(self.finished) - len(branched), "chain")
            cells = replace(cells, notes=(*cells.notes, f"{left_out} left out"))
        return cells

    def rivals(self) -> Cells:
        """The last iteration of every run, of any method, by the name of the method's option.

        Raises:
            DataError: the runs begin differently or are measured differently, or runs of one method differ.
        """
        refuse_judges(self.finished)
        cells = self._cells(
            self.finished,
            lambda run: [run.last["iteration"]],
            differing_starts=False,
            matters=(),
            name=_option_of,
            own=_is_own,
        )
        alike: dict[tuple[int, ...], list[str]] = {}  # methods by the seeds that they lack
        for method in cells.methods:
            alike.setdefault(tuple(seed for seed in cells.seeds if not cells.at_end(method, [seed])), []).append(method)
        shown = [
            f"seed{'s' * (len(few) > 1)} {ranges(few)} of {_name_methods(methods, cells.methods)}"
            for few, methods in alike.items()
            if few
        ]
        return replace(cells, notes=(*cells.notes, f"missing: {'; '.join(shown)}")) if shown else cells

    def named(self, name: Callable[[TrackedRun], str], own: Callable[[str], bool]) -> Cells:
        """All iterations of every run, under names that the caller gives in place of the methods'.

        Args:
            name: returns the name of what is compared in a run.
            own: returns whether a setting may differ between names.

        Raises:
            DataError: the runs are measured by different judges, or differ in other settings.
        """
        refuse_judges(self.finished)
        return self._cells(
            self.finished,
            lambda run: [row["iteration"] for row in run.table],
            differing_starts=False,
            matters=(),
            name=name,
            own=own,
        )

    def _cells(
        self,
        runs: Sequence[TrackedRun],
        iterations: Callable[[TrackedRun], list[Iteration]],
        *,
        differing_starts: bool,
        matters: Sequence[str],
        name: "Callable[[TrackedRun], str] | None" = None,
        own: "Callable[[str], bool] | None" = None,
    ) -> Cells:
        assumed = refuse_mixture(runs, differing_starts=differing_starts, matters=matters, name=name, own=own)
        chosen: dict[tuple[str, Iteration, int], TrackedRun] = {}
        again: set[str] = set()
        for run in sorted(runs, key=lambda run: run.started):
            for k in iterations(run):
                place = ((name or method_of)(run), k, run.seed)
                if place in chosen and chosen[place].id != run.id:
                    again.add(chosen[place].id)
                chosen[place] = run
        notes = [*self.notes, *assumed]
        if replaced := again - {run.id for run in chosen.values()}:
            notes.append(f"{plural(len(replaced), 'run')} left out: a newer one has the same settings and seed")
        cells = Cells(chosen, tuple(notes))
        if cells.missing and name is None:
            shown = ", ".join(cells.missing[:SHOWN])
            more = f" and {len(cells.missing) - SHOWN} more" if len(cells.missing) > SHOWN else ""
            cells = replace(cells, notes=(*cells.notes, f"missing: {shown}{more}"))
        return cells


def select(
    database: Database, sweeps: Sequence[str] = (), ids: Sequence[str] = (), tags: Mapping[str, str] | None = None
) -> Runs:
    """Read the finished runs of a selection, by the arguments of :meth:`dnpo.tracking.reading.Database.runs`.

    Raises:
        DataError: nothing matches, or none of the runs is finished.
    """
    runs = database.runs(sweeps=sweeps, ids=ids, tags=tags)
    asked = " ".join(
        [*(f"sweep {name}" for name in sweeps), *ids, *(f"{name}={value}" for name, value in (tags or {}).items())]
    )
    asked = asked or "every run"
    unfinished = Counter(run.status for run in runs if run.status != FINISHED)
    counts = " and ".join(f"{count} {status}" for status, count in unfinished.items())
    finished = tuple(run for run in runs if run.finished)
    if not finished:
        raise DataError(f"{asked}: no run is finished yet ({counts})")
    return Runs(finished, (f"left out as not finished: {counts}",) if unfinished else (), asked)


def method_of(run: TrackedRun) -> str:
    """The method of a run, found from its labels and noise, in any sweep."""
    labels, noise = run.option("dsl") or "off", run.option("npo") or "off"
    return METHODS.get((labels, noise), f"{labels} labels, {noise} noise")


def spell(iteration: Iteration) -> str:
    """The iteration as readers see it: SFT, k=0, …"""
    return SFT if iteration == SFT else f"k={iteration}"


def commits(runs: Iterable[TrackedRun]) -> str:
    """The commits of the code that made the runs, shortened."""
    hashes = dict.fromkeys(run.tags.get("dnpo.commit", "") for run in runs)
    return ", ".join(c[:7] + "+" * c.endswith("+") for c in hashes if c) or "unknown"


def targets(database: Database, runs: Iterable[TrackedRun]) -> list[str]:
    """Ids of the MLflow runs that keep the results: the sweeps' parent runs, or the runs themselves outside sweeps."""
    return list(dict.fromkeys(p.id if (p := database.parent(run)) else run.id for run in runs))


def refuse_judges(runs: Sequence[TrackedRun]) -> None:
    """Refuse runs whose policies are measured by different judges.

    Raises:
        DataError: names the judges.
    """
    judges = Counter(str(_judge_in_force(run)) for run in runs)
    if len(judges) > 1:
        shown = ", ".join(f"{judge} ({plural(count, 'run')})" for judge, count in judges.most_common(SHOWN))
        raise DataError(
            f"runs measured by different judges in one comparison: {shown}; run them with the same +judge@eval.judge=…"
        )


def _judge_in_force(run: TrackedRun) -> dict[str, str]:
    """The settings of the judge that measures a run's policies."""
    skipped = find_neutral(run.params)
    for prefix in (f"{JUDGED}.", "judge."):
        found = {n.removeprefix(prefix): v for n, v in run.params.items() if n.startswith(prefix) and n not in skipped}
        if found:
            return dict(sorted(found.items()))
    return {}


def refuse_mixture(
    runs: Sequence[TrackedRun],
    *,
    differing_starts: bool = False,
    matters: Sequence[str] = (),
    name: Callable[[TrackedRun], str] | None = None,
    own: Callable[[str], bool] | None = None,
) -> list[str]:
    """Refuse runs that differ in settings that are not compared; return notes on settings that counted as defaults.

    Labels (``dsl.*``) and noise (``npo.*``) may differ between methods but not within one. Every other setting that can
    change a result must be the same in all runs, except the seed and the number of iterations. A run from before a
    setting existed has its default, see :mod:`dnpo.tracking.earlier`.

    Args:
        differing_starts: whether runs of one method may start at different iterations, as branches do.
        matters: settings of measures that must agree too.
        name: returns the method of a run; None: found from labels and noise.
        own: returns whether a setting may differ between methods; None: only settings of labels and noise may.

    Raises:
        DataError: names the settings, their values, and how to narrow the selection.
    """
    groups: dict[str, list[TrackedRun]] = {}
    for run in runs:
        groups.setdefault((name or method_of)(run), []).append(run)
    own = own or (lambda setting: setting.startswith(DISTINGUISHING))
    differing: dict[str, Sequence[TrackedRun]] = {}
    assumed: dict[str, set[str]] = {}

    def compare(among: Sequence[TrackedRun], names: Iterable[str]) -> None:
        for name in names:
            silent = {run.id for run in among if name in run.assumed}
            if len({_value(run, name) for run in among}) > 1:
                differing[name] = among
            elif 0 < len(silent) < len(among):
                assumed.setdefault(name, set()).update(silent)

    every = sorted({name for run in runs for name in run.params if name not in find_neutral(run.params)})
    counting = [name for name in every if _counts(name, matters)]
    compare(runs, [name for name in counting if not own(name)])
    differs = [name for name in counting if own(name)]
    for members in groups.values():
        among = [name for name in differs if not (_is_start(name) and (differing_starts or is_off(members[0], name)))]
        by_seed: dict[tuple[int, str], list[TrackedRun]] = {}
        for run in members:
            by_seed.setdefault((run.seed, run.params.get("iterations", "")), []).append(run)
        # A constant that matches a run differs between seeds, because the run does.
        compare(members, [name for name in among if name != "npo.shift"])
        for same in by_seed.values():
            compare(same, [name for name in among if name == "npo.shift"])
    if differing:
        lines = [f"{name} is {_describe(name, among)}" for name, among in list(differing.items())[:SHOWN]]
        more = f"; and {len(differing) - SHOWN} other settings" if len(differing) > SHOWN else ""
        first, these = next(iter(differing.items()))
        value = next(value for value, _ in Counter(_value(run, first) for run in these).most_common() if value)
        raise DataError(
            f"runs with different settings in one comparison: {'; '.join(lines)}{more}. Narrow the selection, for "
            f"example with tag={first}={value}{_explain_unknown(differing)}"
        )
    return describe_assumed(assumed, {run.id: run for run in runs})


def _describe(name: str, among: Sequence[TrackedRun]) -> str:
    """The values of a setting, with the numbers of runs, and of those that have it by default."""
    found = []
    for value, count in Counter(_value(run, name) for run in among).most_common(5):
        silent = sum(name in run.assumed for run in among if _value(run, name) == value)
        default = "" if not silent else ", by default" if silent == count else f", {silent} of them by default"
        found.append(f"{value or 'absent'} ({plural(count, 'run')}{default})")
    return ", ".join(found)


def _name_methods(some: Sequence[str], among: Sequence[str]) -> str:
    """List methods; if they are most of those there are, list the others instead."""
    others = [method for method in among if method not in some]
    if len(others) >= len(some):
        return ", ".join(some)
    return f"all methods but {', '.join(others)}"


def _explain_unknown(differing: Mapping[str, Sequence[TrackedRun]]) -> str:
    """Say that runs are of a newer version, if their parts have settings that this version does not know."""
    unknown = []
    for name, among in differing.items():
        part, _, setting = name.rpartition(".")
        targets = {run.params.get(f"{part}.{TARGET}", "") for run in among}
        if any(name not in run.params for run in among) and len(targets) == 1 and not knows(targets.pop(), setting):
            unknown.append(name)
    if not unknown:
        return ""
    return f". This version of dnpo does not know {', '.join(unknown)}; install the version that made the newest runs"


def refuse_unlike(runs: Sequence[TrackedRun], name: Callable[[TrackedRun], str] | None = None) -> list[str]:
    """Refuse runs that begin differently or are measured differently, and different runs of one method.

    Returns the notes of :func:`refuse_mixture`.

    Args:
        name: returns the name of what is compared in a run; None: the name of its method.

    Raises:
        DataError: names the settings, their values, and how to narrow the selection.
    """
    refuse_judges(runs)
    return refuse_mixture(runs, name=name or _option_of, own=_is_own)


def _option_of(run: TrackedRun) -> str:
    """The name of the method's option."""
    return run.option("method") or "?"


def _is_own(setting: str) -> bool:
    """Whether a method chooses this setting."""
    return not setting.startswith(COMMON) or setting.startswith(JUDGED)


def _counts(name: str, matters: Sequence[str]) -> bool:
    if name in COMPARED:
        return False
    return not name.startswith(MEASURES) or (bool(matters) and name.startswith(tuple(matters)))


def _value(run: TrackedRun, name: str) -> str:
    """The value of a setting. A part's seed that equals the run's counts as the same in all runs."""
    value = run.params.get(name, "")
    return "the run's seed" if name.endswith(".seed") and value == str(run.seed) else value


def _is_start(name: str) -> bool:
    return name.endswith(".start")


def describe(run: TrackedRun) -> Mapping[str, Any]:
    """A run's data, model and judge, for footers."""
    return {name: run.option(name) for name in ("data", "model", "judge")}
