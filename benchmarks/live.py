"""CPU seconds of generating during training, compared with the same work before training.

    python -m benchmarks.live                      # method=online_dpo at the default scale
    python -m benchmarks.live --prompts 64         # prompts of a rollout; 128 without it
    python -m benchmarks.live -- data.train=1200   # anything after -- goes to both, as settings of dnpo.train

Both variants respond twice to every prompt, judge and label all responses, and train for the same number of policy
steps with the same number of pairs. ``ahead`` has five stages; ``live`` has one, whose parts are timed too. They take
turns in one process, from the same fine-tuned policy, after a round that is not measured. Seconds are CPU seconds of
the process on a CPU, which others may share, and wall clock on a GPU.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hydra import compose, initialize_config_dir

from benchmarks import harness
from benchmarks.harness import Facts
from benchmarks.quiet import Quiet
from dnpo import dsl
from dnpo.commands.train import build
from dnpo.generate import hf
from dnpo.loop import chain
from dnpo.optimise import reference
from dnpo.optimise.preference import PreferenceTraining
from dnpo.running.console import silence_libraries
from dnpo.settings import conf_folder
from dnpo.stages import live, rollouts
from dnpo.stages.plan import Iteration
from dnpo.store import Store, manifest

TARGET = 1.15
METHOD = ("method=online_dpo", "iterations=1")
AHEAD = ("rollout=ahead", "rollout.samples=2")
ALL, REST = "all", "the rest"
PARTS: dict[str, list[tuple[Any, str]]] = {
    "respond": [(hf, "complete")],
    "log-probabilities and texts of responses": [(hf, "record")],
    "judge": [(live.Responder, "_judge")],
    "label": [(dsl, "label")],
    "log-probabilities under the reference": [(reference, "score_now")],
    "measure rollouts": [(live, "describe")],
    "write and read rows": [
        (hf, "write"),
        (live, "write_preferences"),
        *((module, name) for module in (live, rollouts) for name in ("write", "write_json", "read", "read_all")),
    ],
    "policy steps": [(PreferenceTraining, "training_step")],
}


def main() -> None:
    """Measure, print, write."""
    parser = harness.common_arguments("live", "CPU seconds of generating while training.")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--prompts", default="128", help="of a rollout (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="settings of dnpo.train, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), given)
    harness.save(given.out, {"prompts": given.prompts, "overrides": given.overrides, **found})


def compare(folder: Path, given: argparse.Namespace) -> Facts:
    """Run both in turns; print their seconds and the amount of work."""
    common = [*METHOD, *given.overrides, "tracking=off", f"threads={given.threads}"]
    base = Store(folder / "base")
    base.get(lay_out(base.root, common)[0].policy, Quiet())
    silence_libraries()  # here, because Lightning sets its log level when it is imported
    variants = {"live": [*common, f"rollout.prompts={given.prompts}"]}
    first = run(folder, variants["live"])[1]
    rows = round(first["pairs trained on"] / first["steps"])
    variants["ahead"] = [*common, *AHEAD, f"trainer.steps={first['steps']}", f"trainer.batch_size={rows}"]
    run(folder, variants["ahead"])
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    amounts: dict[str, Facts] = {}
    for i in range(given.rounds):
        for name, settings in variants.items():
            harness.progress(f"round {i + 1} of {given.rounds}: {name}")
            took, amounts[name] = run(folder, settings)
            seconds[name].append(took)
    harness.progress("")
    for name, rounds in seconds.items():
        rows = [[part, harness.summary([took[part] for took in rounds])] for part in rounds[0]]
        done = ", ".join(f"{amount:,} {unit}" for unit, amount in amounts[name].items())
        print(f"{name}: {done}\n\n{harness.table(['part', f'seconds, median (quartiles) of {given.rounds}'], rows)}\n")
    totals = {name: [took[ALL] for took in rounds] for name, rounds in seconds.items()}
    ratios = [harness.ratio("live / ahead", totals["live"], totals["ahead"], TARGET)]
    print(harness.table(harness.RATIO_HEADINGS, [harness.ratio_row(each) for each in ratios]))
    return {"seconds": seconds, "amounts": amounts, "ratios": ratios}


def lay_out(store: Path, settings: Sequence[str]) -> list[Iteration]:
    """The stages of a run with these settings."""
    with initialize_config_dir(str(conf_folder()), version_base=None):
        cfg = compose("train", [*settings, f"store={store}", f"ledger={store.parent / 'ledger.sqlite'}"])
    return list(chain(build(cfg)[0]))


def run(folder: Path, settings: Sequence[str]) -> tuple[dict[str, float], Facts]:
    """Compute an iteration after fine-tuning; return the seconds of its parts, and the amount of work."""
    shutil.rmtree(folder / "store", ignore_errors=True)
    store = Store(shutil.copytree(folder / "base", folder / "store"))
    iteration = lay_out(store.root, settings)[1]
    stages = [iteration.responses, iteration.verdicts, iteration.labelled, iteration.reference, iteration.policy]
    seconds: dict[str, float] = {}
    with time_parts() as parts:
        for stage in filter(None, stages):
            if not store.has(stage):
                seconds[stage.name] = measure(lambda stage=stage: store.get(stage, Quiet()))[0]
    total = sum(seconds.values())
    if len(seconds) == 1:  # live
        seconds = {**parts, REST: total - sum(parts.values())}
    facts = manifest(store.folder(iteration.responses or iteration.policy))["facts"]
    steps = json.loads((store.folder(iteration.policy) / "steps.json").read_text())
    rows = int(sum(step["rows"] for step in steps))
    generated = facts.get("generated", facts)["tokens"]
    return {**seconds, ALL: total}, {"tokens generated": generated, "pairs trained on": rows, "steps": len(steps)}


def measure(work: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds that ``work`` takes, and its result."""
    took, result = harness.measure_time(work, harness.default_device())
    return took["seconds"], result


@contextmanager
def time_parts() -> Iterator[dict[str, float]]:
    """Add up the seconds that the functions of ``PARTS`` take within the block."""
    seconds = dict.fromkeys(PARTS, 0.0)

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(work)
        def call(*args: Any, **kwargs: Any) -> Any:
            took, result = measure(lambda: work(*args, **kwargs))
            seconds[name] += took
            return result

        return call

    with ExitStack() as stack:
        for name, places in PARTS.items():
            for owner, attribute in places:
                stack.enter_context(patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        yield seconds


if __name__ == "__main__":
    main()
