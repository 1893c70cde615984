"""Several judges as one: by hand, with ties, with members that fail, and as settings."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from dnpo.commands.train import build
from dnpo.errors import DnpoError, SettingsError
from dnpo.judges import Canary, Forecast, Judge, judge_responses
from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.ensemble import Ensemble
from dnpo.judges.exact.rules import Rules
from dnpo.judges.off import NoJudge
from dnpo.records import HUMAN, Prompt, Response, Verdict
from dnpo.settings import build as build_part
from dnpo.settings import check, conf_folder
from tests.commands import succeed
from tests.conftest import Report, verdicts

Scores = Mapping[tuple[str, str], float | None]
NEW = "policy@0"


class Table(Judge):
    """Returns fixed scores, by id and source."""

    def __init__(self, scores: Scores, objection: str | None = None, canary: Canary | None = None) -> None:
        self.scores, self._objection, self._canary = scores, objection, canary

    def accepts(self, prompts: Sequence[Prompt]) -> str | None:
        return self._objection

    def canary(self, ledger: Ledger) -> Canary | None:
        return self._canary

    def forecast(self, prompts: Any, responses: Any, ledger: Any, seen: set[str]) -> Forecast:
        return Forecast(len(responses), 1, 0.5)

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Any
    ) -> list[Verdict]:
        found = [(r, self.scores[r.id, r.source]) for r in responses]
        return [Verdict(r.id, r.source, score, "" if score is not None else "asleep") for r, score in found]


def response(name: str, source: str = NEW) -> Response:
    return Response(name, source, f"{source} {name}", [], 0, "eos")


def say(by: Any, members: Sequence[Scores], responses: Sequence[Response]) -> list[Verdict]:
    named = {f"m{n}": Table(scores) for n, scores in enumerate(members)}
    return verdicts(Ensemble(members=named, by=by), [], responses)


def test_the_mean_by_hand() -> None:
    """Scores 10, 20 and 60: the mean is 30 and the deviations are 20, 10 and 30: √(1400 / 3)."""
    (verdict,) = say("mean", [{("a", NEW): score} for score in (10.0, 20.0, 60.0)], [response("a")])
    assert verdict == Verdict("a", NEW, 30.0, disagreement=pytest.approx(math.sqrt(1400 / 3)))


def test_the_mean_needs_no_human_response_and_keeps_the_order() -> None:
    asked = [response("b"), response("a", HUMAN), response("a")]
    first: Scores = {("b", NEW): 0.0, ("a", HUMAN): 100.0, ("a", NEW): 50.0}
    second: Scores = {("b", NEW): 0.0, ("a", HUMAN): 50.0, ("a", NEW): 100.0}
    found = say("mean", [first, second], asked)
    assert [(v.id, v.source, v.score, v.disagreement) for v in found] == [
        ("b", NEW, 0.0, 0.0),
        ("a", HUMAN, 75.0, 25.0),
        ("a", NEW, 75.0, 25.0),
    ]


@pytest.mark.parametrize(
    ("new", "old", "score", "apart"),
    [
        ((60, 70, 10), (50, 50, 50), 200 / 3, 100 * math.sqrt(2) / 3),
        ((60, 70, 80), (50, 50, 50), 100.0, 0.0),
        ((1, 2, 3), (50, 50, 50), 0.0, 0.0),
        ((60, 50, 10), (50, 50, 50), 50.0, 100 * math.sqrt(1 / 6)),  # one each way and a tie
        ((50, 50, 50), (50, 50, 50), 50.0, 0.0),
        ((51, 50, 50), (50, 50, 50), 200 / 3, 50 * math.sqrt(2) / 3),
        ((99, 20), (98, 30), 50.0, 50.0),
    ],
)
def test_the_majority_by_hand(new: Sequence[float], old: Sequence[float], score: float, apart: float) -> None:
    """Shares of votes; a tie is half a vote, and the size of a preference does not count."""
    members: list[Scores] = [{("a", NEW): n, ("a", HUMAN): o} for n, o in zip(new, old, strict=True)]
    found = say("majority", members, [response("a"), response("a", HUMAN)])
    assert found[0] == Verdict("a", NEW, pytest.approx(score), disagreement=pytest.approx(apart))
    assert found[1] == Verdict("a", HUMAN, 50.0, disagreement=0.0)


def test_several_samples_are_compared_with_the_one_human_response() -> None:
    scores: Scores = {("a", HUMAN): 50.0, ("a#0", NEW): 60.0, ("a#1", NEW): 40.0, ("b#0", NEW): 60.0}
    found = say("majority", [scores, scores], [response("a#0"), response("a#1"), response("a", HUMAN), response("b#0")])
    assert [v.score for v in found] == [100.0, 0.0, 50.0, None]
    assert found[3].reason == "no score of the human response to compare with"


@pytest.mark.parametrize("by", ["mean", "majority"])
def test_other_members_do_not_replace_one_that_failed(by: str) -> None:
    whole: Scores = {("a", NEW): 60.0, ("a", HUMAN): 50.0, ("b", NEW): 60.0, ("b", HUMAN): 50.0}
    asked = [response("a"), response("a", HUMAN), response("b"), response("b", HUMAN)]
    found = say(by, [whole, {**whole, ("a", NEW): None}], asked)
    assert found[0] == Verdict("a", NEW, None, "m1: asleep")
    assert None not in [v.score for v in found[1:]]


def test_without_a_score_of_the_human_response_there_is_no_majority() -> None:
    whole: Scores = {("a", NEW): 60.0, ("a", HUMAN): 50.0}
    found = say("majority", [whole, {**whole, ("a", HUMAN): None}], [response("a"), response("a", HUMAN)])
    assert [v.score for v in found] == [None, None]
    assert found[0].reason == "no score of the human response to compare with"
    assert found[1].reason == "m1: asleep"


def test_too_many_failures_count_over_the_whole_ensemble() -> None:
    whole: Scores = {(str(n), NEW): None if n < 2 else 1.0 for n in range(50)}
    asked = [response(str(n)) for n in range(50)]
    members = {"one": Table(whole), "two": Table(whole)}
    ledger = Ledger(Path("there-is-no-such-folder/ledger.sqlite"))
    assert len(judge_responses(Ensemble(members=members, max_unscored=0.04), [], asked, ledger, Report())) == 50
    with pytest.raises(DnpoError, match=r"2 of 50 responses have no score.*2 × one: asleep"):
        judge_responses(Ensemble(members=members, max_unscored=0.03), [], asked, ledger, Report())


def test_checks_of_members_run_before_the_run() -> None:
    ledger = Ledger(Path("there-is-no-such-folder/ledger.sqlite"))

    def ensemble(**members: Judge) -> Ensemble:
        return Ensemble(members=members)

    good, bad, quiet = (
        Table({}, None, Canary(True, "fine")),
        Table({}, "no answers", Canary(False, "not so")),
        Table({}),
    )
    assert ensemble(a=good, b=quiet).accepts([]) is None
    assert ensemble(a=good, b=bad).accepts([]) == "no answers"
    assert ensemble(a=quiet, b=quiet).canary(ledger) is None
    assert ensemble(a=good, b=quiet).canary(ledger) == Canary(True, "a: fine")
    assert ensemble(a=good, b=bad).canary(ledger) == Canary(False, "a: fine; b: not so")
    assert ensemble(a=good, b=bad).forecast([], [response("a")] * 3, ledger, set()) == Forecast(6, 2, 1.0)


# --- settings

RULES = {"_target_": "dnpo.judges.exact.rules.Rules"}
LONGER = {"_target_": "dnpo.judges.longer.Longer", "half": 100.0}
OPENAI = {"_target_": "dnpo.judges.asked.openai.OpenAI", "model": "gpt-4o", "max_cost": 1.0}


def ensemble(by: str = "mean", max_unscored: float = 0.02, **members: Mapping[str, Any]) -> Ensemble:
    given = {"_target_": "dnpo.judges.ensemble.Ensemble", "members": members, "by": by, "max_unscored": max_unscored}
    found: Ensemble = build_part("judge", check("judge", given))
    return found


def test_the_identity_depends_on_members_and_not_on_their_names_or_order() -> None:
    plain = ensemble(a=RULES, b=LONGER, c=OPENAI).identity()
    assert json.loads(json.dumps(plain)) == plain
    assert ensemble(z=OPENAI, x=LONGER, y=RULES).identity() == plain
    assert ensemble(a=RULES, b=LONGER, c={**OPENAI, "max_cost": 2.0, "concurrency": 3}).identity() == plain
    different = [
        ensemble(a=RULES, b=LONGER),
        ensemble("majority", a=RULES, b=LONGER, c=OPENAI),
        ensemble(a=RULES, b={**LONGER, "half": 101.0}, c=OPENAI),
        ensemble(a=RULES, b=LONGER, c={**OPENAI, "model": "gpt-4"}),
        ensemble(a=RULES, b=LONGER, c={**OPENAI, "mode": "pairwise"}),
        ensemble(a=RULES, b=LONGER, c=OPENAI, d=OPENAI),
        ensemble(a=RULES, b=RULES, c=OPENAI),
    ]
    found = [json.dumps(e.identity(), sort_keys=True) for e in different]
    assert len({json.dumps(plain, sort_keys=True), *found}) == len(different) + 1


def test_settings_outside_a_members_key_are_outside_the_ensembles() -> None:
    """Unit tests give the same verdicts for every number of parallel tests."""
    code = {"_target_": "dnpo.judges.exact.code.UnitTests", "i_know_this_runs_code": True}
    assert ensemble(a=RULES, b=code).identity() == ensemble(a=RULES, b={**code, "workers": 4}).identity()
    assert ensemble(a=RULES, b=code).identity() != ensemble(a=RULES, b={**code, "timeout": 3.0}).identity()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"by": "median"}, r"^judge\.by='median': "),
        ({"max_unscored": 2.0}, r"^judge\.max_unscored=2\.0: "),
        ({"member": {}}, r"^judge\.member: unknown setting\. Did you mean judge\.members\b"),
        ({"members": None}, r"^judge\.members: needs a value"),
        ({"members": 3}, r"^judge\.members=3: "),
        ({"members": {"a": RULES, "b": 3}}, r"^judge\.members="),
        ({"members": {"a": RULES, "b": {"_target_": "dnpo.judges.rules.Rulez"}}}, r"^judge\.members\.b\._target_=dnpo"),
        (
            {"members": {"a": RULES, "b": {**LONGER, "halve": 3}}},
            r"^judge\.members\.b\.halve: .*judge\.members\.b\.half\?",
        ),
        ({"members": {"a": RULES, "b": {**LONGER, "half": -1.0}}}, r"^judge\.members\.b\.half=-1\.0: "),
        ({"members": {"a": RULES, "b": {**OPENAI, "model": None}}}, r"^judge\.members\.b\.model: needs a value"),
        ({"members": {"a": RULES, "b": {**OPENAI, "reading": "mind"}}}, r"^judge\.members\.b\.reading='mind': "),
    ],
)
def test_wrong_settings_are_named_down_to_the_member(changes: dict[str, Any], problem: str) -> None:
    given = {"_target_": "dnpo.judges.ensemble.Ensemble", "members": {"a": RULES, "b": LONGER}, **changes}
    with pytest.raises(SettingsError, match=problem):
        check("judge", given)


def test_an_ensemble_needs_two_members_that_give_scores() -> None:
    for few in ({}, {"a": Rules()}):
        with pytest.raises(SettingsError, match=rf"^members: has {len(few)}; an ensemble needs two"):
            Ensemble(members=few)
    with pytest.raises(SettingsError, match=r"^members\.b: gives no scores"):
        Ensemble(members={"a": Rules(), "b": NoJudge()})


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose("train", overrides=["judge=ensemble", *overrides])


def test_an_error_while_a_member_is_built_gives_a_message() -> None:
    settings = ["judge@judge.members.second=openai", "judge.members.second.model=m"]
    with pytest.raises(SettingsError, match=r"^judge\..*max_cost=1: there is no price for m"):
        build(composed(*settings, "judge.members.second.max_cost=1.0"))


def test_members_are_chosen_and_configured_like_any_other_part() -> None:
    run, _, settings = build(
        composed(
            "judge@judge.members.first=numeric",
            "judge@judge.members.second=choice",
            "judge.members.second.letters=ABCD",
            "+judge@judge.members.third=rules",
            "judge.by=majority",
        )
    )
    judge = run.judge
    assert {name: type(member).__name__ for name, member in judge.members.items()} == {
        "first": "Numeric",
        "second": "Choice",
        "third": "Rules",
    }
    assert (judge.by, judge.members["second"].letters) == ("majority", "ABCD")
    assert settings["judge"]["members"]["second"]["letters"] == "ABCD"


def test_the_command_line_shows_an_ensemble(tmp_path: Path) -> None:
    shown = succeed(tmp_path, "judge=ensemble", "judge@judge.members.first=numeric", "--cfg", "job")
    judge = yaml.safe_load(shown)["judge"]
    assert judge["members"]["first"] == {"_target_": "dnpo.judges.exact.answers.Numeric"}
    assert judge["members"]["second"]["_target_"] == "dnpo.judges.exact.rules.Rules"
    assert judge["_target_"] == "dnpo.judges.ensemble.Ensemble"
