"""Win, tie or loss: counts and intervals against brute force, and duels under real judges of every kind."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from dnpo.errors import DataError
from dnpo.judges.asked.hf import HF
from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.ensemble import Ensemble
from dnpo.judges.exact.rules import Rules
from dnpo.judges.longer import Longer
from dnpo.records import Prompt, Response
from dnpo.stages.duels import Duel, Responses, judge_duels, outcome, read_duels, write_duels
from dnpo.stats.significance import mcnemar_clustered
from dnpo.stats.wins import preferences, wins
from tests.conftest import Report, World, verdicts
from tests.test_hf_judge import saved

# --- counting


def test_the_example_of_the_docstring() -> None:
    found = wins([80, 70, None, 60], [70, 70, 70, 90], resamples=100)
    assert [found.win.value, found.tie.value, found.lose.value, found.rate.value] == pytest.approx([1 / 3] * 3 + [0.5])
    assert (found.duels, found.unscored, found.prompts) == (3, 1, 3)
    assert found.notes == ("1 of 4 duels lack a score and are left out",)


def drawn(seed: int, prompts: int = 30, samples: int = 4) -> tuple[list[Any], list[Any], list[str]]:
    """Scores of both sides; samples of one prompt are similar, and some have no score."""
    rng = np.random.default_rng(seed)
    ease = rng.normal(0, 12, prompts).repeat(samples)
    ours = (60 + ease + rng.normal(0, 6, prompts * samples)).round(-1)
    theirs = (58 + rng.normal(0, 6, prompts * samples)).round(-1)
    kept = [None if rng.random() < 0.1 else float(value) for value in ours]
    return kept, theirs.tolist(), [f"p{i}" for i in range(prompts) for _ in range(samples)]


def test_counts_and_intervals_equal_a_plain_loops() -> None:
    ours, theirs, prompts = drawn(0)
    found = wins(ours, theirs, prompts, resamples=8000)
    by_prompt: dict[str, list[int]] = {}
    for a, b, p in zip(ours, theirs, prompts, strict=True):
        if a is not None:
            by_prompt.setdefault(p, []).append((a > b) - (a < b))
    every = [d for some in by_prompt.values() for d in some]
    for name, sign in (("win", 1), ("tie", 0), ("lose", -1)):
        assert getattr(found, name).value == pytest.approx(every.count(sign) / len(every))
    assert found.rate.value == pytest.approx(found.win.value + found.tie.value / 2)
    assert (found.duels, found.unscored) == (len(every), ours.count(None))
    rng, rates = np.random.default_rng(1), []
    names = list(by_prompt)
    for _ in range(4000):
        some = [d for i in rng.integers(0, len(names), len(names)) for d in by_prompt[names[i]]]
        rates.append(np.mean([(d + 1) / 2 for d in some]))
    low, high = np.percentile(rates, [2.5, 97.5])
    assert (found.rate.low, found.rate.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
    assert found.p == mcnemar_clustered(np.array([[sum(some) for some in by_prompt.values()]]))


def test_samples_of_one_prompt_are_not_independent() -> None:
    ours, theirs, prompts = drawn(2, samples=1)
    once = wins(ours, theirs, prompts)
    often = wins(ours * 5, theirs * 5, prompts * 5)
    assert often.rate.half == pytest.approx(once.rate.half)
    naive = wins(ours * 5, theirs * 5)
    assert once.rate.half is not None
    assert naive.rate.half is not None
    assert naive.rate.half < 0.6 * once.rate.half


def test_intervals_contain_the_truth_as_often_as_stated() -> None:
    """60 different prompts with three duels each; the true win rate is that of the population."""
    rng, held = np.random.default_rng(3), 0
    truth = 0.55
    for seed in range(300):
        chance = rng.beta(1.1, 0.9, 60)  # mean 0.55
        won = (rng.random((60, 3)) < chance[:, None]).astype(float).ravel()
        found = wins(won.tolist(), [0.5] * 180, [i for i in range(60) for _ in range(3)], seed=seed, resamples=400)
        assert found.rate.low is not None
        assert found.rate.high is not None
        held += found.rate.low <= truth <= found.rate.high
    assert 0.90 <= held / 300 <= 0.98


def test_p_is_the_sign_test_where_every_prompt_has_one_duel() -> None:
    ours, theirs, prompts = drawn(4, prompts=60, samples=1)
    signs = [(a > b) - (a < b) for a, b in zip(ours, theirs, strict=True) if a is not None]
    won, lost = signs.count(1), signs.count(-1)
    assert wins(ours, theirs, prompts).p == pytest.approx(binomtest(won, won + lost).pvalue)


def test_a_side_against_itself_is_all_ties() -> None:
    found = wins([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (found.tie.value, found.rate.value, found.p) == (1.0, 0.5, 1.0)
    assert found.notes == ("all duels have the same outcome, so the interval has no width; that is not certainty",)


def test_sides_that_cannot_be_compared_are_refused() -> None:
    assert preferences([1, 2, None, float("nan")], [2, 2, 3, 4]) == [0.0, 0.5, None, None]
    with pytest.raises(DataError, match=r"a score on both sides; there are 2 and 1"):
        wins([1, 2], [1])
    with pytest.raises(DataError, match=r"2 duels have 1 prompts"):
        wins([1, 2], [1, 3], ["p"])
    with pytest.raises(DataError, match=r"none of 1 duels has a score on both sides"):
        wins([None], [1])
    with pytest.raises(DataError, match=r"scores must be numbers"):
        wins(["good"], [1])  # type: ignore[list-item]
    alone = wins([1, 3], [2, 2], ["p", "p"])
    assert (alone.rate.low, alone.notes) == (None, ("one prompt: no interval",))


# --- judging

COUNT, SAMPLES = 6, 2


def sides(world: World) -> tuple[list[Prompt], Responses, Responses]:
    """Human responses to the same and to other prompts, as samples of two models; the first samples are equal."""
    prompts = world.prompts[:COUNT]
    keys = [(p.id, n) for n in range(SAMPLES) for p in prompts]
    ours = {key: _said(key, world.human[i // 2].text) for i, key in enumerate(keys)}
    theirs = {key: _said(key, world.human[i].text) for i, key in enumerate(keys)}
    return list(prompts), ours, theirs


def _said(key: tuple[str, int], text: str) -> Response:
    return Response(f"{key[0]}#{key[1]}", "policy@0", text, [1], 1, "eos")


def fight(judge: Any, world: World, folder: Path, swap: bool = False) -> list[Duel]:
    prompts, ours, theirs = sides(world)
    if swap:
        ours, theirs = theirs, ours
    with Ledger(folder / "ledger.sqlite") as ledger:
        return judge_duels(judge, prompts, ours, theirs, ledger, Report())


def test_duels_under_a_judge_that_scores_each_response_alone(world: World, tmp_path: Path) -> None:
    found = fight(Rules(), world, tmp_path)
    prompts, ours, theirs = sides(world)
    assert [(d.id, d.sample) for d in found] == list(ours)
    of = {p.id: p for p in prompts}
    for side, scores in ((ours, [d.ours_score for d in found]), (theirs, [d.theirs_score for d in found])):
        alone = [verdicts(Rules(), [of[key[0]]], [replace(r, id=key[0])])[0].score for key, r in side.items()]
        assert scores == alone
    assert [d.preference for d in found] == preferences([d.ours_score for d in found], [d.theirs_score for d in found])
    assert len({d.preference for d in found}) == 3, "wins, ties and losses are all there"
    assert [d.difference for d in found] == [len(d.ours) - len(d.theirs) for d in found]
    back = fight(Rules(), world, tmp_path, swap=True)
    assert [d.preference for d in back] == [1 - d.preference for d in found if d.preference is not None]


def test_duels_under_a_judge_that_compares(world: World, tmp_path: Path) -> None:
    """The other side is put in place of the human response; both orders are asked; swapped sides get 100 − score."""
    judge = HF(path=str(saved(tmp_path / "model")), mode="pairwise", min_mass=0.0, device="cpu")
    found = fight(judge, world, tmp_path)
    prompts, ours, theirs = sides(world)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        different = len({(d.id, d.ours, d.theirs) for d in found if d.ours != d.theirs})
        assert ledger.rows()[0]["calls"] == 2 * different
        for duel in found:
            prompt = next(p for p in prompts if p.id == duel.id)
            against = replace(prompt, human=theirs[duel.id, duel.sample].text)
            alone = replace(ours[duel.id, duel.sample], id=duel.id)
            (verdict,) = judge([against], [alone], ledger, Report())
            assert duel.ours_score == verdict.score
            assert duel.disagreement == verdict.disagreement
        assert ledger.rows()[0]["calls"] == 2 * different, "and these were the questions that had been asked"
    assert {d.theirs_score for d in found} == {50.0}
    same = [d for d in found if d.ours == d.theirs]
    assert same
    assert all(d.preference == 0.5 for d in same)
    assert len({d.preference for d in found}) > 1
    back = fight(judge, world, tmp_path, swap=True)
    assert [d.ours_score for d in back] == pytest.approx(
        [100 - d.ours_score for d in found if d.ours_score is not None]
    )
    assert outcome(found, False, 0).apart == pytest.approx(np.mean([d.disagreement for d in found if d.disagreement]))


def test_duels_under_a_majority_of_judges(world: World, tmp_path: Path) -> None:
    judge = Ensemble(members={"rules": Rules(), "longer": Longer()}, by="majority")
    found = fight(judge, world, tmp_path)
    apart = [fight(one, world, tmp_path) for one in (Rules(), Longer())]
    for duel, rules, longer in zip(found, *apart, strict=True):
        assert rules.preference is not None
        assert longer.preference is not None
        assert duel.ours_score == 50 * (rules.preference + longer.preference)
        assert duel.theirs_score == 50.0


def test_a_response_without_a_score_is_left_out(world: World, tmp_path: Path) -> None:
    """A judge whose context is too short for any question, and one that may leave half of all unscored."""
    short = HF(path=str(saved(tmp_path / "model", context=64)), min_mass=0.0, max_unscored=1.0, device="cpu")
    found = fight(short, world, tmp_path)
    assert all(d.preference is None and "longer than the judge's context" in d.reason for d in found)
    with pytest.raises(DataError, match="none of 12 duels has a score on both sides"):
        outcome(found, False, 0)
    scored = fight(Rules(), world, tmp_path)
    told = outcome([*scored[1:], replace(scored[0], ours_score=None, preference=None)], False, 0)
    assert (told.wins.duels, told.wins.unscored) == (11, 1)
    assert told.metrics()["duels/unscored"] == 1


def test_only_common_prompts_are_compared(world: World, tmp_path: Path) -> None:
    prompts, ours, theirs = sides(world)
    fewer = {key: text for key, text in theirs.items() if key[0] != prompts[2].id}
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        found = judge_duels(Rules(), prompts, ours, fewer, ledger, Report())
        assert {d.id for d in found} == {p.id for p in prompts} - {prompts[2].id}
        with pytest.raises(DataError, match="share no prompt"):
            judge_duels(Rules(), prompts, ours, {}, ledger, Report())


def test_duels_are_saved_and_read_unchanged(world: World, tmp_path: Path) -> None:
    found = fight(Rules(), world, tmp_path)
    rows = [*found, replace(found[0], ours_score=None, preference=None, reason="no reply")]
    write_duels(tmp_path / "duels.parquet", rows)
    assert read_duels(tmp_path / "duels.parquet") == rows


def test_responses_of_equal_length_under_the_length_judge(world: World, tmp_path: Path) -> None:
    """Under the length judge such responses have no result; this is not an error."""
    told = outcome(fight(Longer(), world, tmp_path), True, 0)
    assert told.controlled is None
    assert told.why.startswith("length alone decides all 12 duels")
    assert "duels/rate_same_length" not in told.metrics()
    rows = [
        replace(duel, id=str(i), difference=d, preference=p, ours_score=50 + p, theirs_score=50.5)
        for i, (duel, d, p) in enumerate(
            zip(
                fight(Rules(), world, tmp_path),
                [10] * 8 + [-10] * 4,
                [1.0] * 6 + [0.0] * 2 + [1.0] + [0.0] * 3,
                strict=True,
            )
        )
    ]
    told = outcome(rows, True, 0)
    assert told.controlled is not None
    assert told.metrics()["duels/rate"] == pytest.approx(7 / 12)
    assert told.metrics()["duels/rate_same_length"] == pytest.approx(0.5)
