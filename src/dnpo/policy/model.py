"""The policy, its frozen reference and their tokenizer.

A policy is a causal language model seen as a body that gives hidden states and a head that turns them into logits. On
disk it is a folder: either full weights as transformers writes them, or LoRA adapters, numbered in the order in which
they were trained, on top of the model part's base weights.
"""

import copy
import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from dnpo.errors import ModelError, SettingsError
from dnpo.policy.logprobs import Head, sum_by_sequence, token_logps
from dnpo.policy.packing import ATTENTION, Packed, pack
from dnpo.policy.tokenizer import PLAIN_TEMPLATE, train_tokenizer
from dnpo.records import Prompt
from dnpo.seeding import derive
from dnpo.settings import Count, Natural, Positive
from dnpo.store import content_hash

Dtype = Literal["float32", "bfloat16"]


SCORED_TOKENS = 8192  # of one batch where no gradients are needed


class Policy:
    """A causal language model with its tokenizer. Shapes as in ``packing.py`` and ``logprobs.py``.

    Raises:
        ModelError: the model cannot be read as a body and an output head.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.own_attention = str(self.causal_lm.config._attn_implementation)
        self.causal_lm.set_attn_implementation(ATTENTION)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device

    @property
    def causal_lm(self) -> Any:
        """The transformers model, inside its adapters if it has any."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "peft_config") else model

    @property
    def head(self) -> Head:
        """The output head, with what its model family does to the logits after it."""
        linear = self.causal_lm.get_output_embeddings()
        if type(linear) is not nn.Linear:
            raise ModelError(
                f"model: the output head of {type(self.causal_lm).__name__} is a {type(linear).__name__}, expected a "
                "plain linear layer (model.lora.target_modules must not name it, nor may it be quantised)"
            )
        config = self.causal_lm.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        cap = getattr(config, "final_logit_softcapping", None) or float("inf")  # Gemma
        return Head(linear.weight, linear.bias, scale, cap)

    @property
    def pad_id(self) -> int:
        """What fills padded rows; it never counts, so any id serves where the tokenizer names none."""
        pad = cast(int | None, self.tokenizer.pad_token_id)
        return pad if pad is not None else cast(int, self.tokenizer.eos_token_id)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a response: the tokenizer's end-of-sequence and whatever the model adds to it."""
        return list(dict.fromkeys([cast(int, self.tokenizer.eos_token_id), *self.model_stop_ids]))

    @property
    def model_stop_ids(self) -> list[int]:
        """Those of them that the model itself names."""
        configured = getattr(self.causal_lm.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        return [i for i in ids if i is not None]

    def hidden(self, batch: Packed) -> Tensor:
        """The body's hidden states that predict the batch's completion tokens, shape N × H."""
        ids_1T = batch.ids_T.unsqueeze(0)
        hidden_1TH = self.causal_lm.base_model(
            input_ids=ids_1T,
            # Four dimensions say that the mask is ready: the attention of ``packing.py`` needs none.
            attention_mask=ids_1T.new_ones(1, 1, 1, 1),
            position_ids=batch.position_T.unsqueeze(0),
            use_cache=False,
            packing=batch,
        ).last_hidden_state
        return cast(Tensor, hidden_1TH.squeeze(0)[batch.predict_N])

    def logps(self, batch: Packed) -> Tensor:
        """log p(completion | prompt) of each sequence, float32, shape S."""
        return sum_by_sequence(token_logps(self.hidden(batch), self.head, batch.target_N), batch.completions_S)

    @torch.no_grad()
    def score(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> list[float]:
        """log p(completion | prompt) of many sequences, in nats, by batches of similar length."""
        found = [0.0] * len(prompts)
        for some in by_length([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]):
            batch = pack([prompts[i] for i in some], [completions[i] for i in some])
            for i, logp in zip(some, self.logps(batch.to(self.device)).tolist(), strict=True):
                found[i] = logp
        return found

    def fingerprint(self) -> str:
        """SHA-256 of the weights: names, types, shapes and values. Adapters, and what is frozen, count too."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode for a while; the mode before is put back."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def reference(self) -> "Policy":
        """A frozen copy to start from: with LoRA the same weights, to be read with the trained adapter switched off."""
        if hasattr(self.model, "peft_config"):
            return AdapterOff(self.model, self.tokenizer)
        frozen = copy.deepcopy(self.model).eval()
        frozen.requires_grad_(False)
        return Policy(frozen, self.tokenizer)

    def save(self, folder: Path, earlier: Path | None = None) -> None:
        """Write the policy so that :func:`load` finds it.

        Args:
            folder: where to.
            earlier: with LoRA, the folder of the policy this one started from, whose adapters are copied along.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if not hasattr(self.model, "peft_config"):
            self.causal_lm.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            return
        before = _adapters(earlier) if earlier is not None else []
        for number, adapter in enumerate(before):
            shutil.copytree(adapter, folder / f"adapter-{number:02d}", dirs_exist_ok=True)
        self.model.save_pretrained(folder / f"adapter-{len(before):02d}")  # type: ignore[operator]


class AdapterOff(Policy):
    """The reference of a LoRA policy: the same module, with the trained adapter switched off while it is read."""

    def hidden(self, batch: Packed) -> Tensor:
        """See :meth:`Policy.hidden`."""
        with self.evaluating(), self.model.disable_adapter():  # type: ignore[operator]
            return super().hidden(batch)


def by_length(lengths: Sequence[int], tokens: int = SCORED_TOKENS) -> Iterator[list[int]]:
    """Indices of sequences in batches of so many tokens at most (or one sequence), the shortest sequences first."""
    some: list[int] = []
    total = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if some and total + lengths[i] > tokens:
            yield some
            some, total = [], 0
        some.append(i)
        total += lengths[i]
    if some:
        yield some


class Lora:
    """Low-rank adapters: each training puts a fresh one on the weights, into which those before it are merged.

    Args:
        rank: 0 trains all weights instead.
        alpha: the usual scale; the update is multiplied by alpha / rank.
        target_modules: as peft takes it: names, or ``all-linear``.
    """

    def __init__(
        self, *, rank: Natural = 0, alpha: Positive = 16.0, target_modules: str | list[str] = "all-linear"
    ) -> None:
        self.rank, self.alpha, self.target_modules = rank, alpha, target_modules

    def identity(self) -> Mapping[str, Any]:
        """Everything that decides the adapter; nothing of it matters at rank 0."""
        return vars(self) if self.rank else {"rank": 0}

    def on(self, model: nn.Module, seed: int) -> nn.Module:
        """The model with a fresh trainable adapter, which changes nothing yet; unchanged at rank 0."""
        if self.rank == 0:
            return model
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
        return cast(nn.Module, adapted)


class Scratch:
    """A small Llama-shaped model, not trained yet, with a byte-pair tokenizer trained on the data's own text.

    Args:
        width, layers, heads, mlp: hidden size, number of blocks, attention heads, inner size of the MLP.
        vocabulary: tokens at most, special ones included; every digit is a token of its own.
        context: positions at most.
        seed: draws the initial weights.
    """

    def __init__(
        self,
        *,
        width: Count = 96,
        layers: Count = 2,
        heads: Count = 4,
        mlp: Count = 256,
        vocabulary: Count = 400,
        context: Count = 128,
        lora: Lora,
        seed: Natural = 0,
    ) -> None:
        if width % (2 * heads):
            raise ModelError(f"model.width={width}: must be a multiple of 2 × model.heads={heads} (rotary positions)")
        self.shape: dict[str, Any] = {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "intermediate_size": mlp,
            "max_position_embeddings": context,
        }
        self.vocabulary, self.lora, self.seed = vocabulary, lora, seed

    def identity(self) -> Mapping[str, Any]:
        """Everything that decides the initial weights and the tokenizer."""
        return {**self.shape, "vocabulary": self.vocabulary, "seed": self.seed}

    def base(self, folder: Path, prompts: Sequence[Prompt]) -> None:
        """Train the tokenizer on the prompts and human responses, draw the weights, and write both."""
        tokenizer = train_tokenizer(prompts, self.vocabulary)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
            **self.shape,
        )
        with torch.random.fork_rng():
            torch.manual_seed(derive(self.seed, "weights"))
            model = LlamaForCausalLM(config)
        Policy(model, tokenizer).save(folder)

    def load(self, base: Path, folder: Path | None = None, device: str = "cpu") -> Policy:
        """The policy in ``folder``, or the untrained one without."""
        return load(str(base), folder, device=device)

    def outline(self, base: Path) -> Policy:
        """The untrained model without its weights; see :func:`outline`."""
        return outline(str(base))


class Pretrained:
    """Any causal language model of transformers, from a local folder or by its name on the Hugging Face hub.

    Args:
        path: a folder with ``config.json``, safetensors weights and a tokenizer; or
        name: a name on the hub, with ``revision``. Exactly one of the two.
        dtype: of the weights.
        trust_remote_code: whether code that comes with the model may run.
        chat_template: overrides the tokenizer's; one that has none gets a plain template (``PLAIN_TEMPLATE``).
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        name: str | None = None,
        revision: str | None = None,
        dtype: Dtype = "float32",
        trust_remote_code: bool = False,
        chat_template: str | None = None,
        lora: Lora,
    ) -> None:
        if (path is None) == (name is None):
            raise ModelError("model: give either model.path (a folder) or model.name (on the hub)")
        if path is not None and not (Path(path) / "config.json").is_file():
            raise ModelError(
                f"model.path={path}: no model there; expected a folder with config.json, *.safetensors and a tokenizer"
            )
        self.location = str(Path(path).absolute()) if path is not None else cast(str, name)
        self.local, self.revision, self.dtype = path is not None, revision, dtype
        self.trust_remote_code, self.chat_template, self.lora = trust_remote_code, chat_template, lora

    def identity(self) -> Mapping[str, Any]:
        """What decides the weights: the contents of the folder, or name and commit on the hub."""
        where = (
            {"content": content_hash(Path(self.location))}
            if self.local
            else {"name": self.location, "revision": self._commit}
        )
        return {**where, "dtype": self.dtype, "chat_template": self.chat_template}

    @cached_property
    def _commit(self) -> str:
        """The commit that is read, whatever the revision points to later."""
        from httpx2 import HTTPError
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return cast(str, HfApi().model_info(self.location, revision=self.revision).sha)
        except (HfHubHTTPError, HTTPError, OSError) as error:
            if self.revision is not None:  # offline, but pinned: what is in the cache will do
                return self.revision
            raise ModelError(
                f"model.name={self.location}: the hub does not answer ({type(error).__name__}); give model.revision=… "
                "to use a downloaded copy, or model=local model.path=…"
            ) from error

    def base(self, folder: Path, prompts: Sequence[Prompt]) -> None:
        """Write the tokenizer with the template in force; the weights stay where they are."""
        self.outline(folder).tokenizer.save_pretrained(folder)

    def load(self, base: Path, folder: Path | None = None, device: str = "cpu") -> Policy:
        """The policy in ``folder``, or the base model without."""
        return load(
            self.location,
            folder,
            revision=None if self.local else self._commit,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            chat_template=self.chat_template,
            device=device,
        )

    def outline(self, base: Path) -> Policy:
        """The base model without its weights; see :func:`outline`."""
        return outline(
            self.location,
            revision=None if self.local else self._commit,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            chat_template=self.chat_template,
        )


ModelPart = Scratch | Pretrained


def load(
    base: str,
    folder: Path | None,
    *,
    revision: str | None = None,
    dtype: Dtype = "float32",
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    device: str = "cpu",
) -> Policy:
    """Load a policy: full weights from ``folder`` if there are, else the base's with the folder's adapters merged in.

    Raises:
        ModelError: there is no usable model or tokenizer, or the two disagree, or the output head is not one whose
            logits the log-probabilities here reproduce.
    """
    whole = folder is not None and (folder / "config.json").is_file()
    weights = str(folder) if whole else base
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": None if whole else revision}
    try:
        tokenizer, config = _described(weights, chat_template, options)
        model: Any = AutoModelForCausalLM.from_pretrained(
            weights, config=config, dtype=dtype, use_safetensors=True, **options
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"model: {weights} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    if folder is not None and not whole:
        from peft import PeftModel

        for adapter in _adapters(folder):
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    policy = Policy(model.to(device), tokenizer)
    _check(policy, weights)
    return policy


def outline(
    base: str,
    *,
    revision: str | None = None,
    dtype: Dtype = "float32",
    trust_remote_code: bool = False,
    chat_template: str | None = None,
) -> Policy:
    """The base model with its tokenizer, its shapes and its settings, but without weights: it takes no memory.

    Raises:
        ModelError: there is no usable configuration or tokenizer, or the two disagree.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    try:
        tokenizer, config = _described(base, chat_template, options)
        make: Any = AutoModelForCausalLM.from_config
        with torch.device("meta"):
            model = make(config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {base} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    with suppress(OSError):  # without a file of its own it follows from the configuration
        model.generation_config = GenerationConfig.from_pretrained(base, revision=revision or "main")
    policy = Policy(model, tokenizer)
    _belong_together(policy, base)
    return policy


def _described(weights: str, chat_template: str | None, options: dict[str, Any]) -> tuple[Any, Any]:
    """The tokenizer, with the template in force, and the configuration."""
    tokenizer = AutoTokenizer.from_pretrained(weights, **options)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer, without_dropout(AutoConfig.from_pretrained(weights, **options))


def without_dropout(config: Any) -> Any:
    """The configuration with every dropout at 0.

    With dropout the policy is not the reference before the first update, and its steps depend on global chance.
    """
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def _adapters(folder: Path) -> list[Path]:
    return sorted(folder.glob("adapter-*"))


def _belong_together(policy: Policy, weights: str) -> None:
    """A tokenizer that the model's embeddings hold, and an end-of-sequence token."""
    tokenizer, model = policy.tokenizer, policy.causal_lm
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"model: the tokenizer in {weights} has {len(tokenizer):,} tokens, the model embeds only {rows:,}; "
            "they do not belong together"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model: the tokenizer in {weights} has no end-of-sequence token, so no response could ever end"
        )


@torch.no_grad()
def _check(policy: Policy, weights: str) -> None:
    """A tokenizer that belongs to the model, and a head that is the model's own."""
    _belong_together(policy, weights)
    tokenizer = policy.tokenizer
    _reproduced(policy, [i for i in range(len(tokenizer)) if i != tokenizer.pad_token_id])


def _reproduced(policy: Policy, ids: list[int]) -> None:
    """Whether packed hidden states and the head alone give the logits that the model's own forward gives.

    Two sequences, so that attention across their border would show; four tokens each.
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
            f"model: {type(model).__name__} has rotary positions of type {', '.join(sorted(kinds))}: a sequence's "
            "depend on the longest one computed with it; it is not supported"
        )
    step = max(len(ids) // 8, 1)
    one, other = ids[:: 2 * step][:4], ids[step :: 2 * step][:4]
    rows = [torch.tensor([row], device=policy.device) for row in (one, other)]
    try:
        with policy.evaluating():
            packed = pack([one[:1], other[:1]], [one[1:], other[1:]]).to(policy.device)
            hidden_NH = policy.hidden(packed)
            ours = policy.head.logits(hidden_NH)
            model.set_attn_implementation(policy.own_attention)  # what it would do by itself
            alone = [model(input_ids=row, output_hidden_states=True) for row in rows]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"model: {type(model).__name__} cannot run on sequences without padding: {error}") from error
    finally:
        model.set_attn_implementation(ATTENTION)
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ("sliding_attention",))
    if window and slides and window not in packed.windows:
        raise ModelError(
            f"model: {type(model).__name__} does not tell its attention of its window of {window} tokens; it is not "
            "supported"
        )
    its = torch.cat([out.logits[0, :-1] for out in alone]).float()
    half = policy.head.weight_VH.dtype is not torch.float32
    if ours.shape == its.shape and torch.allclose(ours, its, rtol=2e-2 if half else 1e-3, atol=5e-2 if half else 1e-3):
        return
    # Which of the two is it? Its own last hidden states tell.
    own = torch.cat([out.hidden_states[-1][0, :-1] for out in alone])
    if ours.shape == its.shape and torch.allclose(own, hidden_NH, rtol=2e-2, atol=2e-2):
        what = "does more with its hidden states than its output head and its configuration say"
    else:
        what = "lets sequences without padding see each other, or places them by other positions"
    differ = f"logits differ by up to {float((ours - its).abs().max()):.3g}" if ours.shape == its.shape else "shapes"
    raise ModelError(f"model: {type(model).__name__} {what}: {differ}; it is not supported")


def device_of(setting: str) -> str:
    """``auto`` is the GPU if there is one.

    Raises:
        SettingsError: there is no such device.
    """
    if setting == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", setting):
        raise SettingsError(f"device={setting}: expected auto, cpu, cuda or cuda:N")
    if setting.startswith("cuda") and int(setting[5:] or 0) >= torch.cuda.device_count():
        raise SettingsError(f"device={setting}: torch sees {torch.cuda.device_count()} GPUs; expected cpu or auto")
    return setting
