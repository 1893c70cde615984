"""The byte-pair tokenizer of models trained from scratch: decoding inverts encoding, and every digit is one token."""

import re
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dnpo.data.tinyworld import TinyWorld
from dnpo.policy.tokenizer import SPECIAL, train_tokenizer
from dnpo.records import Prompt

VOCABULARY = 400


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Prompt]]:
    """The default world, by split."""
    return TinyWorld().read()[0]


@pytest.fixture(scope="module")
def tokenizer(rows: dict[str, list[Prompt]]) -> Any:
    """The tokenizer of a default run."""
    return train_tokenizer(rows["train"], VOCABULARY)


def texts(rows: list[Prompt]) -> list[str]:
    """Every text of these rows."""
    return [t for r in rows for t in (r.messages[0]["content"], r.human)]


def rendered(tokenizer: Any, row: Prompt, *, response: bool) -> str:
    """A row in the template, up to the response or with it."""
    messages = [*row.messages, {"role": "assistant", "content": row.human}] if response else row.messages
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not response)
    return text


def encode(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text without the template."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def test_vocabulary_has_the_given_size(tokenizer: Any, rows: dict[str, list[Prompt]]) -> None:
    """The size of the vocabulary is that of the model's embedding: never more, and ids without gaps."""
    assert len(tokenizer) <= VOCABULARY
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert len(train_tokenizer(rows["train"], 200)) <= 200


def test_training_is_repeatable(tokenizer: Any, rows: dict[str, list[Prompt]]) -> None:
    """The stage's key does not contain the tokenizer, so the same rows must give the same ids."""
    assert train_tokenizer(rows["train"], VOCABULARY).get_vocab() == tokenizer.get_vocab()


def test_digits_stand_alone(tokenizer: Any, rows: dict[str, list[Prompt]]) -> None:
    """No token holds two digits, or a digit and a letter: arithmetic is learned digit by digit."""
    for token in tokenizer.get_vocab():
        if re.search(r"\d", token):
            assert re.fullmatch(r"Ġ?\d", token), token
    for text in ("1234567890", "What is 1111 plus 10?", "12 m are 1200 cm.", "a1b22"):
        pieces = [tokenizer.decode([i]) for i in encode(tokenizer, text)]
        assert "".join(pieces) == text
        assert sum(any(c.isdigit() for c in piece) for piece in pieces) == sum(c.isdigit() for c in text)


def test_round_trip(tokenizer: Any, rows: dict[str, list[Prompt]]) -> None:
    """Text → ids → text changes nothing in any split; responses are judged as decoded text."""
    for split in rows.values():
        for text in texts(split):
            ids = encode(tokenizer, text)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_vocabulary_has_all_characters_of_rejected_responses() -> None:
    asked = [Prompt(str(i), [{"role": "user", "content": "Why?"}], "So.", rejected="Because é.") for i in range(4)]
    tokens: Any = train_tokenizer(asked, 300)
    assert tokens.decode(tokens("Because é.")["input_ids"]) == "Because é."
    without: Any = train_tokenizer([Prompt("a", asked[0].messages, "So.")], 300)
    assert without.unk_token_id in without("Because é.")["input_ids"]


@pytest.mark.parametrize("text", ["", " ", "  two  spaces ", "a . b , c", "What is  3 ?", "don 't n't 's"])
def test_decoding_does_not_tidy_up(tokenizer: Any, text: str) -> None:
    """Blanks before a full stop stay: tidying would let a policy be judged on text that it did not write."""
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_special_tokens(tokenizer: Any) -> None:
    """Each special token is one id, plain text gives none, and padding is on the left."""
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<s>", "</s>")
    assert tokenizer.unk_token == "<unk>"
    ids = tokenizer.convert_tokens_to_ids(SPECIAL)
    assert len(set(ids)) == len(SPECIAL)
    assert [encode(tokenizer, token) for token in SPECIAL] == [[i] for i in ids]
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id  # or the end of a response would be masked as padding


def test_encoding_adds_nothing(tokenizer: Any) -> None:
    """Only the template writes the start and the end; a tokenizer that added them would double them."""
    text = "What is 1 plus 2?"
    assert tokenizer.encode(text) == encode(tokenizer, text)
    assert tokenizer.bos_token_id not in tokenizer.encode(text)


def test_template(tokenizer: Any) -> None:
    """The text that a model is trained on, written out."""
    row = Prompt("p", [{"role": "user", "content": "What is 1 plus 2?"}], "It is 3.")
    assert rendered(tokenizer, row, response=False) == "<s><|user|>What is 1 plus 2?<|assistant|>"
    assert rendered(tokenizer, row, response=True) == "<s><|user|>What is 1 plus 2?<|assistant|>It is 3.</s>"
    longer = Prompt(
        "p", [*row.messages, {"role": "assistant", "content": "A."}, {"role": "user", "content": "B?"}], "C."
    )
    assert rendered(tokenizer, longer, response=True).endswith("<|assistant|>A.</s><|user|>B?<|assistant|>C.</s>")


def test_prompt_is_a_prefix_of_the_training_text(tokenizer: Any, rows: dict[str, list[Prompt]]) -> None:
    """The generation prompt equals the training text up to the response, as text and as ids."""
    for row in rows["train"][:600] + rows["test"]:
        before, whole = (rendered(tokenizer, row, response=flag) for flag in (False, True))
        assert whole == before + row.human + "</s>"
        ids, prompt_ids = encode(tokenizer, whole), encode(tokenizer, before)
        assert ids[: len(prompt_ids)] == prompt_ids
        assert ids[len(prompt_ids) :] == [*encode(tokenizer, row.human), tokenizer.eos_token_id]
        assert ids.count(tokenizer.bos_token_id) == 1


def test_rows_are_short(tokenizer: Any, rows: dict[str, list[Prompt]]) -> None:
    """About twenty tokens per row on average, which makes the tiny world cheap, and no row near the limits."""
    lengths = [
        len(encode(tokenizer, row.messages[0]["content"])) + len(encode(tokenizer, row.human)) for row in rows["train"]
    ]
    assert 14 <= mean(lengths) <= 26
    world = TinyWorld()
    for split in rows.values():
        for row in split:
            assert len(encode(tokenizer, rendered(tokenizer, row, response=False))) <= world.max_prompt_tokens
            assert len(encode(tokenizer, row.human)) + 1 <= world.max_response_tokens


def test_saved_tokenizer_is_the_same(tokenizer: Any, rows: dict[str, list[Prompt]], tmp_path: Path) -> None:
    """Stages pass the tokenizer as files: the loaded one encodes, decodes and renders as the saved one."""
    tokenizer.save_pretrained(tmp_path)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.padding_side == "left"
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    for row in rows["test"]:
        whole = rendered(tokenizer, row, response=True)
        assert rendered(loaded, row, response=True) == whole
        ids = encode(tokenizer, whole)
        assert encode(loaded, whole) == ids
        assert loaded.decode(ids) == whole
    for text in ("  two  spaces ", "a . b , c", "x's 1234"):
        assert encode(loaded, text) == encode(tokenizer, text)
        assert loaded.decode(encode(loaded, text)) == text
