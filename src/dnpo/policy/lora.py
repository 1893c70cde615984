"""Low-rank adapters, configured by ``model.lora``.

Earlier adapters are merged into the weights. On quantised weights they are stacked: all are active, and only the newest
is trained.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from dnpo.errors import ModelError
from dnpo.settings import Natural, Positive

if TYPE_CHECKING:
    from torch import nn

TRAINED = "default"  # peft's name for the adapter in training


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters. Each training adds a new adapter to the weights; earlier adapters are merged into them.

    If the weights are quantised, earlier adapters are not merged: they are frozen, and the new adapter is added to
    them.

    Args:
        rank: rank of an adapter; 0 trains all weights instead.
        alpha: scale; the update is multiplied by alpha / rank.
        target_modules: as in peft: names of modules, or ``all-linear``.
    """

    rank: Natural = 0
    alpha: Positive = 16.0
    target_modules: str | list[str] = "all-linear"

    def identity(self) -> Mapping[str, Any]:
        """The settings that determine the adapter; at rank 0 no other setting has an effect."""
        return asdict(self) if self.rank else {"rank": 0}

    def on(self, model: "nn.Module", seed: int) -> "nn.Module":
        """Return the model with a new adapter, whose update is still 0; at rank 0, return it unchanged.

        Raises:
            ModelError: ``target_modules`` cannot be adapted in this model.
        """
        if self.rank == 0:
            return model
        import torch
        from peft import LoraConfig, get_peft_model

        make: Any = LoraConfig  # it annotates lora_alpha as an integer but accepts any number
        config = make(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=self.target_modules,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                adapted: Any = model
                if earlier := stacked(model):
                    adapted.add_adapter(TRAINED, config)
                    activate(adapted, [*earlier, TRAINED])
                else:
                    adapted = get_peft_model(cast(Any, model), config)
            except ValueError as error:
                raise ModelError(f"model.lora.target_modules={self.target_modules}: {error}") from error
        base = adapted.get_base_model()
        if base.config.tie_word_embeddings and hasattr(base.get_input_embeddings(), "lora_embedding_A"):
            raise ModelError(
                f"model.lora.target_modules={self.target_modules}: the embedding of {type(base).__name__} is its "
                "output head too, so a merged adapter on it would change both; leave it out"
            )
        return cast("nn.Module", adapted)


def is_adapted(model: "nn.Module") -> bool:
    """Whether the model has an adapter that is trained."""
    return TRAINED in getattr(model, "peft_config", {})


def stacked(model: "nn.Module") -> list[str]:
    """The names of frozen adapters, in the order in which they were trained."""
    return [name for name in getattr(model, "peft_config", {}) if name != TRAINED]


def activate(model: Any, names: Sequence[str]) -> None:
    """Make these adapters active; only the newest one is trained."""
    model.base_model.set_adapter(list(names))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and f".{TRAINED}." not in name:
            parameter.requires_grad_(False)


@contextmanager
def without_trained(model: Any) -> Iterator[None]:
    """Switch off the adapter in training; earlier adapters stay active."""
    earlier = stacked(model)
    if not earlier:
        with model.disable_adapter():
            yield
        return
    activate(model, earlier)
    try:
        yield
    finally:
        activate(model, [*earlier, TRAINED])
