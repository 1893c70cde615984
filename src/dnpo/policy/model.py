"""The policy, its frozen reference and their tokenizer.

A policy is a causal language model, split into a body that computes hidden states and a head that computes logits. On
disk it is a folder. The folder has full weights, as transformers writes them, or LoRA adapters on the base model's
weights, numbered in the order of their training. If the base is quantised, ``policy.json`` names base, quantisation and
adapters.
"""

import copy
import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from dnpo import ranks
from dnpo.errors import ModelError, SettingsError
from dnpo.policy.folder import STACK, adapters
from dnpo.policy.logprobs import Head, sum_by_sequence, token_logps
from dnpo.policy.lora import TRAINED, is_adapted, without_trained
from dnpo.policy.packing import ATTENTION, Packed, pack_shared, register
from dnpo.policy.quantised import kind_of
from dnpo.policy.sharded import gather_state, gather_weight, is_sharded
from dnpo.store import write_json

Dtype = Literal["float32", "bfloat16"]


SCORED_TOKENS = 8192  # tokens in a batch without gradients


class Policy:
    """A causal language model with its tokenizer. Shapes as in ``packing.py`` and ``logprobs.py``.

    Raises:
        ModelError: the model cannot be read as a body and an output head.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.own_attention = str(self.causal_lm.config._attn_implementation)
        register()
        self.causal_lm.set_attn_implementation(ATTENTION)

    @property
    def device(self) -> torch.device:
        """The device that its weights are on."""
        return next(self.model.parameters()).device

    @property
    def causal_lm(self) -> Any:
        """The transformers model, without its wrapper for adapters."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "peft_config") else model

    @property
    def head(self) -> Head:
        """The output head, with the scale and cap that its model family applies to logits.

        Raises:
            ModelError: the output head is not a plain linear layer.
        """
        linear = self.causal_lm.get_output_embeddings()
        if type(linear) is not nn.Linear:
            raise ModelError(
                f"model: the output head of {type(self.causal_lm).__name__} is a {type(linear).__name__}, expected a "
                "plain linear layer (not quantised, and not in model.lora.target_modules)"
            )
        config = self.causal_lm.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        cap = getattr(config, "final_logit_softcapping", None) or float("inf")  # Gemma
        weight: Tensor = linear.weight
        bias: Tensor | None = linear.bias
        if type(weight) is not nn.Parameter:  # this process has a part of it
            weight, bias = gather_weight(weight), None if bias is None else gather_weight(bias)
        return Head(weight, bias, scale, cap)

    @property
    def pad_id(self) -> int:
        """The padding token. It is always masked, so any id will do if the tokenizer has none."""
        pad = cast(int | None, self.tokenizer.pad_token_id)
        return pad if pad is not None else cast(int, self.tokenizer.eos_token_id)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a response: the tokenizer's end-of-sequence token and the model's stop tokens."""
        return list(dict.fromkeys([cast(int, self.tokenizer.eos_token_id), *self.model_stop_ids]))

    @property
    def model_stop_ids(self) -> list[int]:
        """The stop tokens in the model's configuration."""
        configured = getattr(self.causal_lm.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        return [i for i in ids if i is not None]

    def count_flop(self) -> int:
        """Floating-point operations to train on a token, by the usual estimate, which leaves out attention.

        For each weight of a matrix product: 2 in the forward pass, 2 for the gradient of its input, and 2 for its own
        gradient if it is trained. So 6 for each weight of the network (Kaplan et al. 2020, section 2.1).
        """
        found = 0
        for layer in self.model.modules():
            if isinstance(layer, nn.Linear | Conv1D):
                # packed weights of quantised layers have another shape
                size = layer.in_features * layer.out_features if isinstance(layer, nn.Linear) else layer.weight.numel()
                found += size * (6 if layer.weight.requires_grad else 4)
        return found

    def hidden(self, batch: Packed, **options: Any) -> Tensor:
        """The body's hidden states that predict the batch's completion tokens, shape N × H.

        Args:
            options: passed on to the attention of ``packing.py``.
        """
        ids_1T = batch.ids_T.unsqueeze(0)
        hidden_1TH = self.causal_lm.base_model(
            input_ids=ids_1T,
            # transformers does not change a mask with four dimensions; the attention of ``packing.py`` ignores it.
            attention_mask=ids_1T.new_ones(1, 1, 1, 1),
            position_ids=batch.position_T.unsqueeze(0),
            use_cache=False,
            packing=batch,
            **options,
        ).last_hidden_state
        return cast(Tensor, hidden_1TH.squeeze(0)[batch.predict_N])

    def logps(self, batch: Packed) -> Tensor:
        """log p(completion | prompt) of each sequence, float32, shape S."""
        return self.sum_logps(self.hidden(batch), batch)

    def sum_logps(self, hidden_NH: Tensor, batch: Packed) -> Tensor:
        """The result of :meth:`logps`, from hidden states that are already computed."""
        return sum_by_sequence(token_logps(hidden_NH, self.head, batch.target_N), batch.completions_S)

    def score(self, prompts: Sequence[list[int]], completions: Sequence[list[int]], *, samples: int = 1) -> list[float]:
        """log p(completion | prompt) of many sequences, in nats, computed in batches of similar length.

        Args:
            samples: number of consecutive sequences with the same prompt; a batch computes a prompt once for all of
                them.
        """
        scores = [0.0] * len(prompts)
        for i, logp, _ in self._score(prompts, completions, samples):
            scores[i] = logp
        return scores

    def score_tokens(
        self, prompts: Sequence[list[int]], completions: Sequence[list[int]], *, samples: int = 1
    ) -> tuple[list[float], list[list[float]]]:
        """The result of :meth:`score`, and log p of each token of each completion."""
        scores, tokens = [0.0] * len(prompts), [[0.0]] * len(prompts)
        for i, logp, logp_n in self._score(prompts, completions, samples):
            scores[i], tokens[i] = logp, logp_n.tolist()
        return scores, tokens

    @torch.no_grad()
    def _score(
        self, prompts: Sequence[list[int]], completions: Sequence[list[int]], samples: int
    ) -> Iterator[tuple[int, float, Tensor]]:
        """Yield each sequence's index, log-probability and log-probabilities by token."""
        units = _share(prompts, completions, samples)
        for some in by_length([tokens for _, tokens in units]):
            rows: list[int] = []
            first: list[int] = []
            for unit in some:
                first += [len(rows)] * len(units[unit][0])
                rows += units[unit][0]
            batch = pack_shared([prompts[i] for i in rows], [completions[i] for i in rows], first).to(self.device)
            logp_N = token_logps(self.hidden(batch), self.head, batch.target_N)
            logp_S = sum_by_sequence(logp_N, batch.completions_S)
            yield from zip(rows, logp_S.tolist(), torch.split(logp_N, list(batch.completions)), strict=True)

    def fingerprint(self) -> str:
        """SHA-256 of all weights, with adapters and frozen weights: names, types, shapes and values."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch to evaluation mode, and back to the earlier mode afterwards."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def reference(self) -> "Policy":
        """A frozen copy of the present policy; with LoRA the same module with its adapter switched off."""
        if is_adapted(self.model):
            return AdapterOff(self.model, self.tokenizer)
        frozen = copy.deepcopy(self.model).eval()
        frozen.requires_grad_(False)
        return Policy(frozen, self.tokenizer)

    def switched_off(self) -> "Policy":
        """The policy before training. Without LoRA, this is valid only until its weights change."""
        return AdapterOff(self.model, self.tokenizer) if is_adapted(self.model) else self

    def save(self, folder: Path, earlier: Path | None = None) -> None:
        """Write the policy so that ``loading.py`` can load it; if several processes share it, all must call this.

        Args:
            folder: the folder to write.
            earlier: with LoRA, the folder of the policy that this one started from; its adapters are copied.
        """
        adapted = hasattr(self.model, "peft_config")
        whole = {"state_dict": gather_state(self.model, trained=adapted)} if is_sharded(self.model) else {}
        if not ranks.leads():
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not adapted:
            self.causal_lm.save_pretrained(folder, **whole)
            self.tokenizer.save_pretrained(folder)
            return
        before = adapters(earlier) if earlier is not None else []
        for number, adapter in enumerate(before):
            shutil.copytree(adapter, folder / f"adapter-{number:02d}", dirs_exist_ok=True)
        model: Any = self.model
        model.save_pretrained(folder / f"adapter-{len(before):02d}", selected_adapters=[TRAINED], **whole)
        if (kind := kind_of(self.causal_lm)) is not None:
            base = model.peft_config[TRAINED].base_model_name_or_path
            names = [adapter.name for adapter in adapters(folder)]
            write_json(folder / STACK, {"base": base, "quantization": kind, "adapters": names})


class AdapterOff(Policy):
    """The reference of a LoRA policy: the same module, used with the trained adapter switched off."""

    def hidden(self, batch: Packed, **options: Any) -> Tensor:
        """The hidden states without the trained adapter, shape N × H."""
        with self.evaluating(), without_trained(self.model):
            return super().hidden(batch, **options)


def _share(prompts: Sequence[list[int]], completions: Sequence[list[int]], samples: int) -> list[tuple[list[int], int]]:
    """Group sequences that share a prompt within a batch, with each group's tokens; its prompt counts once."""
    units: list[tuple[list[int], int]] = []
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if i % samples and units[-1][1] + len(completion) <= SCORED_TOKENS:
            units[-1] = ([*units[-1][0], i], units[-1][1] + len(completion))
        else:
            units.append(([i], len(prompt) + len(completion)))
    return units


def by_length(lengths: Sequence[int], tokens: int = SCORED_TOKENS) -> Iterator[list[int]]:
    """Yield batches of sequences as indices, shortest first, with at most ``tokens`` tokens or a single sequence."""
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


def device_of(setting: str) -> str:
    """Resolve a device; ``auto`` is the GPU if there is one.

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
