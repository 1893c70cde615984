"""The settings of the two trainings: the parts for ``objective``, ``npo``, ``trainer`` and ``sft``.

Here are only settings. The code that they configure is imported when it is needed: the equations from ``objective.py``,
the noise from ``npo.py``, the training loop from ``training.py``.
"""

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from dnpo.errors import SettingsError
from dnpo.settings import Bound, Count, Finite, Fraction, Natural, NonNegative, Positive, neutral

if TYPE_CHECKING:
    from torch import Tensor

    from dnpo.optimise.npo import NoiseModule
    from dnpo.optimise.objective import Facts, PairLogps

Cache = Literal["auto", "on", "off"]


# --- objective


class Objective(Protocol):
    """A loss on pairs, configured by ``objective=…``.

    Attributes that an objective may have besides, as settings, properties or class attributes:

    - ``reads_reference``: whether it reads the reference's log-probabilities; True if absent.
    - ``reads_rejected``: whether it reads those of rejected responses; True if absent. If not, only chosen responses go
      through the model, and 0 stands for the others.

    Attributes:
        beta: the factor from a pair's log-ratio gap to its margin, for the noise term, reported margins and implicit
            rewards.
    """

    @property
    def beta(self) -> float: ...

    def __call__(self, policy: "PairLogps", reference: "PairLogps", facts: "Facts") -> "Tensor":
        """A loss for each of the B pairs, without their weights. Shape B."""


@dataclass(frozen=True)
class Logistic:
    """The logistic loss of SPIN (equation 4.7) and DPO (equation 7), −log σ(β · gap), with the strength of each label.

    Args:
        beta: preference temperature.
    """

    beta: Positive

    def __call__(self, policy: "PairLogps", reference: "PairLogps", facts: "Facts") -> "Tensor":
        """A loss for each of the B pairs. Shape B."""
        from dnpo.optimise.objective import logistic

        return logistic(policy, reference, facts, beta=self.beta)


def check_objective(objective: Objective) -> None:
    """Raise unless an objective says what its callers have to know.

    Raises:
        SettingsError: it has no number ``beta``, cannot be called with (policy, reference, facts), or one of its
            optional attributes is not true or false.
    """
    beta = getattr(objective, "beta", None)
    name = objective.target if isinstance(objective, Bound) else type(objective).__name__
    if not isinstance(beta, int | float) or isinstance(beta, bool) or not math.isfinite(beta):
        raise SettingsError(
            f"objective: {name} has no number beta, the factor of reported margins and rewards; give it a field or "
            "property of this name (1.0 reports plain log-ratios, in nats)"
        )
    for flag in ("reads_reference", "reads_rejected"):
        value = getattr(objective, flag, True)
        if not isinstance(value, bool):
            raise SettingsError(f"objective: {name}.{flag} is {value!r}; expected true or false")
    signature = inspect.signature(objective.resolve() if isinstance(objective, Bound) else objective)
    settings = objective.settings if isinstance(objective, Bound) else {}
    try:
        signature.bind(None, None, None, **settings)
    except TypeError as error:
        raise SettingsError(
            f"objective: {name} cannot be called with (policy, reference, facts): {error}. Facts are strengths, "
            "weights and lengths of the pairs; an objective that needs none still takes them"
        ) from error


# --- noise


class Noise:
    """Noise on the reference's log-probability of rejected responses, configured by ``npo=…``.

    Attributes:
        reads_states: whether it needs the reference's hidden states, or only its log-probability.
        cache_hidden: whether these are kept on disk for the iteration: ``on``, ``off``, or ``auto``, which keeps them
            if more than one epoch reads them and the disk has room.
        like: noise whose mean shift, from the same policy and pairs, it matches; None for most.
    """

    reads_states: bool = False
    cache_hidden: Cache = "off"
    like: "Noise | None" = None

    def module(self, width: int, vocabulary: int) -> "NoiseModule":
        """Create the module that perturbs log-probabilities, with its parameters if it has any.

        Args:
            width: width of the reference's hidden states.
            vocabulary: number of entries of its output head.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class NoNoise(Noise):
    """No noise: the policy term is the plain objective."""

    def module(self, width: int, vocabulary: int) -> "NoiseModule":
        """A module that changes nothing."""
        from dnpo.optimise.npo import SilentModule

        return SilentModule()


@dataclass(frozen=True)
class TrainableNoise(Noise):
    """A standard deviation for every token position and vocabulary entry, log s = W h + b, trained against the policy.

    Args:
        alpha: weight of mean(s²) in the loss.
        max_variance: upper bound of s².
        learning_rate: constant learning rate of Adam for W and b.
        start_log_std: initial value of b.
        cache_hidden: as in :class:`Noise`; it changes rounding and the amount of computation.
    """

    reads_states = True

    alpha: NonNegative = 0.1
    max_variance: Positive = 1.0
    learning_rate: Positive = 1e-3
    start_log_std: Finite = -1.0
    cache_hidden: Cache = neutral("auto")

    def module(self, width: int, vocabulary: int) -> "NoiseModule":
        """The noise with W at 0 and b at ``start_log_std``."""
        from dnpo.optimise.npo import TrainableModule

        return TrainableModule(
            width,
            vocabulary,
            alpha=self.alpha,
            max_variance=self.max_variance,
            learning_rate=self.learning_rate,
            start_log_std=self.start_log_std,
        )


@dataclass(frozen=True)
class FixedNoise(Noise):
    """The same variance everywhere, not trained (the DNPO paper's ablation, N(0, 0.5) read as a variance).

    Args:
        variance: s².
        cache_hidden: as in :class:`Noise`.
    """

    reads_states = True

    variance: NonNegative = 0.5
    cache_hidden: Cache = neutral("auto")

    def module(self, width: int, vocabulary: int) -> "NoiseModule":
        """The noise, which has nothing to train."""
        from dnpo.optimise.npo import FixedModule

        return FixedModule(variance=self.variance)


@dataclass(frozen=True)
class Offset(Noise):
    """A control that the paper lacks: the mean effect of noise as a constant.

    Args:
        shift: by how much the reference's log-probability of rejected responses is lowered, in nats; comparable with
            the metric ``npo/shift`` of a run with noise.
    """

    shift: Finite

    def module(self, width: int, vocabulary: int) -> "NoiseModule":
        """The constant."""
        from dnpo.optimise.npo import OffsetModule

        return OffsetModule(shift=self.shift)


@dataclass(frozen=True)
class MatchedOffset(Noise):
    """An :class:`Offset` equal to the mean shift of noise in the same iteration, from the same policy and pairs.

    Args:
        like: that noise; neutral, because the key of its training is among the inputs of the stage.
    """

    like: Noise = neutral()

    def at(self, shift: float) -> Offset:
        """The offset for a mean shift in nats."""
        return Offset(shift=shift)


# --- training


@dataclass(frozen=True)
class Optimisation:
    """How to train, configured by ``sft=…``.

    Args:
        epochs: passes over the rows; 0: no training.
        steps: number of policy steps, over as many epochs as needed, instead of ``epochs``; 0: by epochs.
        batch_size: maximum number of rows in a policy step; the steps of an epoch differ by at most one row.
        micro_batch_size: maximum number of rows that go through the model at once; 0: the whole batch. It changes only
            memory and rounding; samples drawn later may differ by that rounding.
        optimizer: the policy's optimizer, without its parameters; fused if torch supports it, unless set otherwise.
        warmup: share of the policy steps over which the learning rate rises from 0.
        decay: whether it then falls linearly to 0 or stays constant.
        clip: maximum gradient norm of a player; 0: no clipping.
        autocast: bf16 matrix products with parameters of higher precision.
        checkpoint_every: policy steps between checkpoints; a killed run repeats at most this many.
        checkpointing: keep one hidden state a layer for the backward pass and compute the rest again: less memory, a
            third more time.
        compile: compile the model's body by torch.compile.
    """

    optimizer: Bound
    epochs: Natural = 1
    steps: Natural = 0
    batch_size: Count = 64
    micro_batch_size: Natural = neutral(0)
    warmup: Fraction = 0.1
    decay: bool = True
    clip: NonNegative = 1.0
    autocast: bool = False
    checkpoint_every: Count = neutral(50)
    checkpointing: bool = neutral(False)
    compile: bool = neutral(False)

    @property
    def rows_at_once(self) -> int:
        """The maximum number of rows that go through the model at once."""
        return self.micro_batch_size or self.batch_size

    def check(self, name: str) -> None:
        """Check that the optimizer can be created, before hours of generating.

        Args:
            name: dotted name of the settings, such as ``trainer``.

        Raises:
            SettingsError: it cannot be imported, or does not take its settings.
        """
        from torch import nn, zeros

        self.optimizer.check(f"{name}.optimizer")
        try:
            self.optimizer([nn.Parameter(zeros(1))])
        except (TypeError, ValueError) as error:
            raise SettingsError(f"{name}.optimizer: {error}") from error

    def groups(self, rows: int, seed: int) -> list[tuple[int, ...]]:
        """The rows of each policy step of a training on ``rows`` rows."""
        from dnpo.optimise.batches import schedule

        return schedule(rows, self.batch_size, self.epochs, seed, self.steps or None)

    def passes(self, rows: int) -> float:
        """How often a training on ``rows`` rows reads each of them."""
        return self.steps / math.ceil(rows / self.batch_size) if self.steps else float(self.epochs)

    def factor(self, step: int, total: int) -> float:
        """Multiple of the peak learning rate at a policy step: linear warm-up, then linear decay or none."""
        warm = math.ceil(self.warmup * total)
        if step < warm:
            return (step + 1) / (warm + 1)
        return (total - step) / max(total - warm, 1) if self.decay else 1.0


@dataclass(frozen=True)
class PairOptimisation(Optimisation):
    """How to train on pairs, configured by ``trainer=…``.

    Args:
        share_prompt: compute the prompt of a pair once for both responses.
    """

    share_prompt: bool = neutral(True)
