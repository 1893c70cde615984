"""Model shapes with random weights, and random preference pairs, on which variants are measured.

All variants of a benchmark build the same model from the same seed and train on the same pairs.
"""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM


@dataclass(frozen=True)
class Shape:
    """A model of Mistral's architecture, and the lengths of the pairs that it is trained on.

    Attributes:
        hidden, layers, mlp, heads, kv_heads, vocabulary: sizes of the model, whose head is not tied to its embeddings.
        shortest, longest: tokens of prompt and response together, drawn uniformly for each response.
        shortest_prompt: minimum tokens of a prompt; the maximum is half of the shorter sequence of its pair.
        pairs: pairs in a batch.
    """

    hidden: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    vocabulary: int
    shortest: int = 64
    longest: int = 512
    shortest_prompt: int = 16
    pairs: int = 4

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def body_weights(self) -> int:
        """Number of entries of the matrices that every token goes through before the head."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.mlp)


SHAPES = {
    # 8.2M of the 21.5M parameters are in the head, 5.1M in the blocks: log-probabilities dominate
    "head": Shape(hidden=256, layers=6, mlp=896, heads=8, kv_heads=2, vocabulary=32_000),
    # the head is small compared with the blocks
    "body": Shape(hidden=512, layers=8, mlp=1792, heads=8, kv_heads=2, vocabulary=2_000),
    # Mistral 7B, with the paper's lengths: prompts to 512 tokens, 1024 in all
    "7b": Shape(
        hidden=4096,
        layers=32,
        mlp=14_336,
        heads=32,
        kv_heads=8,
        vocabulary=32_000,
        shortest=256,
        longest=1024,
        shortest_prompt=64,
    ),
    # narrow, with a large vocabulary: the logits of all tokens are more than a hundred times as large as hidden states
    "wide-vocabulary": Shape(
        hidden=64,
        layers=2,
        mlp=172,
        heads=4,
        kv_heads=2,
        vocabulary=32_000,
        shortest=192,
        longest=384,
        shortest_prompt=16,
        pairs=8,
    ),
    # for the tests: a second in all
    "tiny": Shape(
        hidden=32, layers=2, mlp=64, heads=4, kv_heads=2, vocabulary=96, shortest=12, longest=32, shortest_prompt=4
    ),
}


@dataclass(frozen=True)
class Pairs:
    """A batch of pairs as lists of token ids."""

    prompts: list[list[int]]
    chosen: list[list[int]]
    rejected: list[list[int]]

    @property
    def sequences(self) -> list[tuple[list[int], list[int]]]:
        """Prompt and response of all 2B sequences, the chosen ones first."""
        return [*zip(self.prompts, self.chosen, strict=True), *zip(self.prompts, self.rejected, strict=True)]

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, without padding; a prompt counts with each of its two responses."""
        return sum(len(prompt) + len(response) for prompt, response in self.sequences)

    @property
    def shared_tokens(self) -> int:
        """Tokens of all sequences, with the prompt of a pair counted once."""
        return self.tokens - sum(map(len, self.prompts))

    @property
    def padded_tokens(self) -> int:
        """Tokens of all sequences, padded to the longest."""
        return 2 * len(self.prompts) * max(len(prompt) + len(response) for prompt, response in self.sequences)

    @property
    def completion_tokens(self) -> int:
        """Tokens of all responses."""
        return self.rejected_tokens + sum(map(len, self.chosen))

    @property
    def rejected_tokens(self) -> int:
        """Tokens of the rejected responses."""
        return sum(map(len, self.rejected))


def batches(
    shape: Shape, count: int, seed: int = 0, pairs: int | None = None, length: int | None = None
) -> list[Pairs]:
    """Random batches.

    Args:
        shape: gives the lengths of sequences.
        count: number of batches.
        seed: seed of lengths and tokens.
        pairs: pairs in a batch; None: the shape's number.
        length: tokens of every sequence, a quarter of them in the prompt; None draws lengths.
    """
    draw = random.Random(seed)
    return [_batch(shape, draw, pairs or shape.pairs, length) for _ in range(count)]


def _batch(shape: Shape, draw: random.Random, pairs: int, length: int | None) -> Pairs:
    found = Pairs([], [], [])
    for _ in range(pairs):
        chosen, rejected = (length or draw.randint(shape.shortest, shape.longest) for _ in range(2))
        most = min(chosen, rejected) // 2
        prompt = length // 4 if length else draw.randint(min(shape.shortest_prompt, most), most)
        for rows, tokens in zip(
            (found.prompts, found.chosen, found.rejected), (prompt, chosen - prompt, rejected - prompt), strict=True
        ):
            rows.append([draw.randrange(3, shape.vocabulary) for _ in range(tokens)])
    return found


def model(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    lora: int = 0,
    seed: int = 0,
    quantization: str | None = None,
) -> nn.Module:
    """Make a model with random weights, in training mode; with ``lora`` the weights are frozen and adapters are added.

    Args:
        quantization: quantise the weights under the adapters: ``nf4`` or ``int8``.
    """
    config = MistralConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.mlp,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=max(4096, shape.longest),
        sliding_window=None,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    make: Any = MistralForCausalLM._from_config
    with device:
        found: Any = make(config, dtype=dtype)
    if quantization:
        quantise(found, quantization)
    if lora:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(r=lora, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        found = get_peft_model(found, settings)
    found.train()
    assert isinstance(found, nn.Module)
    return found


def quantise(found: Any, kind: str) -> None:
    """Quantise a model's linear layers, except the head, in place, with dnpo's settings and kernels."""
    from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    from dnpo.policy.quantised import use_one_kernel

    for name, layer in list(found.named_modules()):
        if type(layer) is not nn.Linear or layer is found.get_output_embeddings():
            continue
        sizes, device = (layer.in_features, layer.out_features), layer.weight.device
        if kind == "int8":
            packed: Any = Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, device="meta")
            weight: Any = Int8Params(layer.weight.data.cpu(), has_fp16_weights=False, requires_grad=False)
        else:
            packed = Linear4bit(*sizes, bias=False, compute_dtype=layer.weight.dtype, device="meta")
            weight = Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        packed.weight = weight.to(device)
        found.set_submodule(name, packed)
    setattr(found, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)  # peft reads it
    use_one_kernel(found)
