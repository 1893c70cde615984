"""Show how pairs were labelled: examples, and facts about the judges."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dnpo.catalogue import metric
from dnpo.judges.agreement import sentence
from dnpo.records import HUMAN
from dnpo.report.comparison import Items
from dnpo.report.groups import Groups, Member, is_complete, iteration_title
from dnpo.report.page import format_value
from dnpo.tracking.reading import SFT, TrackedRun, iteration_name

FLIPPED, KEPT = 4, 2  # examples per iteration of a single run
MOST_SAMPLES = 20  # held-out prompts whose answers are shown
SCORE = ", score"  # end of a column's name in samples.json
FEW_FLIPPED, FEW_KEPT = 2, 1  # examples per iteration of a sweep's group


@dataclass(frozen=True)
class Side:
    """One response of a pair: its text, its author and its score."""

    text: str
    author: str
    score: float | None


@dataclass(frozen=True)
class Example:
    """A pair shown as an example."""

    id: str
    messages: Sequence[tuple[str, str]]
    chosen: Side
    rejected: Side
    flipped: bool


@dataclass(frozen=True)
class Examples:
    """Some pairs of one iteration of one run, and how many pairs and flips the iteration had.

    Attributes:
        label: the run's group and seed; "" for the only run.
    """

    label: str
    iteration: int
    pairs: int | None
    flips: int | None
    shown: tuple[Example, ...]


def examples(groups: Groups, single: bool) -> list[Examples]:
    """Return some flipped and some other pairs of every iteration; for a group, from its first seed's run."""
    result = []
    for group in groups.groups:
        for member in group.members if groups.branching or single else group.members[:1]:
            if member.run.seed == group.members[0].run.seed:
                result += _of_run(member, "" if single else f"{group.label}, seed {member.run.seed}", single)
    return result


def _of_run(member: Member, label: str, single: bool) -> list[Examples]:
    result = []
    for row in member.rows:
        path = (
            None if row["iteration"] == SFT else member.run.artifact(f"pairs/{iteration_name(row['iteration'])}.json")
        )
        pairs = [] if path is None else [_example(pair) for pair in json.loads(path.read_text())]
        flipped = [pair for pair in pairs if pair.flipped][: FLIPPED if single else FEW_FLIPPED]
        others = [pair for pair in pairs if not pair.flipped][: KEPT if single else FEW_KEPT]
        if pairs and (single or flipped):
            result.append(
                Examples(
                    label, int(row["iteration"]), _count(row, "pairs"), _count(row, "flipped"), (*flipped, *others)
                )
            )
    return result


def _count(row: Mapping[str, Any], name: str) -> int | None:
    value = row.get(f"pairs/{name}")
    return None if value is None else round(value)


def _example(pair: Mapping[str, Any]) -> Example:
    return Example(
        str(pair["id"]),
        [(str(turn["role"]), str(turn["content"])) for turn in pair["messages"]],
        _side(pair, "chosen"),
        _side(pair, "rejected"),
        bool(pair["flipped"]),
    )


def _side(pair: Mapping[str, Any], side: str) -> Side:
    return Side(str(pair[side]), _author(str(pair[f"{side}_source"])), pair[f"{side}_score"])


def _author(source: str) -> str:
    """Return who wrote a response, given its source as in :class:`dnpo.records.Pair`."""
    if source == HUMAN:
        return "written by a person"
    kind, _, number = source.partition("@")
    return f"generated in iteration {number}" if kind == "policy" and number else source


@dataclass(frozen=True)
class Sample:
    """The answers of a run's policies to one held-out prompt: titles and texts, with scores as text."""

    prompt: str
    answers: tuple[tuple[str, str, str], ...]


def samples(run: TrackedRun) -> list[Sample]:
    """Return the answers to the first held-out prompts, as the run tracked them; none for runs of earlier versions."""
    path = run.artifact("samples.json")
    if path is None:
        return []
    table = json.loads(path.read_text(encoding="utf-8"))
    columns = [str(name) for name in table["columns"]]
    found = []
    for row in table["data"][:MOST_SAMPLES]:
        cells = dict(zip(columns, row, strict=True))
        named = [name for name in columns if name not in ("id", "prompt") and not name.endswith(SCORE)]
        titles = sorted(named, key=_place)
        answers = [(name, str(cells[name] or ""), _score(cells.get(f"{name}{SCORE}"))) for name in titles]
        found.append(Sample(str(cells["prompt"]), tuple(answers)))
    return found


def _place(title: str) -> int:
    """Return where the answers of a column are in time: the human ones, those of SFT, then by iteration."""
    return {"human": -2, "SFT": -1}[title] if title in ("human", "SFT") else int(title.removeprefix("iteration "))


def _score(value: Any) -> str:
    return format_value(value, metric("eval/score")) if isinstance(value, int | float) else ""


# Columns of a run's table that concern its verdicts.
TRUST = (
    *("judge/verdicts", "judge/unscored", "pairs/unscored", "pairs/identical", "judge/disagreement"),
    *("eval/unscored", "eval/score_human", "eval/win", "eval/tie", "eval/lose"),
)


def judges(groups: Groups, items: Items) -> dict[str, Any]:
    """Return facts about the runs' judges: options, agreement with people, missing scores, ties."""
    runs = [member.run for group in groups.groups for member in group.members]
    names = sorted({_name_judge(run) for run in runs})
    entries = {
        sentence(entry): None for run in runs if is_complete(run) for entry in run.summary.get("judge_agreement", [])
    }
    table = []
    for group in groups.groups:
        for iteration in groups.iterations:
            values = [_mean(group.values(iteration, name)) for name in TRUST]
            if any(value is not None for value in values):
                table.append((group.label, iteration_title(iteration), values))
    shown = [i for i in range(len(TRUST)) if any(values[i] is not None for *_, values in table)]
    return {
        "names": names,
        "agreement": list(entries),
        "columns": [metric(TRUST[i]).heading for i in shown],
        "rows": [
            (label, iteration, [format_value(values[i], metric(TRUST[i])) for i in shown])
            for label, iteration, values in table
        ],
        "caution": _caution(groups),
        "second": _second(runs, items),
    }


def _caution(groups: Groups) -> str:
    """Say which groups learn from the judge that gives their scores, so that its scores prove little; "" if none."""
    own = [
        group.label
        for group in groups.groups
        if any(is_complete(m.run) and m.run.summary.get("labelled_by") == "same" for m in group.members)
    ]
    if not own:
        return ""
    whose = "Training" if len(own) == len(groups.groups) else f"The training of {', '.join(own)}"
    return (
        f"{whose} learns from the judge that gives the scores above; a rise of these scores alone "
        f"is no evidence of better answers."
    )


def _name_judge(run: TrackedRun) -> str:
    model = run.params.get("judge.model", "")
    return (run.option("judge") or "not known") + (f" ({model})" if model else "")


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _second(runs: Sequence[TrackedRun], items: Items) -> str:
    """Return the rank correlation of two judges on the last policies' samples in words; "" without a second judge."""
    first: list[float] = []
    second: list[float] = []
    for run in runs:
        rows = items.table(run, run.last["iteration"]) if is_complete(run) else None
        if rows is None or "second" not in rows.column_names:
            continue
        for kind, *scores in zip(*(rows[name].to_pylist() for name in ("kind", "score", "second")), strict=True):
            if kind == "sample" and None not in scores:
                first.append(scores[0])
                second.append(scores[1])
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return ""
    from scipy.stats import spearmanr

    rank = float(spearmanr(first, second).statistic)
    return f"A second judge scored {len(first):,} of the same samples: Spearman's ρ with the first is {rank:.2f}."
