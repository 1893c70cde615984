"""Relate the results of a sweep to a setting with several numeric values, such as ``npo.alpha``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dnpo.report.comparison import Items, ReportMeasure, mean_of
from dnpo.report.groups import Group, Groups
from dnpo.settings import CONTENTS
from dnpo.stats.intervals import Estimate
from dnpo.tracking.neutral import find_neutral

FEWEST = 3  # values that a setting needs for a curve


@dataclass(frozen=True)
class Response:
    """A measure of the last policies as a function of one setting.

    Attributes:
        setting: its dotted name.
        lines: for each combination of the other settings that vary, the values of this setting, sorted, with the
            estimates. If no combination has two values, as in a random search, all points are in one line.
        options: the options of dsl and npo of each line.
        joined: whether lines join the points.
    """

    setting: str
    measure: ReportMeasure
    lines: Mapping[str, Sequence[tuple[float, Estimate]]]
    options: Mapping[str, tuple[str, str]]
    joined: bool


def find_responses(groups: Groups, measure: ReportMeasure, items: Items) -> list[Response]:
    """Return the measure over every setting that has at least three numeric values in the sweep."""
    found = []
    varying = _list_varying(groups)
    for name in varying:
        numbers = {group.label: _number(group, name) for group in groups.groups}
        known = [number for number in numbers.values() if number is not None]
        if len(set(known)) < FEWEST:
            continue
        others = [other for other in varying if other != name]
        lines: dict[str, list[tuple[float, Estimate]]] = {}
        options: dict[str, tuple[str, str]] = {}
        for group in groups.groups:
            number, estimate = numbers[group.label], _last(group, groups, measure, items)
            if number is not None and estimate is not None:
                line = " · ".join(f"{other}={_value(group, other)}" for other in others)
                lines.setdefault(line, []).append((number, estimate))
                options.setdefault(line, group.options)
        joined = any(len(points) > 1 for points in lines.values())
        if lines and not joined:
            lines = {"": [point for points in lines.values() for point in points]}
            options = {"": next(iter(options.values()))}
        if lines:
            ordered = {line: sorted(points, key=lambda point: point[0]) for line, points in lines.items()}
            found.append(Response(name, measure, ordered, options, joined))
    return found


def _list_varying(groups: Groups) -> list[str]:
    """Return the settings that distinguish groups, and those with a different number in each group, as in a search."""
    params = {name for group in groups.groups for name in group.members[0].run.params}
    neutral = {name for group in groups.groups for name in find_neutral(group.members[0].run.params)}
    aside = {*groups.varies, *neutral, "seed"}
    searched = [
        name
        for name in sorted(params - aside)
        if not name.endswith((".seed", f".{CONTENTS}"))
        and None not in (numbers := {_number(group, name) for group in groups.groups})
        and len(numbers) == len(groups.groups)
    ]
    return [*groups.varies, *searched] if len(groups.groups) >= FEWEST else list(groups.varies)


def _value(group: Group, name: str) -> str:
    run = group.members[0].run
    return run.option(name) or run.params.get(name, "")


def _number(group: Group, name: str) -> float | None:
    try:
        return float(_value(group, name))
    except ValueError:
        return None


def _last(group: Group, groups: Groups, measure: ReportMeasure, items: Items) -> Estimate | None:
    """Return a group's mean after its last iteration that has the measure."""
    for iteration in reversed(groups.iterations):
        if group.values(iteration, measure.metric.name):
            return mean_of(group, iteration, measure, items)
    return None
