"""Load a model completely: every tensor is in the files and in the model, has the right shape, and is finite.

transformers initialises missing tensors at random, and ignores tensors that the model does not have. Its report on both
is checked here: after a real load, or after a load onto torch's ``meta`` device, which takes no memory and reads only
headers.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dnpo import interrupts
from dnpo.errors import ModelError
from dnpo.policy.folder import (
    ADAPTER_WEIGHTS,
    CONFIG,
    check_folder,
    count_tensors,
    find_files,
    read_header,
    read_quantisation,
    weight_files,
)
from dnpo.policy.lora import TRAINED, activate, stacked
from dnpo.policy.refused import find_refused

WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel or DeepSpeed",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "base_model.model.": "peft",
    "base_layer.": "peft",
    "_forward_module.": "Lightning",
}
HEAD = "lm_head.weight"


def load_complete(
    kind: Any, where: str, what: str, *, ignore_head: bool = False, hint: str = "", **options: Any
) -> Any:
    """Load a model with one of transformers' Auto classes.

    Args:
        kind: the class.
        where: a folder, or a name on the hub.
        what: the setting and its value, for messages.
        ignore_head: whether tensors outside the model's body may be missing, unexpected or of another shape, because
            the caller trains a new head or uses none.
        hint: advice on weights that are not complete; appended to the message.
        options: passed on to ``from_pretrained``.

    Raises:
        ModelError: it cannot be loaded, or is not complete.
    """
    files = find_files(where, options.get("revision"))
    if files is not None:
        check_folder(files, what)
    model = _load(kind, where, what, ignore_head, hint, options)
    if getattr(model.config, "quantization_config", None) is not None and not getattr(model, "is_quantized", False):
        raise ModelError(f"{what}: transformers does not know the quantisation that its {CONFIG} names")
    downloaded = find_files(where, options.get("revision"))
    if files is None and downloaded is not None:
        check_folder(downloaded, what)
    check_finite(model.state_dict().items(), what)
    _check_tied(model, dict(model.state_dict(keep_vars=True)), what)
    return model


def outline_complete(
    kind: Any, where: str, what: str, *, files: Path, ignore_head: bool = False, hint: str = "", **options: Any
) -> Any:
    """Load a model without its weights: as :func:`load_complete`, but onto the ``meta`` device.

    The values in the files are read once, tensor by tensor, to check that they are finite. This is as fast as the disk;
    with files in memory it took 0.14 seconds per gigabyte on one core.

    Args:
        files: the folder of the files that are read.
    """
    model = _load(kind, where, what, ignore_head, hint, {**options, "device_map": "meta"})
    check_finite(_read_tensors(files), what)
    tied = {name for pair in _tied_names(model).items() for name in pair}
    _check_tied(model, dict(_read_tensors(files, tied)), what)
    return model


def check_quantisation(files: Path, what: str) -> None:
    """Check that quantised weights can be used on this machine.

    Raises:
        ModelError: transformers does not know the quantisation, or lacks a package or a device for it.
    """
    from transformers import AutoConfig

    quantizers: Any = import_module("transformers.quantizers.auto")  # ships without annotations
    try:
        config = AutoConfig.from_pretrained(files)
        if not quantizers.AutoHfQuantizer.supports_quant_method(config.quantization_config):
            raise ValueError("transformers does not know it")
        quantizers.get_hf_quantizer(config, None, None, True, {})
    except Exception as error:  # each kind of quantisation raises errors of other types for missing packages
        kind = read_quantisation(files)
        text = f"its weights are quantised ({kind}), which cannot run here: {explain(error)}"
        raise ModelError(f"{what}: {text}") from error


def merge_adapter(model: Any, folder: Path, what: str) -> Any:
    """Merge the LoRA adapter in a folder into a model.

    Raises:
        ModelError: it cannot be loaded, or is not complete.
    """
    return _add_adapter(model, folder, what, TRAINED).merge_and_unload()


def stack_adapter(model: Any, folder: Path, what: str) -> Any:
    """Add the LoRA adapter in a folder to the adapters of a model, frozen.

    Raises:
        ModelError: it cannot be loaded, or is not complete.
    """
    adapted = _add_adapter(model, folder, what, folder.name)
    activate(adapted, stacked(adapted))
    return adapted.requires_grad_(False)


def _add_adapter(model: Any, folder: Path, what: str, name: str) -> Any:
    from peft import PeftModel, get_peft_model_state_dict

    try:
        adapted: Any = model
        if stacked(model):
            adapted.load_adapter(folder, name)
        else:
            adapted = PeftModel.from_pretrained(model, folder, name)
        kept = read_header(folder / ADAPTER_WEIGHTS)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # peft and json raise any error for damaged files
        raise ModelError(f"{what}: the adapter in {folder} cannot be loaded: {explain(error)}") from error
    expected = get_peft_model_state_dict(adapted, adapter_name=name)
    problems = [
        f"{how}: {count_tensors(names)}"
        for how, names in (
            ("missing (they would be initialised at random)", set(expected) - set(kept)),
            ("not part of it", set(kept) - set(expected)),
        )
        if names
    ]
    if problems:
        raise ModelError(f"{what}: the adapter in {folder} is not complete: {'; '.join(problems)}")
    check_finite(expected.items(), f"{what}: the adapter in {folder}")
    return adapted


def check_finite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Check that weights are finite.

    Raises:
        ModelError: some are NaN or infinite; the message names their tensors.
    """
    broken = [name for name, tensor in tensors if not _is_finite(tensor)]
    if broken:
        raise ModelError(f"{what}: with values that are not finite: {count_tensors(broken)}")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor if tensor.element_size() > 1 else tensor.float()  # torch has no minimum of 8-bit numbers
    # Minimum and maximum are NaN if any value is NaN. This is ten times as fast as testing every value.
    return all(bool(end.isfinite()) for end in torch.aminmax(wide))


def check_fit(model: Any, tokenizer: Any, what: str) -> None:
    """Check that a model embeds all tokens of a tokenizer.

    Raises:
        ModelError: the tokenizer has more tokens than the model embeds.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"{what}: the tokenizer has {len(tokenizer):,} tokens, the model embeds only {rows:,}; they do not belong "
            "together"
        )


@torch.no_grad()
def check_causal(model: Any, what: str) -> None:
    """Check that a model is causal. Models trained to fill gaps in a text are not.

    Raises:
        ModelError: its output at a token depends on later tokens.
    """
    first, second = model(input_ids=torch.tensor([[0, 1, 2], [0, 1, 0]], device=model.device)).logits[:, 0].float()
    if not torch.allclose(first, second, rtol=1e-2, atol=5e-2):
        raise ModelError(f"{what}: {type(model).__name__} reads a text in both directions; expected a causal model")


def explain(error: Exception) -> str:
    """The beginning of an error's text: its first line, and the next one if the first ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError | AssertionError | TypeError) else text


def explain_refusal(error: Exception, kind: Any, where: str, options: Mapping[str, Any]) -> str:
    """Explain why a model could not be built, and name the value of its configuration if that is the reason.

    Args:
        kind, where, options: as for :func:`load_complete`.
    """
    files = find_files(where, options.get("revision"))
    refused = None
    if files is not None:
        refused = find_refused(files, kind, error, bool(options.get("trust_remote_code")))
    return explain(error) if refused is None else f"transformers refuses {refused} ({explain(error)})"


def _read_tensors(files: Path, names: set[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors of a folder one by one, or only some."""
    for file in weight_files(files):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if names is None or name in names:
                    yield name, opened.get_tensor(name)


def _load(kind: Any, where: str, what: str, ignore_head: bool, hint: str, options: dict[str, Any]) -> Any:
    try:
        with _without_report(), interrupts.held("a model is loaded first"):
            model, info = kind.from_pretrained(
                where, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model's code can raise any error if it does not expect a value
        raise ModelError(f"{what}: cannot be loaded: {explain_refusal(error, kind, where, options)}") from error
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    mismatched = {name: f"{_shape(theirs)} for {_shape(ours)}" for name, theirs, ours in info["mismatched_keys"]}
    tied = _tied_names(model)
    missing -= {one for one, other in tied.items() if other in missing}  # reported under one name only
    if ignore_head:
        body = _body_names(model)
        missing, unexpected = ({n for n in names if not _is_head(n, body)} for names in (missing, unexpected))
        mismatched = {name: shapes for name, shapes in mismatched.items() if not _is_head(name, body)}
    problems = []
    if missing:
        problems.append(f"missing (they would be initialised at random): {count_tensors(missing)}")
    if unexpected:
        problems.append(f"not part of {type(model).__name__}: {count_tensors(unexpected)}")
    if mismatched:
        shapes = count_tensors([f"{name}: {shapes}" for name, shapes in mismatched.items()])
        problems.append(f"of another shape than {CONFIG} says: {shapes}")
    if problems:
        hint = _explain_names(missing, set(info["unexpected_keys"]), model.base_model_prefix) or hint
        raise ModelError(f"{what}: its weights do not fit the model: {'; '.join(problems)}{hint}")
    return model


@contextmanager
def _without_report() -> Iterator[None]:
    """Suppress transformers' table of missing and unexpected tensors, since such tensors are refused here."""

    def passes(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)


def _shape(size: Iterable[int]) -> str:
    return "×".join(map(str, size)) or "one number"


def _body_names(model: Any) -> set[str]:
    """The first parts of the names of a body's tensors, with and without the prefix of a model with a head."""
    body: nn.Module = model.base_model
    return {model.base_model_prefix, *(name.split(".")[0] for name in body.state_dict())}


def _is_head(name: str, body: set[str]) -> bool:
    return name.split(".")[0] not in body or "pooler" in name.split(".")


def _explain_names(missing: set[str], unexpected: set[str], base: str) -> str:
    """Explain why the tensors' names differ from the model's, and what to do; "" if the reason is unknown."""
    if any(".lora_A." in name or ".lora_B." in name for name in unexpected):
        return (
            ". The weights have an adapter that is not merged; merge it with peft (merge_and_unload) and save the "
            "merged model"
        )
    for wrapper, who in WRAPPERS.items():
        without = {name.replace(wrapper, "", 1) for name in unexpected if wrapper in name}
        if without & {*missing, *(f"{base}.{name}" for name in missing)}:
            return (
                f". {who} has added {wrapper} to the names: save the module inside, or remove it from the names in "
                "every *.safetensors file (and in the index if there is one), with safetensors.torch: "
                f'save_file({{name.replace("{wrapper}", "", 1): tensor for name, tensor in load_file(OLD).items()}}, '
                'NEW, {"format": "pt"})'
            )
    for name in unexpected:
        inner = next((each for each in missing if name.endswith(f".{each}")), None)
        if inner is not None:
            return f". {name.removesuffix(inner)} is at the beginning of the names; remove it"
    if missing == {HEAD}:
        return f". If the output head is the embedding, set tie_word_embeddings to true in {CONFIG}"
    return ""


def _tied_names(model: Any) -> dict[str, str]:
    """Map each tensor that the configuration ties to the tensor that it is tied to; values are not compared."""
    return dict(model.get_expanded_tied_weights_keys(all_submodels=True))


def _check_tied(model: Any, tensors: dict[str, Tensor], what: str) -> None:
    """Check that tensors that the configuration ties have the same values."""
    for one, other in _tied_names(model).items():
        first, second = tensors.get(one), tensors.get(other)
        if first is not None and second is not None and first is not second and not torch.equal(first, second):
            raise ModelError(
                f"{what}: {CONFIG} ties {one} to {other}, but their values in the files differ; set "
                "tie_word_embeddings to false there, or remove one of them"
            )
