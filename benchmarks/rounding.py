"""Count the samples that change by the rounding of weights: train twice with different micro-batches, then sample.

    python -m benchmarks.rounding                         # this checkout
    python -m benchmarks.rounding --checkout ../other     # another version of the code
    python -m benchmarks.rounding --samples 480           # fewer, for a quick look

The default model is fine-tuned twice as in the default run, once in whole batches and once in micro-batches of 8. The
two differ only by rounding: order and everything else are the same. Both then sample the same prompts with the same
seed; a response counts as changed if its token ids differ.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from benchmarks.quiet import Quiet

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ("tracking=off", "device=cpu", "judge=off", "method=spin", "iterations=1")


def main() -> None:
    """Train twice, sample twice, print how many responses differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rounding", description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", type=Path, default=ROOT, help="folder with src/dnpo and conf (default: this one)")
    parser.add_argument("--samples", type=int, default=4800)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.here:
        checkout = given.checkout.resolve()
        environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "DNPO_CONF": str(checkout / "conf")}
        command = [sys.executable, "-m", "benchmarks.rounding", "--here", *sys.argv[1:]]
        sys.exit(subprocess.run(command, cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}).returncode)
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), given.samples)


def compare(folder: Path, count: int) -> None:
    """Print the largest difference between weights, and how many of ``count`` responses differ."""
    from hydra import compose, initialize_config_dir

    from dnpo.generate import Sampling
    from dnpo.generate.hf import sample
    from dnpo.loop import chain
    from dnpo.store import Store

    train = import_module("dnpo.commands.train")
    store, policies, prompts = Store(folder / "store"), [], []
    for number, size in enumerate((0, 8)):
        with initialize_config_dir(os.environ["DNPO_CONF"], version_base="1.3"):
            settings = compose("train", overrides=[*SETTINGS, f"ledger={folder}/ledger.sqlite"])
        run = train.build(settings)[0]
        object.__setattr__(run.sft, "micro_batch_size", size)
        before = next(iter(chain(run)))
        shelf = store if not number else Store(folder / "other")  # the key is the same: rounding is no setting
        policy, data = shelf.get(before.policy, Quiet()), shelf.get(before.prompts, Quiet())
        policies.append(run.policy({"policy": policy, "prompts": data}))
        if not prompts:
            prompts = import_module("dnpo.tables").read(data / "train.parquet", import_module("dnpo.records").Prompt)
    weights = zip(*(p.model.state_dict().values() for p in policies), strict=True)
    print(f"weights differ by up to {max(float((a - b).abs().max()) for a, b in weights):.2g}")
    asked = (prompts * (count // len(prompts) + 1))[:count]
    answers = [sample(policy, asked, Sampling(batch_size=128), "policy", 48, 7, Quiet()) for policy in policies]
    changed = sum(a.token_ids != b.token_ids for a, b in zip(*answers, strict=True))
    print(f"{changed:,} of {count:,} sampled responses differ ({100 * changed / count:.2f} %)")


if __name__ == "__main__":
    main()
