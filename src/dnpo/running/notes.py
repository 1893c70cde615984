"""Write the Markdown note of a tracked run: a description, and at the end the results.

Text from settings, data or errors is escaped, so that Markdown shows it literally.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnpo.catalogue import Metric, metric
from dnpo.data.mix import describe_sources
from dnpo.escape import SPACE, for_markdown, for_terminal
from dnpo.judges.agreement import sentence
from dnpo.running import best
from dnpo.stats.overoptimised import LEARNS_FROM, describe_overoptimisation
from dnpo.stats.table import markdown
from dnpo.tracking.client import strip_password
from dnpo.tracking.paths import change_paths, last_part, override_from_here
from dnpo.wording import duration, plural

if TYPE_CHECKING:
    from dnpo.report.comparison import MeasureComparison
    from dnpo.report.groups import Groups

CONTINUES = "Finished stages are kept: the same command continues it."
LONGEST_MESSAGE, LONGEST_OF_A_JOB = 1500, 300  # characters of an error
MOST_MISSING = 12
# Columns of the table; a column that no row has is left out.
COLUMNS = (
    *("eval/score", "second/score", "eval/accuracy", "eval/win", "pairs/flips", "stagnation/ks", "eval/loss"),
    *("drift/kl", "drift/initial", "seconds"),
)


def escape(text: Any) -> str:
    """Escape a text for Markdown, and mask passwords in addresses."""
    return for_markdown(strip_password(str(text)))


def code(text: str) -> str:
    """Indent a text as a block of code; unlike a fenced block, no line of the text can end it."""
    lines = for_terminal(strip_password(text)).splitlines()
    return "\n".join(f"    {line}" for line in lines)


def command(overrides: Sequence[str]) -> str:
    """Return the command that repeats or continues a run."""
    return shlex.join(["python", "-m", "dnpo.train", *map(override_from_here, overrides)])


def describe_run(settings: Mapping[str, Any], choices: Mapping[str, str], overrides: Sequence[str], commit: str) -> str:
    """Describe what a run does: its parts, command and commit.

    Args:
        settings: nested settings of the run.
        choices: the option chosen for each part.
        overrides: the overrides in its command.
        commit: git commit of the code.
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
        "judge": judge + (f"; second judge {second}, which labels nothing" if second not in ("", "off") else ""),
        "data": data,
        "model": model,
        "scale": _describe_part(settings, chosen, "scale"),
    }
    rows = [f"| {name} | {value} |" for name, value in parts.items() if value]
    count = settings["iterations"]
    return "\n".join(
        [
            f"Fine-tuning and {count} iteration{'s' * (count != 1)} of self-improvement. The policies after "
            "fine-tuning and after each iteration are compared on the same held-out prompts "
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
    """Return the heading of a run's note: its method and seed."""
    return f"### {escape(choices.get('method', 'a run'))}, seed {escape(settings['seed'])}"


def _describe_part(settings: Mapping[str, Any], choices: Mapping[str, str], part: str) -> str:
    """Return the option of a part, with its name, path or model."""
    own = settings.get(part, {})
    if isinstance(own, list):  # one part an iteration
        return escape(", then ".join(str(each["_target_"]).rpartition(".")[2] for each in own))
    more = [own[key] for key in ("name", "path", "model") if isinstance(own.get(key), str)]
    return escape(" ".join([choices.get(part, ""), *change_paths(more, last_part)]))


def _commit(commit: str) -> str:
    changed = ", with changes on top" if commit.endswith("+") else ""
    return escape(commit.rstrip("+")) + changed if commit else "unknown: outside a git checkout"


def _describe_start(settings: Mapping[str, Any], part: str) -> str:
    own = settings.get(part, {})
    start = own.get("start", 0) if isinstance(own, Mapping) else 0
    return f", from iteration {start} on" if start else ""


def describe_results(summary: Mapping[str, Any], folder: Path, run: str) -> str:
    """Describe the results of a run; MLflow's page shows the first paragraph even when the note is folded.

    Args:
        summary: the content of its summary.json.
        folder: the run's folder, as a path for people.
        run: the run's id; "" if it is not tracked.
    """
    table = summary["table"]
    seconds = sum(row.get("seconds") or 0 for row in table)
    lines = [
        _outcome(table),
        "",
        space_columns(results(table)),
        *_warnings(summary),
        *(f"- {escape(each)}" for each in best.sentences(summary)),
        *([f"- {escape(describe_sources(summary['sources']))}."] if "sources" in summary else []),
        *(f"- {each}" for each in _sentences(summary)),
        *(f"- The judge {escape(sentence(entry))}." for entry in summary["judge_agreement"]),
        f"- Up to this note it took {duration(summary['seconds'])}; computing its stages took {duration(seconds)}.",
        f"- Models: {escape(folder / 'models')}, one folder for each policy, ready to load.",
    ]
    drawn = f"dnpo report {run}\ndnpo figures all runs={run}"
    return "\n".join([*lines, "", "To draw it:", "", code(drawn)]) if run else "\n".join(lines)


def _warnings(summary: Mapping[str, Any]) -> list[str]:
    """Return a remark on over-optimisation, if there is any."""
    found = summary.get("overoptimised")
    return [f"- **Warning**: {escape(describe_overoptimisation(found, 'progress.png'))}"] if found else []


def _outcome(table: Sequence[Mapping[str, Any]]) -> str:
    """Summarise in one sentence how the metrics changed from the first policy to the last."""
    first, last = table[0], table[-1]
    changes = []
    for name, words in (
        ("eval/score", "the judge's score went from {} to {}"),
        ("eval/accuracy", "right answers from {} to {} %"),
        ("eval/loss", "held-out loss from {} to {}"),
    ):
        if _has(first, name) and _has(last, name):
            changes.append(words.format(_cell(first, metric(name)), _cell(last, metric(name))))
    return f"**From SFT to iteration {last['iteration']}**: {', '.join(changes)}."


def results(table: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of the main metrics in Markdown, one row per policy."""
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


def _sentences(summary: Mapping[str, Any]) -> list[str]:
    """Return remarks on how to read a run's table."""
    table: Sequence[Mapping[str, Any]] = summary["table"]
    sentences = []
    human = next((row["eval/score_human"] for row in table if _has(row, "eval/score_human")), None)
    if human is not None:
        caution = (
            ", so a rise of these scores alone is no evidence of better answers"
            if summary["labelled_by"] == "same"
            else ""
        )
        sentences.append(
            f"Scores are the judge's mean on sampled answers, 0–100; the human responses have "
            f"{metric('eval/score_human').format(human)}. "
            f"Here {LEARNS_FROM[summary['labelled_by']]}{caution}."
        )
    if any(_has(row, "pairs/flipped") for row in table):
        flips = "; ".join(
            f"{_cell(row, metric('pairs/flipped'))} of {_cell(row, metric('pairs/pairs'))} in iteration "
            f"{row['iteration']}"
            for row in table
            if _has(row, "pairs/flipped")
        )
        sentences.append(f"Labels flipped, so that the generated response was chosen: {flips}.")
    moved = [row for row in table if _has(row, "stagnation/ks")]
    if moved:
        last = moved[-1]
        ks, critical = last["stagnation/ks"], last["stagnation/ks_critical"]
        verdict = (
            "the new answers differ from the rejected ones, so the policy still changed"
            if ks > critical
            else "no difference between the new and the rejected answers can be shown"
        )
        sentences.append(
            f"In the last iteration {verdict} (Kolmogorov-Smirnov distance "
            f"{metric('stagnation/ks').format(ks)}, 5 % critical value "
            f"{metric('stagnation/ks_critical').format(critical)})."
        )
    return sentences


def describe_failure(stage: str, error: BaseException) -> str:
    """Say at which stage a run failed or was interrupted, and how to continue it."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return f"**Interrupted** at {escape(stage)}. {CONTINUES}"
    message = str(error) or type(error).__name__
    return f"**Failed** at {escape(stage)}: {escape(message[:LONGEST_MESSAGE])}\n\n{CONTINUES}"


def policy(k: int, stage: str, folder: Path) -> str:
    """Return the note on the page of a model."""
    when = f"after iteration {k}" if k >= 0 else "after supervised fine-tuning, before iteration 0"
    return (
        f"The policy {when}. Its weights are not uploaded: they are in the store under {escape(stage)}. After the run "
        f"they can be loaded from {escape(folder)}."
    )


def describe_sweep(
    name: str,
    jobs: int,
    groups: "Groups | None",
    compared: "Sequence[MeasureComparison]",
    failed: Mapping[str, str],
    overrides: Mapping[str, Sequence[str]],
    arguments: Sequence[str],
    pictures: Sequence[str],
) -> str:
    """Describe a sweep and its results.

    Args:
        jobs: number of jobs.
        failed: error messages of failed jobs, by job.
        overrides: overrides of the failed jobs, by job.
        arguments: arguments of the sweep's command.
        pictures: addresses of the pictures.
    """
    done = jobs - len(failed)
    head = (
        f"**Complete**: {plural(jobs, 'job')} finished."
        if not failed
        else f"**Incomplete**: {done} of {plural(jobs, 'job')} finished."
    )
    lines = [f"### sweep {escape(name)}", "", head]
    if groups is not None and groups.groups:
        seeds = sorted({seed for group in groups.groups for seed in group.seeds})
        varies = ", ".join(groups.varies) or "nothing but the seed"
        lines[-1] += f" What varies: {escape(varies)}; seeds {', '.join(map(str, seeds))}."
    for job, message in failed.items():
        problem = escape(message.strip().splitlines()[-1][:LONGEST_OF_A_JOB])
        lines.append(f"- job {job} ({escape(' '.join(map(override_from_here, overrides[job])))}) failed: {problem}")
    for picture in pictures:
        lines += ["", f"![comparison]({picture})"]
    for each in compared[:2]:
        lines += ["", space_columns("\n".join(_comparison_lines(each)))]
    if len(compared) > 2:
        lines += ["", "The other measures are in comparison.md."]
    if groups is not None:
        lines += ["", *(f"- {escape(sentence)}" for sentence in groups.missing[:MOST_MISSING])]
        more = len(groups.missing) - MOST_MISSING
        lines += [f"- {more} more are on the report's page."] if more > 0 else []
    # words between a list and the code, which would otherwise be a paragraph of the list's last entry
    lines += ["", "Its command:", "", code(shlex.join(["python", "-m", "dnpo.train", *arguments]))]
    return "\n".join(lines)


def comparison(compared: "Sequence[MeasureComparison]") -> str:
    """Return the tables of a sweep, one for each measure."""
    return "\n".join(line for each in compared for line in [*_comparison_lines(each), ""])


def space_columns(tables: str) -> str:
    """Add space between the columns of tables, which MLflow's page omits."""
    rows = (line.startswith("|") and not line.startswith("| ---") for line in tables.splitlines())
    lines = zip(tables.splitlines(), rows, strict=True)
    return "\n".join(line.replace(" | ", f" {SPACE} | ") if row else line for line, row in lines)


def _comparison_lines(comparison: "MeasureComparison") -> list[str]:
    lines = [f"**{comparison.measure.metric.axis}**", "", markdown(comparison.means, "settings")]
    if comparison.differences is not None:
        title = f"Differences from {escape(comparison.baseline)}, paired:"
        lines += [title, "", markdown(comparison.differences, "settings")]
    return [*lines, *(f"- {escape(note)}" for note in comparison.notes)]
