"""Sentence encoders: frozen transformers that turn a text into one vector.

Shapes: B texts, T tokens, H width of an embedding.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from dnpo.errors import ModelError
from dnpo.policy.tokens import wrap
from dnpo.policy.weights import Weights, context_of
from dnpo.settings import Dtype

PARTS = {"Transformer", "Pooling", "Normalize"}  # modules of sentence-transformers that Encoder reproduces
SETTINGS = "sentence_bert_config.json"
Ids = tuple[int, ...]


class Encoder:
    """A frozen encoder. The embedding of a text is the mean of its last hidden states over tokens, scaled to length 1.

    Args:
        weights: a folder of transformers, or a name on the hub.
        dtype: type of the weights; embeddings are always float32.
        device: where it runs.

    Attributes:
        limit: maximum number of tokens of a text; None if there is no limit.

    Raises:
        ModelError: it cannot be loaded.
    """

    def __init__(self, weights: Weights, dtype: Dtype = "float32", device: str = "cpu") -> None:
        # only the last hidden states are read, so neither a head nor a pooler is needed
        loaded = weights.load_model(AutoModel, ignore_head=True, dtype=getattr(torch, dtype))
        self.model, self.tokenizer = loaded.to(device).eval().requires_grad_(False), weights.load(AutoTokenizer)
        self.limit = context_of(self.model, self.tokenizer)

    @property
    def width(self) -> int:
        """The width of an embedding, H."""
        return int(self.model.config.get_text_config().hidden_size)

    def encode(self, text: str, longest: int | None = None) -> Ids:
        """The tokens of a text, cut to ``longest`` tokens if given."""
        return tuple(wrap(self.tokenizer, text, truncation=longest is not None, max_length=longest)["input_ids"])

    @torch.no_grad()
    def embed(self, rows: Sequence[Ids], at_once: int) -> dict[Ids, Tensor]:
        """Embed token sequences in batches without padding.

        Only sequences of equal length share a batch. So other texts change an embedding only by rounding, and not at
        all with ``at_once=1``.

        Args:
            rows: token sequences. An empty one has the embedding 0.
            at_once: maximum number of sequences in a batch.

        Returns:
            The embedding of each different sequence, on the encoder's device; shape H.
        """
        by_length: dict[int, list[Ids]] = {}
        for ids in dict.fromkeys(rows):
            by_length.setdefault(len(ids), []).append(ids)
        embeddings: dict[Ids, Tensor] = {}
        for alike in by_length.values():
            for start in range(0, len(alike), at_once):
                some = alike[start : start + at_once]
                embeddings |= zip(some, self._embed(torch.tensor(some, dtype=torch.long)), strict=True)
        return embeddings

    def _embed(self, ids_BT: Tensor) -> Tensor:
        device = self.model.device
        if not ids_BT.shape[1]:
            return torch.zeros(len(ids_BT), self.width, device=device)
        hidden_BTH = self.model(input_ids=ids_BT.to(device)).last_hidden_state
        return nn.functional.normalize(hidden_BTH.float().mean(1), dim=-1)

    def save(self, folder: Path) -> None:
        """Write model and tokenizer."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


class SentenceBert:
    """Embeddings of texts as in sentence-transformers for models such as all-MiniLM-L6-v2.

    The folder can be in the format of sentence-transformers, which gives the maximum length of texts, or of
    transformers.

    Args:
        path: the folder.
        device: where the encoder runs.
        at_once: maximum number of texts in a batch.
        name: the setting that gives the folder; messages begin with it.

    Attributes:
        label: the model, the kind of pooling, and the maximum length of texts.

    Raises:
        ModelError: it cannot be loaded, or its configuration defines another kind of embedding.
    """

    def __init__(self, path: str, device: str = "cpu", at_once: int = 64, name: str = "eval.texts.encoder") -> None:
        weights = Weights(path, None, None, name)
        _check_pooling(weights)
        self.encoder, self.at_once = Encoder(weights, device=device), at_once
        limits = [self.encoder.limit, _read_json(weights, SETTINGS).get("max_seq_length")]
        self.longest = min((limit for limit in limits if limit), default=None)
        self.label = f"{weights.label}|mean|{self.longest} tokens"

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings on the CPU, texts × width."""
        rows = [self.encoder.encode(text, self.longest) for text in texts]
        known = self.encoder.embed(rows, self.at_once)
        return torch.stack([known[ids] for ids in rows]).cpu()


def check_encoder(path: str, name: str = "eval.texts.encoder") -> None:
    """Check a folder for :class:`SentenceBert` by its files, without loading it.

    Args:
        name: the setting that gives the folder; messages begin with it.

    Raises:
        ModelError: the files do not belong to an encoder, or define another kind of embedding.
    """
    weights = Weights(path, None, None, name)
    _check_pooling(weights)
    weights.outline(AutoModel, ignore_head=True)


def _check_pooling(weights: Weights) -> None:
    pooling = _read_json(weights, "1_Pooling/config.json")
    mean = pooling.get("pooling_mode_mean_tokens", pooling.get("pooling_mode", "mean") == "mean")
    kinds = {str(module["type"]).rsplit(".", 1)[-1] for module in _read_json(weights, "modules.json").values()}
    if not mean or kinds - PARTS:
        raise ModelError(
            f"{weights.description}: its embedding is not the mean over tokens; expected an encoder with mean pooling, "
            "such as sentence-transformers/all-MiniLM-L6-v2"
        )


def _read_json(weights: Weights, file: str) -> dict[str, Any]:
    """Read a JSON file of sentence-transformers from the weights' folder; empty if there is none."""
    if weights.folder is None or not (weights.folder / file).is_file():
        return {}
    try:
        content = json.loads((weights.folder / file).read_text(encoding="utf-8"))
        return dict(enumerate(content) if isinstance(content, list) else content)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{weights.description}: its {file} cannot be read ({error})") from error
