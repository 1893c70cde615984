"""Evaluate a model: check ``conf/evaluate.yaml``, measure the model with the stages of a run, report the result.

The model is treated as a run without fine-tuning and iterations. Its stages are those of a run before iteration 0, so
earlier measurements are reused, and every number is computed as in a run.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from dnpo.catalogue import AGAINST, metric
from dnpo.commands import common as command
from dnpo.commands.train import check_device, settle
from dnpo.errors import DnpoError, SettingsError
from dnpo.settings import Count, Natural, build, check, check_values, part_key
from dnpo.store import Verify
from dnpo.wording import fixed, plural

if TYPE_CHECKING:
    from dnpo.running.console import Console
    from dnpo.screen import ScreenTable
    from dnpo.stages.duels import DuelOutcome
    from dnpo.stages.plan import Iteration, Run
    from dnpo.stats.intervals import Estimate
    from dnpo.store import Stage, Store
    from dnpo.tracking.writing import Tracking

PARTS = ("model", "data", "sft", "generate", "judge", "second_judge", "eval", "tracking")
HUMAN = "human"
OURS, THEIRS = "model", "against"
RESULTS = "evaluation.json"
IDLE = ("sft", "model.lora", "generate.append_eos", "eval.initial")  # nothing is trained, and no pairs are sampled


def top_settings(
    *,
    against: str | None = None,
    length_controlled: bool,
    seed: Natural,
    device: str,
    threads: Count,
    store: str,
    remote: str | None = None,
    verify: Verify,
    ledger: str,
) -> None:
    """The settings outside the parts.

    Args:
        against: the opponent: a folder with a model, a name on the hub, or ``human``.
        length_controlled: whether to compute the win rate at equal length too.
        seed: seed of the samples and of the bootstrap.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: number of torch's CPU threads.
        store: folder of finished stages, shared with runs (setting ``store.root``).
        remote: address of a store shared with other machines (setting ``store.remote``).
        verify: how stages are checked at their first use: by ``digests`` or ``sizes``.
        ledger: file of judge calls, so that none is paid for twice.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``python -m dnpo.evaluate``."""
    command.run("evaluate", ("dnpo.evaluate", "evaluate"), _run, arguments=arguments, idle=IDLE)


# --- settings


def check_settings(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Check every setting, and return the settings outside the parts and of each part.

    Raises:
        SettingsError: a setting is unknown, missing or out of range; the message names the first such.
    """
    tree = command.plain(cfg)
    top = check_values("", top_settings, {key: value for key, value in tree.items() if key not in PARTS})
    settings = {name: check(name, tree[name]) for name in PARTS}
    if settings["sft"].get("epochs") or settings["sft"].get("steps"):
        raise SettingsError("sft: a model is measured as it is; leave sft=off, or train with dnpo train")
    _whole_weights("model.path", settings["model"].get("path"))
    return top, settings


def other_model(against: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the opponent: as for the evaluated model, but loaded from ``against``.

    Raises:
        SettingsError: ``against`` is neither a folder with a model nor a name on the hub.
    """
    _whole_weights("against", against)
    elsewhere = {**model, "path": None, "name": None, "revision": None}
    if (Path(against) / "config.json").is_file():
        return {**elsewhere, "path": against}
    if Path(against).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", against):
        raise SettingsError(
            f"against={against}: no model there; expected a folder with config.json, *.safetensors and a tokenizer, a "
            f"name on the Hugging Face hub, or {HUMAN}"
        )
    return {**elsewhere, "name": against}


def _whole_weights(setting: str, path: str | None) -> None:
    """Refuse a folder that has only adapters; the message gives the command that merges them."""
    if path and (Path(path) / "adapter_config.json").is_file() and not (Path(path) / "config.json").is_file():
        raise SettingsError(
            f"{setting}={path}: it has only adapters; dnpo export RUN iteration=N to=FOLDER writes whole weights"
        )


# --- measuring


def _run(cfg: DictConfig, job: Any) -> None:
    command.greet(cfg, job)
    top, settings = check_settings(cfg)
    against = top["against"]
    other = other_model(against, settings["model"]) if against not in (None, HUMAN) else None
    parts: dict[str, Any] = {name: build(name, settings[name]) for name in PARTS}
    if against is not None and not parts["judge"].gives_scores:
        raise SettingsError(f"against={against}: judge=off cannot say who wins; choose a judge")

    from dnpo.judges.asked.ledger import Ledger
    from dnpo.stages.plan import Run

    check_device(top["device"])
    folder, sweep = command.folders(job)
    tracking = parts.pop("tracking").open()
    with Ledger(Path(top["ledger"]), os.path.relpath(sweep or folder)) as ledger:
        run = Run(seed=top["seed"], device=top["device"], plans=(), ledger=ledger, **parts)
        runs = {OURS: run}
        if other is not None:
            with _name_setting("against", against):
                runs[THEIRS] = replace(run, model=build("model", other))
        _measure(runs, top, settings, tracking, job, folder, sweep)


@contextmanager
def _name_setting(setting: str, value: str) -> Iterator[None]:
    """Prefix errors about the opponent with the setting that chose it."""
    try:
        yield
    except DnpoError as error:
        raise type(error)(f"{setting}={value}: {error}") from error


def _measure(
    runs: "Mapping[str, Run]",
    top: Mapping[str, Any],
    settings: Mapping[str, Any],
    tracking: "Tracking",
    job: Any,
    folder: Path,
    sweep: Path | None,
) -> None:
    """Compute all stages that are not cached, track the results and show them.

    Args:
        runs: runs by name, the evaluated model's first.
    """
    from dnpo.judges.agreement import sentence
    from dnpo.running import execute as running
    from dnpo.running.console import Console
    from dnpo.running.ending import list_places
    from dnpo.stages.agreement import read_agreement
    from dnpo.store import write_json
    from dnpo.store.provenance import commit

    console, store = Console(), command.make_store(top)
    iterations = _lay_out(runs, top, store, console)
    fight = None if top["against"] is None else _duels(runs, iterations)
    store.check([] if fight is None else [fight], console.say)
    names = {OURS: settings["model"]["path"] or settings["model"]["name"]}
    names |= {} if fight is None else {THEIRS: top["against"]}
    title = "evaluation of " + " against ".join(names.values())
    everything = {**top, **settings}
    tags = running.tags(dict(job.runtime.choices), everything)
    tags |= {"dnpo.kind": "evaluation"} | {f"dnpo.{kind}": name for kind, name in names.items()}
    keys = running.list_keys([iterations[OURS]]) | ({} if fight is None else {"duels": fight.key})
    with command.track(tracking, title, everything, tags, sweep, folder, keys):
        rows = {}
        for name, iteration in iterations.items():
            for stage in iteration.stages:
                _get(stage, store, console, f"{name} · " if THEIRS in iterations else "")
            rows[name] = read_metrics(iteration, store)
            _keep(running.rows_behind(iteration, store), name, tracking, folder)
        outcome = None
        if fight is not None:
            _get(fight, store, console, "")
            outcome = _outcome(store.folder(fight), top, tracking, folder)
        makers = running.list_makers(list(iterations.values()), store)
        found = {
            "names": names,
            "metrics": rows,
            "duels": None if outcome is None else dataclasses.asdict(outcome),
            "settings": everything,
            "stages": {
                name: [f"{stage.name}/{stage.key}" for stage in iteration.stages]
                for name, iteration in iterations.items()
            },
            "commit": commit(),
            "made_by": makers,
        }
        write_json(folder / RESULTS, found)
        tracking.artifact(folder / RESULTS)
        tracking.metrics(rows[OURS] | ({} if outcome is None else outcome.metrics()), 0)
        tracking.metrics({f"{AGAINST.prefix}{name}": value for name, value in rows.get(THEIRS, {}).items()}, 0)
    console.say("")
    console.table(table(rows, title[0].upper() + title[1:]), fold=True)
    for line in describe_outcome(outcome, f"judge={job.runtime.choices['judge']}") if outcome is not None else ():
        console.tell(line)
    for entry in read_agreement(store, part_key(runs[OURS].judge), console.say):
        console.tell(f"The judge {sentence(entry)}.")
    for line in running.describe_mixture(makers):
        console.tell(line)
    pages = tracking.whereabouts() if sweep is None else ()  # a sweep ends with them
    for line in ("", *list_places({"results": folder, "stages": store.root}, pages)):
        console.place(line)


def _lay_out(
    runs: "Mapping[str, Run]", top: Mapping[str, Any], store: "Store", console: "Console"
) -> "dict[str, Iteration]":
    """Lay out the stages for each model, and refuse models that fail the checks of a run."""
    from dnpo.loop import chain
    from dnpo.running.gate import Finding, gate

    store.open(console.say)
    iterations: dict[str, Iteration] = {}
    findings: list[Finding] = []
    for name, run in runs.items():
        with nullcontext() if name == OURS else _name_setting("against", top["against"]):
            (iterations[name],) = chain(run)
            store.check(iterations[name].stages, console.say)
            found = gate(run, [iterations[name]], store, prepare=lambda: command.prepare_torch(top["threads"]))
        # what is found for both models alike is shown once
        further = [finding for finding in found if finding not in findings]
        findings += [replace(each, name=f"{name} · {each.name}") for each in further] if name == THEIRS else further
    settle(findings, console, everything=False)
    return iterations


def _outcome(stage: Path, top: Mapping[str, Any], tracking: "Tracking", folder: Path) -> "DuelOutcome":
    """Summarise the duels, and copy them into the results' folder."""
    from dnpo.stages.duels import DUELS, outcome, read_duels

    shutil.copy2(stage / DUELS, folder / DUELS)
    tracking.artifact(folder / DUELS)
    return outcome(read_duels(stage / DUELS), top["length_controlled"], top["seed"])


def _duels(runs: "Mapping[str, Run]", iterations: "Mapping[str, Iteration]") -> "Stage":
    from dnpo.stages.duels import fight_duels

    inputs: dict[str, Any] = {"prompts": iterations[OURS].prompts, "evaluation": iterations[OURS].evaluation}
    if THEIRS in iterations:
        theirs = iterations[THEIRS]
        inputs |= {"their_prompts": theirs.prompts, "their_evaluation": theirs.evaluation}
    return fight_duels(runs[OURS], None, **inputs)


def _get(stage: "Stage", store: "Store", console: "Console", prefix: str) -> None:
    """Compute a stage unless it is cached. Here the ``sft`` stage is the given model, untrained."""
    title = prefix + ("weights" if stage.name == "sft" else stage.title)
    if store.has(stage):
        console.report_reuse(title, stage.key)
        return
    with console.stage(title, lambda *_: None) as report:
        store.get(stage, report)


def read_metrics(iteration: "Iteration", store: "Store") -> dict[str, float]:
    """Return all metrics of a model, by the names under which runs track them."""
    found: dict[str, float] = {}
    for stage in (iteration.evaluation, *iteration.measures):
        found |= json.loads((store.folder(stage) / "metrics.json").read_text())
    return found


def _keep(rows: "Iterable[tuple[str, Path]]", name: str, tracking: "Tracking", folder: Path) -> None:
    """Copy and track the files behind a model's metrics, in the same layout as for runs."""
    for kind, path in rows:
        copy = folder / kind / f"{name}{path.suffix}"
        copy.parent.mkdir(exist_ok=True)
        shutil.copy2(path, copy)
        tracking.artifact(copy, kind)


# --- reporting

GROUPS = {
    "eval": "Held-out prompts",
    "eval/accuracy": "Right greedy answers by family",
    "second": "Held-out prompts under the second judge",
    "texts": "New texts, compared with the human responses to their prompts",
    "leaderboard": "Benchmarks",
    "logps": "Training prompts; chosen are the human responses",
}


def table(rows: Mapping[str, Mapping[str, float]], title: str) -> "ScreenTable":
    """Build the table of metrics by group, with a column for each model."""
    from dnpo.screen import ScreenTable

    made = ScreenTable(title=title, title_justify="left", header_style="bold", pad_edge=False, box=None)
    made.add_column("")
    for name in rows:
        made.add_column(name, justify="right", no_wrap=True)
    group = ""
    every = list(dict.fromkeys(name for row in rows.values() for name in row))
    for name in sorted(every, key=_group):  # a stable sort keeps the order within a group
        if _group(name) != group:
            group = _group(name)
            made.add_row(GROUPS.get(group, group), style="bold")
        shown = metric(name)
        label = shown.title if shown.unit == "%" else shown.axis
        cells = (shown.format(row[name]) + " %" * (shown.unit == "%") if name in row else "–" for row in rows.values())
        made.add_row(f"  {label}", *cells)
    return made


def _group(name: str) -> str:
    parts = name.split("/")
    return "/".join(parts[: 2 if len(parts) > 2 else 1])


def describe_outcome(outcome: "DuelOutcome", judge: str) -> list[str]:
    """Return lines that describe the result of the duels."""
    won = outcome.wins
    duels = f"{plural(won.duels, 'duel')} on {plural(won.prompts, 'prompt')}"
    lines = [
        "",
        f"Duels under {judge}: wins {_share(won.win)}, ties {_share(won.tie)}, losses {_share(won.lose)}",
        f"win rate (a tie counts half) {_share(won.rate)}, p = {won.p:.2g}; {duels}",
        "95 % intervals over prompts; they do not cover the variation between trainings",
    ]
    if outcome.apart is not None:
        lines.append(
            f"scores in the two orders, or of the judge's members, differ by {outcome.apart:.1f} points on average"
        )
    if outcome.controlled is not None:
        found = outcome.controlled
        lines.append(
            f"at the same length {_share(found.rate)}; the model's responses are {fixed(abs(found.difference), 1)} "
            f"characters {'longer' if found.difference >= 0 else 'shorter'} on average than the other side's, and the "
            f"effect of length on winning is {fixed(found.effect, 2, signed=True)} (log-odds)"
        )
    if outcome.why:
        lines.append(f"at the same length: {outcome.why}")
    notes = (*won.notes, *(outcome.controlled.notes if outcome.controlled is not None else ()))
    return lines + [f"note: {note}" for note in dict.fromkeys(notes)]


def _share(estimate: "Estimate") -> str:
    shown = metric("duels/rate")
    value = shown.format_with_unit(estimate.value)
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} ({shown.format(estimate.low)} to {shown.format(estimate.high)})"
