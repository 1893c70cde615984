"""Find runs, and the stages of each in its store."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dnpo.errors import DataError, TrackingError
from dnpo.report.selection import SUMMARY, describe_no_run, select
from dnpo.settings import flat
from dnpo.store import MANIFEST
from dnpo.store.provenance import find_cwd
from dnpo.tracking.client import make_absolute
from dnpo.tracking.reading import SFT, Database
from dnpo.tracking.sqlite import file_of

DIFFERENCES, LONGEST = 2, 40  # maximum number of settings in a run's name, and of characters of each
WHERE = ("store", "ledger", "tracking", "remote", "launch", "threads", "device", "plan", "check", "wide", "verify")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        name: a unique name among the shown runs.
        summary: content of ``summary.json``.
        store: the folder of finished stages.
    """

    name: str
    summary: Mapping[str, Any] = field(repr=False)
    store: Path

    @property
    def split(self) -> str:
        """The split that the policies were evaluated on."""
        return str(self.summary["settings"].get("eval", {}).get("split", "test"))

    @property
    def seed(self) -> int | None:
        """The run's seed; None if its summary has none."""
        found = self.summary["settings"].get("seed")
        return None if found is None else int(found)

    @property
    def prompts(self) -> Path:
        """The folder of the run's prompts."""
        return self._folder(next(stage for stage in self._stages if stage["stage"] == "prompts"))

    def evaluations(self) -> Iterator[tuple[str, Path]]:
        """Yield each iteration, ``SFT`` or a number, with the folder of its evaluation."""
        for stage in self._stages:
            if stage["stage"] == "evaluate":
                yield str(stage["iteration"]), self._folder(stage)

    def scored_by(self) -> str:
        """What identifies the judge that scored the evaluations; runs with different ones cannot be compared."""
        *_, (_, folder) = self.evaluations()
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return json.dumps(manifest["settings"].get("judge"), sort_keys=True)

    def trained_on(self) -> Iterator[tuple[str, Path]]:
        """Yield each iteration's number with the Parquet file of its training data: pairs or rollouts."""
        for stage in self._stages:
            if stage["stage"] != "evaluate" or stage["iteration"] == SFT:
                continue
            pairs, policy = (self._find(stage["inputs"].get(name)) for name in ("pairs", "policy"))
            if pairs is not None:
                yield str(stage["iteration"]), pairs / "pairs.parquet"
            elif policy is not None and (policy / "rollouts.parquet").is_file():
                yield str(stage["iteration"]), policy / "rollouts.parquet"

    def second_judging(self, evaluation: Path) -> Path | None:
        """The folder with a second judge's scores of an evaluation; None if there is none."""
        return self._made_from("second", "evaluation", evaluation.name)

    def reference(self, pairs: Path) -> Path | None:
        """The folder with the reference's log-probabilities of pairs; None if there is none."""
        return self._made_from("reference", "pairs", pairs.parent.name)

    def _made_from(self, kind: str, name: str, key: str) -> Path | None:
        for stage in self._stages:
            if stage["stage"] == kind and stage["inputs"].get(name) == key:
                return self._folder(stage)
        return None

    @property
    def _stages(self) -> Sequence[Mapping[str, Any]]:
        stages: Sequence[Mapping[str, Any]] = self.summary["stages"]
        return stages

    def _find(self, key: str | None) -> Path | None:
        return next((self._folder(stage) for stage in self._stages if stage["key"] == key), None)

    def _folder(self, stage: Mapping[str, Any]) -> Path:
        return self.store / str(stage["stage"]) / str(stage["key"])


def is_there(folder: Path) -> bool:
    """Whether a stage is finished and in the store."""
    return (folder / MANIFEST).is_file()


def digest(runs: Sequence[Run]) -> str:
    """A short hash of the runs' stages; a link contains it to identify its runs."""
    keys = [[stage["key"] for stage in run.summary["stages"]] for run in runs]
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:8]


def find(given: Sequence[str], store: Path | None, uri: str, experiment: str) -> list[Run]:
    """Find runs.

    Args:
        given: each a folder of a run or sweep, a tracked run's id or its beginning, or a sweep's name. If empty: the
            newest run in ``outputs``.
        store: the store's folder, if it has moved.
        uri, experiment: where runs were tracked.

    Raises:
        DataError: a run does not exist or has not finished.
        TrackingError: a name is not a folder, and there is no tracking store to look it up in.
    """
    runs = [run for each in given or [_newest()] for run in _find(each, store, uri, experiment)]
    distinct = list({json.dumps([run.summary["stages"], str(run.store)]): run for run in runs}.values())
    return _name_apart(distinct)


def _newest() -> str:
    found = sorted(Path("outputs").glob(f"*/*/{SUMMARY}"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise DataError(
            f"outputs/: there is no finished run in {Path.cwd()}; give a run's folder, such as outputs/DATE/TIME, "
            "a tracked run's id, or a sweep's name"
        )
    return str(found[-1].parent)


def _find(given: str, store: Path | None, uri: str, experiment: str) -> Iterator[Run]:
    folder = Path(given)
    if (folder / SUMMARY).is_file():
        yield _run(_name(_read(folder), folder.name), _read(folder), store)
        return
    jobs = sorted((path.parent for path in folder.glob(f"*/{SUMMARY}")), key=_by_number) if given else []
    if jobs:
        for job in jobs:
            yield _run(_name(_read(job), job.name), _read(job), store)
        return
    if folder.is_dir() and given:
        raise DataError(describe_no_run(folder, "browse"))
    try:
        selection = select(Database(uri, experiment), given)
    except TrackingError as error:
        raise TrackingError(f"{given}: there is no such folder, and no tracked run: {error}") from error
    file = file_of(make_absolute(uri))
    near = Path.cwd() if file is None else file.parent
    finished = [run for run in selection.runs if run.finished]
    if not finished:
        raise DataError(f"{given}: no run of it has finished")
    for run in finished:
        # if the run's working folder is not tracked, take the database's folder, which is the same by default
        known = Path(str(run.summary.get("cwd", ""))).is_absolute()
        yield _run(run.name, run.summary if known else run.summary | {"cwd": str(near)}, store)


def _by_number(job: Path) -> tuple[int, str]:
    return (int(job.name), "") if job.name.isdecimal() else (10**9, job.name)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / SUMMARY
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: it is not the summary of a run ({error})") from error
    return found | {"cwd": find_cwd(found, folder)} if "cwd" in found else found


def _run(name: str, summary: Mapping[str, Any], store: Path | None) -> Run:
    try:
        root = store or Path(summary["cwd"], summary["settings"]["store"])
        run = Run(name, summary, root.absolute())
        needed = [run.prompts, *(folder for _, folder in run.evaluations())]
    except (KeyError, TypeError, StopIteration) as error:
        raise DataError(
            f"{name}: its {SUMMARY} does not describe a training run, or an earlier version wrote it"
        ) from (error)
    if len(needed) == 1:
        raise DataError(f"{name}: none of its policies was evaluated")
    missing = [folder for folder in needed if not is_there(folder)]
    if missing:
        raise DataError(
            f"{name}: {'/'.join(missing[0].parts[-2:])} is not in {run.store}; give store=FOLDER if the store has "
            "moved, or run the same command again"
        )
    return run


def _name(summary: Mapping[str, Any], folder: str) -> str:
    method = summary.get("choices", {}).get("method")
    seed = summary.get("settings", {}).get("seed")
    return f"{method or folder}, seed {seed}" if seed is not None else str(method or folder)


def _name_apart(runs: Sequence[Run]) -> list[Run]:
    """Add the options and settings that differ to runs of the same name; number those that are still alike."""
    alike = {name: [run for run in runs if run.name == name] for name in Counter(run.name for run in runs)}
    names = [run.name + _difference(run, alike[run.name]) for run in runs]
    counts, seen = Counter(names), Counter[str]()
    named = []
    for run, name in zip(runs, names, strict=True):
        seen[name] += 1
        named.append(replace(run, name=f"{name} ({seen[name]})" if counts[name] > 1 else name))
    return named


def _difference(run: Run, others: Sequence[Run]) -> str:
    """The options and settings in which a run differs from others; empty if they are too many for a name."""
    chosen = _differing([each.summary.get("choices", {}) for each in others])
    settings = [flat(each.summary["settings"]) for each in others]
    parts = (*chosen, *WHERE)
    set_otherwise = [key for key in _differing(settings) if key.split(".")[0] not in parts]
    if len(chosen) + len(set_otherwise) > DIFFERENCES:
        return ""
    choices, values = run.summary.get("choices", {}), flat(run.summary["settings"])
    texts = [
        f"{key}={source.get(key)}" for keys, source in ((chosen, choices), (set_otherwise, values)) for key in keys
    ]
    return "".join(f", {text}" for text in texts if len(text) <= LONGEST)


def _differing(trees: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for tree in trees for name in tree)
    return [name for name in names if len({repr(tree.get(name)) for tree in trees}) > 1]
