"""Train: compose and check the settings, lay out the run, execute it, report the result.

    python -m dnpo.train method=spin seed=1
    python -m dnpo.train -m npo.alpha=0.01,0.1

Settings become parts here and in the other commands; no other code sees the config tree. Heavy modules are imported
inside functions, so that wrong settings are reported at once.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from omegaconf import DictConfig, OmegaConf

from dnpo.commands import common as command
from dnpo.commands.iterations import join, settings_at, value_at
from dnpo.commands.naming import job_name, run_name
from dnpo.commands.options import expand_options, refuse_idle_epochs
from dnpo.errors import SettingsError
from dnpo.escape import say
from dnpo.settings import Natural, check_values, flat, named_within, require, with_contents
from dnpo.settings import build as build_part
from dnpo.settings import check as check_part

if TYPE_CHECKING:
    from dnpo.running.best import KeptPolicy
    from dnpo.running.console import Console
    from dnpo.running.gate import Finding
    from dnpo.running.launch import Launch
    from dnpo.stages.plan import Iteration, Run
    from dnpo.store import Compute, Store
    from dnpo.tracking.writing import Tracking

VARYING = (
    "prompts",
    "rollout",
    "judge",
    "dsl",
    "strength",
    "curriculum",
    "ema",
    "objective",
    "npo",
    "trainer",
)  # parts that may change by iteration
PARTS = ("model", "data", "sft", "generate", "second_judge", "augment", "eval", "tracking", "launch", *VARYING)
REFERENCE = re.compile(r"\$\{([\w.]+)\}")  # a reference to another setting
TYPICAL = "typical"  # values used only in interpolations; no part gets them
WORDS = ("start", "reference")  # they may change by iteration too, but their values are words, not parts
STARTING = ("dsl", "npo")  # parts that act from their ``start`` iteration on; ABSENT replaces them before it
ABSENT: dict[str, dict[str, Any]] = {
    "dsl": {"_target_": "dnpo.dsl.HumanChosen"},
    "npo": {"_target_": "dnpo.optimise.parts.NoNoise"},
}
UNTRACKED = {"_target_": "dnpo.tracking.NoTracking"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``python -m dnpo.train``."""
    command.run("train", ("dnpo.train", "train"), run_job, arguments=arguments)


# --- from the config tree to plain values -----------------------------------------------------------------------------


class Checked(NamedTuple):
    """The settings of a run, each checked against the part it configures.

    Attributes:
        top: settings outside the parts.
        starts: the iteration at which each part of ``STARTING`` starts.
        parts: the settings of each part, with lists for settings that differ between iterations.
        plans: the settings of the parts of ``VARYING``, and ``WORDS``, for each iteration.
    """

    top: dict[str, Any]
    starts: dict[str, int]
    parts: dict[str, Any]
    plans: list[dict[str, Any]]


def check_settings(cfg: DictConfig) -> Checked:
    """Check every setting against the signature of the part it configures, without building anything.

    Raises:
        SettingsError: a setting is unknown, missing or out of range; the message names the first such, or the setting
            that it takes its value from.
    """
    raw = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))
    sources = {name: found[1] for name, value in flat(raw).items() if (found := REFERENCE.fullmatch(str(value)))}
    with named_within(sources):
        return _check_tree(command.plain(cfg))


def _check_tree(tree: dict[str, Any]) -> Checked:
    from dnpo.stages.plan import RunSettings

    tree.pop(TYPICAL, None)
    top = check_values("", RunSettings, {key: value for key, value in tree.items() if key not in PARTS})
    if top["plan"] and top["check"]:
        raise SettingsError("plan=true, check=true: give one of them; a plan is made without the checks")
    iterations = top["iterations"]
    starts = {name: _start(name, tree[name], iterations) for name in STARTING}
    tree["npo"] = resolve_shift(tree["npo"], tree["tracking"])
    own = {name: _without_start(tree[name]) if name in STARTING else tree[name] for name in PARTS}
    raw = [{name: settings_at(name, own[name], k, iterations) for name in VARYING} for k in range(iterations)]
    plans: list[dict[str, Any]] = []
    for k in range(iterations):
        known = {name: plans[-1][name] for name in VARYING if k and raw[k][name] == raw[k - 1][name]}
        plans.append({name: known.get(name) or check_part(name, raw[k][name]) for name in VARYING})
        plans[k] |= {word: _word_at(word, top[word], k, iterations) for word in WORDS}
    settings = {name: check_part(name, own[name]) for name in PARTS if name not in VARYING}
    settings |= {name: join([plan[name] for plan in plans]) for name in VARYING}
    return Checked(top, starts, settings, plans)


def _word_at(name: str, value: Any, k: int, iterations: int) -> str:
    return str(value_at(name, value, k, iterations) if isinstance(value, list) else value)


def _without_start(settings: Any) -> Any:
    return {k: v for k, v in settings.items() if k != "start"} if isinstance(settings, Mapping) else settings


def resolve_shift(npo: Any, tracking: Mapping[str, Any]) -> Any:
    """Replace ``npo.shift=run:ID`` by the mean of npo/shift over the training steps of that MLflow run."""
    shift = npo.get("shift") if isinstance(npo, Mapping) else None
    if not (isinstance(shift, str) and shift.startswith("run:")):
        return npo
    from dnpo.tracking.reading import mean_of_metric

    return {**npo, "shift": mean_of_metric(str(tracking.get("uri", "")), shift.removeprefix("run:"), "npo/shift")}


def build(cfg: DictConfig, name: str = "") -> "tuple[Run, Tracking, dict[str, Any]]":
    """Check every setting and turn the tree into parts.

    Args:
        name: the name under which the ledger records calls: the run's folder, or its sweep's.

    Returns:
        The run, the tracker, and the resolved settings.
    """
    top, starts, settings, by_iteration = check_settings(cfg)

    from dnpo.judges.asked.ledger import Ledger
    from dnpo.stages.plan import Plan, Run
    from dnpo.stages.words import check_trainings, check_words, judge_of

    def in_force(name: str, k: int) -> Any:
        started: bool = k >= starts.get(name, 0)
        return build_part(name, by_iteration[k][name] if started else ABSENT[name])

    parts: dict[str, Any] = {name: build_part(name, settings[name]) for name in PARTS if name not in VARYING}
    check_device(top["device"])
    plans: list[Plan] = [
        Plan(k=k, **{name: in_force(name, k) for name in VARYING}, **{word: by_iteration[k][word] for word in WORDS})
        for k in range(top["iterations"])
    ]
    _require_parts(parts, by_iteration)
    never = starts["npo"] >= top["iterations"]
    check_words(plans, parts["model"], build_part("npo", by_iteration[-1]["npo"]) if never else None)
    run = Run(
        seed=top["seed"],
        device=top["device"],
        data=parts["data"],
        model=parts["model"],
        sft=parts["sft"],
        generate=parts["generate"],
        judge=judge_of(parts["eval"], plans),
        second_judge=parts["second_judge"],
        eval=parts["eval"],
        plans=plans,
        ledger=Ledger(Path(top["ledger"]), name),
        sft_rows=top["sft_rows"],
        augment=parts["augment"],
    )
    check_trainings(run)
    resolved = {**top, **{name: with_contents(settings[name], parts[name], name) for name in parts}}
    for name in VARYING:
        given, part = settings[name], getattr(plans[-1], name)
        resolved[name] = with_contents(given, part, name) if isinstance(given, Mapping) else given
    for name, start in starts.items():
        if isinstance(resolved[name], Mapping):
            resolved[name] = {**resolved[name], "start": start}
    return run, parts["tracking"].open(), resolved


def _require_parts(parts: Mapping[str, Any], plans: Sequence[Mapping[str, Any]]) -> None:
    """Refuse parts that lack something that the loop needs.

    Raises:
        SettingsError: names the part and what it lacks.
    """
    from dnpo.data import Source
    from dnpo.data.curriculum import Curriculum
    from dnpo.data.prompts import Prompts
    from dnpo.dsl import Labeller, Strength
    from dnpo.judges import Judge
    from dnpo.optimise.parts import Noise, check_objective

    for name, kind in (("data", Source), ("second_judge", Judge)):
        require(name, parts[name], kind)
    needed = {"judge": Judge, "dsl": Labeller, "npo": Noise, "strength": Strength}
    needed |= {"prompts": Prompts, "curriculum": Curriculum}
    for plan in plans:
        built = {name: build_part(name, plan[name]) for name in (*needed, "objective")}
        for name, protocol in needed.items():
            require(name, built[name], protocol)
        check_objective(built["objective"])


def _start(name: str, settings: Any, iterations: int) -> int:
    """Return the iteration at which a part starts; ``last`` means the last of the run."""

    def starting(*, start: Natural | Literal["last"] = 0) -> None: ...

    given = {"start": settings["start"]} if isinstance(settings, Mapping) and "start" in settings else {}
    start = check_values(name, starting, given).get("start", 0)
    return iterations - 1 if start == "last" else cast(int, start)


# --- running ----------------------------------------------------------------------------------------------------------


def warn_of_late_starts(settings: Mapping[str, Any]) -> None:
    """Warn of parts that start after the run's last iteration, so that they are never used."""
    starts = {name: settings[name].get("start", 0) for name in STARTING if isinstance(settings[name], Mapping)}
    asked = {name: start for name, start in starts.items() if settings[name]["_target_"] != ABSENT[name]["_target_"]}
    late = [f"{name}.start={start}" for name, start in asked.items() if start >= settings["iterations"]]
    if late:
        never, both = ("they never begin", " (acts_from=… sets both)") if len(late) > 1 else ("it never begins", "")
        say(
            f"warning: {' and '.join(late)}: the run has iterations={settings['iterations']}, numbered from 0, so "
            f"{never}; give at most {settings['iterations'] - 1}{both}",
            error=True,
        )


def run_job(cfg: DictConfig, job: Any) -> float | None:
    """Run one job.

    Args:
        cfg: the composed tree.
        job: Hydra's settings of the job.

    Returns:
        How good the policy that the run keeps is, higher being better; None if nothing was executed.

    Raises:
        DnpoError: the settings or the run are refused, or the run cannot continue.
    """
    expand_options(cfg, job, VARYING, STARTING)
    refuse_idle_epochs(cfg, job)
    folder, sweep = command.folders(job)
    name = os.path.relpath(sweep or folder)
    command.greet(cfg, job)
    run, tracking, settings = build(cfg, name)
    launch: Launch = build_part("launch", settings["launch"])
    launch.check(run)
    run = replace(run, ranks=launch.world)
    compute = launch.open(settings_for_ranks(cfg), name)
    with run.ledger:  # closed after every job, so that later jobs do not wait for calls that this job has claimed
        return _go(run, tracking, settings, compute, job, folder, sweep)


def settings_for_ranks(cfg: DictConfig) -> dict[str, Any]:
    """Return the composed settings as plain values, from which another process builds the same run, untracked."""
    tree = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    return {**tree, "npo": resolve_shift(tree["npo"], tree["tracking"]), "tracking": UNTRACKED}


def _go(
    run: "Run",
    tracking: "Tracking",
    settings: dict[str, Any],
    compute: "Compute",
    job: Any,
    folder: Path,
    sweep: Path | None,
) -> float | None:
    """Plan, check or execute the run. Return the quality of the policy it keeps (higher is better) if executed."""
    from dnpo import catalogue
    from dnpo.loop import chain
    from dnpo.running.best import default_metric, kept
    from dnpo.running.console import Console

    console, store = Console(), command.make_store(settings, compute)
    iterations = list(chain(run))
    stages = [stage for iteration in iterations for stage in iteration.stages]
    if not settings["plan"]:
        store.open(console.say)
        if not settings["check"]:
            store.exchange(stages, console.say)
    warn_of_late_starts(settings)
    choice = choose(run, settings)
    store.check(stages, console.say, everything=not settings["plan"])
    if settings["plan"]:
        from dnpo.running.gate import foresee
        from dnpo.running.sweep import find_shared_stages

        _print_plan(console, store, iterations, find_shared_stages(sweep, folder, stages))
        if choice.patience:
            console.tell(f"patience={choice.patience} may end the run before all of these stages.")
        _print_forecast(console, run, iterations, store)
        stops = [finding.refusal for finding in foresee(run, iterations, store) if finding.level == "stop"]
        if stops:
            console.tell(f"The run would be refused: {'; '.join(stops)}")
        return None
    check_optimizers(run, iterations, store)
    pass_gate(run, iterations, store, console, settings["check"], settings["threads"], tracking)
    if settings["check"]:
        return None
    from dnpo.running import execute as running

    name = run_name(job.overrides.task) if sweep is None else job_name(sweep, job.overrides.task)
    tags, keys = running.tags(dict(job.runtime.choices), settings), running.list_keys(iterations)
    try:
        with command.track(tracking, name, settings, tags, sweep, folder, keys):
            summary = running.execute(iterations, store, console, tracking, settings, folder, choice)
    finally:
        store.close(console.say)
    if sweep is None:
        running.show(console, summary, iterations, folder, store, tracking, settings["wide"])
    else:
        from dnpo.running.sweep import name_job

        place = name_job(sweep, job.job.num)
        running.show_job(console, summary, iterations, folder, store, place, settings["wide"])
    row = summary["table"][kept(summary)]
    best = settings["best_by"] or default_metric([row])
    return float(row[best] if catalogue.metric(best).better == "higher" else -row[best])


def choose(run: "Run", settings: Mapping[str, Any]) -> "KeptPolicy":
    """Check which policy the run keeps and when it ends, and warn if the test split decides it.

    Raises:
        SettingsError: the metric cannot decide.
    """
    from dnpo.running.best import KeptPolicy

    choice = KeptPolicy(settings["keep"], settings["patience"], settings["best_by"])
    choice.check(run)
    if choice.reads and run.eval.split == "test":
        name = "keep=best" if choice.keep == "best" else f"patience={choice.patience}"
        say(
            f"warning: {name}: chooses by results on the test split, which are then better than on new prompts; "
            "eval.split=validation chooses by other prompts",
            error=True,
        )
    return choice


def check_device(device: str) -> None:
    """Refuse a device that does not exist. ``auto`` and ``cpu`` always exist; only others need torch to be imported.

    Raises:
        SettingsError: there is no such device.
    """
    if device not in ("auto", "cpu"):
        from dnpo.policy.model import device_of

        device_of(device)


def check_optimizers(run: "Run", iterations: "list[Iteration]", store: "Store") -> None:
    """Try out the optimizers of the trainings that are still to be done.

    Raises:
        SettingsError: an optimizer does not take its settings.
    """
    todo = {stage.name for each in iterations for stage in each.stages if not store.has(stage)}
    if "sft" in todo:
        run.sft.check("sft")
    if "optimise" in todo:
        for trainer in {id(plan.trainer): plan.trainer for plan in run.plans}.values():
            trainer.check("trainer")


def pass_gate(
    run: "Run",
    iterations: "list[Iteration]",
    store: "Store",
    console: "Console",
    everything: bool,
    threads: int,
    tracking: "Tracking | None" = None,
) -> None:
    """Check a run before anything is computed: show the findings, and refuse one that cannot work or would be useless.

    Args:
        everything: whether to make the checks of all stages, stored ones too, and to show passed checks.
        tracking: tried if everything is checked; otherwise the run tries it when it begins.

    Raises:
        SettingsError: a finding stops the run.
    """
    from dnpo.running.gate import gate
    from dnpo.running.gate.tracking import check_tracking

    findings = gate(run, iterations, store, everything, lambda: command.prepare_torch(threads))
    if everything and tracking is not None:
        findings.append(check_tracking(tracking))
    settle(findings, console, everything)


def settle(findings: "Sequence[Finding]", console: "Console", everything: bool) -> None:
    """Show the findings of the gate.

    Raises:
        SettingsError: a finding stops the run.
    """
    from dnpo.running.gate import show

    show(console, findings, everything)
    stops = [finding.refusal for finding in findings if finding.level == "stop"]
    if stops:
        raise SettingsError("the run does not begin. " + "\n       ".join(stops))


def _print_plan(console: "Console", store: "Store", iterations: "list[Iteration]", shared: Mapping[str, str]) -> None:
    from dnpo.screen import ScreenTable

    table = ScreenTable(title="Plan", title_justify="left", box=None, pad_edge=False)
    for heading in ("stage", "key", "state"):
        table.add_column(heading, no_wrap=True)
    for iteration in iterations:
        for stage in iteration.stages:
            state = shared.get(stage.key, "to do")
            if store.is_remote(stage):
                state = "in store.remote"
            if store.partial(stage).is_dir():
                state = "begun"
            if store.has(stage):
                state = "stored"
            table.add_row(stage.title, f"{stage.name}/{stage.key}", state)
    console.table(table)


def _print_forecast(console: "Console", run: "Run", iterations: "list[Iteration]", store: "Store") -> None:
    from dnpo.judges import Forecast
    from dnpo.running.forecast import forecast
    from dnpo.screen import ScreenTable

    found = {title: some for title, some in forecast(run, iterations, store).items() if some.calls}
    if not found:
        return
    table = ScreenTable(title="Judge", title_justify="left", box=None, pad_edge=False)
    for heading in ("stage", "calls", "new", "about US dollars"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "stage" else "right")
    for title, some in [*found.items(), ("all", sum(found.values(), Forecast()))]:
        cost = "no price known" if some.cost is None else f"{some.cost:,.2f}"
        table.add_row(title, f"{some.calls:,}", f"{some.new:,}", cost)
    console.say("")
    console.table(table)
    console.tell(
        "A question that several stages ask is counted at the first of them. Responses that are not generated yet "
        "count as new."
    )


if __name__ == "__main__":
    main()
