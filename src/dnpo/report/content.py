"""Gather the content of the page from tracked runs."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from dnpo.palette import SERIES, choose_looks
from dnpo.report import figures, labels, origins, outcome
from dnpo.report.comparison import DISTANCES, MEASURES, Items, MeasureComparison, compare
from dnpo.report.figures import Picture
from dnpo.report.groups import Group, Groups, Member, describe_state, group_runs, is_complete, iteration_title, rows_of
from dnpo.report.markdown import render
from dnpo.report.page import day, strip_secrets
from dnpo.report.pictures import OVER_ITERATIONS, OVER_SETTINGS, find_analysis_pictures, pictures
from dnpo.report.selection import Selection
from dnpo.tracking.reading import SWEEP, TrackedRun
from dnpo.tracking.sqlite import SQLITE, file_of
from dnpo.wording import plural

CLAIM = (
    *("role", "text", "where", "measured", "outcome", "exploratory"),
    *("effect", "low", "high", "digits", "b", "notes"),
)
LOOKS = {"supported": "good", "as expected": "good", "contradicted": "bad", "not as expected": "bad"}


def content(selection: Selection, uri: str) -> dict[str, Any]:
    """Return what the template shows.

    Args:
        uri: address of the tracking store, shown on the page.
    """
    runs, sweep, items = selection.runs, selection.sweep, Items()
    groups = group_runs(runs) if sweep else _group_alone(runs[0])
    measures = (*MEASURES, *DISTANCES) if sweep else ()
    compared = [comparison for m in measures if (comparison := compare(groups, m, items)) is not None]
    shown = choose_looks({group.label: group.options for group in groups.groups[: len(SERIES)]})
    lineage = origins.lineage(runs, selection.own if sweep else None)
    claims, why = _claims(selection.own) if sweep else ([], "")
    drawn = pictures(groups, shown, items, not sweep)
    member = groups.groups[0].members[0] if groups.groups else None
    alone = None if sweep else member
    return {
        "sweep": sweep,
        "name": _title(selection, groups),
        "called": selection.name,
        "state": _state(selection, groups),
        "facts": _facts(selection, groups, lineage),
        "outcome": outcome.of_sweep(groups, compared) if sweep else outcome.of_run(member, items) if member else [],
        "first": outcome.rank(groups, compared) if sweep else None,
        "lead": _lead(groups, compared, drawn, sweep),
        "parts": [
            *([each for each in (selection.left_out, why) if each] if sweep else _list_caveats(runs[0])),
            *outcome.warnings(groups, sweep),
        ],
        "missing": groups.missing,
        "tiles": outcome.tiles(alone, items) if alone else [],
        "groups": groups,
        "settings": origins.settings(runs, groups),
        "notes": _notes(selection),
        "claims": claims,
        "looks": shown if len(shown) > 1 else {},
        "undrawn": len(groups.groups) - len(shown),
        "pictures": drawn,
        "brought": find_analysis_pictures(selection.own) if sweep else [],
        "brief": outcome.brief(alone) if alone else None,
        "tables": outcome.tables(alone) if alone else [],
        "compared": compared,
        "everything": outcome.everything(groups),
        "examples": labels.examples(groups, not sweep),
        "samples": labels.samples(alone.run) if alone else [],
        "judges": labels.judges(groups, items),
        "costs": origins.costs(runs),
        "lineage": lineage,
        "uri": _name_store(uri),
        "written": day(1000 * time.time()),
    }


def _name_store(uri: str) -> str:
    """Return the address of the tracking store for a page that others may read: of an absolute path only the file."""
    file = file_of(uri)
    return strip_secrets(uri) if file is None or not file.is_absolute() else f"{SQLITE}…/{file.name}"


def _title(selection: Selection, groups: Groups) -> str:
    """Return the title of the page: what varies in a sweep, or a run's method and seed."""
    if not selection.sweep:
        run = selection.runs[0]
        method = run.option("method")
        return f"{method}, seed {run.tags.get('dnpo.seed', '?')}" if method else run.name
    count = len(groups.groups)
    varies = ", ".join(groups.varies)
    return f"{selection.name}: {plural(count, 'setting')} of {varies}" if varies and count > 1 else selection.name


def _lead(
    groups: Groups, compared: Sequence[MeasureComparison], drawn: Sequence[tuple[str, list[Picture]]], sweep: bool
) -> Picture | None:
    """Return the figure that the page begins with: a measure over one setting, all settings, or a run's iterations."""
    by_heading = dict(drawn)
    ranking = outcome.rank(groups, compared) if sweep else None
    if ranking is not None and OVER_SETTINGS not in by_heading and len(groups.groups) > len(SERIES):
        return figures.by_settings(ranking)
    some = by_heading.get(OVER_SETTINGS) or by_heading.get(OVER_ITERATIONS)
    return some[0] if some else None


def _group_alone(run: TrackedRun) -> Groups:
    """Make groups of a single run, finished or not."""
    return Groups((Group(run.option("method") or run.name, (Member(run, rows_of(run)),)),), (), False)


def _state(selection: Selection, groups: Groups) -> tuple[str, str]:
    """Return ``good`` or ``bad``, and the state in words."""
    if not selection.sweep:
        run = selection.runs[0]
        return ("good" if is_complete(run) else "bad"), describe_state(run)
    done = sum(len(group.members) for group in groups.groups)
    if groups.missing:
        return "bad", f"{done} of {plural(len(selection.runs), 'run')} used; not complete, see below"
    return "good", f"{plural(done, 'run')} finished"


def _list_caveats(run: TrackedRun) -> list[str]:
    """List what a reader needs to know about a run that is incomplete or has no scores."""
    rows = rows_of(run)
    if not is_complete(run):
        reached = f"policies: {', '.join(iteration_title(row['iteration']) for row in rows)}" if rows else "no policy"
        return [f"This run has no summary, so the page shows what it tracked before it ended ({reached})."]
    if not any("eval/score" in row for row in rows):
        return ["No judge scored the answers of this run: there are no scores to show."]
    return []


def _notes(selection: Selection) -> list[Markup]:
    """Return the note of the run or sweep in MLflow, if there is one."""
    chosen = selection.own or selection.runs[0]
    text = chosen.tags.get("mlflow.note.content", "").strip()
    return [render(text)] if text else []


def _facts(selection: Selection, groups: Groups, lineage: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the facts under the heading: what was run, when, from which code."""
    runs = selection.runs
    seeds = sorted({run.seed for run in runs})
    first = runs[0]
    if selection.sweep:
        facts = [("settings compared", str(len(groups.groups)))]
        facts.append(("varies", ", ".join(groups.varies) or "nothing but the seed"))
    else:
        facts = [("method", first.option("method") or "not known")]
        facts += [("part of sweep", first.tags[SWEEP])] if SWEEP in first.tags else []
    commits = [commit[:10] + ("+" if commit.endswith("+") else "") for commit in lineage["commits"]]
    return [
        *facts,
        ("seeds" if len(seeds) > 1 else "seed", ", ".join(map(str, seeds))),
        ("iterations", ", ".join(sorted({run.params.get("iterations", "?") for run in runs}))),
        ("data", ", ".join(sorted({run.option("data") or "?" for run in runs}))),
        ("begun", day(first.started)),
        ("commit", ", ".join(dict.fromkeys(commits))),
    ]


def _claims(own: TrackedRun | None) -> tuple[list[dict[str, Any]], str]:
    """Return the claim table that was tracked with the sweep, or what is wrong with it; neither if there is none."""
    path = own.artifact("analysis/claims.json") if own is not None else None
    if path is None:
        return [], ""
    try:
        rows = [{name: row.get(name) for name in CLAIM} for row in json.loads(path.read_text())["claims"]]
    except (ValueError, AttributeError, TypeError, KeyError):
        return [], "analysis/claims.json has no list of claims"
    for row in rows:
        row["look"] = LOOKS.get(str(row["outcome"]), "open")
        notes = row["notes"] or ""
        row["notes"] = "; ".join(map(str, notes)) if isinstance(notes, list) else notes
    return rows, ""
