"""Sampling: what decides a sample, shards, truncation, and log-probabilities."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dnpo.generate import Sampling, generate, sample
from dnpo.model import Policy
from dnpo.records import Response
from tests.conftest import Report, World

MakePolicy = Callable[..., Policy]
LAYOUT = Sampling(batch_size=8, shard_size=20)


def go(
    policy: Policy, world: World, folder: Path, seed: int = 1, count: int = 50, report: Report | None = None
) -> list[Response]:
    folder.mkdir(exist_ok=True)
    prompts = world.prompts[:count]
    return generate(
        policy, prompts, LAYOUT, source="policy@3", limit=12, seed=seed, folder=folder, report=report or Report()
    )


def test_rows_are_whole_and_in_order(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    rows = go(make_policy(), world, tmp_path)
    assert [r.id for r in rows] == [p.id for p in world.prompts[:50]]
    end = world.tokenizer.eos_token_id
    for row in rows:
        assert row.source == "policy@3"
        assert row.tokens == len(row.token_ids) <= 12
        assert row.finish == ("eos" if row.token_ids[-1] == end else "length")
        assert end not in row.token_ids[:-1]
        assert row.finish == "eos" or row.tokens == 12
    assert {r.finish for r in rows} == {"eos", "length"}, "both kinds must occur for this test to mean anything"


def test_log_probabilities_are_those_of_the_model_alone(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """Left padding, batches and temperature leave no trace: each row against its own unpadded forward in float64."""
    policy = make_policy()
    rows = go(policy, world, tmp_path, count=20)
    slow = make_policy().model.double()
    for prompt, row in zip(world.prompts, rows, strict=False):
        logp = slow(input_ids=torch.tensor([prompt.token_ids + row.token_ids])).logits[0].detach().log_softmax(-1)
        start = len(prompt.token_ids)
        brute = sum(float(logp[start + t - 1, token]) for t, token in enumerate(row.token_ids))
        assert row.logprob == pytest.approx(brute, abs=1e-4)


def test_a_sample_depends_on_seed_and_shard_alone(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """Not on what ran before, nor on how many shards there are, nor on the state of global chance."""
    policy = make_policy()
    first = go(policy, world, tmp_path / "a")
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert go(policy, world, tmp_path / "b") == first
    assert torch.equal(before, torch.get_rng_state())
    assert go(policy, world, tmp_path / "c", count=40)[:40] == first[:40]
    other = go(policy, world, tmp_path / "d", seed=2)
    assert [r.token_ids for r in other] != [r.token_ids for r in first]


def test_a_killed_run_goes_on_at_the_first_missing_shard(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
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


def test_greedy_answers_do_not_depend_on_padding(make_policy: MakePolicy, world: World) -> None:
    policy, greedy = make_policy(), LAYOUT.greedy()
    together = sample(policy, world.prompts[:16], greedy, "x", 12, 0, Report())
    alone = [sample(policy, [p], greedy, "x", 12, 0, Report())[0] for p in world.prompts[:16]]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_temperature_one_samples_from_the_policy_itself(make_policy: MakePolicy, world: World) -> None:
    """First tokens of 4,000 samples of one prompt against the model's own probabilities."""
    policy = make_policy()
    prompt = world.prompts[0]
    rows = sample(policy, [prompt] * 4000, Sampling(batch_size=1000), "x", 1, 5, Report())
    with torch.no_grad():
        p = policy.causal_lm(torch.tensor([prompt.token_ids])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in rows]), minlength=len(p)).double()
    expected = p.double() * 4000
    common = expected >= 5
    chi = float(((counts - expected) ** 2 / expected)[common].sum())
    degrees = int(common.sum())
    assert degrees > 10
    assert abs(chi - degrees) < 5 * (2 * degrees) ** 0.5, "5 standard deviations of the chi-square"


def test_a_models_own_defaults_do_not_leak_in(make_policy: MakePolicy, world: World) -> None:
    """Many chat models bring temperature 0.6 or top-k 50 along; a sample is from the policy unless asked otherwise."""
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
