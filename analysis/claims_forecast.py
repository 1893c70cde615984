"""The planner's forecast beside the actual runs: the ``plan.csv`` of ``dnpo claims plan``, joined with the results.

The planner says from the variances of a pilot which effect the planned seeds would find in 80 % of cases. The runs have
variances of their own, so afterwards it can be said how good the forecast was.
"""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.claims_assess import Result
from analysis.claims_book import Book, Claim
from analysis.claims_registered import SHORT, Registration
from analysis.claims_rules import POWER
from analysis.claims_tables import format_effect, format_half, format_outcome, remarks_by_text
from dnpo.errors import DataError
from dnpo.escape import for_csv, for_markdown
from dnpo.stats.intervals import Components, Mean
from dnpo.wording import fixed, plural, ranges

PLAN = "plan.csv"
CLOSE = 1.5  # a forecast within this factor of the actual value counts as good
COLUMNS = (
    *("", "claim", "role", "seeds × items", "unit", "forecast", "actual", "ratio", "half-width", "effect (95 %)"),
    *("power, %", "outcome"),
)
TEXTS = ("", "claim", "role", "unit")  # the other columns are aligned to the right
EXPLAINED = (
    f"Forecast: the smallest effect that is found (supported or contradicted) in {round(100 * POWER)} % of cases at "
    "the strictest level of the correction, by the variances of the pilot. Actual: the same, by the variances of "
    "the claim's own runs. Both can be far larger than the half-width of the interval, since an effect whose whole "
    "interval lies within the SESOI counts as negligible. Ratio: actual / forecast. Power: the forecast probability "
    "that an effect of the measured size is found."
)


@dataclass(frozen=True)
class Forecast:
    """What the planner says of a claim.

    Attributes:
        level: of the test, the strictest one of the correction.
        seeds, prompts: planned numbers; prompts is None for a measure with one number for each seed.
        planned: the mean over these, with its expected error.
        detectable: the smallest effect that is found in 80 % of cases, in the claim's unit.
    """

    level: float
    seeds: int
    prompts: int | None
    planned: Mean
    detectable: float


@dataclass(frozen=True)
class Forecasts:
    """The forecasts by claim, and the seeds of the pilot that they are from."""

    by_claim: Mapping[str, Forecast]
    pilot: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """A measured claim with its forecast.

    Attributes:
        place: its number in the file of claims.
    """

    place: int
    result: Result
    forecast: Forecast

    @property
    def as_planned(self) -> bool:
        """Whether the claim was measured on the planned numbers of seeds and prompts."""
        effect = self.result.effect
        return effect is not None and (effect.seeds, effect.items) == (self.forecast.seeds, self.forecast.prompts)

    @property
    def ratio(self) -> float | None:
        """The actual detectable effect, divided by the forecast one; None if nothing varies in the runs."""
        actual = self.result.detectable
        return None if actual is None else actual / self.forecast.detectable

    @property
    def power(self) -> float | None:
        """The forecast probability to find an effect of the measured size; None if the claim has no direction.

        A claim with a margin is tested against the margin, for which the planner forecasts nothing.
        """
        claim, effect = self.result.claim, self.result.effect
        if effect is None or claim.relation not in ("greater", "less"):
            return None
        size = effect.estimate.value - claim.target
        return self.forecast.planned.power(size, self.forecast.level, claim.sesoi)

    @property
    def found(self) -> bool:
        """Whether the test found an effect, in whichever direction, even if the claim waits for another one."""
        return self.result.outcome in ("supported", "contradicted") or bool(self.result.held_back)


def read(path: Path, book: Book, registration: Registration | None) -> Forecasts:
    """Read the planner's ``plan.csv``.

    Args:
        path: the file, or the folder with it.
        registration: how the claims are registered; None: the table is exploratory and takes any plan of its claims.

    Raises:
        DataError: it cannot be read, plans for other claims or seeds, or its pilot has seeds of the claims.
    """
    file = path / PLAN if path.is_dir() else path
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        forecasts = {row["id"]: _forecast(row) for row in rows}
        registered = sorted({row["registered"] for row in rows})
        pilot = tuple(sorted({int(seed) for row in rows for seed in row["pilot"].split()}))
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise DataError(f"forecast={file}: expected a plan.csv that dnpo claims plan wrote ({why})") from error
    if len(forecasts) < max(len(rows), 1):
        raise DataError(f"forecast={file}: expected a plan.csv with one line for each claim; it has {len(rows)} lines")
    again = "Plan again: dnpo claims plan"
    if registration is not None and registered != [registration.commit]:
        of = " and ".join(commit[:SHORT] or "none" for commit in registered)
        raise DataError(
            f"forecast={file}: it plans claims of commit {of}, not those of {registration.text}. {again}, or take it "
            "with exploratory=true, which marks the results"
        )
    tested = {claim.id for claim in book.claims if claim.role != "check"}
    if unknown := sorted(forecasts.keys() - tested):
        raise DataError(f"forecast={file}: {', '.join(unknown)}: no such claim is tested in {book.path.name}. {again}")
    if others := sorted(name for name, each in forecasts.items() if each.seeds != len(book.seeds)):
        raise DataError(
            f"forecast={file}: it plans {forecasts[others[0]].seeds} seeds for {', '.join(others)}, but "
            f"{book.path.name} fixes {len(book.seeds)}. {again}"
        )
    if registration is not None and (same := sorted(set(pilot) & set(book.seeds))):
        raise DataError(
            f"forecast={file}: its pilot has seeds {ranges(same)} of the claims, so it is no forecast. {again} "
            "seeds=…, with other seeds"
        )
    return Forecasts(forecasts, pilot)


def _forecast(row: Mapping[str, str]) -> Forecast:
    components = Components(*(float(row[f"variance_{of}"]) for of in ("seeds", "prompts", "rest")))
    seeds, prompts = int(row["seeds"]), int(row["prompts"]) if row["prompts"] else None
    planned = components.mean(seeds, prompts or 1)
    detectable = float(row["detectable"])
    if not (planned.error > 0 and detectable > 0):
        raise ValueError(f"claim {row['id']} has no variances there")
    return Forecast(float(row["level"]), seeds, prompts, planned, detectable)


def join(forecasts: Forecasts, results: Sequence[Result]) -> list[Row]:
    """The measured claims that have a forecast, numbered as in the file of claims."""
    return [
        Row(place, result, forecasts.by_claim[result.claim.id])
        for place, result in enumerate(results, 1)
        if result.effect is not None and result.claim.id in forecasts.by_claim
    ]


def describe(forecasts: Forecasts, rows: Sequence[Row], results: Sequence[Result]) -> list[str]:
    """What the columns mean, which claims are not counted and why, and at last how good the forecast was."""
    said = [f"{EXPLAINED} Pilot: seeds {ranges(forecasts.pilot)}."]
    notes = []
    for place, result in enumerate(results, 1):
        if result.claim.role != "check" and result.effect is not None and result.claim.id not in forecasts.by_claim:
            notes.append((place, "measured, without a forecast"))
        elif result.effect is None and result.claim.id in forecasts.by_claim:
            notes.append((place, "forecast, but not measured"))
    for row in rows:
        if not row.as_planned:
            of = size(row.forecast.seeds, row.forecast.prompts)
            notes.append(
                (
                    row.place,
                    f"not counted below, because it was planned for {of} and measured on other "
                    f"numbers of seeds or prompts",
                )
            )
        elif row.ratio is None:
            notes.append((row.place, "nothing varies in the runs, so no detectable effect can be computed"))
    return [*said, *remarks_by_text(notes), conclude(rows)]


def conclude(rows: Sequence[Row]) -> str:
    """How good the forecast was, over the claims that were measured on the planned numbers of seeds and prompts."""
    counted = [row for row in rows if row.as_planned]
    if not counted:
        return "No claim was measured on the planned numbers of seeds and prompts."
    said = []
    if ratios := [row.ratio for row in counted if row.ratio is not None]:
        close = sum(1 / CLOSE <= ratio <= CLOSE for ratio in ratios)
        said.append(
            f"The actual smallest effect is {statistics.median(ratios):.2f} times the forecast one (median of "
            f"{plural(len(ratios), 'claim')}); for {close} of {len(ratios)} the two differ by a factor of at most "
            f"{CLOSE:g}."
        )
    directed = [(row, row.power) for row in counted if row.power is not None]
    likely = [row.found for row, power in directed if power >= POWER]
    others = [row for row, power in directed if power < POWER]
    negligible = sum(row.result.outcome == "negligible" for row in others)
    said.append(
        f"For the effects that were measured, the forecast gave {len(likely)} of {plural(len(directed), 'claim')} "
        f"with a direction a power of {round(100 * POWER)} % or more, and {sum(likely)} of these {len(likely)} were "
        f"found (supported or contradicted). Of the other {len(others)}: found {sum(row.found for row in others)}, "
        f"negligible {negligible}."
    )
    return " ".join(said)


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The cells of the table, a line for each claim."""
    return [_line(row) for row in rows]


def _line(row: Row) -> tuple[str, ...]:
    claim, effect, actual = row.result.claim, row.result.effect, row.result.detectable
    assert effect is not None  # join() takes no others
    digits = claim.digits + 1
    return (
        *(str(row.place), claim.id, claim.role, size(effect.seeds, effect.items), claim.unit),
        fixed(row.forecast.detectable, digits),
        "" if actual is None else fixed(actual, digits),
        "" if row.ratio is None else f"{row.ratio:.2f}",
        format_half(row.result),
        format_effect(row.result, unit=False),
        "" if row.power is None else fixed(100 * row.power, 0),
        format_outcome(row.result),
    )


def size(seeds: int, items: int | None) -> str:
    """The numbers of seeds and of items, if there are any."""
    return f"{seeds}" if items is None else f"{seeds} × {items}"


def markdown(rows: Sequence[Row], about: Sequence[str]) -> str:
    """The table in GitHub's Markdown, with its explanations; :func:`conclude` is the last paragraph."""
    table = [COLUMNS, tuple("---" if name in TEXTS else "---:" for name in COLUMNS)]
    table += [tuple(map(for_markdown, line)) for line in lines(rows)]
    written = "\n".join(f"| {' | '.join(line)} |" for line in table)
    return "\n\n".join(["**The forecast beside the actual runs**", written, *map(for_markdown, about)]) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """One line for each claim, with exact numbers."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    planned = ("seeds_planned", "prompts_planned", "level", "forecast")
    actual = ("seeds", "items", "actual", "ratio", "half", "effect", "low", "high", "power", "found")
    writer.writerow(["id", "role", "unit", *planned, *actual, "outcome"])
    for row in rows:
        claim, effect, of = row.result.claim, row.result.effect, row.forecast
        assert effect is not None  # join() takes no others
        estimate = effect.estimate
        numbers = (of.seeds, of.prompts, of.level, of.detectable, effect.seeds, effect.items, row.result.detectable)
        ends = (row.ratio, estimate.half, estimate.value, estimate.low, estimate.high, row.power, int(row.found))
        writer.writerow([*map(for_csv, _words(claim)), *numbers, *ends, row.result.outcome])
    return out.getvalue()


def _words(claim: Claim) -> tuple[str, str, str]:
    return claim.id, claim.role, claim.unit
