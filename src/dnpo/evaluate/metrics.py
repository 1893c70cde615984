"""Measure a policy: metrics, and the rows and log-probabilities behind them.

With a judge: scores of greedy and of sampled responses, and duels of fresh samples with human responses. With
verifiable answers: accuracy of greedy responses by family, pass@k and majority vote of the samples, and the share of
pairs with the wrong answer chosen. Always: held-out loss of human responses, lengths, and log-probabilities of chosen,
rejected and new responses under the new policy. Distances between the log-probabilities of rejected and of new
responses measure stagnation.

Further measures (texts, drift, a second judge, the leaderboard) are separate stages, in ``stages/measures.py``, that
read the files written here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dnpo import ranks
from dnpo.data.verifiable import correct, is_right, read_answer
from dnpo.evaluate import OWN_JUDGE, Evaluation, Held
from dnpo.evaluate.distances import ks, overlap, overlap_by_chance, wasserstein
from dnpo.generate import Sampling
from dnpo.generate.engines import Engines
from dnpo.generate.hf import sample
from dnpo.judges import Judge, judge_responses, tally
from dnpo.judges.asked.ledger import Ledger
from dnpo.policy.model import Policy
from dnpo.records import Item, Pair, Prompt, Response, Verdict
from dnpo.seeding import derive
from dnpo.settings import named_within
from dnpo.stats.sampling import majority, pass_at_k
from dnpo.store import Report
from dnpo.tables import column, take, with_ids, write


def evaluate(
    policy: Policy,
    evaluation: Evaluation,
    held: Held,
    judge: Judge,
    ledger: Ledger,
    sampling: Sampling,
    *,
    again: Sampling,
    pairs: Sequence[Pair] | None,
    train: Held,
    source: str,
    limit: int,
    seed: int,
    folder: Path,
    report: Report,
    engines: Engines | None = None,
) -> dict[str, float]:
    """Measure a policy: scores, accuracy, held-out loss, stagnation.

    If several processes share the work, one of them judges and writes, and the others return no metrics.

    Args:
        policy: the policy to measure.
        held: the held-out split.
        judge: gives the scores; without a judge the metrics that need scores are left out.
        ledger: stores the judge's replies, so that no question is asked twice.
        sampling: how the policy samples.
        again: how it samples new responses to training prompts: in the same way as for training.
        pairs: the pairs that the policy was trained on, if any.
        train: training prompts, for fresh samples if there are no pairs.
        source: ``source`` of the fresh samples.
        limit: maximum number of completion tokens.
        seed: seed of the samples.
        folder: where ``samples.parquet``, ``verdicts.parquet``, ``items.parquet`` and ``logprobs.npz`` are written.
        report: receives the progress.
        engines: the engines that sample; None: this process samples.
    """
    copies = evaluation.samples
    several = repeat_prompts(held, copies)
    known = _choose_known(train, pairs, evaluation.sequences, seed)
    report.begin(len(held.prompts) * (1 + copies) + len(known.prompts), "responses")
    with engines or Engines(policy, folder, None, report) as engines:
        engine, other = engines.of(sampling), engines.of(again)
        greedy = sample(policy, held.prompts, sampling.greedy(), source, limit, 0, report, engine)
        fresh = sample(policy, several, sampling, source, limit, derive(seed, "held out"), report, engine)
        new = sample(policy, known.prompts, again, source, limit, derive(seed, "new"), report, other)

    human_logps = _score(policy, held.prompts, [r.token_ids for r in held.human])
    both = pairs is not None and all(known.rejected)  # responses chosen alone have no counterpart
    chosen = _score(policy, known.prompts, known.chosen)
    rejected = _score(policy, known.prompts, known.rejected) if both else None
    if not ranks.leads():  # the rest needs no policy
        return {}
    metrics: dict[str, float] = {
        "eval/loss": -sum(human_logps) / sum(r.tokens for r in held.human),
        "eval/tokens": _mean(r.tokens for r in fresh),
        "eval/human_tokens": _mean(r.tokens for r in held.human),
        "eval/cut": _mean(r.finish == "length" for r in fresh),
    }
    checkable = all(p.answer is not None for p in held.prompts)
    if checkable:
        metrics |= _accuracy(held.prompts, greedy) | _several(several, fresh, copies)
    answers = column(train.prompts, "answer")
    if pairs is not None and None not in answers:
        metrics |= _labels(pairs, dict(zip(column(train.prompts, "id"), answers, strict=True)))
    verdicts: list[Verdict] = []
    if judge.gives_scores:
        responses = [*held.human, *greedy, *fresh]
        with named_within(OWN_JUDGE if evaluation.judge is not None else {}):
            verdicts = judge_responses(judge, [*held.prompts, *several], responses, ledger, report)
        write(folder / "verdicts.parquet", verdicts, Verdict)
        metrics |= {f"eval/{name}": value for name, value in quality(verdicts, len(held.human)).items()}
        metrics |= {f"eval/{name}": value for name, value in tally(verdicts).items()}
    write(folder / "samples.parquet", [*greedy, *fresh, *new], Response)
    write(folder / "items.parquet", _items(held, human_logps, greedy, fresh, verdicts, checkable), Item)
    metrics |= _distributions(known, chosen, rejected, new, folder)
    return metrics


def _score(policy: Policy, prompts: Sequence[Prompt], completions: Sequence[list[int]]) -> list[float]:
    """Log-probabilities of completions under the policy. Each is computed by one rank; all ranks return all."""
    rows = ranks.share(list(zip(prompts, completions, strict=True)))
    return ranks.join_shares(policy.score([p.token_ids for p, _ in rows], [ids for _, ids in rows]))


def repeat_prompts(held: Held, copies: int) -> list[Prompt]:
    """Repeat the held-out prompts for each sample: number 0 for all prompts, then number 1 for all, …"""
    return [
        replace(p, id=f"{p.id}#{n}", human=r.text)
        for n in range(copies)
        for p, r in zip(held.prompts, held.human, strict=True)
    ]


class _Known(NamedTuple):
    prompts: list[Prompt]
    human: list[list[int]]
    chosen: list[list[int]]
    rejected: list[list[int]]


def _choose_known(train: Held, pairs: Sequence[Pair] | None, count: int, seed: int) -> _Known:
    """Draw the prompts whose chosen (and rejected) responses are compared with new ones."""
    draw = np.random.default_rng(derive(seed, "sequences"))
    if pairs is None:
        some = sorted(draw.permutation(len(train.prompts))[:count].tolist())
        human = [response.token_ids for response in take(train.human, some)]
        return _Known(list(take(train.prompts, some)), human, human, [])
    those = list(take(pairs, sorted(draw.permutation(len(pairs))[:count].tolist())))
    ids = {p.id for p in those}
    prompt_of = {p.id: p for p in with_ids(train.prompts, ids)}
    human_of = {r.id: r.token_ids for r in with_ids(train.human, ids)}
    return _Known(
        [prompt_of[p.id] for p in those],
        [human_of[p.id] for p in those],
        [p.chosen_ids for p in those],
        [p.rejected_ids for p in those],
    )


def _accuracy(prompts: Sequence[Prompt], greedy: Sequence[Response]) -> dict[str, float]:
    """Share of greedy responses with the right answer, for each family and averaged over families."""
    families = list(dict.fromkeys(p.family for p in prompts))
    right = [(p.family, correct(p, r.text)) for p, r in zip(prompts, greedy, strict=True)]
    by_family = {f: _mean(ok for family, ok in right if family == f) for f in families}
    metrics = {f"eval/accuracy/{family}": value for family, value in by_family.items() if family}
    return metrics | {"eval/accuracy": _mean(by_family.values())}


def _several(prompts: Sequence[Prompt], fresh: Sequence[Response], copies: int) -> dict[str, float]:
    """pass@1 and pass@n from n samples for each prompt, and how often the most frequent answer is right."""
    count = len(prompts) // copies
    right = [correct(p, r.text) for p, r in zip(prompts, fresh, strict=True)]
    # If an answer contains "is" or a similar word, only a part of it is extracted; so all right answers get one name.
    answers = [("right", "") if ok else ("", read_answer(r.text)) for ok, r in zip(right, fresh, strict=True)]
    hits = [sum(right[i::count]) for i in range(count)]
    metrics = {f"eval/pass_at_{k}": _mean(pass_at_k(copies, n, k) for n in hits) for k in dict.fromkeys((1, copies))}
    votes = [majority(answers[i::count]) for i in range(count)]
    return metrics | {"eval/majority": _mean(vote == ("right", "") for vote in votes)}


def _labels(pairs: Sequence[Pair], answers: Mapping[str, str | None]) -> dict[str, float]:
    """Shares of pairs: with exactly one right answer, and with only the rejected one right (label noise)."""
    both = (p for p in pairs if p.rejected_ids)
    right = [(is_right(answers[p.id], p.chosen), is_right(answers[p.id], p.rejected)) for p in both]
    return (
        {}
        if not right
        else {
            "labels/decided": _mean(chosen != rejected for chosen, rejected in right),
            "labels/noise": _mean(rejected and not chosen for chosen, rejected in right),
        }
    )


def quality(verdicts: Sequence[Verdict], count: int) -> dict[str, float]:
    """Mean scores, and how often a fresh sample scores higher than, the same as or lower than the human response.

    Args:
        verdicts: verdicts on the human responses, the greedy ones and the samples, in this order.
        count: number of held-out prompts.
    """
    human, greedy, fresh = verdicts[:count], verdicts[count : 2 * count], verdicts[2 * count :]
    of_human = {v.id: v.score for v in human}
    duels = [(v.score, of_human[v.id.rsplit("#", 1)[0]]) for v in fresh]
    decided = [(new, old) for new, old in duels if new is not None and old is not None]
    return {
        "score_human": _mean(v.score for v in human if v.score is not None),
        "score_greedy": _mean(v.score for v in greedy if v.score is not None),
        "score": _mean(v.score for v in fresh if v.score is not None),
        "win": _mean(new > old for new, old in decided),
        "tie": _mean(new == old for new, old in decided),
        "lose": _mean(new < old for new, old in decided),
    }


def _items(
    held: Held,
    human_logps: Sequence[float],
    greedy: Sequence[Response],
    fresh: Sequence[Response],
    verdicts: Sequence[Verdict],
    checkable: bool,
) -> list[Item]:
    """The result of each held-out response, in the order of the verdicts."""
    count = len(held.prompts)
    items = []
    for i, response in enumerate([*held.human, *greedy, *fresh]):
        prompt = held.prompts[i % count]
        items.append(
            Item(
                id=prompt.id,
                family=prompt.family,
                kind="human" if i < count else "greedy" if i < 2 * count else "sample",
                sample=max(i // count - 2, 0),
                score=verdicts[i].score if verdicts else None,
                second=None,
                right=correct(prompt, response.text) if checkable else None,
                tokens=response.tokens,
                logprob=human_logps[i] if i < count else response.logprob,
            )
        )
    return items


def _distributions(
    known: _Known, chosen: list[float], rejected: list[float] | None, new: Sequence[Response], folder: Path
) -> dict[str, float]:
    """Write the log-probabilities of chosen, rejected and new responses under the policy; return summary metrics.

    Args:
        rejected: None if there are no rejected responses.
    """
    logps: dict[str, Any] = {
        "chosen": chosen,
        "chosen_tokens": [len(ids) for ids in known.chosen],
        "new": [r.logprob for r in new],
        "new_tokens": [r.tokens for r in new],
    }
    metrics = {"logps/chosen": _mean(logps["chosen"]), "logps/new": _mean(logps["new"])}
    if rejected is not None:
        logps["rejected"] = rejected
        logps["rejected_tokens"] = [len(ids) for ids in known.rejected]
        metrics["logps/rejected"] = _mean(logps["rejected"])
        # Pairs of identical responses are dropped, so no rejected response equals the human one. New samples that
        # equal it are left out too, with their prompts: an unchanged policy must show no distance.
        compared = [r.token_ids != human for r, human in zip(new, known.human, strict=True)]
        logps["compared"] = compared
    arrays: dict[str, Any] = {name: np.asarray(values) for name, values in logps.items()}
    if rejected is not None and any(logps["compared"]):
        metrics |= _stagnation(arrays)
    with (folder / "logprobs.npz").open("wb") as stream:
        np.savez(stream, **arrays)
    return metrics


def _stagnation(logps: dict[str, Any]) -> dict[str, float]:
    """Distances between newly generated and rejected responses, by log-probabilities, summed and per token."""
    metrics: dict[str, float] = {}
    for ending, per_token in (("", False), ("_per_token", True)):
        old, young = (
            (logps[name] / np.maximum(logps[f"{name}_tokens"], 1) if per_token else logps[name])[logps["compared"]]
            for name in ("rejected", "new")
        )
        metrics |= {
            f"stagnation/ks{ending}": ks(old, young),
            f"stagnation/wasserstein{ending}": wasserstein(old, young),
            f"stagnation/overlap{ending}": overlap(old, young),
            f"stagnation/overlap_by_chance{ending}": overlap_by_chance(old, young),
        }
    count = int(logps["compared"].sum())
    return metrics | {"stagnation/ks_critical": ks_critical(count, count)}


def ks_critical(first: int, second: int) -> float:
    """The distance that two samples of one distribution exceed in 5 % of cases (large-sample Kolmogorov-Smirnov)."""
    return math.sqrt(-math.log(0.05 / 2) / 2 * (first + second) / (first * second))


def _mean(values: Any) -> float:
    numbers = [float(v) for v in values]
    return sum(numbers) / len(numbers) if numbers else 0.0
