"""Measure how well a judge agrees with people: check the settings, judge the rows, report the result.

The settings are ``conf/agreement.yaml`` and, as for ``dnpo.train``, the folders for judges and tracking.
"""

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dnpo.commands import common as command
from dnpo.errors import SettingsError
from dnpo.judges.agreement.rows import Labelled
from dnpo.settings import Count, Natural, build, check_values, part_key
from dnpo.settings import check as check_part
from dnpo.store import Verify

PARTS = ("judge", "tracking")


def top_settings(
    *,
    resamples: Count,
    seed: Natural,
    threads: Count,
    store: str,
    remote: str | None = None,
    verify: Verify,
    ledger: str,
) -> None:
    """The settings outside the parts.

    Args:
        resamples: number of bootstrap resamples.
        seed: seed of the bootstrap.
        threads: number of torch's CPU threads.
        store: folder of finished stages, shared with runs (setting ``store.root``).
        remote: address of a store shared with other machines (setting ``store.remote``).
        verify: how stages are checked at their first use: by ``digests`` or ``sizes``.
        ledger: file of judge calls, so that none is paid for twice.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``python -m dnpo.judges.agreement``."""
    given = sys.argv[1:] if arguments is None else arguments
    # otherwise Hydra would look for data=FILE among the options in conf/data
    command.run(
        "agreement",
        ("dnpo.judges.agreement", "judge agreement"),
        _run,
        "The judge's replies are kept: run the same command again.",
        arguments=[re.sub(r"^data=", "data.path=", argument) for argument in given],
    )


def _check(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the settings outside the parts, of the data, and of each part.

    Raises:
        SettingsError: names the first setting that is unknown, missing or out of range.
    """
    tree = command.plain(cfg, {"data.path": "data"})
    top = check_values("", top_settings, {key: value for key, value in tree.items() if key not in (*PARTS, "data")})
    data = check_values("data", Labelled, tree["data"])
    return top, data, {name: check_part(name, tree[name]) for name in PARTS}


def _run(cfg: DictConfig, job: Any) -> None:
    command.greet(cfg, job)
    top, where, settings = _check(cfg)
    data = Labelled(**where)
    rows = data.read()

    from dnpo.judges.asked.ledger import Ledger

    folder, sweep = command.folders(job)
    judge, tracking = build("judge", settings["judge"]), build("tracking", settings["tracking"]).open()
    if not judge.gives_scores:
        raise SettingsError("judge=off gives no scores, so there is nothing to compare; choose a judge")
    command.prepare_torch(top["threads"])  # before a judge loads its model
    problem = judge.accepts([row.prompt for row in rows])
    if problem is not None:
        raise SettingsError(problem)

    from dnpo.judges.agreement import table
    from dnpo.judges.agreement.figure import draw
    from dnpo.running.console import Console
    from dnpo.running.ending import list_places
    from dnpo.seeding import derive
    from dnpo.stages import agreement
    from dnpo.store import manifest, write_json
    from dnpo.store.provenance import commit
    from dnpo.tracking.paths import change_paths, last_part

    console, store = Console(), command.make_store(top)
    store.open(console.say)
    ledger = Ledger(Path(top["ledger"]), os.path.relpath(sweep or folder))
    verdicts = agreement.verdicts(judge, data, rows, ledger)
    seed = derive(top["seed"], "agreement")
    stage = agreement.agreement(judge, data, rows, verdicts, top["resamples"], seed)
    store.check((verdicts, stage), console.say)
    name = " ".join(o for o in (f"judge={job.runtime.choices['judge']}", *_of_judge(job.overrides.task)))
    tags = {
        "dnpo.kind": "agreement",
        "dnpo.judge": str(job.runtime.choices["judge"]),
        "dnpo.data": data.path.name,
        "dnpo.seed": str(top["seed"]),
        "dnpo.commit": commit(),
    }
    everything = {**top, "data": where, **settings}
    title, keys = f"agreement {name} on {data.path.name}", {"agreement": stage.key}
    with ledger, command.track(tracking, title, everything, tags, sweep, folder, keys):
        for made in (verdicts, stage):
            if store.has(made):
                console.report_reuse(made.title, made.key)
            else:
                with console.stage(made.title, lambda *_: None) as progress:
                    store.get(made, progress)
        found = {"judge": name, "key": part_key(judge), "stage": f"{stage.name}/{stage.key}"}
        # the present name of the file: the stage may have been computed from a copy with another name
        found |= {**manifest(store.folder(stage))["facts"], "data": data.path.name}
        points = json.loads((store.folder(stage) / agreement.POINTS).read_text())
        write_json(folder / "agreement.json", {**found, "settings": change_paths(everything, last_part)})
        (folder / "agreement.md").write_text(table.markdown(found), encoding="utf-8")
        for ending in ("png", "svg"):
            draw(found, points, folder / f"agreement.{ending}")
        tracking.metrics(table.numbers(found), 0)
        for ending in ("json", "md", "png", "svg"):
            tracking.artifact(folder / f"agreement.{ending}", "agreement")
    console.say("")
    console.table(table.table(found), fold=True)
    for line in table.notes(found):
        console.tell(line)
    pages = tracking.whereabouts() if sweep is None else ()  # a sweep ends with them
    for line in ("", *list_places({"results": folder, "stages": store.root}, pages)):
        console.place(line)


def _of_judge(overrides: list[str]) -> list[str]:
    """Return the judge's overrides, with user name and password in URLs masked."""
    return [re.sub(r"://[^/@\s]+@", "://…@", o) for o in overrides if o.startswith("judge.")]
