"""Policy → {metric: value}, and the rows and log-probabilities behind them.

On prompts with a judge: accuracy by family (greedy), judge scores (greedy and sampled), fresh samples against human
responses. On any data: held-out loss of human responses, lengths, and where chosen, rejected and newly generated
responses lie under the new policy, with the distance between the last two as the measure of stagnation.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.stats import ks_2samp

from dnpo.generate import Sampling, sample
from dnpo.judges import Judge, judged, tally
from dnpo.judges.rules import correct
from dnpo.ledger import Ledger
from dnpo.model import Policy
from dnpo.records import Pair, Prompt, Response, Verdict, write
from dnpo.seeding import derive
from dnpo.settings import Count
from dnpo.store import Report

Split = Literal["validation", "test"]


class Evaluation:
    """What to measure: what ``eval=…`` configures.

    Args:
        split: ``validation`` for choosing settings, ``test`` for reporting.
        samples: fresh samples of each held-out prompt.
        sequences: pairs of the iteration, and fresh samples for the same prompts, whose log-probabilities are kept. Of
            these the Kolmogorov-Smirnov distance compares those whose fresh sample is not the human response itself;
            it needs 1,200 or more to be told from chance.
    """

    def __init__(self, *, split: Split = "test", samples: Count = 4, sequences: Count = 1536) -> None:
        self.split, self.samples, self.sequences = split, samples, sequences


class Held(NamedTuple):
    """Held-out prompts with the human responses to them, in the same order."""

    prompts: Sequence[Prompt]
    human: Sequence[Response]


def evaluate(
    policy: Policy,
    evaluation: Evaluation,
    held: Held,
    judge: Judge,
    ledger: Ledger,
    sampling: Sampling,
    *,
    pairs: Sequence[Pair] | None,
    train: Held,
    source: str,
    limit: int,
    seed: int,
    folder: Path,
    report: Report,
) -> dict[str, float]:
    """Measure a policy; see the head of this file.

    Args:
        policy: the one to measure.
        held: the split to report on.
        judge: gives the scores; with an absent one the metrics that need scores are left out.
        ledger: where the judge looks up what it has been asked before.
        sampling: as the policy samples for training.
        pairs: what the policy was trained on, if it was trained on pairs.
        train: training prompts, for fresh samples where there are no pairs.
        source: what fresh samples say they come from.
        limit: completion tokens at most.
        seed: of the samples.
        folder: gets ``samples.parquet``, ``verdicts.parquet`` and ``logprobs.npz``.
        report: told of every batch.
    """
    copies = evaluation.samples
    several = [
        replace(p, id=f"{p.id}#{n}", human=r.text)
        for n in range(copies)
        for p, r in zip(held.prompts, held.human, strict=True)
    ]
    known = _known(train, pairs, evaluation.sequences, seed)
    report.begin(len(held.prompts) * (1 + copies) + len(known.prompts), "responses")
    greedy = sample(policy, held.prompts, sampling.greedy(), source, limit, 0, report)
    fresh = sample(policy, several, sampling, source, limit, derive(seed, "held out"), report)
    new = sample(policy, known.prompts, sampling, source, limit, derive(seed, "new"), report)

    human_logps = policy.score([p.token_ids for p in held.prompts], [r.token_ids for r in held.human])
    metrics: dict[str, float] = {
        "eval/loss": -sum(human_logps) / sum(r.tokens for r in held.human),
        "eval/tokens": _mean(r.tokens for r in fresh),
        "eval/human_tokens": _mean(r.tokens for r in held.human),
        "eval/cut": _mean(r.finish == "length" for r in fresh),
    }
    if all(p.answer is not None for p in held.prompts):
        metrics |= _accuracy(held.prompts, greedy)
    if judge.gives_scores:
        responses = [*held.human, *greedy, *fresh]
        verdicts = judged(judge, [*held.prompts, *several], responses, ledger, report)
        write(folder / "verdicts.parquet", verdicts, Verdict)
        first, second = len(held.human), len(held.human) + len(greedy)
        metrics |= _quality(verdicts[:first], verdicts[first:second], verdicts[second:])
        metrics |= {f"eval/{name}": value for name, value in tally(verdicts).items()}
    write(folder / "samples.parquet", [*greedy, *fresh, *new], Response)
    metrics |= _distributions(policy, known, pairs is not None, new, folder)
    return metrics


class _Known(NamedTuple):
    prompts: list[Prompt]
    human: list[list[int]]
    chosen: list[list[int]]
    rejected: list[list[int]]


def _known(train: Held, pairs: Sequence[Pair] | None, count: int, seed: int) -> _Known:
    """Prompts whose chosen (and rejected) responses are compared with new ones; drawn from the seed."""
    draw = np.random.default_rng(derive(seed, "sequences"))
    human_of = {r.id: r.token_ids for r in train.human}
    if pairs is None:
        some = sorted(draw.permutation(len(train.prompts))[:count].tolist())
        prompts = [train.prompts[i] for i in some]
        human = [human_of[p.id] for p in prompts]
        return _Known(prompts, human, human, [])
    prompt_of = {p.id: p for p in train.prompts}
    those = [pairs[i] for i in sorted(draw.permutation(len(pairs))[:count].tolist())]
    return _Known(
        [prompt_of[p.id] for p in those],
        [human_of[p.id] for p in those],
        [p.chosen_ids for p in those],
        [p.rejected_ids for p in those],
    )


def _accuracy(prompts: Sequence[Prompt], greedy: Sequence[Response]) -> dict[str, float]:
    """Share of greedy responses whose stated answer is right, by family and their mean."""
    families = list(dict.fromkeys(p.family for p in prompts))
    right = [(p.family, correct(p, r.text)) for p, r in zip(prompts, greedy, strict=True)]
    by_family = {f: _mean(ok for family, ok in right if family == f) for f in families}
    found = {f"eval/accuracy/{family}": value for family, value in by_family.items() if family}
    return found | {"eval/accuracy": _mean(by_family.values())}


def _quality(human: Sequence[Verdict], greedy: Sequence[Verdict], fresh: Sequence[Verdict]) -> dict[str, float]:
    """Mean scores, and how often a fresh sample has a higher, the same or a lower score than the human response."""
    of_human = {v.id: v.score for v in human}
    duels = [(v.score, of_human[v.id.rsplit("#", 1)[0]]) for v in fresh]
    decided = [(new, old) for new, old in duels if new is not None and old is not None]
    return {
        "eval/score_human": _mean(v.score for v in human if v.score is not None),
        "eval/score_greedy": _mean(v.score for v in greedy if v.score is not None),
        "eval/score": _mean(v.score for v in fresh if v.score is not None),
        "eval/win": _mean(new > old for new, old in decided),
        "eval/tie": _mean(new == old for new, old in decided),
        "eval/lose": _mean(new < old for new, old in decided),
    }


def _distributions(
    policy: Policy, known: _Known, has_pairs: bool, new: Sequence[Response], folder: Path
) -> dict[str, float]:
    """Log-probabilities of chosen, rejected and new responses under this policy, kept whole, and their means."""
    prompt_ids = [p.token_ids for p in known.prompts]
    kept: dict[str, Any] = {
        "chosen": policy.score(prompt_ids, known.chosen),
        "chosen_tokens": [len(ids) for ids in known.chosen],
        "new": [r.logprob for r in new],
        "new_tokens": [r.tokens for r in new],
    }
    metrics = {"logps/chosen": _mean(kept["chosen"]), "logps/new": _mean(kept["new"])}
    if has_pairs:
        kept["rejected"] = policy.score(prompt_ids, known.rejected)
        kept["rejected_tokens"] = [len(ids) for ids in known.rejected]
        metrics["logps/rejected"] = _mean(kept["rejected"])
        # There is no pair where the generated response was the human one word for word, so nothing rejected is. The new
        # samples are compared on the same terms, and on the same prompts: an unmoved policy has to show no distance.
        compared = [r.token_ids != human for r, human in zip(new, known.human, strict=True)]
        old = [value for value, kept_ in zip(kept["rejected"], compared, strict=True) if kept_]
        young = [value for value, kept_ in zip(kept["new"], compared, strict=True) if kept_]
        kept["compared"] = compared
        if old:
            metrics["stagnation/ks"] = float(ks_2samp(old, young).statistic)
            metrics["stagnation/ks_critical"] = ks_critical(len(old), len(young))
    with (folder / "logprobs.npz").open("wb") as stream:
        arrays: dict[str, Any] = {name: np.asarray(values) for name, values in kept.items()}
        np.savez(stream, **arrays)
    return metrics


def ks_critical(first: int, second: int) -> float:
    """The distance that two samples from one distribution exceed in 5 % of cases (large-sample Kolmogorov-Smirnov)."""
    return math.sqrt(-math.log(0.05 / 2) / 2 * (first + second) / (first * second))


def _mean(values: Any) -> float:
    found = [float(v) for v in values]
    return sum(found) / len(found) if found else 0.0
