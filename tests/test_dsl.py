"""Dynamic sample labelling: equation 2 of the DNPO paper, and what becomes of pairs that cannot be labelled."""

import itertools

import pytest

from dnpo.dsl import HigherScoreChosen, HumanChosen, Labeller, Scores, explain, label
from dnpo.errors import DataError, SettingsError
from dnpo.records import HUMAN, Pair, Prompt, Response, Verdict
from dnpo.settings import check

SOURCE = "policy@3"


def prompt(name: str) -> Prompt:
    """A prompt of that id."""
    return Prompt(name, [{"role": "user", "content": f"ask {name}"}], f"human {name}", token_ids=[1, len(name), 9])


def human(name: str, ids: list[int] | None = None) -> Response:
    """The human response to it."""
    return Response(name, HUMAN, f"human {name}", ids or [10, 11, 2], 3, "eos")


def generated(name: str, ids: list[int] | None = None) -> Response:
    """What the policy generated."""
    return Response(name, SOURCE, f"generated {name}", ids or [20, 21], 2, "length", logprob=-3.5)


def verdicts(name: str, s: float | None, s_new: float | None) -> list[Verdict]:
    """The verdicts on both, s and s′."""
    return [Verdict(name, HUMAN, s, "r"), Verdict(name, SOURCE, s_new, "r")]


def one(s: float | None, s_new: float | None, labeller: Labeller | None = None) -> tuple[list[Pair], dict[str, int]]:
    """The labels of a single pair with these scores."""
    labeller = labeller or HigherScoreChosen()
    return label(labeller, [prompt("a")], [human("a")], [generated("a")], verdicts("a", s, s_new))


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
)


def test_higher_human() -> None:
    """Every field of the pair comes from the right side when the human response is the better one."""
    assert one(80.0, 40.0) == ([HUMAN_CHOSEN], {"pairs": 1, "flipped": 0, "identical": 0, "unscored": 0})


def test_higher_generated_is_flipped() -> None:
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
    """A judge that failed says nothing about quality: the pair is not labelled, not even in favour of the human."""
    assert one(s, s_new) == ([], {"pairs": 0, "flipped": 0, "identical": 0, "unscored": 1})


@pytest.mark.parametrize("known", [[], [Verdict("a", HUMAN, 90.0)], [Verdict("a", SOURCE, 90.0)]])
def test_missing_verdict_is_like_a_missing_score(known: list[Verdict]) -> None:
    """A verdict that is not there at all is counted the same way and is no error."""
    pairs, counts = label(HigherScoreChosen(), [prompt("a")], [human("a")], [generated("a")], known)
    assert pairs == []
    assert counts == {"pairs": 0, "flipped": 0, "identical": 0, "unscored": 1}


def test_verdict_of_another_source_does_not_count() -> None:
    """An earlier policy's score for the same prompt must not stand in for this one's."""
    stale = [Verdict("a", HUMAN, 50.0), Verdict("a", "policy@2", 100.0), Verdict("b", SOURCE, 100.0)]
    _, counts = label(HigherScoreChosen(), [prompt("a")], [human("a")], [generated("a")], stale)
    assert counts["unscored"] == 1


@pytest.mark.parametrize("labeller", [HigherScoreChosen(), HumanChosen()])
@pytest.mark.parametrize("scores", [(80.0, 40.0), (40.0, 80.0), (None, None)])
def test_identical_pairs_are_dropped_and_counted(labeller: Labeller, scores: tuple[float | None, float | None]) -> None:
    """Equal token ids have no gradient; they count as identical whatever their scores, not as unscored."""
    same = [7, 8, 2]
    pairs, counts = label(
        labeller, [prompt("a")], [human("a", same)], [generated("a", list(same))], verdicts("a", *scores)
    )
    assert pairs == []
    assert counts == {"pairs": 0, "flipped": 0, "identical": 1, "unscored": 0}


def test_responses_that_only_begin_alike_are_kept() -> None:
    """A response cut at the limit is not the whole response, though its text may look the same."""
    pairs, counts = label(
        HigherScoreChosen(), [prompt("a")], [human("a", [7, 8, 2])], [generated("a", [7, 8])], verdicts("a", 1.0, 1.0)
    )
    assert counts["identical"] == 0
    assert len(pairs) == 1


@pytest.mark.parametrize("s", [None, 0.0, 50.0, 100.0])
@pytest.mark.parametrize("s_new", [None, 0.0, 50.0, 100.0])
def test_human_chosen_ignores_scores(s: float | None, s_new: float | None) -> None:
    """SPIN labels by origin; scores there are kept for the report but decide nothing."""
    (pair,), counts = one(s, s_new, HumanChosen())
    assert (pair.chosen_source, pair.rejected_source, pair.flipped) == (HUMAN, SOURCE, False)
    assert (pair.chosen_score, pair.rejected_score) == (s, s_new)
    assert counts == {"pairs": 1, "flipped": 0, "identical": 0, "unscored": 0}


def test_needs_scores() -> None:
    """What the labellers declare decides whether a judge is asked at all."""
    assert HigherScoreChosen.needs_scores
    assert not HumanChosen.needs_scores


def test_labeller_on_its_own() -> None:
    """The decision itself: yes, no, no on a tie, and None where it cannot be made."""
    decide = HigherScoreChosen().prefers_generated
    answers = [decide(prompt("a"), human("a"), generated("a"), Scores(*s)) for s in ((1, 2), (2, 1), (1, 1), (None, 1))]
    assert answers == [True, False, False, None]


def test_many_rows_keep_the_order_of_generated_and_are_matched_by_id() -> None:
    """Rows come in any order and not all are generated for; each pair still holds what belongs together."""
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
def test_unscored_pairs_can_keep_the_human_response(s: float | None, s_new: float | None) -> None:
    """Chosen by origin, as SPIN would, with the score that is known; it is a pair and still counts as unscored."""
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
def test_pairs_with_both_scores_do_not_depend_on_it(unscored: str) -> None:
    """Nor do identical ones, which are looked at first: they need no score."""
    labeller = HigherScoreChosen(unscored=unscored)  # type: ignore[arg-type]
    assert one(80.0, 40.0, labeller)[0] == [HUMAN_CHOSEN]
    assert one(40.0, 80.0, labeller)[0] == [GENERATED_CHOSEN]
    same = [7, 8, 2]
    found = label(labeller, [prompt("a")], [human("a", same)], [generated("a", same)], [])
    assert found == ([], {"pairs": 0, "flipped": 0, "identical": 1, "unscored": 0})


@pytest.mark.parametrize(("unscored", "pairs"), [("drop", 2), ("keep_human", 4)])
def test_counts_of_many(unscored: str, pairs: int) -> None:
    """Five rows: one each way, two without a score, one identical; dropped ones are gone and counted once."""
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
    """Nobody was asked, so nobody failed."""
    assert one(None, None, HumanChosen())[1]["unscored"] == 0


def test_what_becomes_of_unscored_pairs_is_one_of_three() -> None:
    """Checked before anything is computed."""
    target = {"_target_": "dnpo.dsl.HigherScoreChosen"}
    assert check("dsl", target) == target
    with pytest.raises(SettingsError, match=r"^dsl\.unscored='keep': .*'drop', 'keep_human' or 'fail'"):
        check("dsl", {**target, "unscored": "keep"})


def test_what_left_no_pair_is_said_in_words() -> None:
    """With how many there were of each, and the setting that would mend it."""
    counts = {"pairs": 0, "flipped": 0, "identical": 1200, "unscored": 3}
    text = explain(counts)
    assert "1,200 generated responses equal the human ones" in text
    assert "generate.temperature" in text
    assert "3 pairs lack a score" in text
    assert "dsl.unscored" in text
    assert explain({**counts, "identical": 0, "unscored": 0}) == "the labeller (dsl=…) has dropped all of them"
