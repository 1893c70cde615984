"""Judges that read policies or ratings of the data: by hand, against plain forward passes, at their limits."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dnpo.errors import JudgeError, SettingsError
from dnpo.judges import Judge, judge_responses
from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.ensemble import Ensemble
from dnpo.judges.exact.rules import Correct, Rules
from dnpo.judges.implicit import Implicit, implicit_reward, preference
from dnpo.judges.longer import Longer
from dnpo.judges.off import NoJudge
from dnpo.policy.model import Policy
from dnpo.records import HUMAN, Response, Verdict
from tests.conftest import Report, World, verdicts

NEW = "policy@1"
MakePolicy = Callable[..., Policy]


def sampled(world: World, count: int, samples: int = 2) -> list[Response]:
    """Responses to the first prompts: the human ones to other prompts, as good as any."""
    return [
        replace(world.human[(i + 5 * s + 1) % len(world.human)], id=world.prompts[i].id, source=NEW, sample=s)
        for i in range(count)
        for s in range(samples)
    ]


def plain_logp(policy: Policy, prompt: list[int], response: list[int]) -> float:
    """log p(response | prompt) by the model's own forward pass and a full softmax, in float64."""
    with torch.no_grad():
        logits = policy.causal_lm(input_ids=torch.tensor([[*prompt, *response]])).logits[0].double()
    logps = logits.log_softmax(-1)
    return sum(float(logps[len(prompt) - 1 + t, token]) for t, token in enumerate(response))


# --- what all judges keep to


TWO = {"a": Longer(), "b": Rules()}


@pytest.mark.parametrize(
    "judge", [NoJudge(), Longer(), Rules(), Correct(), Ensemble(TWO, "mean"), Ensemble(TWO, "majority")]
)
def test_verdicts_name_the_sample(judge: Judge, world: World) -> None:
    """Two samples of one source to a prompt keep two verdicts, with the scores of their own texts."""
    responses = [*world.human[:4], *sampled(world, 4)]
    found = verdicts(judge, world.prompts, responses)
    assert [(v.id, v.source, v.sample) for v in found] == [(r.id, r.source, r.sample) for r in responses]
    assert len({(v.id, v.source, v.sample) for v in found}) == len(responses)
    for response, verdict in zip(responses, found, strict=True):
        alone = verdicts(judge, world.prompts, [*world.human[:4], response])[-1]
        assert alone == verdict


def test_a_majority_finds_human_responses_that_nobody_passed(world: World) -> None:
    judge = Ensemble(TWO, "majority")
    new = sampled(world, 6)
    assert verdicts(judge, world.prompts, new) == verdicts(judge, world.prompts, [*world.human[:6], *new])[6:]


class Mixed(Judge):
    """Forgets the samples, and returns verdicts in the order it was told."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, prompts, responses, ledger, report):  # type: ignore[no-untyped-def]
        return [Verdict(r.id, r.source, float(r.sample)) for r in responses[:: self.step]]


def test_verdicts_are_numbered_like_their_responses(world: World, tmp_path: Path, report: Report) -> None:
    new = sampled(world, 3)
    found = judge_responses(Mixed(1), world.prompts, new, Ledger(tmp_path / "l.sqlite"), report)
    assert [v.sample for v in found] == [0, 1] * 3 == [v.score for v in found]
    with pytest.raises(JudgeError, match="order"):
        judge_responses(Mixed(-1), world.prompts, new, Ledger(tmp_path / "l.sqlite"), report)


def test_a_right_answer_is_100_and_any_other_0(world: World) -> None:
    """What ReST-EM needs: a reward of two values, for each sample."""
    prompt = next(p for p in world.prompts if p.family == "arithmetic")
    texts = [f"It is {prompt.answer}.", "It is 12345.", ""]
    responses = [Response(prompt.id, NEW, t, [5, 2], 2, "eos", sample=n) for n, t in enumerate(texts)]
    assert [(v.sample, v.score) for v in verdicts(Correct(), [prompt], responses)] == [(0, 100.0), (1, 0.0), (2, 0.0)]


# --- the implicit reward


def test_the_implicit_reward_by_hand() -> None:
    assert implicit_reward(-4.0, -10.0, 20, beta=0.1, length_penalty=0.01) == pytest.approx(0.4, abs=1e-15)
    assert implicit_reward(-7.5, -7.5, 9, beta=2.0) == 0.0
    assert preference(0.4, 0.1) == pytest.approx(math.exp(0.4) / (math.exp(0.4) + math.exp(0.1)), abs=1e-15)
    assert preference(1.25, 1.25) == 0.5
    assert [preference(800.0, -800.0), preference(-800.0, 800.0)] == [1.0, 0.0]


@pytest.mark.parametrize("penalty", [0.0, 0.05])
def test_the_implicit_reward_against_plain_forward_passes(
    penalty: float, world: World, make_policy: MakePolicy, report: Report
) -> None:
    policy, initial = make_policy(1), make_policy(0)
    responses = [*world.human[:5], *sampled(world, 5)]
    judge = Implicit(beta=0.3, length_penalty=penalty).with_policies({"policy": policy, "initial": initial})
    found = judge(world.prompts, responses, Ledger(Path("none")), report)
    ids = {p.id: p.token_ids for p in world.prompts}
    for response, verdict in zip(responses, found, strict=True):
        logps = [plain_logp(side, ids[response.id], response.token_ids) for side in (policy, initial)]
        expected = 0.3 * (logps[0] - logps[1]) - penalty * len(response.token_ids)
        assert verdict.score == pytest.approx(expected, abs=1e-4)
        assert (verdict.id, verdict.source, verdict.sample) == (response.id, response.source, response.sample)
    assert report.done == report.total == 2 * len(responses)


def test_the_initial_model_has_no_implicit_reward(world: World, make_policy: MakePolicy) -> None:
    """Refused by its weights, and before that by the iteration."""
    judge = Implicit()
    same = judge.with_policies({"policy": make_policy(3), "initial": make_policy(3)})
    with pytest.raises(JudgeError, match="every preference ½"):
        verdicts(same, world.prompts, sampled(world, 2))
    assert "iteration 0" in (judge.accepts_policy(0, True) or "")
    assert judge.accepts_policy(0, False) is None
    assert judge.reads_policies == {"policy", "initial"}
    assert not judge.measures_texts


def test_what_the_implicit_reward_cannot_judge(world: World, make_policy: MakePolicy) -> None:
    judge = Implicit().with_policies({"policy": make_policy(1), "initial": make_policy(0)})
    text = Response(world.prompts[0].id, HUMAN, "It is 5.", [], 0, "eos")
    first, second = verdicts(judge, world.prompts, [text, sampled(world, 1)[0]])
    assert first.score is None
    assert "token ids" in first.reason
    assert second.score is not None
    with pytest.raises(JudgeError, match="judge=implicit"):
        verdicts(Implicit(), world.prompts, sampled(world, 1))
    with pytest.raises(SettingsError, match=r"members\.b"):
        Ensemble({"a": Longer(), "b": Implicit()})


def test_the_longer_response_loses_by_the_length_penalty(world: World, make_policy: MakePolicy) -> None:
    """With a penalty far above all log-ratios, the order is that of length."""
    judge = Implicit(beta=0.01, length_penalty=100.0).with_policies(
        {"policy": make_policy(1), "initial": make_policy(0)}
    )
    responses = sampled(world, 12)
    scores = [v.score or 0.0 for v in verdicts(judge, world.prompts, responses)]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    assert [responses[i].tokens for i in order] == sorted(r.tokens for r in responses)
