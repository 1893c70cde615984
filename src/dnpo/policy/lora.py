"""Low-rank adapters: what ``model.lora`` configures."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from dnpo.errors import ModelError
from dnpo.settings import Natural, Positive

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: each training puts a fresh one on the weights, into which those before it are merged.

    Args:
        rank: 0 trains all weights instead.
        alpha: the usual scale; the update is multiplied by alpha / rank.
        target_modules: as peft takes it: names, or ``all-linear``.
    """

    rank: Natural = 0
    alpha: Positive = 16.0
    target_modules: str | list[str] = "all-linear"

    def identity(self) -> Mapping[str, Any]:
        """Everything that decides the adapter; nothing of it matters at rank 0."""
        return asdict(self) if self.rank else {"rank": 0}

    def on(self, model: "nn.Module", seed: int) -> "nn.Module":
        """The model with a fresh trainable adapter, which changes nothing yet; unchanged at rank 0."""
        if self.rank == 0:
            return model
        import torch
        from peft import LoraConfig, get_peft_model

        make: Any = LoraConfig  # annotates lora_alpha as an integer and takes any number
        config = make(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=self.target_modules,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                adapted: Any = get_peft_model(cast(Any, model), config)
            except ValueError as error:
                raise ModelError(f"model.lora.target_modules={self.target_modules}: {error}") from error
        base = adapted.get_base_model()
        if base.config.tie_word_embeddings and hasattr(base.get_input_embeddings(), "lora_embedding_A"):
            raise ModelError(
                f"model.lora.target_modules={self.target_modules}: the embedding of {type(base).__name__} is its "
                "output head as well, and an adapter on it would move both once it is merged; leave it out"
            )
        return cast("nn.Module", adapted)
