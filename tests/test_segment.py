"""Segments of human responses that a policy regenerates."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import dnpo.generate.segment
from dnpo.generate import Ahead, Sampling
from dnpo.generate.hf import complete, sample
from dnpo.generate.segment import REDRAWS, cut, regenerate
from dnpo.optimise.objective import Facts, PairLogps, log_ratio_gap
from dnpo.optimise.parts import OddsRatio
from dnpo.policy.loading import load
from dnpo.policy.model import Policy
from dnpo.policy.tokenizer import encode, human_response
from dnpo.records import Prompt, Response
from dnpo.seeding import derive
from tests.conftest import Report, World

MakePolicy = Callable[..., Policy]
LIMIT = 24


def go(
    policy: Policy,
    prompts: Sequence[Prompt],
    human: Sequence[Response],
    length: int = 3,
    seed: int = 1,
    report: Report | None = None,
    limit: int = LIMIT,
    **sampling: Any,
) -> tuple[list[Response], dict[str, int]]:
    rollout = Ahead(**{"batch_size": 8} | sampling)
    return regenerate(
        policy,
        prompts,
        human,
        rollout,
        length=length,
        source="policy@2",
        limit=limit,
        seed=seed,
        report=report or Report(),
    )


def check_rows(policy: Policy, human: Sequence[Response], rows: Sequence[Response], length: int, seed: int) -> None:
    """The properties of all rows, for every draw."""
    old, stops = {response.id: response for response in human}, set(policy.stop_ids)
    for row in rows:
        before, segment, after = cut(old[row.id], length, seed)
        new = row.token_ids[len(before) : len(row.token_ids) - len(after)]
        assert row.token_ids == before + new + after
        assert new != segment
        assert row.tokens == len(row.token_ids) <= LIMIT
        assert row.finish == ("eos" if row.token_ids[-1] in stops else "length")
        if after:
            assert len(new) == len(segment) == length
            assert not stops & set(new)
            assert row.finish == old[row.id].finish
        else:
            assert not stops & set(new[:-1])
            assert new[-1] in stops or row.tokens == LIMIT


def eager(policy: Policy, one_in: int = 3) -> Policy:
    """The policy with many stop tokens, so that most segments have one unless they are forbidden."""
    policy.causal_lm.generation_config.eos_token_id = list(range(0, len(policy.tokenizer), one_in))
    return policy


@pytest.mark.parametrize("length", [1, 3, 6])
def test_tokens_before_and_after_a_segment_are_kept(make_policy: MakePolicy, world: World, length: int) -> None:
    policy, report = eager(make_policy()), Report()
    rows, counts = go(policy, world.prompts, world.human, length, report=report)
    assert [row.id for row in rows] == [p.id for p in world.prompts], "a random policy never writes as people do"
    assert counts["segments"] == report.done == len(rows)
    assert counts["dropped"] == 0
    assert {row.source for row in rows} == {"policy@2"}
    check_rows(policy, world.human, rows, length, 1)
    ends = [not cut(response, length, 1).after for response in world.human]
    assert 0 < sum(ends) < len(ends), "both kinds must occur for this test to mean anything"
    assert {row.finish for row in rows} == {"eos"}
    assert {row.tokens != old.tokens for row, old, end in zip(rows, world.human, ends, strict=True) if end} == {
        False,
        True,
    }


def test_text_and_log_probability_cover_all_tokens(make_policy: MakePolicy, world: World) -> None:
    """The text is that of the tokens, and the log-probability that of the model alone in float64."""
    policy = make_policy()
    rows, _ = go(policy, world.prompts[:20], world.human)
    slow = make_policy().model.double()
    for prompt, row in zip(world.prompts, rows, strict=False):
        assert row.text == str(world.tokenizer.decode(row.token_ids, skip_special_tokens=True)).strip()
        logp = slow(input_ids=torch.tensor([prompt.token_ids + row.token_ids])).logits[0].detach().log_softmax(-1)
        start = len(prompt.token_ids)
        brute = sum(float(logp[start + t - 1, token]) for t, token in enumerate(row.token_ids))
        assert row.logprob == pytest.approx(brute, abs=1e-4)


def test_only_a_segment_at_the_end_is_ended(make_policy: MakePolicy, world: World) -> None:
    """Checks ``append_eos`` also for human responses that were cut: the tokens after a segment are kept."""
    policy = make_policy()
    human = [replace(old, token_ids=old.token_ids[:4], tokens=4, finish="length") for old in world.human[:60]]
    assert not any(policy.stop_ids[0] in old.token_ids for old in human)
    rows, _ = go(policy, world.prompts[:60], human, 2, limit=4, append_eos=True)
    ends = [not cut(old, 2, 1).after for old in human]
    assert len(rows) == 60
    assert 0 < sum(ends) < 60
    assert [row.token_ids[-1] in policy.stop_ids for row in rows] == ends
    assert {row.tokens for row, end in zip(rows, ends, strict=True) if not end} == {4}
    assert {row.finish for row, end in zip(rows, ends, strict=True) if not end} == {"length"}


def test_tokens_that_differ_from_the_tokenizers_are_kept(make_policy: MakePolicy, world: World) -> None:
    """Human tokens that differ from the tokenisation of their text are returned unchanged."""
    letters = {world.tokenizer.decode([i]): i for i in range(len(world.tokenizer))}
    ids = [*(letters[letter] for letter in "minusequals"), world.tokenizer.eos_token_id]
    text = str(world.tokenizer.decode(ids, skip_special_tokens=True))
    assert world.tokenizer(text)["input_ids"] != ids[:-1]
    human = [replace(response, token_ids=ids, tokens=len(ids)) for response in world.human]
    rows, _ = go(make_policy(), world.prompts[:40], human)
    assert len(rows) == 40
    check_rows(make_policy(), human, rows, 3, 1)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("tokens", "length"), [(9, 3), (9, 8), (20, 1)])
def test_segments_begin_anywhere_with_equal_probability(seed: int, tokens: int, length: int) -> None:
    count = 500 * tokens
    starts = Counter(
        len(cut(Response(f"row-{i}", "human", "", list(range(tokens)), tokens, "eos"), length, seed).before)
        for i in range(count)
    )
    assert set(starts) == set(range(tokens))
    chi = sum((n - 500) ** 2 / 500 for n in starts.values())
    assert abs(chi - (tokens - 1)) < 4 * (2 * (tokens - 1)) ** 0.5, "4 standard deviations of the chi-square"


def test_each_cut_has_all_tokens_in_order() -> None:
    for tokens, length in product(range(1, 12), range(1, 14)):
        response = Response(f"row-{tokens}", "human", "", list(range(tokens)), tokens, "eos")
        parts = cut(response, length, 5)
        assert [*parts.before, *parts.segment, *parts.after] == response.token_ids
        assert len(parts.segment) == length or not parts.after
        assert parts.segment
        if length >= tokens:
            assert parts == ([], response.token_ids, [])


@pytest.mark.parametrize(
    ("length", "sampling"),
    [
        (LIMIT, {}),
        (256, {"temperature": 0.7, "top_p": 0.9}),
        (256, {"max_tokens": 5}),
        (256, {"max_tokens": 5, "append_eos": True}),
    ],
)
def test_a_segment_as_long_as_the_response_is_an_ordinary_sample(
    make_policy: MakePolicy, world: World, length: int, sampling: dict[str, Any]
) -> None:
    """In all bits, with log-probabilities and repeated prompts; a sample equal to the human response is dropped."""
    policy = eager(make_policy(), 10)
    prompts = [*world.prompts[:60], *world.prompts[:20]]
    expected = sample(policy, prompts, Ahead(batch_size=8, **sampling), "policy@2", LIMIT, 1, Report())
    assert {row.finish for row in expected} == {"eos", "length"}
    rows, counts = go(policy, prompts, world.human, length, **sampling)
    assert rows == expected
    assert counts == {"segments": 80, "redrawn": 0, "dropped": 0}
    human = [replace(old, token_ids=row.token_ids) for old, row in zip(world.human[:20], expected, strict=False)]
    rows, counts = go(policy, prompts, [*human, *world.human[20:]], length, **sampling)
    written = {response.id: response.token_ids for response in human}
    kept = [row for row in expected if row.token_ids != written.get(row.id)]
    assert len(kept) <= 60
    assert rows == kept
    assert counts == {"segments": 80, "redrawn": 0, "dropped": 80 - len(kept)}


def test_a_segment_depends_on_seed_and_prompt_alone(make_policy: MakePolicy, world: World) -> None:
    """Not on the batch, other prompts and their order, earlier calls, or the state of global generators."""
    policy = lively(make_policy())
    prompts, human = world.prompts[:80], own_words(policy, world)[:80]
    rows, counts = go(policy, prompts, human)
    assert counts["redrawn"] > 20, "draws that were repeated must occur for this test to mean anything"
    assert counts["dropped"] > 0
    tokens = {row.id: row.token_ids for row in rows}
    torch.manual_seed(123)
    before = torch.get_rng_state()
    for size in (1, 100):
        again, same = go(policy, prompts, human, batch_size=size)
        assert {row.id: row.token_ids for row in again} == tokens
        assert same == counts
    assert torch.equal(before, torch.get_rng_state())
    for some in (prompts[60:20:-1], prompts[3:4], prompts[::5]):
        again, _ = go(policy, some, human[::-1])
        assert [(row.id, row.token_ids) for row in again] == [(p.id, tokens[p.id]) for p in some if p.id in tokens]
    other, _ = go(policy, prompts, human, seed=2)
    assert {row.id: row.token_ids for row in other} != tokens


def test_a_prompt_that_repeats_gets_other_segments_at_the_same_place(make_policy: MakePolicy, world: World) -> None:
    rows, _ = go(make_policy(), [world.prompts[0]] * 8, world.human)
    assert [row.sample for row in rows] == list(range(8))
    before, _, after = cut(world.human[0], 3, 1)
    assert after
    assert len({tuple(row.token_ids) for row in rows}) == 8
    assert {(tuple(row.token_ids[: len(before)]), tuple(row.token_ids[-len(after) :])) for row in rows} == {
        (tuple(before), tuple(after))
    }


def lively(policy: Policy) -> Policy:
    """The policy with scaled logits, so that it often draws the same segment again."""
    with torch.no_grad():
        policy.causal_lm.get_output_embeddings().weight *= 15
    return policy


def own_words(policy: Policy, world: World) -> list[Response]:
    """Human responses from the policy: 12 of its tokens, and the end."""
    ids = complete(
        policy,
        [prompt.token_ids for prompt in world.prompts],
        Sampling(temperature=0.0),
        12,
        range(len(world.prompts)),
        None,
        range(len(world.prompts)),
    )
    end = policy.stop_ids[0]
    return [replace(old, token_ids=[*new, end], tokens=13) for old, new in zip(world.human, ids, strict=True)]


def test_an_unchanged_segment_is_drawn_again(make_policy: MakePolicy, world: World) -> None:
    """Here greedy decoding always gives the human response: it is drawn 8 more times, then dropped."""
    policy = lively(make_policy())
    human = own_words(policy, world)
    prompts = [prompt for prompt, old in zip(world.prompts, human, strict=True) if cut(old, 3, 1).after][:20]
    rows, counts = go(policy, prompts, human, temperature=0.0)
    assert rows == []
    assert counts == {"segments": 20, "redrawn": 20 * REDRAWS, "dropped": 20}
    report = Report()
    rows, counts = go(policy, world.prompts, human, report=report)
    assert report.done == len(world.prompts), "each prompt counts once, however often it is drawn"
    assert counts["segments"] == len(world.prompts) == len(rows) + counts["dropped"]
    assert counts["redrawn"] > counts["dropped"] * REDRAWS > 0
    check_rows(policy, human, rows, 3, 1)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.9}, {"max_tokens": 9}])
def test_draws_equal_those_made_one_after_the_other(
    make_policy: MakePolicy, world: World, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each draw computed alone; also if memory holds the logits of only a few tokens."""
    policy = eager(lively(make_policy()), 10)
    prompts, human = world.prompts[:60], own_words(policy, world)[:60]
    expected, counts = [], Counter(segments=60, redrawn=0, dropped=0)
    for prompt, old in zip(prompts, human, strict=True):
        before, segment, after = cut(old, 3, 4)
        streams = [derive(4, "sample", prompt.id, 0), *(derive(4, "redraw", prompt.id, 0, n) for n in range(1, 9))]
        limit = 3 if after else settings.get("max_tokens", LIMIT) - len(before)
        rest: Any = ([max(limit, 1)] * 9, streams, None, range(9) if after else ())
        draws = complete(policy, [prompt.token_ids + before] * 9, Ahead(**settings), *rest)
        differing = [n for n, new in enumerate(draws) if new != segment]
        counts["redrawn"] += differing[0] if differing else REDRAWS
        counts["dropped"] += not differing
        expected += [before + draws[n] + after for n in differing[:1]]
    assert counts["redrawn"] > 60
    for logits in (2**26, 20 * len(world.tokenizer)):
        monkeypatch.setattr(dnpo.generate.segment, "LOGITS", logits)
        rows, found = go(policy, prompts, human, seed=4, **settings)
        assert [row.token_ids for row in rows] == expected
        assert found == counts


def test_segments_follow_the_policys_probabilities_given_that_they_differ(
    make_policy: MakePolicy, world: World
) -> None:
    """Two tokens with four values each: 6,000 draws of one prompt against the 16 exact probabilities in float64."""
    policy, prompt, count = make_policy(), world.prompts[0], 6000
    starts = prompt.token_ids
    end = policy.stop_ids[0]

    def four(ids: list[int]) -> dict[int, float]:
        with torch.no_grad():
            logits = policy.causal_lm(torch.tensor([ids])).logits[0, -1].double()
        logits[end] = -torch.inf
        best = logits.topk(4)
        return dict(zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True))

    ids = complete(policy, [starts], Sampling(temperature=0.0), 6, [0], None, {0})[0]
    human = [replace(world.human[0], token_ids=[*ids, end], tokens=7)]
    before, segment, after = cut(human[0], 2, 1)
    assert len(after) > 1
    first = four(starts + before)
    expected = {(a, b): p * q for a, p in first.items() for b, q in four([*starts, *before, a]).items()}
    same = expected.pop((segment[0], segment[1]))
    assert same > 0.05
    rows, counts = go(policy, [prompt] * count, human, length=2, top_k=4, batch_size=500)
    drawn = Counter((row.token_ids[len(before)], row.token_ids[len(before) + 1]) for row in rows)
    assert set(drawn) <= set(expected)
    chi = sum(
        (drawn[two] - len(rows) * p / (1 - same)) ** 2 / (len(rows) * p / (1 - same)) for two, p in expected.items()
    )
    degrees = len(expected) - 1
    assert abs(chi - degrees) < 4 * (2 * degrees) ** 0.5
    draws = count + counts["redrawn"]
    assert abs((draws - len(rows)) / draws - same) < 4 * (same * (1 - same) / draws) ** 0.5


def test_each_row_has_its_own_limit_and_some_no_end(make_policy: MakePolicy, world: World) -> None:
    """Greedy completions are those of transformers for each prompt alone, with the same tokens suppressed."""
    policy = eager(make_policy())
    prompts = [p.token_ids for p in world.prompts[:40]]
    limits = [1 + i % 9 for i in range(40)]
    endless = set(range(0, 40, 3))
    rows = complete(policy, prompts, Sampling(temperature=0.0, batch_size=6), limits, range(40), None, endless)
    for i, ids in enumerate(prompts):
        configure: Any = GenerationConfig
        config = configure(
            max_new_tokens=limits[i],
            do_sample=False,
            eos_token_id=policy.stop_ids,
            pad_token_id=policy.pad_id,
            suppress_tokens=policy.stop_ids if i in endless else None,
        )
        input_ids = torch.tensor([ids])
        out = policy.causal_lm.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config
        )
        assert rows[i] == out[0, len(ids) :].tolist()
    free = complete(policy, prompts, Sampling(temperature=0.0, batch_size=6), limits, range(40), None)
    assert any(rows[i] != free[i] for i in endless)
    assert all(rows[i] == free[i] for i in range(40) if i not in endless)


# --- the tokens before a segment in a loss


def score(policy: Policy, starts: list[list[int]], side: list[list[int]]) -> list[float]:
    """Log-probabilities by the model alone, in float64."""
    found = []
    for start, ids in zip(starts, side, strict=True):
        with torch.no_grad():
            logp = policy.causal_lm(torch.tensor([start + ids])).logits[0, len(start) - 1 : -1].log_softmax(-1)
        found.append(float(logp.gather(1, torch.tensor(ids)[:, None]).sum()))
    return found


def test_tokens_before_a_segment_cancel_in_margins_but_not_in_means(make_policy: MakePolicy, world: World) -> None:
    """They are scored as part of the responses, and as part of the prompts."""
    policies = make_policy(), make_policy(seed=1)
    prompts, human = world.prompts[:60], world.human[:60]
    rows, _ = go(policies[0], prompts, human)
    cuts = [cut(response, 3, 1) for response in human]
    sides = [old.token_ids for old in human], [row.token_ids for row in rows]
    cut_sides = [[ids[len(parts.before) :] for ids, parts in zip(side, cuts, strict=True)] for side in sides]
    starts = [prompt.token_ids for prompt in prompts]
    longer = [start + parts.before for start, parts in zip(starts, cuts, strict=True)]
    assert sum(len(parts.before) for parts in cuts) > 100
    for compute, precision in ((Policy.score, 1e-4), (score, 1e-9)):
        if compute is score:
            for policy in policies:
                policy.model.double()
        policy, reference = (
            [
                PairLogps(*(torch.tensor(compute(each, before, side), dtype=torch.float64) for side in two))
                for before, two in ((starts, sides), (longer, cut_sides))
            ]
            for each in policies
        )
        gaps = [log_ratio_gap(*each) for each in zip(policy, reference, strict=True)]
        assert gaps[0].abs().mean() > 0.1
        assert torch.allclose(*gaps, rtol=0, atol=precision)
    one = torch.ones(60)
    losses = [
        OddsRatio()(two, two, Facts(one, one, one * 0, *(torch.tensor([len(ids) for ids in side]) for side in tokens)))
        for two, tokens in zip(policy, (sides, cut_sides), strict=True)
    ]
    with_tokens_before = torch.tensor([bool(parts.before) for parts in cuts])
    apart = (losses[0] - losses[1]).abs()
    assert (apart[with_tokens_before] > 1e-3).double().mean() > 0.9
    assert (apart[~with_tokens_before] < 1e-9).all()


# --- a real model


@pytest.mark.parametrize("length", [8, 256])
def test_a_real_model_on_real_responses(shared: Path, length: int) -> None:
    """stories260K on rasbt's instructions."""
    policy = load(str(shared / "models" / "stories260K"), None)
    lines = (shared / "data" / "sft_rasbt.jsonl").read_text().splitlines()[:16]
    prompts, human = [], []
    for number, row in enumerate(map(json.loads, lines)):
        prompt = Prompt(f"row-{number}", [{"role": "user", "content": row["prompt"]}], row["response"])
        prompt_ids, ids = encode(policy.tokenizer, prompt.messages, prompt.human, policy.stop_ids)
        prompts.append(replace(prompt, token_ids=prompt_ids))
        human.append(human_response(policy.tokenizer, prompt, ids, LIMIT))
    rows, counts = go(policy, prompts, human, length)
    assert counts == {"segments": 16, "redrawn": 0, "dropped": 0}
    check_rows(policy, human, rows, length, 1)
    if length == 256:
        assert rows == sample(policy, prompts, Ahead(batch_size=8), "policy@2", LIMIT, 1, Report())
    assert [row.token_ids for row in go(policy, prompts, human, length, batch_size=40)[0]] == [
        row.token_ids for row in rows
    ]
