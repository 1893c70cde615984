"""Generate a policy's responses. ``hf.py`` samples with transformers, ``server/`` asks an engine behind a server."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dnpo.errors import SettingsError
from dnpo.generate.server import Server
from dnpo.settings import Count, Fraction, Natural, NonNegative, neutral, part_key, settings_key


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample, configured by ``generate=…``.

    Args:
        temperature: 0 is greedy.
        top_k: sample from the k likeliest tokens; 0: from all.
        top_p: sample from the smallest set of tokens with at least this probability.
        batch_size: rows in a batch; the samples do not depend on it, up to the rounding of logits.
        shard_size: prompts in a shard; a killed run loses at most one shard.
        append_eos: default of ``rollout.append_eos``; nothing is appended to responses to held-out prompts.
        engine: the server that samples; None: this process samples.
    """

    temperature: NonNegative = 1.0
    top_k: Natural = 0
    top_p: Fraction = 1.0
    batch_size: Count = neutral(64)
    shard_size: Count = 512
    append_eos: bool = neutral(False)
    engine: Server | None = None

    def identity(self) -> Mapping[str, Any]:
        """The settings that determine the samples; the engine only if a server samples."""
        return {name: value for name, value in settings_key(self).items() if name != "engine" or value is not None}

    def greedy(self) -> "Sampling":
        """The same settings with greedy decoding."""
        return Sampling(temperature=0.0, batch_size=self.batch_size, shard_size=self.shard_size, engine=self.engine)


@dataclass(frozen=True, kw_only=True)
class Ahead(Sampling):
    """The policy responds to every prompt before the training of an iteration, configured by ``rollout=ahead``.

    Args:
        samples: number of responses to each prompt. Each draws from a separate random stream, so a larger number does
            not change the first ones.
        max_tokens: responses are cut at this many tokens, or at the data's limit if that is smaller or this is 0.
        append_eos: append an end-of-sequence token to responses that were cut, so that in training they look complete;
            their ``finish`` is still ``length``. At the data's limit it replaces the last token.

    Raises:
        SettingsError: several samples that would all be equal.
    """

    generates: ClassVar[bool] = True
    live: ClassVar[bool] = False

    samples: Count = 1
    max_tokens: Natural = 0
    append_eos: bool = False

    def __post_init__(self) -> None:
        for name, value in (("temperature", 0), ("top_k", 1), ("top_p", 0)):
            if self.samples > 1 and getattr(self, name) == value:
                raise SettingsError(
                    f"samples={self.samples}: with {name}={value} decoding is greedy, so all samples of a prompt would "
                    f"be equal; expected samples=1, or another {name}"
                )

    def identity(self) -> Mapping[str, Any]:
        """The settings that determine the responses: the settings of plain sampling, and other non-default ones."""
        names = [field.name for field in dataclasses.fields(Sampling)]
        plain = Sampling(**{name: getattr(self, name) for name in names})
        own = {"samples": self.samples, "max_tokens": self.max_tokens, "append_eos": self.append_eos}
        return part_key(plain) | {name: value for name, value in own.items() if value != getattr(Ahead, name)}

    @staticmethod
    def like(sampling: Sampling) -> "Ahead":
        """One response to each prompt, with these settings; a rollout is returned unchanged."""
        if isinstance(sampling, Ahead):
            return sampling
        names = [field.name for field in dataclasses.fields(Sampling) if field.name != "append_eos"]
        return Ahead(**{name: getattr(sampling, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class Given:
    """No responses are generated: the iteration trains on the pairs of the data. Configured by ``rollout=given``."""

    generates: ClassVar[bool] = False
    live: ClassVar[bool] = False
    samples: ClassVar[int] = 0


@dataclass(frozen=True, kw_only=True)
class Live(Ahead):
    """The policy responds during its training, between policy steps, to some prompts at a time (``rollout=live``).

    Its responses are judged and labelled at once, and the pairs enter a buffer, first in, first out.

    Args:
        prompts: number of prompts of a rollout; 0: all.
        every: policy steps from one rollout to the next; 0: a single rollout before training.
        capacity: pairs in the buffer; 0: only the pairs of the last rollout. With ``every=1`` and ``ahead_by=0``
            training is then strictly on-policy. A policy step draws its pairs with weight 1 / (1 + draws so far).
        by: which policy responds: the one in training (``policy``), or the moving average of its weights (``ema``).
        segment: number of successive tokens of the human response that are generated again; 0: whole responses are
            generated.
        ahead_by: number of rollouts that are made in advance, so that training does not wait for the judge.

    Raises:
        SettingsError: settings that contradict each other.
    """

    live: ClassVar[bool] = True

    prompts: Natural = 0
    every: Natural = 1
    capacity: Natural = 0
    by: Literal["policy", "ema"] = "policy"
    segment: Natural = 0
    ahead_by: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine is not None:
            raise SettingsError(
                "engine: with rollout=live the policy in training responds, but its weights cannot be sent to a "
                "server at each step; take rollout.engine=null to sample in this process, or rollout=ahead"
            )
        if not self.every and self.prompts:
            raise SettingsError(
                f"every=0: a single rollout has all prompts, but prompts={self.prompts} asks for some of them; "
                "expected every=1 or more, or prompts=0"
            )
        for name in ("capacity", "ahead_by"):
            if not self.every and getattr(self, name):
                raise SettingsError(f"{name}={getattr(self, name)}: has no meaning with a single rollout (every=0)")
        if self.segment and self.samples > 1:
            raise SettingsError(
                f"samples={self.samples}: a segment is generated once for each prompt; expected samples=1"
            )

    def identity(self) -> Mapping[str, Any]:
        """All settings that determine the responses, and when they are made."""
        own = ("prompts", "every", "capacity", "by", "segment", "ahead_by")
        return {**super().identity(), "_target_": type(self).__name__, **{name: getattr(self, name) for name in own}}

    def ahead(self) -> Ahead:
        """The settings for one whole response to each prompt before training, sampled in the same way."""
        names = [field.name for field in dataclasses.fields(Ahead) if field.name != "samples"]
        return Ahead(**{name: getattr(self, name) for name in names})
