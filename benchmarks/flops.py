"""The FLOPs of a training step, counted by torch and computed by a formula.

Torch's ``FlopCounterMode`` counts matrix products, two FLOPs for each multiply-add. The formula is for models whose
weights are all trained, with P the entries of the blocks' matrices, H the hidden size and V the vocabulary:

    blocks  2·P a token for the forward pass, 4·P for the backward pass
    head    2·H·V a token for each product with the head: logits, their recomputation, two gradients

The formula does not include attention and rotary positions, which depend on the layout of a variant's rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Facts
from benchmarks.problem import Pairs, Shape
from benchmarks.variant import Variant


def count_flops(variant: Variant, index: int) -> Facts:
    """Count the FLOPs of a whole step and of its blocks alone, separately for linear layers and for attention."""
    return {"step": _count(lambda: variant.step(index)), "body": _count(lambda: variant.body(index))}


def _count(work: Callable[[], Any]) -> dict[str, int]:
    with FlopCounterMode(display=False, custom_mapping=MORE) as counter:
        work()
    found = {"linear": 0, "attention": 0}
    for operation, flops in counter.get_flop_counts()["Global"].items():
        found["linear" if operation in LINEAR else "attention"] += int(flops)
    return found


def _addmm(self: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return int(2 * a[0] * a[1] * b[1])


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    rows, heads, queries, width = query
    return int(2 * rows * heads * queries * key[2] * (width + value[3]))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """The scores are computed again, and each of the two products has two gradients."""
    rows, heads, queries, width = query
    return int(2 * rows * heads * queries * key[2] * (3 * width + 2 * value[3]))


aten = torch.ops.aten
LINEAR = (aten.mm, aten.addmm, aten.addmm_)  # the operations of linear layers and of the head
# Operations that are missing in torch's table.
MORE: dict[Any, Any] = {
    aten.addmm_: _addmm,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def formula(name: str, shape: Shape, pairs: Pairs, device: torch.device, *, trains_head: bool = True) -> dict[str, int]:
    """FLOPs of the linear layers in one step.

    Returns:
        ``body``: the blocks, forward and backward (three times a forward pass, if all their weights are trained).
        ``reference body``: the blocks of the frozen reference, forward only.
        ``head``: every product with the head's or the noise's matrix.
    """
    who, objective, reference = name.split("-")
    block, product = 2 * shape.body_weights, 2 * shape.hidden * shape.vocabulary
    online, noisy = reference == "online", objective == "npo"
    gradients = 1 + trains_head
    if who == "naive":  # every position of padded rows
        tokens, frozen_tokens = pairs.padded_tokens, online * pairs.padded_tokens
        head = (1 + gradients + online) * product * tokens
        head += noisy * (2 if online else 3) * product * pairs.rejected_tokens  # W h and dW; cached: logits as well
    elif who == "trl":  # on a CPU like naive, but without each row's last position, and logits are computed once more
        tokens, frozen_tokens = pairs.padded_tokens, online * pairs.padded_tokens
        head = (2 + gradients + online) * product * (tokens - 2 * len(pairs.prompts))
    else:
        tokens = pairs.shared_tokens
        rejected_half = sum(map(len, pairs.prompts)) + pairs.rejected_tokens
        frozen_tokens = online * (rejected_half if noisy else tokens)
        head = ours_head(shape, pairs.completion_tokens, device, trains_head=trains_head)
        head += (online and not noisy) * product * pairs.completion_tokens
        head += noisy * ours_noise(shape, pairs.rejected_tokens, device)
    return {"body": 3 * block * tokens, "reference body": block * frozen_tokens, "head": head}


def ours_head(shape: Shape, tokens: int, device: torch.device, *, trains_head: bool = True) -> int:
    """2·H·V a token for the logits and for each of two gradients, and once more for tiles that are recomputed.

    If the head is not trained, only the hidden states have a gradient, which is computed together with the logits.
    """
    from dnpo.policy.logprobs import KEPT, ROWS, TILE

    if not trains_head:
        return 2 * 2 * shape.hidden * shape.vocabulary * tokens
    blocks = [min(ROWS, tokens - first) for first in range(0, tokens, ROWS)]
    room = KEPT[device.type] // len(blocks)
    return sum(_sum_tiles(shape, some, TILE[device.type], room, 1, (3, 4)) for some in blocks)


def ours_noise(shape: Shape, tokens: int, device: torch.device) -> int:
    """2·H·V a rejected token for each of z, W h and the gradient of W, and twice more for tiles that are recomputed."""
    from dnpo.optimise.npo import KEPT
    from dnpo.policy.logprobs import TILE

    return _sum_tiles(shape, tokens, TILE[device.type], KEPT[device.type], 2, (3, 5))


def _sum_tiles(shape: Shape, tokens: int, tile: int, room: int, tensors: int, products: tuple[int, int]) -> int:
    """Sum the FLOPs of all tiles; if a tile's float32 tensors can be kept, it takes the smaller number of products."""
    from dnpo.policy.logprobs import APART

    found = 0
    for first in range(0, shape.vocabulary, tile):
        entries = min(tile, shape.vocabulary - first)
        room -= tensors * 4 * tokens * (entries + APART * (entries % 1024 == 0))
        found += products[room < 0] * 2 * shape.hidden * entries * tokens
    return found
