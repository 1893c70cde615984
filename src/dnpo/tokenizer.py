"""Text and tokens: how a conversation is rendered and encoded, and a tokenizer for models trained from scratch.

Training text and generation text come from one template, and both tokenise a response apart from its prompt.
"""

from collections.abc import Sequence
from typing import Any, cast

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dnpo.errors import ModelError
from dnpo.records import Finish, Message, Prompt, Response

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# For tokenizers that bring no chat template. The response begins on a line of its own, so that prompt and response
# tokenise apart as they do together.
PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + '\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)


def train_tokenizer(prompts: Sequence[Prompt], vocabulary: int) -> PreTrainedTokenizerBase:
    """Byte-pair encoding of prompts and human responses; words carry their leading space and digits stand alone."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d| ?\p{L}+|\s+| ?[^\s\p{L}\d]+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    text = [t for p in prompts for t in (*(m["content"] for m in p.messages), p.human)]
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


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], response: str) -> tuple[str, str]:
    """The rendered prompt, as generation sees it, and what training text has after it.

    Raises:
        ModelError: the template renders training text otherwise than generation text.
    """
    template: Any = tokenizer.apply_chat_template
    prompt = cast(str, template(messages, tokenize=False, add_generation_prompt=True))
    whole = cast(str, template([*messages, {"role": "assistant", "content": response}], tokenize=False))
    if not whole.startswith(prompt):
        at = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
        raise ModelError(
            "model: the chat template renders training text otherwise than generation text, so the policy would be "
            f"trained on prompts it never sees. They part at character {at}: generation has {prompt[at:][:40]!r}, "
            f"training has {whole[at:][:40]!r}. Set model.chat_template, or mend the tokenizer's"
        )
    return prompt, whole[len(prompt) :]


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[Message], response: str) -> tuple[list[int], list[int]]:
    """Token ids of the rendered prompt, and of the response up to and with its end-of-sequence token.

    The two are tokenised apart, as generation does: its response begins where the prompt's tokens end. What a template
    puts after the end of the response (a line break, often) is left out: no sampled response has it.
    """
    prompt, rest = render(tokenizer, messages, response)
    tokenize: Any = tokenizer
    prompt_ids = list(tokenize(prompt, add_special_tokens=False)["input_ids"])
    ids = list(tokenize(rest, add_special_tokens=False)["input_ids"])
    eos = cast(int, tokenizer.eos_token_id)
    if eos in ids:
        ids = ids[: len(ids) - ids[::-1].index(eos)]
    else:
        ids.append(eos)
    return prompt_ids, ids


def human_response(prompt: Prompt, ids: list[int], limit: int) -> Response:
    """The human response as a row. One over the limit is cut as a sample is: without an end-of-sequence token."""
    finish: Finish = "eos" if len(ids) <= limit else "length"
    ids = ids[:limit]
    return Response(prompt.id, "human", prompt.human, ids, len(ids), finish)
