"""Write the policies of a finished run as folders that transformers and vLLM load: with links, or as full copies.

    python -m dnpo.export outputs/DATE/TIME iteration=3 to=FOLDER

At its end a run creates ``models/sft``, ``models/iteration-0``, …, each with a model card and links to the weights in
the store. The card is not in the store, because runs of different methods share stages there. The links are relative,
so they stay valid if the folder that has runs and store is moved or mounted elsewhere. LoRA adapters of several
iterations are joined into one; its rank is the sum of their ranks. The command writes whole weights instead, with
adapters merged.
"""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from dnpo.errors import ModelError, SettingsError
from dnpo.running.best import kept
from dnpo.running.card import SavedPolicy, card
from dnpo.store import MANIFEST, content_hash, expect_whole, write_json
from dnpo.store.provenance import find_cwd

if TYPE_CHECKING:
    from dnpo.policy.model import Policy
    from dnpo.settings import Dtype, Quantisation

CARD = "README.md"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
COMPARED = 16  # responses on which a copy of a quantised policy is compared with it
OF_A_BASE = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.py")


def list_policies(summary: Mapping[str, Any], store: Path | None = None) -> list[SavedPolicy]:
    """List the policies in a run's summary, the fine-tuned one first.

    Args:
        summary: the content of ``summary.json``.
        store: the store's folder, if it has moved.
    """
    root = store or Path(summary["cwd"], summary["settings"]["store"])
    return [SavedPolicy(summary, place, root.absolute()) for place in range(len(summary["policies"]))]


# --- the folders that a run leaves


def link(summary: Mapping[str, Any], run: Path) -> list[Path]:
    """Fill ``models/`` in a run's folder, replacing what an earlier run left there.

    If the file system has no links, a folder has only a card, which gives the path of the weights.

    Returns:
        The paths of the cards.
    """
    models = run / "models"
    for folder in models.iterdir() if models.is_dir() else ():
        if folder.is_dir():
            _clear(folder)
    return [_link_policy(policy, models / policy.name, run) for policy in list_policies(summary)]


def _clear(folder: Path) -> None:
    """Remove what :func:`link` puts into a folder, and the folder itself if it is then empty."""
    for path in folder.iterdir():
        if path.is_symlink() or path.name in (CARD, CONFIG, WEIGHTS):
            path.unlink()
    with suppress(OSError):
        folder.rmdir()


def _link_policy(policy: SavedPolicy, folder: Path, run: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    where = shlex.quote(policy.show(run))
    copy = f"dnpo export {where} iteration={policy.name.removeprefix('iteration-')} to=FOLDER"
    kind, rank = policy.kind, 0
    try:
        for name, target in _files(policy).items():
            # Resolve the parents: below a linked folder, `..` is the parent of the link's target.
            real = target.parent.resolve() / target.name
            (folder / name).symlink_to(os.path.relpath(real, folder.resolve()))
        if kind == "adapter":
            rank = _join(policy, folder)
        notes = {
            "full": "The weights are links into the run's store.",
            "adapter": _describe_adapters(policy, rank),
            "base": f"Nothing has been trained: this is the base model itself, {policy.shown_base}.",
        }[kind]
    except (OSError, SafetensorError) as error:
        _clear(folder)
        folder.mkdir(exist_ok=True)
        where = policy.shown_base if kind == "base" else policy.show(policy.folder)
        notes = (
            f"This folder has only this card ({getattr(error, 'strerror', None) or error}). The weights are in {where}."
        )
    whole = f"A copy with whole weights, which needs nothing else, is made by\n\n    {copy}"
    (folder / CARD).write_text(card(policy, folder.name, kind, rank, f"{notes} {whole}"), encoding="utf-8")
    return folder / CARD


def _files(policy: SavedPolicy) -> dict[str, Path]:
    """Return the files of a policy that can be linked unchanged, by the names that transformers expects."""
    if policy.kind == "full":
        return {path.name: path for path in sorted(policy.folder.iterdir())}
    # The run's first stage has the tokenizer with its chat template, and the weights of a model made from scratch.
    own = {path.name: path for path in sorted((policy.prompts / "model").iterdir())}
    if policy.kind == "adapter":
        weights = {WEIGHTS: policy.adapters[0] / WEIGHTS} if len(policy.adapters) == 1 else {}
        return {n: p for n, p in own.items() if not any(p.match(some) for some in OF_A_BASE)} | weights
    base = Path(policy.base)
    return {p.name: p for some in OF_A_BASE for p in sorted(base.glob(some))} | own


def _describe_adapters(policy: SavedPolicy, rank: int) -> str:
    count = len(policy.adapters)
    joined = f", {count} adapters joined into one (the sum of their updates, exactly)" if count > 1 else ""
    revision = f" at {policy.revision}" if policy.revision else ""
    kind = policy.setting("model", "quantization")
    quantised = f", whose weights were quantised to {kind} in training, as they must be in use" if kind else ""
    return f"A LoRA adapter of rank {rank}{joined} for the base model {policy.base}{revision}{quantised}."


def _join(policy: SavedPolicy, folder: Path) -> int:
    """Write a policy's adapters as one: the configuration, and the weights if there are several adapters.

    Each adapter was trained on top of the ones before it, so their updates add up. Stacking the A factors by rows and
    the B factors by columns makes B·A this sum. All adapters have the same ratio alpha / rank, and so does the result.

    Returns:
        The rank of the joint adapter.
    """
    configs = [json.loads((adapter / CONFIG).read_text()) for adapter in policy.adapters]
    joined = {name: sum(config[name] for config in configs) for name in ("r", "lora_alpha")}
    base = {"base_model_name_or_path": policy.base, "revision": policy.revision}
    write_json(folder / CONFIG, {**configs[0], **joined, **base})
    if len(configs) > 1:
        import torch
        from safetensors.torch import load_file, save_file

        parts = [load_file(adapter / WEIGHTS) for adapter in policy.adapters]
        whole = {}
        for name, first in parts[0].items():
            factor = re.search(r"\.lora_(?:embedding_)?([AB])(?:\.|$)", name)
            # Any other tensor is an unchanged copy of a base weight: take the first adapter's.
            whole[name] = torch.cat([p[name] for p in parts], "AB".index(factor[1])).contiguous() if factor else first
        save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})
    return int(joined["r"])


# --- a standalone copy


def export(
    run: Path,
    to: Path,
    iteration: str | None = None,
    store: Path | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> SavedPolicy:
    """Write a policy of a finished run as a self-contained folder: whole weights, tokenizer, card.

    Args:
        warn: receives a text if the copy differs from the policy.
        run: the run's folder.
        to: a folder that does not exist yet, or is empty.
        iteration: ``sft`` or a number; None for the policy that the run keeps.
        store: the store's folder, if it has moved.

    Raises:
        SettingsError: there is no such run, iteration or stage, or ``to`` cannot be written.
        ModelError: the base model no longer exists or has changed.
    """
    policy = find_policy(read_summary(run), iteration, store)
    expect_new(to)
    aside = to.absolute().with_name(f".{to.absolute().name}.{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        _write(policy, aside, to.absolute().name, warn)
        aside.replace(to.absolute())
    except OSError as error:
        raise SettingsError(f"to={to}: {error.strerror or error}; expected a folder to write to") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return policy


def expect_new(to: Path) -> None:
    """Refuse a folder that is not empty, and a path that is not a folder.

    Raises:
        SettingsError: it is one of these.
    """
    if to.is_symlink() or (to.exists() and (not to.is_dir() or any(to.iterdir()))):
        raise SettingsError(f"to={to}: exists already; expected a new folder, or an empty one")


def read_summary(run: Path) -> dict[str, Any]:
    """Read the summary of a finished run.

    Raises:
        SettingsError: there is none in this folder, or it does not name the run's policies.
    """
    path = run / "summary.json"
    if not path.is_file():
        raise SettingsError(
            f"{run}: no finished run there; expected a run's folder with a summary.json, such as outputs/DATE/TIME (of "
            "a sweep the folder of one job)"
        )
    summary: dict[str, Any] = json.loads(path.read_text())
    if "policies" not in summary:
        raise SettingsError(
            f"{path}: was written by an earlier version and does not name the run's policies; run the same command "
            "again (stages in the store are not computed again)"
        )
    return summary | {"cwd": find_cwd(summary, run)}


def find_policy(
    summary: Mapping[str, Any], iteration: str | None, store: Path | None, setting: str = "iteration"
) -> SavedPolicy:
    """Find one policy of a run.

    Args:
        iteration: ``sft`` or a number; None for the policy that the run keeps.
        store: the store's folder, if it has moved.
        setting: the name of the setting that chose the iteration.

    Raises:
        SettingsError: there is no such iteration, or its files are missing.
        StoreError: its files are damaged.
    """
    policies = {policy.name.removeprefix("iteration-"): policy for policy in list_policies(summary, store)}
    wanted = iteration if iteration is not None else list(policies)[kept(summary)]
    if wanted not in policies:
        raise SettingsError(
            f"{setting}={wanted}: this run has no such iteration; expected one of {', '.join(policies)}"
        )
    policy = policies[wanted]
    if not (policy.store / policy.stage / MANIFEST).is_file() or not (policy.prompts / MANIFEST).is_file():
        raise SettingsError(
            f"{policy.store / policy.stage}: this or the prompts stage of its run is missing; give store=… if "
            "the store has moved, or run the same command again"
        )
    expect_whole({policy.store / policy.stage: policy.name, policy.prompts: "prompts"})
    return policy


def _write(policy: SavedPolicy, folder: Path, name: str, warn: Callable[[str], None]) -> None:
    differs = ""
    if policy.kind == "full":
        for path in policy.folder.iterdir():
            shutil.copyfile(path, folder / path.name)
    else:
        _check_base(policy)
        if policy.setting("model", "quantization"):
            differs = _write_dequantised(policy, folder)
            warn(differs)
        else:
            _write_merged(policy, folder)
    notes = {
        "full": "This folder needs nothing else.",
        "adapter": "This folder needs nothing else: its LoRA adapters are merged into the weights.",
        "base": "Nothing has been trained: this is a copy of the base model, with the tokenizer of the run.",
    }[policy.kind]
    text = f"{notes} {differs}".rstrip()
    (folder / CARD).write_text(card(policy, name, "full", 0, text), encoding="utf-8")


def _check_base(policy: SavedPolicy) -> None:
    content = policy.prompt_settings["model"].get("content")
    if content is not None and (not Path(policy.base).is_dir() or content_hash(Path(policy.base)) != content):
        raise ModelError(
            f"model.path={policy.base}: the base model is gone or has changed since this run (the hash of its "
            f"contents was {content[:16]}); put it back"
        )


def load_policy(policy: SavedPolicy, device: str = "cpu") -> "Policy":
    """Load a policy as it was trained.

    Raises:
        ModelError: the base model no longer exists or has changed.
    """
    if policy.kind == "full":
        return _load(policy, policy.folder, policy.setting("model", "dtype", "float32"), None, device)
    _check_base(policy)
    quantization: Quantisation | None = policy.setting("model", "quantization")
    return _load(policy, policy.folder, policy.setting("model", "dtype", "float32"), quantization, device)


def _load(
    policy: SavedPolicy,
    folder: Path | None,
    dtype: "Dtype",
    quantization: "Quantisation | None",
    device: str = "cpu",
) -> "Policy":
    from dnpo.policy.loading import load

    return load(
        policy.base,
        folder,
        revision=policy.revision,
        dtype=dtype,
        trust_remote_code=policy.setting("model", "trust_remote_code", False),
        chat_template=policy.setting("model", "chat_template"),
        template_arguments=policy.setting("model", "template_arguments"),
        template_date=policy.setting("model", "template_date"),
        quantization=quantization,
        device=device,
    )


def _write_merged(policy: SavedPolicy, folder: Path) -> None:
    """Write the base model with all adapters merged, computed in float32 to avoid intermediate rounding."""
    import torch

    whole = _load(policy, policy.folder, "float32", None)
    kept: Dtype = policy.setting("model", "dtype", "float32")
    whole.model.to(getattr(torch, kept))
    whole.save(folder)


def _write_dequantised(policy: SavedPolicy, folder: Path) -> str:
    """Write the weights as training used them: quantised and dequantised, with all adapters merged, in bfloat16.

    Returns:
        A sentence on how much the copy's log-probabilities of held-out responses differ from the policy's.
    """
    import torch

    from dnpo.policy.complete import merge_adapter
    from dnpo.stages.files import read_split

    kind, dtype = policy.setting("model", "quantization"), policy.setting("model", "dtype", "float32")
    prompts, human = read_split(policy.prompts, policy.setting("eval", "split", "test"))
    asked = [prompt.token_ids for prompt in prompts[:COMPARED]]
    answers = [response.token_ids for response in human[:COMPARED]]
    exact = _load(policy, policy.folder, dtype, kind).score(asked, answers)
    whole = _load(policy, None, dtype, kind)
    model = whole.causal_lm.dequantize(torch.float32)
    for adapter in policy.adapters:
        model = merge_adapter(model, adapter, f"model: {policy.base}")
    whole.model = model.to(torch.bfloat16)
    whole.save(folder)
    differences = [abs(a - b) for a, b in zip(exact, whole.score(asked, answers), strict=True)]
    return (
        f"model.quantization={kind}: this copy has the dequantised weights with the adapters merged, rounded to "
        f"bfloat16. Log-probabilities of {len(asked)} human responses differ from the trained policy's by "
        f"{sum(differences) / len(differences):.2g} nats on average, and by up to {max(differences):.2g}."
    )
