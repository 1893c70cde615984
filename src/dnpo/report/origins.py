"""Show where the numbers come from: settings, stages, time, versions."""

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any, cast

from dnpo.errors import SettingsError
from dnpo.report.groups import Groups, is_complete, iteration_title
from dnpo.report.page import strip_secrets
from dnpo.settings import conf_folder, flat
from dnpo.tracking.earlier import complete
from dnpo.tracking.neutral import find_neutral
from dnpo.tracking.reading import TrackedRun, describe_assumed
from dnpo.wording import sentence

Setting = tuple[str, list[str], str]  # name, the runs' values, default
UNDERSCORED = ("_target_", "_partial_")


@cache
def defaults(seed: int) -> tuple[dict[str, str], dict[str, str]]:
    """Return the default settings by dotted name, and the default option of each part; empty if not found."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    try:
        folder = conf_folder()
    except SettingsError:
        return {}, {}
    with initialize_config_dir(str(folder), version_base="1.3"):
        composed = compose("train", [f"seed={seed}"], return_hydra_config=True)
    options = {str(name): str(value) for name, value in composed.hydra.runtime.choices.items()}
    tree = {name: value for name, value in composed.items() if name != "hydra"}
    settings = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(tree), resolve=True))
    return complete({name: str(value) for name, value in flat(settings).items()}), options


def settings(runs: Sequence[TrackedRun], groups: Groups) -> dict[str, Any]:
    """Return the options and settings that differ from the defaults, and all others, each with the runs' values.

    ``assumed`` are sentences on settings that only some of the runs recorded.
    """
    usual, options = defaults(runs[0].seed)
    chosen: list[Setting] = []
    changed: list[Setting] = []
    rest: list[Setting] = []
    for name in sorted({name for run in runs for name in run.tags if name.startswith("dnpo.")}):
        group = name.removeprefix("dnpo.")
        values = _values(run.tags.get(name, "") for run in runs)
        if group in options and values != [options[group]]:
            chosen.append((group, values, options[group]))
    neutral = frozenset.intersection(*(find_neutral(run.params) for run in runs))
    for name in sorted({name for run in runs for name in run.params}):
        values = _values(run.params.get(name, "") for run in runs)
        row = (name, [strip_secrets(value) or "–" for value in values], strip_secrets(usual.get(name, "")))
        seedlike = name == "seed" or name.endswith(".seed")
        alike = all(_is_same(value, usual.get(name)) for value in values if value)
        hidden = seedlike or name.endswith(UNDERSCORED) or name in neutral
        (rest if alike or hidden or not usual else changed).append(row)
    return {
        "varies": groups.varies,
        "chosen": chosen,
        "changed": changed,
        "rest": rest,
        "known": bool(usual),
        "assumed": _list_assumed(runs, neutral),
    }


def _list_assumed(runs: Sequence[TrackedRun], neutral: Collection[str]) -> list[str]:
    """Sentences on settings that only some of the runs recorded, in the words of figures and claims."""
    assumed: dict[str, set[str]] = {}
    for name in sorted({name for run in runs for name in run.assumed}):
        silent = {run.id for run in runs if name in run.assumed}
        if len(silent) < len(runs) and name not in neutral and not name.endswith(UNDERSCORED):
            assumed[name] = silent
    return [sentence(note) for note in describe_assumed(assumed, {run.id: run for run in runs})]


def _values(value: Any) -> list[str]:
    return list(dict.fromkeys(value))


def _is_same(a: str, b: str | None) -> bool:
    """Return whether two settings have the same value, such as ``1`` and ``1.0``."""
    if b is None:
        return False
    try:
        return a == b or float(a) == float(b)
    except ValueError:
        return False


def stages(runs: Sequence[TrackedRun]) -> list[dict[str, Any]]:
    """List every stage once, in the order of the first run that has it.

    Each has ``title``, ``key``, ``iteration``, ``seconds`` (None if not recorded), ``inputs`` (names and keys), and the
    indices in ``runs`` of the runs that ``computed`` or ``reused`` it. For a run without a summary only the keys are
    known; its stages count as ``planned``.
    """
    by_key: dict[str, dict[str, Any]] = {}
    for place, run in enumerate(runs):
        for each in _stages(run):
            entry = {"computed": [], "reused": [], "planned": [], **each}
            known = by_key.setdefault(each["key"], entry)
            known["seconds"] = known["seconds"] if known["seconds"] is not None else each["seconds"]
            known[each["how"]].append(place)
    places = {key: number for number, key in enumerate(by_key)}
    for entry in by_key.values():
        entry["inputs"] = [(name, key, places.get(key)) for name, key in entry["inputs"].items()]
    return list(by_key.values())


def _stages(run: TrackedRun) -> list[dict[str, Any]]:
    if not is_complete(run):
        return [
            {
                "title": name.removeprefix("stage."),
                "key": key,
                "iteration": None,
                "seconds": None,
                "inputs": {},
                "how": "planned",
            }
            for name, key in run.tags.items()
            if name.startswith("stage.")
        ]
    return [
        {
            "title": each["title"],
            "key": each["key"],
            "iteration": each.get("iteration"),
            "seconds": each.get("seconds"),
            "inputs": each.get("inputs", {}),
            "how": "reused" if each["reused"] else "computed",
        }
        for each in run.summary.get("stages", [])
    ]


def costs(runs: Sequence[TrackedRun]) -> dict[str, Any]:
    """Return time and money: seconds by kind of stage and in total, reused stages, and what judges cost if recorded."""
    finished = [run for run in runs if is_complete(run)]
    kinds: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    # the run with the most stages first, so that a kind that other runs lack has its place in time too
    for run in sorted(finished, key=lambda run: -len(run.summary.get("stages", []))):
        for each in run.summary.get("stages", []):
            name = each["title"].rpartition(" · ")[2]
            kind = kinds.setdefault(name, {"computed": 0, "reused": 0, "seconds": None})
            kind["reused" if each["reused"] else "computed"] += 1
            if each.get("seconds") is not None and each["key"] not in seen:
                kind["seconds"] = (kind["seconds"] or 0.0) + each["seconds"]
            seen.add(each["key"])
    return {
        "kinds": kinds,
        "timed": any(kind["seconds"] is not None for kind in kinds.values()),
        "runs": [
            (run.name, [(iteration_title(row["iteration"]), row.get("seconds")) for row in run.table])
            for run in finished
        ],
        "took": sum(run.seconds for run in runs if run.seconds is not None),
        "money": _money(finished),
    }


def _money(runs: Sequence[TrackedRun]) -> list[tuple[str, float]]:
    """Sum the metrics of judges' calls and costs over policies and runs."""
    sums: dict[str, float] = {}
    for run in runs:
        for row in run.table:
            for name, value in row.items():
                if name.endswith(("/calls", "/cost", "/spend")) and isinstance(value, int | float):
                    sums[name] = sums.get(name, 0.0) + value
    return sorted(sums.items())


def lineage(runs: Sequence[TrackedRun], own: TrackedRun | None) -> dict[str, Any]:
    """Return the runs with their policies, their stages, package versions and commits."""
    entries: list[Mapping[str, Any]] = []
    versions: dict[str, list[str]] = {}
    for run in runs:
        summary = run.summary if is_complete(run) else {}
        for package, version in summary.get("versions", {}).items():
            versions.setdefault(package, [])
            if version not in versions[package]:
                versions[package].append(version)
        iterations = [row["iteration"] for row in summary.get("table", [])]
        policies = list(zip(map(iteration_title, iterations), summary.get("policies", []), strict=False))
        commit = summary.get("commit") or run.tags.get("dnpo.commit", "")
        entries.append({"run": run, "policies": policies, "commit": commit})
    return {
        "runs": entries,
        "own": own,
        "stages": stages(runs),
        "versions": versions,
        "commits": _values(entry["commit"] or "not known" for entry in entries),
        "mixed": [name for name, found in versions.items() if len(found) > 1],
    }
