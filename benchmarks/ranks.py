"""Compare the speed of training in several processes and in one, each with one thread: DPO of all weights on the CPU.

    python -m benchmarks.ranks                        # one process and two, 29M parameters, 8 pairs a step
    python -m benchmarks.ranks --ranks 1 2 4 --parallel sharded

Each round trains the same steps with every number of processes, one after the other. The first step of a training does
not count. The time is wall clock: the machine must have a core for each process and no other work.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from benchmarks import problem
from benchmarks.harness import RESULTS
from dnpo import ranks
from dnpo.optimise.npo import SilentModule
from dnpo.optimise.parts import Logistic, PairOptimisation
from dnpo.optimise.preference import optimise, score_first
from dnpo.policy.model import Policy
from dnpo.records import Pair, ReferenceLogps
from dnpo.settings import Bound
from dnpo.worker import Lines


class Silent(Lines):
    """Reports nothing."""

    def send(self, kind: Any, *values: Any) -> None:
        """Leave the message out."""


def train(rank: int, world: int, folder: Path, options: argparse.Namespace) -> None:
    """Train as one of several processes; rank 0 writes tokens per second of every step."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    if world > 1:
        ranks.join(rank, world, world, init_method=f"file://{folder / 'meeting'}")
    shape = problem.SHAPES[options.shape]
    device = torch.device("cpu")
    tokenizer: Any = None  # nothing is read or written as text
    policy = Policy(problem.model(shape, device, torch.float32), tokenizer)
    (batch,) = problem.batches(shape, 1, pairs=options.pairs)
    rows = zip(batch.prompts, batch.chosen, batch.rejected, strict=True)
    pairs = [_pair(number, *ids) for number, ids in enumerate(rows)]
    how = PairOptimisation(
        optimizer=Bound("torch.optim.RMSprop", {"lr": 1e-6}),
        batch_size=options.pairs,
        micro_batch_size=options.micro_batch_size,
        steps=options.steps + 1,
        checkpoint_every=10**6,
        parallel=options.parallel if world > 1 else "replicated",
    )
    objective = Logistic(beta=0.1)
    first = score_first(policy, pairs, how, objective, seed=0, folder=folder)
    reference = [ReferenceLogps(number, first[number].chosen, first[number].rejected) for number in range(len(pairs))]
    history = optimise(
        policy,
        pairs,
        reference,
        how,
        noise=SilentModule(),
        objective=objective,
        beta=0.1,
        seed=0,
        folder=folder,
        report=Silent(rank),
    )
    if rank == 0:
        (folder / "speeds.json").write_text(json.dumps([row["tokens_per_second"] for row in history[1:]]))
    ranks.wait()


def _pair(number: int, prompt: list[int], chosen: list[int], rejected: list[int]) -> Pair:
    names = {"chosen_source": "human", "rejected_source": "policy@0", "chosen_score": None, "rejected_score": None}
    texts: dict[str, Any] = {"messages": [], "chosen": "", "rejected": "", "flipped": False, **names}
    return Pair(id=str(number), prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected, **texts)


def measure(world: int, options: argparse.Namespace) -> float:
    """The median of tokens per second of a training's steps."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(train, (world, Path(folder), options), nprocs=world)
        speeds: list[float] = json.loads((Path(folder) / "speeds.json").read_text())
        return statistics.median(speeds)


def main() -> None:
    """``python -m benchmarks.ranks``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes, the first is 1")
    parser.add_argument("--shape", choices=sorted(problem.SHAPES), default="body")
    parser.add_argument("--pairs", type=int, default=8, help="pairs in a step")
    parser.add_argument("--micro-batch-size", type=int, default=2, help="pairs that go through the model at once")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parallel", choices=("replicated", "sharded"), default="replicated")
    parser.add_argument("--out", type=Path, default=RESULTS / "ranks.json")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rounds = [{world: measure(world, options) for world in options.ranks} for _ in range(options.rounds)]
    found: dict[str, Any] = {"shape": options.shape, "parallel": options.parallel, "rounds": rounds, "ratios": {}}
    for world in options.ranks:
        ratios = [each[world] / each[options.ranks[0]] for each in rounds]
        found["ratios"][world] = ratios
        speed = statistics.median(each[world] for each in rounds)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{world} processes: {speed:8,.0f} tokens/s, {statistics.median(ratios):.2f} times one ({spread})")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
