"""Measure a model on the benchmarks: check ``conf/leaderboard.yaml``, run them, report the result."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from dnpo.catalogue import metric
from dnpo.commands import common as command
from dnpo.evaluate.leaderboard import ITEMS, SCORES, Leaderboard, LeaderboardResult, measure, name_metric
from dnpo.settings import Count, build, check, check_values

if TYPE_CHECKING:
    from dnpo.screen import ScreenTable

PARTS = ("model", "tracking")
COMMON = ("device", "threads")


def top_settings(*, device: str, threads: Count) -> None:
    """The settings outside the leaderboard and the parts.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: number of torch's CPU threads.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``python -m dnpo.leaderboard``."""
    nothing = "Nothing is kept: the same command starts from the beginning."
    command.run("leaderboard", ("dnpo.leaderboard", "leaderboard"), _run, nothing, arguments, idle=("model.lora",))


def _run(cfg: DictConfig, job: Any) -> None:
    command.greet(cfg, job)
    tree = command.plain(cfg)
    top = check_values("", top_settings, {key: tree[key] for key in COMMON})
    own = check_values("", Leaderboard, {key: tree[key] for key in tree if key not in (*COMMON, *PARTS)})
    settings = {name: check(name, tree[name]) for name in PARTS}
    leaderboard = Leaderboard(**own)
    leaderboard.check()

    from dnpo.policy.model import device_of
    from dnpo.running.console import Console
    from dnpo.running.ending import list_places
    from dnpo.store.provenance import commit

    command.prepare_torch(top["threads"])
    folder, sweep = command.folders(job)
    model, tracking = build("model", settings["model"]), build("tracking", settings["tracking"]).open()
    name = settings["model"].get("path") or settings["model"].get("name")
    console = Console()
    policy = model.load(folder, device=device_of(top["device"]))
    everything = {**top, **own, **settings}
    tags = {"dnpo.kind": "leaderboard", "dnpo.model": str(name), "dnpo.commit": commit()}
    with command.track(tracking, f"leaderboard of {name}", everything, tags, sweep, folder):
        with console.stage("leaderboard", lambda *_: None) as progress:
            result = measure(policy, leaderboard, progress)
        result.write(folder, {"model": model.identity(), "settings": everything})
        tracking.metrics(result.metrics(), 0)
        for made in (SCORES, ITEMS):
            tracking.artifact(folder / made, "leaderboard")
    console.say(f"\nLeaderboard of {name}")
    console.table(table(result))
    for note in result.notes():
        console.tell(f"note: {note}")
    pages = tracking.whereabouts() if sweep is None else ()  # a sweep ends with them
    for line in ("", *list_places({"results": folder}, pages)):
        console.place(line)


def table(result: LeaderboardResult) -> "ScreenTable":
    """Build the table: a row for each benchmark, for each further task, and for the average of the six."""
    from dnpo.screen import ScreenTable

    made = ScreenTable(header_style="bold", pad_edge=False, box=None)
    made.add_column("benchmark")
    for heading in ("score", "items", "examples", "cut", "s"):
        made.add_column(heading, justify="right", no_wrap=True)
    for name, score in result.scores.items():
        few, many = score.shots
        shots = str(few) if few == many else f"{few}-{many}"
        shots += f" of {score.asked}" if few < score.asked else ""
        shown = metric(name_metric(name, score))
        cells = (shown.format_with_unit(score.score), str(score.items), shots, str(score.cut), f"{score.seconds:.0f}")
        made.add_row(name, *cells)
    average = "–" if result.average is None else metric("leaderboard/average").format_with_unit(result.average)
    made.add_row("average", average, str(len(result.items)), "", "", f"{result.seconds:.0f}", style="bold")
    return made
