"""A judge's agreement with people, as stages in the store.

A rerun reuses verdicts and measures, and later runs with the same judge show its agreement in their summaries.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dnpo.errors import StoreError
from dnpo.judges import Judge, tally
from dnpo.judges.agreement import compare, judge_both
from dnpo.judges.agreement.rows import Labelled, LabelledRow
from dnpo.judges.asked.ledger import Ledger
from dnpo.records import Verdict
from dnpo.settings import part_key
from dnpo.store import MANIFEST, Report, Stage, Store, manifest, write_json
from dnpo.tables import read, write

STAGE, VERSION = "agreement", 2
POINTS = "points.json"


def verdicts(judge: Judge, data: Labelled, rows: Sequence[LabelledRow], ledger: Ledger) -> Stage:
    """Lay out the stage that judges both responses of every row."""

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        found = judge_both(judge, rows, ledger, report)
        write(folder / "verdicts.parquet", found, Verdict)
        return tally(found)

    settings = {"judge": part_key(judge), "data": data.content()}
    return Stage("verdicts", "verdicts", 2, settings, {}, work)


def agreement(
    judge: Judge, data: Labelled, rows: Sequence[LabelledRow], verdicts: Stage, resamples: int, seed: int
) -> Stage:
    """Lay out the stage that compares the verdicts with people's; its facts are the measures."""

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        given = read(inputs["verdicts"] / "verdicts.parquet", Verdict)
        facts, points = compare(rows, given, pairwise, resamples, seed)
        write_json(folder / POINTS, points)
        return {"data": data.path.name, **facts}

    pairwise = getattr(judge, "mode", "score") == "pairwise"
    settings = {"judge": part_key(judge), "data": data.content(), "resamples": resamples, "seed": seed}
    return Stage(STAGE, "agreement with people", VERSION, settings, {"verdicts": verdicts}, work)


def read_agreement(store: Store, judge_key: Mapping[str, Any], note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Read a judge's agreement with people from the store: for each set of rows, the newest entry.

    Args:
        judge_key: the judge's :func:`dnpo.settings.part_key`.
        note: receives a line for each damaged stage, which is left out.
    """
    wanted = json.loads(json.dumps(judge_key))
    newest: dict[str, dict[str, Any]] = {}
    for path in (store.root / STAGE).glob(f"*/{MANIFEST}"):
        if path.parent.suffix == ".partial":
            continue
        try:
            content = manifest(path.parent)
        except StoreError as error:
            note(f"warning: the judge's agreement with people may be incomplete: {error}")
            continue
        data = content["settings"]["data"]
        if content["version"] != VERSION or content["settings"]["judge"] != wanted:
            continue
        if data not in newest or content["started"] > newest[data]["started"]:
            newest[data] = content
    return [_entry(content) for content in sorted(newest.values(), key=lambda content: str(content["facts"]["data"]))]


def _entry(content: Mapping[str, Any]) -> dict[str, Any]:
    facts = content["facts"]
    kept = ("accuracy", "kappa", "kappa_between_persons", "length_bias", "flips")
    shown = {name: facts["measures"][name] for name in kept}
    return {"data": facts["data"], "stage": f"{STAGE}/{content['key']}", "unscored": facts["unscored"], **shown}
