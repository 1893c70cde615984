"""Generate a policy's responses. ``hf.py`` is the engine, which samples with transformers."""

from dataclasses import dataclass

from dnpo.settings import Count, Fraction, Natural, NonNegative, neutral


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample, configured by ``generate=…``.

    Args:
        temperature: 0 is greedy.
        top_k: sample from the k likeliest tokens; 0: from all.
        top_p: sample from the smallest set of tokens with at least this probability.
        batch_size: rows in a batch; the samples do not depend on it, up to the rounding of logits.
        shard_size: prompts in a shard; a killed run loses at most one shard.
    """

    temperature: NonNegative = 1.0
    top_k: Natural = 0
    top_p: Fraction = 1.0
    batch_size: Count = neutral(64)
    shard_size: Count = 512

    def greedy(self) -> "Sampling":
        """The same settings with greedy decoding."""
        return Sampling(temperature=0.0, batch_size=self.batch_size, shard_size=self.shard_size)
