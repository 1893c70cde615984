"""Execute a chain of stages: show progress, track results, write the summary and the table."""

import hashlib
import importlib.metadata
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from dnpo import catalogue, disk
from dnpo.data.mix import describe_sources
from dnpo.evaluate.leaderboard import ITEMS
from dnpo.judges.agreement import sentence
from dnpo.records import mean_over_steps
from dnpo.running import best, export, notes
from dnpo.running.console import Console
from dnpo.running.ending import describe_reached, find_gains, find_intervals, list_places, results_table, show_results
from dnpo.running.samples import sample_table
from dnpo.stages.agreement import read_agreement
from dnpo.stages.files import count_labels
from dnpo.stages.plan import Iteration
from dnpo.stats.overoptimised import LEARNS_FROM, describe_overoptimisation, find_overoptimisation
from dnpo.store import Stage, Store, manifest, provenance, write_json
from dnpo.store.provenance import commit
from dnpo.tables import GROUP
from dnpo.tracking import RUNNING
from dnpo.tracking import datasets as inputs
from dnpo.tracking.paths import change_paths, from_here
from dnpo.tracking.reading import AVERAGED
from dnpo.tracking.writing import TrackedSteps, Tracking

SHOWN_PAIRS = 50
PROGRESS = "progress.png"  # the figure of a run's measures by iteration
GENERATED = ("cut", "responses", "tokens", "engine_mean", "engine_max")  # counts and measurements of generation
TRACKED = 5000  # number of a training's steps that are tracked with all metrics; MLflow takes milliseconds for each
SATURATED = 0.15  # a step whose mean σ(−margin) is below this counts as saturated


def tags(choices: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the tags by which a run can be found: chosen options, sweep, seed and git commit."""
    groups = {group.split("@")[-1]: str(name) for group, name in choices.items() if not group.startswith("hydra/")}
    chosen = {f"dnpo.{group}": name for group, name in groups.items()}
    if "dnpo.sweep" in chosen:  # on a sweep's parent run, dnpo.sweep is the sweep's folder
        chosen["dnpo.sweep_name"] = chosen.pop("dnpo.sweep")
    return {**chosen, "dnpo.seed": str(settings["seed"]), "dnpo.kind": "run", "dnpo.commit": commit()}


def list_keys(iterations: Sequence[Iteration]) -> dict[str, str]:
    """Return the keys of all stages by their short names."""
    return {_slug(stage): stage.key for iteration in iterations for stage in iteration.stages}


def execute(
    iterations: Sequence[Iteration],
    store: Store,
    console: Console,
    tracking: Tracking,
    settings: Mapping[str, Any],
    folder: Path,
    choice: best.KeptPolicy = best.ALWAYS_LAST,
) -> dict[str, Any]:
    """Compute the stages that the store lacks, and track the results.

    ``summary.json`` and ``models/`` are written into the run's folder.

    Args:
        choice: which policy the run keeps, and when it ends.

    Returns:
        The content of ``summary.json``.
    """
    clock, before = time.monotonic(), 0
    table: list[dict[str, Any]] = []
    used: list[dict[str, Any]] = []
    title, head = notes.title(settings, choices()), notes.describe_run(settings, choices(), overrides(), commit())
    tracking.note(f"{title}\n\n{RUNNING}\n\n{head}")
    stages = [stage for iteration in iterations for stage in iteration.stages]
    console.begin([stage.name for stage in stages], {n for n, stage in enumerate(stages) if store.has(stage)})
    for iteration in iterations:
        for stage in iteration.stages:
            variants = {"sft": catalogue.SFT, "augment": catalogue.AUGMENT}
            variant = catalogue.LIKE if stage is iteration.like else variants.get(stage.name)
            prefix = variant.prefix if variant else ""
            reused = _get(stage, store, console, tracking, before, prefix)
            name = {"title": stage.title, "stage": stage.name, "key": stage.key}
            of = {name: needed.key for name, needed in {**stage.inputs, **stage.caches}.items()}
            took = {"seconds": manifest(store.folder(stage))["seconds"], "inputs": of}
            used.append({**name, "iteration": "SFT" if iteration.k < 0 else iteration.k, "reused": reused, **took})
        before += int(manifest(store.folder(iteration.policy))["facts"]["policy_steps"]) if iteration.k >= 0 else 0
        table.append(_row(iteration, store))
        _track(iteration, table[-1], store, tracking, settings, folder)
        if choice.is_over(table):
            break
    planned, iterations = len(iterations) - 1, iterations[: len(table)]
    labelled_by = find_labeller(iterations)
    gains = find_gains([find_items(iteration, store) for iteration in iterations]) if labelled_by == "same" else {}
    summary = {
        "table": table,
        "choices": choices(),
        "settings": settings,
        "cwd": str(Path.cwd()),  # paths in the settings are relative to it
        "stages": used,
        "policies": [f"{iteration.policy.name}/{iteration.policy.key}" for iteration in iterations],
        "commit": commit(),
        "labelled_by": labelled_by,
        "overoptimised": find_overoptimisation(gains),
        "judge_agreement": read_agreement(store, iterations[-1].evaluation.settings["judge"], console.say),
        "versions": {**provenance.versions(), "mlflow": importlib.metadata.version("mlflow")},
        "made_by": list_makers(iterations, store),
        "seconds": round(time.monotonic() - clock, 1),
        **choice.describe(table, planned),
        **_read_sources(iterations[0].prompts, store),
    }
    if "choice" in summary:
        found = summary["choice"]
        tracking.tags({"dnpo.best": str(found["best"]["iteration"]), "dnpo.kept": table[found["kept"]]["iteration"]})
    public = {"cwd": os.path.relpath(Path.cwd(), folder), "settings": change_paths(settings, from_here)}
    write_json(folder / "summary.json", summary | public)
    tracking.artifact(folder / "summary.json")
    for card in export.link(summary, folder):
        tracking.artifact(card, f"models/{card.parent.name}")
    write_json(folder / "samples.json", sample_table(iterations, store, settings["eval"]["split"]))
    tracking.table(folder / "samples.json")  # before the other table: MLflow's view for comparing runs shows the first
    _track_results(summary, iterations, store, tracking, folder)
    ended = notes.describe_results(summary, Path(os.path.relpath(folder)), tracking.id)
    tracking.note(f"{title}\n\n{ended}\n\n{head}")
    tracking.flush()
    return summary


def _read_sources(prompts: Stage, store: Store) -> dict[str, Any]:
    """The numbers of rows by source and split, if the data are a mix; otherwise nothing."""
    facts = manifest(store.folder(prompts))["facts"]
    found = {split: its["sources"] for split, its in facts.items() if isinstance(its, dict) and "sources" in its}
    return {"sources": found} if found else {}


def find_labeller(iterations: Sequence[Iteration]) -> str:
    """Compare the judge that training learns from with that of the evaluations; return a key of ``LEARNS_FROM``."""
    trained = [each.policy for each in iterations]  # a live training judges and labels itself
    stages = [stage for each in iterations for stage in (each.verdicts, each.labelled) if stage is not None] + trained
    judges = [stage.settings["judge"] for stage in stages if "judge" in stage.settings]
    if not judges:
        return "nobody"
    return "same" if iterations[-1].evaluation.settings["judge"] in judges else "other"


def list_makers(iterations: Sequence[Iteration], store: Store) -> list[dict[str, Any]]:
    """List the makers of a chain's stages (versions, commit, device), each once, with the titles of its stages."""
    found: dict[str, dict[str, Any]] = {}
    for stage in (stage for iteration in iterations for stage in iteration.stages):
        made = manifest(store.folder(stage)).get("made_by", {})
        entry = found.setdefault(json.dumps(made, sort_keys=True), {**made, "stages": []})
        entry["stages"].append(stage.title)
    return list(found.values())


def describe_mixture(makers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return warnings if the stages were made by different versions, commits, devices or numbers of threads."""
    made = {
        title: {name: value for name, value in maker.items() if name != "stages"}
        for maker in makers
        for title in maker["stages"]
    }
    lines = provenance.warn(provenance.differences(made))
    advice = "Another store (store=FOLDER) would have all of them made alike"
    return [f"warning: the stages of this run were not all made in the same way: {line}. {advice}" for line in lines]


def choices() -> dict[str, str]:
    """Return the option that Hydra chose for each part; empty if Hydra composed nothing."""
    from hydra.core.hydra_config import HydraConfig

    known = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return {str(k): str(v) for k, v in known.items() if v is not None and not str(k).startswith("hydra/")}


def overrides() -> list[str]:
    """Return the overrides that the command gave to Hydra; empty if Hydra composed nothing."""
    from hydra.core.hydra_config import HydraConfig

    return [str(given) for given in HydraConfig.get().overrides.task] if HydraConfig.initialized() else []


def _get(stage: Stage, store: Store, console: Console, tracking: Tracking, before: int, prefix: str) -> bool:
    """Compute one stage unless it is in the store; return whether it was in the store.

    The run that computes a training stage tracks its steps. A run that reuses the stage records the id of
    that run, or tracks the steps again if that run is not in this tracking store.

    Args:
        before: number of training steps in earlier iterations.
        prefix: prefix of the metrics' names.
    """

    def track(rows: list[dict[str, float]], total: int) -> None:
        for row in rows:
            values = {f"{prefix}{name}": value for name, value in thin(row, total).items() if name != "step"}
            tracking.metrics(values, before + int(row["step"]))

    if store.has(stage):
        console.report_reuse(stage.title, stage.key)
    else:
        with console.stage(stage.title, track) as report, _note_failure(tracking, stage):
            store.get(stage, report)
    steps, reused = _steps(stage, store), stage.key not in store.computed
    if not steps:
        return reused
    tracked = TrackedSteps(store.root, stage.key, prefix)
    if reused:  # found in the store, or computed by another run in the meantime
        elsewhere = tracked.run(tracking.where)
        if elsewhere and tracking.has(elsewhere):
            tracking.steps_of(_slug(stage), elsewhere)
            return True
        track(steps, len(steps))
    if tracking.flush() and store.writable:  # if not, the next run that reuses the stage tracks them
        tracked.add(tracking.where, tracking.id)
    return reused


def thin(row: dict[str, float], total: int) -> dict[str, float]:
    """Return the metrics to track: all metrics of every n-th step, and of other steps only those that are averaged.

    Args:
        total: number of steps of the training.
    """
    step, every = int(row["step"]), -(-total // TRACKED)
    if step % every == 0 or step == total - 1:
        return row
    return {name: value for name, value in row.items() if name in ("step", *AVERAGED)}


@contextmanager
def _note_failure(tracking: Tracking, stage: Stage) -> Iterator[None]:
    """Add the error that ends a run at this stage to the run's note."""
    try:
        yield
    except BaseException as error:
        tracking.end_note(notes.describe_failure(stage.title, error))
        raise


def _steps(stage: Stage, store: Store) -> list[dict[str, float]]:
    """Return the metrics of a training's steps; empty if the stage trained nothing."""
    path = store.folder(stage) / "steps.json"
    steps: list[dict[str, float]] = json.loads(path.read_text()) if path.is_file() else []
    return steps


def _row(iteration: Iteration, store: Store) -> dict[str, Any]:
    """Return one row of the table. ``seconds`` is the time that its stages took when they were computed."""
    trained = manifest(store.folder(iteration.policy))["facts"]
    row: dict[str, Any] = {"iteration": "SFT" if iteration.k < 0 else iteration.k}
    for stage in (iteration.evaluation, *iteration.measures):
        row |= json.loads((store.folder(stage) / "metrics.json").read_text())
    for name in ("loss/policy", "loss/noise", "npo/variance", "npo/at_bound", "npo/shift", "margin/saturation"):
        row[name] = trained.get(f"{name} (last tenth)")
    steps = [step for step in _steps(iteration.policy, store) if "margin/saturation" in step]
    if steps:
        flat = [{**step, "flat": float(step["margin/saturation"] < SATURATED)} for step in steps]
        row["margin/saturated"] = mean_over_steps(flat, "flat")
    if iteration.k >= 0:
        for name in ("first", "last"):
            row[f"grad_norm/{name}"] = trained.get(f"grad_norm/policy ({name} tenth)")
    if iteration.labelled is not None:
        row |= {f"pairs/{name}": count for name, count in count_labels(store.folder(iteration.labelled)).items()}
        row["pairs/flips"] = row["pairs/flipped"] / row["pairs/pairs"]
    if iteration.pairs is not None and iteration.pairs is not iteration.labelled:
        arranged = manifest(store.folder(iteration.pairs))["facts"]
        row |= {f"curriculum/{name}": value for name, value in arranged.items()}
    if "held_out" in trained:
        row |= {f"heldout/{name}": trained["held_out"][name] for name in ("loss", "step", "steps")}
    row |= {f"trained/{name}": trained[name] for name in ("tokens", "flop") if name in trained}
    judged, made = trained.get("judged", {}), trained.get("generated", {})  # of a live training, which does both
    if iteration.verdicts is not None:
        judged = manifest(store.folder(iteration.verdicts))["facts"]
    if iteration.responses is not None:
        made = manifest(store.folder(iteration.responses))["facts"]
    row |= {f"judge/{name}": value for name, value in judged.items()}
    row |= {f"generated/{name}": made[name] for name in GENERATED if name in made}
    row["seconds"] = round(sum(manifest(store.folder(stage))["seconds"] for stage in iteration.stages), 1)
    return row


def _track(
    iteration: Iteration,
    row: Mapping[str, Any],
    store: Store,
    tracking: Tracking,
    settings: Mapping[str, Any],
    folder: Path,
) -> None:
    """Track an iteration: its data sets, model, metrics, histogram, the rows behind the metrics, steps, some pairs."""
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "iteration"}
    renamed = {catalogue.name_by_iteration(name): value for name, value in numbers.items()}
    name = "sft" if iteration.k < 0 else f"iteration-{iteration.k}"
    tracking.inputs(inputs.list_datasets(iteration, store, settings))
    stage = f"{iteration.policy.name}/{iteration.policy.key}"
    where = Path(os.path.relpath(folder / "models" / name))
    made = {"iteration": str(row["iteration"]), "stage": stage, "folder": str(where), "seed": str(settings["seed"])}
    model = tracking.model(name, iteration.k, made, notes.policy(iteration.k, stage, where))
    tracking.metrics(renamed, iteration.k, model)
    picture = folder / "logprobs" / f"{name}.png"
    picture.parent.mkdir(exist_ok=True)
    title = "after supervised fine-tuning" if iteration.k < 0 else f"after iteration {iteration.k}"

    def draw(path: Path) -> None:
        from dnpo.report.drawing import describe_movement, logprob_histogram

        numbers = store.folder(iteration.evaluation) / "logprobs.npz"
        logprob_histogram(numbers, path, f"Responses under the policy {title}", describe_movement(row))

    _draw_once(store, iteration.evaluation.key, draw, picture)
    tracking.artifact(picture, "logprobs")
    for kind, path in rows_behind(iteration, store):
        named = folder / kind / f"{name}{path.suffix}"
        named.parent.mkdir(exist_ok=True)
        shutil.copy2(path, named)
        tracking.artifact(named, kind)
    if iteration.pairs is not None:
        some = folder / "pairs" / f"{name}.json"
        some.parent.mkdir(exist_ok=True)
        write_json(some, _some_pairs(store.folder(iteration.pairs) / "pairs.parquet"))
        tracking.artifact(some, "pairs")
    tracking.flush()


def _track_results(
    summary: Mapping[str, Any], iterations: Sequence[Iteration], store: Store, tracking: Tracking, folder: Path
) -> None:
    """Draw and track a run's progress, and its table in Markdown and in MLflow's form."""
    rows = summary["table"]
    (folder / "table.md").write_text(notes.results(rows))
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {"columns": names, "data": [[row.get(name) for name in names] for row in rows]}
    write_json(folder / "table.json", columns)
    chosen = choices()
    options = chosen.get("dsl", ""), chosen.get("npo", "")
    given = [each for each in overrides() if not each.startswith(("method=", "seed="))]
    title = ", ".join([chosen.get("method", "dnpo"), f"seed {summary['settings']['seed']}"])
    title += f": {' '.join(given)}" if given else ""
    around = find_intervals([find_items(iteration, store) for iteration in iterations])

    def draw(path: Path) -> None:
        from dnpo.report.drawing import progress

        progress(rows, path, title, options, around)

    numbers = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    ends = {name: [found and [found.low, found.high] for found in by_policy] for name, by_policy in around.items()}
    shown = [numbers, title, options, ends]
    key = hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:16]
    _draw_once(store, key, draw, folder / PROGRESS)
    tracking.artifact(folder / PROGRESS)
    tracking.artifact(folder / "table.md")
    tracking.table(folder / "table.json")


def _draw_once(store: Store, key: str, draw: Callable[[Path], None], picture: Path) -> None:
    """Copy a picture that an earlier run drew from the same numbers, or draw it and keep it for later runs."""
    drawn = store.root / ".pictures" / f"{key}-{_hash_drawing()}.png"
    if not drawn.is_file() and not store.writable:
        draw(picture)
        return
    if not drawn.is_file():
        drawn.parent.mkdir(exist_ok=True)
        aside = drawn.with_suffix(f".{os.getpid()}.png")
        draw(aside)
        disk.replace(aside, drawn)
    shutil.copy2(drawn, picture)


@cache
def _hash_drawing() -> str:
    """Return a hash of the code that draws pictures; a picture drawn by other code is drawn again."""
    root = Path(__file__).parent.parent
    code = [(root / name).read_bytes() for name in ("palette.py", "catalogue.py", "report/drawing.py")]
    return hashlib.sha256(b"".join(code)).hexdigest()[:8]


def find_items(iteration: Iteration, store: Store) -> Path:
    """The folder of the stage with all results by held-out prompt: the second judge's if there is one."""
    second = next((stage for stage in iteration.measures if stage.name == "second"), iteration.evaluation)
    return store.folder(second)


def rows_behind(iteration: Iteration, store: Store) -> Iterator[tuple[str, Path]]:
    """Yield the files behind an iteration's metrics, each with the artefact folder it belongs in."""
    evaluation, measures = (
        store.folder(iteration.evaluation),
        {stage.name: store.folder(stage) for stage in iteration.measures},
    )
    yield "logprobs", evaluation / "logprobs.npz"
    yield "items", find_items(iteration, store) / "items.parquet"
    for kind, file in (("texts", "texts.parquet"), ("leaderboard", ITEMS)):
        if kind in measures:
            yield kind, measures[kind] / file
    for kind, stage in (("steps", iteration.policy), ("like", iteration.like)):
        if stage is not None and _steps(stage, store):
            yield kind, store.folder(stage) / "steps.json"


def _some_pairs(path: Path) -> list[dict[str, Any]]:
    """Return some pairs as examples: the first flipped ones, then the first others."""
    import pyarrow.parquet as pq

    found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    with pq.ParquetFile(path) as file:
        # Files of earlier versions have fewer columns.
        names = [name for name in file.schema_arrow.names if not name.endswith("_ids")]
        for batch in file.iter_batches(GROUP, columns=names):
            for flipped, some in found.items():
                numbers = [i for i, each in enumerate(batch.column("flipped").to_pylist()) if each == flipped]
                some += [row for i in numbers[: SHOWN_PAIRS - len(some)] for row in batch.slice(i, 1).to_pylist()]
    first = found[True][: SHOWN_PAIRS // 2]
    return [*first, *found[False][: SHOWN_PAIRS - len(first)]]


def show(
    console: Console,
    summary: Mapping[str, Any],
    iterations: Sequence[Iteration],
    folder: Path,
    store: Store,
    tracking: Tracking,
    wide: bool = False,
) -> None:
    """Show the table, the changes, the folders, and what to do next.

    Args:
        wide: whether to show all columns, in as many parts as the terminal needs.
    """
    rows = summary["table"]
    console.say("")
    show_results(console, rows, _evaluations(rows, iterations, store), _decisive(summary), wide)
    if any("eval/score" in row for row in rows):
        console.tell(
            f"score: judge's mean on sampled held-out answers (0-100); {LEARNS_FROM[summary['labelled_by']]}. "
            "win, lose: these answers against the human ones. Accuracies: greedy answers."
        )
    if any("second/score" in row for row in rows):
        console.tell("2nd: the second judge's mean on the same answers; this judge labels nothing.")
    if wide:
        console.tell(
            "Policy and noise losses: mean over the last tenth of the steps. log p: summed log-probability under the "
            "new policy, nats."
        )
    for text in _remarks(summary):
        console.tell(text)
    where = {"results": folder, "models": folder / "models", "stages": store.root}
    for line in ("", *list_places(where, tracking.whereabouts(), folder)):
        console.place(line)


def show_job(
    console: Console,
    summary: Mapping[str, Any],
    iterations: Sequence[Iteration],
    folder: Path,
    store: Store,
    job: str,
    wide: bool,
) -> None:
    """Show in a line what a job of a sweep reached; the sweep's end has the tables, the folders and what to do next.

    Args:
        job: its place in the sweep, such as ``job 1 of 4``.
        wide: whether to show the job's own table too, with all columns.
    """
    if wide:
        rows = summary["table"]
        console.say("")
        console.table(results_table(rows, _evaluations(rows, iterations, store), _decisive(summary), wide), split=True)
    for text in _remarks(summary, alone=False):
        console.tell(text)
    console.tell(f"{job}: {describe_reached(summary)}, in {shlex.quote(os.path.relpath(folder))}")


def _evaluations(rows: Sequence[Any], iterations: Sequence[Iteration], store: Store) -> list[Path]:
    return [find_items(iteration, store) for iteration in iterations[: len(rows)]]


def _decisive(summary: Mapping[str, Any]) -> str | None:
    """The metric by which the run chose a policy; None if it chose none."""
    return summary["choice"]["best"]["by"] if "choice" in summary else None


def _remarks(summary: Mapping[str, Any], alone: bool = True) -> list[str]:
    """Return sentences on a run's results: warnings, and what its settings ask for.

    Args:
        alone: whether to include what all jobs of a sweep would repeat.
    """
    found = []
    if summary["overoptimised"]:
        found.append(f"warning: {describe_overoptimisation(summary['overoptimised'], PROGRESS)}")
    found += best.sentences(summary)
    if alone and "sources" in summary:
        found.append(describe_sources(summary["sources"]))
    if alone:
        found += [f"The judge {sentence(entry)}." for entry in summary["judge_agreement"]]
    return found + describe_mixture(summary["made_by"])


def _slug(stage: Stage) -> str:
    return stage.title.replace(" · ", ".").replace(" ", "-")
