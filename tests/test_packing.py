"""Sequences in one row have the same results as alone: attention by its definition, and many model families."""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from torch import Generator, Tensor, nn

from dnpo.errors import ModelError
from dnpo.policy import packing
from dnpo.policy.loading import _check_logits, without_dropout
from dnpo.policy.logprobs import token_logps
from dnpo.policy.model import Policy
from dnpo.policy.packing import Packed, Spread, attention, pack, pack_shared

# --- layout -----------------------------------------------------------------------------------------------------------


def test_a_row_by_hand() -> None:
    """Every index of a batch small enough to write out.

    Row:        5 6 7 8 2 | 9 | 3 4 1 2
    Position:   0 1 2 3 4 | 0 | 0 1 2 3
    Completion:     7 8 2 |   |       2     predicted at 1 2 3 and 8
    """
    packed = pack([[5, 6], [9], [3, 4, 1]], [[7, 8, 2], [], [2]])
    assert packed.ids_T.tolist() == [5, 6, 7, 8, 2, 9, 3, 4, 1, 2]
    assert packed.position_T.tolist() == [0, 1, 2, 3, 4, 0, 0, 1, 2, 3]
    assert packed.tokens_M.tolist() == packed.place_T.tolist() == list(range(10))
    assert packed.again_X.tolist() == packed.second_X.tolist() == []
    assert packed.predict_N.tolist() == [1, 2, 3, 8]
    assert packed.target_N.tolist() == [7, 8, 2, 2]
    assert packed.completions == (3, 0, 1)
    assert packed.completions_S.tolist() == [3, 0, 1]
    assert (packed.lengths, packed.count) == ((5, 1, 4), 3)
    assert packed.cumulative.tolist() == [0, 5, 6, 10]
    assert packed.cumulative.dtype == torch.int32


def test_a_row_with_a_shared_prompt_by_hand() -> None:
    """Two pairs: the prompt is laid out before the first response, and the second response follows elsewhere.

    Row:        5 6 7 8 2 | 3 4 | 9 2 | 1 1
    Position:   0 1 2 3 4 | 0 1 | 2 3 | 1 2
    Sequences:  5 6 7 8 2 | 3 4 | 5 6 9 2 | 3 1 1
    """
    packed = pack([[5, 6], [3], [5, 6], [3]], [[7, 8, 2], [4], [9, 2], [1, 1]], share_prompt=True)
    assert packed.ids_T.tolist() == [5, 6, 7, 8, 2, 3, 4, 9, 2, 1, 1]
    assert packed.position_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 1, 2]
    assert packed.tokens_M.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 7, 8, 5, 9, 10]
    assert packed.place_T.tolist() == [0, 1, 2, 3, 4, 5, 6, 9, 10, 12, 13]
    assert packed.again_X.tolist() == [0, 1, 5]
    assert packed.second_X.tolist() == [7, 8, 11]
    assert packed.predict_N.tolist() == [1, 2, 3, 5, 1, 7, 5, 9]
    assert packed.target_N.tolist() == [7, 8, 2, 4, 9, 2, 1, 1]
    assert packed.lengths == (5, 2, 4, 3)
    assert packed.completions == (3, 1, 2, 2)
    assert packed.cumulative.tolist() == [0, 5, 7, 11, 14]


def test_a_row_with_a_prompt_that_three_share_by_hand() -> None:
    """Three samples of one prompt, and one of another.

    Row:        5 6 7 | 8 2 | 9 | 3 4
    Position:   0 1 2 | 2 3 | 2 | 0 1
    Sequences:  5 6 7 | 5 6 8 2 | 5 6 9 | 3 4
    """
    packed = pack_shared([[5, 6], [5, 6], [5, 6], [3]], [[7], [8, 2], [9], [4]], [0, 0, 0, 3])
    assert packed.ids_T.tolist() == [5, 6, 7, 8, 2, 9, 3, 4]
    assert packed.position_T.tolist() == [0, 1, 2, 2, 3, 2, 0, 1]
    assert packed.tokens_M.tolist() == [0, 1, 2, 0, 1, 3, 4, 0, 1, 5, 6, 7]
    assert packed.place_T.tolist() == [0, 1, 2, 5, 6, 9, 10, 11]
    assert packed.again_X.tolist() == [0, 1, 0, 1]
    assert packed.second_X.tolist() == [3, 4, 7, 8]
    assert packed.predict_N.tolist() == [1, 1, 3, 1, 6]
    assert packed.target_N.tolist() == [7, 8, 2, 9, 4]


@pytest.mark.parametrize("first", [[1, 1, 2, 3], [0, 0, 1, 3], [0, 0, 0, 0]])
def test_a_prompt_is_shared_with_an_earlier_sequence_that_has_it(first: list[int]) -> None:
    with pytest.raises(ValueError, match="first"):
        pack_shared([[5, 6], [5, 6], [5, 6], [3]], [[7], [8], [9], [4]], first)


def drawn(seed: int, pairs: int, most: int = 30) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, the second half like the first, and completions, some of them empty."""
    chance = random.Random(seed)

    def ids(least: int) -> list[int]:
        return [chance.randrange(1, 60) for _ in range(chance.randint(least, most))]

    return [ids(1) for _ in range(pairs)] * 2, [ids(0) for _ in range(2 * pairs)]


@pytest.mark.parametrize("share", [1, 2, 4])
@pytest.mark.parametrize("seed", range(6))
def test_every_token_is_at_its_declared_place(seed: int, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Properties of every layout, and of the padded batches that attention makes from it."""
    monkeypatch.setattr(packing, "WASTE", [0, 100, 10_000][seed % 3])
    prompts, completions = drawn(seed, 4)
    if share == 4:
        prompts = [*prompts[:2], *prompts[:2], *prompts[:2], *prompts[:2]]
        packed = pack_shared(prompts, completions, [0, 1] * 4)
    else:
        packed = pack(prompts, completions, share_prompt=share == 2)
    rows = [p + c for p, c in zip(prompts, completions, strict=True)]
    flat = [token for row in rows for token in row]
    assert packed.ids_T[packed.tokens_M].tolist() == flat
    assert packed.position_T[packed.tokens_M].tolist() == [t for row in rows for t in range(len(row))]
    assert len(packed.ids_T) == len(flat) - sum(map(len, prompts)) * (share - 1) // share
    # Every token of the row has a first place; the other places are copies of tokens.
    assert packed.tokens_M[packed.place_T].tolist() == list(range(len(packed.ids_T)))
    assert packed.tokens_M[packed.second_X].tolist() == packed.again_X.tolist()
    assert sorted(packed.place_T.tolist() + packed.second_X.tolist()) == list(range(len(flat)))
    assert (packed.place_T[packed.again_X] < packed.second_X).all()
    # Each completion token is predicted by the token before it in its own sequence.
    before = [row[len(p) + t - 1] for row, p, c in zip(rows, prompts, completions, strict=True) for t in range(len(c))]
    assert packed.ids_T[packed.predict_N].tolist() == before
    assert packed.target_N.tolist() == [token for c in completions for token in c]
    # Batches: every sequence once, in rows as long as the longest, with little padding.
    found = [place for batch in packed.batches for place in batch.sequences]
    starts = packed.cumulative.tolist()[:-1]
    assert sorted(found) == sorted(zip(starts, packed.lengths, strict=True))
    at = 0
    for batch in packed.batches:
        assert batch.longest == batch.sequences[0][1] == max(length for _, length in batch.sequences)
        assert sum(batch.longest**2 - length**2 for _, length in batch.sequences) <= packing.WASTE
        for start, length in batch.sequences:
            own = packed.spread.source[at : at + length]
            assert torch.equal(own, packed.tokens_M[start : start + length])
            at += batch.longest
    assert at == len(packed.spread.source)
    # The way back: to the first place of each token, and to its second place if it has one.
    assert torch.equal(packed.spread.source[packed.spread.place_T], torch.arange(len(packed.ids_T)))
    assert torch.equal(packed.spread.source[packed.spread.second_X], packed.again_X)
    assert not set(packed.spread.place_T.tolist()) & set(packed.spread.second_X.tolist())


def test_a_large_row_is_laid_out_the_same_by_several_threads() -> None:
    """Shared prompts of 64 k tokens: the value of a place that is written twice would be random."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(8):
            packed = pack([[1] * 900] * 64, [[2] * 124] * 64, share_prompt=True)
            assert torch.equal(packed.tokens_M[packed.place_T], torch.arange(len(packed.ids_T)))
            assert bool((packed.place_T[packed.again_X] < packed.second_X).all())
    finally:
        torch.set_num_threads(threads)


def test_sequences_of_similar_length_share_a_batch() -> None:
    """A little padding is cheaper than another batch; much padding is not."""
    together = pack([[1]] * 5, [[2] * n for n in (30, 40, 35, 40, 38)])
    assert [len(b.sequences) for b in together.batches] == [5]
    apart = pack([[1]] * 5, [[2] * n for n in (2, 400, 3, 395, 4)])
    assert [[length for _, length in b.sequences] for b in apart.batches] == [[401, 396], [5, 4, 3]]


def test_unequal_numbers_of_prompts_and_completions_fail() -> None:
    """A silent zip would score responses against other prompts."""
    with pytest.raises(ValueError, match="zip"):
        pack([[1], [1]], [[2]])


def test_moving_takes_every_tensor_along() -> None:
    """To the meta device, which always exists; derived values are computed again there."""
    packed = pack([[5, 6], [3], [5, 6], [3]], [[7, 8, 2], [4], [9, 2], []], share_prompt=True)
    assert packed.spread.source.device.type == "cpu"
    moved = packed.to(torch.device("meta"))
    tensors = [value for value in vars(moved).values() if isinstance(value, Tensor)]
    assert len(tensors) == 9
    assert {t.device.type for t in [*tensors, moved.cumulative]} == {"meta"}
    assert (moved.lengths, moved.completions, moved.count) == (packed.lengths, packed.completions, packed.count)
    same = packed.to(torch.device("cpu"))
    for name, value in vars(packed).items():
        if isinstance(value, Tensor):
            assert torch.equal(getattr(same, name), value)


# --- attention against its definition ---------------------------------------------------------------------------------


def defined(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Packed,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Sequence by sequence and head by head, each query's keys picked out by hand; 1 × T × h × d."""
    groups = query.shape[1] // key.shape[1]
    out = [[torch.zeros(0)] * query.shape[1] for _ in packed.ids_T]
    starts = packed.cumulative.tolist()
    for start, end in pairwise(starts):
        places = packed.tokens_M[start:end]
        for head in range(query.shape[1]):
            q, k, v = query[0, head, places], key[0, head // groups, places], value[0, head // groups, places]
            for t, place in enumerate(places.tolist()):
                first = 0 if sliding_window is None else max(0, t - sliding_window + 1)
                score = k[first : t + 1] @ q[t] * (scaling if scaling is not None else q.shape[-1] ** -0.5)
                if softcap is not None:
                    score = softcap * torch.tanh(score / softcap)
                out[place][head] = score.softmax(-1) @ v[first : t + 1]
    return torch.stack([torch.stack(heads) for heads in out]).unsqueeze(0)


def tensors(tokens: int, heads: int, key_heads: int, sizes: tuple[int, int] = (4, 4)) -> list[Tensor]:
    """Queries, keys and values in float64, and a gradient for the result."""
    generator = Generator().manual_seed(tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    of_keys, of_values = sizes
    return [
        draw(1, heads, tokens, of_keys).requires_grad_(),
        draw(1, key_heads, tokens, of_keys).requires_grad_(),
        draw(1, key_heads, tokens, of_values).requires_grad_(),
        draw(1, tokens, heads, of_values),
    ]


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaling": {"scaling": 0.3},
    "window": {"sliding_window": 3},
    "window of one": {"sliding_window": 1},
    "wide window": {"sliding_window": 11},
    "cap": {"softcap": 1.5},
    "cap, window, scaling": {"softcap": 1.5, "sliding_window": 4, "scaling": 2.0},
}
PROMPTS = [[1, 5, 6, 7], [1, 9, 8], [1, 5, 6, 7], [1, 9, 8]]
COMPLETIONS = [[11, 12, 13, 14, 15, 16, 2], [20, 2], [], [21, 22, 23, 24, 25]]  # the longest is of 11 tokens


def varlen_by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """``varlen_attn`` as it is documented, for where there is no GPU."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa or query.shape[1] == key.shape[1]
    starts, ends = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert starts == ends
    assert max_q == max_k == max(b - a for a, b in pairwise(starts))
    left, right = window_size
    out = []
    for start, end in pairwise(starts):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        back = torch.arange(end - start).unsqueeze(1) - torch.arange(end - start)
        seen = (back >= -right) & ((back <= left) | (left < 0))
        score = (q @ k.transpose(1, 2)) * (scale if scale is not None else q.shape[-1] ** -0.5)
        out.append((score.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_and_its_gradients_against_the_definition(
    kind: str, heads: tuple[int, int], share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, in one padded batch and in several, with both kinds of copies of shared tokens."""
    for waste in (10_000, 0):
        monkeypatch.setattr(packing, "WASTE", waste)
        packed = pack(PROMPTS, COMPLETIONS, share_prompt=share)
        assert len(packed.batches) == (1 if waste else 4)
        *parts, upstream = tensors(len(packed.ids_T), *heads)
        found, weights = attention(nn.Module(), *parts, None, packing=packed, **KINDS[kind])
        expected = defined(*parts, packed, **KINDS[kind])
        assert weights is None
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        ours = torch.autograd.grad(found, parts, upstream)
        for one, other in zip(ours, torch.autograd.grad(expected, parts, upstream), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "cap" not in kind])
def test_attention_of_variable_length_gets_the_right_arguments(
    kind: str, share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code path of a GPU, with its kernel replaced by the kernel's documented definition."""
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", varlen_by_definition)
    packed = pack(PROMPTS, COMPLETIONS, share_prompt=share)
    *parts, upstream = tensors(len(packed.ids_T), 4, 2)
    flat = (x.squeeze(0).transpose(0, 1).flatten(1) for x in parts)
    options = KINDS[kind]
    found = packing._variable_length(*flat, 4, 2, packed, options.get("scaling"), options.get("sliding_window"))
    found = found.view(1, len(packed.ids_T), 4, -1)
    expected = defined(*parts, packed, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    ours = torch.autograd.grad(found, parts, upstream)
    for one, other in zip(ours, torch.autograd.grad(expected, parts, upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


class Module(nn.Module):
    """The tokens that transformers' own attention attends to."""

    is_causal = True
    num_key_value_groups = 2


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_in_generation(softcap: float | None) -> None:
    """Without packing: a prompt without a mask, then one token; and with masks, where padding sees nothing at all."""
    packed = pack([[1, 2, 3]], [[4, 5, 6]])
    query, key, value, _ = (x.detach() for x in tensors(6, 4, 2))
    expected = defined(query, key, value, packed, softcap=softcap, scaling=0.3)

    def made(first: int, mask: Tensor | None) -> Tensor:
        found, _ = attention(Module(), query[:, :, first:], key, value, mask, softcap=softcap, scaling=0.3)
        return found

    torch.testing.assert_close(made(0, None), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(made(5, None), expected[:, 5:], rtol=0, atol=1e-12)
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(made(0, seen[None, None]), expected, rtol=0, atol=1e-12)
    added = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    torch.testing.assert_close(made(0, added[None, None]), expected, rtol=0, atol=1e-12)
    # Two tokens of padding on the left.
    packed = pack([[3]], [[4, 5, 6]])
    shorter = defined(*(x[:, :, 2:] for x in (query, key, value)), packed, softcap=softcap, scaling=0.3)
    found = made(0, (seen & (torch.arange(6) >= 2))[None, None])
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, 2:], shorter, rtol=0, atol=1e-12)


def test_values_may_be_of_another_size_than_keys() -> None:
    packed = pack(PROMPTS, COMPLETIONS)
    *parts, _ = tensors(len(packed.ids_T), 4, 4, (6, 3))
    found, _ = attention(nn.Module(), *parts, None, packing=packed)
    torch.testing.assert_close(found, defined(*parts, packed), rtol=0, atol=1e-12)


def test_dropout_is_refused_if_attention_would_ignore_it() -> None:
    *parts, _ = tensors(len(pack(PROMPTS, COMPLETIONS).ids_T), 4, 4)
    with pytest.raises(ValueError, match="dropout"):
        attention(nn.Module(), *parts, None, packing=pack(PROMPTS, COMPLETIONS), dropout=0.1)


@pytest.mark.parametrize("share", [False, True])
def test_spread_and_gather_are_inverse(share: bool) -> None:
    """Both in float64 against plain indexing: the values, the gradients, and each as the other's inverse."""
    packed = pack(PROMPTS, COMPLETIONS, share_prompt=share)
    generator = Generator().manual_seed(0)
    value = torch.randn(len(packed.ids_T), 3, generator=generator, dtype=torch.float64, requires_grad=True)
    row = Spread(packed.tokens_M, packed.place_T, packed.again_X, packed.second_X)
    spread = packing._spread(value, row)
    assert torch.equal(spread, value[packed.tokens_M])
    assert torch.equal(packing._gather(spread, packed.place_T), value)
    weight = torch.randn(spread.shape, generator=generator, dtype=torch.float64)
    ours, naive = (torch.autograd.grad(x, value, weight)[0] for x in (spread, value[packed.tokens_M]))
    torch.testing.assert_close(ours, naive, rtol=0, atol=1e-12)
    places = spread.detach().requires_grad_()
    weight = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    gathered = packing._gather(places, packed.place_T), places[packed.place_T]
    ours, naive = (torch.autograd.grad(x, places, weight)[0] for x in gathered)
    assert torch.equal(ours, naive)


# --- models of many families ------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT: dict[str, Any] = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 4}


def of(name: str, **more: Any) -> Callable[[], Any]:
    """A configuration, made at its first use."""
    return lambda: getattr(hf, f"{name}Config")(**SIZES | more)


FAMILIES: dict[str, Callable[[], Any]] = {
    "Llama": of("Llama"),
    "Llama, tied": of("Llama", tie_word_embeddings=True),
    "Llama, biases": of("Llama", attention_bias=True, mlp_bias=True),
    "Mistral": of("Mistral", sliding_window=5),
    "Qwen2": of("Qwen2", tie_word_embeddings=True),
    "Qwen2, windows": of("Qwen2", max_window_layers=1, **WINDOW),
    "Qwen3": of("Qwen3", head_dim=8),
    "Gemma": of("Gemma", head_dim=8),
    "Gemma2": of(
        "Gemma2",
        head_dim=8,
        sliding_window=4,
        query_pre_attn_scalar=8,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=2.0,
    ),
    "Gemma3": of("Gemma3Text", head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    "Phi": of("Phi"),
    "Phi3": of("Phi3", sliding_window=4),
    "GPT2": lambda: hf.GPT2Config(**GPT),
    "GPTNeoX": lambda: hf.GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "OPT": of("OPT", ffn_dim=48, word_embed_proj_dim=16),
    "Olmo2": of("Olmo2"),
    "Granite": of("Granite", logits_scaling=4.0, embedding_multiplier=2.0, residual_multiplier=0.5),
    "Cohere": of("Cohere", logit_scale=0.25),
    "Cohere2": of("Cohere2", sliding_window=4),
    "SmolLM3": of("SmolLM3"),
    "Starcoder2": of("Starcoder2"),
    "Mixtral": of("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "Qwen3Moe": of("Qwen3Moe", head_dim=8, **EXPERTS),
    "Exaone4": of("Exaone4"),
}


def untrained(config: Any) -> Any:
    """A random model, the same for the same configuration, with its own attention."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return hf.AutoModelForCausalLM.from_config(without_dropout(config)).eval()


def own(model: Any, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> Tensor:
    """log p of each completion by transformers' own forward on this sequence alone."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logp = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        found.append(sum(logp[len(prompt) - 1 + t, token] for t, token in enumerate(completion)) + logp.new_zeros(()))
    return torch.stack(found)


def own_padded(model: Any, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> Tensor:
    """The hidden states that predict completion tokens, of rows padded on the right, by the model's own attention."""
    rows = [p + c for p, c in zip(prompts, completions, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    states = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    return torch.cat([s[len(p) - 1 : len(row) - 1] for s, p, row in zip(states, prompts, rows, strict=True)])


def mean_gradients(model: Any, logp_S: Tensor) -> list[Tensor]:
    """Gradients of the mean in every weight; 0 if the mean does not depend on it."""
    weights = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(logp_S.mean(), weights, allow_unused=True, materialize_grads=True))


class Own(NamedTuple):
    """The results of a model outside a policy, and the model as a policy."""

    logp_S: Tensor
    grads: list[Tensor]
    hidden_NH: Tensor
    policy: Policy


@torch.no_grad()
def checked(policy: Policy) -> None:
    """The check that every model passes when it is loaded."""
    _check_logits(policy, list(range(1, 64)))


def both(family: str) -> Own:
    """A model that is evaluated alone first, and then as a policy."""
    model = untrained(FAMILIES[family]())
    logp_S = own(model, PROMPTS, COMPLETIONS)
    hidden_NH = own_padded(model, PROMPTS, COMPLETIONS).detach()
    found = Own(logp_S.detach(), mean_gradients(model, logp_S), hidden_NH, Policy(model, None))  # type: ignore[arg-type]
    assert model.config._attn_implementation == packing.ATTENTION
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded_and_single_sequences(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 to 1e-5: hidden states, log-probabilities and the gradients of all weights; prompts shared or not."""
    theirs = both(family)
    checked(theirs.policy)
    for share in (False, True):
        for waste in (2**14, 0) if family in ("Llama", "Gemma2") else (2**14,):
            monkeypatch.setattr(packing, "WASTE", waste)
            packed = pack(PROMPTS, COMPLETIONS, share_prompt=share)
            hidden_NH = theirs.policy.hidden(packed)
            torch.testing.assert_close(hidden_NH, theirs.hidden_NH, rtol=0, atol=1e-5)
            logp_S = theirs.policy.logps(packed)
            torch.testing.assert_close(logp_S, theirs.logp_S, rtol=0, atol=1e-5)
            found = mean_gradients(theirs.policy.model, logp_S)
            for one, other in zip(found, theirs.grads, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("family", ["GPT2", "OPT"])
def test_packed_equals_single_sequences_in_float64(family: str) -> None:
    """Models that compute everything in float64: values and gradients to 1e-12, prompts shared or not."""
    model = untrained(FAMILIES[family]()).double()
    theirs = own(model, PROMPTS, COMPLETIONS)
    grads, policy = mean_gradients(model, theirs), Policy(model, None)  # type: ignore[arg-type]
    for share in (False, True):
        logp_S = policy.logps(pack(PROMPTS, COMPLETIONS, share_prompt=share))
        assert logp_S.dtype == torch.float64
        torch.testing.assert_close(logp_S, theirs, rtol=0, atol=1e-12)
        for one, other in zip(mean_gradients(model, logp_S), grads, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


REFUSED: dict[str, Callable[[], Any]] = {
    "GPTJForCausalLM": lambda: hf.GPTJConfig(**GPT, rotary_dim=4),
    "FalconForCausalLM": of("Falcon", alibi=False),
    "BloomForCausalLM": lambda: hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "MptForCausalLM": lambda: hf.MptConfig(vocab_size=64, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    "StableLmForCausalLM": of("StableLm"),
    "NemotronForCausalLM": of("Nemotron"),
    "GptOssForCausalLM": of("GptOss", head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    "MambaForCausalLM": lambda: hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_packed_are_refused_by_name(name: str) -> None:
    """Each for a different reason: a fixed attention function, ALiBi positions, attention sinks, recurrence."""
    model = untrained(REFUSED[name]())
    policy = Policy(model, None)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=f"model: {name}"):
        checked(policy)


SUSPECT: dict[str, Callable[[], Any]] = {
    # Windows that are in the mask alone, so the attention function does not get them.
    "Phimoe": of("Phimoe", sliding_window=4, num_local_experts=4, num_experts_per_tok=2),
    "Doge": of("Doge", sliding_window=4),
    "Qwen2Moe": of("Qwen2Moe", max_window_layers=2, shared_expert_intermediate_size=16, **WINDOW, **EXPERTS),
    # Frequencies that depend on the longest sequence of a batch.
    "Llama, dynamic": of(
        "Llama",
        max_position_embeddings=8,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    ),
    "Phi3, longrope": of(
        "Phi3",
        original_max_position_embeddings=8,
        rope_parameters={
            "rope_type": "longrope",
            "long_factor": [4.0] * 4,
            "short_factor": [1.0] * 4,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 8,
        },
    ),
}


@pytest.mark.parametrize("name", SUSPECT)
def test_no_model_is_silently_wrong(name: str) -> None:
    """Some models differ only on sequences longer than four tokens: these are refused, or right."""
    model = untrained(SUSPECT[name]())
    with torch.no_grad():
        theirs = own(model, PROMPTS, COMPLETIONS)
    policy = Policy(model, None)  # type: ignore[arg-type]
    try:
        checked(policy)
        found = policy.logps(pack(PROMPTS, COMPLETIONS)).detach()
    except ModelError:
        return
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-5)


# --- batches of every kind


@pytest.fixture(scope="module")
def llama() -> Policy:
    """A policy that no test changes."""
    model = untrained(hf.LlamaConfig(**SIZES | {"max_position_embeddings": 512}))
    return Policy(model, None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plain() -> Any:
    """The same model, with its own attention."""
    return untrained(hf.LlamaConfig(**SIZES | {"max_position_embeddings": 512}))


BATCHES: dict[str, tuple[list[list[int]], list[list[int]]]] = {
    "of very different length": ([[1, 3], [1] * 150, [4], [1] * 9], [[5], [6] * 150, [7] * 299, [8] * 3]),
    "a single one": ([[1, 3, 5]], [[7, 9, 11]]),
    "a single token each": ([[1], [2], [3]], [[4], [5], [6]]),
    "with an empty completion": ([[1, 3], [1, 4]], [[], [5, 6]]),
    "with empty completions alone": ([[1, 3], [1, 4]], [[], []]),
    "the same twice": ([[1, 3], [1, 3]], [[5, 6], [5, 6]]),
}


@pytest.mark.parametrize("kind", BATCHES)
@torch.no_grad()
def test_sequences(kind: str, llama: Policy, plain: Any) -> None:
    prompts, completions = BATCHES[kind]
    packed = pack(prompts, completions)
    if kind == "of very different length":
        assert len(packed.batches) > 1
    torch.testing.assert_close(llama.logps(packed), own(plain, prompts, completions), rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize(
    "completions", [[[5, 6, 7], [8]], [[], [8, 9]], [[8, 9], []], [[], []]], ids=["both", "first", "second", "none"]
)
def test_a_prompt_computed_once_counts_twice(completions: list[list[int]], llama: Policy, plain: Any) -> None:
    """Also a pair whose responses are both empty, and a prompt of one token."""
    for prompt in ([1, 3, 4], [1]):
        packed = pack([prompt] * 2, completions, share_prompt=True)
        assert len(packed.ids_T) == len(prompt) + sum(map(len, completions))
        found, expected = llama.logps(packed), own(plain, [prompt] * 2, completions)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        theirs = (
            mean_gradients(plain, expected) if any(completions) else [torch.zeros(())] * len(list(plain.parameters()))
        )
        ours = mean_gradients(llama.model, found)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other.expand_as(one), rtol=0, atol=1e-5)


def test_the_same_batch_gives_the_same_bits(llama: Policy) -> None:
    """Forward and backward, repeatedly, with shared prompts, whose gradients are added."""
    prompts, completions = drawn(3, 6, most=60)
    packed = pack(prompts, completions, share_prompt=True)
    first = llama.logps(packed)
    expected = mean_gradients(llama.model, first)
    for again in (packed, packed, pack(prompts, completions, share_prompt=True), packed.to(torch.device("cpu"))):
        logp_S = llama.logps(again)
        assert torch.equal(logp_S, first)
        assert all(map(torch.equal, mean_gradients(llama.model, logp_S), expected))


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPT2", "Mixtral"])
def test_activation_checkpointing_gives_the_same_gradients(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training mode, as in a real training; both layers really run again."""
    model = untrained(FAMILIES[family]())
    policy = Policy(model, None)  # type: ignore[arg-type]
    model.train()
    runs: list[int] = []
    real = packing._in_batches
    monkeypatch.setattr(packing, "_in_batches", lambda *a: runs.append(1) or real(*a))
    packed = pack(PROMPTS, COMPLETIONS, share_prompt=True)
    expected = mean_gradients(model, policy.logps(packed))
    assert len(runs) == 2
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = mean_gradients(model, policy.logps(packed))
    assert len(runs) == 6
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    model.gradient_checkpointing_disable()
    policy.logps(packed)
    assert len(runs) == 8


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_autocast_stays_near_float32(family: str) -> None:
    """As in training: rotary positions make queries and keys float32, while values are bf16."""
    policy = Policy(untrained(FAMILIES[family]()), None)  # type: ignore[arg-type]
    packed = pack(PROMPTS, COMPLETIONS, share_prompt=True)
    expected = policy.logps(packed)
    with torch.autocast("cpu", torch.bfloat16):
        found = policy.logps(packed)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.5)
    for one, other in zip(mean_gradients(policy.model, found), mean_gradients(policy.model, expected), strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm()) <= 0.1 * float(other.norm()) + 0.02


def test_attention_under_autocast_is_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """With float32 queries, a GPU would not use its kernel for sequences of variable length."""
    types: list[torch.dtype] = []
    real = packing._in_batches
    monkeypatch.setattr(packing, "_in_batches", lambda *a: types.extend(x.dtype for x in a[:3]) or real(*a))
    policy = Policy(untrained(FAMILIES["Llama"]()), None)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        policy.logps(pack(PROMPTS, COMPLETIONS))
    assert set(types) == {torch.bfloat16}


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_a_model_in_half_precision(family: str) -> None:
    """All in bf16, weights too: log-probabilities in float32, near those of the float32 model."""
    model = untrained(FAMILIES[family]())
    with torch.no_grad():
        expected = own(model, PROMPTS, COMPLETIONS)
    policy = Policy(model.bfloat16(), None)  # type: ignore[arg-type]
    checked(policy)
    found = policy.logps(pack(PROMPTS, COMPLETIONS, share_prompt=True)).detach()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.5)


# --- generation under the same attention


@pytest.mark.parametrize(
    "family", ["Llama", "Mistral", "Qwen2, windows", "Gemma2", "Gemma3", "Phi3", "GPT2", "OPT", "Cohere2", "Mixtral"]
)
@torch.no_grad()
def test_generation_from_padded_prompts_equals_generation_from_each_alone(family: str) -> None:
    """Greedy, with prompts padded on the left, beyond the windows; single prompts use the model's own attention."""
    prompts = [[1, 5, 6, 7, 9, 11, 30], [1, 9, 8], [4], [1, 9, 8, 33, 2, 17]]
    length, model = 12, untrained(FAMILIES[family]())
    options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0}
    expected = [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]
    assert len({token for row in expected for token in row}) > 3
    policy = Policy(model, None)  # type: ignore[arg-type]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    found = policy.causal_lm.generate(ids, attention_mask=mask, **options)[:, width:].tolist()
    assert found == expected
    # And without padding, where no mask is made at all.
    whole = policy.causal_lm.generate(torch.tensor([prompts[0]]), **options)[0, width:].tolist()
    assert whole == expected[0]


# --- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2, windows", "Gemma2", "GPT2"])
def test_attention_of_variable_length_on_a_gpu(family: str, share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bf16 model by variable-length attention against the same model by padded batches, gradients included."""
    device = torch.device("cuda")
    config = FAMILIES[family]()
    model = untrained(config).bfloat16().to(device)
    policy = Policy(model, None)  # type: ignore[arg-type]
    packed = pack(PROMPTS, COMPLETIONS, share_prompt=share).to(device)

    def both_ways() -> tuple[Tensor, list[Tensor]]:
        logp_N = token_logps(policy.hidden(packed), policy.head, packed.target_N)
        return logp_N.detach(), mean_gradients(model, logp_N)

    found, grads = both_ways()
    monkeypatch.setattr(packing, "_variable_length", lambda *a: packing._in_batches(*a, None))
    expected, others = both_ways()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.2)
    for one, other in zip(grads, others, strict=True):
        assert float((one - other).norm()) <= 0.1 * float(other.norm()) + 0.02
