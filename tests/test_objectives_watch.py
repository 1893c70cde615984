"""Quantities of objectives besides log-probabilities: confidence of an extrapolated policy, suspects, drift."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from dnpo.optimise.objective import Facts, PairLogps, hard, percentile
from dnpo.optimise.watch import (
    Drift,
    Moments,
    Seen,
    States,
    Suspects,
    Watch,
    extrapolated_logps,
    mean_by_sequence,
    measure_moments,
)
from dnpo.policy import logprobs
from dnpo.policy.logprobs import Head, sum_by_sequence
from dnpo.policy.packing import Packed, pack

WIDTH, ENTRIES = 8, 37
MakePolicy = Callable[..., Any]


def normal(*shape: int, seed: int) -> Tensor:
    """A float64 tensor from a separate generator."""
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def states(tokens: int, seed: int, cap: float = math.inf, scale: float = 1.0) -> States:
    """Hidden states and a head with a bias."""
    head = Head(normal(ENTRIES, WIDTH, seed=seed), normal(ENTRIES, seed=seed + 1), scale=scale, cap=cap)
    return States(normal(tokens, WIDTH, seed=seed + 2), head)


def logps_of(found: States) -> Tensor:
    """log softmax of all logits, at once."""
    return found.head.logits(found.hidden_NH).log_softmax(-1)


# --- extrapolation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 5, 37, 1000])
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize(("cap", "scale"), [(math.inf, 1.0), (2.0, 0.5)])
def test_extrapolation_against_whole_logits(
    tile: int, rows: int, cap: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every tile size, and also with bounded logits."""
    from dnpo.optimise import watch

    monkeypatch.setitem(logprobs.TILE, "cpu", tile)
    monkeypatch.setattr(watch, "ROWS", rows)
    policy, reference = states(11, 0, cap, scale), states(11, 10, cap, scale)
    target_N = torch.randint(ENTRIES, (11,), generator=Generator().manual_seed(3))
    for by in (0.0, 0.125, 0.5, 3.0):
        logits_NV = (1 + by) * policy.head.logits(policy.hidden_NH) - by * reference.head.logits(reference.hidden_NH)
        expected = logits_NV.log_softmax(-1).gather(1, target_N[:, None]).squeeze(1)
        found = extrapolated_logps(policy, reference, target_N, by)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_extrapolation_with_its_normalisation() -> None:
    """(1 + λ) log p_θ − λ log p_r − log Z, Z = Σ_v p_θ^(1+λ) p_r^−λ over the vocabulary, entry by entry."""
    policy, reference, by = states(6, 0), states(6, 10), 0.5
    target_N = torch.arange(6)
    found = extrapolated_logps(policy, reference, target_N, by).tolist()
    for logp_V, logr_V, target, value in zip(
        logps_of(policy).tolist(), logps_of(reference).tolist(), target_N.tolist(), found, strict=True
    ):
        z = sum(math.exp(logp) ** (1 + by) * math.exp(logr) ** -by for logp, logr in zip(logp_V, logr_V, strict=True))
        assert value == pytest.approx((1 + by) * logp_V[target] - by * logr_V[target] - math.log(z), rel=1e-12)


def test_without_extrapolation_it_is_the_policy() -> None:
    policy, target_N = states(6, 0), torch.arange(6)
    expected = logps_of(policy).gather(1, target_N[:, None]).squeeze(1)
    torch.testing.assert_close(extrapolated_logps(policy, states(6, 10), target_N, 0.0), expected)
    torch.testing.assert_close(extrapolated_logps(policy, policy, target_N, 7.0), expected)  # its own reference
    assert extrapolated_logps(states(0, 0), states(0, 1), torch.zeros(0, dtype=torch.long), 0.5).shape == (0,)


def test_extrapolation_never_makes_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products have the size of a tile, not of [tokens, vocabulary]."""
    from dnpo.policy import logprobs as module

    sizes = []
    plain = module.product

    def measured(one: Tensor, other: Tensor, **options: Any) -> Tensor:
        result = plain(one, other, **options)
        sizes.append(result.shape[1])
        return result

    monkeypatch.setattr(module, "product", measured)
    monkeypatch.setitem(logprobs.TILE, "cpu", 8)
    extrapolated_logps(states(6, 0), states(6, 10), torch.arange(6), 0.5)
    assert max(sizes) == 8
    assert sum(sizes) == 2 * ENTRIES


# --- suspects ---------------------------------------------------------------------------------------------------------


def seen(
    step: int,
    gaps: Sequence[float],
    policy: States | None = None,
    frozen: States | None = None,
    packed: Packed | None = None,
    numbers: Sequence[int] = (),
) -> Seen:
    """A micro-batch whose pairs have these gaps; the reference's log-probabilities are 0."""
    chosen_B = torch.tensor(list(gaps), dtype=torch.float64)
    zero_B = torch.zeros_like(chosen_B)
    empty: Any = packed
    none: Any = policy
    return Seen(step, numbers, empty, PairLogps(chosen_B, zero_B), PairLogps(zero_B, zero_B), none, frozen)


def known(count: int) -> Facts:
    return hard(torch.zeros(count, dtype=torch.float64))


def run(watch: Suspects, steps: Sequence[Sequence[Sequence[float]]], first: int = 0) -> list[list[float]]:
    """The suspects of every policy step, each a list of micro-batches of gaps."""
    found = []
    for number, step in enumerate(steps, first):
        row: list[float] = []
        for gaps in step:
            facts, _ = watch.measure(known(len(gaps)), seen(number, gaps))
            assert facts.suspect_B is not None
            row += facts.suspect_B.tolist()
        watch.end_step()
        found.append(row)
    return found


def test_suspects_by_hand() -> None:
    """The window holds 4 margins, and the threshold is the median confidence; confidence rises with the margin. Step 0
    has no threshold. At step 1 the threshold is (σ(1) + σ(2))/2, the median over margins 0 to 3: 1 is below it and 2 is
    not. At step 2 the window has the last four margins, 2, 3, 1, 2, with the median σ(2): only smaller margins are
    below it, so 2 is not."""
    watch = Suspects(1.0, 0.0, 0.5, 4, start=0)
    found = run(watch, [[[0.0, 1.0], [2.0, 3.0]], [[1.0, 2.0]], [[1.9, 2.0, 2.1]]])
    assert found == [[0.0, 0.0, 0.0, 0.0], [1.0, 0.0], [1.0, 0.0, 0.0]]
    assert watch.recent[0] == pytest.approx([1 / (1 + math.exp(-m)) for m in (2.0, 1.9, 2.0, 2.1)])


def test_the_threshold_does_not_depend_on_micro_batches() -> None:
    gaps = [normal(6, seed=step).tolist() for step in range(12)]
    expected = run(Suspects(0.3, 0.0, 0.2, 50, start=2), [[step] for step in gaps])
    for cut in (1, 4):
        pieces = [[step[i : i + cut] for i in range(0, 6, cut)] for step in gaps]
        assert run(Suspects(0.3, 0.0, 0.2, 50, start=2), pieces) == expected
    assert any(1.0 in row for row in expected)


def test_no_suspects_before_the_start_but_the_window_fills() -> None:
    watch = Suspects(1.0, 0.0, 1.0, 50, start=3)
    assert run(watch, [[[-1.0]]] * 3) == [[0.0]] * 3
    assert len(watch.recent[0]) == 3
    assert run(watch, [[[-2.0, 0.0]]], first=3) == [[1.0, 0.0]]


def test_about_the_set_share_is_suspect() -> None:
    """A tenth of pairs whose confidences do not change is suspect."""
    gaps = normal(2000, seed=1).tolist()
    found = run(Suspects(1.0, 0.0, 0.1, 50, start=1), [[gaps[i : i + 20]] for i in range(0, 2000, 20)])
    assert 0.08 < sum(map(sum, found)) / 1980 < 0.14


def test_a_killed_training_continues_with_the_same_suspects() -> None:
    gaps = [[normal(5, seed=step).tolist()] for step in range(20)]
    whole = run(Suspects(0.5, 0.0, 0.3, 17, start=1), gaps)
    before = Suspects(0.5, 0.0, 0.3, 17, start=1)
    found = run(before, gaps[:9])
    after = Suspects(0.5, 0.0, 0.3, 17, start=1)
    after.load_state_dict(before.state_dict())
    assert found + run(after, gaps[9:], first=9) == whole


def extrapolated(count: int, seed: int, by: float) -> tuple[Suspects, Seen, Tensor, Tensor]:
    """A watch, its view of ``count`` pairs, and by brute force the confidences of extrapolated and plain policy."""
    draw = torch.randint(2, 9, (2 * count,), generator=Generator().manual_seed(seed)).tolist()
    packed = pack([[1]] * (2 * count), [[2 + (7 * i) % (ENTRIES - 2) for i in range(length)] for length in draw])
    policy, frozen = states(sum(draw), seed), states(sum(draw), seed + 20)
    target_N1 = packed.target_N[:, None]
    lengths_S = torch.tensor(draw)
    logp_N, logr_N = (logps_of(found).gather(1, target_N1).squeeze(1) for found in (policy, frozen))
    mixed_NV = (1 + by) * logps_of(policy) - by * logps_of(frozen)
    mixed_N = mixed_NV.log_softmax(-1).gather(1, target_N1).squeeze(1)
    logp, logr, mixed = (PairLogps(*sum_by_sequence(x, lengths_S).chunk(2)) for x in (logp_N, logr_N, mixed_N))
    plain_B, far_B = (
        torch.sigmoid(0.1 * ((x.chosen_B - logr.chosen_B) - (x.rejected_B - logr.rejected_B))) for x in (logp, mixed)
    )
    watch = Suspects(0.1, by, 0.5, 1000, start=0)
    return watch, Seen(0, range(count), packed, logp, logr, policy, frozen), far_B, plain_B


def test_confidence_comes_from_the_extrapolated_policy() -> None:
    watch, what, far_B, plain_B = extrapolated(5, seed=0, by=0.5)
    _, metrics = watch.measure(known(5), what)
    torch.testing.assert_close(metrics["suspects/confidence"], far_B, rtol=1e-12, atol=0)
    watch.end_step()
    assert watch.recent == [pytest.approx(far_B.tolist()), pytest.approx(plain_B.tolist())]
    facts, metrics = watch.measure(known(5), what._replace(step=1))
    assert facts.suspect_B is not None
    assert facts.suspect_B.tolist() == (far_B < percentile(far_B.tolist(), 0.5)).double().tolist()
    too_B = (plain_B < percentile(plain_B.tolist(), 0.5)).double()
    assert metrics["suspects/share_plain"].tolist() == too_B.tolist()
    assert metrics["suspects/share_both"].tolist() == (too_B * facts.suspect_B).tolist()


def test_only_the_normalisation_can_change_an_order() -> None:
    """Without Z the extrapolated margin is (1 + λ) times the plain one."""
    by = 0.5
    _, what, far_B, plain_B = extrapolated(40, seed=4, by=by)
    assert what.frozen is not None
    parts = [logps_of(found) for found in (what.states, what.frozen)]
    log_z_N = ((1 + by) * parts[0] - by * parts[1]).logsumexp(-1)
    chosen_B, rejected_B = sum_by_sequence(log_z_N, what.packed.completions_S).chunk(2)
    expected = (1 + by) * plain_B.logit() - 0.1 * (chosen_B - rejected_B)
    torch.testing.assert_close(far_B.logit(), expected, rtol=1e-9, atol=1e-9)


# --- drift ------------------------------------------------------------------------------------------------------------


def test_means_by_sequence() -> None:
    value = normal(9, 3, seed=0).requires_grad_()
    found = mean_by_sequence(value, torch.tensor([4, 0, 5]))
    expected = torch.stack([value[:4].mean(0), torch.zeros(3, dtype=torch.float64), value[4:].mean(0)])
    torch.testing.assert_close(found, expected)
    (grad,) = torch.autograd.grad((found * normal(3, 3, seed=1)).sum(), value, retain_graph=True)
    (right,) = torch.autograd.grad((expected * normal(3, 3, seed=1)).sum(), value)
    torch.testing.assert_close(grad, right)
    assert mean_by_sequence(value.detach().bfloat16(), torch.tensor([9])).dtype == torch.float32


def test_moments_by_brute_force() -> None:
    """Means of each response and variances over all tokens, for any batches in any order."""
    lengths = [4, 1, 7, 3, 5]
    hidden = [normal(length, 3, seed=length) for length in lengths]
    packs = {i: pack([[1]], [[2] * length]) for i, length in enumerate(lengths)}

    def states_of(packed: Packed) -> Tensor:
        return torch.cat([hidden[lengths.index(length)] for length in packed.completions])

    for batches in ([[3, 1], [0, 4, 2]], [[0], [1], [2], [3], [4]]):
        packed = [(some, pack([[1]] * len(some), [[2] * lengths[i] for i in some])) for some in batches]
        found = measure_moments(states_of, packed, 5)
        torch.testing.assert_close(found.mean_PH, torch.stack([h.mean(0) for h in hidden]))
        torch.testing.assert_close(found.variance_H, torch.cat(hidden).var(0, unbiased=False))
    assert len(packs) == 5
    missing = measure_moments(states_of, [([2], packs[2])], 4)
    assert missing.mean_PH[[0, 1, 3]].abs().max() == 0


def test_drift_reads_the_chosen_responses_alone() -> None:
    lengths = [3, 5, 2, 4]  # two chosen, two rejected
    packed = pack([[1]] * 4, [[2] * length for length in lengths])
    policy = States(normal(14, WIDTH, seed=0).requires_grad_(), states(1, 0).head)
    moments = Moments(normal(6, WIDTH, seed=1), normal(WIDTH, seed=2).square())
    watch = Drift()
    watch.prepare(moments)
    facts, metrics = watch.measure(known(2), seen(0, [0.0, 0.0], policy, packed=packed, numbers=(4, 1)))
    means = torch.stack([policy.hidden_NH[:3].mean(0), policy.hidden_NH[3:8].mean(0)])
    expected = ((means - moments.mean_PH[[4, 1]]) ** 2 / moments.variance_H).mean(-1)
    assert facts.drift_B is not None
    torch.testing.assert_close(facts.drift_B, expected)
    assert torch.equal(metrics["drift/states"], facts.drift_B.detach())
    (grad,) = torch.autograd.grad(facts.drift_B.sum(), policy.hidden_NH)
    assert bool((grad[:8] != 0).all())
    assert float(grad[8:].abs().max()) == 0.0


def test_a_watch_that_does_nothing() -> None:
    facts = known(2)
    watch = Watch()
    assert watch.measure(facts, seen(0, [0.0, 1.0])) == (facts, {})
    watch.end_step()
    assert watch.state_dict() == {}
