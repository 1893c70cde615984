"""Tables of the claims' results: Markdown and LaTeX with rounded numbers, CSV and JSON with exact ones."""

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from analysis.claims_assess import Result
from analysis.claims_book import Claim
from analysis.claims_rules import count_outcomes, rule
from dnpo.escape import for_csv, for_latex, for_markdown
from dnpo.stats.intervals import Estimate

RELATIONS = {"greater": ">", "less": "<", "at_least": "≥", "at_most": "≤"}
COLUMNS = ("", "claim", "from", "measured", "claimed", "effect (95 %)", "p", "seeds × items", "detectable", "outcome")


def as_dict(result: Result) -> dict[str, Any]:
    """A result as plain values; the effect and its interval are in the claim's unit."""
    claim, effect = result.claim, result.effect
    row = claim.model_dump(mode="json")
    row |= {"outcome": result.outcome, "effect": None, "low": None, "high": None, "p": None, "p_holm": result.p_holm}
    row |= {"detectable": None, "seeds": 0, "items": None, "by_iteration": {}, "notes": list(result.notes)}
    row |= {"reason": result.reason}
    if effect is not None:
        row |= {
            "effect": effect.estimate.value,
            "low": effect.estimate.low,
            "high": effect.estimate.high,
            "p": effect.p,
        }
        row |= {"detectable": effect.detectable, "seeds": effect.seeds, "items": effect.items}
        row["by_iteration"] = {k: {"value": e.value, "low": e.low, "high": e.high} for k, e in result.by.items()}
    return row


def as_json(results: Sequence[Result], about: Mapping[str, Any]) -> str:
    """The rule, ``about`` and every result, as JSON."""
    rows = [as_dict(result) for result in results]
    tree = {"rule": rule(len(results)), **about, "claims": rows}
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def to_csv(results: Sequence[Result]) -> str:
    """One line for each claim; nested values as JSON."""
    rows = [as_dict(result) for result in results]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        nested = {k: json.dumps(v, ensure_ascii=False) for k, v in row.items() if isinstance(v, dict | list)}
        writer.writerow({name: for_csv(value) for name, value in (row | nested).items()})
    return out.getvalue()


def lines(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The cells of the full table, a line for each claim."""
    return [(str(number), *_line(result)) for number, result in enumerate(results, 1)]


def _line(result: Result) -> tuple[str, ...]:
    claim, effect = result.claim, result.effect
    source = f"{claim.paper}, {claim.where}"
    if effect is None:
        return (claim.text, source, claim.measured, format_claim(claim), "", "", "", "", "not measured")
    size = str(effect.seeds) + (f" × {effect.items}" if effect.items is not None else "")
    detectable = "" if effect.detectable is None else number(effect.detectable, claim.digits)
    p = "" if result.p_holm is None else p_text(result.p_holm)
    return (
        claim.text,
        source,
        claim.measured,
        format_claim(claim),
        format_effect(result),
        p,
        size,
        detectable,
        result.outcome,
    )


def format_effect(result: Result) -> str:
    """The effect with its interval and unit; differences have a sign."""
    if result.effect is None:
        return ""
    signed = bool(result.claim.b)
    return f"{interval(result.effect.estimate, result.claim.digits, signed)} {result.claim.unit}"


def format_claim(claim: Claim) -> str:
    """The region of the effect according to the claim, such as ``≥ 0 (margin 1)``."""
    target, margin = f"{claim.target:g}".replace("-", "−"), f"{claim.margin:g}"
    if claim.relation == "within":
        return f"{target} ± {margin}"
    slack = {"at_least": f" (margin {margin})", "at_most": f" (margin {margin})"}
    return f"{RELATIONS[claim.relation]} {target}{slack.get(claim.relation, '')}"


def interval(estimate: Estimate, digits: int, signed: bool) -> str:
    """Format a value with the ends of its interval."""
    value = number(estimate.value, digits, signed)
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} ({number(estimate.low, digits, signed)} to {number(estimate.high, digits, signed)})"


def number(value: float, digits: int, signed: bool = False) -> str:
    """Format a number with ``digits`` decimals; a number that rounds to zero has no minus sign."""
    return format(value, f"{'+' if signed else ''}z.{digits}f").replace("-", "−")


def p_text(p: float) -> str:
    """Format a p value as papers do."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.0995 else f"{p:.2f}"


def remarks(results: Sequence[Result]) -> list[str]:
    """Reasons, notes and caveats, each once, with the numbers of the claims that it concerns."""
    by_text: dict[str, list[int]] = {}
    for place, result in enumerate(results, 1):
        texts = [f"not measured: {result.reason}"] if result.reason else [*result.notes, result.claim.caveat]
        for text in filter(None, texts):
            by_text.setdefault(text, []).append(place)
    return [f"{ranges(places)}: {text}." for text, places in by_text.items()]


def ranges(places: Sequence[int]) -> str:
    """Format numbers with ranges: 1, 2, 3, 5 as ``1-3, 5``."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def caption(results: Sequence[Result], about: str) -> list[str]:
    """The counts of outcomes, the runs that were read, and the rule."""
    return [f"{count_outcomes([r.outcome for r in results]).capitalize()}. {about}", rule(len(results))]


def markdown(results: Sequence[Result], about: str) -> str:
    """The table in GitHub's Markdown, its caption, and the remarks."""
    rows = [COLUMNS, tuple("---" if c in ("", "claim", "from", "measured") else "---:" for c in COLUMNS)]
    head = [f"| {' | '.join(row)} |" for row in rows]
    body = [f"| {' | '.join(for_markdown(cell) for cell in row)} |" for row in lines(results)]
    items = [f"- {for_markdown(remark)}" for remark in remarks(results)]
    return (
        "\n\n".join(["\n".join([*head, *body]), *map(for_markdown, caption(results, about)), "\n".join(items)]) + "\n"
    )


def brief(results: Sequence[Result], about: str) -> str:
    """The table without sources, sizes and remarks, for docs/results.md.

    A claim's measure is given only if several claims have the same text.
    """
    wanted = ("", "claim", "claimed", "effect (95 %)", "p", "outcome")
    places = [COLUMNS.index(column) for column in wanted]
    often = Counter(result.claim.text for result in results)
    rows = [wanted, tuple("---" if column in ("", "claim") else "---:" for column in wanted)]
    for result, line in zip(results, lines(results), strict=True):
        text = result.claim.text
        claim = f"{text} ({result.claim.measured})" if often[text] > 1 else text
        cells = [claim if COLUMNS[place] == "claim" else line[place] for place in places]
        rows.append(tuple(map(for_markdown, cells)))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\n{for_markdown(caption(results, about)[0])}\n"


def latex(results: Sequence[Result], about: str) -> str:
    """A LaTeX tabular that needs no package, with its caption and remarks as comments; text columns are wrapped."""
    widths = {"claim": "p{0.24\\textwidth}", "from": "p{0.08\\textwidth}", "measured": "p{0.22\\textwidth}"}
    kinds = "".join(widths.get(column, "l") for column in COLUMNS)
    rows = [" & ".join(for_latex(cell) for cell in row) + r" \\" for row in [COLUMNS, *lines(results)]]
    comments = [f"% {line}" for line in [*caption(results, about), *remarks(results)]]
    begin, end = f"\\begin{{tabular}}{{{kinds}}}", r"\end{tabular}"
    return "\n".join([*comments, begin, r"\hline", rows[0], r"\hline", *rows[1:], r"\hline", end, ""])
