"""Does training on rollouts find the best policy? For responses of one token, the best policy has a closed form.

    python -m benchmarks.bandit                    # 5 seeds, 400 policy steps each
    python -m benchmarks.bandit --seeds 1 --steps 200

A small random policy answers each prompt with one token of its vocabulary; every token has a known reward r. The policy
π* ∝ π_ref · exp(r / β) has the largest expected reward minus β times its KL to the reference. The command prints and
draws the total-variation distance from the policy to π* (mean over prompts) during training. Three trainings are
compared: the clipped ratio with whitened advantages and with plain ones (4 policy steps on each rollout), and REINFORCE
with a baseline (one step). The first row is the distance of the reference, where training starts.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.quiet import Quiet
from dnpo.generate import Sampling
from dnpo.generate.hf import sample
from dnpo.methods.ppo import ClippedRatio
from dnpo.optimise.live import Clock
from dnpo.optimise.parts import Optimisation
from dnpo.policy.model import Policy
from dnpo.records import Prompt, Rollout
from dnpo.seeding import derive
from dnpo.settings import Bound

TOKENS, PROMPTS, SAMPLES = 24, 3, 64  # entries of the vocabulary, prompts, responses to each prompt in a rollout
PLAIN = ClippedRatio(beta=0.5, reward_scale=0.01, whiten=False, value_learning_rate=0.01)
EVERY = 4  # policy steps on a rollout
WAYS: Mapping[str, tuple[ClippedRatio, int]] = {
    "clipped ratio": (PLAIN, EVERY),
    "clipped ratio, whitened": (replace(PLAIN, whiten=True), EVERY),
    "REINFORCE": (replace(PLAIN, clip=0.0, value_clip=0.0, trace=1.0), 1),
}


@dataclass(frozen=True)
class Bandit:
    """Prompts of one token, and points for each token as a response.

    Attributes:
        policy: a random policy.
        points_PV: points by prompt and token.
    """

    policy: Policy
    points_PV: Tensor

    @classmethod
    def draw(cls, seed: int) -> "Bandit":
        """A policy, and rewards drawn from N(0, 1), in points of 0.01."""
        words = {f"w{i}": i for i in range(TOKENS)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), eos_token="w1", pad_token="w1"
        )
        config = LlamaConfig(
            vocab_size=TOKENS,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=8,
            initializer_range=0.2,
            eos_token_id=1,
            pad_token_id=1,
        )
        with torch.random.fork_rng():
            torch.manual_seed(derive(seed, "bandit") % 2**63)
            return cls(Policy(LlamaForCausalLM(config), tokenizer), 100 * torch.randn(PROMPTS, TOKENS))

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, each repeated for its number of responses in a rollout."""
        return [Prompt(str(i), [], "", token_ids=[2 + i]) for i in range(PROMPTS) for _ in range(SAMPLES)]

    @torch.no_grad()
    def logps(self) -> Tensor:
        """Log-probabilities of all responses by prompt, in float64."""
        asked = torch.tensor([[2 + i] for i in range(PROMPTS)])
        with self.policy.evaluating():
            logits: Tensor = self.policy.causal_lm(input_ids=asked).logits[:, -1]
        return logits.double().log_softmax(-1)

    def best(self, settings: ClippedRatio) -> Tensor:
        """π_ref · exp(r / β), normalised, if the present policy is the reference."""
        reward_PV = settings.reward_scale * self.points_PV.double()
        return (self.logps() + reward_PV / settings.beta).softmax(-1)


def total_variation(one_PV: Tensor, other_PV: Tensor) -> float:
    """Half the sum of absolute differences, mean over prompts."""
    return float((one_PV - other_PV).abs().sum(-1).mean() / 2)


class Answers:
    """A source of rollouts: the policy answers every prompt several times, and ``points_PV`` gives the points."""

    per_pass = 1

    def __init__(self, bandit: Bandit, seed: int) -> None:
        self.bandit, self.seed = bandit, seed
        self.made: dict[int, list[Rollout]] = {}

    def ask(self, rollout: int) -> None:
        """Let the policy respond."""
        prompts = self.bandit.prompts
        how, seed = Sampling(batch_size=len(prompts)), derive(self.seed, "answers", rollout)
        self.made = {
            rollout: [
                Rollout(
                    id=response.id,
                    source=response.source,
                    text=response.text,
                    token_ids=response.token_ids,
                    tokens=response.tokens,
                    finish=response.finish,
                    logprob=response.logprob,
                    sample=response.sample,
                    score=float(self.bandit.points_PV[int(response.id), response.token_ids[0]]),
                    prompt_ids=prompt.token_ids,
                    reason="",
                    rollout=rollout,
                    step=0,
                )
                for prompt, response in zip(
                    prompts, sample(self.bandit.policy, prompts, how, "policy", 1, seed, Quiet()), strict=True
                )
            ]
        }

    def check(self, rollouts: int) -> None:
        """Nothing is on the disk."""

    def take(self, rollout: int, first: int, step: int) -> list[Rollout]:
        """Its responses."""
        return self.made[rollout]

    def measure(self, rollout: int) -> dict[str, float]:
        """Return nothing to report."""
        return {}

    def describe(self, rollout: int) -> str:
        """Return nothing to report."""
        return ""

    def explain(self) -> str:
        """Return nothing to report."""
        return ""


class Distances(Quiet):
    """Measures the distance to the best policy after every policy step."""

    def __init__(self, bandit: Bandit, best_PV: Tensor) -> None:
        self.bandit, self.best_PV = bandit, best_PV
        self.found = [self.measure()]

    def measure(self) -> float:
        """The distance of the present policy."""
        return total_variation(self.bandit.logps().exp(), self.best_PV)

    def advance(self, amount: int = 1) -> None:
        """Measure it after a step."""
        self.found.append(self.measure())


def learn(settings: ClippedRatio, every: int, steps: int, seed: int, rate: float) -> list[float]:
    """The distances before training and after every policy step."""
    bandit = Bandit.draw(seed)
    report = Distances(bandit, bandit.best(settings))
    optimiser = Bound("torch.optim.Adam", {"lr": rate})
    how = Optimisation(optimizer=optimiser, steps=steps, batch_size=PROMPTS * SAMPLES, warmup=0.05)
    with tempfile.TemporaryDirectory() as folder:
        settings.train(
            bandit.policy,
            source=Answers(bandit, seed),
            clock=Clock(every=every),
            reference=bandit.policy.reference(),
            optimisation=how,
            seed=derive(seed, "train"),
            folder=Path(folder),
            report=report,
        )
    return report.found


def draw(found: Mapping[str, Sequence[Sequence[float]]], path: Path) -> None:
    """Draw the median over seeds, with the range, by policy step."""
    import matplotlib as mpl
    from analysis.drawing import DPI, STYLE, canvas, finish

    from dnpo.palette import SERIES

    with mpl.rc_context(STYLE):
        figure, (axis,) = canvas(6.0, 4.0)
        for (way, runs), look in zip(found.items(), SERIES, strict=False):
            x = range(len(runs[0]))
            middle = [statistics.median(values) for values in zip(*runs, strict=True)]
            axis.plot(x, middle, color=look.colour, linewidth=1.6, label=way)
            low, high = (list(map(pick, zip(*runs, strict=True))) for pick in (min, max))
            axis.fill_between(x, low, high, color=look.colour, alpha=0.18, linewidth=0)
        axis.set_xlabel("policy step")
        axis.set_ylabel("total variation to the best policy")
        axis.set_ylim(0, None)
        axis.legend()
        seeds = len(next(iter(found.values())))
        foot = (
            f"One-token responses: {PROMPTS} prompts, {TOKENS} tokens, {PROMPTS * SAMPLES} responses a rollout, "
            f"β = {PLAIN.beta}. The best policy is the reference times exp(reward / β), normalised. Lines: median of "
            f"{seeds} seeds; bands: their range."
        )
        finish(figure, "Training on rollouts ends at the closed-form optimum", foot).savefig(path, dpi=DPI)


def main() -> None:
    """Run ``python -m benchmarks.bandit``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="policy steps (default %(default)s)")
    parser.add_argument(
        "--rate", type=float, default=5e-3, help="learning rate, which falls to 0 (default %(default)s)"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[list[float]]] = {
        way: [learn(*WAYS[way], given.steps, seed, given.rate) for seed in range(given.seeds)] for way in given.ways
    }
    at = sorted({0, *(given.steps * part // 12 for part in (1, 2, 4, 6, 9, 12))})
    print(f"{'steps':>6}" + "".join(f"{way:>32}" for way in found))
    for step in at:
        cells = [[run[step] for run in runs] for runs in found.values()]
        texts = [f"{statistics.median(some):.3f} ({min(some):.3f} to {max(some):.3f})" for some in cells]
        print(f"{step:>6}" + "".join(f"{text:>32}" for text in texts))
    given.out.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"settings": {**vars(given), "out": None}, "total_variation": found}
    (given.out / "bandit.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    draw(found, given.out / "bandit.png")


if __name__ == "__main__":
    main()
