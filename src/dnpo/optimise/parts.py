"""The settings of the two trainings: the parts for ``objective``, ``npo``, ``trainer`` and ``sft``.

This file has only settings. The code that they configure is imported when it is needed: the equations from
``objective.py``, the noise from ``npo.py``, the training loop from ``training.py``.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from dnpo.errors import SettingsError
from dnpo.settings import (
    Bound,
    Count,
    Finite,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Range,
    check_value,
    expected,
    is_valid,
    neutral,
    settings_key,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dnpo.optimise.npo import NoiseModule
    from dnpo.optimise.objective import Facts, PairLogps
    from dnpo.optimise.watch import Watch

Cache = Literal["auto", "on", "off"]


# --- objective


class Objective(Protocol):
    """A loss on pairs, configured by ``objective=…``.

    Optional attributes, as settings, properties or class attributes:

    - ``reads_reference``: whether it reads the reference's log-probabilities; True if absent.
    - ``reads_rejected``: whether it reads the log-probabilities of rejected responses; True if absent. If not, only
      chosen responses go through the model, and the log-probabilities of the others are 0.
    - ``needs_states``: whether it reads the reference's hidden states; False if absent.
    - ``keeps_states``: whether the hidden states of both responses are kept on disk, if it reads them in every step:
      ``on``, ``off`` or ``auto``, as in ``Noise.cache_hidden``; off if absent.
    - ``watches(total)``: its further measurements in a training of ``total`` policy steps, see ``watch.py``; none if
      absent.
    - ``train``: a training on scored responses, which replaces the loss on pairs; see
      :func:`dnpo.stages.live.train_on_responses`.

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
        smoothing: the expected share of wrong labels.
        xi_min: where σ(margin) − shift is below this, the loss of a pair with a shift (of curriculum=robust) is
            replaced by its tangent; pairs without a shift have no such limit.
    """

    beta: Positive
    smoothing: Fraction = 0.0
    xi_min: Positive = 0.05

    def identity(self) -> Mapping[str, Any]:
        """β, and other settings only if they differ from plain DPO, so that stage keys without them stay valid."""
        own = {"smoothing": self.smoothing, "xi_min": self.xi_min}
        plain = {"_target_": type(self).__name__, "beta": self.beta}
        return plain | {name: value for name, value in own.items() if value != getattr(Logistic, name)}

    def __call__(self, policy: "PairLogps", reference: "PairLogps", facts: "Facts") -> "Tensor":
        """A loss for each of the B pairs. Shape B."""
        from dnpo.optimise.objective import logistic

        return logistic(policy, reference, facts, beta=self.beta, smoothing=self.smoothing, xi_min=self.xi_min)


@dataclass(frozen=True)
class Squared:
    """The squared loss of IPO: the target of the gap is 1 / (2β), and less if labels are not sure.

    Args:
        beta: preference temperature (the paper's τ).
        mean: use log-ratios per token instead of log-ratios of whole responses.
    """

    beta: Positive
    mean: bool = False

    def __call__(self, policy: "PairLogps", reference: "PairLogps", facts: "Facts") -> "Tensor":
        """A loss for each of the B pairs. Shape B."""
        from dnpo.optimise.objective import squared

        return squared(policy, reference, facts, beta=self.beta, mean=self.mean)


@dataclass(frozen=True)
class OddsRatio:
    """The loss of ORPO: the loss of fine-tuning on chosen responses plus the logistic loss of log odds. No reference.

    Args:
        weight: weight of the logistic loss (the paper's λ).
    """

    reads_reference: ClassVar[bool] = False
    beta: ClassVar[float] = 1.0  # margins are reported in nats

    weight: NonNegative = 0.1

    def __call__(self, policy: "PairLogps", reference: "PairLogps", facts: "Facts") -> "Tensor":
        """A loss for each of the B pairs. Shape B."""
        from dnpo.optimise.objective import odds_ratio

        return odds_ratio(policy, facts, weight=self.weight)


@dataclass(frozen=True)
class PerToken:
    """The loss of SimPO: the logistic loss of log-probabilities per token. It reads no reference.

    Args:
        beta: factor of log-probabilities per token.
        margin: the margin by which the chosen response should win, after that factor (the paper's γ).
    """

    reads_reference: ClassVar[bool] = False

    beta: Positive = 2.0
    margin: NonNegative = 1.0

    def __call__(self, policy: "PairLogps", reference: "PairLogps", facts: "Facts") -> "Tensor":
        """A loss for each of the B pairs. Shape B."""
        from dnpo.optimise.objective import without_reference

        return without_reference(policy, facts, beta=self.beta, margin=self.margin)


@dataclass(frozen=True)
class Likelihood:
    """Fine-tuning on chosen responses. It reads no reference, rejected responses or strengths.

    Args:
        mean: the loss of a response is the mean over its tokens instead of the sum.
    """

    reads_reference: ClassVar[bool] = False
    reads_rejected: ClassVar[bool] = False
    beta: ClassVar[float] = 1.0  # rewards are reported in nats

    mean: bool = True

    def __call__(self, policy: "PairLogps", reference: "PairLogps", facts: "Facts") -> "Tensor":
        """A loss for each of the B pairs. Shape B."""
        from dnpo.optimise.objective import surprise

        return surprise(policy, facts, mean=self.mean)


@dataclass(frozen=True)
class Refined:
    """The logistic loss, with smoothed labels for pairs whose label the policy doubts (SPA, equations 9 to 12).

    A label is suspect if the confidence in it is below a percentile of the confidences in the most recent labels. The
    confidence is measured with a policy extrapolated away from the reference: its logits are (1 + λ) times the policy's
    minus λ times the reference's.

    Args:
        beta: preference temperature.
        alpha: share of suspect labels that is assumed wrong; 0: no label is suspect, and the loss is logistic.
        extrapolation: λ; 0: the confidence is measured with the policy itself.
        percentile: percentile of the recent confidences, from 0 to 100.
        window: number of recent pairs.
        warmup: share of the policy steps before labels can be suspect.
        cache_hidden: keep hidden states of both responses on disk: ``on``, ``off``, or ``auto`` (if there is room, and
            more than one epoch); it changes only rounding and the amount of computation.
    """

    beta: Positive
    alpha: Fraction = 0.1
    extrapolation: NonNegative = 0.5
    percentile: Annotated[float, Range(ge=0, le=100)] = 10.0
    window: Count = 50
    warmup: Fraction = 0.2
    cache_hidden: Cache = neutral("auto")

    @property
    def needs_states(self) -> bool:
        """Whether it reads the reference's hidden states."""
        return self.alpha > 0 and self.extrapolation > 0

    @property
    def keeps_states(self) -> Cache:
        """Whether the reference's hidden states of both responses are kept."""
        return self.cache_hidden if self.needs_states else "off"

    def watches(self, total: int) -> "list[Watch]":
        """The watch that finds suspect labels in a training of ``total`` policy steps."""
        from dnpo.optimise.watch import Suspects

        if not self.alpha:
            return []
        start = math.ceil(self.warmup * total)
        return [Suspects(self.beta, self.extrapolation, self.percentile / 100, self.window, start)]

    def __call__(self, policy: "PairLogps", reference: "PairLogps", facts: "Facts") -> "Tensor":
        """A loss for each of the B pairs. Shape B."""
        from dnpo.optimise.objective import logistic

        suspect_B = 0.0 if facts.suspect_B is None else facts.suspect_B
        return logistic(policy, reference, facts, beta=self.beta, smoothing=self.alpha * suspect_B)


@dataclass(frozen=True)
class Statistics:
    """Another objective, plus a penalty for moving away from the reference (HG-DPO).

    The penalty is the distance between the mean hidden states of policy and reference on the chosen response, in units
    of the variance of each channel.

    Args:
        base: the other objective.
        weight: weight of the penalty (the paper's λ, which is 10,000 for image latents).
    """

    needs_states: ClassVar[bool] = True
    reads_reference: ClassVar[bool] = True

    base: Objective
    weight: NonNegative = 10.0

    @property
    def beta(self) -> float:
        """The ``beta`` of the other objective."""
        return self.base.beta

    @property
    def reads_rejected(self) -> bool:
        """Whether the other objective reads rejected responses."""
        return getattr(self.base, "reads_rejected", True)

    @property
    def keeps_states(self) -> Cache:
        """``keeps_states`` of the other objective."""
        return getattr(self.base, "keeps_states", "off")

    def watches(self, total: int) -> "list[Watch]":
        """The other objective's watches, and the watch that measures the distance."""
        from dnpo.optimise.watch import Drift

        return [*watches(self.base, total), Drift()]

    def __call__(self, policy: "PairLogps", reference: "PairLogps", facts: "Facts") -> "Tensor":
        """A loss for each of the B pairs. Shape B."""
        assert facts.drift_B is not None, "the training measures it"
        return self.base(policy, reference, facts) + self.weight * facts.drift_B


def watches(objective: object, total: int) -> "list[Watch]":
    """The watches of an objective in a training of ``total`` policy steps; most objectives have none."""
    make = getattr(objective, "watches", None)
    return [] if make is None else make(total)


def check_objective(objective: Objective) -> None:
    """Check that an objective has the attributes and the signature that its callers need.

    Raises:
        SettingsError: it has no number ``beta``; it has no ``train`` and cannot be called with (policy, reference,
            facts); or an optional attribute that must be true or false is neither.
    """
    beta = getattr(objective, "beta", None)
    name = objective.target if isinstance(objective, Bound) else type(objective).__name__
    if not isinstance(beta, int | float) or isinstance(beta, bool) or not math.isfinite(beta):
        raise SettingsError(
            f"objective: {name} has no number beta, the factor of reported margins and rewards; give it a field or "
            "property of this name (1.0 reports plain log-ratios, in nats)"
        )
    for flag in ("reads_reference", "reads_rejected", "needs_states"):
        value = getattr(objective, flag, True)
        if not isinstance(value, bool):
            raise SettingsError(f"objective: {name}.{flag} is {value!r}; expected true or false")
    if hasattr(objective, "train"):
        return
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
        cache_hidden: whether hidden states are kept on disk for the iteration: ``on``, ``off``, or ``auto``, which
            keeps them if more than one epoch reads them and the disk has room.
        like: another noise whose mean shift, with the same policy and pairs, it matches; usually None.
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
        cache_hidden: keep hidden states of the reference on disk: ``on``, ``off``, or ``auto`` (if there is room, and
            more than one epoch); it changes only rounding and the amount of computation.
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
    """The same variance everywhere, not trained (the DNPO paper's ablation, N(0, 0.5) with 0.5 read as the variance).

    Args:
        variance: s².
        cache_hidden: keep hidden states of the reference on disk: ``on``, ``off``, or ``auto`` (if there is room, and
            more than one epoch); it changes only rounding and the amount of computation.
    """

    reads_states = True

    variance: NonNegative = 0.5
    cache_hidden: Cache = neutral("auto")

    def module(self, width: int, vocabulary: int) -> "NoiseModule":
        """The noise, which has no parameters to train."""
        from dnpo.optimise.npo import FixedModule

        return FixedModule(variance=self.variance)


@dataclass(frozen=True)
class Offset(Noise):
    """A control that is not in the paper: the mean effect of noise as a constant.

    Args:
        shift: decrease of the reference's log-probability of rejected responses, in nats; comparable with the metric
            ``npo/shift`` of a run with noise.
    """

    shift: Finite

    def module(self, width: int, vocabulary: int) -> "NoiseModule":
        """The constant."""
        from dnpo.optimise.npo import OffsetModule

        return OffsetModule(shift=self.shift)


@dataclass(frozen=True)
class MatchedOffset(Noise):
    """An :class:`Offset` equal to the mean shift of trained noise: same iteration, policy and pairs.

    Args:
        like: the noise. It is not in the stage's key, since the key of its training is among the stage's inputs.
    """

    like: Noise = neutral()

    def at(self, shift: float) -> Offset:
        """The offset for a mean shift in nats."""
        return Offset(shift=shift)


# --- moving average


@dataclass(frozen=True)
class NoAverage:
    """No moving average of the policy's weights, configured by ``ema=off``."""

    on: ClassVar[bool] = False


@dataclass(frozen=True)
class MovingAverage:
    """A moving average of the policy's weights, which responds or is the reference; configured by ``ema=on``.

    θ_EMA ← a · θ_EMA + (1 − a) · θ, in float32, for trained weights.

    Args:
        decay: a; 0: the policy itself (with ``every`` 1), 1: the policy before training.
        every: policy steps from one update to the next.
    """

    on: ClassVar[bool] = True

    decay: Fraction = 0.9
    every: Count = 1


# --- training

Betas = tuple[Annotated[float, Range(ge=0, lt=1)], Annotated[float, Range(ge=0, lt=1)]]
TORCH = "torch.optim."
OPTIMIZERS: Mapping[str, Any] = {  # the settings of torch's optimizers, which it does not check, or in its own words
    "lr": Positive,
    "betas": Betas,
    "rho": Fraction,
    "dampening": Finite,
    "Adafactor.eps": Any,  # its two are not as the others
    **dict.fromkeys(("eps", "weight_decay", "momentum", "alpha", "lr_decay", "momentum_decay"), NonNegative),
    **dict.fromkeys(("initial_accumulator_value", "lambd", "t0"), NonNegative),
    **dict.fromkeys(("amsgrad", "nesterov", "centered", "decoupled_weight_decay"), bool),
    **dict.fromkeys(("maximize", "capturable", "differentiable"), bool),
    **dict.fromkeys(("foreach", "fused"), bool | None),
}


@dataclass(frozen=True)
class Optimisation:
    """How to train a model on rows.

    Args:
        epochs: passes over the rows; 0: no training.
        steps: number of policy steps, over as many epochs as needed; 0: ``epochs`` decides.
        batch_size: maximum number of rows in a policy step; the steps of an epoch differ by at most one row.
        micro_batch_size: maximum number of rows that go through the model at once; 0: the whole batch. It changes only
            memory and rounding; later samples may differ because of the rounding.
        optimizer: the policy's optimizer and its settings; fused if torch supports it, unless set otherwise.
        warmup: share of the policy steps over which the learning rate rises from 0.
        decay: whether the learning rate then falls linearly to 0; otherwise it is constant.
        clip: maximum gradient norm, of the policy and of the noise each; 0: no clipping.
        autocast: use bf16 matrix products with parameters of higher precision.
        checkpoint_every: policy steps between checkpoints; a killed run repeats at most this many.
        checkpointing: keep only one hidden state per layer for the backward pass, and recompute the rest: less memory,
            a third more time.
        compile: compile the model's body by torch.compile.
        parallel: with several processes (``launch=torchrun``), each has all weights (``replicated``), or only a part of
            the weights, gradients and optimizer states (``sharded``).
        keep: the weights after the ``last`` step, or the ``best``: those with the lowest loss on held-out rows, which
            may be the weights before training.
        patience: training ends after this many measurements in a row without a lower loss on held-out rows; 0: it
            makes all steps.
        measure_every: policy steps between measurements of that loss, if ``keep`` or ``patience`` asks for them.
        holdout: share of the prompts whose rows are then held out of training.

    Raises:
        SettingsError: there would be no rows to measure, or no steps to choose among.
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
    parallel: Literal["replicated", "sharded"] = neutral("replicated")
    keep: Literal["last", "best"] = "last"
    patience: Natural = 0
    measure_every: Count = 50
    holdout: Fraction = 0.1

    def __post_init__(self) -> None:
        if not self.measures:
            return
        if not 0 < self.holdout < 1:
            raise SettingsError(f"holdout={self.holdout:g}: expected more than 0 and less than 1 with keep or patience")
        if not self.epochs and not self.steps:
            raise SettingsError(f"{self.asked}: has an effect only with epochs or steps")

    @property
    def measures(self) -> bool:
        """Whether the loss on held-out rows is measured in training."""
        return self.keep == "best" or self.patience > 0

    @property
    def asked(self) -> str:
        """The setting that asks for this loss, for messages."""
        return "keep=best" if self.keep == "best" else f"patience={self.patience}"

    def identity(self) -> Mapping[str, Any]:
        """All settings that change results; those of held-out rows only if they are measured."""
        own = ("keep", "patience", "measure_every", "holdout")
        return {name: each for name, each in settings_key(self).items() if self.measures or name not in own}

    @property
    def rows_at_once(self) -> int:
        """The maximum number of rows that go through the model at once."""
        return self.micro_batch_size or self.batch_size

    def check_numbers(self, name: str) -> None:
        """Check the values of settings of torch's optimizers, without importing torch.

        Args:
            name: dotted name of the settings, such as ``trainer``.

        Raises:
            SettingsError: a value has the wrong type or is out of range; names the setting.
        """
        if not self.optimizer.target.startswith(TORCH):
            return
        kind = self.optimizer.target.removeprefix(TORCH)
        for key, value in self.optimizer.settings.items():
            hint = OPTIMIZERS.get(f"{kind}.{key}", OPTIMIZERS.get(key, Any))
            check_value(f"{name}.optimizer.{key}", tuple(value) if isinstance(value, list) else value, hint)

    def check(self, name: str) -> None:
        """Check that the optimizer can be created, before anything is generated.

        Args:
            name: dotted name of the settings, such as ``trainer``.

        Raises:
            SettingsError: it cannot be imported, or does not take its settings.
        """
        from torch import nn, zeros

        self.optimizer.check(f"{name}.optimizer")
        given = self.optimizer.settings

        def problem(settings: Mapping[str, Any]) -> Exception | None:
            try:
                replace(self.optimizer, settings=settings)([nn.Parameter(zeros(1))])
            except (TypeError, ValueError) as error:
                return error
            return None

        error = problem(given)
        if error is not None:
            # the library's message names a parameter at best; the setting without which it works is the wrong one
            wrong = [each for each in given if problem({key: given[key] for key in given if key != each}) is None]
            named = ", ".join(f"{name}.optimizer.{each}={given[each]}" for each in wrong or given)
            defaults = inspect.signature(self.optimizer.resolve()).parameters
            of_numbers = [each for each in wrong if type(defaults[each].default) in (int, float)]
            no_number = any(not is_valid(given[each], float) for each in of_numbers)
            words = f"expected {expected(float)}" if no_number else error
            raise SettingsError(f"{named or f'{name}.optimizer'}: {words}") from error

    def passes(self, rows: int) -> float:
        """How often a training on ``rows`` rows reads each row."""
        return self.steps / math.ceil(rows / self.batch_size) if self.steps else float(self.epochs)

    def factor(self, step: int, total: int) -> float:
        """The factor of the peak learning rate at a policy step: linear warm-up, then linear or no decay."""
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
