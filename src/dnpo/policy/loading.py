"""Load a policy, or its outline without weights. Models whose log-probabilities would be wrong here are refused."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dnpo.errors import ModelError
from dnpo.policy.complete import (
    check_fit,
    explain_refusal,
    load_complete,
    merge_adapter,
    outline_complete,
    stack_adapter,
)
from dnpo.policy.folder import adapters, check_folder, check_stack, find_files
from dnpo.policy.model import Policy
from dnpo.policy.packing import ATTENTION, pack
from dnpo.policy.quantised import loading_options, use_one_kernel
from dnpo.policy.template import put_in_force
from dnpo.settings import Dtype, Quantisation


def load(
    base: str,
    folder: Path | None,
    *,
    revision: str | None = None,
    dtype: Dtype = "float32",
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    template_date: str | None = None,
    device: str = "cpu",
    quantization: Quantisation | None = None,
    setting: str | None = None,
) -> Policy:
    """Load a policy: ``folder``'s full weights, or else the base's weights with the folder's adapters merged in.

    Args:
        quantization: how to quantise the weights; then adapters are stacked on them instead of merged.
        setting: the setting that names the base, and its value, for messages.

    Raises:
        ModelError: there is no usable model or tokenizer, or they do not fit each other; the weights are not complete;
            or log-probabilities computed here would differ from the model's.
    """
    whole = folder is not None and (folder / "config.json").is_file()
    weights = str(folder) if whole else base
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": None if whole else revision}
    what = setting if setting is not None and not whole else f"model: {weights}"
    tokenizer, config = _load_parts(weights, (chat_template, template_arguments, template_date), options, what)
    if quantization is not None:
        options |= loading_options(quantization, dtype, device)
    model = load_complete(AutoModelForCausalLM, weights, what, config=config, dtype=dtype, **options)
    if quantization is not None:
        use_one_kernel(model)
    if folder is not None and not whole:
        check_stack(folder, quantization)
        for adapter in adapters(folder):
            model = (merge_adapter if quantization is None else stack_adapter)(model, adapter, what)
    policy = Policy(model if quantization is not None else model.to(device), tokenizer)
    _check(policy, weights)
    return policy


def outline(
    base: str,
    *,
    revision: str | None = None,
    dtype: Dtype = "float32",
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    template_date: str | None = None,
    setting: str | None = None,
) -> Policy:
    """Load the base model without weights: only tokenizer, shapes and settings. This takes no memory.

    The weights are checked if they are on this machine; a model on the hub may not be downloaded yet.

    Raises:
        ModelError: there is no usable configuration or tokenizer, they do not fit each other, or the weights are not
            complete.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    what = setting or f"model: {base}"
    tokenizer, config = _load_parts(base, (chat_template, template_arguments, template_date), options, what)
    files = find_files(base, revision)
    if files is not None:
        model = outline_complete(
            AutoModelForCausalLM, base, what, files=files, config=config, dtype=getattr(torch, dtype), **options
        )
    else:
        make: Any = AutoModelForCausalLM.from_config
        with torch.device("meta"):
            model = make(config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)
        with suppress(OSError):  # without this file the generation settings follow from the configuration
            model.generation_config = GenerationConfig.from_pretrained(base, revision=revision or "main")
    policy = Policy(model, tokenizer)
    _belong_together(policy, base)
    return policy


def _load_parts(
    weights: str,
    template: tuple[str | None, Mapping[str, Any] | None, str | None],
    options: dict[str, Any],
    what: str,
) -> tuple[Any, Any]:
    """Load the configuration, and the tokenizer with the chat template that is used."""
    files = find_files(weights, options["revision"])
    if files is not None:
        check_folder(files, what, trained=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(weights, **options)
        config = AutoConfig.from_pretrained(weights, **options)
    except Exception as error:  # a tokenizer's code can raise any error if it does not expect a value
        reason = explain_refusal(error, AutoModelForCausalLM, weights, options)
        raise ModelError(f"{what}: cannot be loaded: {reason}") from error
    put_in_force(tokenizer, *template)
    return tokenizer, without_dropout(config)


def without_dropout(config: Any) -> Any:
    """Set every dropout of a configuration to 0.

    With dropout the policy would differ from the reference before the first update, and steps would depend on the
    global random state.
    """
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def _belong_together(policy: Policy, weights: str) -> None:
    """Check that the tokenizer fits the model's embeddings and has an end-of-sequence token."""
    tokenizer, model = policy.tokenizer, policy.causal_lm
    check_fit(model, tokenizer, f"model: {weights}")
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model: the tokenizer in {weights} has no end-of-sequence token, so no response could ever end"
        )


@torch.no_grad()
def _check(policy: Policy, weights: str) -> None:
    """Check that the tokenizer belongs to the model, and that its logits are reproduced here."""
    _belong_together(policy, weights)
    tokenizer = policy.tokenizer
    _check_logits(policy, [i for i in range(len(tokenizer)) if i != tokenizer.pad_token_id])


def _check_logits(policy: Policy, ids: list[int]) -> None:
    """Check that packed hidden states and the head give the same logits as the model's forward pass.

    Two sequences of four tokens are used, so that attention across their boundary would be found.
    """
    model = policy.causal_lm
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others or getattr(config, "attention_chunk_size", None):
        raise ModelError(
            f"model: {type(model).__name__} has layers of {', '.join(sorted(others)) or 'chunked attention'}, which "
            "cannot run on sequences without padding; expected full or sliding attention"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {str(r.get("rope_type")) for r in (rope, *rope.values()) if isinstance(r, dict)} & {"dynamic", "longrope"}
    if kinds:
        raise ModelError(
            f"model: {type(model).__name__} has rotary positions of type {', '.join(sorted(kinds))}, in which a "
            "sequence's positions depend on the longest one in its batch; it is not supported"
        )
    step = max(len(ids) // 8, 1)
    one, other = ids[:: 2 * step][:4], ids[step :: 2 * step][:4]
    rows = [torch.tensor([row], device=policy.device) for row in (one, other)]
    windows: set[int | None] = set()
    try:
        with policy.evaluating():
            packed = pack([one[:1], other[:1]], [one[1:], other[1:]]).to(policy.device)
            hidden_NH = policy.hidden(packed, windows=windows)
            ours = policy.head.logits(hidden_NH)
            model.set_attn_implementation(policy.own_attention)  # the model's original attention
            alone = [model(input_ids=row, output_hidden_states=True) for row in rows]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"model: {type(model).__name__} cannot run on sequences without padding: {error}") from error
    finally:
        model.set_attn_implementation(ATTENTION)
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ("sliding_attention",))
    if window and slides and window not in windows:
        raise ModelError(
            f"model: {type(model).__name__} does not pass its window of {window} tokens to its attention; it is not "
            "supported"
        )
    its = torch.cat([out.logits[0, :-1] for out in alone]).float()
    half = policy.head.weight_VH.dtype is not torch.float32
    if ours.shape == its.shape and torch.allclose(ours, its, rtol=2e-2 if half else 1e-3, atol=5e-2 if half else 1e-3):
        return
    # The model's last hidden states show whether the head or the packing differs.
    own = torch.cat([out.hidden_states[-1][0, :-1] for out in alone])
    if ours.shape == its.shape and torch.allclose(own, hidden_NH, rtol=2e-2, atol=2e-2):
        what = "does not compute its logits from its hidden states as its output head and configuration define"
    else:
        what = "attends across sequences that are packed without padding, or uses other positions"
    differ = f"logits differ by up to {float((ours - its).abs().max()):.3g}" if ours.shape == its.shape else "shapes"
    raise ModelError(f"model: {type(model).__name__} {what}: {differ}; it is not supported")
