"""Dynamic sample labelling: equation 2 of the DNPO paper, and the treatment of pairs that cannot be labelled."""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest

from dnpo.dsl import (
    REASONS,
    Best,
    BestWorst,
    Candidate,
    FirstTwo,
    HigherScoreChosen,
    HumanChosen,
    Labelled,
    Labeller,
    Labels,
    RandomPairs,
    Ranked,
    RewardStrength,
    Right,
    explain,
    label,
    summarise,
)
from dnpo.dsl.strength import with_strengths
from dnpo.errors import DataError, SettingsError
from dnpo.records import HUMAN, Pair, Prompt, Response, Verdict
from dnpo.settings import check

SOURCE = "policy@3"


def prompt(name: str) -> Prompt:
    """A prompt with this id."""
    return Prompt(name, [{"role": "user", "content": f"ask {name}"}], f"human {name}", token_ids=[1, len(name), 9])


def human(name: str, ids: list[int] | None = None) -> Response:
    """The human response to it."""
    return Response(name, HUMAN, f"human {name}", ids or [10, 11, 2], 3, "eos")


def generated(name: str, ids: list[int] | None = None) -> Response:
    """A generated response."""
    return Response(name, SOURCE, f"generated {name}", ids or [20, 21], 2, "length", logprob=-3.5)


def verdicts(name: str, s: float | None, s_new: float | None) -> list[Verdict]:
    """The verdicts on both, s and s′."""
    return [Verdict(name, HUMAN, s, "r"), Verdict(name, SOURCE, s_new, "r")]


def one(s: float | None, s_new: float | None, labeller: Labeller | None = None) -> Labels:
    """The labels of a single pair with these scores."""
    labeller = labeller or HigherScoreChosen()
    return label(labeller, [prompt("a")], [human("a")], [generated("a")], verdicts("a", s, s_new), 3)


HUMAN_CHOSEN = Pair(
    id="a",
    messages=[{"role": "user", "content": "ask a"}],
    prompt_ids=[1, 1, 9],
    chosen="human a",
    rejected="generated a",
    chosen_ids=[10, 11, 2],
    rejected_ids=[20, 21],
    chosen_source=HUMAN,
    rejected_source=SOURCE,
    chosen_score=80.0,
    rejected_score=40.0,
    flipped=False,
    iteration=3,
)
GENERATED_CHOSEN = Pair(
    id="a",
    messages=[{"role": "user", "content": "ask a"}],
    prompt_ids=[1, 1, 9],
    chosen="generated a",
    rejected="human a",
    chosen_ids=[20, 21],
    rejected_ids=[10, 11, 2],
    chosen_source=SOURCE,
    rejected_source=HUMAN,
    chosen_score=80.0,
    rejected_score=40.0,
    flipped=True,
    iteration=3,
)


def test_a_higher_human_score_makes_the_human_response_chosen() -> None:
    """Every field of the pair comes from the right side when the human response is the better one."""
    assert one(80.0, 40.0) == ([HUMAN_CHOSEN], {"pairs": 1, "flipped": 0, "identical": 0, "unscored": 0})


def test_a_higher_generated_score_flips_the_pair() -> None:
    """Every field of the pair comes from the right side when the generated response is the better one."""
    assert one(40.0, 80.0) == ([GENERATED_CHOSEN], {"pairs": 1, "flipped": 1, "identical": 0, "unscored": 0})


def test_tie_keeps_the_human_response() -> None:
    """s = s′ belongs to the human side in equation 2."""
    pairs, counts = one(55.0, 55.0)
    assert [p.chosen_source for p in pairs] == [HUMAN]
    assert counts["flipped"] == 0


def test_equation_2_over_a_grid() -> None:
    """(y⁺, y⁻) = (y, y′) if and only if s ≥ s′; neighbouring floats and scores of zero included."""
    grid = [0.0, 1e-9, 15.0, 40.0, 40.00000000000001, 75.0, 99.99999999999999, 100.0]
    for s, s_new in itertools.product(grid, grid):
        (pair,), counts = one(s, s_new)
        expected = (HUMAN, SOURCE, s, s_new) if s >= s_new else (SOURCE, HUMAN, s_new, s)
        assert (pair.chosen_source, pair.rejected_source, pair.chosen_score, pair.rejected_score) == expected
        assert pair.chosen_score >= pair.rejected_score
        assert pair.flipped is (s < s_new)
        assert counts["flipped"] == (s < s_new)


@pytest.mark.parametrize(("s", "s_new"), [(None, 0.0), (100.0, None), (None, None), (0.0, None), (None, 100.0)])
def test_missing_score_is_dropped_and_counted(s: float | None, s_new: float | None) -> None:
    """A failed judgement carries no information: the pair gets no label, not even one for the human response."""
    assert one(s, s_new) == ([], {"pairs": 0, "flipped": 0, "identical": 0, "unscored": 1})


@pytest.mark.parametrize("known", [[], [Verdict("a", HUMAN, 90.0)], [Verdict("a", SOURCE, 90.0)]])
def test_missing_verdict_is_like_a_missing_score(known: list[Verdict]) -> None:
    """A missing verdict is counted in the same way and is not an error."""
    pairs, counts = label(HigherScoreChosen(), [prompt("a")], [human("a")], [generated("a")], known)
    assert pairs == []
    assert counts == {"pairs": 0, "flipped": 0, "identical": 0, "unscored": 1}


def test_verdict_of_another_source_does_not_count() -> None:
    """The score of an earlier policy's response must not be used for this policy's response."""
    stale = [Verdict("a", HUMAN, 50.0), Verdict("a", "policy@2", 100.0), Verdict("b", SOURCE, 100.0)]
    _, counts = label(HigherScoreChosen(), [prompt("a")], [human("a")], [generated("a")], stale)
    assert counts["unscored"] == 1


@pytest.mark.parametrize("labeller", [HigherScoreChosen(), HumanChosen()])
@pytest.mark.parametrize("scores", [(80.0, 40.0), (40.0, 80.0), (None, None)])
def test_identical_pairs_are_dropped_and_counted(labeller: Labeller, scores: tuple[float | None, float | None]) -> None:
    """Pairs with equal token ids have no gradient; they count as identical with any scores, not as unscored."""
    same = [7, 8, 2]
    pairs, counts = label(
        labeller, [prompt("a")], [human("a", same)], [generated("a", list(same))], verdicts("a", *scores)
    )
    assert pairs == []
    assert counts == {"pairs": 0, "flipped": 0, "identical": 1, "unscored": 0}
    assert summarise(counts) == "0 pairs, 1 identical"


def test_responses_with_a_common_beginning_are_kept() -> None:
    """A response cut at the limit is not the whole response, though its text may look the same."""
    pairs, counts = label(
        HigherScoreChosen(), [prompt("a")], [human("a", [7, 8, 2])], [generated("a", [7, 8])], verdicts("a", 1.0, 1.0)
    )
    assert counts["identical"] == 0
    assert len(pairs) == 1


@pytest.mark.parametrize("s", [None, 0.0, 50.0, 100.0])
@pytest.mark.parametrize("s_new", [None, 0.0, 50.0, 100.0])
def test_human_chosen_ignores_scores(s: float | None, s_new: float | None) -> None:
    """SPIN labels by origin; existing scores are kept for the report but do not decide."""
    (pair,), counts = one(s, s_new, HumanChosen())
    assert (pair.chosen_source, pair.rejected_source, pair.flipped) == (HUMAN, SOURCE, False)
    assert (pair.chosen_score, pair.rejected_score) == (s, s_new)
    assert counts == {"pairs": 1, "flipped": 0, "identical": 0, "unscored": 0}


def test_needs_scores() -> None:
    """The declarations of the labellers decide whether the judge is asked."""
    assert HigherScoreChosen.needs_scores
    assert not HumanChosen.needs_scores


def test_the_labellers_decision() -> None:
    """A labeller chooses the generated response, the human one, the human one on a tie, or none."""
    decide = HigherScoreChosen()
    answers = []
    for old, new in ((1, 2), (2, 1), (1, 1), (None, 1)):
        pairs = decide(prompt("a"), [Candidate(human("a"), old), Candidate(generated("a"), new)])
        answers.append([pair.chosen.response.source for pair in pairs])
    assert answers == [[SOURCE], [HUMAN], [HUMAN], []]


def test_many_rows_keep_the_order_of_generated_and_are_matched_by_id() -> None:
    """Rows come in any order, and some have no generated response; each pair still has the matching responses."""
    names = ["d", "bbb", "aa", "cccc", "e"]
    scores = {"aa": (10.0, 20.0), "bbb": (20.0, 10.0), "cccc": (None, 1.0), "d": (5.0, 5.0), "e": (1.0, 2.0)}
    said = [v for name in reversed(names) for v in verdicts(name, *scores[name])]
    new = [generated(name, [10, 11, 2] if name == "e" else None) for name in names]
    pairs, counts = label(
        HigherScoreChosen(),
        [prompt(name) for name in sorted([*names, "unasked"])],
        [human(name) for name in sorted([*names, "unasked"], reverse=True)],
        new,
        said,
    )
    assert [p.id for p in pairs] == ["d", "bbb", "aa"]
    assert counts == {"pairs": 3, "flipped": 1, "identical": 1, "unscored": 1}
    assert sum(counts.values()) - counts["flipped"] == len(new)
    for pair in pairs:
        assert pair.messages == [{"role": "user", "content": f"ask {pair.id}"}]
        assert pair.prompt_ids == [1, len(pair.id), 9]
        assert {pair.chosen, pair.rejected} == {f"human {pair.id}", f"generated {pair.id}"}
        assert {pair.chosen_score, pair.rejected_score} == set(scores[pair.id])


MISSING = [(None, 0.0), (100.0, None), (None, None)]


@pytest.mark.parametrize(("s", "s_new"), MISSING)
def test_unscored_pairs_can_choose_the_human_response(s: float | None, s_new: float | None) -> None:
    """The human response is chosen, as in SPIN, with its known score; the pair is kept and counts as unscored."""
    (pair,), counts = one(s, s_new, HigherScoreChosen(unscored="keep_human"))
    assert (pair.chosen_source, pair.rejected_source, pair.flipped) == (HUMAN, SOURCE, False)
    assert (pair.chosen_score, pair.rejected_score) == (s, s_new)
    assert counts == {"pairs": 1, "flipped": 0, "identical": 0, "unscored": 1}


@pytest.mark.parametrize(("s", "s_new"), MISSING)
def test_unscored_pairs_can_end_the_run(s: float | None, s_new: float | None) -> None:
    """The message names the setting, the row and which side it is."""
    side = "human" if s is None else "generated"
    with pytest.raises(
        DataError, match=rf"^dsl\.unscored=fail: the {side} response to a has no score; drop .*keep_human"
    ):
        one(s, s_new, HigherScoreChosen(unscored="fail"))


@pytest.mark.parametrize("unscored", ["drop", "keep_human", "fail"])
def test_scored_pairs_do_not_depend_on_the_setting_for_unscored_ones(unscored: str) -> None:
    """The same holds for identical pairs, which are detected first: they need no score."""
    labeller = HigherScoreChosen(unscored=unscored)  # type: ignore[arg-type]
    assert one(80.0, 40.0, labeller)[0] == [HUMAN_CHOSEN]
    assert one(40.0, 80.0, labeller)[0] == [GENERATED_CHOSEN]
    same = [7, 8, 2]
    found = label(labeller, [prompt("a")], [human("a", same)], [generated("a", same)], [])
    assert found == ([], {"pairs": 0, "flipped": 0, "identical": 1, "unscored": 0})


@pytest.mark.parametrize(("unscored", "pairs"), [("drop", 2), ("keep_human", 4)])
def test_counts_of_several_rows(unscored: str, pairs: int) -> None:
    """Five rows: one each way, two without a score, one identical; dropped rows are removed and counted once."""
    names = ["aa", "b", "ccc", "dddd", "e"]
    scores = {"aa": (1.0, 2.0), "b": (2.0, 1.0), "ccc": (None, 1.0), "dddd": (1.0, None), "e": (None, None)}
    said = [v for name in names for v in verdicts(name, *scores[name])]
    new = [generated(name, [10, 11, 2] if name == "e" else None) for name in names]
    labeller = HigherScoreChosen(unscored=unscored)  # type: ignore[arg-type]
    found, counts = label(labeller, [prompt(n) for n in names], [human(n) for n in names], new, said)
    assert counts == {"pairs": pairs, "flipped": 1, "identical": 1, "unscored": 2}
    assert [p.id for p in found] == names[:pairs]
    assert [p.flipped for p in found] == [True, False, False, False][:pairs]


def test_labels_by_origin_have_no_unscored_pairs() -> None:
    """No judge was asked, so no judge failed."""
    assert one(None, None, HumanChosen())[1]["unscored"] == 0


def test_the_setting_for_unscored_pairs_has_three_values() -> None:
    """The value is checked before anything is computed."""
    target = {"_target_": "dnpo.dsl.HigherScoreChosen"}
    assert check("dsl", target) == target
    with pytest.raises(SettingsError, match=r"^dsl\.unscored='keep': .*'drop', 'keep_human' or 'fail'"):
        check("dsl", {**target, "unscored": "keep"})


def test_the_reasons_for_having_no_pair_are_reported() -> None:
    """The message has the number of each kind and the setting that would help."""
    counts = {"pairs": 0, "flipped": 0, "identical": 1200, "unscored": 3}
    text = explain(counts, HigherScoreChosen())
    assert "1,200 responses are identical" in text
    assert "generate.temperature" in text
    assert "3 responses lack a score" in text
    assert "dsl.unscored=keep_human" in text
    none = {**counts, "identical": 0, "unscored": 0}
    assert explain(none, HigherScoreChosen()) == "the labeller (dsl=…) has dropped all of them"


@pytest.mark.parametrize("labeller", [Best(), Right(), BestWorst(), Ranked(), RandomPairs(), FirstTwo()])
def test_advice_names_only_settings_of_the_labeller(labeller: Labeller) -> None:
    counts = labels_of(labeller, [None, None]).counts
    text = explain(counts, labeller)
    assert "2 responses lack a score" in text
    given = re.findall(r"dsl\.(\w+)", text)
    assert set(given) <= {field.name for field in dataclasses.fields(labeller)}  # type: ignore[arg-type]


# --- rules over several samples


def sample(number: int, score: float | None, ids: list[int] | None = None) -> tuple[Response, Verdict]:
    """A sample of the prompt ``a`` with its verdict."""
    response = Response("a", SOURCE, f"sample {number}", ids or [30, number], 2, "eos", sample=number)
    return response, Verdict("a", SOURCE, score, sample=number)


def labels_of(labeller: Labeller, scores: list[float | None], ids: list[list[int]] | None = None) -> Labels:
    """The labels of one prompt whose samples have these scores."""
    rows = [sample(n, score, None if ids is None else ids[n]) for n, score in enumerate(scores)]
    return label(labeller, [prompt("a")], [human("a")], [r for r, _ in rows], [v for _, v in rows])


def sides(found: Labels) -> list[tuple[int, int]]:
    """The numbers of the chosen and the rejected sample of each pair."""
    return [(pair.chosen_sample, pair.rejected_sample) for pair in found.pairs]


def test_samples_of_a_prompt_keep_their_own_scores() -> None:
    """Keyed by id, source and sample: by id and source alone the last would count for all."""
    found = labels_of(HigherScoreChosen(), [10.0, 90.0])  # the human response has no verdict
    assert found.counts["unscored"] == 2
    rows = [sample(n, score) for n, score in enumerate([10.0, 90.0])]
    known = [Verdict("a", HUMAN, 50.0), *(v for _, v in rows)]
    pairs, counts = label(HigherScoreChosen(), [prompt("a")], [human("a")], [r for r, _ in rows], known)
    assert [pair.flipped for pair in pairs] == [False, True]
    assert [(pair.chosen_score, pair.rejected_score) for pair in pairs] == [(50.0, 10.0), (90.0, 50.0)]
    assert counts["pairs"] == 2


def test_rules_by_worked_examples() -> None:
    scores = [50.0, 90.0, 10.0, 70.0, 30.0]
    assert sides(labels_of(BestWorst(), scores)) == [(1, 2)]
    assert sides(labels_of(BestWorst(loser_rank=2), scores)) == [(1, 4)]
    assert sides(labels_of(BestWorst(loser_rank=9), scores)) == [(1, 3)], "the one after the best"
    assert sides(labels_of(Ranked(), scores)) == [(1, 2), (3, 4)], "the middle one of five is left out"
    assert sides(labels_of(FirstTwo(), [1.0, 2.0, 9.0])) == [(1, 0)]
    assert sides(labels_of(FirstTwo(), [2.0, 2.0])) == [(1, 0)], "a probability of one half chooses the second"
    alone = labels_of(Best(), scores)
    assert [(pair.chosen_sample, pair.rejected_source, pair.rejected_ids) for pair in alone.pairs] == [(1, "", [])]
    right = labels_of(Right(cap=0), [100.0, 0.0, 100.0, 99.0])
    assert [pair.chosen_sample for pair in right.pairs] == [0, 2]
    assert (right.counts["pass_at_1"], right.counts["pass_at_4"]) == (0.5, 1.0)


@pytest.mark.parametrize("labeller", [BestWorst(), Ranked(), RandomPairs()])
def test_equal_scores_make_no_pair_and_are_counted(labeller: Labeller) -> None:
    found = labels_of(labeller, [50.0, 50.0, 50.0])
    assert found.pairs == []
    assert found.counts["tied"] == 1


@pytest.mark.parametrize("labeller", [BestWorst(), Ranked(), RandomPairs(), FirstTwo(), Right()])
def test_a_prompt_without_scores_to_compare_is_only_counted_as_unscored(labeller: Labeller) -> None:
    found = labels_of(labeller, [None, *[50.0] * (labeller.fewest - 1)])
    assert found.pairs == []
    assert {name: found.counts[name] for name in REASONS if found.counts.get(name)} == {"unscored": 1}


def test_a_labeller_is_never_called_without_responses() -> None:
    """A prompt whose only sample equals the human response is counted, but makes no pair."""

    class Counts(HumanChosen):
        def __call__(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Labelled]:
            assert len(candidates) == 2
            return super().__call__(prompt, candidates)

    same = label(Counts(), [prompt("a")], [human("a", [7, 2])], [generated("a", [7, 2])], [])
    assert (same.pairs, same.counts["identical"]) == ([], 1)
    assert len(label(Counts(), [prompt("a")], [human("a")], [generated("a")], []).pairs) == 1


@pytest.mark.parametrize("labeller", [BestWorst(), Ranked(), RandomPairs(), FirstTwo()])
def test_equal_samples_are_one_candidate(labeller: Labeller) -> None:
    found = labels_of(labeller, [50.0, 60.0, 50.0], [[1, 2], [1, 2], [1, 2]])
    assert found.pairs == []
    assert (found.counts["repeated"], found.counts["identical"]) == (2, 1)
    assert "identical" in explain(found.counts, labeller)


def test_random_pairs_use_each_sample_once_and_choose_the_better() -> None:
    scores = [float(n) for n in range(7)]
    found = labels_of(RandomPairs(seed=1), scores)
    used = [number for pair in sides(found) for number in pair]
    assert len(found.pairs) == 3
    assert len(set(used)) == 6
    assert all(chosen > rejected for chosen, rejected in sides(found))
    assert sides(found) == sides(labels_of(RandomPairs(seed=1), scores))
    assert any(sides(found) != sides(labels_of(RandomPairs(seed=seed), scores)) for seed in range(2, 9))


def test_the_limit_on_pairs_draws_by_the_seed() -> None:
    drawn = [sorted(p.chosen_sample for p in labels_of(Right(cap=2, seed=s), [100.0] * 6).pairs) for s in range(9)]
    assert all(len(numbers) == 2 for numbers in drawn)
    assert len({tuple(numbers) for numbers in drawn}) > 1


def test_prompts_without_a_right_answer_are_counted_and_reported() -> None:
    found = labels_of(Right(), [0.0, 50.0])
    assert found.counts["wrong"] == 1
    assert "1 prompts have no right answer" in explain(found.counts, Right())
    assert "pass@2 is 0 in this iteration" in explain(found.counts, Right())


def test_a_strength_below_one_half_swaps_the_pair() -> None:
    """p L(y⁺, y⁻) + (1 − p) L(y⁻, y⁺) is the same loss for the swapped pair with 1 − p."""
    pairs = labels_of(BestWorst(), [50.0, 90.0]).pairs
    (sure,), (turned,) = with_strengths(pairs, [0.8]), with_strengths(pairs, [0.3])
    assert (sure.chosen_sample, sure.strength) == (1, 0.8)
    assert (turned.chosen_sample, turned.rejected_sample, turned.strength) == (0, 1, 0.7)
    assert (turned.chosen_ids, turned.rejected_score) == (pairs[0].rejected_ids, 90.0)


def test_implicit_strength_is_the_sigmoid_of_the_rewards_difference() -> None:
    pairs = labels_of(FirstTwo(), [0.4, 0.1]).pairs
    assert RewardStrength()({}, pairs, None) == pytest.approx([1 / (1 + math.exp(-0.3))], abs=1e-15)
    extreme = [replace(pairs[0], chosen_score=s) for s in (-1e4, 1e4)]
    assert RewardStrength()({}, extreme, None) == [0.0, 1.0]
    with pytest.raises(DataError, match="strength=implicit: a response of the pair a "):
        RewardStrength()({}, [replace(pairs[0], rejected_score=None)], None)
