"""Measure the cost of rows without models: memory and time of every stage that reads and writes them.

    python -m benchmarks.plumbing                          # 100,000 rows, then 1,000,000
    python -m benchmarks.plumbing --rows 20000 50000       # other sizes
    python -m benchmarks.plumbing --rows 200000 --near 0.9 # with near-duplicates removed
    python -m benchmarks.plumbing --rows 100000 --train 50 # and 50 policy steps

Rows are JSON lines with invented words: prompts of about 60 tokens and responses of about 40. Each size is measured in
a separate process, which computes the real stages into a real store. Only the results of the model (generated tokens
and log-probabilities) are replaced by constants. ``--train`` really trains a tiny model, without the check of step 0,
since the reference's numbers are invented.

Memory is the peak of the resident set during a stage, as counted by Linux.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import ROOT, Facts

WORDS, PROMPT, RESPONSE = 2000, 58, 38  # different words; words of a prompt, and of a response
ALL = "all stages"


def main() -> None:
    """Measure, print, write."""
    parser = harness.common_arguments("plumbing", "Memory and time of every stage that passes rows on.")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000], help="(default: %(default)s)")
    parser.add_argument("--near", type=float, default=0.0, help="data.near_duplicates (default: %(default)s)")
    parser.add_argument("--holdout", type=float, default=0.1, help="data.holdout (default: %(default)s)")
    parser.add_argument("--train", type=int, default=0, help="policy steps (default: none)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # measure one size in this process
    given = parser.parse_args()
    if given.inside:
        for row in measure(given.rows[0], given.near, given.holdout, given.train, given.threads):
            print(json.dumps(row), flush=True)
        return
    found = {rows: _run(rows, given) for rows in given.rows}
    stages = [row["stage"] for row in found[given.rows[0]]]
    headings = ["stage", *(f"{rows:,}: {what}" for rows in given.rows for what in ("s", "CPU s", "peak GB"))]
    table = []
    for i, stage in enumerate(stages):
        figures = (found[rows][i] for rows in given.rows)
        table.append([stage, *(f"{each[what]:,.2f}" for each in figures for what in ("seconds", "cpu", "peak"))])
    print(harness.table(headings, table))
    harness.save(given.out, {"rows": {str(rows): some for rows, some in found.items()}, "near": given.near})


def _run(rows: int, given: argparse.Namespace) -> list[Facts]:
    """Measure one size in a separate process."""
    harness.progress(f"{rows:,} rows")
    options = ["--near", str(given.near), "--holdout", str(given.holdout), "--train", str(given.train)]
    command = [sys.executable, "-m", "benchmarks.plumbing", "--inside", "--rows", str(rows), *options]
    found = []
    with subprocess.Popen(
        [*command, "--threads", str(given.threads)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            found.append(json.loads(line))
            print(f"{rows:,} rows:", line.strip(), file=sys.stderr, flush=True)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    harness.progress("")
    return found


# --- one size ---------------------------------------------------------------------------------------------------------


def measure(rows: int, near: float, holdout: float, steps: int, threads: int) -> Iterator[Facts]:
    """Compute the stages in this process; yield seconds, CPU seconds and peak memory (GB) of each, then of all."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", rows)
        write_model(folder / "model")
        stages, store, report = lay_out(folder, near, holdout, steps, threads)
        total: Facts = {"stage": ALL, "seconds": 0.0, "cpu": 0.0, "peak": 0.0}
        for stage in stages:
            _forget_peak()
            clock, cpu = time.perf_counter(), time.process_time()
            store.get(stage, report)
            row: Facts = {
                "stage": stage.name,
                "seconds": time.perf_counter() - clock,
                "cpu": time.process_time() - cpu,
                "peak": _peak(),
            }
            total |= {name: total[name] + row[name] for name in ("seconds", "cpu")}
            total["peak"] = max(total["peak"], row["peak"])
            yield row
        yield total


def write_rows(path: Path, rows: int, seed: int = 0) -> None:
    """Write rows of invented words."""
    draw = random.Random(seed)
    words = make_words()
    with path.open("w") as stream:
        for i in range(rows):
            prompt, response = (
                " ".join(draw.choices(words, k=round(count * draw.uniform(0.8, 1.2)))) for count in (PROMPT, RESPONSE)
            )
            stream.write(json.dumps({"id": f"row-{i}", "prompt": prompt, "response": response}) + "\n")


def make_words() -> list[str]:
    """The words of all rows, each of which is one token."""
    draw = random.Random(1)
    words: dict[str, None] = {}
    while len(words) < WORDS:
        words[
            "".join(draw.choice("bcdfghklmnprstvz") + draw.choice("aeiou") for _ in range(draw.choice((1, 2, 3))))
        ] = None
    return list(words)


def write_model(folder: Path) -> None:
    """Write a model of some thousand weights, with a tokenizer for these words."""
    from dnpo.policy.base import Scratch
    from dnpo.policy.lora import Lora
    from dnpo.records import Prompt

    text = " ".join(make_words() * 20)
    model = Scratch(Lora(0), width=16, layers=1, heads=2, mlp=16, vocabulary=2 * WORDS, context=512)
    model.base(folder, [Prompt("words", [{"role": "user", "content": text}], text)])


def lay_out(folder: Path, near: float, holdout: float, steps: int, threads: int) -> tuple[list[Any], Any, Any]:
    """Lay out the stages of one iteration, in the order in which they are computed."""
    import torch
    from hydra import compose, initialize_config_dir

    from dnpo.commands.train import build
    from dnpo.settings import conf_folder
    from dnpo.stages.before import fine_tune, prepare
    from dnpo.stages.verbs import evaluate, generate, judge, label, optimise, reference
    from dnpo.store import Store

    torch.set_num_threads(threads)
    settings = {
        "data": "jsonl",
        "data.path": folder / "rows.jsonl",
        "data.near_duplicates": near,
        "data.holdout": holdout,
        "model": "local",
        "model.path": folder / "model",
        "sft": '"off"',
        "judge": "longer",
        "npo": '"off"',
        "iterations": 1,
        "acts_from": 0,
        "tracking": '"off"',
        "trainer.steps": max(steps, 1),
        "device": "cpu",
        "ledger": folder / "ledger.sqlite",
    }
    with initialize_config_dir(str(conf_folder()), version_base=None):
        run, _, _ = build(compose("train", [f"{name}={value}" for name, value in settings.items()]))
    (plan,) = run.plans
    prompts = prepare(run, None)
    initial = fine_tune(run, None, prompts=prompts)
    responses = generate(run, plan, prompts=prompts, policy=initial)
    verdicts = judge(run, plan, prompts=prompts, responses=responses)
    pairs = label(run, plan, prompts=prompts, responses=responses, verdicts=verdicts)
    scores = reference(run, plan, prompts=prompts, policy=initial, pairs=pairs)
    trained = optimise(run, plan, prompts=prompts, policy=initial, pairs=pairs, reference=scores)
    evaluation = evaluate(run, plan, prompts=prompts, policy=initial, pairs=pairs)
    compute_constants(first=[stage for stage in (trained,) if steps])
    stages = [prompts, initial, responses, verdicts, pairs, scores, *([trained] if steps else []), evaluation]
    return stages, Store(folder / "store"), _Silent()


def compute_constants(first: Sequence[Any]) -> None:
    """Let the model always generate the same tokens, and give every sequence the same log-probability."""
    import torch

    from dnpo.generate import hf
    from dnpo.optimise.preference import PreferenceTraining
    from dnpo.policy.model import Policy

    def complete(policy: Policy, prompts: Sequence[list[int]], *given: Any, **named: Any) -> list[list[int]]:
        report = given[4] if len(given) > 4 else named.get("report")
        if report is not None:
            report.advance(len(prompts))
        stop = policy.stop_ids[0]
        return [[*(10 + (len(ids) + i) % 1000 for i in range(25 + len(ids) % 30)), stop] for ids in prompts]

    hf.complete = complete
    Policy.score = lambda self, prompts, completions, **named: [-1.0 * len(ids) for ids in completions]  # type: ignore[method-assign]
    Policy.logps = lambda self, batch: torch.zeros(len(batch.completions_S))  # type: ignore[method-assign]
    if first:
        PreferenceTraining._check_step_zero = lambda self, policy, batch: None  # type: ignore[method-assign]


class _Silent:
    """Reports nothing."""

    def begin(self, total: int, unit: str, done: int = 0) -> None: ...
    def advance(self, amount: int = 1) -> None: ...
    def note(self, text: str) -> None: ...
    def status(self, text: str) -> None: ...
    def steps(self, rows: list[dict[str, float]]) -> None: ...


def _forget_peak() -> None:
    """Reset the peak."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    """The peak of the resident set since the reset, in GB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


if __name__ == "__main__":
    main()
