"""How well a policy judges (``judge=self``): agreement with the exact judge, where truth counts and where form does.

    python -m benchmarks.self_judge                       # the tiny world: fine-tuned alone, then taught
    python -m benchmarks.self_judge --rows 1000 4800 9600 --seeds 3

A tiny policy is fine-tuned as in a run and then taught by ``augment=tiny`` with so many questions. It is asked about
pairs of human responses to test prompts, none of them seen in training, that the exact judge scores differently. The
agreement is given for all pairs; for pairs of which both responses are right, or both wrong, so that only form differs;
and for pairs of a right and a wrong one. Claims about ``judge=self`` are read on the last.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from dnpo.commands.common import plain
from dnpo.data.tinyworld import FAMILIES, FLAWS, TinyWorld, problems, respond
from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.augment import Augmentation, Gold, augment, score_pairs
from dnpo.judges.exact.rules import Rules, correct
from dnpo.judges.self_judge import AskedPolicy
from dnpo.optimise.preference import fine_tune
from dnpo.policy.base import Scratch
from dnpo.policy.choices import Choices
from dnpo.policy.model import Policy
from dnpo.policy.tokenizer import encode
from dnpo.records import Pair, Prompt, Response
from dnpo.seeding import derive
from dnpo.settings import build, check, conf_folder

TRIES = 20  # draws of two responses, until their scores differ


class Quiet:
    """Says nothing."""

    def begin(self, total: int, unit: str, done: int = 0) -> None: ...

    def advance(self, amount: int = 1) -> None: ...

    def note(self, text: str) -> None: ...

    def status(self, text: str) -> None: ...

    def steps(self, rows: list[dict[str, float]]) -> None: ...


def read_part(group: str, option: str, *overrides: str) -> Any:
    """Build one part from its file of settings."""
    with initialize_config_dir(str(conf_folder()), version_base=None):
        tree = plain(
            compose("train", [f"+{group}={option}" if group == "augment" else f"{group}={option}", *overrides])
        )
    return build(group, check(group, tree[group]))


def draw_response(draw: random.Random, world: TinyWorld, problem: Any) -> str:
    """A human response, as the world draws them."""
    answer = problem.myth if problem.myth is not None and draw.random() < world.myths else problem.answer
    flaw = draw.choice(FLAWS) if draw.random() < world.flaws else None
    return respond(draw, problem, answer, flaw)


def draw_pairs(world: TinyWorld, prompts: Sequence[Prompt], each: int, seed: int) -> list[tuple[Prompt, Gold]]:
    """Pairs of responses to each prompt with different scores, none twice."""
    asked = {wording: p for family in FAMILIES for p in problems(family, world.difficulty) for wording in p.wordings}
    points, found = Rules().points, []
    for prompt in prompts:
        draw = random.Random(derive(seed, prompt.id))
        problem, known = asked[prompt.messages[0]["content"]], set()
        for _ in range(TRIES):
            if len(known) == each:
                break
            a, b = draw_response(draw, world, problem), draw_response(draw, world, problem)
            one, other = points(prompt, a), points(prompt, b)
            pair = (a, b) if one > other else (b, a)
            if one != other and pair not in known:
                known.add(pair)
                found.append((prompt, Gold(f"{prompt.id}:{len(known)}", prompt.messages, *pair)))
    return found


def measure(policy: Policy, template: str, held: Sequence[tuple[Prompt, Gold]]) -> dict[str, float]:
    """The share of pairs whose better response the policy prefers, apart by whether truth decides; and its leanings."""
    judge = AskedPolicy(Choices(policy, template), 0.0)
    pairs = [as_pair(gold) for _, gold in held]
    p = np.array(judge.compare_pairs([prompt for prompt, _ in held], pairs))
    truth = np.array([correct(prompt, g.better) != correct(prompt, g.worse) for prompt, g in held])
    wins = (p > 0.5) + 0.5 * (p == 0.5)
    ranked = np.sign(scores(judge, held, 0) - scores(judge, held, 1)) / 2 + 0.5
    ids = [
        judge.choices.encode(g.messages, *sides)
        for _, g in held
        for sides in ((g.better, g.worse), (g.worse, g.better))
    ]
    first = np.array([p for (p,) in judge.choices.probabilities([[each] for each in ids])])
    return {
        "all": wins.mean(),
        "form": wins[~truth].mean(),
        "truth": wins[truth].mean(),
        "ranked all": ranked.mean(),
        "ranked form": ranked[~truth].mean(),
        "ranked truth": ranked[truth].mean(),
        "says A": (first > 0.5).mean(),
        "brier": ((p - 1) ** 2).mean(),
    }


def scores(judge: AskedPolicy, held: Sequence[tuple[Prompt, Gold]], side: int) -> Any:
    """The scores of the better (0) or worse (1) responses: how probably each is better than an empty one."""
    texts = [(g.better, g.worse)[side] for _, g in held]
    asked = [replace(prompt, id=str(i)) for i, (prompt, _) in enumerate(held)]
    responses = [Response(str(i), "human", text, [], 0, "eos") for i, text in enumerate(texts)]
    verdicts = judge(asked, responses, Ledger(Path("none")), Quiet())
    return np.array([verdict.score for verdict in verdicts])


def as_pair(gold: Gold) -> Pair:
    """The same as a row of a run."""
    texts = {"chosen": gold.better, "rejected": gold.worse, "chosen_ids": [], "rejected_ids": []}
    scores = {"chosen_score": None, "rejected_score": None, "flipped": False}
    sources = {"chosen_source": "human", "rejected_source": "human"}
    return Pair(id=gold.id, messages=gold.messages, prompt_ids=[], **texts, **sources, **scores)  # type: ignore[arg-type]


def make_policy(how: Augmentation, rows: Sequence[Prompt], seed: int, folder: Path) -> Policy:
    """A tiny policy, fine-tuned as in a run, whose tokenizer knows the letters."""
    model: Scratch = replace(read_part("model", "tiny", f"seed={seed}"), question=how.template)
    model.base(folder / "base", rows)
    policy = model.load(folder / "base")
    triples = [(p.id, *encode(policy.tokenizer, p.messages, p.human, policy.stop_ids)) for p in rows]
    fine_tune(policy, triples, read_part("sft", "scratch"), seed=derive(seed, "sft"), folder=folder, report=Quiet())
    policy.save(folder / "sft")
    return policy


def add_responses(world: TinyWorld, rows: Sequence[Prompt], more: int, seed: int) -> list[Prompt]:
    """The rows, and further ones with other human responses to the same prompts."""
    asked = {wording: p for family in FAMILIES for p in problems(family, world.difficulty) for wording in p.wordings}
    draw = random.Random(derive(seed, "more"))
    drawn = [
        replace(p, human=draw_response(draw, world, asked[p.messages[0]["content"]])) for p in rows for _ in range(more)
    ]
    return [*rows, *drawn]


def main() -> None:
    """Run ``python -m benchmarks.self_judge``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[4800, 9600], help="questions (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--more", type=int, default=2, help="further responses to each training prompt to pair")
    parser.add_argument("--each", type=int, default=3, help="held-out pairs of a test prompt")
    parser.add_argument("--epochs", type=int, nargs="*", default=[], help="of teaching, instead of augment=tiny's")
    parser.add_argument("--lr", type=float, help="of teaching, instead of augment=tiny's")
    parser.add_argument("--weight", type=float, help="of the letter, instead of augment=tiny's")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    how: Augmentation = read_part(
        "augment", "tiny", *([f"augment.optimisation.optimizer.lr={given.lr}"] if given.lr else [])
    )
    how = how if given.weight is None else replace(how, weight=given.weight)
    for seed in range(given.seeds):
        world = TinyWorld(seed=seed)
        splits, _ = world.read()
        held = draw_pairs(world, splits["test"], given.each, derive(seed, "held"))
        known = score_pairs(add_responses(world, splits["train"], given.more, seed), Rules().points)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            started = time.process_time()
            plain_policy = make_policy(how, splits["train"], seed, folder)
            print(f"seed {seed}: {len(held):,} held-out pairs, {len(known):,} known ones; fine-tuned in "
                  f"{time.process_time() - started:.0f} CPU s", flush=True)  # fmt: skip
            found.append({"seed": seed, "rows": 0, **measure(plain_policy, how.template, held)})
            show(found[-1])
            for count in given.rows:
                for epochs in given.epochs or [how.optimisation.epochs]:
                    model = replace(read_part("model", "tiny", f"seed={seed}"), question=how.template)
                    policy = model.load(folder / "base", folder / "sft")
                    order = random.Random(derive(seed, "augment")).sample(
                        range(len(known)), min(len(known), count // 2)
                    )
                    rows = how.make_rows(policy, [known[i] for i in order])
                    started = time.process_time()
                    optimisation = replace(how.optimisation, epochs=epochs)
                    (folder / f"{count}-{epochs}").mkdir()
                    history = augment(
                        policy, rows, optimisation, seed=derive(seed, "augment"), folder=folder / f"{count}-{epochs}",
                        report=Quiet(),
                    )  # fmt: skip
                    took = time.process_time() - started
                    loss = float(np.mean([row["loss/policy"] for row in history[-20:]]))
                    facts = {"seed": seed, "rows": len(rows), "epochs": epochs, "seconds": took, "loss": loss}
                    found.append({**facts, **measure(policy, how.template, held)})
                    show(found[-1])
    given.out.mkdir(exist_ok=True)
    (given.out / "self_judge.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def show(row: dict[str, Any]) -> None:
    """Print one line."""
    print(
        "  ".join(
            f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
