"""How a policy answers prompts. ``hf.py`` is the engine: it samples rows with transformers."""

from dataclasses import dataclass

from dnpo.settings import Count, Fraction, Natural, NonNegative, neutral


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample: what ``generate=…`` configures.

    Args:
        temperature: 0 is greedy.
        top_k: sample from the k likeliest tokens; 0 means from all.
        top_p: sample from the smallest set of tokens with this much probability.
        batch_size: rows at once; the samples do not depend on it, up to the rounding of logits.
        shard_size: prompts of one shard, which is what a killed run can lose.
    """

    temperature: NonNegative = 1.0
    top_k: Natural = 0
    top_p: Fraction = 1.0
    batch_size: Count = neutral(64)
    shard_size: Count = 512

    def greedy(self) -> "Sampling":
        """The same layout, without chance."""
        return Sampling(temperature=0.0, batch_size=self.batch_size, shard_size=self.shard_size)
