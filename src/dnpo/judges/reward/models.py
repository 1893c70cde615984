"""Models that give a response a reward, a number without bounds: classifiers, and heads on sentence embeddings.

Both take encoded rows and give a tensor of rewards through which gradients flow, so what judges is what is fitted.
Shapes: B rows, T tokens, H width of an embedding.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from dnpo.errors import ModelError
from dnpo.policy.loading import without_dropout
from dnpo.policy.tokenizer import PLAIN_TEMPLATE
from dnpo.policy.weights import Weights, context_of
from dnpo.records import Message
from dnpo.settings import Dtype

Kind = Literal["model", "embedding"]
FACTS, SEEN, HEAD, ENCODER = "reward.json", "prompts_seen.txt", "head.safetensors", "encoder"
Ids = tuple[int, ...]


class Rewards(ABC):
    """Encodes conversations with a response, and rewards them.

    Attributes:
        module: what is trained when one is fitted.
        limit: tokens that can be read at once; None where there is no limit.
        batches: whether it can read several rows at once.
    """

    module: nn.Module
    limit: int | None
    batches: bool = True

    @abstractmethod
    def encode(self, messages: Sequence[Message], response: str) -> list[Ids]:
        """The token sequences that are read for one response; each has to keep to the limit."""

    @abstractmethod
    def __call__(self, rows: Sequence[list[Ids]]) -> Tensor:
        """Rewards, shape B."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write it so that :func:`load` finds it, but for the facts."""

    def too_long(self, row: list[Ids]) -> bool:
        """Whether a row cannot be read as a whole. It is never cut: half a response is another response."""
        return self.limit is not None and max(map(len, row)) > self.limit


class Classifier(Rewards):
    """A sequence classifier of transformers with one output.

    It reads the conversation with the response as its last turn, by the tokenizer's chat template. Without a template a
    tokenizer with a separator token (BERT, DeBERTa) gets conversation and response as a pair of texts, and any other
    :data:`~dnpo.policy.tokenizer.PLAIN_TEMPLATE`. Rows are padded on the right, and read one by one where the model's
    configuration names no padding token.
    """

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int | None) -> None:
        self.module, self.tokenizer = model, tokenizer
        self.limit = _least(context_of(model, tokenizer), max_tokens)
        self.pair = tokenizer.chat_template is None and tokenizer.sep_token is not None
        if tokenizer.chat_template is None and not self.pair:
            tokenizer.chat_template = PLAIN_TEMPLATE
        self.pad = model.config.get_text_config().pad_token_id
        self.batches = self.pad is not None

    def encode(self, messages: Sequence[Message], response: str) -> list[Ids]:
        """See :class:`Rewards`; for a pair of texts the types of the tokens follow."""
        if self.pair:
            found = self.tokenizer(said(messages), response, return_token_type_ids=True)
            return [tuple(found["input_ids"]), tuple(found["token_type_ids"])]
        turns = [*messages, {"role": "assistant", "content": response}]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as error:  # a template can raise what it likes
            raise ModelError(f"judge: the reward model's chat template cannot render a row ({error})") from error
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:1] != [bos] and list(self.tokenizer("")["input_ids"])[:1] == [bos]:
            ids = [bos, *ids]
        return [tuple(ids)]

    def __call__(self, rows: Sequence[list[Ids]]) -> Tensor:
        """See :class:`Rewards`."""
        module = cast(Any, self.module)
        ids_BT, mask_BT = _padded([row[0] for row in rows], self.pad or 0, module.device)
        options = {}
        if self.pair and getattr(module.config, "type_vocab_size", 0) > 1:
            options["token_type_ids"] = _padded([row[1] for row in rows], 0, module.device)[0]
        return cast(Tensor, module(input_ids=ids_BT, attention_mask=mask_BT, **options).logits[:, 0].float())

    def save(self, folder: Path) -> None:
        """See :class:`Rewards`."""
        cast(Any, self.module).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


class Embedding(Rewards):
    """A small head on embeddings of the conversation and of the response, by a frozen encoder.

    An embedding is the mean of the encoder's last hidden states over the tokens, scaled to length 1. The head is a
    network with one hidden layer on e(x), e(y), e(x)·e(y) and |e(x) − e(y)|, side by side. Embeddings are kept once
    they are made, since prompts come again and training reads them many times.
    """

    def __init__(self, encoder: Any, tokenizer: Any, hidden: int, max_tokens: int | None) -> None:
        self.encoder, self.tokenizer, self.hidden = encoder.eval().requires_grad_(False), tokenizer, hidden
        self.limit = _least(context_of(encoder, tokenizer), max_tokens)
        width = 4 * int(encoder.config.get_text_config().hidden_size)
        self.module = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1)).to(encoder.device)
        self._known: dict[Ids, Tensor] = {}

    def encode(self, messages: Sequence[Message], response: str) -> list[Ids]:
        """See :class:`Rewards`."""
        return [tuple(self.tokenizer(text)["input_ids"]) for text in (said(messages), response)]

    def __call__(self, rows: Sequence[list[Ids]]) -> Tensor:
        """See :class:`Rewards`."""
        new = {ids for row in rows for ids in row} - set(self._known)
        for ids in sorted(new, key=len):
            self._known[ids] = self._embed(ids)
        prompt_BH, response_BH = (torch.stack([self._known[row[i]] for row in rows]) for i in range(2))
        parts = [prompt_BH, response_BH, prompt_BH * response_BH, (prompt_BH - response_BH).abs()]
        return cast(Tensor, self.module(torch.cat(parts, dim=-1)).squeeze(-1))

    @torch.no_grad()
    def _embed(self, ids: Ids) -> Tensor:
        """One text alone: what it is embedded with never changes its embedding."""
        hidden_TH = self.encoder(input_ids=torch.tensor([ids], device=self.encoder.device)).last_hidden_state[0]
        return nn.functional.normalize(hidden_TH.float().mean(0), dim=0)

    def save(self, folder: Path) -> None:
        """See :class:`Rewards`: the encoder is copied along, so that the folder is all there is."""
        self.encoder.save_pretrained(folder / ENCODER)
        self.tokenizer.save_pretrained(folder / ENCODER)
        save_file({name: t.cpu().contiguous() for name, t in self.module.state_dict().items()}, folder / HEAD)


def said(messages: Sequence[Message]) -> str:
    """A conversation as one text: a single turn as it is, several with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)


def facts_of(weights: Weights) -> dict[str, Any]:
    """What ``fit`` wrote beside the weights; empty for a model from elsewhere.

    Raises:
        ModelError: it cannot be read.
    """
    if weights.folder is None or not (weights.folder / FACTS).is_file():
        return {}
    try:
        facts = json.loads((weights.folder / FACTS).read_text(encoding="utf-8"))
        if facts["kind"] not in ("model", "embedding") or not float(facts["scale"]) > 0:
            raise ValueError(f"kind {facts['kind']!r}, scale {facts['scale']!r}")
        return {**facts, "center": float(facts["center"]), "scale": float(facts["scale"])}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ModelError(
            f"{weights.shown}: its {FACTS} cannot be used ({error}); expected kind, center and scale as `python -m "
            "dnpo.judges.reward fit` writes them"
        ) from error


def load(weights: Weights, dtype: Dtype, device: str, max_tokens: int | None) -> Rewards:
    """A reward model, in evaluation mode.

    Raises:
        ModelError: it cannot be loaded, or is none: it has several outputs, or an output that was never trained.
    """
    facts = facts_of(weights)
    if facts.get("kind") == "embedding":
        assert weights.folder is not None
        encoder = Weights(str(weights.folder / ENCODER), None, None)
        rewards = embedding(encoder, dtype, device, int(facts["hidden"]), max_tokens)
        try:
            rewards.module.load_state_dict(load_file(weights.folder / HEAD))
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelError(f"{weights.shown}: its {HEAD} cannot be loaded: {error}") from error
        return rewards
    model, info = weights.load(
        AutoModelForSequenceClassification,
        dtype=getattr(torch, dtype),
        use_safetensors=True,
        output_loading_info=True,
    )
    if model.config.num_labels != 1:
        raise ModelError(f"{weights.shown}: has {model.config.num_labels} outputs; expected one, the reward")
    if info["missing_keys"]:
        raise ModelError(
            f"{weights.shown}: no reward model, {', '.join(sorted(info['missing_keys'])[:3])} would be a draw; "
            f"fit one on it: python -m dnpo.judges.reward fit base={weights.folder or weights.name} data.path=… out=…"
        )
    return Classifier(model.to(device).eval(), weights.load(AutoTokenizer), max_tokens)


def embedding(weights: Weights, dtype: Dtype, device: str, hidden: int, max_tokens: int | None) -> Embedding:
    """An encoder with an untrained head."""
    encoder = weights.load(AutoModel, dtype=getattr(torch, dtype), use_safetensors=True).to(device)
    return Embedding(encoder, weights.load(AutoTokenizer), hidden, max_tokens)


def classifier(weights: Weights, device: str, max_tokens: int | None) -> Classifier:
    """A base model with an untrained output, or with its own where it has one; without dropout.

    Raises:
        ModelError: it cannot be loaded, or has no token to pad with.
    """
    tokenizer = weights.load(AutoTokenizer)
    model = weights.load(
        AutoModelForSequenceClassification, num_labels=1, dtype=torch.float32, use_safetensors=True,
        ignore_mismatched_sizes=True,
    ).to(device)  # fmt: skip
    without_dropout(model.config)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    text = model.config.get_text_config()
    if text.pad_token_id is None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise ModelError(f"{weights.shown}: its tokenizer has neither a padding nor an end-of-sequence token")
        text.pad_token_id = model.config.pad_token_id = pad
    return Classifier(model, tokenizer, max_tokens)


def _padded(rows: Sequence[Ids], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, padded on the right, shape B × T each."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
