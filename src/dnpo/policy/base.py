"""Base models, configured by ``model=…``. ``loading.py`` loads their weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from dnpo.errors import ModelError, StoreError
from dnpo.policy.folder import CONFIG, check_name, explain_missing, find_files, read_context
from dnpo.policy.lora import Lora
from dnpo.policy.question import check_template, frame
from dnpo.records import Prompt
from dnpo.seeding import derive
from dnpo.settings import Count, Dtype, Natural, Quantisation, place
from dnpo.store import advise, content_hash, fingerprint, manifest

if TYPE_CHECKING:
    from dnpo.policy.model import Policy


@dataclass(frozen=True)
class Scratch:
    """A small untrained model of Llama's architecture, with a byte-pair tokenizer trained on the data.

    Args:
        width: hidden size.
        layers: number of blocks.
        heads: attention heads of a block.
        mlp: inner size of a block's MLP.
        vocabulary: maximum number of tokens, including special ones; every digit is a separate token.
        context: maximum number of positions.
        seed: seed of the initial weights.
        lora: adapters to train instead of the weights.
        question: the template of a judge's question (``judge.template``). If it is given, the tokenizer is trained on
            it too, so that it has tokens for the letters.

    Raises:
        ModelError: ``width`` does not fit ``heads``.
        SettingsError: the question is not a valid template.
    """

    quantization: ClassVar[None] = None

    lora: Lora
    width: Count = 96
    layers: Count = 2
    heads: Count = 4
    mlp: Count = 256
    vocabulary: Count = 400
    context: Count = 128
    seed: Natural = 0
    question: str | None = None

    def __post_init__(self) -> None:
        if self.question is not None:
            check_template(self.question, "model.question")
        if self.width % (2 * self.heads):
            raise ModelError(
                f"model.width={self.width}: must be a multiple of 2 × model.heads={self.heads} (rotary positions)"
            )

    @property
    def known_context(self) -> int | None:
        """The tokens that the model reads at most."""
        return self.context

    def identity(self) -> Mapping[str, Any]:
        """The values that determine the initial weights and the tokenizer."""
        question = {} if self.question is None else {"question": self.question}
        return {**self._shape, "vocabulary": self.vocabulary, "seed": self.seed, **question}

    @property
    def _shape(self) -> dict[str, Any]:
        return {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "intermediate_size": self.mlp,
            "max_position_embeddings": self.context,
        }

    def base(self, folder: Path, prompts: Sequence[Prompt]) -> None:
        """Train the tokenizer on the prompts and human responses, draw the weights, and write both."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from dnpo.policy.model import Policy
        from dnpo.policy.tokenizer import train_tokenizer

        asked = [] if self.question is None else [frame(self.question)] * len(prompts)
        tokenizer = train_tokenizer(prompts, self.vocabulary, asked)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
            **self._shape,
        )
        with torch.random.fork_rng():
            torch.manual_seed(derive(self.seed, "weights"))
            model = LlamaForCausalLM(config)
        Policy(model, tokenizer).save(folder)

    def load(self, base: Path, folder: Path | None = None, device: str = "cpu") -> "Policy":
        """Load the policy in ``folder``, or the untrained policy if no folder is given."""
        from dnpo.policy.loading import load

        return load(str(base), folder, device=device)

    def weights_are_here(self, base: Path) -> bool:
        """Whether the weights are on this machine; always true, since they are created here."""
        return True

    def outline(self, base: Path) -> "Policy":
        """The untrained model without weights, for checks: only tokenizer and settings."""
        from dnpo.policy.loading import outline

        return outline(str(base))


@dataclass(frozen=True)
class Pretrained:
    """Any causal language model of transformers, from a local folder or by its name on the Hugging Face hub.

    Args:
        lora: adapters to train instead of the weights.
        path: a folder with ``config.json``, safetensors weights and a tokenizer.
        name: a name on the hub. Give either this or ``path``.
        revision: a branch, tag or commit of the model on the hub.
        dtype: type of the weights; if they are quantised, the type of matrix products.
        quantization: quantise the weights when they are loaded, to train adapters on them: ``nf4`` or ``int8``.
        trust_remote_code: whether code that comes with the model may run.
        chat_template: overrides the tokenizer's template; if there is none, a plain one is used (``PLAIN_TEMPLATE``).
        template_arguments: variables of the template, such as ``{enable_thinking: false}``.
        template_date: the current date for a template that reads the clock, such as ``2026-01-31``.

    Raises:
        ModelError: both or neither of ``path`` and ``name`` are given, or there is no model at ``path``.
    """

    lora: Lora
    path: str | None = place(None)
    name: str | None = None
    revision: str | None = None
    dtype: Dtype = "float32"
    quantization: Quantisation | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None
    template_arguments: Mapping[str, Any] | None = None
    template_date: str | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.name is None):
            raise ModelError("model: give either model.path (a folder) or model.name (on the hub)")
        if self.path is not None and not (Path(self.path) / CONFIG).is_file():
            raise ModelError(f"{self._setting}: {explain_missing(Path(self.path))}")
        if self.name is not None:
            check_name(self.name, self._setting)
        if self.quantization is not None:
            if not self.lora.rank:
                raise ModelError(
                    f"model.quantization={self.quantization}: quantised weights cannot be trained themselves; take "
                    "adapters (model.lora.rank=16), or model.quantization=null"
                )
            if find_spec("bitsandbytes") is None:
                raise ModelError(
                    f"model.quantization={self.quantization}: needs bitsandbytes, which is not installed here: "
                    'pip install "dnpo[qlora]"'
                )

    @property
    def _setting(self) -> str:
        """The setting that names the model, for messages."""
        return f"model.path={self.path}" if self._local else f"model.name={self.name}"

    @property
    def _local(self) -> bool:
        return self.path is not None

    @cached_property
    def _location(self) -> str:
        """The absolute path of the folder, or the name on the hub."""
        return str(Path(self.path).absolute()) if self.path is not None else cast(str, self.name)

    @property
    def known_context(self) -> int | None:
        """The tokens that the model reads at most, if its configuration is in a local folder and names them."""
        return read_context(Path(self._location)) if self._local else None

    def identity(self) -> Mapping[str, Any]:
        """The values that decide the weights: the contents of the folder, or name and commit on the hub."""
        where = {"content": self._content} if self._local else {"name": self._location, "revision": self._commit}
        more: dict[str, Any] = {"template_arguments": self.template_arguments, "template_date": self.template_date}
        # if the folder's code may run, the same files can become another model
        more["trust_remote_code"] = self.trust_remote_code
        more["quantization"] = self.quantization
        given = {name: value for name, value in more.items() if value}
        return {**where, "dtype": self.dtype, "chat_template": self.chat_template, **given}

    @cached_property
    def _content(self) -> str:
        return content_hash(Path(self._location))

    @cached_property
    def _commit(self) -> str:
        """The commit that the revision points to now."""
        from httpx2 import HTTPError
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return cast(str, HfApi().model_info(self._location, revision=self.revision).sha)
        except (HfHubHTTPError, HTTPError, OSError) as error:
            if self.revision is not None:  # offline with a given revision: the cache is sufficient
                return self.revision
            raise ModelError(
                f"model.name={self._location}: the hub does not answer ({type(error).__name__}); give model.revision=… "
                "to use a downloaded copy, or model=local model.path=…"
            ) from error

    def base(self, folder: Path, prompts: Sequence[Prompt]) -> None:
        """Write the tokenizer with the template that is used; the weights are not copied."""
        self.outline(folder).tokenizer.save_pretrained(folder)

    def load(self, base: Path, folder: Path | None = None, device: str = "cpu") -> "Policy":
        """Load the policy in ``folder``, or the base model if no folder is given."""
        from dnpo.policy.loading import load

        return load(
            self._location,
            folder,
            revision=None if self._local else self._commit,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            chat_template=self.chat_template,
            template_arguments=self.template_arguments,
            template_date=self.template_date,
            device=device,
            quantization=self.quantization,
            setting=self._setting,
        )

    def weights_are_here(self, base: Path) -> bool:
        """Whether the weights are on this machine; if not, they are still to be downloaded from the hub."""
        return find_files(self._location, None if self._local else self._commit) is not None

    def outline(self, base: Path) -> "Policy":
        """The base model without weights, for checks: only tokenizer and settings."""
        from dnpo.policy.loading import outline

        return outline(
            self._location,
            revision=None if self._local else self._commit,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            chat_template=self.chat_template,
            template_arguments=self.template_arguments,
            template_date=self.template_date,
            setting=self._setting,
        )


ModelPart = Scratch | Pretrained


# --- saved policies


def describe_saved(folder: Path) -> dict[str, Any]:
    """Describe the policy in a folder, for the manifest of its stage.

    Returns:
        ``kind``: ``whole`` weights, ``adapters`` on the base model, or ``base``, the base model itself. ``adapters``:
            the number of adapters. ``fingerprint``: the SHA-256 of all files.
    """
    return {**_look(folder), "fingerprint": fingerprint(folder)}


def read_saved(folder: Path) -> dict[str, Any]:
    """Describe the policy in a finished stage's folder, and check it against the manifest.

    Raises:
        StoreError: the manifest describes another policy. Without this check, a policy whose files are lost would be
            taken for the base model.
    """
    known = manifest(folder.parent)["facts"].get("policy")  # None: written by an earlier version
    found = _look(folder)
    if not folder.is_dir() or (known is not None and any(found[name] != known[name] for name in found)):
        expected = "another policy" if known is None else f"{known['kind']} ({known['adapters']} adapters)"
        there = f"{found['kind']} ({found['adapters']} adapters)" if folder.is_dir() else "nothing"
        raise StoreError(f"{folder}: expected {expected}, found {there}. {advise(folder.parents[2], [folder.parent])}")
    return found


def _look(folder: Path) -> dict[str, Any]:
    adapters = len(list(folder.glob("adapter-*")))
    whole = (folder / "config.json").is_file()
    return {"kind": "whole" if whole else "adapters" if adapters else "base", "adapters": adapters}
