"""A judge's agreement with people: every measure by hand and by brute force, and the whole command."""

import io
import json
import math
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from rich.console import Console as RichConsole
from scipy.stats import bootstrap
from scipy.stats import t as student

from dnpo.catalogue import metric
from dnpo.commands import agreement as command
from dnpo.errors import DataError, JudgeError
from dnpo.judges.agreement import compare as compare_verdicts
from dnpo.judges.agreement import sentence
from dnpo.judges.agreement.rows import Labelled, LabelledRow
from dnpo.judges.agreement.stats import (
    TIE,
    A,
    AgreementMeasure,
    B,
    Judged,
    cohen,
    difference,
    distinct,
    entropy,
    estimates,
    fleiss,
    mean,
    measures,
    multiples,
    orders,
    preference,
    ratio,
    share,
)
from dnpo.judges.agreement.table import cells, notes, table
from dnpo.judges.asked.ledger import Answer, Ledger, Question
from dnpo.judges.asked.questions import Mode, Prompted
from dnpo.judges.longer import Longer, length_score
from dnpo.records import HUMAN, Prompt, Response, Verdict
from dnpo.running.console import Console as ScreenConsole
from dnpo.stages.agreement import read_agreement
from dnpo.store import Report, Store, manifest
from dnpo.store.manifests import seal
from dnpo.tracking.writing import Tracking
from tests.commands import SMOKE, TINY, succeed
from tests.conftest import Report as Quiet
from tests.conftest import verdicts

T = TIE


def value(measure: AgreementMeasure) -> float:
    """The measure itself: every row counts once."""
    return float(measure.of(np.ones((1, 10_000))[:, :ROWS])[0])


ROWS = 6
LABEL = np.array([A, A, B, B, T, A])
JUDGE = np.array([A, B, B, T, T, A])
VOTES = np.array([[A, A], [A, B], [B, B], [B, B], [T, B], [A, A]])
LONGER = np.array([A, B, A, T, B, B])


def judged(**changes: Any) -> Judged:
    return Judged(**({"judge_R": JUDGE, "label_R": LABEL, "votes_RV": VOTES, "longer_R": LONGER} | changes))


# --- worked numbers ---------------------------------------------------------------------------------------------------


def test_accuracy_by_hand() -> None:
    """People prefer one response in 5 of 6 rows. In these the judge is right three times, wrong once, and once calls a
    tie: (3 + ½) / 5, or strictly 3 / 5. In the sixth row people and judge both see a tie, so they agree in 4 of 6."""
    found = measures(judged())
    assert value(found["accuracy"]) == pytest.approx(0.7)
    assert value(found["accuracy_strict"]) == pytest.approx(0.6)
    assert value(found["accuracy_three_way"]) == pytest.approx(4 / 6)
    assert value(found["ties_judge"]) == pytest.approx(2 / 6)
    assert value(found["ties_people"]) == pytest.approx(1 / 6)
    assert (found["accuracy"].rows, found["accuracy_three_way"].rows) == (5, 6)


def test_cohens_kappa_by_hand() -> None:
    """p_o = 4/6. The judge says A, B and tie twice each, the label 3, 2 and 1 times: p_e = (2·3 + 2·2 + 2·1)/36 = 1/3.
    κ = (2/3 − 1/3) / (1 − 1/3) = 1/2."""
    assert value(cohen(JUDGE, LABEL)) == pytest.approx(0.5)
    assert value(measures(judged())["kappa"]) == pytest.approx(0.5)


def test_cohens_kappa_at_its_extremes() -> None:
    """κ is 1 if the raters always agree, −1 if two raters who use two categories equally often never agree, and 0 for a
    constant judge, which is right as often as chance. With a single category κ is undefined."""
    assert value(cohen(LABEL, LABEL)) == pytest.approx(1.0)
    turn = np.array([A, B, A, B, A, B])
    assert value(cohen(turn, 1 - turn)) == pytest.approx(-1.0)
    constant = np.full(ROWS, A)
    assert value(cohen(constant, LABEL)) == 0.0
    assert math.isnan(value(cohen(constant, constant)))


def test_fleiss_kappa_by_hand() -> None:
    """Rows AAA, AAB, BBB, TTB: agreeing pairs 1, 1/3, 1, 1/3, so P̄ = 2/3. Of 12 votes 5 are A, 5 B, 2 tie:
    P̄_e = (25 + 25 + 4)/144 = 3/8. κ = (2/3 − 3/8) / (5/8) = 7/15."""
    votes = np.array([[A, A, A], [A, A, B], [B, B, B], [T, T, B]])
    assert fleiss(votes).of(np.ones((1, 4)))[0] == pytest.approx(7 / 15)
    # One more row of each kind changes nothing: weights are counts of rows.
    assert fleiss(votes).of(np.full((1, 4), 2.0))[0] == pytest.approx(7 / 15)
    assert math.isnan(fleiss(np.full((4, 3), T)).of(np.ones((1, 4)))[0])


def test_agreement_between_two_people_by_hand() -> None:
    """Two people differ in rows 2 and 5, so p_o = 4/6. Their counts are 3, 2, 1 and 2, 4, 0, so
    p_e = (6 + 8 + 0)/36 = 7/18 and κ = (12/18 − 7/18) / (11/18) = 5/11. The first person's votes are the label, so the
    judge's κ with this person is 1/2. With the second person p_o = 4/6 and p_e = (2·2 + 2·4 + 0)/36 = 1/3, which also
    gives 1/2, and so the mean is 1/2."""
    found = measures(judged())
    assert value(found["kappa_between_persons"]) == pytest.approx(5 / 11)
    assert value(found["kappa_persons"]) == pytest.approx(0.5)


def test_length_bias_by_hand() -> None:
    """The judge decides rows 1, 2, 3 and 6, none with equal lengths; the longer response wins rows 1 and 2: 2/4. People
    decide rows 1, 2, 3, 4 and 6; row 4 has equal lengths, and the longer response wins only row 1: 1/4. The bias is
    2/4 − 1/4. The judge is right if people prefer the longer response (row 1), and in 2 of the 3 rows in which they
    prefer the shorter one (2, 3, 6)."""
    found = measures(judged())
    assert value(found["longer_judge"]) == pytest.approx(0.5)
    assert value(found["longer_people"]) == pytest.approx(0.25)
    assert value(found["length_bias"]) == pytest.approx(0.25)
    assert value(found["accuracy_longer"]) == pytest.approx(1.0)
    assert value(found["accuracy_shorter"]) == pytest.approx(2 / 3)
    assert [found[f"accuracy_{name}"].rows for name in ("longer", "shorter")] == [1, 3]


def test_flips_by_hand() -> None:
    """Mean and difference of the two orders: 50 ± 50 is a reversal, 25 ± 25 a win that becomes a tie, 80 ± 20 and
    10 ± 0 do not change, and 50 ± 0 is a tie in both. Row 6 was not asked. Flips 2/5, reversals 1/5."""
    pairs = [orders(s, d) for s, d in ((50, 100), (25, 50), (80, 40), (10, 0), (50, 0), (50, None))]
    assert pairs[:3] == [(0.0, 100.0), (0.0, 50.0), (60.0, 100.0)]
    found = measures(judged(orders_RN=np.array(pairs)))
    assert value(found["flips"]) == pytest.approx(2 / 5)
    assert value(found["reversals"]) == pytest.approx(1 / 5)
    assert found["flips"].rows == 5


def test_saturation_by_hand() -> None:
    """Of 12 scores, the seven 10, 20, 30, 35, 35, 100 and 0 are multiples of 5; without the two 35s, five are multiples
    of 10: 7/12 and 5/12."""
    scores = np.array([[10, 20], [30, 35], [35, 100], [0, 1], [2, 3], [99.5, 35.0001]])
    found = measures(judged(scores_RN=scores))
    assert value(found["multiples_of_5"]) == pytest.approx(7 / 12)
    assert value(found["multiples_of_10"]) == pytest.approx(5 / 12)
    assert multiples(np.array([0.1 + 0.2 + 4.7]), 5).all()
    assert sum(n % 5 == 0 for n in range(101)) == 21


def test_entropy_by_hand() -> None:
    """Shares of ½, ¼ and ¼: ½·1 + ¼·2 + ¼·2 = 1.5 bits. Scores are rounded first. All 101 scores: log2(101)."""
    assert entropy(np.array([50.2, 49.9, 80.0, 20.0])) == pytest.approx(1.5)
    assert entropy(np.full(7, 80.0)) == 0.0
    assert entropy(np.arange(101.0)) == pytest.approx(math.log2(101))
    assert distinct(np.array([50.2, 49.9, 80.0, 80.0])) == 3


def test_a_measure_that_is_undefined_has_a_reason() -> None:
    """The value is None, with a reason, instead of NaN; a κ that is undefined in many resamples has no interval."""
    same = np.full(ROWS, T)
    found = estimates(measures(judged(judge_R=same, label_R=same, votes_RV=VOTES[:, :0])), ROWS, 100, 0)
    for name in ("accuracy", "kappa", "kappa_persons", "fleiss_persons", "length_bias", "flips", "multiples_of_5"):
        assert (found[name].value, found[name].low, found[name].high) == (None, None, None)
        assert found[name].reason, name
    assert found["ties_judge"].value == 1.0
    assert "the same single category" in found["kappa"].reason
    assert "two orders" in found["flips"].reason
    assert "no votes" in found["kappa_persons"].reason
    alone = estimates(measures(judged(votes_RV=VOTES[:, :1])), ROWS, 100, 0)
    assert alone["kappa_persons"].value == pytest.approx(0.5)
    assert "only one person" in alone["kappa_between_persons"].reason
    rare = np.array([A, A, A, A, A, B])
    thin = estimates({"kappa": cohen(rare, rare)}, ROWS, 200, 0)["kappa"]
    assert (thin.value, thin.low) == (1.0, None)
    assert "resamples" in thin.reason


@pytest.mark.parametrize(("a", "b", "said"), [(3, 2, A), (2, 3, B), (2, 2, T), (50.0, 50 + 1e-12, T)])
def test_preference(a: float, b: float, said: int) -> None:
    assert preference(a, b) == said


# --- brute force ------------------------------------------------------------------------------------------------------


def by_rows(rows: Sequence[tuple[int, ...]]) -> float:
    """Fleiss' κ from its definition: pairs of votes, row by row."""
    agreeing = [sum(x == y for x, y in combinations(row, 2)) / math.comb(len(row), 2) for row in rows]
    counts = Counter(vote for row in rows for vote in row)
    chance = sum((count / counts.total()) ** 2 for count in counts.values())
    return (sum(agreeing) / len(rows) - chance) / (1 - chance)


def kappa_by_pairs(one: Sequence[int], other: Sequence[int]) -> float:
    """Cohen's κ from its definition: chance agreement is that of every answer of one with every answer of the other."""
    observed = sum(x == y for x, y in zip(one, other, strict=True)) / len(one)
    chance = sum(x == y for x in one for y in other) / len(one) ** 2
    return (observed - chance) / (1 - chance)


@pytest.mark.parametrize("seed", range(5))
def test_measures_of_a_resample_equal_measures_of_its_rows(seed: int) -> None:
    """Weights are counts: every measure of weighted rows is the measure, from its definition, of the rows repeated."""
    rng = np.random.default_rng(seed)
    count = 120
    judge, label, longer = (rng.integers(0, 3, count) for _ in range(3))
    votes = np.where(rng.random((count, 3)) < 0.6, label[:, None], rng.integers(0, 3, (count, 3)))
    low_high = np.sort(rng.integers(0, 5, (count, 2)) * 25.0, axis=1)
    scores = rng.integers(0, 101, (count, 2)).astype(float)
    found = measures(Judged(judge, label, votes, longer, scores, low_high))
    weights = rng.multinomial(count, np.full(count, 1 / count), size=3)
    for s in range(3):
        rows = np.repeat(np.arange(count), weights[s])
        j, y, v, n = (x[rows].tolist() for x in (judge, label, votes, longer))
        both = list(zip(j, y, n, strict=True))
        by_judge = [x == z for x, _, z in both if T not in (x, z)]
        by_people = [x == z for _, x, z in both if T not in (x, z)]
        right = [1.0 if x == y else 0.5 if x == T else 0.0 for x, y, _ in both if y != T]
        sides = [((a > 50) - (a < 50), (b > 50) - (b < 50)) for a, b in low_high[rows].tolist()]
        flat = [x for pair in scores[rows].tolist() for x in pair]
        people = list(zip(*v, strict=True))
        expected = {
            "accuracy": np.mean(right),
            "accuracy_strict": np.mean([x == y for x, y, _ in both if y != T]),
            "accuracy_three_way": np.mean([x == y for x, y, _ in both]),
            "ties_judge": j.count(T) / count,
            "ties_people": y.count(T) / count,
            "kappa": kappa_by_pairs(j, y),
            "kappa_persons": np.mean([kappa_by_pairs(j, p) for p in people]),
            "kappa_between_persons": np.mean([kappa_by_pairs(p, q) for p, q in combinations(people, 2)]),
            "fleiss_persons": by_rows(v),
            "fleiss_with_judge": by_rows([(*row, x) for row, x in zip(v, j, strict=True)]),
            "longer_judge": np.mean(by_judge),
            "longer_people": np.mean(by_people),
            "length_bias": np.mean(by_judge) - np.mean(by_people),
            "accuracy_longer": np.mean([{y: 1.0, T: 0.5}.get(x, 0.0) for x, y, z in both if T != y == z]),
            "accuracy_shorter": np.mean(
                [{y: 1.0, T: 0.5}.get(x, 0.0) for x, y, z in both if T not in (y, z) and y != z]
            ),
            "flips": np.mean([a != b for a, b in sides]),
            "reversals": np.mean([{a, b} == {-1, 1} for a, b in sides]),
            "multiples_of_5": np.mean([x % 5 == 0 for x in flat]),
            "multiples_of_10": np.mean([x % 10 == 0 for x in flat]),
        }
        assert set(expected) == set(found)
        for name, wanted in expected.items():
            got = found[name].of(weights.astype(float))[s]
            assert got == pytest.approx(wanted, abs=1e-12), name


def test_cohens_kappa_equals_scikit_learns() -> None:
    kappa = pytest.importorskip("sklearn.metrics").cohen_kappa_score
    rng = np.random.default_rng(1)
    one, other = rng.integers(0, 3, 200), rng.integers(0, 3, 200)
    other[:90] = one[:90]
    assert cohen(one, other).of(np.ones((1, 200)))[0] == pytest.approx(kappa(one, other), abs=1e-12)


def test_intervals_equal_scipys() -> None:
    """scipy's percentile bootstrap over the rows, with other random numbers: the same ends up to its noise."""
    rng = np.random.default_rng(2)
    label = rng.integers(0, 2, 150)
    judge = np.where(rng.random(150) < 0.7, label, 1 - label)
    ours = estimates({"share": share(judge == label, label >= 0, ""), "kappa": cohen(judge, label)}, 150, 4000, 0)

    def of(*columns: Any) -> float:
        return kappa_by_rows(*columns)

    def kappa_by_rows(one: Any, other: Any) -> float:
        observed, p, q = np.mean(one == other), np.mean(one), np.mean(other)
        chance = p * q + (1 - p) * (1 - q)
        return float((observed - chance) / (1 - chance))

    shares = bootstrap((judge == label,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    kappas = bootstrap(
        (judge, label), of, n_resamples=4000, method="percentile", paired=True, vectorized=False, rng=1
    ).confidence_interval
    for name, theirs in (("share", shares), ("kappa", kappas)):
        assert ours[name].low == pytest.approx(theirs.low, abs=0.015)
        assert ours[name].high == pytest.approx(theirs.high, abs=0.015)
        low, middle, high = ours[name].low, ours[name].value, ours[name].high
        assert low is not None
        assert middle is not None
        assert high is not None
        assert low < middle < high


@pytest.mark.parametrize("rows", [1, 12, 43])
def test_a_share_of_none_or_all_is_not_certain(rows: int) -> None:
    """Resamples of equal rows are equal; Wilson's interval says how little a few rows tell."""
    none, every = np.zeros(rows), np.ones(rows)
    found = estimates({"none": share(none, every, ""), "all": share(every, every, "")}, rows, 50, 0)
    assert (found["none"].value, found["none"].low) == (found["all"].value - 1, 0.0) == (0.0, 0.0)
    t = student.ppf(0.975, max(rows - 1, 1))
    assert found["none"].high == pytest.approx(t**2 / (rows + t**2), rel=1e-9)
    assert found["all"].low == pytest.approx(rows / (rows + t**2), rel=1e-9)


def test_intervals_are_repeatable_and_joint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed gives the same ends, also in several batches; a difference uses the same rows for both sides."""
    found = {"accuracy": share(JUDGE == LABEL, LABEL != T, ""), "mean": mean([cohen(JUDGE, LABEL)] * 2)}
    zero = difference(found["accuracy"], found["accuracy"])
    once = estimates({**found, "zero": zero}, ROWS, 50, 3)
    assert (once["zero"].low, once["zero"].high) == (0.0, 0.0)
    assert once == estimates({**found, "zero": zero}, ROWS, 50, 3) != estimates({**found, "zero": zero}, ROWS, 50, 4)
    monkeypatch.setattr("dnpo.judges.agreement.stats.BATCH", 5 * ROWS)
    assert estimates({**found, "zero": zero}, ROWS, 50, 3) == once
    assert math.isnan(value(ratio(np.zeros(ROWS), np.zeros(ROWS), "")))


# --- judges -----------------------------------------------------------------------------------------------------------


def compare(name: str, a: str, b: str, label: int, *votes: int) -> LabelledRow:
    return LabelledRow(Prompt(name, [{"role": "user", "content": "?"}], a), b, label, votes)


WORDS = ("ONYX", "twig", "Thorn", "FERNS")


@dataclass(frozen=True, kw_only=True)
class Asked(Prompted):
    """A judge that is asked in words: it prefers capital letters, and the first response by ``pull`` points."""

    mode: Mode = "pairwise"
    max_unscored: float = 0.0
    pull: float = 0.0
    told: dict[tuple[str, str], float] = field(default_factory=dict, init=False)

    @property
    def kind(self) -> str:
        return "test pairwise"

    @property
    def respondent(self) -> str:
        return "nobody"

    def ask(self, questions: Sequence[Question], ledger: Ledger, report: Report, total: int) -> dict[str, str]:
        for q in questions:
            first, second = (text for text in WORDS if text in str(q.messages))
            if str(q.messages).index(first) > str(q.messages).index(second):
                first, second = second, first
            apart = sum(map(str.isupper, first)) - sum(map(str.isupper, second))
            told = min(max(50.0 + 20 * apart + self.pull, 0.0), 100.0)
            self.told[first, second] = told
            ledger.record(q, Answer(told))
        return {}


PAIRS = [("ONYX", "twig", A), ("twig", "FERNS", B), ("twig", "Thorn", A), ("Thorn", "twig", T), ("Thorn", "Thorn", T)]


@pytest.mark.parametrize("pull", [0.0, 10.0, 20.0, 30.0, -30.0])
def test_flips_equal_the_answers_in_both_orders(pull: float, tmp_path: Path) -> None:
    """The orders that are computed from a verdict's mean and difference are the judge's answers in both orders."""
    rows = [compare(str(i), a, b, label) for i, (a, b, label) in enumerate(PAIRS)]
    responses = [Response(r.prompt.id, HUMAN, r.prompt.human, [], 0, "eos") for r in rows]
    responses += [Response(r.prompt.id, "policy@0", r.b, [], 0, "eos") for r in rows]
    judge = Asked(pull=pull)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        said = judge([row.prompt for row in rows], responses, ledger, Quiet())
    facts, points = compare_verdicts(rows, said, True, 100, 0)
    asked = [(a, b) for a, b, _ in PAIRS if a != b]
    ways = [(100 - judge.told[a, b], judge.told[b, a]) for a, b in asked]
    sides = [[(x > 50) - (x < 50) for x in way] for way in ways]
    measured = facts["measures"]
    assert facts["mode"] == "pairwise"
    assert measured["flips"]["value"] == pytest.approx(np.mean([x != y for x, y in sides]))
    assert measured["reversals"]["value"] == pytest.approx(np.mean([x * y < 0 for x, y in sides]))
    assert points == pytest.approx([abs(x - y) for x, y in ways])
    wanted = [preference(50.0, sum(way) / 2) for way in ways]
    assert facts["verdicts"] == {name: wanted.count(i) + (i == T) for i, name in enumerate(("A", "B", "tie"))}
    assert measured["multiples_of_5"]["value"] is None


def test_a_judge_that_scores_one_response_against_the_other() -> None:
    """Ensembles of judges that compare give the first response 50 and the other a score against it, and no orders."""
    rows = [compare("x", "a", "b", A), compare("y", "a", "b", B)]
    said = [Verdict(i, HUMAN, 50.0) for i in "xy"] + [
        Verdict(i, "policy@0", s, disagreement=9.0) for i, s in (("x", 20.0), ("y", 75.0))
    ]
    facts, points = compare_verdicts(rows, said, False, 100, 0)
    assert (facts["mode"], points) == ("relative", [20.0, 75.0])
    assert facts["measures"]["accuracy"]["value"] == 1.0
    assert facts["measures"]["multiples_of_5"]["value"] is facts["measures"]["flips"]["value"] is None
    # A judge with one score for everything is not such a judge: it is saturated.
    constant, _ = compare_verdicts(rows, [Verdict(v.id, v.source, 50.0) for v in said], False, 100, 0)
    assert constant["mode"] == "score"
    assert (constant["measures"]["entropy"]["value"], constant["measures"]["distinct"]["value"]) == (0.0, 1.0)


def test_a_narrow_terminal_wraps_the_texts_of_the_table_and_no_number() -> None:
    rows = [compare(str(i), "a", "b", A) for i in range(4)]
    said = [Verdict(str(i), source, score + i) for i in range(4) for source, score in ((HUMAN, 3.0), ("policy@0", 4.5))]
    facts, _ = compare_verdicts(rows, said, False, 100, 0)
    report = {**facts, "judge": "judge=longer", "data": "rows.jsonl"}
    console = ScreenConsole()
    console.rich = RichConsole(file=(out := io.StringIO()), width=80, force_terminal=True, color_system=None)
    console.table(table(report), fold=True)
    lines = out.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    numbers = [(value, between, count) for _, value, between, count, _ in cells(report)]
    assert all(any(all(number in line for number in row) for line in lines) for row in numbers)
    undefined = [metric(f"agreement/{name}").title for name, each in facts["measures"].items() if each["value"] is None]
    said_below = " ".join(notes(report))
    assert len(undefined) > 4
    assert all(title in said_below for title in undefined)
    assert not any(title in row for title in undefined for row in cells(report))


def test_rows_without_a_verdict_are_counted_and_left_out() -> None:
    rows = [compare("x", "a", "b", A), compare("y", "a", "b", B), compare("z", "a", "b", B)]
    said = [Verdict("x", HUMAN, 3.0), Verdict("y", HUMAN, None, "no number"), Verdict("z", HUMAN, 3.0)]
    said += [Verdict("x", "policy@0", 2.0), Verdict("y", "policy@0", 1.0), Verdict("z", "policy@0", None, "refused")]
    facts, points = compare_verdicts(rows, said, False, 100, 0)
    assert (facts["rows"], facts["unscored"]) == (3, 2)
    assert facts["reasons"] == {"no number": 1, "refused": 1}
    assert facts["measures"]["accuracy"]["rows"] == 1
    assert points == [3.0, 2.0]
    with pytest.raises(JudgeError, match=r"none of the 1 rows has a verdict.*\(1 ×\): no number"):
        compare_verdicts(rows[1:2], said, False, 100, 0)


def test_the_longer_one() -> None:
    """The score is 100 · n / (n + 200): 0, a third, a half. Every further character counts, even for long texts."""
    assert [length_score("x" * n, 200) for n in (0, 100, 200, 600)] == pytest.approx([0, 100 / 3, 50, 75])
    far = [length_score("x" * n, 200.0) for n in (100_000, 100_001)]
    assert far[0] < far[1] < 100
    prompt = Prompt("p", [], "x")
    said = verdicts(Longer(half=2.0), [prompt], [Response("p", HUMAN, "xx", [], 0, "eos")])
    assert said == [Verdict("p", HUMAN, 50.0)]
    assert Longer().accepts([prompt]) is None


# --- rows -------------------------------------------------------------------------------------------------------------

ROW = {"id": "r", "prompt": "Why?", "a": "Because.", "b": "No.", "label": "A", "votes": ["A", "TIE", "b"]}


def file_of(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_rows_of_preferences_are_read(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]
    other = {"prompt": turns, "a": "", "b": "No.", "label": "tie", "votes": ["A", "A", "B"], "answer": "7", "more": 1}
    first, second = Labelled(path=str(file_of(tmp_path, ROW, "", other))).read()
    assert first == LabelledRow(Prompt("r", [{"role": "user", "content": "Why?"}], "Because."), "No.", A, (A, T, B))
    assert second == LabelledRow(Prompt("line 3", turns, "", answer="7"), "No.", T, (A, A, B))


def test_a_bare_true_is_read_as_text(tmp_path: Path) -> None:
    """PandaLM's test set has two rows whose response lost its quotes in JSON."""
    (row,) = Labelled(path=str(file_of(tmp_path, {**ROW, "a": True, "b": 7}))).read()
    assert (row.prompt.human, row.b) == ("True", "7")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"there are no rows"),
        (["{"], r"rows\.jsonl:1: not JSON"),
        (["3"], r"rows\.jsonl:1: 3 is not an object; expected one object a line with prompt, a, b and label"),
        ([ROW, {**ROW, "id": "s", "b": None}], r"rows\.jsonl:2: no b; expected"),
        ([{**ROW, "label": "C"}], r"rows\.jsonl:1: label is 'C'; expected A, B or tie"),
        ([{**ROW, "label": 0}], r"label is 0; expected A, B or tie"),
        ([{**ROW, "votes": ["A", "?"]}], r"rows\.jsonl:1: votes\[1\] is '\?'; expected A, B or tie"),
        ([{**ROW, "votes": "A"}], r"votes is 'A'; expected a list"),
        ([ROW, {**ROW, "id": "s", "votes": ["A"]}], r"rows\.jsonl:2: 1 votes, but 3 in the rows before"),
        ([ROW, ROW], r"rows\.jsonl:2: .*rows\.jsonl:1 has the same id 'r'"),
        ([{**ROW, "a": None}], r"rows\.jsonl:1: no a; expected"),
        ([{**ROW, "a": ["x"]}], r"a is \['x'\]; expected text"),
        ([{**ROW, "prompt": " "}], r"prompt is empty; expected text"),
        ([{**ROW, "prompt": []}], r"prompt is \[\]; expected text, or turns"),
        ([{**ROW, "prompt": [{"role": "me", "content": "x"}]}], r"prompt\[0\]\.role is 'me'; expected system or user"),
        ([{**ROW, "prompt": [{"role": "system", "content": "x"}]}], r"the last turn of prompt is the system's"),
        ([{**ROW, "a": "\ud83d"}], r"a is not valid Unicode"),
        ([{**ROW, "id": "\udc00"}], r"rows\.jsonl:1: id is not valid Unicode"),
        ([{**ROW, "prompt": "\u200b"}], r"prompt is empty; expected text"),
        ([{**ROW, "\ud83d": 1, "b": None}], r"no b; .*\\ud83d"),
        (
            [{**ROW, "a": None}, "{", {**ROW, "a": None}],
            r":1: no a; (.|\n)*3 of 3 rows .*\n *2: no a (.|\n)*1: not JSON",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_named(rows: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        Labelled(path=str(file_of(tmp_path, *rows))).read()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data=.*nowhere\.jsonl: there is no such file|No such file"):
        Labelled(path=str(tmp_path / "nowhere.jsonl")).read()


# --- the command ------------------------------------------------------------------------------------------------------


class Tracked(Tracking):
    """Remembers what is tracked."""

    seen: dict[str, Any]

    def __init__(self) -> None:
        type(self).seen = {"metrics": {}, "artifacts": [], "tags": {}}

    def open(self) -> "Tracked":
        return self

    def start(self, name: str, settings: Any, tags: Any, sweep: Any, folder: Any, stages: Any) -> None:
        self.seen |= {"name": name, "settings": dict(settings), "tags": dict(tags)}

    def metrics(self, values: Any, step: int) -> None:
        self.seen["metrics"] |= values

    def artifact(self, path: Path, folder: str = "") -> None:
        self.seen["artifacts"].append(f"{folder}/{path.name}")

    def finish(self, status: str) -> None:
        self.seen["status"] = status


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in; Hydra forgets its run afterwards."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["agreement", *arguments])
    command.main()


SMALL = ("resamples=200", "tracking=off")


def test_the_command(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Three rows: the longer one is right in the first and wrong in the second; in the third people see a tie."""
    rows = [
        {"prompt": "?", "a": "long answer", "b": "short", "label": "A", "votes": ["A", "A"]},
        {"prompt": "?", "a": "short", "b": "long answer", "label": "A", "votes": ["A", "B"]},
        {"prompt": "?", "a": "equal", "b": "alike", "label": "tie", "votes": ["tie", "tie"]},
    ]
    data = file_of(here, *rows)
    tracking = "tracking._target_=tests.test_agreement.Tracked"
    run(monkeypatch, "judge=longer", "judge.half=5.0", f"data={data}", *SMALL, tracking, "hydra.run.dir=out")
    shown = capsys.readouterr().out
    assert "judge=longer judge.half=5.0 against people, rows.jsonl" in shown
    found = json.loads((here / "out" / "agreement.json").read_text())
    assert found["labels"] == {"A": 2, "B": 0, "tie": 1}
    assert found["verdicts"] == {"A": 1, "B": 1, "tie": 1}
    assert found["measures"]["accuracy"]["value"] == 0.5
    assert found["measures"]["accuracy_three_way"]["value"] == pytest.approx(2 / 3)
    assert found["measures"]["longer_judge"]["value"] == 1.0
    assert found["measures"]["length_bias"]["value"] == 0.5
    assert found["persons"] == 2
    page = (here / "out" / "agreement.md").read_text()
    assert "| Cohen's κ: judge and people's label |" in page
    assert all((here / "out" / f"agreement.{ending}").stat().st_size > 5000 for ending in ("png", "svg"))
    seen = Tracked.seen
    assert seen["tags"]["dnpo.kind"] == "agreement"
    assert seen["metrics"]["agreement/accuracy"] == 0.5
    assert seen["settings"]["judge.half"] == 5.0
    drawn = [f"agreement/agreement.{ending}" for ending in ("json", "md", "png", "svg")]
    assert seen["artifacts"] == ["/stages.json", *drawn]
    assert seen["status"] == "FINISHED"

    # Found again by the command and by a run with the same judge, not with another judge.
    run(monkeypatch, "judge=longer", "judge.half=5.0", f"data={data}", *SMALL)
    assert capsys.readouterr().out.count("stored already") == 2
    store, key = Store(here / "store"), {"_target_": "Longer", "half": 5.0}
    (entry,) = read_agreement(store, key, print)
    assert entry["stage"] == found["stage"]
    assert sentence(entry).startswith("agrees with people in 50 % of 2 rows of rows.jsonl")
    assert sentence({**entry, "unscored": 3}).endswith("), and 3 more have no verdict")
    assert read_agreement(store, {**key, "half": 200.0}, print) == []
    # Of two results on the same rows, the newer one counts.
    run(monkeypatch, "judge=longer", "judge.half=5.0", f"data={data}", *SMALL, "seed=1")
    (folder,) = {p.parent for p in (here / "store" / "agreement").glob("*/manifest.json")} - {
        here / "store" / entry["stage"]
    }
    known = {name: value for name, value in manifest(folder).items() if name != "checksum"}
    content = known | {"started": "2999-01-01T00:00:00+00:00"}
    seal(folder, content)
    assert [e["stage"] for e in read_agreement(store, key, print)] == [f"agreement/{content['key']}"]


def test_the_command_with_a_judge_that_compares(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_of(here, *({"prompt": "?", "a": a, "b": b, "label": ("A", "B", "tie")[y]} for a, b, y in PAIRS))
    judge = ("judge=off", "judge._target_=tests.test_agreement.Asked", "+judge.pull=30.0")
    run(monkeypatch, *judge, f"data={data}", *SMALL, "hydra.run.dir=out")
    found = json.loads((here / "out" / "agreement.json").read_text())
    # The pull of 30 turns the rows whose responses are 20 apart (two of four), and not those that are further apart.
    assert (found["mode"], found["measures"]["flips"]["value"]) == ("pairwise", 0.5)
    assert (here / "out" / "agreement.png").is_file()


def test_a_title_contains_no_password() -> None:
    assert command._of_judge(["judge.base_url=http://me:secret@here/v1", "seed=1"]) == [
        "judge.base_url=http://…@here/v1"
    ]


@pytest.mark.long
def test_a_run_shows_its_judges_agreement_with_people(tiny: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown on the screen and in the summary; nothing is shown for a judge that was not compared with people."""
    shutil.copytree(tiny / "store", here / "store")
    run(monkeypatch, "judge=longer", f"data={file_of(here, ROW)}", *SMALL)
    for judge, known in (("longer", 1), ("rules", 0)):
        printed = succeed(here, *SMOKE, *TINY, f"judge={judge}", "iterations=1", f"hydra.run.dir={judge}")
        assert printed.count("rows.jsonl") == known
        found = json.loads((here / judge / "summary.json").read_text())["judge_agreement"]
        assert [entry["accuracy"]["value"] for entry in found] == [1.0] * known


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["judge=longer"], r"data: needs a value; give data=…"),
        (["judge=longer", "data=nowhere.jsonl"], r"data=nowhere\.jsonl: .*expected one object a line"),
        (["judge=rules", "data=rows.jsonl"], r"judge=rules needs a verifiable answer for every prompt; 1 of 1"),
        (["judge=off", "data=rows.jsonl"], r"judge=off gives no scores"),
        (
            ["judge=lnger", "data=rows.jsonl"],
            r"judge=lnger: there is no such option\. Did you mean judge=longer|longer",
        ),
        (["judge=longer", "data=rows.jsonl", "resample=3"], r"resample: unknown setting\. Did you mean resamples"),
        (["judge=longer", "data=rows.jsonl", "judge.half=0"], r"judge\.half=0: .*above 0"),
        (["judge=longer", "data=rows.jsonl", "resamples=0"], r"resamples=0: expected a whole number of at least 1"),
    ],
)
def test_errors_are_named(
    arguments: list[str],
    message: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file_of(here, ROW)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments, "tracking=off")
    assert stopped.value.code == 1
    err = capsys.readouterr().err
    assert re.search(message, err), err
    assert "Traceback" not in err
    assert not (here / "store").exists()
