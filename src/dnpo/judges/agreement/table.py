"""Show a judge's agreement with people: as a table on the screen, in Markdown, and as metrics."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from dnpo.catalogue import Metric, metric
from dnpo.escape import for_markdown
from dnpo.screen import ScreenTable

ON_MAP = (55, 65, 75, 85, 95, 100)  # accuracies of the judges in the sweep judge_accuracy, in percent
ROUNDING = 1e-9


class MeasureLine(NamedTuple):
    """A measure, and a note that says what to compare it with."""

    name: str
    note: str = ""

    @property
    def metric(self) -> Metric:
        """Its entry in the catalogue."""
        return metric(f"agreement/{self.name}")


LINES = (
    MeasureLine("accuracy", "chance 50 %"),
    MeasureLine("accuracy_strict"),
    MeasureLine("accuracy_three_way"),
    MeasureLine("ties_judge"),
    MeasureLine("ties_people"),
    MeasureLine("kappa", "chance 0"),
    MeasureLine("kappa_persons", "two persons: next line"),
    MeasureLine("kappa_between_persons"),
    MeasureLine("fleiss_persons"),
    MeasureLine("fleiss_with_judge", "without the judge: line above"),
    MeasureLine("flips", "ideally 0 %"),
    MeasureLine("reversals", "ideally 0 %"),
    MeasureLine("longer_judge", "people: next line"),
    MeasureLine("longer_people"),
    MeasureLine("length_bias", "no bias: 0"),
    MeasureLine("accuracy_longer", "chance 50 %"),
    MeasureLine("accuracy_shorter", "chance 50 %"),
    MeasureLine("multiples_of_5", f"by chance {2100 / 101:.0f} %"),
    MeasureLine("multiples_of_10", f"by chance {1100 / 101:.0f} %"),
    MeasureLine("entropy", f"at most log2(101) = {math.log2(101):.2f}"),
    MeasureLine("distinct"),
)


def format_value(value: float | None, metric: Metric) -> str:
    """Format a number; – if there is none."""
    return "–" if value is None else metric.format_with_unit(value, signed=metric.unit == "pp")


def cells(report: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """The rows of the table: measure, value, interval, number of rows, and a note, or why there is no interval."""
    rows = []
    for line in LINES:
        estimate = report["measures"].get(line.name)
        if estimate is None or estimate["value"] is None:
            continue
        between = ""
        if estimate["low"] is not None:
            low, high = (format_value(estimate[end], line.metric) for end in ("low", "high"))
            unit = low.rpartition(" ")[1] and f" {low.rpartition(' ')[2]}"
            between = f"{low.removesuffix(unit)} to {high}" if unit else f"{low} to {high}"
        count = f"{estimate['rows']:,}" if estimate["rows"] else "–"
        value = format_value(estimate["value"], line.metric)
        rows.append((line.metric.title, value, between, count, estimate["reason"] or line.note))
    return rows


def title(report: Mapping[str, Any]) -> str:
    """The judge and the rows, as a title."""
    return f"{report['judge']} against people, {report['data']}"


def notes(report: Mapping[str, Any]) -> list[str]:
    """The lines below the table."""
    labels, verdicts = (
        ", ".join(f"{count:,} × {name}" for name, count in report[whose].items()) for whose in ("labels", "verdicts")
    )
    intervals = "Intervals: 95 %, bootstrap over rows; Wilson's for shares of 0 and 100 %."
    lines = [f"People say {labels}; the judge {verdicts}. {intervals}"]
    if report["unscored"]:
        reasons = "; ".join(f"{count:,} × {reason}" for reason, count in report["reasons"].items())
        lines.append(f"Left out, without a verdict: {report['unscored']:,} of {report['rows']:,} rows ({reasons}).")
    lines += _undefined(report["measures"])
    place = _place_on_map(report["measures"])
    return [*lines, place] if place else lines


def _undefined(measures: Mapping[str, Any]) -> list[str]:
    """A line for each reason, with the measures that have no value for it."""
    by_reason: dict[str, list[str]] = {}
    for line in LINES:
        estimate = measures.get(line.name)
        if estimate is not None and estimate["value"] is None:
            by_reason.setdefault(estimate["reason"], []).append(line.metric.title)
    return [f"Not measured: {'; '.join(titles)} ({reason})." for reason, titles in by_reason.items()]


def _place_on_map(measures: Mapping[str, Any]) -> str:
    """Where the judge lies on the map of judges with known faults (fig15), in its terms; "" without an interval."""
    accuracy, bias = measures["accuracy"], measures.get("length_bias", {})
    if accuracy["low"] is None:
        return ""
    of = metric("agreement/accuracy")
    value, low, high = (of.format(accuracy[end]) for end in ("value", "low", "high"))
    chance = ", which includes chance" if accuracy["low"] <= 0.5 <= accuracy["high"] else ""
    line = "Read the curve of random errors, since it is not certain that this judge prefers a length"
    if bias.get("low") is not None and (bias["low"] > 0 or bias["high"] < 0):
        apart = metric("agreement/length_bias").format_with_unit(bias["value"], signed=True)
        longer = f"it prefers longer responses more often than people do ({apart})"
        shorter = f"it prefers shorter responses more often than people do ({apart}), and the map has no such judges"
        line = (
            f"Read the curve of a preference for length: {longer}" if bias["low"] > 0 else f"No curve fits: {shorter}"
        )
    return (
        "How good must a judge be? The map of `dnpo figures fig15` (docs/judges.md) has the gain of labels by a judge "
        f"over labels by origin. On its axis this judge has accuracy {value} % ({low} to {high}){chance}: "
        f"{_between(accuracy['low'], accuracy['high'])}. {line}. The dashed line shows how often labels "
        "by origin are right."
    )


def _between(low: float, high: float) -> str:
    """The judges of the map that an interval of accuracy lies between."""
    below = [share for share in ON_MAP if share <= 100 * low + ROUNDING]
    above = [share for share in ON_MAP if share >= 100 * high - ROUNDING]
    if not below:
        return f"at most as good as the map's judge of {above[0]} %"
    if below[-1] == above[0]:
        return f"at the map's judge of {above[0]} %"
    return f"between the map's judges of {below[-1]} % and {above[0]} %"


HEADINGS = ("measure", "value", "95 % interval", "rows", "compare with")


def table(report: Mapping[str, Any]) -> ScreenTable:
    """Build the table for the console."""
    view = ScreenTable(title=title(report), title_justify="left", header_style="bold", pad_edge=False, box=None)
    for heading in HEADINGS:
        right = heading in ("value", "95 % interval", "rows")
        view.add_column(heading, justify="right" if right else "left", no_wrap=right)
    for row in cells(report):
        view.add_row(*row)
    return view


def markdown(report: Mapping[str, Any]) -> str:
    """Write the table as a page of Markdown."""
    lines = [
        f"# {for_markdown(title(report))}",
        "",
        f"| {' | '.join(HEADINGS)} |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    lines += [f"| {' | '.join(map(for_markdown, row))} |" for row in cells(report)]
    return "\n".join([*lines, "", *map(for_markdown, notes(report)), "", "![The same as a figure](agreement.png)", ""])


def numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """The metrics to track: every defined measure, with the ends of its interval."""
    counts = {"agreement/rows": float(report["rows"]), "agreement/unscored": float(report["unscored"])}
    for name, estimate in report["measures"].items():
        for end, suffix in (("value", ""), ("low", "_low"), ("high", "_high")):
            if estimate[end] is not None:
                counts[f"agreement/{name}{suffix}"] = estimate[end]
    return counts
