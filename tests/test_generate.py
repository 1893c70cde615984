"""Sampling: the inputs of a sample, its cost, shards, truncation, and log-probabilities."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import dnpo.generate.hf
import dnpo.policy.model
from dnpo.errors import ModelError, SettingsError
from dnpo.generate import Ahead, Given, Sampling
from dnpo.generate.hf import complete, generate, sample
from dnpo.policy.model import Policy
from dnpo.records import Response
from dnpo.seeding import derive
from dnpo.settings import build, check, conf_folder, part_key
from tests.conftest import Report, World

MakePolicy = Callable[..., Policy]
LAYOUT = Sampling(batch_size=8, shard_size=20)
STREAMS = range(1000)


def go(
    policy: Policy, world: World, folder: Path, seed: int = 1, count: int = 50, report: Report | None = None
) -> list[Response]:
    folder.mkdir(exist_ok=True)
    prompts = world.prompts[:count]
    return list(
        generate(
            policy, prompts, LAYOUT, source="policy@3", limit=12, seed=seed, folder=folder, report=report or Report()
        )
    )


def test_rows_are_whole_and_in_order(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    rows = go(make_policy(), world, tmp_path, count=200)
    assert [r.id for r in rows] == [p.id for p in world.prompts[:200]]
    end = world.tokenizer.eos_token_id
    for row in rows:
        assert row.source == "policy@3"
        assert row.tokens == len(row.token_ids) <= 12
        assert row.finish == ("eos" if row.token_ids[-1] == end else "length")
        assert end not in row.token_ids[:-1]
        assert row.finish == "eos" or row.tokens == 12
    assert {r.finish for r in rows} == {"eos", "length"}, "both kinds must occur for this test to mean anything"


def test_log_probabilities_equal_the_models_for_each_row_alone(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """Left padding, batches and temperature change no log-probability: each row against its own unpadded forward."""
    policy = make_policy()
    rows = go(policy, world, tmp_path, count=20)
    slow = make_policy().model.double()
    for prompt, row in zip(world.prompts, rows, strict=False):
        logp = slow(input_ids=torch.tensor([prompt.token_ids + row.token_ids])).logits[0].detach().log_softmax(-1)
        start = len(prompt.token_ids)
        brute = sum(float(logp[start + t - 1, token]) for t, token in enumerate(row.token_ids))
        assert row.logprob == pytest.approx(brute, abs=1e-4)


def test_a_sample_depends_only_on_seed_and_prompt(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """It does not depend on earlier calls, the number of shards, or the state of global generators."""
    policy = make_policy()
    first = go(policy, world, tmp_path / "a")
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert go(policy, world, tmp_path / "b") == first
    assert torch.equal(before, torch.get_rng_state())
    assert go(policy, world, tmp_path / "c", count=40)[:40] == first[:40]
    other = go(policy, world, tmp_path / "d", seed=2)
    assert [r.token_ids for r in other] != [r.token_ids for r in first]


def test_shards_have_other_samples_of_the_same_prompt(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """A repeated prompt gets many different answers, in one shard or several."""
    prompts, layout = [world.prompts[0]] * 8, Sampling(batch_size=4, shard_size=4)
    rows = generate(
        make_policy(), prompts, layout, source="policy@3", limit=12, seed=1, folder=tmp_path, report=Report()
    )
    assert len({tuple(row.token_ids) for row in rows}) == 8


def test_a_killed_run_continues_at_the_first_missing_shard(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    policy = make_policy()
    whole = go(policy, world, tmp_path / "a")
    go(policy, world, tmp_path / "b")
    kept = (tmp_path / "b" / "shard-00000.parquet").stat().st_mtime_ns
    (tmp_path / "b" / "shard-00001.parquet").unlink()
    report = Report()
    assert go(policy, world, tmp_path / "b", report=report) == whole
    assert report.total == 50
    assert report.done == 50, "30 were there, 20 were made"
    assert (tmp_path / "b" / "shard-00000.parquet").stat().st_mtime_ns == kept


def stopping(policy: Policy) -> Policy:
    """The policy with many stop tokens, so that completions end early and at different lengths."""
    policy.causal_lm.generation_config.eos_token_id = list(range(0, len(policy.tokenizer), 10))
    return policy


@contextmanager
def forwards(policy: Policy) -> Iterator[list[tuple[int, int]]]:
    """Rows and columns of every forward pass."""
    seen: list[tuple[int, int]] = []

    def note(_: nn.Module, args: tuple[()], kwargs: dict[str, Tensor]) -> None:
        rows, columns = kwargs["input_ids"].shape
        seen.append((rows, columns))

    handle = policy.causal_lm.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


def alone(policy: Policy, prompt: list[int], limit: int) -> list[int]:
    """The greedy completion that transformers gives to a prompt alone."""
    configure: Any = GenerationConfig
    config = configure(max_new_tokens=limit, do_sample=False, eos_token_id=policy.stop_ids, pad_token_id=policy.pad_id)
    ids = torch.tensor([prompt])
    out = policy.causal_lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return list(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_greedy_answers_equal_those_for_each_prompt_alone(
    make_policy: MakePolicy, world: World, batch_size: int
) -> None:
    policy = stopping(make_policy())
    prompts = [p.token_ids for p in world.prompts[:30]]
    rows = complete(policy, prompts, Sampling(temperature=0.0, batch_size=batch_size), 12, STREAMS, Report())
    assert rows == [alone(policy, ids, 12) for ids in prompts]
    assert len({len(row) for row in rows}) > 4, "they must end at different lengths for this test to mean anything"


def test_samples_do_not_depend_on_what_else_is_in_the_batch(make_policy: MakePolicy, world: World) -> None:
    """They depend neither on the batch size nor on later rows, also for repeated prompts."""
    policy = stopping(make_policy())
    prompts = [p.token_ids for p in world.prompts[:24]]
    prompts += prompts[:12]
    args: Any = (12, STREAMS, Report())
    by_one = complete(policy, prompts, Sampling(batch_size=1), *args)
    for batch_size in (2, 5, 8, 100):
        assert complete(policy, prompts, Sampling(batch_size=batch_size), *args) == by_one
    assert complete(policy, prompts[:20], Sampling(batch_size=8), *args) == by_one[:20]
    assert by_one[24:] != by_one[:12], "the same prompt, another sample"


def test_nothing_is_computed_twice_or_for_rows_that_have_finished(make_policy: MakePolicy, world: World) -> None:
    policy = stopping(make_policy())
    prompts = [p.token_ids for p in world.prompts[:40]]
    distinct = {tuple(ids) for ids in prompts}
    with forwards(policy) as seen:
        rows = complete(policy, prompts * 4, LAYOUT, 12, STREAMS, Report())
    prefills = [(rows, columns) for rows, columns in seen if columns > 1]
    assert sum(rows for rows, _ in prefills) == len(distinct), "a prompt is read once, whatever is sampled from it"
    assert sum(rows for rows, columns in seen if columns == 1) == sum(len(row) - 1 for row in rows)
    lengths = [columns for _, columns in prefills]
    assert lengths == sorted(lengths, reverse=True), "the longest first"


def test_the_next_prompts_take_the_places_of_rows_that_have_finished(make_policy: MakePolicy, world: World) -> None:
    policy = stopping(make_policy())
    prompts = [p.token_ids for p in world.prompts[:60]]
    with forwards(policy) as seen:
        rows = complete(policy, prompts, LAYOUT, 12, STREAMS, Report())
    joined = [after[0] > before[0] for before, after in pairwise(seen) if before[1] > 1]
    assert sum(joined) > 5, "a step after a prefill has more rows than were read"
    assert max(count for count, _ in seen) <= LAYOUT.batch_size
    steps = [count for count, columns in seen if columns == 1]
    assert len(steps) < 1.4 * sum(len(row) - 1 for row in rows) / LAYOUT.batch_size, "the batch is nearly full"


@pytest.mark.parametrize("batch_size", [1, 4, 11])
def test_more_copies_of_a_prompt_than_the_batch_has_rows(
    make_policy: MakePolicy, world: World, batch_size: int
) -> None:
    """They join at different times, but each prompt is read once."""
    policy, report = stopping(make_policy()), Report()
    some = sorted({tuple(p.token_ids) for p in world.prompts[:5]})
    prompts = [list(ids) for ids in some for _ in range(11)]
    with forwards(policy) as seen:
        rows = complete(policy, prompts, Sampling(batch_size=batch_size), 12, STREAMS, report)
    assert sum(count for count, columns in seen if columns > 1) == len(some)
    assert rows == [
        complete(policy, [ids], Sampling(batch_size=1), 12, [stream], Report())[0]
        for ids, stream in zip(prompts, STREAMS, strict=False)
    ]
    assert report.done == len(prompts)


def test_rows_of_one_prompt_do_not_wait_for_an_empty_batch(make_policy: MakePolicy, world: World) -> None:
    policy = stopping(make_policy())
    prompts = [p.token_ids for p in world.prompts[:20] for _ in range(30)]
    with forwards(policy) as seen:
        rows = complete(policy, prompts, Sampling(batch_size=32), 12, STREAMS, Report())
    steps = [count for count, columns in seen if columns == 1]
    assert len(steps) < 1.4 * sum(len(row) - 1 for row in rows) / 32, "the batch is nearly full"


SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
SMALL: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
FAMILIES: dict[str, Callable[[int], Any]] = {
    "grouped queries": lambda v: LlamaConfig(**SHAPE, vocab_size=v),
    "sliding window": lambda v: MistralConfig(**SHAPE, vocab_size=v, sliding_window=6),
    "hybrid sliding, soft caps": lambda v: Gemma2Config(
        **SHAPE, vocab_size=v, sliding_window=6, head_dim=16, query_pre_attn_scalar=16
    ),
    "tied embeddings": lambda v: Qwen2Config(**SHAPE, vocab_size=v, tie_word_embeddings=True),
    "normalised queries": lambda v: Qwen3Config(**SHAPE, vocab_size=v, head_dim=16, tie_word_embeddings=True),
    "learnt positions": lambda v: GPT2Config(**SMALL, vocab_size=v, n_positions=64),
    "parallel residual": lambda v: GPTNeoXConfig(**SHAPE | {"num_key_value_heads": 2}, vocab_size=v),
    "no position ids": lambda v: BloomConfig(vocab_size=v, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.3),
    "keys wider than values": lambda v: DeepseekV3Config(
        **SHAPE | {"num_key_value_heads": 2},
        vocab_size=v,
        first_k_dense_replace=2,
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=8,
    ),
    "convolutions among attention": lambda v: Lfm2Config(**SHAPE, vocab_size=v, full_attn_idxs=[1]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_of_every_model_family_equal_transformers(
    world: World, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy completions equal transformers' for each prompt alone, and samples equal those of a batch of one. The
    buffers have room for only three columns, so they are replaced often."""
    monkeypatch.setattr(dnpo.generate.hf._Window, "_SPARE", 3)
    make: Any = AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = Policy(make.from_config(FAMILIES[family](len(world.tokenizer))).eval(), world.tokenizer)
    stopping(policy)
    prompts = [world.prompts[i].token_ids[: 3 + i] for i in range(12)]
    greedy = complete(policy, prompts, Sampling(temperature=0.0, batch_size=5), 10, STREAMS, Report())
    assert greedy == [alone(policy, ids, 10) for ids in prompts]
    prompts += prompts[:6]
    sampled = complete(policy, prompts, Sampling(batch_size=5), 10, STREAMS, Report())
    assert sampled == complete(policy, prompts, Sampling(batch_size=1), 10, STREAMS, Report())
    assert len(set(map(tuple, sampled))) > 12, "a model that always says the same shows nothing"


def test_a_completion_longer_than_the_buffers_spare_columns(make_policy: MakePolicy, world: World) -> None:
    policy = make_policy(max_position_embeddings=256)
    prompts = [p.token_ids for p in world.prompts[:3]]
    limit = 2 * dnpo.generate.hf._Window._SPARE + 5
    rows = complete(policy, prompts, Sampling(temperature=0.0, batch_size=2), limit, STREAMS, Report())
    assert rows == [alone(policy, ids, limit) for ids in prompts]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, None),
        ({"temperature": 0.5}, None),
        ({"temperature": 2.0, "top_k": 7}, 7),
        ({"top_p": 0.6}, None),
        ({"temperature": 1.5, "top_k": 30, "top_p": 0.5}, None),
    ],
)
def test_samples_follow_the_policys_own_probabilities(
    make_policy: MakePolicy, world: World, settings: dict[str, Any], kept: int | None
) -> None:
    """First tokens of 4,000 samples of one prompt against probabilities by their definition, in float64."""
    policy = make_policy()
    prompt = world.prompts[0]
    rows = sample(policy, [prompt] * 4000, Sampling(batch_size=1000, **settings), "x", 1, 5, Report())
    with torch.no_grad():
        logits = policy.causal_lm(torch.tensor([prompt.token_ids])).logits[0, -1].double()
    p = (logits / settings.get("temperature", 1.0)).softmax(-1)
    order = p.argsort(descending=True)
    some = order[: settings.get("top_k") or len(p)]
    mass = p[some].cumsum(0) / p[some].sum()
    some = some[: int((mass < settings.get("top_p", 1.0)).sum()) + 1]
    assert kept is None or len(some) == kept
    expected = torch.zeros_like(p)
    expected[some] = p[some] / p[some].sum() * 4000
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in rows]), minlength=len(p)).double()
    assert counts[expected == 0].sum() == 0, "what is cut off is never sampled"
    common = expected >= 5
    chi = float(((counts - expected) ** 2 / expected)[common].sum())
    degrees = int(common.sum())
    assert degrees > 5
    assert abs(chi - degrees) < 5 * (2 * degrees) ** 0.5, "5 standard deviations of the chi-square"


def test_tokens_with_probability_0_are_never_drawn() -> None:
    """This also holds for a large vocabulary, most of it with probability 0, of a size that groups do not divide."""
    scores = torch.full((4000, 5003), -torch.inf)
    scores[:, 17], scores[:, 5002] = 0.3, -1.2
    tokens = dnpo.generate.hf._pick(scores, [(row, 0) for row in range(4000)], dnpo.generate.hf.make_warp(Sampling()))
    rare = int((tokens == 5002).sum())
    assert set(tokens.tolist()) == {17, 5002}
    expected = float(torch.tensor([0.3, -1.2]).softmax(-1)[1])
    assert abs(rare / 4000 - expected) < 5 * (expected * (1 - expected) / 4000) ** 0.5


def test_random_numbers_equal_splitmix64s() -> None:
    """Compared with the generator in integer arithmetic; every stream and token has different numbers."""

    def mixed(stream: int, number: int) -> int:
        bits = (stream + number * 0x9E3779B97F4A7C15) % 2**64
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
        return bits ^ (bits >> 31)

    assert mixed(1234567, 1) == 6457827717110365317, "the generator's published first number for this seed"
    places = [(0, 0), (1234567, 0), (2**63 - 1, 5), (7, 2**20)]
    found = dnpo.generate.hf._exponential(places, 9, torch.device("cpu"))
    for row, (stream, token) in zip(found.tolist(), places, strict=True):
        numbers = [mixed(stream, token * 9 + i + 1) for i in range(9)]
        assert row == pytest.approx([-math.log(((bits >> 11) + 0.5) / 2**53) for bits in numbers], rel=1e-12)
    assert found.unique().numel() == found.numel()


@pytest.mark.parametrize("vocabulary", [50, 3000])
def test_a_small_error_in_probabilities_changes_few_draws(vocabulary: int) -> None:
    """Rounding changes few samples: at most twice the total-variation distance, once for each draw."""
    warp, places = dnpo.generate.hf.make_warp(Sampling()), [(row, 3) for row in range(2000)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        logits = torch.randn(2000, vocabulary) * 3
        off = logits + torch.randn(2000, vocabulary) * 0.02
    apart = (logits.softmax(-1) - off.softmax(-1)).abs().sum(-1).div(2)
    changed = dnpo.generate.hf._pick(logits, places, warp) != dnpo.generate.hf._pick(off, places, warp)
    limit = 2 * float(apart.sum())
    assert 0 < int(changed.sum()) < limit + 3 * limit**0.5
    assert limit < 40, "most rows are to have the same token"


def test_a_sample_depends_on_its_prompt_and_not_on_its_place(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """It does not depend on the prompts before it, on shards, or on the number of other samples."""
    policy, args = make_policy(), ("x", 12, 3, Report())
    rows = {row.id: row for row in sample(policy, world.prompts[:30], LAYOUT, *args)}
    turned = sample(policy, world.prompts[29:9:-1], LAYOUT, *args)
    assert [row.token_ids for row in turned] == [rows[row.id].token_ids for row in turned]
    twice = sample(policy, [*world.prompts[:9], *world.prompts[:9]], LAYOUT, *args)
    assert [row.token_ids for row in twice[:9]] == [rows[row.id].token_ids for row in twice[:9]]
    assert [row.token_ids for row in twice[9:]] != [row.token_ids for row in twice[:9]]
    some = {"source": "x", "limit": 12, "seed": 3, "report": Report()}
    for size in (7, 20):
        folder = tmp_path / str(size)
        folder.mkdir()
        layout = Sampling(batch_size=8, shard_size=size)
        made = generate(policy, world.prompts[:30], layout, folder=folder, **some)
        assert [row.token_ids for row in made] == [rows[row.id].token_ids for row in made]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_refused(make_policy: MakePolicy, world: World, temperature: float) -> None:
    policy = make_policy()
    with torch.no_grad():
        policy.causal_lm.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(ModelError, match="NaN"):
        sample(policy, world.prompts[:3], Sampling(temperature=temperature), "x", 12, 0, Report())


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_too_little_memory_names_the_setting(make_policy: MakePolicy, world: World, error: Exception) -> None:
    policy = make_policy()

    def full(*_: Any) -> None:
        raise error

    policy.causal_lm.register_forward_pre_hook(full)
    with pytest.raises(SettingsError, match=r"generate\.batch_size=8: .* memory"):
        sample(policy, world.prompts[:3], LAYOUT, "x", 12, 0, Report())


def test_another_error_is_not_taken_for_too_little_memory(make_policy: MakePolicy, world: World) -> None:
    policy = make_policy(vocab_size=5)
    with pytest.raises(IndexError):
        sample(policy, world.prompts[:3], LAYOUT, "x", 12, 0, Report())


def test_a_model_without_a_cache_is_refused(make_policy: MakePolicy, world: World) -> None:
    class Recurrent(nn.Module):
        def forward(self, input_ids: Tensor, state: Tensor) -> None: ...

    policy = make_policy()
    policy.model = Recurrent()
    policy.model.weight = nn.Parameter(torch.zeros(1))
    policy.model.generation_config = GenerationConfig()
    with pytest.raises(ModelError, match="Recurrent takes no past_key_values"):
        complete(policy, [[1, 2]], LAYOUT, 12, STREAMS, Report())


def test_a_models_own_sampling_defaults_are_not_used(make_policy: MakePolicy, world: World) -> None:
    """Many chat models ship temperature 0.6 or top-k 50; by default a sample is from the policy itself."""
    plain, opinionated = make_policy(), make_policy()
    opinionated.causal_lm.generation_config.temperature = 0.01
    opinionated.causal_lm.generation_config.top_k = 1
    opinionated.causal_lm.generation_config.do_sample = True
    args = (world.prompts[:16], LAYOUT, "x", 12, 3, Report())
    assert sample(plain, *args) == sample(opinionated, *args)


def test_top_k_one_is_greedy(make_policy: MakePolicy, world: World) -> None:
    policy = make_policy()
    args = ("x", 12, 3, Report())
    sharp = sample(policy, world.prompts[:16], Sampling(top_k=1, batch_size=8), *args)
    assert sharp == sample(policy, world.prompts[:16], LAYOUT.greedy(), *args)


# --- several samples of a prompt


def roll(
    policy: Policy,
    world: World,
    folder: Path,
    rollout: Sampling,
    count: int = 6,
    limit: int = 12,
    report: Report | None = None,
) -> list[Response]:
    folder.mkdir(exist_ok=True)
    made = generate(
        policy,
        world.prompts[:count],
        rollout,
        source="policy@0",
        limit=limit,
        seed=1,
        folder=folder,
        report=report or Report(),
    )
    return list(made)


@pytest.mark.parametrize("batch_size", [2, 8, 64])
def test_each_of_several_samples_is_the_one_generated_alone(
    make_policy: MakePolicy, world: World, tmp_path: Path, batch_size: int
) -> None:
    """Against a batch of one row with the same stream; log-probabilities in float64."""
    policy = make_policy()
    rows = roll(policy, world, tmp_path, Ahead(samples=5, batch_size=batch_size, shard_size=4))
    assert [(row.id, row.sample) for row in rows] == [(p.id, n) for p in world.prompts[:6] for n in range(5)]
    exact = make_policy().model.double()
    for number, row in enumerate(rows):
        prompt = world.prompts[number // 5]
        streams = [derive(1, "sample", prompt.id, number % 5)]
        assert [row.token_ids] == complete(policy, [prompt.token_ids], Sampling(), 12, streams, Report())
        logp = exact(input_ids=torch.tensor([prompt.token_ids + row.token_ids])).logits[0].detach().log_softmax(-1)
        start = len(prompt.token_ids)
        brute = sum(float(logp[start + t - 1, token]) for t, token in enumerate(row.token_ids))
        assert row.logprob == pytest.approx(brute, abs=1e-4)
    assert len({tuple(row.token_ids) for row in rows}) > 25, "they differ"


@pytest.mark.parametrize("tokens", [8192, 60, 1])
def test_several_samples_are_scored_with_one_reading_of_the_prompt(
    make_policy: MakePolicy, world: World, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """In batches; each score is the score of the sequence alone."""
    monkeypatch.setattr(dnpo.policy.model, "SCORED_TOKENS", tokens)
    monkeypatch.setattr(dnpo.policy.model.by_length, "__defaults__", (tokens,))
    policy = make_policy()
    prompts = [p.token_ids for p in world.prompts[:6] for _ in range(5)]
    completions = [r.token_ids for r in world.human[:30]]
    batches: list[int] = []
    policy.causal_lm.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    scores = policy.score(prompts, completions, samples=5)
    read = sum(batches)
    alone = [policy.score([p], [c])[0] for p, c in zip(prompts, completions, strict=True)]
    assert scores == pytest.approx(alone, abs=1e-4)
    once, every = (sum(map(len, some)) + sum(map(len, completions)) for some in (prompts[::5], prompts))
    if tokens == 8192:
        assert read == once
    elif tokens == 60:
        assert once < read < every
        assert max(batches) <= 60
    else:
        assert read == every


def test_the_first_samples_do_not_depend_on_how_many_there_are(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """One sample equals that of plain settings, as in versions without several samples."""
    policy = make_policy()
    plain = roll(policy, world, tmp_path / "plain", LAYOUT)
    assert {row.sample for row in plain} == {0}
    for samples in (1, 3, 9):
        rollout = Ahead(samples=samples, batch_size=8, shard_size=20)
        rows = roll(policy, world, tmp_path / str(samples), rollout)
        assert rows[::samples] == plain
    several = [prompt for prompt in world.prompts[:6] for _ in range(9)]
    assert rows == sample(policy, several, LAYOUT, "policy@0", 12, 1, Report()), "measuring has the same samples"


def test_a_killed_run_with_several_samples_loses_a_shard_of_prompts(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    policy, rollout = make_policy(), Ahead(samples=3, batch_size=8, shard_size=4)
    whole = roll(policy, world, tmp_path / "a", rollout, count=10)
    roll(policy, world, tmp_path / "b", rollout, count=10)
    shards = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert shards == [f"shard-0000{number}.parquet" for number in range(3)]
    (tmp_path / "b" / shards[1]).unlink()
    report = Report()
    with forwards(policy) as seen:
        assert roll(policy, world, tmp_path / "b", rollout, count=10, report=report) == whole
    distinct = {tuple(p.token_ids) for p in world.prompts[4:8]}
    assert sum(count for count, columns in seen if columns > 1) == len(distinct), "only the lost shard is made again"
    assert (report.total, report.done) == (30, 30)


def test_responses_that_are_cut_may_be_ended(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """An end-of-sequence token is appended, within the data's limit; ``finish`` still says that they were cut."""
    policy, end = stopping(make_policy()), world.tokenizer.eos_token_id
    plain = roll(policy, world, tmp_path / "plain", LAYOUT, count=40)
    for name, most in (("at the limit", 0), ("before", 7), ("after", 99)):
        report = Report()
        rollout = Ahead(batch_size=8, max_tokens=most, append_eos=True)
        rows = roll(policy, world, tmp_path / name, rollout, count=40, report=report)
        cut_at = 7 if name == "before" else 12
        for row, other in zip(rows, plain, strict=True):
            whole = other.finish == "eos" and other.tokens <= cut_at
            expected = other.token_ids if whole else [*other.token_ids[: 7 if name == "before" else 11], end]
            assert row.token_ids == expected
            assert row.tokens == len(expected) <= 12
            assert row.finish == ("eos" if whole else "length")
            assert row.text == world.tokenizer.decode(expected, skip_special_tokens=True).strip()
        scores = policy.score([p.token_ids for p in world.prompts[:40]], [row.token_ids for row in rows])
        assert [row.logprob for row in rows] == pytest.approx(scores, abs=1e-4), "of what is trained on"
        again = sample(policy, world.prompts[:40], rollout, "policy@0", 12, 1, Report())
        assert again == rows, "so what is compared with them is made alike"
        cut = sum(row.finish == "length" for row in rows)
        assert 0 < cut < 40, "both kinds must occur for this test to mean anything"
        assert report.notes == [
            f"append_eos=true: {cut} of 40 responses were cut and end with an end-of-sequence token that the policy "
            "did not generate"
        ]


def test_measuring_appends_nothing(make_policy: MakePolicy, world: World) -> None:
    policy, args = make_policy(), ("x", 12, 3, Report())
    ended = Sampling(batch_size=8, append_eos=True)
    assert sample(policy, world.prompts[:20], ended, *args) == sample(policy, world.prompts[:20], LAYOUT, *args)
    assert part_key(ended) == part_key(Sampling(batch_size=8)), "so it is no part of a measurement's key"


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.0), ("top_k", 1), ("top_p", 0.0)])
def test_several_samples_that_would_be_equal_are_refused(name: str, value: float) -> None:
    settings = {"_target_": "dnpo.generate.Ahead", "samples": 2, name: value}
    with pytest.raises(SettingsError, match=rf"rollout\.samples=2: with {name}=0?1? "):
        build("rollout", check("rollout", settings))
    build("rollout", check("rollout", settings | {"samples": 1}))


def test_stage_keys_of_rollouts() -> None:
    """One sample by plain settings has the earlier key; a setting that changes responses changes the key."""
    assert part_key(Ahead()) == part_key(Sampling())
    others: list[dict[str, Any]] = [
        {"samples": 2},
        {"max_tokens": 9},
        {"append_eos": True},
        {"top_k": 3},
        {"temperature": 0.5},
    ]
    keys = [part_key(Ahead(**settings)) for settings in others]
    assert len({str(key) for key in [*keys, part_key(Ahead())]}) == len(others) + 1
    assert part_key(Ahead(batch_size=3)) == part_key(Ahead())


def test_settings_of_rollouts_follow_generates() -> None:
    load, folder = OmegaConf.load, conf_folder()
    tree: Any = OmegaConf.create(
        {"generate": load(folder / "generate/sample.yaml"), "rollout": load(folder / "rollout/ahead.yaml")}
    )
    plain: Any = OmegaConf.to_container(tree, resolve=True)
    assert build("rollout", check("rollout", plain["rollout"])) == Ahead(batch_size=256)
    tree.generate.update({"append_eos": True, "temperature": 0.0, "top_k": 3, "top_p": 0.5, "batch_size": 7})
    tree.generate.shard_size = 9
    plain = OmegaConf.to_container(tree, resolve=True)
    rollout = build("rollout", check("rollout", plain["rollout"]))
    assert rollout == Ahead(temperature=0.0, top_k=3, top_p=0.5, batch_size=7, shard_size=9, append_eos=True)
    plain = OmegaConf.to_container(load(folder / "rollout/given.yaml"))
    given = build("rollout", check("rollout", plain))
    assert given == Given()
    assert (rollout.generates, given.generates) == (True, False)
