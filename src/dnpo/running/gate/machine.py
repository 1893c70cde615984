"""Check disk and memory against estimates of what the run needs."""

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnpo.generate import Sampling
from dnpo.optimise import npo
from dnpo.optimise.npo import NoiseModule
from dnpo.optimise.parts import Optimisation, PairOptimisation
from dnpo.optimise.reference import SPARE
from dnpo.policy import logprobs
from dnpo.policy.lora import Lora
from dnpo.policy.model import Policy
from dnpo.policy.quantised import count_bytes
from dnpo.running.gate.finding import Finding
from dnpo.settings import Quantisation

SMALL = 2**16  # bytes of the small files of a stage
ID, TEXT = 2.0, 4.0  # bytes of a token's id and of its text in a table
MIXED = 2.55  # bytes of a kept activation under autocast, measured: norms and sums are in float32
USUAL = 2  # numbers per parameter that an optimizer keeps, as Adam does
STATES = "weights, gradients and optimizer states"
TIGHT = 0.9  # share of free memory above which an estimate gets a warning


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model.

    Attributes:
        weights: bytes of all weights, after quantisation.
        trained: bytes of the trained weights: the adapter's if there is one.
        value: bytes of one weight that is not quantised, and of one activation.
        width, layers, inner, heads: hidden size, number of blocks, inner size of the MLP, size of a token's keys in one
            block.
        vocabulary: number of rows of the head.
        adapted: whether only an adapter is trained.
        quantised: whether the base weights are quantised, so that adapters of all trainings are in memory.
    """

    weights: int
    trained: int
    value: int
    width: int
    layers: int
    inner: int
    heads: int
    vocabulary: int
    adapted: bool
    quantised: bool = False


@dataclass(frozen=True)
class Counts:
    """How much data the run reads and writes.

    Attributes:
        train, held, all: number of rows for training, for measuring, and in all splits.
        prompt, response: mean tokens of a prompt and of a human response.
        longest_prompt, longest_response: maximum tokens of a prompt and of a human response.
        limit: maximum tokens of a generated response.
    """

    train: int
    held: int
    all: int
    prompt: float
    response: float
    longest_prompt: int
    longest_response: int
    limit: int


def shape(policy: Policy, lora: Lora, quantisation: Quantisation | None = None) -> ModelShape:
    """Return the sizes of a model on the meta device, and of its adapter if it gets one. Changes the model.

    Args:
        quantisation: how the weights are quantised when they are loaded.
    """
    config = policy.causal_lm.config.get_text_config()
    rows, width = policy.head.weight_VH.shape
    value = policy.head.weight_VH.element_size()
    model: Any = policy.model
    weights = _bytes(model.parameters()) if quantisation is None else count_bytes(model, quantisation)
    adapted: Any = lora.on(model, 0)  # changes the model in place, so everything else is read before
    trained = [p for p in adapted.parameters() if p.requires_grad]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or width // config.num_attention_heads
    return ModelShape(
        weights=weights,
        trained=_bytes(trained),
        value=value,
        width=width,
        layers=config.num_hidden_layers,
        inner=getattr(config, "intermediate_size", None) or 4 * width,
        heads=heads * size,
        vocabulary=rows,
        adapted=lora.rank > 0,
        quantised=quantisation is not None,
    )


def state_copies(make: Any) -> int:
    """Count the numbers that an optimizer keeps per parameter, by trying a step on four parameters."""
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.zeros(2, 2)
    try:
        optimizer = make([parameter])
        optimizer.step()
    except Exception:  # it may run only on a GPU; an estimate must not refuse it
        return USUAL
    kept = optimizer.state[parameter].values()
    return sum(isinstance(value, torch.Tensor) and value.shape == parameter.shape for value in kept)


# --- disk


def policy_bytes(of: ModelShape, iterations: int) -> int:
    """Return a policy's bytes on disk: its weights, or the adapters of ``iterations`` trainings."""
    return iterations * of.trained if of.adapted else of.weights


def checkpoint_bytes(of: ModelShape, optimisation: Optimisation, noise: int) -> int:
    """Return the bytes of two checkpoints, since the last is replaced only when the new one is complete.

    With ``keep=best`` there are also the best weights so far, those that the last checkpoint names, and a new copy.

    Args:
        noise: number of trained parameters of the noise; its Adam keeps two numbers for each.
    """
    once = of.trained * (1 + state_copies(optimisation.optimizer)) + 4 * noise * 3
    return 2 * once + (3 * of.trained if optimisation.keep == "best" else 0)


def table_bytes(rows: float, tokens: float) -> int:
    """Return the bytes of a stage's tables, given their rows and the tokens per row, stored as ids and as text."""
    return SMALL + round(rows * (32 + tokens * (ID + TEXT)))


def hidden_bytes(of: ModelShape, rows: Counts, autocast: bool) -> int:
    """Return the bytes of the reference's hidden states; a rejected response is assumed as long as a human one."""
    return round(rows.train * rows.response * of.width * (2 if autocast else of.value))


def disk(kept: int, passing: int, optional: int, folder: Path, free: int | None = None) -> Finding:
    """Check that the disk has room for what the run will write.

    Args:
        kept: estimated bytes that are kept.
        passing: the most bytes that temporary files, such as checkpoints, take at one time.
        optional: bytes of hidden states, which are kept only if there is room.
        folder: the store.
        free: free bytes; None asks the system.
    """
    there = next(p for p in (folder, *folder.parents) if p.is_dir())
    free = shutil.disk_usage(there).free if free is None else free
    need = kept + passing
    text = f"the run writes about {format_bytes(need)} (an estimate), of which "
    text += f"{format_bytes(passing)} only temporarily"
    if optional:
        text += f", and in addition {format_bytes(optional)} of hidden states if there is room"
    text += f"; {format_bytes(free)} free"
    setting = "store=… (another disk), iterations, model.lora.rank, npo.cache_hidden=off"
    if need > free:
        return Finding("disk", "stop", text, setting)
    if 2 * need > free or (optional and need + optional > free - SPARE):
        return Finding("disk", "warn", text, setting)
    return Finding("disk", "pass", text)


# --- memory


def activations(of: ModelShape, optimisation: Optimisation, tokens: int) -> float:
    """Return the bytes that a forward pass over ``tokens`` keeps for the backward pass, without the logits.

    Per token, a block keeps about 12 vectors of the hidden size (its input, norms, queries, keys, values and the output
    of attention) and 4 of the MLP's inner size.
    """
    value = MIXED if optimisation.autocast else of.value
    block = (12 * of.width + 4 * of.inner) * value
    kept = of.layers * of.width * of.value + block if optimisation.checkpointing else of.layers * block
    return tokens * (kept + 4 * of.width * of.value)


def training_bytes(
    of: ModelShape,
    optimisation: Optimisation,
    rows: Counts,
    noise: NoiseModule | None,
    copy: bool,
    device: str,
    number: int = 1,
    parts: int = 1,
) -> tuple[float, float]:
    """Return the bytes of weights, gradients and optimizer states, and of a micro-batch of the longest rows.

    Args:
        parts: number of processes that share weights, gradients and states; each has all weights before training
            begins.
        number: number of trainings behind the policy, including this one.
        noise: noise module on the meta device; None for fine-tuning, which has no pairs.
        copy: whether a frozen copy of the model is needed to compute hidden states in every step.
        device: ``cpu`` or ``cuda…``.
    """
    kind = "cuda" if device.startswith("cuda") else "cpu"
    fixed = float(of.weights + of.trained * (1 + state_copies(optimisation.optimizer)))  # with gradients and states
    if of.adapted:
        fixed += of.trained * (number if of.quantised else 1)
    elif copy:
        fixed += of.weights
    if (
        optimisation.autocast and of.value > 2 and not of.quantised
    ):  # the backward pass needs a copy of the weights in autocast's type
        fixed += of.weights * 2 / of.value
    if parts > 1:
        fixed = max(fixed / parts, of.weights)
    if noise is not None:  # with its gradients and Adam's two states
        fixed += 4 * 4 * sum(p.numel() for p in noise.parameters())
    responses = rows.longest_response if noise is None else rows.longest_response + rows.limit
    shared = isinstance(optimisation, PairOptimisation) and optimisation.share_prompt
    prompts = rows.longest_prompt * (1 if noise is None or shared else 2)
    micro = optimisation.rows_at_once
    moving = activations(of, optimisation, micro * (prompts + responses))
    completions = micro * responses
    moving += min(completions * of.vocabulary * 4, logprobs.KEPT[kind]) + _tile(of, completions, kind)
    if noise is not None and noise.reads_states:
        moving += min(micro * rows.limit * of.vocabulary * 8, npo.KEPT[kind]) + of.vocabulary * of.width * of.value
    return fixed, moving


def generating_bytes(of: ModelShape, sampling: Sampling, rows: Counts, number: int = 0) -> tuple[float, float]:
    """Return two numbers: bytes of the weights, and bytes of keys, values and logits of a batch of the longest rows.

    Args:
        number: number of trainings behind the policy.
    """
    tokens = sampling.batch_size * (rows.longest_prompt + rows.limit)
    weights = of.weights + (number * of.trained if of.quantised else 0)
    return weights, 2.0 * tokens * of.layers * of.heads * of.value + sampling.batch_size * of.vocabulary * 4


def memory(
    name: str, fixed: float, moving: float, device: str, setting: str, of: str = STATES, free: float | None = None
) -> Finding:
    """Check that the device has enough memory.

    Args:
        name: name of the work.
        fixed: bytes that do not depend on the batch.
        moving: bytes of one batch of the longest rows.
        device: ``cpu`` or ``cuda…``.
        setting: what to change.
        of: what the fixed bytes hold.
        free: free bytes; None asks the system.
    """
    free = free_memory(device) if free is None else free
    text = (
        f"{name} takes about {format_bytes(fixed + moving)} (an estimate: {format_bytes(fixed)} of {of}, "
        f"{format_bytes(moving)} of the longest batch); {format_bytes(free)} free on "
        f"{device}"
    )
    if fixed > free:
        return Finding(f"memory, {name}", "stop", text, setting)
    return Finding(f"memory, {name}", "warn" if fixed + moving > TIGHT * free else "pass", text, setting)


def free_memory(device: str) -> float:
    """Return the free bytes of the device; on a CPU, the bytes that are available without swapping."""
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info(torch.device(device))[0])
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    if match:
        return int(match.group(1)) * 1024.0
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def format_bytes(size: float) -> str:
    """Format a number of bytes for people."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def _tile(of: ModelShape, completions: int, kind: str) -> float:
    return min(completions, logprobs.ROWS) * min(of.vocabulary, logprobs.TILE[kind]) * 4.0


def _bytes(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)
