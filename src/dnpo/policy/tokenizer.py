"""Encode conversations, and train a tokenizer for models trained from scratch.

Training text and generation text come from the same template (``template.py``).
"""

from collections.abc import Sequence
from typing import Any, cast

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dnpo.errors import ModelError
from dnpo.policy.template import render
from dnpo.policy.tokens import begin, tokenize, tokenize_many
from dnpo.records import HUMAN, Message, Prompt, Response

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(prompts: Sequence[Prompt], vocabulary: int, texts: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """Train a byte-pair encoding on prompts and responses. Words include a leading space; each digit is a token.

    Args:
        texts: further texts to train on, such as a judge's template.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d| ?\p{L}+|\s+| ?[^\s\p{L}\d]+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    text = [t for p in prompts for t in (*(m["content"] for m in p.messages), p.human, p.rejected) if t is not None]
    text += texts
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    wrap: Any = PreTrainedTokenizerFast  # ships without annotations
    wrapped = wrap(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = TEMPLATE
    return cast(PreTrainedTokenizerBase, wrapped)


def encode(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], response: str, stop_ids: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
    """Token ids of the rendered prompt, and of the response including the token that ends it.

    The template's text before a response belongs to the prompt. Prompt and response are tokenised together, so that the
    response's first token can follow the prompt: a SentencePiece tokenizer puts a space before a separate text. The
    response is tokenised separately only if the prompt's tokens are not a prefix of the tokens of the whole. Like a
    sample, the response is cut after its first stop token; if it has none, the tokenizer's end-of-sequence token is
    appended. A prompt begins with the beginning-of-sequence token if the tokenizer puts one before every text. The
    texts of turns never become control tokens (``tokens.py``).

    Args:
        stop_ids: tokens that end a sample, in addition to the tokenizer's end of sequence.

    Raises:
        ModelError: the template cannot render it, loses a part of it, or gives an empty prompt.
    """
    return encode_many(tokenizer, [(messages, response)], stop_ids)[0]


def encode_many(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[tuple[list[Message], str]],
    stop_ids: Sequence[int] = (),
) -> list[tuple[list[int], list[int]]]:
    """Do the work of :func:`encode` for many conversations with their responses, in a few calls of the tokenizer.

    Raises:
        ModelError: as :func:`encode`, for the first conversation that the template cannot render.
    """
    rendered = [render(tokenizer, messages, response) for messages, response in conversations]
    eos = cast(int, tokenizer.eos_token_id)
    prompts = tokenize_many(tokenizer, [each.prompt for each in rendered], stop_ids)
    wholes = tokenize_many(tokenizer, [each.whole for each in rendered], stop_ids)
    found = []
    for each, prompt_ids, whole_ids in zip(rendered, prompts, wholes, strict=True):
        follows = whole_ids[: len(prompt_ids)] == prompt_ids
        ids = whole_ids[len(prompt_ids) :] if follows else tokenize(tokenizer, each.rest, stop_ids)
        end = next((i for i, token in enumerate(ids) if token == eos or token in stop_ids), None)
        ids = [*ids, eos] if end is None else ids[: end + 1]
        prompt_ids = begin(tokenizer, prompt_ids)
        if not prompt_ids:
            raise ModelError("model.chat_template: renders an empty prompt, after which nothing can be sampled")
        found.append((prompt_ids, ids))
    return found


def human_response(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, ids: list[int], limit: int) -> Response:
    """Make the row of a human response.

    A response over the limit is cut as a sample is: in tokens and text, and without an end-of-sequence token.
    """
    if len(ids) <= limit:
        return Response(prompt.id, HUMAN, prompt.human, ids, len(ids), "eos")
    text = str(tokenizer.decode(ids[:limit], skip_special_tokens=True)).strip()
    return Response(prompt.id, HUMAN, text, ids[:limit], limit, "length")
