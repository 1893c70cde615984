"""Compute the outcome of every claim from tracked runs.

Options and settings (``arms`` in the file of claims) decide which runs of a sweep belong to an arm. A run's iteration k
belongs to its arm only if the parts that define the arm have started by k. So a branch in a sweep such as ``ablation``
contributes only its last iteration, and a chain of ``main`` all of its iterations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from analysis.claims_book import Book, Claim, Premise, Term
from analysis.claims_measures import BETWEEN, MEASURES, TrackedPolicy, Values
from analysis.claims_registered import Registration, describe, split
from analysis.claims_rules import (
    ROLES,
    Effect,
    Outcome,
    Role,
    Sample,
    check,
    correct,
    decide,
    estimate_effect,
    strictest,
)
from analysis.selection import refuse_mixture, refuse_unlike
from dnpo.errors import DataError, DnpoError
from dnpo.stats.intervals import Estimate
from dnpo.stats.table import ALPHA
from dnpo.tracking.reading import SFT, Database, TrackedRun

PARTS = ("dsl", "npo")  # each acts from its `start` on


# --- the runs --------------------------------------------------------------------------------------------------------


@dataclass
class Tracked:
    """The finished runs of the sweeps, and their policies.

    Attributes:
        runs: finished runs by sweep, the newest first.
        unfinished: numbers of unfinished runs, by sweep.
        absent: why a sweep has no runs.
        refused: by sweep, the reasons why some runs do not test the claims as they are registered.
    """

    arms: Mapping[str, Mapping[str, str]]
    runs: dict[str, list[TrackedRun]] = field(default_factory=dict)
    unfinished: dict[str, int] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    _policies: dict[tuple[str, int | str], TrackedPolicy] = field(default_factory=dict)
    _values: dict[str, Values] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        book: Book,
        database: Database | None,
        where: Mapping[str, str],
        seeds: Sequence[int] | None,
        registration: Registration | None = None,
    ) -> "Tracked":
        """Read the runs.

        Args:
            where: tags or settings that runs must have.
            seeds: seeds to use; None: all.
            registration: when the claims were registered; only later runs count. None: runs of any time.
        """
        self = cls(book.arms)
        for sweep in book.sweeps:
            try:
                if database is None:
                    raise DataError(f"no run of sweep {sweep} is tracked")
                runs = [r for r in database.runs(sweeps=[sweep], tags=where) if seeds is None or r.seed in seeds]
            except DataError as error:
                runs = []
                self.absent[sweep] = str(error) if where else f"no run of sweep {sweep} is tracked"
            finished = [run for run in runs if run.finished]
            if registration is not None:
                finished, objections = split(registration, finished)
                if objections:
                    self.refused[sweep] = describe(objections)
            self.runs[sweep] = sorted(finished, key=lambda run: -run.started)
            self.unfinished[sweep] = sum(not run.finished for run in runs)
        return self

    def seeds(self, sweep: str) -> list[int]:
        """The seeds with a finished run in the sweep."""
        return sorted({run.seed for run in self.runs[sweep]})

    def policy(self, sweep: str, arm: str, seed: int, iteration: int | str) -> TrackedPolicy | None:
        """One policy of an arm, from the newest run that has it; None if there is none."""
        tags = self.arms[arm]
        for run in self.runs[sweep]:
            if (
                run.seed == seed
                and all(_has(run, name, value) for name, value in tags.items())
                and in_force(run, iteration)
            ):
                return self._policies.setdefault((run.id, iteration), TrackedPolicy(run, iteration))
        return None

    def value(self, claim: Claim, arm: str, seed: int, iteration: int | str) -> Values:
        """A claim's measure of one policy, computed once."""
        policy = _find_policy(claim, self, arm, seed, iteration)
        key = repr((policy.run.id, iteration, claim.measure, sorted(claim.arguments.items())))
        if key not in self._values:
            of, function, _ = MEASURES[claim.measure]
            self._values[key] = function(getattr(policy, of), **claim.arguments)
        return self._values[key]

    def missing(self, claim: Claim, seed: int) -> list[str]:
        """The policies that a claim needs and that are missing for a seed."""
        return [
            f"{arm}@{k}" for arm, k in list_needed_policies(claim) if self.policy(claim.sweep, arm, seed, k) is None
        ]


def _has(run: TrackedRun, name: str, value: str) -> bool:
    """Whether a run was made with an option, such as ``dsl: score``, or a setting, such as ``rollout.segment: 3``."""
    return run.option(name) == value or run.params.get(name) == value


def in_force(run: TrackedRun, iteration: int | str) -> bool:
    """Whether a run has the iteration, and all parts that define its arm have started there; always true of SFT."""
    if iteration == SFT:
        return True
    k = int(iteration)
    started = all(int(run.params.get(f"{part}.start", 0)) <= k for part in PARTS if run.option(part) not in ("off", ""))
    return started and k < int(run.params["iterations"])


def list_needed_policies(claim: Claim) -> list[tuple[str, int | str]]:
    """The arms and iterations that a claim needs, each once."""
    a, b = claim.sides
    policies = [(term.arm, k) for term in a + b for k in term.iterations]
    return list(dict.fromkeys(policies))


# --- the numbers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """The outcome of a claim.

    Attributes:
        p: of the test against the claim's region, before the correction.
        p_adjusted: after the correction over all claims of its role; None for a check.
        p_negligible, p_negligible_adjusted: likewise of the test whether the effect is negligible.
        level: the level of ``detectable``, the strictest one of the correction.
        exploratory: whether runs were used that do not test the claims as they are registered.
        by: the effect by iteration, if both sides have the same iterations.
        by_seed: the means of a and b over items, by seed.
        complete: the seeds that have all runs which the claim needs, whether its premise holds for them or not.
        notes: remarks on the measurement.
        held_back: why it is undecided although its effect is as claimed.
        reason: why it was not measured.
        runs: the runs that the measurement used; none if it was read from an earlier table.
        commits: the versions that made these runs, of a measurement from an earlier table.
    """

    claim: Claim
    outcome: Outcome
    effect: Effect | None = None
    p: float | None = None
    p_adjusted: float | None = None
    p_negligible: float | None = None
    p_negligible_adjusted: float | None = None
    level: float = ALPHA
    exploratory: bool = False
    by: Mapping[str, Estimate] = field(default_factory=dict)
    by_seed: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    complete: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    held_back: tuple[str, ...] = ()
    reason: str = ""
    runs: tuple[TrackedRun, ...] = ()
    commits: tuple[str, ...] = ()

    @property
    def detectable(self) -> float | None:
        """The smallest difference from the target that would be found in 80 % of such comparisons."""
        return None if self.effect is None else self.effect.detectable(self.level, self.claim.sesoi)


def assess(
    book: Book, tracked: Tracked, exploratory: bool = False, earlier: Mapping[str, Result] = MappingProxyType({})
) -> list[Result]:
    """Measure every claim, correct the p values over all claims of a role, and decide.

    Args:
        exploratory: whether there may be runs that do not test the claims as registered; this only marks the results.
        earlier: measurements of an earlier table, by claim; one counts if the tracked runs have fewer seeds.
    """
    measured = {}
    for claim in book.claims:
        try:
            result = _measure(claim, tracked, book.sweeps[claim.sweep].methods)
            fixed = len(book.seeds)
            if not exploratory and result.effect is not None and result.effect.seeds < fixed:
                note = f"{result.effect.seeds} of the {fixed} seeds fixed beforehand"
                result = replace(result, notes=(*result.notes, note))
        except DnpoError as error:
            result = Result(claim, "not measured", reason=str(error))
        if claim.id in earlier and len(earlier[claim.id].complete) > len(result.complete):
            result = earlier[claim.id]
        measured[claim.id] = replace(result, exploratory=exploratory)
    decided: dict[str, Result] = {}
    for role in ROLES:
        decided |= decide_role(role, [measured[claim.id] for claim in book.by_role(role)])
    return [_with_gates(decided[claim.id], decided) for claim in book.claims]


def decide_role(role: Role, results: Sequence[Result]) -> dict[str, Result]:
    """Decide the claims of a role, without those that their outcomes depend on."""
    if not results:
        return {}
    level = strictest(role, len(results))
    tested = [_test(replace(result, level=level)) for result in results]
    if role == "check":
        return {
            r.claim.id: r if r.effect is None else replace(r, outcome=check(r.effect, r.claim.region)) for r in tested
        }
    found = correct([1.0 if r.p is None else r.p for r in tested], role)
    negligible = correct([1.0 if r.p_negligible is None else r.p_negligible for r in tested], role)
    decided = {}
    for result, p, p_negligible in zip(tested, found, negligible, strict=True):
        claim, effect = result.claim, result.effect
        if effect is not None:
            result = replace(
                result,
                outcome=decide(
                    effect, claim.region, claim.band, p, p_negligible, (result.p_negligible or 1.0) <= level
                ),
                p_adjusted=p,
                p_negligible_adjusted=None if claim.band is None else p_negligible,
            )
        decided[claim.id] = result
    return decided


def _test(result: Result) -> Result:
    """Add the p values of a measured claim."""
    claim, effect = result.claim, result.effect
    if effect is None:
        return result
    band = claim.band
    return replace(result, p=effect.p(claim.region), p_negligible=None if band is None else effect.p(band))


def _with_gates(result: Result, decided: Mapping[str, Result]) -> Result:
    """Keep a claim from being supported while its positive control, or the claim that it comes after, is not."""
    claim = result.claim
    if result.outcome != "supported":
        return result
    for name, other in (("positive control", claim.control), ("gate", claim.after)):
        if other and _with_gates(decided[other], decided).outcome != "supported":
            note = f"not supported, because its {name} {other} is {_with_gates(decided[other], decided).outcome}"
            return replace(result, outcome="undecided", held_back=(note,))
    return result


def _measure(claim: Claim, tracked: Tracked, methods: bool) -> Result:
    """Measure one claim, without the correction over all claims.

    Args:
        methods: whether its arms may differ in all settings of methods.

    Raises:
        DataError: it cannot be measured; the message gives the reason.
    """
    tracked_seeds = tracked.seeds(claim.sweep)
    lacking = {seed: missing for seed in tracked_seeds if (missing := tracked.missing(claim, seed))}
    seeds = [seed for seed in tracked_seeds if seed not in lacking]
    complete = tuple(seeds)
    if not seeds:
        why = tracked.absent.get(claim.sweep, "") or _lacking(claim.sweep, lacking, tracked.unfinished[claim.sweep])
        if (refused := tracked.refused.get(claim.sweep, "")) and not lacking:
            raise DataError(f"sweep {claim.sweep}: left out: {refused}; exploratory=true shows them")
        raise DataError(f"{why}; run dnpo claims run=true, or dnpo sweep {claim.sweep}")
    notes = [f"seed {seed} is left out: it has no finished {', '.join(lacking[seed])}" for seed in lacking]
    if claim.premise:
        seeds, note = _with_premise(claim, claim.premise, tracked, seeds)
        notes.append(note)
    needed = [(arm, _find_policy(claim, tracked, arm, s, k)) for s in seeds for arm, k in list_needed_policies(claim)]
    runs = tuple({policy.run.id: policy.run for _, policy in needed}.values())
    if methods:
        arms = {policy.run.id: arm for arm, policy in needed}
        notes += refuse_unlike(runs, lambda run: arms[run.id])
    else:
        notes += refuse_mixture(runs, differing_starts=True, matters=claim.matters)
    a, b = claim.sides
    values = sample(claim, tracked, seeds, a, b)
    effect = estimate_effect(values)
    return Result(
        claim,
        "undecided",
        effect,
        by=_by_iteration(claim, tracked, seeds),
        by_seed=dict(zip(seeds, values.means(), strict=True)),
        complete=complete,
        notes=(*notes, *effect.notes),
        runs=runs,
    )


def _lacking(sweep: str, lacking: Mapping[int, Sequence[str]], unfinished: int) -> str:
    """Say why no seed of a sweep is complete."""
    short = f" ({unfinished} of its runs did not finish)" if unfinished else ""
    if not lacking:
        return f"sweep {sweep} has no finished run{short}"
    seed, missing = next(iter(lacking.items()))
    return f"sweep {sweep} is complete for no seed{short}: seed {seed} has no finished {', '.join(missing)}"


def _with_premise(claim: Claim, premise: Premise, tracked: Tracked, seeds: Sequence[int]) -> tuple[list[int], str]:
    """The seeds for which the premise holds, and a note on their number."""
    iteration = claim.sides[0][0].iterations[-1]
    valid = []
    for seed in seeds:
        policy = tracked.policy(claim.sweep, premise.runs, seed, iteration)
        value = None if policy is None else policy.row.get(premise.metric)
        if value is not None and value >= premise.least:
            valid.append(seed)
    note = (
        f"premise ({premise.metric} ≥ {premise.least:g} in {premise.runs}) held for {len(valid)} of {len(seeds)} seeds"
    )
    if not valid:
        raise DataError(f"the {note}, so the claim does not apply")
    return valid, note


def _find_policy(claim: Claim, tracked: Tracked, arm: str, seed: int, iteration: int | str) -> TrackedPolicy:
    policy = tracked.policy(claim.sweep, arm, seed, iteration)
    if policy is None:
        raise DataError(f"sweep {claim.sweep}, seed {seed}: no finished {arm}@{iteration}")
    return policy


def sample(claim: Claim, tracked: Tracked, seeds: Sequence[int], a: Sequence[Term], b: Sequence[Term]) -> Sample:
    """Both sides of a claim for every seed, in its unit.

    Raises:
        DataError: the runs were measured on different prompts, or a measure is missing.
    """
    sides = [_sides(claim, tracked, seed, a, b) for seed in seeds]
    by_item = isinstance(sides[0][0], dict)
    names = sorted(sides[0][0]) if isinstance(sides[0][0], dict) else [""]
    matrices = []
    for side in (0, 1):
        rows = []
        for values in (pair[side] for pair in sides):
            as_dict = values if isinstance(values, dict) else {"": values}
            if as_dict.keys() != set(names):
                raise DataError("its runs were not measured on the same held-out prompts")
            rows.append([claim.times * as_dict[name] for name in names])
        matrices.append(np.asarray(rows, float))
    steps = 0
    if not by_item and claim.ends is not None:
        policies = [_find_policy(claim, tracked, t.arm, seed, k) for seed in seeds for t in a for k in t.iterations]
        steps = sum(len(policy.steps) for policy in policies)
    return Sample(matrices[0], matrices[1], by_item, claim.ends, steps)


def _sides(claim: Claim, tracked: Tracked, seed: int, a: Sequence[Term], b: Sequence[Term]) -> tuple[Values, Values]:
    """The values of a and b for one seed."""
    if claim.measure in BETWEEN:
        of, function, _ = BETWEEN[claim.measure]
        values = [
            function(
                getattr(_find_policy(claim, tracked, a[0].arm, seed, ours), of),
                getattr(_find_policy(claim, tracked, b[0].arm, seed, theirs), of),
                **claim.arguments,
            )
            for ours, theirs in zip(a[0].iterations, b[0].iterations, strict=True)
        ]
        first = _combine(values, 1 / len(values))
        return first, _combine([first], 0.0)

    def total(side: Sequence[Term]) -> Values:
        means = []
        for term in side:
            values = [tracked.value(claim, term.arm, seed, k) for k in term.iterations]
            means.append(_combine(values, 1 / len(values)))
        return _combine(means, 1.0)

    ours = total(a)
    return ours, total(b) if b else _combine([ours], 0.0)


def _combine(values: Sequence[Values], times: float) -> Values:
    """The sum of several values, times a number; values by prompt are added prompt by prompt."""
    if all(isinstance(value, dict) for value in values):
        rows = [value for value in values if isinstance(value, dict)]
        if any(row.keys() != rows[0].keys() for row in rows):
            raise DataError("its runs were not measured on the same held-out prompts")
        return {name: times * sum(row[name] for row in rows) for name in rows[0]}
    return times * sum(value for value in values if isinstance(value, float | int))


def _by_iteration(claim: Claim, tracked: Tracked, seeds: Sequence[int]) -> dict[str, Estimate]:
    """The effect at each iteration, without a test."""
    a, b = claim.sides
    if len(a) != 1 or len(b) > 1 or len(a[0].iterations) < 2 or (b and b[0].iterations != a[0].iterations):
        return {}
    effects = {}
    for k in a[0].iterations:
        ours, theirs = [Term(a[0].arm, (k,))], [Term(term.arm, (k,)) for term in b]
        effects[str(k)] = estimate_effect(sample(claim, tracked, seeds, ours, theirs)).estimate
    return effects
