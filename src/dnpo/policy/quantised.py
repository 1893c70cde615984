"""Quantise a base model's weights with bitsandbytes when it is loaded, to train adapters on them.

Every linear layer except the output head is stored in 4 bits (``nf4``, with scales that are quantised too) or in 8
(``int8``, with a scale for each row). The weights are dequantised for each product, so a layer's result depends neither
on the mode of the model nor on other rows of the batch. This differs from bitsandbytes' layers: they use another kernel
in evaluation mode on a CPU, and with 8 bits they also quantise activations by the largest values in the batch.

The adapters of earlier trainings are not merged into such weights, since the sum would be rounded again. They are
stacked, see ``lora.py``.
"""

from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from dnpo.settings import Quantisation

BLOCK, NESTED = 64, 256  # weights that share a scale, and scales that share one, as in bitsandbytes for nf4


def loading_options(kind: Quantisation, dtype: str, device: str) -> dict[str, Any]:
    """The options of ``from_pretrained`` that quantise the weights.

    Args:
        dtype: type of the products, and of weights that are not quantised.
        device: device of the weights; bitsandbytes quantises them there.
    """
    from transformers import BitsAndBytesConfig

    make: Any = BitsAndBytesConfig
    config = (
        make(load_in_8bit=True)
        if kind == "int8"
        else make(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    )
    return {"quantization_config": config, "device_map": {"": device}}


def kind_of(model: Any) -> Quantisation | None:
    """How the weights of a transformers model are quantised; None if they are not."""
    config = getattr(model.config, "quantization_config", None)
    return None if config is None else "int8" if config.load_in_8bit else "nf4"


def use_one_kernel(model: nn.Module) -> None:
    """Make all quantised layers compute x Wᵀ with the dequantised weights, in training and in evaluation mode."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    for module in model.modules():
        layer: Any = module
        if isinstance(module, Linear4bit):
            # in evaluation mode the layer would repack the weights for another kernel, which has no gradient
            layer.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt):
            layer.forward = MethodType(_multiply_int8, layer)


def _multiply_int8(layer: Any, input_: Tensor) -> Tensor:
    """The product that bitsandbytes uses for training on a CPU, here on any device."""
    from bitsandbytes.autograd._functions import MatMul8bitFp

    if layer.weight.CB is not None:
        layer.init_8bit_state()
        layer.weight.data = layer.state.CB
    multiply: Any = MatMul8bitFp.apply
    return cast(Tensor, multiply(input_, layer.weight, None, layer.bias, layer.state))


def states(model: nn.Module) -> dict[int, Any]:
    """Scales and other states of quantised weights by ``id``: the memo with which ``deepcopy`` skips them."""
    found = [getattr(p, "quant_state", None) for p in model.parameters()]
    found += [state for layer in model.modules() if hasattr(state := getattr(layer, "state", None), "CB")]
    return {id(state): state for state in found if state is not None}


def count_bytes(model: Any, kind: Quantisation) -> int:
    """The bytes of a model's weights after quantisation.

    Args:
        model: a transformers model; it may be on the ``meta`` device.
    """
    from importlib import import_module

    base: Any = import_module("transformers.quantizers.base")  # ships without annotations
    kept = set(base.get_keys_to_not_convert(model))
    total: int = sum(p.numel() * p.element_size() for p in model.parameters())
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name not in kept:
            size, rows = layer.weight.numel(), layer.weight.shape[0]
            scales = -(-size // BLOCK)
            packed = size + 4 * rows if kind == "int8" else -(-size // 2) + scales + 4 * (-(-scales // NESTED))
            total += packed - size * layer.weight.element_size()
    return total
