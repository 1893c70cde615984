"""Evaluation: every metric against a count by hand or by brute force on the same rows."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kstwobign

from dnpo.errors import JudgeError
from dnpo.evaluate import Evaluation, Held
from dnpo.evaluate.metrics import evaluate, ks_critical
from dnpo.generate import Sampling
from dnpo.judges import make_verdict
from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.exact.rules import Rules
from dnpo.judges.off import NoJudge
from dnpo.policy.model import Policy
from dnpo.records import Item, Prompt, Response, Verdict
from dnpo.store import Report as AnyReport
from dnpo.tables import read
from tests.conftest import Report, World

from .conftest import torch_optimizer

MakePolicy = Callable[..., Policy]
HELD, SAMPLES, SEQUENCES = 12, 2, 20


@pytest.fixture
def measured(make_policy: MakePolicy, world: World, tmp_path: Path) -> tuple[dict[str, float], Path]:
    """A random policy, measured on twelve held-out prompts and twenty pairs."""
    policy = make_policy()
    metrics = evaluate(
        policy,
        Evaluation(samples=SAMPLES, sequences=SEQUENCES),
        Held(world.prompts[:HELD], world.human[:HELD]),
        Rules(),
        Ledger(tmp_path / "ledger.sqlite"),
        Sampling(batch_size=16),
        again=Sampling(batch_size=16),
        pairs=world.pairs(30),
        train=Held(world.prompts, world.human),
        source="policy@1",
        limit=12,
        seed=0,
        folder=tmp_path,
        report=Report(),
    )
    return metrics, tmp_path


class Silent(Rules):
    """A judge that gives no score."""

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: AnyReport
    ) -> list[Verdict]:
        return [make_verdict(response, None, "no answer") for response in responses]


@pytest.mark.parametrize("own", [False, True])
def test_errors_of_the_judge_name_its_place(own: bool, make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """A judge of evaluations alone is ``eval.judge``."""
    held, sampling = Held(world.prompts[:2], world.human[:2]), Sampling(batch_size=16)
    with pytest.raises(JudgeError) as caught:
        evaluate(
            make_policy(),
            Evaluation(samples=1, sequences=2, judge=Silent() if own else None),
            held,
            Silent(),
            Ledger(tmp_path / "ledger.sqlite"),
            sampling,
            again=sampling,
            pairs=None,
            train=held,
            source="policy@1",
            limit=4,
            seed=0,
            folder=tmp_path,
            report=Report(),
        )
    assert ("raise eval.judge.max_unscored" in str(caught.value)) == own
    assert ("raise judge.max_unscored" in str(caught.value)) != own


def test_scores_and_duels_follow_the_verdicts(measured: tuple[dict[str, float], Path]) -> None:
    metrics, folder = measured
    verdicts = read(folder / "verdicts.parquet", Verdict)
    human, greedy, fresh = verdicts[:HELD], verdicts[HELD : 2 * HELD], verdicts[2 * HELD :]
    assert [v.source for v in human] == ["human"] * HELD
    assert len(fresh) == HELD * SAMPLES
    for name, some in (("eval/score_human", human), ("eval/score_greedy", greedy), ("eval/score", fresh)):
        assert metrics[name] == pytest.approx(np.mean([v.score for v in some]))
    old = {v.id: v.score or 0.0 for v in human}
    counts = {"win": 0, "tie": 0, "lose": 0}
    for v in fresh:
        gap = (v.score or 0.0) - old[v.id.split("#")[0]]
        counts["win" if gap > 0 else "lose" if gap < 0 else "tie"] += 1
    for name, count in counts.items():
        assert metrics[f"eval/{name}"] == pytest.approx(count / len(fresh))


def test_held_out_loss_is_the_mean_over_tokens(
    measured: tuple[dict[str, float], Path], make_policy: MakePolicy, world: World
) -> None:
    slow, total, tokens = make_policy().causal_lm.double(), 0.0, 0
    slow.set_attn_implementation("eager")
    for prompt, response in zip(world.prompts[:HELD], world.human[:HELD], strict=True):
        ids = torch.tensor([prompt.token_ids + response.token_ids])
        logp = slow(input_ids=ids).logits[0].detach().log_softmax(-1)
        start = len(prompt.token_ids)
        total -= sum(float(logp[start + t - 1, token]) for t, token in enumerate(response.token_ids))
        tokens += response.tokens
    assert measured[0]["eval/loss"] == pytest.approx(total / tokens, abs=1e-5)


def test_accuracy_is_the_mean_over_families_of_right_greedy_answers(make_policy: MakePolicy, world: World) -> None:
    """Fixed responses of two families: 2 of 3 and 0 of 1 are right, so the mean is 1/3, not 2/4."""
    from dnpo.evaluate.metrics import _accuracy

    by_family: dict[str, list[int]] = {}
    for i, prompt in enumerate(world.prompts):
        by_family.setdefault(prompt.family, []).append(i)
    rows = [*by_family["arithmetic"][:3], by_family["facts"][0]]
    prompts = [world.prompts[i] for i in rows]
    texts = [f"It is {prompts[0].answer}.", f"It is {prompts[1].answer}.", "It is no number.", "It is nothing."]
    greedy = [Response(p.id, "x", t, [1], 1, "eos") for p, t in zip(prompts, texts, strict=True)]
    found = _accuracy(prompts, greedy)
    assert found == {
        "eval/accuracy/arithmetic": pytest.approx(2 / 3),
        "eval/accuracy/facts": 0.0,
        "eval/accuracy": pytest.approx(1 / 3),
    }


def test_several_samples_of_a_prompt_count_together(world: World) -> None:
    """Two prompts with three samples each. For the first, answers are right, wrong and right: pass@1 is 2/3, pass@3 is
    1 and the majority is right. For the second, one is right and the other two are equally wrong: 1/3, 1, and the
    majority is wrong."""
    from dnpo.evaluate.metrics import _several

    first, second = [p for p in world.prompts if p.family == "arithmetic"][:2]
    texts = [
        (f"It is {first.answer}.", f"The answer is {second.answer}"),
        ("It is 1000000.", "It is 1000000."),
        (f"{first.answer}", "That equals 1000000"),
    ]
    prompts = [p for _ in texts for p in (first, second)]
    said = [text for both in texts for text in both]
    fresh = [Response(p.id, "x", text, [1], 1, "eos") for p, text in zip(prompts, said, strict=True)]
    assert _several(prompts, fresh, 3) == {
        "eval/pass_at_1": pytest.approx((2 / 3 + 1 / 3) / 2),
        "eval/pass_at_3": 1.0,
        "eval/majority": 0.5,
    }


def test_label_noise_is_the_share_of_pairs_with_the_right_answer_rejected(world: World) -> None:
    """Four pairs: right over wrong, wrong over right, both right, both wrong: one of four is noise."""
    from dataclasses import replace

    from dnpo.evaluate.metrics import _labels

    prompts = [p for p in world.prompts if p.family == "arithmetic"][:4]
    texts = [(True, False), (False, True), (True, True), (False, False)]
    pairs = [
        replace(
            world.pairs(1)[0],
            id=p.id,
            chosen=f"It is {p.answer}." if chosen else "No idea.",
            rejected=f"It is {p.answer}." if rejected else "No idea.",
        )
        for p, (chosen, rejected) in zip(prompts, texts, strict=True)
    ]
    assert _labels(pairs, {p.id: p.answer for p in prompts}) == {"labels/decided": 0.5, "labels/noise": 0.25}


def test_metrics_are_the_means_of_their_items(measured: tuple[dict[str, float], Path], world: World) -> None:
    metrics, folder = measured
    items = read(folder / "items.parquet", Item)
    kinds = [(item.kind, item.sample) for item in items]
    assert kinds == [
        (k, n) for k, n in (("human", 0), ("greedy", 0), ("sample", 0), ("sample", 1)) for _ in range(HELD)
    ]
    assert [item.id for item in items] == 4 * [p.id for p in world.prompts[:HELD]]
    samples = [item for item in items if item.kind == "sample"]
    assert metrics["eval/score"] == pytest.approx(np.mean([item.score for item in samples]))
    assert metrics["eval/pass_at_1"] == pytest.approx(np.mean([bool(item.right) for item in samples]))
    assert metrics["eval/tokens"] == pytest.approx(np.mean([item.tokens for item in samples]))
    assert all(item.logprob is not None and item.second is None for item in items)


def test_distributions_are_kept_whole_and_their_distance_is_kolmogorov_smirnov(
    measured: tuple[dict[str, float], Path], make_policy: MakePolicy, world: World
) -> None:
    metrics, folder = measured
    kept = np.load(folder / "logprobs.npz")
    assert {name: len(kept[name]) for name in kept.files} == dict.fromkeys(
        ("chosen", "chosen_tokens", "rejected", "rejected_tokens", "new", "new_tokens", "compared"), SEQUENCES
    )
    assert kept["compared"].all(), "a random policy never gives the human response"
    grid = np.concatenate([kept["rejected"], kept["new"]])
    brute = max(abs((kept["rejected"] <= x).mean() - (kept["new"] <= x).mean()) for x in grid)
    assert metrics["stagnation/ks"] == pytest.approx(brute)
    # as many on both sides: Wasserstein-1 is the mean difference after sorting
    per_token = [np.sort(kept[name] / kept[f"{name}_tokens"]) for name in ("rejected", "new")]
    assert metrics["stagnation/wasserstein_per_token"] == pytest.approx(abs(per_token[0] - per_token[1]).mean())
    assert 0 <= metrics["stagnation/overlap"] <= 1
    for name in ("chosen", "rejected", "new"):
        assert metrics[f"logps/{name}"] == pytest.approx(kept[name].mean())
    # The chosen responses really are the chosen ones: the same rows, scored again.
    policy, pairs = make_policy(), world.pairs(30)
    again = policy.score([p.prompt_ids for p in pairs], [p.chosen_ids for p in pairs])
    assert all(np.isclose(again, value, atol=1e-4).any() for value in kept["chosen"])


def test_the_critical_value_is_the_five_per_cent_point() -> None:
    assert ks_critical(1200, 1200) == pytest.approx(kstwobign.ppf(0.95) * (2 / 1200) ** 0.5, rel=1e-3)
    assert ks_critical(1200, 1200) == pytest.approx(0.0554, abs=1e-4)


def test_without_judge_answers_and_pairs_some_metrics_remain(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    from dataclasses import replace

    prompts = [replace(p, answer=None, family="") for p in world.prompts]
    metrics = evaluate(
        make_policy(),
        Evaluation(samples=1, sequences=8),
        Held(prompts[:6], world.human[:6]),
        NoJudge(),
        Ledger(tmp_path / "ledger.sqlite"),
        Sampling(batch_size=16),
        again=Sampling(batch_size=16),
        pairs=None,
        train=Held(prompts, world.human),
        source="policy@0",
        limit=8,
        seed=0,
        folder=tmp_path,
        report=Report(),
    )
    assert set(metrics) == {"eval/loss", "eval/tokens", "eval/human_tokens", "eval/cut", "logps/chosen", "logps/new"}
    assert not (tmp_path / "verdicts.parquet").exists()


@pytest.mark.long
def test_an_unchanged_policy_shows_no_stagnation_distance(world: World, tmp_path: Path) -> None:
    """Pairs and fresh samples of one policy: the statistic is below the critical value in most draws.

    The policy often generates the human response, which pairs leave out.
    """

    from transformers import LlamaConfig, LlamaForCausalLM

    from dnpo.dsl import HumanChosen, label
    from dnpo.generate.hf import sample
    from dnpo.optimise.parts import PairOptimisation
    from dnpo.optimise.preference import fine_tune

    config = LlamaConfig(
        vocab_size=len(world.tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=128,
        max_position_embeddings=96,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = Policy(LlamaForCausalLM(config), world.tokenizer)
    rows = [(p.id, p.token_ids, r.token_ids) for p, r in zip(world.prompts, world.human, strict=True)]
    how = PairOptimisation(optimizer=torch_optimizer("AdamW", lr=4e-3), steps=150, batch_size=64)
    fine_tune(policy, rows, how, seed=0, folder=tmp_path, report=Report())

    sampling, above = Sampling(batch_size=120), 0
    for draw in range(8):
        generated = sample(policy, world.prompts, sampling, "policy@0", 12, 100 + draw, Report())
        pairs, counts = label(HumanChosen(), world.prompts, world.human, generated, [])
        assert counts["identical"] > 20, "the bias this guards against needs identical samples"
        metrics = evaluate(
            policy,
            Evaluation(samples=1, sequences=240),
            Held(world.prompts[:4], world.human[:4]),
            NoJudge(),
            Ledger(tmp_path / "ledger.sqlite"),
            sampling,
            again=sampling,
            pairs=pairs,
            train=Held(world.prompts, world.human),
            source="policy@1",
            limit=12,
            seed=draw,
            folder=tmp_path,
            report=Report(),
        )
        above += metrics["stagnation/ks"] > metrics["stagnation/ks_critical"]
    assert above <= 2
