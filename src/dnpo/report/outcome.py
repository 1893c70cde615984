"""What came out: in sentences, in large numbers, and in the tables of single runs."""

from collections.abc import Sequence
from typing import Any

from dnpo.report.comparison import FLIPS, MEASURES, Compared, Items, Measure, gain
from dnpo.report.groups import Group, Groups, Member, iteration_title
from dnpo.report.page import duration, number
from dnpo.tracking.reading import SFT

# The tables of one run: metric, heading, form, scale.
QUALITY = (
    ("eval/score", "score", ".1f", 1.0),
    ("eval/score_greedy", "greedy score", ".1f", 1.0),
    ("second/score", "second judge", ".1f", 1.0),
    ("eval/accuracy", "accuracy, %", ".1f", 100.0),
    ("leaderboard/average", "leaderboard, %", ".1f", 100.0),
    ("eval/win", "win, %", ".1f", 100.0),
    ("eval/tie", "tie, %", ".1f", 100.0),
    ("eval/lose", "lose, %", ".1f", 100.0),
    ("eval/loss", "held-out loss", ".3f", 1.0),
    ("eval/tokens", "tokens", ".1f", 1.0),
    ("seconds", "seconds", ".1f", 1.0),
)
TRAINING = (
    ("pairs/pairs", "pairs", ",.0f", 1.0),
    ("pairs/flips", "flips, %", ".1f", 100.0),
    ("labels/noise", "wrong labels, %", ".1f", 100.0),
    ("logps/chosen", "log p chosen", ".1f", 1.0),
    ("logps/rejected", "rejected", ".1f", 1.0),
    ("logps/new", "new", ".1f", 1.0),
    ("stagnation/ks", "KS", ".3f", 1.0),
    ("loss/policy", "policy loss", ".3f", 1.0),
    ("loss/noise", "noise loss", ".3f", 1.0),
    ("npo/variance", "s²", ".3f", 1.0),
    ("margin/saturation", "σ(−margin)", ".2f", 1.0),
)
MOST_NAMED = 8  # groups whose numbers are said in a sentence


def of_run(member: Member, items: Items) -> list[str]:
    """A sentence a measure: before, after, and how sure the difference is."""
    return [text for measure in MEASURES if (text := _from_to(member, measure, items))]


def _from_to(member: Member, measure: Measure, items: Items) -> str:
    known = member.known(measure.metric)
    found = gain(member, measure, items)
    if found is None:
        return ""
    estimate, over = found
    form = f".{measure.digits}f"
    first, last = (number(value, form, measure.scale) for _, value in (known[0], known[-1]))
    change = number(estimate.value, f"+{form}", measure.scale)
    if estimate.low == estimate.high == 0:
        change += f", the same {over}"
    elif estimate.low is not None:
        low, high = (number(end, f"+{form}", measure.scale) for end in (estimate.low, estimate.high))
        change += f"; 95 % interval {low} to {high} {over}, which says nothing about training again"
    return f"{measure.title}: from {first} to {last} {measure.unit}, {_ends(known)} ({change})."


def _ends(known: Sequence[tuple[int | str, float]]) -> str:
    names = ["fine-tuning" if iteration == SFT else f"iteration {iteration}" for iteration, _ in known]
    return f"{names[0]} to {names[-1]}"


def of_sweep(groups: Groups, compared: Sequence[Compared]) -> list[str]:
    """The first measure's numbers, and for each what differs from the baseline."""
    found = [_numbers(groups.groups, groups, compared[0].measure)] if compared else []
    found += [text for each in compared if (text := _differing(each))]
    if groups.groups and len({seed for group in groups.groups for seed in group.seeds}) == 1:
        found.append("There is one seed only: nothing here says what training again would give.")
    return found


def _numbers(shown: Sequence[Group], groups: Groups, measure: Measure) -> str:
    """Mean over seeds before and after, by group."""
    form, parts = f".{measure.digits}f", []
    for group in shown[:MOST_NAMED]:
        means = [sum(v) / len(v) for iteration in groups.iterations if (v := group.values(iteration, measure.metric))]
        ends = [number(mean, form, measure.scale) for mean in (means[:1] + means[-1:] if len(means) > 1 else means)]
        parts.append(f"{group.label} {' to '.join(ends)}")
    more = f"; and {len(shown) - MOST_NAMED} more" if len(shown) > MOST_NAMED else ""
    over = "first and last iteration" if groups.branching else "first and last policy"
    return f"{measure.title}, {measure.unit}, {over}: {'; '.join(parts)}{more}."


def _differing(each: Compared) -> str:
    if each.differences is None or not each.differences.tests:
        return ""
    starred = [
        f"{row.label} at {column} ({shown.text.rstrip('*')})"
        for row in each.differences.rows
        for column, shown in zip(each.differences.columns, row.shown, strict=True)
        if shown is not None and shown.star
    ]
    tests = each.differences.tests
    corrected = f"after Holm's correction over {tests} tests" if tests > 1 else "by its one test"
    what = (
        f"different from {each.baseline}: {'; '.join(starred)}" if starred else f"nothing differs from {each.baseline}"
    )
    return f"{each.measure.title}: {corrected} {what}."


def tiles(member: Member, items: Items) -> list[dict[str, str]]:
    """The last policy's numbers, large."""
    found = []
    for measure in (*MEASURES, FLIPS):
        known = member.known(measure.metric)
        if not known:
            continue
        form = f".{measure.digits}f"
        gained = gain(member, measure, items)
        before = f"from {number(known[0][1], form, measure.scale)}" if len(known) > 1 else ""
        change = f" ({number(gained[0].value, f'+{form}', measure.scale)})" if gained else ""
        value = number(known[-1][1], form, measure.scale)
        found.append({"title": measure.title, "value": value, "unit": measure.unit, "change": before + change})
    if member.run.seconds is not None:
        found.append({"title": "Time of the run", "value": duration(member.run.seconds), "unit": "", "change": ""})
    return found


def tables(member: Member) -> list[tuple[str, list[str], list[tuple[str, list[str]]]]]:
    """A run's tables, a row a policy: heading, columns, and rows with their labels."""
    found = []
    for heading, candidates in (
        ("How good the policies are", QUALITY),
        ("What they were trained on, and how", TRAINING),
    ):
        columns = [c for c in candidates if any(isinstance(row.get(c[0]), int | float) for row in member.rows)]
        rows = [
            (
                iteration_title(row["iteration"]),
                [number(row.get(name), form, scale) for name, _, form, scale in columns],
            )
            for row in member.rows
        ]
        if columns:
            found.append((heading, [name for _, name, *_ in columns], rows))
    return found


def everything(groups: Groups) -> list[dict[str, Any]]:
    """Every metric of every policy: a table a run."""
    found = []
    for group in groups.groups:
        for member in group.members:
            numbers = {n for row in member.rows for n, v in row.items() if isinstance(v, int | float)} - {"iteration"}
            rows = [(name, [number(row.get(name), ".4g") for row in member.rows]) for name in sorted(numbers)]
            iterations = [iteration_title(row["iteration"]) for row in member.rows]
            found.append({"label": f"{group.label}, seed {member.run.seed}", "iterations": iterations, "rows": rows})
    return found
