"""How well a policy judges (``judge=self``): its agreement with the exact judge, on correctness and on form.

    python -m benchmarks.self_judge                       # the tiny world: fine-tuned alone, then taught
    python -m benchmarks.self_judge --rows 1000 4800 9600 --seeds 3

A tiny policy is fine-tuned as in a run and then taught by ``augment=tiny`` with some number of questions. It is asked
about pairs of human responses to test prompts, which are not in the training data; the exact judge scores the two
responses differently. The agreement is computed for all pairs, for pairs with two right or two wrong responses (which
differ only in form), and for pairs of a right and a wrong response. Claims about ``judge=self`` use the last kind.
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

from benchmarks.quiet import Quiet
from dnpo.commands.common import plain
from dnpo.data.tinyworld import FAMILIES, FLAWS, TinyWorld, problems, respond
from dnpo.data.verifiable import correct, points
from dnpo.generate import Sampling
from dnpo.generate.hf import sample
from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.augment import Augmentation, Gold, augment, score_pairs
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
    found: list[tuple[Prompt, Gold]] = []
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


Held = Sequence[tuple[Prompt, Gold]]  # pairs with their prompts


def sample_pairs(policy: Policy, prompts: Sequence[Prompt], samples: int, seed: int) -> Held:
    """Pairs of a policy's responses at temperature 0.7 with different scores."""
    asked = [replace(p, token_ids=encode(policy.tokenizer, p.messages, p.human, policy.stop_ids)[0]) for p in prompts]
    several = [p for p in asked for _ in range(samples)]
    found = sample(policy, several, Sampling(temperature=0.7), "policy@0", 24, derive(seed, "own"), Quiet())
    by_name = {p.messages[0]["content"]: p for p in prompts}
    rows = [replace(p, human=response.text) for p, response in zip(several, found, strict=True)]
    return [(by_name[gold.messages[0]["content"]], gold) for gold in score_pairs(rows, points)]


def measure(policy: Policy, template: str, held: Held, name: str) -> dict[str, float]:
    """The share of pairs whose better response the policy prefers, for the three kinds of pairs.

    ``asked``: the policy is asked about the pair; ``ranked``: by each response's score, from a comparison with an empty
    one.
    """
    judge = AskedPolicy(Choices(policy, template), 0.0)
    p = np.array(judge.compare_pairs([prompt for prompt, _ in held], [as_pair(gold) for _, gold in held]))
    truth = np.array([correct(prompt, g.better) != correct(prompt, g.worse) for prompt, g in held])
    first, second = score(judge, held, 0), score(judge, held, 1)
    found = {}
    for how, better, worse in (("asked", p, 1 - p), ("ranked", first, second)):
        wins = (better > worse) + 0.5 * (better == worse)
        for part, some in (("all", truth | True), ("form", ~truth), ("truth", truth)):
            found[f"{name} {how} {part}"] = float(wins[some].mean())
    return {f"{name} pairs": len(held), f"{name} pairs truth": int(truth.sum()), **found}


def score(judge: AskedPolicy, held: Held, side: int) -> Any:
    """The scores of the better (0) or worse (1) responses: the probability that each is better than an empty one."""
    texts = [(g.better, g.worse)[side] for _, g in held]
    asked = [replace(prompt, id=str(i)) for i, (prompt, _) in enumerate(held)]
    responses = [Response(str(i), "policy@0", text, [], 0, "eos") for i, text in enumerate(texts)]
    return np.array([verdict.score for verdict in judge(asked, responses, Ledger(Path("none")), Quiet())])


def as_pair(gold: Gold) -> Pair:
    """The same as a row of a run."""
    texts = {"chosen": gold.better, "rejected": gold.worse, "chosen_ids": [], "rejected_ids": []}
    scores = {"chosen_score": None, "rejected_score": None, "flipped": False}
    sources = {"chosen_source": "human", "rejected_source": "human"}
    return Pair(id=gold.id, messages=gold.messages, prompt_ids=[], **texts, **sources, **scores)  # type: ignore[arg-type]


def make_policy(how: Augmentation, rows: Sequence[Prompt], seed: int, folder: Path) -> Policy:
    """A tiny policy, fine-tuned as in a run, whose tokenizer has tokens for the letters."""
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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default %(default)s)")
    parser.add_argument("--more", type=int, default=2, help="further responses to each training prompt to pair")
    parser.add_argument("--each", type=int, default=3, help="held-out pairs of a test prompt")
    parser.add_argument("--samples", type=int, default=4, help="own responses to a test prompt")
    parser.add_argument("--set", nargs="*", default=[], help="settings of augment=tiny, such as augment.weight=4")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    how: Augmentation = read_part("augment", "tiny", *given.set)
    found = [row for seed in given.seeds for row in teach(how, seed, given)]
    given.out.mkdir(exist_ok=True)
    (given.out / "self_judge.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def teach(how: Augmentation, seed: int, given: Any) -> list[dict[str, Any]]:
    """The figures of one seed: of the fine-tuned policy, and of copies taught with more and more questions."""
    world = TinyWorld(seed=seed)
    splits, _ = world.read()
    known = score_pairs(add_responses(world, splits["train"], given.more, seed), points)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = make_policy(how, splits["train"], seed, folder)
        sets = {
            "human": draw_pairs(world, splits["test"], given.each, derive(seed, "held")),
            "own": sample_pairs(policy, splits["test"], given.samples, seed),
        }
        found: list[dict[str, Any]] = []
        for count in (0, *given.rows):
            policy = read_part("model", "tiny", f"seed={seed}").load(folder / "base", folder / "sft")
            order = random.Random(derive(seed, "augment")).sample(range(len(known)), min(len(known), count // 2))
            rows = how.make_rows(policy, [known[i] for i in order])
            started = time.process_time()
            if rows:
                work = folder / str(count)
                work.mkdir()
                augment(policy, rows, how.optimisation, seed=derive(seed, "augment"), folder=work, report=Quiet())
            facts = {"seed": seed, "rows": len(rows), "seconds": time.process_time() - started}
            for kind, held in sets.items():
                facts |= measure(policy, how.template, held, kind)
            found.append(facts)
            print(
                "  ".join(f"{n} {v:.3f}" if isinstance(v, float) else f"{n} {v}" for n, v in facts.items()), flush=True
            )
    return found


if __name__ == "__main__":
    main()
