"""Proximal policy optimization: the policy learns from the scores of its responses (Schulman et al. 2017).

This file has only the settings. ``training.py`` has the training, ``equations.py`` the equations.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dnpo.settings import Fraction, NonNegative, Positive

if TYPE_CHECKING:
    from dnpo.optimise.live import Clock, Source
    from dnpo.optimise.parts import Optimisation
    from dnpo.policy.model import Policy
    from dnpo.records import Rollout
    from dnpo.store import Report


@dataclass(frozen=True)
class ClippedRatio:
    """The clipped loss of importance ratios, with a value head trained alongside; for rollouts made during training.

    The reward of a response is its score times ``reward_scale``, minus β times the log-ratio of policy and reference,
    token by token. The gradient is exact for responses sampled at temperature 1 without truncation.

    Args:
        beta: weight of the log-ratio in the reward; the best policy is π_ref · exp(reward / β), normalised. 0: no
            reference is read.
        clip: ε. Once a token's ratio differs from 1 by more than this, it gets no gradient that moves it further;
            0: no limit.
        value_clip: a value that has moved towards its target by more than this since the policy responded has no
            gradient; 0: no limit.
        value_learning_rate: constant learning rate of Adam for the value head; 0: there is no value head, and all
            values are 0.
        value_weight: weight of the value loss in the gradient of the policy's body; 0: only the head learns values.
        discount: γ; a reward n tokens later counts γⁿ.
        trace: λ; 1: an advantage is the sum of later rewards minus the value; 0: only the next reward and value count.
        whiten: shift and scale the advantages of a rollout's tokens to mean 0 and variance 1.
        reward_scale: the reward for one point of the judge's score.
    """

    learns_from: ClassVar[str] = "rollouts"
    reads_rejected: ClassVar[bool] = False

    beta: NonNegative = 0.05
    clip: NonNegative = 0.2
    value_clip: NonNegative = 0.2
    value_learning_rate: NonNegative = 1.0e-3
    value_weight: NonNegative = 0.0
    discount: Fraction = 1.0
    trace: Fraction = 0.95
    whiten: bool = True
    reward_scale: Positive = 0.01

    @property
    def reads_reference(self) -> bool:
        """Whether it reads the reference's log-probabilities."""
        return self.beta > 0

    def train(
        self,
        policy: "Policy",
        *,
        source: "Source[Rollout]",
        clock: "Clock",
        reference: "Policy | None",
        optimisation: "Optimisation",
        seed: int,
        folder: Path,
        report: "Report",
    ) -> tuple[list[dict[str, float]], int]:
        """Train the policy in place on rollouts that are made as it is trained.

        Args:
            policy: the policy; its module is changed. With LoRA it has a fresh adapter.
            source: makes the rollouts.
            clock: decides when rollouts are made.
            reference: the frozen reference; None if β is 0.
            optimisation: how to train.
            seed: seed of the draws from the buffer.
            folder: folder for checkpoints and for the tokens' log-probabilities, values and advantages; its subfolder
                ``rollouts`` is not needed once the policy is written.
            report: receives the progress.

        Returns:
            A row of metrics for each policy step, and the number of tokens that went through the policy in training.
        """
        from dnpo.methods.ppo.training import train

        return train(
            self,
            policy,
            source=source,
            clock=clock,
            reference=reference,
            optimisation=optimisation,
            seed=seed,
            folder=folder,
            report=report,
        )
