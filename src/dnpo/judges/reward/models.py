"""Models that compute the reward of a response, an unbounded number: classifiers, and heads on sentence embeddings.

Both compute rewards with gradients from encoded rows, so the same code is used to fit and to judge. Shapes: B rows, T
tokens, H width of an embedding.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from dnpo.errors import ModelError
from dnpo.judges.reward.facts import read_facts
from dnpo.policy.complete import check_finite, explain
from dnpo.policy.encoder import Encoder, Ids
from dnpo.policy.loading import without_dropout
from dnpo.policy.template import PLAIN_TEMPLATE, Text, put_in_force, render_turns
from dnpo.policy.tokens import begin, tokenize, wrap
from dnpo.policy.weights import Weights, context_of
from dnpo.records import Message, Prompt
from dnpo.settings import Dtype

HEAD, ENCODER = "head.safetensors", "encoder"
LOOKED_AT = 64  # rows that are rendered before the model is loaded


class Rewards(ABC):
    """Encodes conversations with a response, and computes their rewards.

    Attributes:
        model: the module that is trained in a fit.
        limit: maximum number of tokens of a row; None if there is no limit.
        batches: whether it can read several rows at once.
    """

    model: nn.Module
    limit: int | None
    batches: bool = True

    @property
    def device(self) -> torch.device:
        """The device that its weights are on."""
        return next(self.model.parameters()).device

    @abstractmethod
    def encode(self, messages: Sequence[Message], response: str) -> list[Ids]:
        """The token sequences of one response; each must be within the limit."""

    @abstractmethod
    def __call__(self, rows: Sequence[list[Ids]]) -> Tensor:
        """Compute the rewards of rows, shape B."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the model so that :func:`load` can read it. The facts are written separately."""

    def too_long(self, row: list[Ids]) -> bool:
        """Whether a row is over the limit. Rows are never cut, since a part of a response is another response."""
        return self.limit is not None and max(map(len, row)) > self.limit


class Classifier(Rewards):
    """A sequence classifier of transformers with one output.

    It reads the conversation with the response as its last turn, by the tokenizer's chat template. Without a template,
    a tokenizer with a separator token (BERT, DeBERTa) gets conversation and response as a pair of texts, and any other
    one :data:`~dnpo.policy.template.PLAIN_TEMPLATE`. Rows are padded on the right, or read one by one if the model's
    configuration names no padding token.
    """

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int | None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.limit = _smallest(context_of(model, tokenizer), max_tokens)
        self.pair = tokenizer.chat_template is None and tokenizer.sep_token is not None
        if tokenizer.chat_template is None and not self.pair:
            tokenizer.chat_template = PLAIN_TEMPLATE
        self.pad = model.config.get_text_config().pad_token_id
        self.batches = self.pad is not None

    def encode(self, messages: Sequence[Message], response: str) -> list[Ids]:
        """The tokens of the conversation with the response; for a pair of texts, also their token types."""
        if self.pair:
            encoding = wrap(self.tokenizer, join_turns(messages), response, return_token_type_ids=True)
            return [tuple(encoding["input_ids"]), tuple(encoding["token_type_ids"])]
        text = _render(self.tokenizer, messages, response)
        return [tuple(begin(self.tokenizer, tokenize(self.tokenizer, text)))]

    def __call__(self, rows: Sequence[list[Ids]]) -> Tensor:
        """Compute the rewards of rows, padded to the longest, shape B."""
        model = cast(Any, self.model)
        ids_BT, mask_BT = _pad([row[0] for row in rows], self.pad or 0, model.device)
        options = {}
        if self.pair and getattr(model.config, "type_vocab_size", 0) > 1:
            options["token_type_ids"] = _pad([row[1] for row in rows], 0, model.device)[0]
        return cast(Tensor, model(input_ids=ids_BT, attention_mask=mask_BT, **options).logits[:, 0].float())

    def save(self, folder: Path) -> None:
        """Write model and tokenizer."""
        cast(Any, self.model).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


class Embedding(Rewards):
    """A small head on embeddings of the conversation and of the response, by a frozen encoder.

    The head is a network with one hidden layer on e(x), e(y), e(x)·e(y) and |e(x) − e(y)|, concatenated. Embeddings are
    cached, since prompts are repeated and training reads them many times.

    Args:
        encoder: embeds the texts, one at a time, so batches never change an embedding.
        hidden: number of hidden units of the head.
        max_tokens: maximum number of tokens of a text; None: the maximum that the encoder can read.
    """

    def __init__(self, encoder: Encoder, hidden: int, max_tokens: int | None) -> None:
        self.encoder = encoder
        self.limit = _smallest(encoder.limit, max_tokens)
        head = nn.Sequential(nn.Linear(4 * encoder.width, hidden), nn.GELU(), nn.Linear(hidden, 1))
        self.model = head.to(encoder.model.device)
        self._known: dict[Ids, Tensor] = {}

    def encode(self, messages: Sequence[Message], response: str) -> list[Ids]:
        """The tokens of the conversation and of the response."""
        return [self.encoder.encode(text) for text in (join_turns(messages), response)]

    def __call__(self, rows: Sequence[list[Ids]]) -> Tensor:
        """Compute the rewards of rows by the head, shape B."""
        self._known |= self.encoder.embed([ids for row in rows for ids in row if ids not in self._known], at_once=1)
        prompt_BH, response_BH = (torch.stack([self._known[row[i]] for row in rows]) for i in range(2))
        parts = [prompt_BH, response_BH, prompt_BH * response_BH, (prompt_BH - response_BH).abs()]
        return cast(Tensor, self.model(torch.cat(parts, dim=-1)).squeeze(-1))

    def save(self, folder: Path) -> None:
        """Write the head and the encoder, so that the folder is complete."""
        self.encoder.save(folder / ENCODER)
        save_file({name: t.cpu().contiguous() for name, t in self.model.state_dict().items()}, folder / HEAD)


def join_turns(messages: Sequence[Message]) -> str:
    """Join a conversation into one text: a single turn unchanged, several turns with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)


def load(
    weights: Weights, dtype: Dtype, device: str, max_tokens: int | None, template_date: str | None = None
) -> Rewards:
    """A reward model, in evaluation mode.

    Raises:
        ModelError: it cannot be loaded, or is not a reward model: it has several outputs, or an output that was never
            trained.
    """
    facts = read_facts(weights)
    if facts.get("kind") == "embedding":
        if template_date is not None:
            raise ModelError(f"judge.template_date={template_date}: {weights.description} has no chat template")
        assert weights.folder is not None
        encoder = Weights(str(weights.folder / ENCODER), None, None)
        rewards = Embedding(Encoder(encoder, dtype, device), int(facts["hidden"]), max_tokens)
        try:
            head = load_file(weights.folder / HEAD)
            rewards.model.load_state_dict(head)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise ModelError(f"{weights.description}: its {HEAD} cannot be loaded: {explain(error)}") from error
        check_finite(head.items(), f"{weights.description}: its {HEAD}")
        return rewards
    model = weights.load_model(AutoModelForSequenceClassification, hint=_advise(weights), dtype=getattr(torch, dtype))
    _check_outputs(weights, model)
    return Classifier(model.to(device).eval(), _load_tokenizer(weights, template_date), max_tokens)


def object_to(weights: Weights) -> str | None:
    """Why the files of a reward model cannot be used; None if no reason is known."""
    try:
        if read_facts(weights).get("kind") == "embedding":
            assert weights.folder is not None
            Weights(str(weights.folder / ENCODER), None, None).outline(AutoModel, ignore_head=True)
            return None
        model = weights.outline(AutoModelForSequenceClassification, hint=_advise(weights))
        if model is not None:
            _check_outputs(weights, model)
    except ModelError as error:
        return str(error)
    return None


def object_to_rows(weights: Weights, template_date: str | None, rows: Sequence[Prompt]) -> str | None:
    """Why the chat template of a reward model cannot render these rows; None if it can. Only a few rows are tried."""
    try:
        if read_facts(weights).get("kind") == "embedding":
            return None
        tokenizer = _load_tokenizer(weights, template_date)
        if tokenizer.chat_template is None:
            return None
        for row in rows[:: max(len(rows) // LOOKED_AT, 1)]:
            _render(tokenizer, row.messages, row.human)
    except ModelError as error:
        return str(error)
    return None


def _render(tokenizer: Any, messages: Sequence[Message], response: str) -> Text:
    turns = [*messages, {"role": "assistant", "content": response}]
    return render_turns(tokenizer, turns, setting="judge's chat template")


def _advise(weights: Weights) -> str:
    return (
        ". Without a trained output it is not a reward model; fit one on it: dnpo judge fit "
        f"base={weights.folder or weights.name} data.path=… out=…"
    )


def _check_outputs(weights: Weights, model: Any) -> None:
    if model.config.num_labels != 1:
        raise ModelError(f"{weights.description}: has {model.config.num_labels} outputs; expected one, the reward")


def _load_tokenizer(weights: Weights, template_date: str | None) -> Any:
    tokenizer = weights.load(AutoTokenizer)
    if template_date is not None:
        put_in_force(tokenizer, date=template_date, setting="judge")
    return tokenizer


def start_classifier(
    weights: Weights, device: str, max_tokens: int | None, template_date: str | None = None
) -> Classifier:
    """Load a base model with its output layer, or with a new one if it has none; without dropout.

    Raises:
        ModelError: it cannot be loaded, or has no token to pad with.
    """
    tokenizer = _load_tokenizer(weights, template_date)
    model = weights.load_model(
        AutoModelForSequenceClassification, ignore_head=True, num_labels=1, dtype=torch.float32
    ).to(device)
    without_dropout(model.config)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    text = model.config.get_text_config()
    if text.pad_token_id is None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise ModelError(f"{weights.description}: its tokenizer has neither a padding nor an end-of-sequence token")
        text.pad_token_id = model.config.pad_token_id = pad
    return Classifier(model, tokenizer, max_tokens)


def _pad(rows: Sequence[Ids], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Pad token ids on the right; return them with the attention mask, shape B × T each."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask


def _smallest(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
