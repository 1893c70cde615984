"""Measure a policy on the six benchmarks of the Open LLM Leaderboard: scores, average, and the result of every item.

``rows.py`` turns a folder of JSON lines into lm-eval's tasks. ``harness.py`` runs these tasks, or the hub's, with
lm-eval. This file defines the benchmarks and computes their scores from the results of the items. lm-eval comes with
the extra ``eval``; only ``harness.py`` imports it.
"""

import math
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnpo.errors import ModelError, SettingsError
from dnpo.evaluate.leaderboard.rows import BenchmarkTask, offline
from dnpo.settings import Count, Natural, neutral, offer, place
from dnpo.store import Report, content_hash, write_json

if TYPE_CHECKING:
    from dnpo.policy.model import Policy

ITEMS, SCORES = "leaderboard-items.parquet", "leaderboard.json"
HUB = "hub"


@dataclass(frozen=True)
class Benchmark:
    """The definition of one benchmark.

    Attributes:
        shots: number of examples before each question, as in Yang et al. 2025.
        tasks: names of lm-eval's tasks.
        metric: lm-eval's metric; normalised accuracy if lm-eval has it.
        filter: name of lm-eval's filter that extracts the answer, if it has several.
        pooled: whether the score is the mean over all items instead of the mean of the tasks' means.
    """

    shots: int
    tasks: tuple[str, ...]
    metric: str = "acc"
    filter: str = "none"
    pooled: bool = False


BENCHMARKS: Mapping[str, Benchmark] = {
    "arc": Benchmark(25, ("arc_easy", "arc_challenge"), "acc_norm"),
    "truthfulqa": Benchmark(0, ("truthfulqa_mc1", "truthfulqa_mc2")),
    "winogrande": Benchmark(5, ("winogrande",)),
    "gsm8k": Benchmark(5, ("gsm8k",), "exact_match", "strict-match"),
    "hellaswag": Benchmark(10, ("hellaswag",), "acc_norm"),
    "mmlu": Benchmark(5, ("mmlu",), pooled=True),
    "ifeval": Benchmark(0, ("ifeval",), "prompt_level_strict_acc"),
}
SIX = ("arc", "truthfulqa", "winogrande", "gsm8k", "hellaswag", "mmlu")
WITHOUT_SHOTS = ("truthfulqa", "ifeval")


@dataclass(frozen=True, kw_only=True)
class Leaderboard:
    """The measurement on benchmarks.

    Args:
        source: ``hub``, or a folder of JSON lines as ``rows.py`` describes it.
        benchmarks: some of ``arc``, ``truthfulqa``, ``winogrande``, ``gsm8k``, ``hellaswag``, ``mmlu`` and ``ifeval``;
            by default all but ``ifeval``. The average needs these six.
        shots: number of examples before each question, by benchmark; by default the paper's.
        limit: use only this number of items of each of lm-eval's tasks (MMLU has 57 tasks); by default all.
        batch_size: sequences in a batch.
        tasks: further tasks, groups or tags of lm-eval by name, such as ``[ifeval]``, each with its own number of
            examples unless ``shots`` names it. The score is the first metric; for several tasks, their mean.
        include_path: a folder with your own tasks as lm-eval's YAML files. Put their data there too, so that the tasks
            are measured again when the data change.

    Raises:
        SettingsError: there is no such benchmark, or it takes no examples.
    """

    source: str = place(HUB)
    benchmarks: list[str] | None = None
    shots: Mapping[str, Natural] | None = None
    limit: Count | None = None
    batch_size: Count = neutral(16)
    tasks: list[str] | None = None
    include_path: str | None = place(None)

    def __post_init__(self) -> None:
        if not self.names and not self.tasks:
            raise SettingsError(f"benchmarks: none given; expected some of {', '.join(BENCHMARKS)}, or tasks=[…]")
        if self.include_path is not None and not self.tasks:
            raise SettingsError(f"include_path={self.include_path}: has an effect only with tasks=[…]")
        for name in (*self.names, *(self.shots or {})):
            if name not in BENCHMARKS and not (name in (self.tasks or ()) and name not in self.names):
                raise SettingsError(f"benchmarks: there is no {name}.{offer(name, BENCHMARKS)}")
        for name in WITHOUT_SHOTS:
            if self.examples.get(name):
                raise SettingsError(f"shots.{name}={self.examples[name]}: expected 0, this benchmark takes no examples")

    @property
    def names(self) -> list[str]:
        """The benchmarks, each once."""
        return list(dict.fromkeys(SIX if self.benchmarks is None else self.benchmarks))

    @property
    def examples(self) -> dict[str, int]:
        """The number of examples before each question, by benchmark."""
        return {name: int((self.shots or {}).get(name, BENCHMARKS[name].shots)) for name in self.names}

    def check(self) -> None:
        """Check that lm-eval is installed, and that the rows of a folder can be used.

        Raises:
            SettingsError: lm-eval is not installed, or the source is neither ``hub`` nor a folder.
            DataError: a file is missing, or a row cannot be used.
        """
        from dnpo.evaluate.leaderboard import harness

        harness.available()
        for name in self.names:
            _tasks(self.source, name)
        self.load()

    def load(self) -> dict[str, dict[str, Any]]:
        """Load ``tasks`` with lm-eval; return, for each of these names, lm-eval's tasks.

        Raises:
            SettingsError: there is no such task.
            DataError: the data of a task cannot be read.
        """
        from dnpo.evaluate.leaderboard import harness

        names = list(dict.fromkeys(self.tasks or ()))
        return harness.of_names(names, self.include_path, self.shots or {}) if names else {}

    def identity(self) -> dict[str, Any]:
        """The settings that decide the results, with the contents of the source in place of its path.

        Raises:
            SettingsError: the source is neither ``hub`` nor a folder.
        """
        source = HUB if self.source == HUB else content_hash(_folder(self.source))
        return {"source": source, "shots": self.examples, "limit": self.limit, **self._identity_of_tasks()}

    def _identity_of_tasks(self) -> dict[str, Any]:
        """The tasks, lm-eval's version, and the contents of the folder of the user's own tasks; empty without tasks."""
        if not self.tasks:
            return {}
        shots = {name: count for name, count in (self.shots or {}).items() if name not in BENCHMARKS}
        try:
            version = metadata.version("lm_eval")
        except metadata.PackageNotFoundError:  # the checks before the run refuse it
            version = ""
        own = {}
        if self.include_path is not None:
            if not Path(self.include_path).is_dir():
                raise SettingsError(f"include_path={self.include_path}: there is no such folder")
            own = {"own": content_hash(Path(self.include_path))}
        return {"tasks": list(dict.fromkeys(self.tasks)), "task_shots": shots, "lm_eval": version, **own}


@dataclass(frozen=True, slots=True)
class BenchmarkItem:
    """The result of one item; rows of ``leaderboard-items.parquet``.

    Attributes:
        benchmark: its benchmark, or the name given in ``tasks``.
        task: name of lm-eval's task.
        id: the id of its row, or a hash of its contents; unique within the task and the same for every model.
        prompt_hash: SHA-256 of the text before the (first) answer; the same for the same question and examples.
        score: 0 or 1; for TruthfulQA's mc2 the probability of the true answers; for other tasks lm-eval's metric, NaN
            if it has no value for a single item.
        accuracy: the score without normalisation by length.
        gold: index of the right choice, or the right answer. For Winogrande, the words after both beginnings; for
            TruthfulQA's mc2, 0, since several choices are true.
        logps: log-likelihood of every choice, in nats; empty for generated answers.
        response: the generated answer; "" for choices.
        cut: whether the prompt was longer than the model's context and lost its beginning.
    """

    benchmark: str
    task: str
    id: str
    prompt_hash: str
    score: float
    accuracy: float
    gold: str
    logps: list[float]
    response: str
    cut: bool


@dataclass(frozen=True)
class Score:
    """A benchmark's score.

    Attributes:
        score: from 0 to 1.
        tasks: the score of each of lm-eval's tasks.
        shots: number of examples before each question, the smallest and the largest over the tasks.
        asked: number of examples asked for.
        cut: number of items whose prompt was longer than the model's context and lost its beginning.
        notes: deviations from the paper's setting, one sentence each.
        metric: lm-eval's metric, of a task that is not one of the benchmarks.
    """

    score: float
    items: int
    tasks: dict[str, float]
    shots: tuple[int, int]
    asked: int
    cut: int
    seconds: float
    notes: list[str]
    metric: str = ""


def name_metric(name: str, score: Score) -> str:
    """The name under which the score of a benchmark, or of another task, is tracked."""
    return f"tasks/{name}" if score.metric else f"leaderboard/{name}"


@dataclass(frozen=True)
class LeaderboardResult:
    """The scores, their average (None if one of the six is missing), the seconds, and the result of every item."""

    scores: dict[str, Score]
    average: float | None
    seconds: float
    items: list[BenchmarkItem]

    def metrics(self) -> dict[str, float]:
        """The metrics, by the names under which they are tracked."""
        metrics = {name_metric(name, score): score.score for name, score in self.scores.items()}
        average = {"leaderboard/average": self.average} if self.average is not None else {}
        return {**metrics, **average, "leaderboard/seconds": self.seconds}

    def notes(self) -> list[str]:
        """The notes of all benchmarks."""
        return [f"{name}: {note}" for name, score in self.scores.items() for note in score.notes]

    def write(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write ``leaderboard.json``, including ``about``, and ``leaderboard-items.parquet``."""
        from dnpo import tables

        rows: Any = self.items
        kind: Any = BenchmarkItem
        tables.write(folder / ITEMS, rows, kind)
        scores = {name: asdict(score) for name, score in self.scores.items()}
        write_json(folder / SCORES, {**about, "average": self.average, "seconds": self.seconds, "scores": scores})


def measure(policy: "Policy", leaderboard: Leaderboard, report: Report) -> LeaderboardResult:
    """Measure a policy, and restore its mode, its attention and the state of every random generator.

    Raises:
        SettingsError: lm-eval is not installed, or the source is neither ``hub`` nor a folder.
        DataError: a file is missing or a row cannot be used, or the hub does not answer.
        ModelError: a log-likelihood is not a number, or an answer is longer than the model's context.
    """
    from dnpo.evaluate.leaderboard import harness

    harness.available()
    started = time.monotonic()
    tasks = {name: _tasks(leaderboard.source, name) for name in leaderboard.names}  # rows are checked first
    further = leaderboard.load()
    report.begin(len(tasks) + len(further), "benchmarks")
    scores: dict[str, Score] = {}
    items: list[BenchmarkItem] = []
    with harness.running(policy, leaderboard.batch_size) as lm:
        for name, those in tasks.items():
            report.status(name)
            began = time.monotonic()
            asked = leaderboard.examples[name]
            loaded = harness.of_rows(those, asked) if those else harness.of_hub(BENCHMARKS[name].tasks, asked)
            found = [
                _item(name, sample, lm.cut)
                for sample in harness.run(lm, loaded, leaderboard.limit)
                if sample["filter"] == BENCHMARKS[name].filter
            ]
            shots = [min(asked, len(task.examples)) for task in those] or [asked]
            notes = _notes(those, shots, asked, found, lm.max_length)
            scores[name] = _score(BENCHMARKS[name], found, shots, asked, time.monotonic() - began, notes)
            items += found
            report.advance()
        for name, loaded in further.items():
            report.status(name)
            scores[name], found = _measure_task(lm, name, loaded, leaderboard.limit)
            items += found
            report.advance()
    report.status("")
    average = _mean(scores[name].score for name in SIX) if all(name in scores for name in SIX) else None
    return LeaderboardResult(scores, average, time.monotonic() - started, items)


def _measure_task(
    lm: Any, name: str, loaded: Mapping[str, Any], limit: int | None
) -> tuple[Score, list[BenchmarkItem]]:
    """Measure one of ``tasks`` (a group: all its tasks) by each task's first metric, as lm-eval computes it."""
    from dnpo.evaluate.leaderboard import harness

    began = time.monotonic()
    samples, results = harness.run_named(lm, loaded, limit)
    metrics = {task: harness.first_metric(loaded[task], found) for task, found in results.items()}
    values = {task: float(results[task][",".join(metric)]) for task, metric in metrics.items()}
    items = [
        _item(name, sample, lm.cut, metrics[sample["task"]][0])
        for sample in samples
        if sample["filter"] == metrics[sample["task"]][1]
    ]
    used = " and ".join(dict.fromkeys(metric for metric, _ in metrics.values()))
    shots = [int(task.config.num_fewshot or 0) for task in loaded.values()]
    cut = sum(item.cut for item in items)
    notes = [f"the score is lm-eval's {used}, on {'the task' if len(values) == 1 else f'{len(values)} tasks'}"]
    notes += [f"{cut} of {len(items)} items lost the beginning of their prompt"] if cut else []
    score = Score(
        score=_mean(values.values()),
        items=len(items),
        tasks=values,
        shots=(min(shots), max(shots)),
        asked=min(shots),
        cut=cut,
        seconds=time.monotonic() - began,
        notes=notes,
        metric=used,
    )
    return score, items


def _tasks(source: str, name: str) -> list[BenchmarkTask]:
    """A benchmark's tasks over the files of a folder; none for ``hub``, where lm-eval has its own.

    Raises:
        SettingsError: the source is neither ``hub`` nor a folder, or the benchmark is only on the hub.
    """
    if source == HUB:
        return []
    _folder(source)
    if name == "ifeval":
        raise SettingsError("benchmarks: ifeval is only on the hub; leave it out, or give source=hub")
    return [task for each in BENCHMARKS[name].tasks for task in offline(Path(source), each)]


def _folder(source: str) -> Path:
    if not Path(source).is_dir():
        raise SettingsError(f"source={source}: there is no such folder; expected hub, or a folder of JSON lines")
    return Path(source)


def _item(
    benchmark: str, sample: Mapping[str, Any], cut: Container[tuple[str, int]], metric: str = ""
) -> BenchmarkItem:
    """The result of one of lm-eval's samples, which carries its task's name as ``task``.

    Args:
        metric: lm-eval's metric; by default the benchmark's. The score is NaN if an item has no number.
    """
    task, doc = str(sample["task"]), sample["doc"]
    name = str(doc.get("id") or sample["doc_hash"][:16])
    choices = [float(logp) for logp, _ in sample["filtered_resps"]] if _is_choice(sample) else []
    # With NaNs, argmax returns the first one, so that choice would count as the answer.
    if not all(map(math.isfinite, choices)):
        raise ModelError(f"{task}, item {name}: the log-likelihoods of the choices are {choices}, expected numbers")
    value = sample.get(metric) if metric else sample[BENCHMARKS[benchmark].metric]
    score = _number(value)
    return BenchmarkItem(
        benchmark=benchmark,
        task=task,
        id=name,
        prompt_hash=sample["prompt_hash"],
        score=score,
        accuracy=float(sample.get("acc", score)),
        gold=str(sample["target"]),
        logps=choices,
        response="" if choices else str(sample["resps"][0][0]),
        cut=(task, sample["doc_id"]) in cut,
    )


def _number(value: Any) -> float:
    """The value as a number; NaN if it is another object, such as an item's part of a metric over all items."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _is_choice(sample: Mapping[str, Any]) -> bool:
    return isinstance(sample["filtered_resps"][0], tuple)


def _notes(
    tasks: Sequence[BenchmarkTask], shots: Sequence[int], asked: int, items: Sequence[BenchmarkItem], context: int
) -> list[str]:
    """List deviations from the paper's setting."""
    notes = list(dict.fromkeys(task.note for task, count in zip(tasks, shots, strict=False) if count and task.note))
    if min(shots) < asked:
        few = f"{min(shots)}" if min(shots) == max(shots) else f"{min(shots)} to {max(shots)}"
        notes.append(f"{few} of {asked} examples before each question: there are no more rows")
    if cut := sum(item.cut for item in items):
        notes.append(
            f"{cut} of {len(items)} items lost the beginning of their prompt: the context has {context} tokens"
        )
    return notes


def _score(
    benchmark: Benchmark,
    items: Sequence[BenchmarkItem],
    shots: Sequence[int],
    asked: int,
    seconds: float,
    notes: list[str],
) -> Score:
    """The mean of the tasks' means, or the mean over all items if the benchmark is pooled."""
    by_task: dict[str, list[float]] = {}
    for item in items:
        by_task.setdefault(item.task, []).append(item.score)
    tasks = {task: _mean(values) for task, values in by_task.items()}
    return Score(
        score=_mean(item.score for item in items) if benchmark.pooled else _mean(tasks.values()),
        items=len(items),
        tasks=tasks,
        shots=(min(shots), max(shots)),
        asked=asked,
        cut=sum(item.cut for item in items),
        seconds=seconds,
        notes=notes,
    )


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)
