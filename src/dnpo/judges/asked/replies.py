"""Compute the exact probabilities of a few replies by a causal language model, without sampling.

The replies' token sequences at the beginning of the model's turn form a trie. With t₁…tₗ the tokens of a reply after
the prompt x,

    P(reply) = ∏ᵢ p(tᵢ | x, t₁…tᵢ₋₁) · (1 − Σ p(c | x, t₁…tₗ))

where c are the tokens that would make a longer word or number: after "8" the reply may become 85. The last factor is
computed at inner nodes of the trie only; at a leaf no continuation is among the replies. The model reads each prompt
once, and then the inner nodes with the prompt's keys and values, for a batch of prompts at once.

Shapes: B prompts, T tokens, K inner nodes below the root, L tokens of the longest path to one, V vocabulary, R replies.
"""

import inspect
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dnpo.errors import ModelError
from dnpo.policy.template import PLAIN_TEMPLATE, Text, render, render_turns
from dnpo.policy.tokens import begin, tokenize
from dnpo.records import Message

Path = tuple[int, ...]


class Replies:
    """Computes the probabilities of some replies.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: the tokenizer with its chat template; without one it gets
            :data:`~dnpo.policy.template.PLAIN_TEMPLATE`.
        replies: the replies; none may be empty.
        goes_on: matches the texts of tokens that could continue a reply.
        example: an example of the conversations; all of them must end in the same way.
    """

    def __init__(
        self, model: Any, tokenizer: Any, replies: Sequence[str], goes_on: str, example: Sequence[Message]
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        if tokenizer.chat_template is None:
            tokenizer.chat_template = PLAIN_TEMPLATE
        self.merge_system = self._refuses_system(example)
        self.lead = ""
        self.lead, self.space = self._lead(example, replies[0])
        self.paths = self._paths(example, replies)
        inner = {path[:i] for path in self.paths for i in range(1, len(path))}
        self.inner: list[Path] = [(), *sorted(inner)]
        self.going_on = self._tokens_like(re.compile(goes_on))
        names = inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
        self._positions = "position_ids" in names

    @property
    def longest(self) -> int:
        """The maximum number of tokens that are read after a prompt."""
        return max(map(len, self.inner))

    # --- text

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation, up to the beginning of the model's reply.

        Raises:
            ModelError: the template cannot render it, or loses something of it.
        """
        return self._ids(self._text(messages))

    def _refuses_system(self, example: Sequence[Message]) -> bool:
        """Whether the template raises at a system turn, or drops it silently."""
        if example[0]["role"] != "system":
            return False
        try:
            render_turns(self.tokenizer, example, True)
        except ModelError:
            return True
        return False

    def _turns(self, messages: Sequence[Message]) -> list[Message]:
        if not self.merge_system or messages[0]["role"] != "system":
            return list(messages)
        system, user, *rest = messages
        return [{"role": user["role"], "content": f"{system['content']}\n\n{user['content']}"}, *rest]

    def _text(self, messages: Sequence[Message]) -> Text:
        text = render_turns(self.tokenizer, self._turns(messages), True, "judge's chat template")
        return text.then(self.lead)

    def _lead(self, example: Sequence[Message], reply: str) -> tuple[str, str]:
        """What the template writes before a reply: a text, which joins the prompt, and spaces, which join the reply.

        Llama 2 writes a space there; templates of models that think may write an empty thought.
        """
        self._text(example)  # raises if the template cannot render the question
        try:
            rendered = render(self.tokenizer, self._turns(example), reply)
        except ModelError:  # the template shows past turns differently, and writes nothing before the reply
            return "", ""
        return rendered.lead, rendered.rest.text[: rendered.rest.text.index(reply)]

    def _ids(self, text: Text) -> list[int]:
        return begin(self.tokenizer, tokenize(self.tokenizer, text))

    def _paths(self, example: Sequence[Message], replies: Sequence[str]) -> list[Path]:
        """The tokens of each reply, tokenised together with the text before it.

        A SentencePiece tokenizer would begin a separate text with a space. The replies are tokenised separately only if
        the prompt's last token would merge with the first token of a reply.
        """
        text = self._text(example)
        before = self._ids(text)
        together = [self._ids(text.then(self.space + reply)) for reply in replies]
        if all(ids[: len(before)] == before and len(ids) > len(before) for ids in together):
            return [tuple(ids[len(before) :]) for ids in together]
        apart = [self.tokenizer(self.space + reply, add_special_tokens=False)["input_ids"] for reply in replies]
        return [tuple(ids) for ids in apart]

    def _tokens_like(self, pattern: re.Pattern[str]) -> Tensor:
        """Ids of the tokens whose text, as it is within a word, matches. Byte tokens are read as their characters."""
        names = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        special = set(self.tokenizer.all_special_ids)

        def text(name: Any) -> str:
            if isinstance(name, bytes):
                return name.decode("utf-8", "replace")
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", name or "")
            return chr(int(byte.group(1), 16)) if byte else str(name or "").removeprefix("##")

        ids = [i for i, name in enumerate(names) if i not in special and pattern.match(text(name))]
        return torch.tensor(ids, dtype=torch.long, device=self.model.device)

    # --- numbers

    @torch.no_grad()
    def probabilities(self, prompts: Sequence[list[int]]) -> Tensor:
        """P(reply) for each prompt and reply, float64, shape B × R."""
        tables = self._tables(prompts)
        number = {path: k for k, path in enumerate(self.inner)}
        ends = 1.0 - tables[:, :, self.going_on].sum(-1)
        columns = []
        for path in self.paths:
            p = torch.ones(len(prompts), dtype=torch.float64, device=tables.device)
            for i, token in enumerate(path):
                p = p * tables[:, number[path[:i]], token]
            columns.append(p * ends[:, number[path]].clamp(min=0.0) if path in number else p)
        return torch.stack(columns, dim=1)

    def _tables(self, prompts: Sequence[list[int]]) -> Tensor:
        """Next-token probabilities at the root and at the other inner nodes, shape B × (1 + K) × V."""
        longest = max(map(len, prompts))
        device = self.model.device
        ids_BT = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask_BT = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        position_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        below = self.inner[1:]
        out = self._forward(ids_BT, mask_BT, position_BT, use_cache=bool(below), **self._options)
        root_BV = out.logits[:, -1].double().softmax(-1)
        if not below:
            return cast(Tensor, root_BV.unsqueeze(1))
        deepest = max(map(len, below))
        ids_KL = torch.tensor([[*path, *[0] * (deepest - len(path))] for path in below], device=device)
        mask_KL = torch.tensor([[1] * len(path) + [0] * (deepest - len(path)) for path in below], device=device)
        count, nodes = len(prompts), len(below)
        cache = out.past_key_values
        cache.batch_repeat_interleave(nodes)
        mask = torch.cat([mask_BT.repeat_interleave(nodes, 0), mask_KL.repeat(count, 1)], dim=1)
        position = mask_BT.sum(-1, keepdim=True).repeat_interleave(nodes, 0) + torch.arange(deepest, device=device)
        out = self._forward(ids_KL.repeat(count, 1), mask, position, past_key_values=cache, use_cache=True)
        last = (mask_KL.sum(-1) - 1).repeat(count)
        nodes_BKV = out.logits[torch.arange(count * nodes, device=device), last].unflatten(0, (count, nodes))
        return torch.cat([root_BV.unsqueeze(1), nodes_BKV.double().softmax(-1)], dim=1)

    def _forward(self, ids: Tensor, mask: Tensor, position: Tensor, **options: Any) -> Any:
        positions = {"position_ids": position} if self._positions else {}
        return self.model(input_ids=ids, attention_mask=mask, **positions, **options)
