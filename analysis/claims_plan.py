"""Plan the runs for a file of claims: what its seeds can find, and how many seeds and prompts each claim needs.

    python -m analysis.claims_plan                          # variances from all runs tracked in ./mlflow.db
    python -m analysis.claims_plan seeds=0,1,2,3,4          # from these, the pilot
    python -m analysis.claims_plan effect=2                 # how many seeds and prompts find 2 units

The pilot gives the variances of seeds, of prompts and of the rest (``dnpo.stats.intervals.Components``), and nothing
else: its effects are not used. Every number is for the strictest level of the correction, which the smallest p of a
role must reach. If several claims of a role are true, they are found more often. Writes ``plan.md`` and ``plan.csv``.
"""

import argparse
import csv
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from analysis.claims_assess import Result, Tracked, assess
from analysis.claims_book import Book, Claim, read
from analysis.claims_forecast import PLAN
from analysis.claims_options import choose_seeds, execute, make_parser, pair_tags
from analysis.claims_registered import Registration
from analysis.claims_rules import POWER, strictest
from analysis.claims_tables import remarks_by_text
from analysis.keeping import make_folder, writing_to
from dnpo.errors import DnpoError, SettingsError
from dnpo.escape import for_csv, for_markdown, say, tell
from dnpo.stats.intervals import Components, Mean
from dnpo.tracking.reading import Database
from dnpo.wording import duration, fixed, plural, ranges

MOST_SEEDS, MOST_PROMPTS = 1_000, 1_000_000
COLUMNS = (
    *("", "claim", "role", "level", "unit", "sd of seeds", "sd of prompts", "sd of the rest", "detectable", "effect"),
    *("power, %", "power negligible, %", "seeds needed", "prompts needed", "time a seed", "time"),
)
TEXTS = ("", "claim", "role", "unit")


@dataclass(frozen=True)
class Plan:
    """What the runs of a claim can find.

    Attributes:
        level: of the test, the strictest one of the correction.
        seeds, prompts: planned numbers; prompts is None for a measure with one number for each seed.
        planned: the mean over these, with its expected error.
        effect: the effect that is asked for, by default the smallest effect of interest.
        seeds_needed: with the planned prompts; None if no number is enough.
        prompts_needed: with the planned seeds; None if no number is enough, or the measure has no prompts.
        seconds: computing time of the claim's runs of one seed; a run that several claims need counts for each.
    """

    claim: Claim
    level: float
    seeds: int
    prompts: int | None
    components: Components
    planned: Mean
    effect: float
    seeds_needed: int | None
    prompts_needed: int | None
    seconds: float

    @property
    def detectable(self) -> float:
        """The smallest effect that is found in 80 % of cases."""
        return self.planned.detectable(self.level, POWER, self.claim.sesoi)

    @property
    def power(self) -> float:
        """The probability that the effect is found."""
        return self.planned.power(self.effect, self.level, self.claim.sesoi)

    @property
    def power_negligible(self) -> float:
        """The probability that an effect of 0 is shown to be negligible."""
        return self.planned.power_of_equivalence(self.claim.sesoi or self.claim.margin, self.level)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return execute(parser(), _go, arguments)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    seeds = "seeds of the pilot, such as 0,1,2 (default: all that are tracked)"
    options = make_parser("analysis.claims_plan", "claims plan", "Which effects the planned seeds can find.", seeds)
    options.add_argument(
        "--effect",
        type=float,
        help="the effect to find, in each claim's unit (default: sesoi, its smallest effect of interest)",
    )
    options.set_defaults(exploratory=True)  # a pilot is exploratory
    return options


def _go(options: argparse.Namespace) -> int:
    book = read(options.claims)
    if options.effect is not None and not options.effect > 0:
        raise SettingsError(f"effect={options.effect:g}: expected a number above 0")
    seeds = choose_seeds(book, options)
    database = Database(options.uri, options.experiment)
    make_folder(options.out)  # refused before the runs are read
    results = assess(book, Tracked.of(book, database, pair_tags(options.tag), seeds), exploratory=True)
    plans, reasons = make(book, results, options.effect)
    if not plans:
        raise DnpoError("\n".join(["no claim has a pilot.", *reasons]))
    about = describe(book, plans, results)
    registration = Registration.of(book.path)
    registered = "" if registration.problem else registration.commit
    with writing_to(options.out):
        (options.out / "plan.md").write_text(markdown(book, plans, [*about, *reasons]), encoding="utf-8")
        (options.out / PLAN).write_text(to_csv(plans, registered, pilot_seeds(results)), encoding="utf-8")
    for plan in plans:
        tell(sentence(plan))
    tell("\n" + "\n".join([*reasons, *about]))
    say(f"results     {options.out}")
    return 0


def make(book: Book, results: Sequence[Result], effect: float | None = None) -> tuple[list[Plan], list[str]]:
    """Plan all claims that have a pilot; also return why the others have none."""
    plans, reasons = [], []
    for place, result in enumerate(results, 1):
        claim, found = result.claim, result.effect
        if claim.role == "check":
            continue
        if found is None or found.components is None:
            reasons.append((place, result.reason or "a pilot needs two seeds or more"))
        elif found.components == Components(0.0, 0.0, 0.0):
            reasons.append((place, "nothing varies in the pilot"))
        else:
            level = strictest(claim.role, len(book.by_role(claim.role)))
            runs = {seed: [run.seconds or 0.0 for run in result.runs if run.seed == seed] for seed in _seeds(result)}
            seconds = sum(map(sum, runs.values())) / len(runs)
            wanted = effect or claim.sesoi or claim.margin
            plans.append(plan(claim, found.components, level, len(book.seeds), found.items, wanted, seconds))
    return plans, remarks_by_text(reasons, "without a pilot: ")


def plan(
    claim: Claim,
    components: Components,
    level: float,
    seeds: int,
    prompts: int | None,
    effect: float,
    seconds: float = 0.0,
) -> Plan:
    """Plan one claim from the variances of a pilot."""
    items = prompts or 1

    def finds(mean: Mean) -> bool:
        return mean.power(effect, level, claim.sesoi) >= POWER

    by_seeds = _least(lambda count: finds(components.mean(count, items)), 2, MOST_SEEDS)
    by_prompts = None
    if prompts is not None:
        by_prompts = _least(lambda count: finds(components.mean(seeds, count)), 2, MOST_PROMPTS)
    planned = components.mean(seeds, items)
    return Plan(claim, level, seeds, prompts, components, planned, effect, by_seeds, by_prompts, seconds)


def _least(enough: Callable[[int], bool], low: int, most: int) -> int | None:
    """The least number that is enough, to the step of the search; None if none is found.

    More is not always better: an effect below the smallest effect of interest is found with some number, and called
    negligible with a larger one. So numbers are tried in steps of a tenth, and the last step is bisected.
    """
    high = low
    while not enough(high):
        if high == most:
            return None
        low, high = high + 1, min(high + max(1, high // 10), most)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high


def describe(book: Book, plans: Sequence[Plan], results: Sequence[Result]) -> list[str]:
    """Sentences on the meaning of the numbers, and on how exactly the pilot determines them."""
    from scipy.stats import chi2

    pilot = pilot_seeds(results)
    runs = {run.id: run for result in results for run in result.runs}
    seconds = sum(run.seconds or 0.0 for run in runs.values()) / len(pilot)
    low, high = ((len(pilot) - 1) / chi2.ppf(share, len(pilot) - 1) for share in (0.975, 0.025))
    fixed = len(book.seeds)
    said = [
        f"Planned: {plural(fixed, 'seed')} ({ranges(book.seeds)}), with the prompts of the pilot. Detectable: the "
        f"effect that is found in {round(100 * POWER)} % of cases at the strictest level of the correction. Power "
        "negligible: the probability that an effect of 0 is shown to be negligible.",
        f"Pilot: {plural(len(runs), 'run')} of seeds {ranges(pilot)}. A variance between {plural(len(pilot), 'seed')} "
        f"is known only roughly: the true one is between {low:.2f} and {high:.1f} times it, with 95 % confidence.",
        f"Time of all {plural(fixed, 'seed')}, by the pilot's runs: {duration(seconds * fixed)}; each run is counted "
        "once here. Shared stages make it shorter; parallel jobs on the same cores make each run longer.",
    ]
    if reused := set(pilot) & set(book.seeds):
        said.append(f"Seeds {ranges(sorted(reused))} of the pilot are fixed for the claims: these runs are no pilot.")
    return said


def sentence(plan: Plan) -> str:
    """A plan in a line."""
    claim, size = plan.claim, plural(plan.seeds, "seed")
    size += f" × {plural(plan.prompts, 'prompt')}" if plan.prompts else ""
    return (
        f"{claim.role:9} {claim.id:34} {size} detect {fixed(plan.detectable, claim.digits + 1)} {claim.unit}; "
        f"{plan.effect:g} {claim.unit} need {_count(plan.seeds_needed, 'seed', MOST_SEEDS)}"
        + (f" or {_count(plan.prompts_needed, 'prompt', MOST_PROMPTS)}" if plan.prompts is not None else "")
        + f"; {duration(plan.seconds)} a seed"
    )


def _count(needed: int | None, noun: str, most: int) -> str:
    return f"over {most:,} {noun}s" if needed is None else plural(needed, noun)


def lines(book: Book, plans: Sequence[Plan]) -> list[tuple[str, ...]]:
    """The cells of the table, a line for each claim, with its number in the file."""
    places = {claim.id: place for place, claim in enumerate(book.claims, 1)}
    rows = []
    for each in plans:
        digits = each.claim.digits + 1
        variances = (each.components.seeds, each.components.items, each.components.rest)
        prompts = "" if each.prompts is None else _count(each.prompts_needed, "prompt", MOST_PROMPTS)
        rows.append(
            (
                *(str(places[each.claim.id]), each.claim.id, each.claim.role, f"{each.level:.3g}", each.claim.unit),
                *(fixed(variance**0.5, digits) for variance in variances),
                *(fixed(each.detectable, digits), f"{each.effect:g}"),
                fixed(100 * each.power, 0),
                fixed(100 * each.power_negligible, 0),
                *(_count(each.seeds_needed, "seed", MOST_SEEDS), prompts),
                *(duration(each.seconds), duration(each.seconds * each.seeds)),
            )
        )
    return rows


def markdown(book: Book, plans: Sequence[Plan], about: Sequence[str]) -> str:
    """The table in GitHub's Markdown, with its explanations."""
    rows = [COLUMNS, tuple("---" if name in TEXTS else "---:" for name in COLUMNS)]
    rows += [tuple(map(for_markdown, line)) for line in lines(book, plans)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n\n".join([table, *map(for_markdown, about)]) + "\n"


def to_csv(plans: Sequence[Plan], registered: str, pilot: Sequence[int]) -> str:
    """One line for each claim, with exact numbers.

    Args:
        registered: the commit that registers the claims; "" if there is none.
        pilot: the seeds of the pilot.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    variances = ("variance_seeds", "variance_prompts", "variance_rest")
    powers = ("detectable", "effect", "power", "power_negligible", "seeds_needed", "prompts_needed")
    origin = ("seconds_per_seed", "registered", "pilot")
    writer.writerow(["id", "role", "unit", "level", "seeds", "prompts", *variances, *powers, *origin])
    for each in plans:
        parts = each.components
        numbers = (each.level, each.seeds, each.prompts, parts.seeds, parts.items, parts.rest, each.detectable)
        needed = (each.effect, each.power, each.power_negligible, each.seeds_needed, each.prompts_needed, each.seconds)
        writer.writerow(
            [for_csv(text) for text in (each.claim.id, each.claim.role, each.claim.unit)]
            + [*numbers, *needed, registered, " ".join(map(str, pilot))]
        )
    return out.getvalue()


def pilot_seeds(results: Sequence[Result]) -> list[int]:
    """The seeds of all runs that the results are from."""
    return sorted({seed for result in results for seed in _seeds(result)})


def _seeds(result: Result) -> list[int]:
    return sorted({run.seed for run in result.runs})


if __name__ == "__main__":
    sys.exit(main())
