"""A judge with known faults: worked numbers, rates against exact intervals, limits, and refusals."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar

import pytest
from hydra import compose, initialize_config_dir
from scipy.stats import binomtest

from dnpo.commands.train import build
from dnpo.errors import SettingsError
from dnpo.judges import Judge, make_verdict
from dnpo.judges.agreement import OTHER, compare
from dnpo.judges.agreement.rows import LabelledRow
from dnpo.judges.agreement.stats import A, B
from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.ensemble import Ensemble
from dnpo.judges.exact.rules import Rules
from dnpo.judges.given import GivenScores
from dnpo.judges.longer import Longer, length_score
from dnpo.judges.noisy import Noisy
from dnpo.judges.off import NoJudge
from dnpo.records import HUMAN, Prompt, Response, Verdict
from dnpo.settings import build as build_part
from dnpo.settings import check, conf_folder, part_key
from tests.conftest import verdicts

NEW = "policy@0"


@dataclass(frozen=True)
class Stated(Judge):
    """Reads the score from the end of a response; in a comparison, the difference to the human one."""

    compares: bool = False
    mode: ClassVar[str] = "pairwise"
    asked: list[int] = field(default_factory=list)

    @property
    def only_compares(self) -> bool:
        return self.compares

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Any
    ) -> list[Verdict]:
        self.asked.append(len(responses))
        human = {prompt.id: prompt.human for prompt in prompts}
        return [self._judge(response, human[response.id]) for response in responses]

    def _judge(self, response: Response, human: str) -> Verdict:
        if response.text == "none":
            return make_verdict(response, None, "asleep")
        points = float(response.text.split()[-1])
        if not self.compares:
            return make_verdict(response, points, disagreement=3.0)
        if response.source == HUMAN:
            return make_verdict(response, 50.0)
        return make_verdict(response, 50 + (points - float(human.split()[-1])) / 2, disagreement=8.0)


def pairs(count: int, low: float = 0.0, high: float = 100.0, seed: int = 0) -> tuple[list[Prompt], list[Response]]:
    """Prompts with a human and a generated response, of which either is the better one; all texts are different."""
    draw, prompts, responses = random.Random(seed), [], []
    for number in range(count):
        human, new = draw.sample([low, high], 2)
        prompt = Prompt(str(number), [{"role": "user", "content": f"Question {number}?"}], f"old {number} {human}")
        prompts.append(prompt)
        responses += [respond(prompt, HUMAN, prompt.human), respond(prompt, NEW, f"new {number} {new}")]
    return prompts, responses


def respond(prompt: Prompt, source: str, text: str, sample: int = 0) -> Response:
    return Response(prompt.id, source, text, [], 0, "eos", sample=sample)


def judge(judge: Judge, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
    found = [verdict.score for verdict in verdicts(judge, prompts, responses)]
    return [score for score in found if score is not None]


def outcomes(scores: Sequence[float], responses: Sequence[Response]) -> list[int]:
    """For each pair: 1 if the better response has more points, 0 if they tie, −1 if it has less."""
    truth = [float(response.text.split()[-1]) for response in responses]
    apart = [(scores[i + 1] - scores[i]) * (truth[i + 1] - truth[i]) for i in range(0, len(scores), 2)]
    return [(gap > 0) - (gap < 0) for gap in apart]


def assert_rate(hits: int, among: int, rate: float) -> None:
    """The exact 99.9 % interval of the rate includes it, and is narrow."""
    interval = binomtest(hits, among).proportion_ci(0.999, "exact")
    assert interval.low <= rate <= interval.high, (hits, among, rate)
    assert interval.high - interval.low < 0.06


# --- rates


@pytest.mark.parametrize("compares", [False, True])
@pytest.mark.parametrize("error", [0.05, 0.25, 0.45, 0.5])
@pytest.mark.parametrize("levels", [(0.0, 100.0), (49.0, 51.0), (0.0, 1.0), (99.5, 100.0)])
def test_comparisons_are_wrong_at_the_rate(compares: bool, error: float, levels: tuple[float, float]) -> None:
    """At the ends of the scale and in the middle; for far scores and near ones. No comparison becomes a tie."""
    prompts, responses = pairs(4000, *levels)
    found = outcomes(judge(Noisy(Stated(compares), error=error), prompts, responses), responses)
    assert found.count(0) == 0
    assert_rate(found.count(-1), len(found), error)


def test_the_rate_by_brute_force_over_draws() -> None:
    """Worked numbers for a rate of ¼: q = 1 − √½, and one replaced score is wrong in half of the cases.

    Both draws run over an even grid in place of the digest, for every pair of levels; of 200 × 200 outcomes the share
    of wrong ones is ¼ up to the grid's width.
    """
    grid = [(n + 0.5) / 200 for n in range(200)]
    prompt, draws = Prompt("a", [], ""), iter([0.0])

    @dataclass(frozen=True)
    class Drawn(Noisy):
        def _draw(self, what: str, prompt: Prompt, *texts: str) -> float:
            return next(draws)

    noisy = Drawn(Stated(), error=0.25)
    levels = (0.0, 0.5, 37.0, 99.5, 100.0)
    scores: dict[float, list[float]] = {}
    for level in levels:
        draws = iter(grid)
        scores[level] = [noisy._change_score(prompt, "", level) for _ in grid]
        assert all(0 <= score <= 100 for score in scores[level])
    replaced = 1 - math.sqrt(0.5)
    assert sum(score < 1 or score > 99 for score in scores[37.0]) == round(200 * replaced) == 59
    for worse, better in pairwise(levels):
        # the two grids are the same, so equal draws, which are ties between replaced scores, are left out
        both = [(one, two) for i, one in enumerate(scores[worse]) for j, two in enumerate(scores[better]) if i != j]
        assert sum(one >= two for one, two in both) / len(both) == pytest.approx(0.25, abs=0.005)


def test_worked_scores() -> None:
    """The mapping to 1 to 99, and both ends: draws of ¼ q and ¾ q give ½ and 99½ points."""

    @dataclass(frozen=True)
    class Drawn(Noisy):
        draw: ClassVar[float] = 1.0

        def _draw(self, what: str, prompt: Prompt, *texts: str) -> float:
            return self.draw

    noisy, prompt, q = Drawn(Stated(), error=0.32), Prompt("a", [], ""), 0.4  # 1 − √(1 − 0.64)
    found: dict[float, list[float]] = {}
    for draw in (q / 4, 3 * q / 4, 0.41):
        Drawn.draw = draw
        found[draw] = [noisy._change_score(prompt, "", score) for score in (0.0, 50.0, 100.0)]
    assert found[q / 4] == pytest.approx([0.5] * 3)
    assert found[3 * q / 4] == pytest.approx([99.5] * 3)
    assert found[0.41] == [1.0, 50.0, 99.0]


@pytest.mark.parametrize("compares", [False, True])
def test_ties_and_errors_are_apart(compares: bool) -> None:
    """With ties 0.2 and error 0.25: 20 % ties, 0.8 · 0.25 = 20 % wrong and 60 % right."""
    prompts, responses = pairs(4000, 20.0, 70.0)
    found = outcomes(judge(Noisy(Stated(compares), error=0.25, ties=0.2), prompts, responses), responses)
    for outcome, rate in ((0, 0.2), (-1, 0.2), (1, 0.6)):
        assert_rate(found.count(outcome), len(found), rate)


def test_agreement_measures_the_dials() -> None:
    """The report on agreement finds what was set: accuracy by errors, reversals by position, ties."""
    prompts, responses = pairs(3000, 10.0, 90.0)
    rows = [
        LabelledRow(prompt, new.text, B if float(new.text.split()[-1]) == 90.0 else A, ())
        for prompt, new in zip(prompts, responses[1::2], strict=True)
    ]
    both = [*responses[::2], *(replace(new, source=OTHER) for new in responses[1::2])]

    def measure(pairwise: bool, **dials: float) -> Mapping[str, Any]:
        given = verdicts(Noisy(Stated(pairwise), **dials), prompts, both)  # type: ignore[arg-type]
        facts, _ = compare(rows, given, pairwise, 200, 0)
        assert facts["mode"] == ("pairwise" if pairwise else "score")
        return {name: estimate["value"] for name, estimate in facts["measures"].items()}

    exact, noisy = measure(False), measure(False, error=0.35)
    assert exact["accuracy"] == 1.0
    assert_rate(round(3000 * noisy["accuracy"]), 3000, 0.65)
    asked = measure(True, position=0.3, error=0.1)
    assert_rate(round(3000 * asked["reversals"]), 3000, 0.3)
    assert_rate(round(3000 * asked["accuracy_strict"]), 3000, 0.7 * 0.9)
    assert asked["ties_judge"] == asked["reversals"]


# --- what draws depend on


@pytest.mark.parametrize("compares", [False, True])
def test_verdicts_depend_on_neither_order_nor_batch_nor_names(compares: bool) -> None:
    prompts, responses = pairs(60)
    noisy = Noisy(Stated(compares), error=0.3, length=0.2, ties=0.1, position=0.1 if compares else 0.0)
    whole = judge(noisy, prompts, responses)
    assert judge(noisy, prompts, responses) == whole
    assert judge(noisy, prompts[::-1], responses[::-1]) == whole[::-1]
    alone = [judge(noisy, [p], responses[2 * i : 2 * i + 2]) for i, p in enumerate(prompts)]
    assert [score for some in alone for score in some] == whole
    # a duel renames prompts and samples
    renamed = [replace(p, id=f"{p.id}#1") for p in prompts]
    assert judge(noisy, renamed, [replace(r, id=f"{r.id}#1", sample=1) for r in responses]) == whole
    assert judge(replace(noisy, seed=1), prompts, responses) != whole


@pytest.mark.parametrize("compares", [False, True])
def test_a_pair_has_the_same_verdict_in_both_roles(compares: bool) -> None:
    """Exchange who wrote which response: the same response wins, by the same distance."""
    prompts, responses = pairs(200, 40.0, 60.0)
    swapped = [replace(p, human=new.text) for p, new in zip(prompts, responses[1::2], strict=True)]
    both = [
        replace(each, source=source)
        for old, new in zip(responses[::2], responses[1::2], strict=True)
        for each, source in ((new, HUMAN), (old, NEW))
    ]
    noisy = Noisy(Stated(compares), error=0.3, length=0.5, ties=0.2, half=20.0)
    one, other = judge(noisy, prompts, responses), judge(noisy, swapped, both)
    gaps = [one[i + 1] - one[i] for i in range(0, 400, 2)]
    assert [other[i] - other[i + 1] for i in range(0, 400, 2)] == pytest.approx(gaps)
    assert {gap > 0 for gap in gaps} == {True, False}


def test_several_samples_are_judged_consistently() -> None:
    """Scores order all responses to a prompt, and equal texts have equal scores."""
    prompt = Prompt("a", [{"role": "user", "content": "Which?"}], "old 50")
    texts = ["new 10", "new 20", "new 10", "new 30"]
    responses = [respond(prompt, NEW, text, sample=n) for n, text in enumerate(texts)]
    found = judge(Noisy(Stated(), error=0.4), [prompt], responses)
    assert found[0] == found[2]
    assert len(set(found)) == 3
    everything = judge(Noisy(Stated(), error=0.4, ties=1.0), [prompt], responses)
    assert everything == [50.0] * 4


# --- limits


@pytest.mark.parametrize("compares", [False, True])
def test_without_faults_it_is_the_judge(compares: bool) -> None:
    prompts, responses = pairs(20)
    responses[3] = replace(responses[3], text="none")
    inner = Stated(compares)
    assert verdicts(Noisy(inner), prompts, responses) == verdicts(inner, prompts, responses)
    assert inner.asked == [40, 40]


def test_a_verdict_that_is_missing_stays_missing() -> None:
    prompts, responses = pairs(2)
    responses[1] = replace(responses[1], text="none")
    found = verdicts(Noisy(Stated(), error=0.5, ties=0.5), prompts, responses)[1]
    assert found == Verdict("0", NEW, None, "asleep")


def test_the_preference_for_length_by_hand() -> None:
    """A response of 60 characters with half 20 has 75 points for its length; with weight 0.4: 0.6 · 10 + 0.4 · 75."""
    text = "x" * 57 + " 10"
    prompt = Prompt("a", [{"role": "user", "content": "Which?"}], "x" * 16 + " 90")  # 19 characters
    responses = [respond(prompt, HUMAN, prompt.human), respond(prompt, NEW, text)]
    assert length_score(text, 20.0) == 75.0
    human = length_score(prompt.human, 20.0)
    noisy = Noisy(Stated(), length=0.4, half=20.0)
    assert judge(noisy, [prompt], responses) == pytest.approx([0.6 * 90 + 0.4 * human, 36.0])
    compared = verdicts(replace(noisy, wraps=Stated(True)), [prompt], responses)
    # half the difference, from 50: 0.6 · (50 − 40) + 0.4 · (50 + (75 − human) / 2)
    assert compared[1].score == pytest.approx(0.6 * 10 + 0.4 * (50 + (75 - human) / 2))
    assert compared[1].disagreement == pytest.approx(0.6 * 8.0)
    assert compared[0].score == 50.0
    longest = replace(noisy, length=1.0)
    assert judge(longest, [prompt], responses) == judge(Longer(half=20.0), [prompt], responses)


def test_length_and_errors_are_apart() -> None:
    """A preference alone is always wrong where the worse response is long enough, an error rate is not."""
    prompts, responses = pairs(400, 40.0, 60.0)
    responses = [replace(r, text=("long " * 40 if r.text.endswith("40.0") else "") + r.text) for r in responses]
    prompts = [replace(p, human=r.text) for p, r in zip(prompts, responses[::2], strict=True)]
    by_length = outcomes(judge(Noisy(Stated(), length=0.5), prompts, responses), responses)
    assert set(by_length) == {-1}
    both = outcomes(judge(Noisy(Stated(), length=0.5, error=0.25), prompts, responses), responses)
    assert 0.15 < both.count(1) / 400 < 0.35  # an error turns such a comparison around


def test_position_decides_as_a_tie_of_both_orders() -> None:
    prompts, responses = pairs(5)
    found = verdicts(Noisy(Stated(True), position=1.0), prompts, responses)
    assert [(v.score, v.disagreement) for v in found[1::2]] == [(50.0, 100.0)] * 5
    tied = verdicts(Noisy(Stated(True), ties=1.0, position=1.0), prompts, responses)
    assert [(v.score, v.disagreement) for v in tied[1::2]] == [(50.0, 0.0)] * 5
    same = replace(responses[1], text=prompts[0].human)
    assert verdicts(Noisy(Stated(True), position=1.0), prompts[:1], [same]) == verdicts(
        Stated(True), prompts[:1], [same]
    )


# --- settings


RULES = {"_target_": "dnpo.judges.exact.rules.Rules"}


def noisy(**settings: Any) -> Noisy:
    given = {"_target_": "dnpo.judges.noisy.Noisy", "wraps": RULES, **settings}
    found: Noisy = build_part("judge", check("judge", given))
    return found


def test_every_dial_and_the_judge_are_in_the_key() -> None:
    plain = part_key(noisy())
    assert json.loads(json.dumps(plain)) == plain
    assert plain != part_key(Rules())
    assert part_key(noisy(max_unscored=0.5)) == plain
    others = [{"error": 0.1}, {"length": 0.1}, {"ties": 0.1}, {"half": 9.0}, {"seed": 3}]
    others += [{"wraps": {"_target_": "dnpo.judges.longer.Longer"}}]
    found = [json.dumps(part_key(noisy(**other)), sort_keys=True) for other in others]
    found.append(json.dumps(part_key(Noisy(Stated(True), position=0.1)), sort_keys=True))
    assert len({json.dumps(plain, sort_keys=True), *found}) == len(others) + 2


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"error": 0.51}, r"^judge\.error=0\.51: "),
        ({"error": -0.1}, r"^judge\.error=-0\.1: "),
        ({"length": 1.1}, r"^judge\.length=1\.1: "),
        ({"ties": 2.0}, r"^judge\.ties=2\.0: "),
        ({"half": 0.0}, r"^judge\.half=0\.0: "),
        ({"errors": 0.1}, r"^judge\.errors: unknown setting\. Did you mean judge\.error\b"),
        ({"wraps": None}, r"^judge\.wraps: needs a value"),
        ({"position": 0.1}, r"^judge\.position=0\.1: Rules scores single responses"),
        ({"wraps": {"_target_": "dnpo.judges.off.NoJudge"}}, r"^judge\.wraps: gives no scores"),
        ({"wraps": {"_target_": "dnpo.judges.given.GivenScores"}}, r"^judge\.wraps: GivenScores does not score texts"),
        ({"wraps": {**RULES, "strict": True}}, r"^judge\.wraps\.strict: unknown setting"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        noisy(**settings)


def test_ensembles_have_one_meaning_of_50_points_or_are_refused() -> None:
    members = {"one": Stated(True), "two": Rules()}
    with pytest.raises(SettingsError, match=r"^wraps: this ensemble averages"):
        Noisy(Ensemble(members=members))
    assert Noisy(Ensemble(members=members, by="majority")).only_compares
    assert not Noisy(Ensemble(members={"one": Rules(), "two": Longer()})).only_compares


def test_it_asks_the_judge_that_it_wraps_before_a_run() -> None:
    """Its objections, forecast and trial call are the other judge's."""
    without = Prompt("a", [{"role": "user", "content": "?"}], "")
    assert noisy().accepts([without]) == Rules().accepts([without]) is not None
    assert noisy().canary(None) is None  # type: ignore[arg-type]
    assert (Noisy(Stated(True)).mode, noisy().mode) == ("pairwise", "score")
    for refused in (NoJudge(), GivenScores()):
        with pytest.raises(SettingsError, match=r"^wraps: "):
            Noisy(refused)


def test_it_is_composed_like_any_other_judge() -> None:
    words = ["judge=noisy", "judge@judge.wraps=longer", "judge.wraps.half=30", "judge.error=0.25", "seed=7"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        run, _, settings = build(compose("train", overrides=words))
    judge = run.judge
    assert isinstance(judge, Noisy)
    assert (judge.wraps, judge.error, judge.seed) == (Longer(half=30.0), 0.25, 7)
    assert settings["judge"]["wraps"]["half"] == 30.0
