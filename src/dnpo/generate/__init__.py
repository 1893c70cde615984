"""Generate a policy's responses. ``hf.py`` is the engine, which samples with transformers."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dnpo.errors import SettingsError
from dnpo.settings import Count, Fraction, Natural, NonNegative, neutral, part_key


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample, configured by ``generate=…``.

    Args:
        temperature: 0 is greedy.
        top_k: sample from the k likeliest tokens; 0: from all.
        top_p: sample from the smallest set of tokens with at least this probability.
        batch_size: rows in a batch; the samples do not depend on it, up to the rounding of logits.
        shard_size: prompts in a shard; a killed run loses at most one shard.
        append_eos: what ``rollout.append_eos`` takes by default; responses to held-out prompts never get one.
    """

    temperature: NonNegative = 1.0
    top_k: Natural = 0
    top_p: Fraction = 1.0
    batch_size: Count = neutral(64)
    shard_size: Count = 512
    append_eos: bool = neutral(False)

    def greedy(self) -> "Sampling":
        """The same settings with greedy decoding."""
        return Sampling(temperature=0.0, batch_size=self.batch_size, shard_size=self.shard_size)


@dataclass(frozen=True, kw_only=True)
class Ahead(Sampling):
    """The policy responds to every prompt before the training of an iteration, configured by ``rollout=ahead``.

    Args:
        samples: responses to each prompt; each draws from its own random stream, so the first ones are the same for
            every number.
        max_tokens: cut responses at this many tokens; 0, or more than the data's limit: at that limit.
        append_eos: append an end-of-sequence token to responses that were cut, on which training then counts as if the
            policy had ended there; their ``finish`` still is ``length``. At the data's limit it replaces the last
            token.

    Raises:
        SettingsError: several samples that would all be equal.
    """

    generates: ClassVar[bool] = True

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
        """The settings that decide the responses: those of plain sampling, and further ones where they differ."""
        names = [field.name for field in dataclasses.fields(Sampling)]
        plain = Sampling(**{name: getattr(self, name) for name in names})
        own = {"samples": self.samples, "max_tokens": self.max_tokens, "append_eos": self.append_eos}
        return part_key(plain) | {name: value for name, value in own.items() if value != getattr(Ahead, name)}

    @staticmethod
    def like(sampling: Sampling) -> "Ahead":
        """One response to each prompt, with these settings; a rollout stays as it is."""
        if isinstance(sampling, Ahead):
            return sampling
        names = [field.name for field in dataclasses.fields(Sampling) if field.name != "append_eos"]
        return Ahead(**{name: getattr(sampling, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class Given:
    """Nobody responds: the iteration trains on the data's own pairs. Configured by ``rollout=given``."""

    generates: ClassVar[bool] = False
    samples: ClassVar[int] = 0
