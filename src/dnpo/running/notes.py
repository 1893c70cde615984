"""What the page of a tracked run says first, in Markdown: what it is, and at its end what came out.

Whatever comes from settings, data or errors is escaped: it is shown and means nothing to Markdown.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnpo.catalogue import Metric, metric
from dnpo.judges.agreement import sentence
from dnpo.stats.table import markdown
from dnpo.tracking.writing import strip_password

if TYPE_CHECKING:
    from dnpo.report.comparison import MeasureComparison
    from dnpo.report.groups import Groups

RUNNING = "*It is running; what came out will stand here.*"
CONTINUES = "Finished stages are kept: the same command continues it."
LONGEST_MESSAGE, LONGEST_OF_A_JOB = 1500, 300  # characters of an error
MOST_MISSING = 12
# Of the table; what no row has is left out.
COLUMNS = (
    *("eval/score", "second/score", "eval/accuracy", "eval/win", "pairs/flips", "stagnation/ks", "eval/loss"),
    "seconds",
)


def escape(text: Any) -> str:
    """Text that Markdown and HTML show as it is, on one line, also in a table."""
    one_line = re.sub(r"\s+", " ", strip_password(str(text)).strip())
    shown = one_line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", shown)


def code(text: str) -> str:
    """A block of code, which no line of the text can end."""
    lines = strip_password(text).splitlines()
    return "\n".join(f"    {line}" for line in lines)


def command(overrides: Sequence[str]) -> str:
    """The command that does this run again, or goes on with it."""
    return shlex.join(["python", "-m", "dnpo.train", *overrides])


def describe_run(settings: Mapping[str, Any], choices: Mapping[str, str], overrides: Sequence[str], commit: str) -> str:
    """What a run is.

    Args:
        settings: of the run, nested.
        choices: the option that was chosen for each part.
        overrides: what its command says.
    """
    chosen = {part.split("@")[-1]: option for part, option in choices.items()}
    data, model, judge, second = (
        _describe_part(settings, chosen, part) for part in ("data", "model", "judge", "second_judge")
    )
    labels, noise = (
        f"{_describe_part(settings, chosen, part)}{_describe_start(settings, part)}" for part in ("dsl", "npo")
    )
    parts = {
        "labels": "by origin: the human response is chosen" if labels == "off" else labels,
        "noise on the reference": "none" if noise == "off" else noise,
        "judge": judge + (f", beside it {second}, which labels nothing" if second not in ("", "off") else ""),
        "data": data,
        "model": model,
        "scale": _describe_part(settings, chosen, "scale"),
    }
    rows = [f"| {name} | {value} |" for name, value in parts.items() if value]
    count = settings["iterations"]
    return "\n".join(
        [
            f"Fine-tuning and {count} iteration{'s' * (count != 1)} of self-improvement. Compared are the policy after "
            f"fine-tuning and after each iteration, on the same held-out prompts "
            f"({escape(settings['eval']['split'])}).",
            "",
            "| | |",
            "| --- | --- |",
            *rows,
            "",
            code(command(overrides)),
            "",
            f"Commit {_commit(commit)}.",
        ]
    )


def title(settings: Mapping[str, Any], choices: Mapping[str, str]) -> str:
    """A run's name in a word or two."""
    return f"### {escape(choices.get('method', 'a run'))}, seed {escape(settings['seed'])}"


def _describe_part(settings: Mapping[str, Any], choices: Mapping[str, str], part: str) -> str:
    """The option of a part, and the name, path or model that goes with it."""
    own = settings.get(part, {})
    more = [own[key] for key in ("name", "path", "model") if isinstance(own, Mapping) and isinstance(own.get(key), str)]
    return escape(" ".join([choices.get(part, ""), *more]))


def _commit(commit: str) -> str:
    changed = ", with changes on top" if commit.endswith("+") else ""
    return escape(commit.rstrip("+")) + changed if commit else "unknown: outside a git checkout"


def _describe_start(settings: Mapping[str, Any], part: str) -> str:
    start = settings.get(part, {}).get("start", 0)
    return f", from iteration {start} on" if start else ""


def describe_results(summary: Mapping[str, Any], folder: Path, run: str) -> str:
    """What came out of a run; the first paragraph is what its page shows unasked.

    Args:
        summary: the content of its summary.json.
        folder: of the run, as people reach it.
        run: its id; "" where it is not tracked.
    """
    table = summary["table"]
    seconds = sum(row.get("seconds") or 0 for row in table)
    lines = [
        _outcome(table),
        "",
        space_columns(results(table)),
        *(f"- {each}" for each in _sentences(table)),
        *(f"- The judge {escape(sentence(entry))}." for entry in summary["judge_agreement"]),
        f"- It took {summary['seconds']:,.0f} s; its stages, when they were computed, {seconds:,.0f} s.",
        f"- Models: {escape(folder / 'models')}, one folder a policy; they load as they are.",
    ]
    drawn = f"python -m dnpo.report {run}\npython -m analysis all --runs {run}"
    return "\n".join([*lines, "", "To draw it:", "", code(drawn)]) if run else "\n".join(lines)


def _outcome(table: Sequence[Mapping[str, Any]]) -> str:
    """In one sentence, from the first policy to the last."""
    first, last = table[0], table[-1]
    found = []
    for name, words in (
        ("eval/score", "the judge's score went from {} to {}"),
        ("eval/accuracy", "right answers from {} to {} %"),
        ("eval/loss", "held-out loss from {} to {}"),
    ):
        if _has(first, name) and _has(last, name):
            found.append(words.format(_cell(first, metric(name)), _cell(last, metric(name))))
    return f"**From SFT to iteration {last['iteration']}**: {', '.join(found)}."


def results(table: Sequence[Mapping[str, Any]]) -> str:
    """A row a policy, of the columns that say most."""
    shown = [metric(name) for name in COLUMNS if any(_has(row, name) for row in table)]
    head = ["after iteration", *(column.heading for column in shown)]
    lines = [head, ["---", *("---:" for _ in shown)]]
    for row in table:
        cells = [_cell(row, column) for column in shown]
        lines.append(["SFT" if row["iteration"] == "SFT" else str(row["iteration"]), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _has(row: Mapping[str, Any], name: str) -> bool:
    return isinstance(row.get(name), int | float)


def _cell(row: Mapping[str, Any], column: Metric) -> str:
    return column.format(row[column.name]) if _has(row, column.name) else "–"


def _sentences(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader should know of a run's table."""
    found = []
    human = next((row["eval/score_human"] for row in table if _has(row, "eval/score_human")), None)
    if human is not None:
        found.append(
            f"Scores are the judge's mean of sampled answers, 0-100; the human responses have "
            f"{metric('eval/score_human').format(human)}. "
            "Where it also labels the pairs, it defines the measure."
        )
    if any(_has(row, "pairs/flipped") for row in table):
        flips = "; ".join(
            f"{_cell(row, metric('pairs/flipped'))} of {_cell(row, metric('pairs/pairs'))} in iteration "
            f"{row['iteration']}"
            for row in table
            if _has(row, "pairs/flipped")
        )
        found.append(f"Labels flipped, so that the generated response was chosen: {flips}.")
    moved = [row for row in table if _has(row, "stagnation/ks")]
    if moved:
        last = moved[-1]
        ks, critical = last["stagnation/ks"], last["stagnation/ks_critical"]
        verdict = (
            "the new answers differ from the rejected ones: the policy still moved"
            if ks > critical
            else "the new answers cannot be told from the rejected ones: the policy stood still"
        )
        found.append(
            f"In the last iteration {verdict} (Kolmogorov-Smirnov distance "
            f"{metric('stagnation/ks').format(ks)}, 5 % critical value "
            f"{metric('stagnation/ks_critical').format(critical)})."
        )
    return found


def describe_failure(stage: str, error: BaseException) -> str:
    """At which stage a run ended before its end, and how it goes on."""
    if isinstance(error, KeyboardInterrupt):
        return f"**Interrupted** at {escape(stage)}. {CONTINUES}"
    message = str(error) or type(error).__name__
    return f"**Failed** at {escape(stage)}: {escape(message[:LONGEST_MESSAGE])}\n\n{CONTINUES}"


def policy(k: int, stage: str, folder: Path) -> str:
    """What the page of a model says."""
    when = f"after iteration {k}" if k >= 0 else "after supervised fine-tuning, before iteration 0"
    return (
        f"The policy {when}. Its weights are not uploaded: they lie in the store under {escape(stage)}, and when the "
        f"run has ended {escape(folder)} loads as it is."
    )


def describe_sweep(
    name: str,
    jobs: int,
    groups: "Groups | None",
    compared: "Sequence[MeasureComparison]",
    failed: Mapping[str, str],
    overrides: Mapping[str, Sequence[str]],
    arguments: Sequence[str],
    picture: str,
) -> str:
    """What a sweep is and what came out.

    Args:
        jobs: how many there are.
        failed: messages by job.
        overrides: what the commands of the failed ones say.
        arguments: of the sweep's command.
        picture: its address; "" where there is none.
    """
    done = jobs - len(failed)
    head = (
        f"**Complete**: all {jobs} jobs finished." if not failed else f"**Incomplete**: {done} of {jobs} jobs finished."
    )
    lines = [f"### sweep {escape(name)}", "", head]
    if groups is not None and groups.groups:
        seeds = sorted({seed for group in groups.groups for seed in group.seeds})
        varies = ", ".join(groups.varies) or "nothing but the seed"
        lines[-1] += f" What varies: {escape(varies)}; seeds {', '.join(map(str, seeds))}."
    for job, message in failed.items():
        told = escape(message.strip().splitlines()[-1][:LONGEST_OF_A_JOB])
        lines.append(f"- job {job} ({escape(' '.join(overrides[job]))}) failed: {told}")
    if picture:
        lines += ["", f"![comparison]({picture})"]
    for found in compared[:2]:
        lines += ["", space_columns("\n".join(_comparison_lines(found)))]
    if len(compared) > 2:
        lines += ["", "The other measures are in comparison.md."]
    if groups is not None:
        lines += ["", *(f"- {escape(sentence)}" for sentence in groups.missing[:MOST_MISSING])]
    lines += ["", code(shlex.join(["python", "-m", "dnpo.train", *arguments]))]
    return "\n".join(lines)


def comparison(compared: "Sequence[MeasureComparison]") -> str:
    """The tables of a sweep, measure by measure."""
    return "\n".join(line for found in compared for line in [*_comparison_lines(found), ""])


def space_columns(tables: str) -> str:
    """Tables with some room between their columns, which MLflow's page does not give them."""
    rows = (line.startswith("|") and not line.startswith("| ---") for line in tables.splitlines())
    lines = zip(tables.splitlines(), rows, strict=True)
    return "\n".join(line.replace(" | ", " &emsp; | ") if row else line for line, row in lines)


def _comparison_lines(found: "MeasureComparison") -> list[str]:
    lines = [f"**{found.measure.metric.axis}**", "", markdown(found.means, "settings")]
    if found.differences is not None:
        lines += [f"Less {escape(found.baseline)}, paired:", "", markdown(found.differences, "settings")]
    return [*lines, *(f"- {escape(note)}" for note in found.notes)]
