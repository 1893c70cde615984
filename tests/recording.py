"""Runs written into a real MLflow database in the form of real runs, with results drawn from a seed."""

import csv
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from analysis import command
from analysis.selection import CONSTANT, DNPO, DSL, FIXED, NPO, SPIN, Runs, select
from mlflow import MlflowClient
from mlflow.entities import Param

from dnpo.tracking.reading import PARENT, SFT, Database, iteration_name

FAMILIES = ("arithmetic", "conversion", "reversal", "sorting", "counting", "facts")
PARTS = {SPIN: ("off", "off"), DSL: ("score", "off"), NPO: ("off", "trainable"), DNPO: ("score", "trainable")}
PARTS |= {FIXED: ("off", "fixed"), CONSTANT: ("off", "matched")}
GAIN = {SPIN: 0.0, DSL: 6.0, NPO: 0.5, DNPO: 6.5, FIXED: -0.5, CONSTANT: 0.2}
RIVALS = {"spin": (SPIN, 3), "dnpo": (DNPO, 3), "dpo": (SPIN, 1), "mine": (DSL, 2)}  # parts and iterations
TASKS = {
    "arc": {"arc_easy": 12, "arc_challenge": 8},
    "truthfulqa": {"truthfulqa_mc1": 9, "truthfulqa_mc2": 9},
    "winogrande": {"winogrande": 10},
    "gsm8k": {"gsm8k": 7},
    "hellaswag": {"hellaswag": 10},
    "mmlu": {"mmlu_law": 4, "mmlu_art": 11},
}
ITEMS = pa.schema(
    [
        ("id", pa.string()),
        ("family", pa.string()),
        ("kind", pa.string()),
        ("sample", pa.int64()),
        ("score", pa.float64()),
        ("second", pa.float64()),
        ("right", pa.bool_()),
        ("tokens", pa.int64()),
        ("logprob", pa.float64()),
    ]
)


class Recorder:
    """Writes runs into a tracking store as the loop does."""

    def __init__(self, folder: Path, prompts: int = 24, samples: int = 2, sequences: int = 60, steps: int = 40) -> None:
        self.folder, self.uri = folder, f"sqlite:///{folder / 'mlflow.db'}"
        self.prompts, self.samples, self.sequences, self.steps = prompts, samples, sequences, steps
        self.count = 0
        self.parents: dict[tuple[str, str], str] = {}
        self.client = MlflowClient(tracking_uri=self.uri)

    def run(
        self,
        method: str,
        seed: int,
        *,
        experiment: str = "dnpo",
        sweep: str | None = "main",
        iterations: int = 3,
        start: int = 1,
        status: str = "FINISHED",
        params: Mapping[str, str] | None = None,
        texts: bool = False,
        leaderboard: bool = False,
        unscored: int = 0,
        tags: Mapping[str, str] | None = None,
        more: Mapping[str, float] | None = None,
        gain: float = 0.0,
    ) -> str:
        """Record a run; its id.

        Args:
            more: further metrics of every iteration.
            gain: points that every sample scores more.
        """
        dsl, npo = PARTS[method]
        self.count += 1
        settings = {
            "iterations": iterations,
            "seed": seed,
            "store": f"store{self.count}",
            "data._target_": "dnpo.data.tinyworld.TinyWorld",
            "data.seed": seed,
            "objective.beta": 1.0,
            "trainer._target_": "dnpo.optimise.parts.PairOptimisation",
            "trainer.epochs": 2,
            "trainer.steps": 0,
            "dsl._target_": dsl,
            "dsl.start": start,
            "npo._target_": npo,
            "npo.start": start,
            "eval.texts": None,
            "tracking.batch": self.count,
        }
        if npo != "off":
            settings["npo.alpha"] = 0.1
        found = {"dnpo.dsl": dsl, "dnpo.npo": npo, "dnpo.method": "spin", "dnpo.seed": str(seed), "dnpo.kind": "run"}
        found |= {"dnpo.data": "tinyworld", "dnpo.judge": "rules", "dnpo.scale": "tiny", "dnpo.commit": "abcdef0123"}
        found |= tags or {}
        where = self._experiment(experiment)
        if sweep:
            found |= {"dnpo.sweep_name": sweep, PARENT: self._parent(where, sweep)}
        run = str(self.client.create_run(where, run_name=f"{method} seed={seed}", tags=found).info.run_id)
        known = [Param(name, str(value)) for name, value in {**settings, **(params or {})}.items()]
        self.client.log_batch(run, params=known)
        if status == "FINISHED":
            self._leave(run, method, seed, iterations, start, texts, leaderboard, unscored, more or {}, gain)
        if status != "RUNNING":
            self.client.set_terminated(run, status)
        return run

    def _experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        where = (self.folder / "artifacts").as_uri()
        return str(found.experiment_id if found else self.client.create_experiment(name, where))

    def _parent(self, experiment: str, sweep: str) -> str:
        if (experiment, sweep) not in self.parents:
            tags = {"dnpo.kind": "sweep", "dnpo.sweep_name": sweep, "dnpo.sweep": str(self.folder / sweep)}
            run = self.client.create_run(experiment, run_name=f"sweep {sweep}", tags=tags)
            self.parents[experiment, sweep] = str(run.info.run_id)
        return self.parents[experiment, sweep]

    def _leave(
        self,
        run: str,
        method: str,
        seed: int,
        iterations: int,
        start: int,
        texts: bool,
        board: bool,
        unscored: int,
        more: Mapping[str, float],
        gain: float,
    ) -> None:
        folder = self.folder / "work" / str(self.count)
        table = []
        for k in (SFT, *range(iterations)):
            in_force = k != SFT and int(k) >= start
            name = iteration_name(k)
            row, items = self._iteration(method if in_force else SPIN, k, seed, unscored, gain)
            if k != SFT:
                row |= more
            if texts and k != SFT:
                row |= {
                    "texts/bleu": 0.1 + 0.01 * GAIN[method] * in_force + 0.003 * seed,
                    "texts/rouge_l": 0.3 + 0.002 * seed,
                }
            if board:
                scores, found = self._leaderboard(method if in_force else SPIN, seed)
                row |= scores
                (folder / "leaderboard").mkdir(parents=True, exist_ok=True)
                pq.write_table(found, folder / "leaderboard" / f"{name}.parquet")
            table.append(row)
            for kind in ("items", "logprobs", "steps"):
                (folder / kind).mkdir(parents=True, exist_ok=True)
            pq.write_table(items, folder / "items" / f"{name}.parquet")
            np.savez(folder / "logprobs" / f"{name}.npz", **self._logprobs(in_force, k, seed))
            if k != SFT:
                steps = self._steps(PARTS[method][1] if in_force else "off", k, seed)
                (folder / "steps" / f"{name}.json").write_text(json.dumps(steps))
        (folder / "summary.json").write_text(json.dumps({"table": table, "stages": stages_of(table)}))
        self.client.log_artifacts(run, str(folder))

    def _iteration(
        self, method: str, k: int | str, seed: int, unscored: int, gain: float
    ) -> tuple[dict[str, Any], pa.Table]:
        """One policy's items, and the means that the loop makes of them."""
        stage = -1 if k == SFT else int(k)
        seeds = [seed, stage + 1, list(GAIN).index(method)]
        fixed, draw, lost = (np.random.default_rng(each) for each in (1, seeds, [*seeds, 1]))
        rows: list[dict[str, Any]] = []
        hard = fixed.normal(0, 15, self.prompts)
        human = np.clip(np.round(fixed.normal(85, 15, self.prompts)), 0, 100)
        level = 55 + GAIN[method] + gain + draw.normal(0, 1)
        for n in range(self.prompts):
            head = {"id": f"test-{n:05d}", "family": FAMILIES[n % 6], "tokens": 9, "logprob": None}
            human_row = {**head, "kind": "human", "sample": 0, "score": human[n], "second": human[n] - 3, "right": True}
            loss = 0.5 + GAIN[method] / 100 + hard[n] / 500 + lost.normal(0, 0.01)
            rows.append({**human_row, "logprob": -loss * human_row["tokens"]})
            right = bool(draw.random() < 0.4 + GAIN[method] / 40 + hard[n] / 60)
            rows.append({**head, "kind": "greedy", "sample": 0, "score": 60.0, "second": 50.0, "right": right})
            for sample in range(self.samples):
                value = float(np.clip(np.round(level + hard[n] + draw.normal(0, 20)), 0, 100))
                rows.append(
                    {**head, "kind": "sample", "sample": sample, "score": value, "second": value * 0.9, "right": right}
                )
        for row in rows:
            if row["kind"] == "sample" and int(row["id"].removeprefix("test-")) < unscored:
                row["score"] = None
        found: dict[str, Any] = {"iteration": k}
        by = {row["id"]: row for row in rows if row["kind"] == "human"}
        sampled = [row for row in rows if row["kind"] == "sample" and row["score"] is not None]
        for prefix, column in (("eval", "score"), ("second", "second")):
            signs = [np.sign(row[column] - by[row["id"]][column]) for row in sampled]
            found[f"{prefix}/score"] = float(np.mean([row[column] for row in sampled]))
            found[f"{prefix}/score_human"] = float(np.mean([row[column] for row in by.values()]))
            found |= {f"{prefix}/{name}": float(np.mean([s == v for s in signs])) for name, v in WORDS.items()}
        found["eval/loss"] = float(np.mean([-row["logprob"] / row["tokens"] for row in by.values()]))
        greedy = [row for row in rows if row["kind"] == "greedy"]
        for family in FAMILIES:
            found[f"eval/accuracy/{family}"] = float(np.mean([r["right"] for r in greedy if r["family"] == family]))
        found["eval/accuracy"] = float(np.mean([found[f"eval/accuracy/{family}"] for family in FAMILIES]))
        found["stagnation/ks_critical"] = 1.36 * (2 / self.sequences) ** 0.5
        found |= {"drift/initial": 0.1 * (stage + 1) + 0.01 * seed, "eval/tokens": 9.0 + 0.1 * seed}
        if stage >= 0:
            found |= {"generated/tokens": 1000 + seed, "trained/tokens": 5000, "seconds": 3.0}
            found["trained/flop"] = 6.0 * 300_000 * found["trained/tokens"]
            found |= {"judge/verdicts": 40} if method in (DSL, DNPO) else {}
        return found, pa.Table.from_pylist(rows, schema=ITEMS)

    def _leaderboard(self, method: str, seed: int) -> tuple[dict[str, float], pa.Table]:
        """Six benchmarks of tasks that differ in size, scored as ``dnpo.leaderboard`` scores them."""
        draw = np.random.default_rng([seed, list(GAIN).index(method)])
        rows: list[dict[str, Any]] = []
        found: dict[str, float] = {}
        for benchmark, tasks in TASKS.items():
            by_task = {
                task: (draw.random(size) < 0.5 + GAIN[method] / 50).astype(float) for task, size in tasks.items()
            }
            for task, values in by_task.items():
                rows += [
                    {"benchmark": benchmark, "task": task, "id": str(n), "score": value}
                    for n, value in enumerate(values)
                ]
            pooled = benchmark == "mmlu"
            every = [np.concatenate(list(by_task.values()))] if pooled else list(by_task.values())
            found[f"leaderboard/{benchmark}"] = float(np.mean([values.mean() for values in every]))
        found["leaderboard/average"] = float(np.mean(list(found.values())))
        return found, pa.Table.from_pylist(rows)

    def _logprobs(self, moves: bool, k: int | str, seed: int) -> dict[str, Any]:
        draw = np.random.default_rng([seed, 0 if k == SFT else int(k) + 1])
        size = self.sequences
        tokens = {name: draw.integers(4, 16, size) for name in ("chosen", "rejected", "new")}
        shift = {"chosen": -0.4, "rejected": -1.2, "new": -0.8 if moves else -1.2}
        found: dict[str, Any] = {f"{name}_tokens": counts for name, counts in tokens.items()}
        for name, counts in tokens.items():
            found[name] = -counts * draw.gamma(4, -shift[name] / 4, size)
        if k == SFT:
            del found["rejected"], found["rejected_tokens"]
            return found
        return found | {"compared": draw.random(size) < 0.9}

    def _steps(self, npo: str, k: int | str, seed: int) -> list[dict[str, float]]:
        draw = np.random.default_rng([seed, int(k), 7])
        loss = 0.7 - 0.2 * np.arange(self.steps) / self.steps + draw.normal(0, 0.04, self.steps)
        found = [{"step": float(step), "loss/policy": float(value)} for step, value in enumerate(loss)]
        if npo != "off":
            for row in found:
                row["loss/noise"] = -row["loss/policy"] + float(draw.normal(0, 0.01))
        return found


def record_judges(recorder: Recorder, seeds: int) -> None:
    """Record the sweep ``judge_accuracy``: SPIN, and DSL with judges that err, for two shares of flaws."""
    for seed, flaws in itertools.product(range(seeds), (0.15, 0.5)):
        by_origin = {"data.flaws": str(flaws), "eval.judge._target_": "rules"}
        wrong = {"labels/decided": 0.4, "labels/noise": 0.4 * flaws}
        recorder.run(SPIN, seed, sweep="judge_accuracy", params=by_origin, more=wrong)
        for dial, value in (("error", 0.0), ("error", 0.25), ("error", 0.45), ("length", 0.5)):
            params = {**by_origin, f"judge.{dial}": str(value)}
            wrong = {"labels/decided": 0.4, "labels/noise": 0.4 * (value or 0.01)}
            recorder.run(DSL, seed, sweep="judge_accuracy", params=params, more=wrong)


def record_noise(recorder: Recorder, seeds: int) -> None:
    """Record the sweep ``noise_map`` at one β and one share of flaws, with two numbers of epochs."""
    for seed, epochs, method in itertools.product(range(seeds), (2, 6), (SPIN, FIXED, NPO, CONSTANT)):
        params = {"data.flaws": "0.3", "objective.beta": "5.0", "trainer.epochs": str(epochs)}
        more = {"margin/saturation": 0.5 - 0.05 * epochs}
        recorder.run(method, seed, sweep="noise_map", iterations=1, start=0, params=params, more=more)


def stages_of(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stages of a run: fine-tuning takes 100 s, and in each iteration training takes 2 s and measuring 1 s."""
    found = [{"stage": "sft", "key": "sft", "iteration": SFT, "seconds": 100.0}]
    for row in table:
        found.append(
            {"stage": "evaluate", "key": f"e{row['iteration']}", "iteration": row["iteration"], "seconds": 1.0}
        )
        if row["iteration"] != SFT:
            found.append(
                {"stage": "optimise", "key": f"o{row['iteration']}", "iteration": row["iteration"], "seconds": 2.0}
            )
    return found


WORDS = {"win": 1, "tie": 0, "lose": -1}


def chosen(recorder: Recorder, experiment: str = "dnpo", **asked: Any) -> Runs:
    return select(Database(recorder.uri, experiment), **asked)


def analysis(recorder: Recorder, *arguments: str, experiment: str = "dnpo") -> int:
    return command.main([*arguments, "--uri", recorder.uri, "--experiment", experiment])


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))
