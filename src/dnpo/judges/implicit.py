"""The implicit reward of a policy that was trained on preferences, as a judge (SPA, equation 7).

A policy trained by DPO against the initial model is also a reward model: the more training raised the probability of a
response, the higher its reward. Nothing is asked or generated: log-probabilities under both policies suffice. The
scores are in nats: they order the responses to one prompt, but are not points from 0 to 100.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dnpo.errors import JudgeError
from dnpo.judges import Judge, PolicyName, make_verdict
from dnpo.judges.asked.ledger import Ledger
from dnpo.records import Prompt, Response, Verdict
from dnpo.settings import Fraction, NonNegative, Positive, neutral
from dnpo.store import Report

if TYPE_CHECKING:
    from dnpo.policy.model import Policy

EQUAL = (
    "the policy is still the initial model, so the implicit reward of every response is 0 and every preference ½. "
    "Train on seed pairs first (rollout=given in the first iteration, as in method=spa), or judge otherwise until then"
)


def implicit_reward(policy: float, initial: float, tokens: int, *, beta: float, length_penalty: float = 0.0) -> float:
    """r = β · (log π_k(y|x) − log π_init(y|x)) − α · |y|, in nats (SPA, equation 7 and its length penalty).

    log p = −4 under the policy, −10 under the initial model, 20 tokens, β = 0.1, α = 0.01: 0.6 − 0.2 = 0.4.

    Args:
        policy, initial: log-probability of the response under both, summed over its tokens.
        tokens: |y|, the number of its tokens.
        beta: preference temperature.
        length_penalty: α, in nats for each token.
    """
    return beta * (policy - initial) - length_penalty * tokens


def preference(first: float, second: float) -> float:
    """p(y₁ ≻ y₂) = σ(r₁ − r₂) (SPA, equation 7). For rewards 0.4 and 0.1: σ(0.3) = 0.574…; for equal rewards: ½."""
    gap = first - second
    return 1 / (1 + math.exp(-gap)) if gap >= 0 else math.exp(gap) / (1 + math.exp(gap))


@dataclass(frozen=True, kw_only=True)
class Implicit(Judge):
    """The implicit reward of the current policy over the initial one.

    Responses need the token ids that the policy generated. Texts, as in an evaluation, are not enough. Human responses
    are judged too, if the labeller admits them.

    Args:
        beta: preference temperature.
        length_penalty: reduction of the reward for each token, in nats.
        max_unscored: share of responses that may lack a score.
    """

    measures_texts: ClassVar[bool] = False
    in_nats: ClassVar[bool] = True

    beta: Positive = 0.1
    length_penalty: NonNegative = 0.0
    max_unscored: Fraction = neutral(0.02)

    @property
    def reads_policies(self) -> frozenset[PolicyName]:
        """The policy and the initial model."""
        return frozenset(("policy", "initial"))

    def accepts_policy(self, k: int, is_initial: bool) -> str | None:
        """Refuse the initial model itself."""
        return f"judge=implicit in iteration {k}: {EQUAL}" if is_initial else None

    def with_policies(self, policies: "Mapping[PolicyName, Policy]") -> Judge:
        """The judge with both policies."""
        return _Rewarding(self, policies["policy"], policies["initial"], self.max_unscored)

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Report
    ) -> list[Verdict]:
        """Refuse: without policies there is no reward."""
        raise JudgeError("judge=implicit: compares two policies, so it labels pairs in a run and judges nowhere else")


@dataclass(frozen=True)
class _Rewarding(Judge):
    """:class:`Implicit` with its policies."""

    measures_texts: ClassVar[bool] = False
    in_nats: ClassVar[bool] = True

    settings: Implicit
    policy: "Policy"
    initial: "Policy"
    max_unscored: float

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Report
    ) -> list[Verdict]:
        """Return a verdict on each response, in nats.

        Raises:
            JudgeError: both policies have the same weights.
        """
        if self.policy.fingerprint() == self.initial.fingerprint():
            raise JudgeError(f"judge=implicit: {EQUAL}")
        ids = {prompt.id: prompt.token_ids for prompt in prompts}
        rows = {(r.id, *r.token_ids): r for r in responses if r.token_ids and ids[r.id]}  # equal responses once
        report.begin(2 * len(rows), "log-probabilities")
        sides = []
        for side in (self.policy, self.initial):
            with side.evaluating():
                sides.append(side.score([ids[r.id] for r in rows.values()], [r.token_ids for r in rows.values()]))
            report.advance(len(rows))
        rewards = {
            row: implicit_reward(
                policy,
                initial,
                len(response.token_ids),
                beta=self.settings.beta,
                length_penalty=self.settings.length_penalty,
            )
            for (row, response), policy, initial in zip(rows.items(), *sides, strict=True)
        }
        return [_verdict(response, rewards.get((response.id, *response.token_ids))) for response in responses]


def _verdict(response: Response, reward: float | None) -> Verdict:
    if reward is None:
        return make_verdict(response, None, "it has no token ids")
    if not math.isfinite(reward):
        return make_verdict(response, None, "its log-probability is not a finite number")
    return make_verdict(response, reward)
