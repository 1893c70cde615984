"""Choose and draw the pictures that the page shows."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dnpo.catalogue import metric
from dnpo.palette import Look
from dnpo.report import figures
from dnpo.report.comparison import DISTANCES, FLIPS, MEASURES, Items, ReportMeasure, mean_of
from dnpo.report.drawing import describe_movement
from dnpo.report.figures import Line, Picture
from dnpo.report.groups import Group, Groups
from dnpo.report.response import find_responses
from dnpo.stats.intervals import Estimate
from dnpo.tracking.reading import SFT, TrackedRun, iteration_name

OVER_ITERATIONS, OVER_SETTINGS = "Over iterations", "Over settings"
STEPS = (
    *("loss/policy", "loss/noise", "margin/saturation"),
    *("rollout/reward", "rollout/kl", "rollout/entropy", "rollout/flips", "rollout/stale", "rollout/age"),
    *("ratio/clipped", "ratio/kl", "value/explained"),
)


def pictures(groups: Groups, looks: Mapping[str, Look], items: Items, single: bool) -> list[tuple[str, list[Picture]]]:
    """Draw the figures, by heading.

    Args:
        looks: looks of the groups to be drawn, by label.
        single: whether the page describes one run; then every policy's histogram is shown.
    """
    shown = [group for group in groups.groups if group.label in looks]
    sections = [
        (
            OVER_ITERATIONS,
            [p for m in (*MEASURES, *DISTANCES, FLIPS) if (p := _over_iterations(shown, groups, looks, m, items))],
        ),
        (
            OVER_SETTINGS,
            [] if single else [figures.response(r) for m in MEASURES for r in find_responses(groups, m, items)],
        ),
        ("Over training steps", [] if groups.branching else _over_steps(shown, looks)),
        ("Log-probabilities of responses", _histograms(shown, single)),
    ]
    return [(heading, some) for heading, some in sections if some]


def find_analysis_pictures(own: TrackedRun | None) -> list[Picture]:
    """Return the pictures that ``python -m analysis`` has tracked with the sweep."""
    folder = own.artifact("analysis") if own is not None else None
    paths = sorted(Path(folder).rglob("*.png")) if folder is not None and folder.is_dir() else []
    return [picture for path in paths if (picture := figures.png(path)) is not None]


def _over_iterations(
    shown: Sequence[Group], groups: Groups, looks: Mapping[str, Look], measure: ReportMeasure, items: Items
) -> Picture | None:
    lines = [Line(looks[group.label], _points(group, groups, measure, items)) for group in shown]
    lines = [line for line in lines if line.points]
    nothing = measure is FLIPS and not any(estimate.value for line in lines for _, estimate in line.points)
    if not lines or nothing:
        return None
    human = [
        value
        for group in shown
        for iteration in groups.iterations
        for value in group.values(iteration, "eval/score_human")
    ]
    return figures.over_iterations(
        measure.metric,
        lines,
        caption=_bars(shown, measure, items),
        human=sum(human) / len(human) if human and measure.metric.name == "eval/score" else None,
        joined=not groups.branching,
    )


def _points(group: Group, groups: Groups, measure: ReportMeasure, items: Items) -> list[tuple[float, Estimate]]:
    points = []
    for iteration in groups.iterations:
        estimate = mean_of(group, iteration, measure, items) if group.values(iteration, measure.metric.name) else None
        if estimate is not None:
            points.append((-1.0 if iteration == SFT else float(iteration), estimate))
    return points


def _bars(shown: Sequence[Group], measure: ReportMeasure, items: Items) -> str:
    """Return what the bars of a picture show."""
    member = next((member for group in shown for member in group.members if member.rows), None)
    by_item = member is not None and bool(items.of(member.run, member.rows[-1]["iteration"], measure))
    seeds = any(len(group.seeds) > 1 for group in shown)
    over = [*(["held-out prompts"] if by_item else []), *(["seeds"] if seeds else [])]
    return f"Bars: 95 % intervals over {' and '.join(over)}." if over else "One seed: no intervals."


def _over_steps(shown: Sequence[Group], looks: Mapping[str, Look]) -> list[Picture]:
    found = {}
    for name in STEPS:
        histories = {
            looks[group.label]: [run for m in group.members if (run := m.run.over_steps(name))] for group in shown
        }
        found[name] = {look: runs for look, runs in histories.items() if runs}
    steps = [step for histories in found.values() for runs in histories.values() for run in runs for step, _ in run]
    breaks = _breaks(shown)
    return [
        figures.over_steps(metric(name), histories, breaks, (min(steps), max(steps)))
        for name, histories in found.items()
        if histories
    ]


def _breaks(shown: Sequence[Group]) -> list[int]:
    """Return the steps at which iterations after the first begin, in the run with the most iterations."""
    longest: list[int] = []
    for group in shown:
        for member in group.members[:1]:
            names = [iteration_name(row["iteration"]) for row in member.rows if row["iteration"] != SFT]
            paths = [path for name in names if (path := member.run.artifact(f"steps/{name}.json")) is not None]
            lengths = [len(json.loads(path.read_text())) for path in paths]
            longest = max(longest, [sum(lengths[:end]) for end in range(1, len(lengths))], key=len)
    return longest


def _histograms(shown: Sequence[Group], single: bool) -> list[Picture]:
    """Draw the histograms of every policy of a run, or of each group's last policy with the first seed in a sweep."""
    result = []
    for group in shown:
        first = [member for member in group.members if member.run.seed == group.seeds[0]]
        for member in first[-1:]:  # of branches the longest
            for row in member.rows if single else member.rows[-1:]:
                where = "after fine-tuning" if row["iteration"] == SFT else f"after iteration {row['iteration']}"
                whose = "Responses" if single else f"{group.label}, seed {member.run.seed}: responses"
                path = member.run.artifact(f"logprobs/{iteration_name(row['iteration'])}.npz")
                if path is not None:
                    result.append(figures.histogram(path, f"{whose} under the policy {where}", _distance(row)))
    return result


def _distance(row: Mapping[str, Any]) -> str:
    words = describe_movement(row)
    return words and f"{words}."
