"""Show the results in sentences, in large numbers, and in tables of single runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dnpo import catalogue
from dnpo.report.comparison import FLIPS, MEASURES, Items, MeasureComparison, ReportMeasure, gain
from dnpo.report.groups import Group, Groups, Member, is_complete, iteration_title
from dnpo.report.page import format_value, number
from dnpo.stats.changes import LOSS, describe_changes
from dnpo.stats.intervals import Estimate
from dnpo.stats.overoptimised import describe_overoptimisation
from dnpo.tracking.reading import SFT
from dnpo.wording import duration

# The tables of one run.
QUALITY = (
    *("eval/score", "eval/score_greedy", "second/score", "eval/accuracy", "leaderboard/average", "eval/win"),
    *("eval/tie", "eval/lose", "eval/loss", "drift/kl", "drift/initial", "eval/tokens", "seconds"),
)
TRAINING = (
    *("pairs/pairs", "pairs/flips", "labels/noise", "logps/chosen", "logps/rejected", "logps/new", "stagnation/ks"),
    *("loss/policy", "loss/noise", "npo/variance", "margin/saturation"),
)
MOST_RANKED = 30  # rows of the first table
MOST_NAMED = 8  # groups whose numbers fit in a sentence


def of_run(member: Member, items: Items) -> list[str]:
    """Return the sentences of the run's end on the screen, and one for each measure that has no results by prompt."""
    rows = member.rows
    by_prompt = [m for m in MEASURES if m.kind and len(rows) > 1 and (found := gain(member, m, items)) and found[1]]
    results = {m.metric.name: [items.of(member.run, row["iteration"], m) for row in rows] for m in by_prompt}
    told = {*results, LOSS} if results else {}  # the held-out loss is told even without results by prompt
    others = [text for m in MEASURES if m.metric.name not in told and (text := _describe_gain(member, m, items))]
    return [*(describe_changes(rows, results) if results else []), *others]


def warnings(groups: Groups, sweep: bool) -> list[str]:
    """Return the warnings of over-optimisation: a run's own, or for each group of a sweep the seeds that have one."""
    found = []
    for group in groups.groups:
        warned = {
            m.run.seed: each
            for m in group.members
            if (each := is_complete(m.run) and m.run.summary.get("overoptimised"))
        }
        if warned and sweep:
            against = dict.fromkeys(catalogue.metric(name).title.lower() for each in warned.values() for name in each)
            score, *others = against
            found.append(
                f"Over-optimised? {group.label}, seeds {', '.join(map(str, sorted(warned)))} of "
                f"{len(group.members)}: the {score} rises, but by {' or '.join(others)} the policy gets worse. The "
                "figures of these measures over iterations show it."
            )
        elif warned:
            found += [describe_overoptimisation(each, "the figures over iterations") for each in warned.values()]
    return found


def _describe_gain(member: Member, measure: ReportMeasure, items: Items) -> str:
    metric, values = measure.metric, member.values_by_iteration(measure.metric.name)
    gained = gain(member, measure, items)
    if gained is None:
        return ""
    estimate, _ = gained
    first, last = (metric.format(value) for _, value in (values[0], values[-1]))
    change = metric.format(estimate.value, signed=True)
    return f"{metric.title}: from {first} to {last} {metric.unit}, {_ends(values)} ({change})."


def _ends(values: Sequence[tuple[int | str, float]]) -> str:
    names = ["fine-tuning" if iteration == SFT else f"iteration {iteration}" for iteration, _ in values]
    return f"{names[0]} to {names[-1]}"


def of_sweep(groups: Groups, compared: Sequence[MeasureComparison]) -> list[str]:
    """Return sentences with the first measure's numbers, and for each measure the differences from the baseline."""
    sentences = [_numbers(groups.groups, groups, compared[0].measure)] if compared else []
    sentences += [text for each in compared if (text := _describe_differences(each))]
    if groups.groups and len({seed for group in groups.groups for seed in group.seeds}) == 1:
        sentences.append("There is only one seed: the variation between repeated trainings is unknown.")
    return sentences


@dataclass(frozen=True)
class Ranking:
    """The settings of a sweep by one measure of their last policies, the best first.

    Attributes:
        rows: for each its label, the mean with its interval, the mean as text, and the difference from the baseline.
        more: number of settings that are not among the rows.
        significant: whether the difference of any setting, among the rows or not, is.
        tests: number of tests, over which p-values are corrected.
    """

    measure: ReportMeasure
    baseline: str
    rows: tuple[tuple[str, Estimate, str, str], ...]
    more: int
    significant: bool
    tests: int

    @property
    def sentence(self) -> str:
        """The best setting, its difference from the baseline, and whether that is significant."""
        label, _, mean, difference = self.rows[0]
        words = f"{self.measure.metric.title}, last policies: {label} is best with {mean} {self.measure.metric.unit}"
        words = words.rstrip()
        if difference:
            doubt = "" if difference.endswith("*") else ", not significant"
            return f"{words} ({difference.rstrip('*')} compared with {self.baseline}{doubt})."
        if self.differ and not self.significant:
            return f"{words}, but no difference is significant."
        return f"{words}."

    @property
    def differ(self) -> bool:
        """Whether any row has a difference from the baseline."""
        return any(difference for *_, difference in self.rows)


def rank(groups: Groups, compared: Sequence[MeasureComparison]) -> Ranking | None:
    """Order the settings by the first measure; None if there is none."""
    if not compared:
        return None
    each = compared[0]
    metric = each.measure.metric
    apart = {row.label: row.shown for row in each.differences.rows} if each.differences else {}
    columns = list(each.differences.columns) if each.differences else []
    rows = []
    for row in each.means.rows:
        measured = [(column, cell) for column, cell in zip(each.means.columns, row.shown, strict=True) if cell]
        if not measured:
            continue
        column, shown = measured[-1]
        differences = apart.get(row.label)
        difference = differences[columns.index(column)] if differences and column in columns else None
        rows.append((row.label, shown.cell.estimate, shown.text, difference.text if difference else ""))
    rows.sort(key=lambda entry: entry[1].value, reverse=metric.better == "higher")
    significant = any(difference.endswith("*") for *_, difference in rows)
    more, tests = max(len(rows) - MOST_RANKED, 0), each.differences.tests if each.differences else 0
    return Ranking(each.measure, each.baseline, tuple(rows[:MOST_RANKED]), more, significant, tests)


def _numbers(shown: Sequence[Group], groups: Groups, measure: ReportMeasure) -> str:
    """Return a sentence with each group's mean over seeds, before and after."""
    metric, parts = measure.metric, []
    for group in shown[:MOST_NAMED]:
        means = [sum(v) / len(v) for iteration in groups.iterations if (v := group.values(iteration, metric.name))]
        ends = [metric.format(mean) for mean in (means[:1] + means[-1:] if len(means) > 1 else means)]
        parts.append(f"{group.label} {' to '.join(ends)}")
    more = f"; and {len(shown) - MOST_NAMED} more" if len(shown) > MOST_NAMED else ""
    over = "first and last iteration" if groups.branching else "first and last policy"
    return f"{metric.axis}, {over}: {'; '.join(parts)}{more}."


def _describe_differences(each: MeasureComparison) -> str:
    if each.differences is None or not each.differences.tests:
        return ""
    starred = [
        f"{row.label} at {column} ({shown.text.rstrip('*')})"
        for row in each.differences.rows
        for column, shown in zip(each.differences.columns, row.shown, strict=True)
        if shown is not None and shown.star
    ]
    tests = each.differences.tests
    corrected = f"after Holm's correction over {tests} tests" if tests > 1 else "by a single test"
    what = (
        f"different from {each.baseline}: {'; '.join(starred)}" if starred else f"nothing differs from {each.baseline}"
    )
    return f"{each.measure.metric.title}: {corrected} {what}."


def tiles(member: Member, items: Items) -> list[dict[str, str]]:
    """Return the last policy's numbers for the large tiles."""
    result = []
    for measure in (*MEASURES, FLIPS):
        metric, values = measure.metric, member.values_by_iteration(measure.metric.name)
        if not values:
            continue
        gained = gain(member, measure, items)
        before = f"from {metric.format(values[0][1])}" if len(values) > 1 else ""
        change = f" ({metric.format(gained[0].value, signed=True)})" if gained else ""
        value = metric.format(values[-1][1])
        result.append({"title": metric.title, "value": value, "unit": metric.unit, "change": before + change})
    if member.run.seconds is not None:
        result.append({"title": "Time of the run", "value": duration(member.run.seconds), "unit": "", "change": ""})
    return result


RunTable = tuple[str, list[str], list[tuple[str, list[str]]]]  # heading, columns, and rows with their labels


def brief(member: Member) -> RunTable | None:
    """Return the table of the metrics by which runs are compared, one row per policy; None if it has none."""
    return _table("", member, catalogue.COMPARED)


def tables(member: Member) -> list[RunTable]:
    """Return a run's tables, one row per policy."""
    result = [
        _table("How good the policies are", member, QUALITY),
        _table("What they were trained on, and how", member, TRAINING),
    ]
    return [each for each in result if each is not None]


def _table(heading: str, member: Member, candidates: Sequence[str]) -> RunTable | None:
    names = [name for name in candidates if any(isinstance(row.get(name), int | float) for row in member.rows)]
    columns = [catalogue.metric(name) for name in names]
    rows = [
        (iteration_title(row["iteration"]), [format_value(row.get(column.name), column) for column in columns])
        for row in member.rows
    ]
    return (heading, [column.heading for column in columns], rows) if columns else None


def everything(groups: Groups) -> list[dict[str, Any]]:
    """Return every metric of every policy, one table per run."""
    result = []
    for group in groups.groups:
        for member in group.members:
            numbers = {n for row in member.rows for n, v in row.items() if isinstance(v, int | float)} - {"iteration"}
            rows = [(name, [number(row.get(name), ".4g") for row in member.rows]) for name in sorted(numbers)]
            iterations = [iteration_title(row["iteration"]) for row in member.rows]
            result.append({"label": f"{group.label}, seed {member.run.seed}", "iterations": iterations, "rows": rows})
    return result
