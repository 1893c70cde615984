"""Tables of the claims' results: Markdown and LaTeX with rounded numbers, CSV and JSON with exact ones.

Primary claims, secondary claims and checks have separate tables, and are numbered as in the file.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from analysis import floats
from analysis.claims_assess import Result
from analysis.claims_book import Claim
from analysis.claims_earlier import keep
from analysis.claims_rules import ROLES, Role, count_outcomes, rule
from dnpo.escape import for_csv, for_latex, for_markdown
from dnpo.stats.table import stack, tabular, wrapped
from dnpo.wording import decimals, fixed, interval, ranges

RELATIONS = {"greater": ">", "less": "<", "at_least": "≥", "at_most": "≤"}
COLUMNS = (
    *("", "claim", "from", "measured", "claimed", "SESOI", "effect (95 %)", "p (adjusted)", "p negligible (adjusted)"),
    *("seeds × items", "detectable", "outcome"),
)
TEXTS = ("", "claim", "from", "measured")  # the other columns are aligned to the right
EMPTY_OF_CHECKS = ("SESOI", "p (adjusted)", "p negligible (adjusted)", "detectable")
BRIEF = ("", "claim", "claimed", "effect (95 %)", "p (adjusted)", "outcome")
HEADINGS: dict[Role, str] = {"primary": "Primary", "secondary": "Secondary", "check": "Checks"}
TITLES: dict[Role, str] = {"primary": "Primary claims", "secondary": "Secondary claims", "check": "Checks"}
# In LaTeX
WRAPPED = {"claim": 0.2, "from": 0.16, "measured": 0.15, "outcome": 0.11}  # shares of the text's width
MOST_ROWS = 8  # rows of a table that fit on a page


def as_dict(result: Result) -> dict[str, Any]:
    """A result as plain values; the effect and its interval are in the claim's unit."""
    claim, effect = result.claim, result.effect
    row = claim.model_dump(mode="json")
    row |= {"outcome": result.outcome, "exploratory": result.exploratory, "effect": None, "low": None, "high": None}
    row |= {"p": result.p, "p_adjusted": result.p_adjusted, "p_negligible": result.p_negligible}
    row |= {"p_negligible_adjusted": result.p_negligible_adjusted, "level": result.level}
    row |= {"detectable": result.detectable, "seeds": 0, "items": None, "by_iteration": {}}
    row |= {"notes": [*result.notes, *result.held_back], "reason": result.reason}
    if effect is not None:
        row |= {
            "effect": effect.estimate.value,
            "low": effect.estimate.low,
            "high": effect.estimate.high,
            "seeds": effect.seeds,
            "items": effect.items,
        }
        row["by_iteration"] = {k: {"value": e.value, "low": e.low, "high": e.high} for k, e in result.by.items()}
    return row


def as_json(results: Sequence[Result], about: Mapping[str, Any]) -> str:
    """The rule, ``about`` and every result, as JSON, also with what a later table needs of them."""
    rows = [as_dict(result) | keep(result) for result in results]
    tree = {"rule": rule(_roles(results)), **about, "claims": rows}
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


def seeds_to_csv(results: Sequence[Result]) -> str:
    """The means of both sides and their difference for each seed of each claim, in the claim's unit."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["id", "role", "sweep", "unit", "seed", "a", "b", "effect"])
    for result in results:
        claim = result.claim
        about = [for_csv(text) for text in (claim.id, claim.role, claim.sweep, claim.unit)]
        for seed, (a, b) in result.by_seed.items():
            writer.writerow([*about, seed, *(f"{value:.6g}" for value in (a, b, a - b))])
    return out.getvalue()


def lines(results: Sequence[Result]) -> dict[Role, list[tuple[str, ...]]]:
    """The cells of the full tables, a line for each claim, by role."""
    numbered = [(result.claim.role, (str(number), *_line(result))) for number, result in enumerate(results, 1)]
    by_role: dict[Role, list[tuple[str, ...]]] = {role: [line for r, line in numbered if r == role] for role in ROLES}
    return {role: found for role, found in by_role.items() if found}


def columns_of(role: Role, wanted: Sequence[str] = COLUMNS) -> list[str]:
    """The columns of a role's table, of those that are wanted; checks have no p."""
    return [name for name in wanted if role != "check" or name not in EMPTY_OF_CHECKS]


def _roles(results: Sequence[Result]) -> list[Role]:
    return [result.claim.role for result in results]


def _line(result: Result) -> tuple[str, ...]:
    claim, effect = result.claim, result.effect
    source = f"{claim.paper}, {claim.where}"
    sesoi = f"{claim.sesoi:g}" if claim.sesoi else ""
    if effect is None:
        return (claim.text, source, claim.measured, format_claim(claim), sesoi, "", "", "", "", "", result.outcome)
    size = str(effect.seeds) + (f" × {effect.items}" if effect.items is not None else "")
    detectable = "" if result.detectable is None else _size(result.detectable, claim)
    return (
        claim.text,
        source,
        claim.measured,
        format_claim(claim),
        sesoi,
        format_effect(result),
        _format_ps(result.p, result.p_adjusted),
        _format_ps(result.p_negligible, result.p_negligible_adjusted),
        size,
        detectable,
        format_outcome(result),
    )


def _format_ps(p: float | None, adjusted: float | None) -> str:
    return "" if p is None or adjusted is None else f"{p_text(p)} ({p_text(adjusted)})"


def format_effect(result: Result, unit: bool = True) -> str:
    """The effect with its interval and, if asked for, its unit; differences have a sign."""
    if result.effect is None:
        return ""
    found = result.effect.estimate
    text = interval(found.value, found.low, found.high, result.claim.digits, signed=bool(result.claim.b))
    return f"{text} {result.claim.unit}" if unit else text


def format_half(result: Result) -> str:
    """Half of the width of the effect's interval; "" if there is none."""
    half = None if result.effect is None else result.effect.estimate.half
    return "" if half is None else _size(half, result.claim)


def _size(value: float, claim: Claim) -> str:
    return fixed(value, decimals(value, claim.digits))


def format_outcome(result: Result) -> str:
    """The outcome, marked if it is exploratory."""
    return result.outcome + (" (exploratory)" if result.exploratory else "")


def format_claim(claim: Claim) -> str:
    """The region of the effect according to the claim, such as ``≥ 0 (margin 1)``."""
    target, margin = f"{claim.target:g}".replace("-", "−"), f"{claim.margin:g}"
    if claim.relation == "within":
        return f"{target} ± {margin}"
    slack = {"at_least": f" (margin {margin})", "at_most": f" (margin {margin})"}
    return f"{RELATIONS[claim.relation]} {target}{slack.get(claim.relation, '')}"


def p_text(p: float) -> str:
    """Format a p value as papers do."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.0995 else f"{p:.2f}"


def remarks(results: Sequence[Result]) -> list[str]:
    """Reasons, notes and caveats, each once, with the numbers of the claims that it concerns."""
    found = []
    for place, result in enumerate(results, 1):
        texts = (
            [f"not measured: {result.reason}"]
            if result.reason
            else [*result.notes, *result.held_back, result.claim.caveat]
        )
        found += [(place, text) for text in texts if text]
    return remarks_by_text(found)


def remarks_by_text(found: Sequence[tuple[int, str]], prefix: str = "") -> list[str]:
    """Remarks, each once, with the numbers of the claims that it concerns."""
    by_text: dict[str, list[int]] = {}
    for place, text in found:
        by_text.setdefault(text, []).append(place)
    return [f"{ranges(places)}: {prefix}{text}." for text, places in by_text.items()]


def caption(results: Sequence[Result], about: str) -> list[str]:
    """The counts of outcomes, the runs that were read, and the rule."""
    return [f"{count_outcomes([r.outcome for r in results]).capitalize()}. {about}", rule(_roles(results))]


def markdown(results: Sequence[Result], about: str) -> str:
    """The tables in GitHub's Markdown, their caption, and the remarks."""
    tables = _markdown_tables(lines(results), COLUMNS)
    items = [f"- {for_markdown(remark)}" for remark in remarks(results)]
    return "\n\n".join([*tables, *map(for_markdown, caption(results, about)), "\n".join(items)]) + "\n"


def _markdown_tables(by_role: Mapping[Role, Sequence[tuple[str, ...]]], wanted: Sequence[str]) -> list[str]:
    tables = []
    for role, found in by_role.items():
        columns = columns_of(role, wanted)
        rows = [columns, ["---" if name in TEXTS else "---:" for name in columns]]
        rows += [[for_markdown(line[COLUMNS.index(name)]) for name in columns] for line in found]
        tables += [f"**{HEADINGS[role]}**", "\n".join(f"| {' | '.join(row)} |" for row in rows)]
    return tables


def brief(results: Sequence[Result], about: str) -> str:
    """The tables without sources and sizes, and with caveats as their only remarks, for docs/results.md.

    A claim's measure is given only if several claims have the same text.
    """
    often = Counter(result.claim.text for result in results)
    by_role = {
        role: [
            (number, f"{text} ({measured})" if often[text] > 1 else text, source, measured, *rest)
            for number, text, source, measured, *rest in found
        ]
        for role, found in lines(results).items()
    }
    numbered = [(place, result.claim.caveat) for place, result in enumerate(results, 1) if result.claim.caveat]
    caveats = [f"- {for_markdown(caveat)}" for caveat in remarks_by_text(numbered)]
    head = "What the measures count, and their limits, by the number of the claim:"
    limits = [head, "\n".join(caveats)] if caveats else []
    return "\n\n".join([*_markdown_tables(by_role, BRIEF), *limits, for_markdown(caption(results, about)[0])]) + "\n"


def latex(results: Sequence[Result], about: str) -> str:
    """LaTeX floats, some for each role, with the rule and the remarks as text below."""
    counts, ruled = caption(results, about)
    floated: list[str] = []
    for role, found in lines(results).items():
        columns = columns_of(role)
        kinds = "".join(wrapped(WRAPPED[name]) if name in WRAPPED else "l" for name in columns)
        parts = [found[start : start + MOST_ROWS] for start in range(0, len(found), MOST_ROWS)]
        for number, part in enumerate(parts, 1):
            name = f"claims_{role}" + (f"_{number}" if number > 1 else "")
            title = TITLES[role] + (f", part {number} of {len(parts)}" if len(parts) > 1 else "")
            cells = [[for_latex(line[COLUMNS.index(column)]) for column in columns] for line in part]
            written = tabular(kinds, [stack(column, "l") for column in columns], cells)
            floated.append(floats.table(name, title, "" if floated else counts, written, []))
    text = "\n\n".join(map(for_latex, [ruled, *remarks(results)]))
    return "".join([*floated, f"{{\\footnotesize\n{text}\n\n}}\n"])
