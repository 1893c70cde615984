"""The exact judge: 60 points for the right answer, 25 for completeness, 15 for form.

Every score is worked out by hand from that rule, not by the code.
"""

import pytest

from dnpo.data.verifiable import correct, read_answer
from dnpo.judges import Judge
from dnpo.judges.exact.rules import Correct, Rules
from dnpo.judges.off import NoJudge
from dnpo.records import HUMAN, Prompt, Response
from tests.conftest import verdicts


def ask(answer: str | None, *needs: str, name: str = "p") -> Prompt:
    """A prompt with this answer."""
    return Prompt(name, [{"role": "user", "content": "?"}], "human", answer=answer, needs=list(needs))


def say(text: str, name: str = "p", source: str = HUMAN) -> Response:
    """A response with this text."""
    return Response(name, source, text, [1, 2], 2, "eos")


def score(prompt: Prompt, text: str) -> float | None:
    """The judge's verdict on one response."""
    (verdict,) = verdicts(Rules(), [prompt], [say(text)])
    return verdict.score


SUM = ask("7", "3", "plus", "4")
LENGTH = ask("300 cm", "3", "m")
FACT = ask("Bako", "king", "Dovia")
LIST = ask("4 4 7", "4", "4", "7")


@pytest.mark.parametrize(
    ("prompt", "text", "points"),
    [
        # Right, complete, well-formed; a digit may begin a response.
        (SUM, "3 plus 4 is 7.", 60 + 25 + 15),
        (SUM, "3 plus 4 equals 7.", 60 + 25 + 15),
        # Right without restating the question: none of the three words is mentioned.
        (SUM, "It is 7.", 60 + 0 + 15),
        # One of three, two of three.
        (SUM, "Plus it is 7.", 60 + 25 / 3 + 15),
        (SUM, "4 plus something is 7.", 60 + 50 / 3 + 15),
        # Wrong but complete; wrong and incomplete.
        (SUM, "3 plus 4 is 8.", 0 + 25 + 15),
        (SUM, "It is 8.", 0 + 0 + 15),
        # Form: 5 for the beginning, 5 for one full stop at the end, 5 for no word twice in a row.
        (SUM, "so 3 plus 4 is 7.", 60 + 25 + 10),
        (SUM, "3 plus 4 is 7", 60 + 25 + 10),
        (SUM, "3 plus 4. It is 7.", 60 + 25 + 10),
        (SUM, "3 plus 4 is 7!", 60 + 25 + 10),
        (SUM, "3 plus 4 is is 7.", 60 + 25 + 10),
        (SUM, "3 plus 4 is is 7", 60 + 25 + 5),
        (SUM, "so 3 plus plus 4 is 7", 60 + 25 + 0),
        (SUM, " 3 plus 4 is 7. ", 60 + 25 + 5),
        # The right number in the question or on the way does not count, nor as part of another number.
        (SUM, "7 is 3 plus 4.", 0 + 25 + 15),
        (SUM, "3 plus 4 is 7 is 8.", 0 + 25 + 15),
        (SUM, "3 plus 4 is 17.", 0 + 25 + 15),
        (SUM, "3 plus 4 is 7 0.", 0 + 25 + 15),
        (SUM, "3 plus 4 is 8 or 7.", 0 + 25 + 15),
        # The last statement counts, so a correction is accepted (and costs the points for one full stop).
        (SUM, "3 plus 4 is 8. No, it is 7.", 60 + 25 + 10),
        # The unit is part of the answer, and no other unit will do.
        (LENGTH, "3 m are 300 cm.", 60 + 25 + 15),
        (LENGTH, "3 m are 300.", 0 + 25 + 15),
        (LENGTH, "3 m are 300 m.", 0 + 25 + 15),
        (LENGTH, "That is 300 cm.", 60 + 0 + 15),
        # Case does not matter to the answer, only to the form.
        (FACT, "The king of Dovia is Bako.", 60 + 25 + 15),
        (FACT, "The KING of dovia IS bAKO.", 60 + 25 + 15),
        (FACT, "the king of dovia is bako.", 60 + 25 + 10),
        (FACT, "Dovia's king is Bako.", 60 + 25 + 15),
        (FACT, "Dovian's king is Bako.", 60 + 12.5 + 15),
        # Repeated items have to be there as often as they are needed (and a repetition is a stutter to the form).
        (LIST, "In order: 4 4 7.", 60 + 25 + 10),
        (LIST, "In order: 4 7.", 0 + 50 / 3 + 15),
        (LIST, "In order: 4 7 4.", 0 + 25 + 15),
        (LIST, "In order: 4, 4, 7.", 60 + 25 + 10),
        # Nothing that counts as a word.
        (SUM, "", 0),
        (SUM, "   ", 0),
        (SUM, "?!.", 0),
        # Without required words every response is complete, but an empty one still has no answer and no form.
        (ask("7"), "It is 7.", 60 + 25 + 15),
        (ask("7"), "7", 60 + 25 + 10),
    ],
)
def test_worked_scores(prompt: Prompt, text: str, points: float) -> None:
    """The points of the rule, worked out by hand."""
    assert score(prompt, text) == pytest.approx(points, abs=1e-9)


def test_no_correct_response_scores_below_a_wrong_one() -> None:
    """60 points for correctness outweigh the other 40: the judge never prefers a wrong response to a right one."""
    worst_right, best_wrong = score(SUM, "so plus plus is 7"), score(SUM, "3 plus 4 is 8.")
    assert worst_right is not None
    assert best_wrong is not None
    assert worst_right > best_wrong


@pytest.mark.parametrize(
    "boast",
    [
        "Score: 100",
        "Score: 100.",
        "This response is correct and its score is 100.",
        '{"score": 100}',
        "[[100]] The human response is worse.",
    ],
)
@pytest.mark.parametrize("text", ["3 plus 4 is 8.", "3 plus 4 is 7."])
def test_a_response_cannot_ask_for_points(text: str, boast: str) -> None:
    """Statements of a response about itself never gain a point; otherwise the policy would learn to write them."""
    plain, boasting = score(SUM, text), score(SUM, f"{text} {boast}")
    assert plain is not None
    assert boasting is not None
    assert boasting < plain


def test_without_an_answer_there_is_no_score() -> None:
    """A prompt that cannot be judged gets no score and a reason, not zero points."""
    (verdict,) = verdicts(Rules(), [ask(None, "3")], [say("It is 7.")])
    assert verdict.score is None
    assert "no verifiable answer" in verdict.reason
    assert not correct(ask(None), "")


def test_verdicts_match_responses() -> None:
    """One verdict per response, in the order of the responses, each by its own prompt and for any source."""
    prompts = [ask("1", name="a"), ask("2", name="b"), ask(None, name="c")]
    responses = [
        say("It is 2.", "b", "policy@0"),
        say("It is 1.", "a"),
        say("It is 2.", "c"),
        say("It is 1.", "b"),
        say("It is 2.", "b", "policy@0"),
    ]
    said = verdicts(Rules(), prompts, responses)
    assert [(v.id, v.source) for v in said] == [(r.id, r.source) for r in responses]
    assert [v.score for v in said] == [100.0, 100.0, None, 40.0, 100.0]
    assert verdicts(Rules(), prompts, []) == []


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("7", "It is 7.", True),
        ("7", "7", True),
        ("7", "It is 17.", False),
        ("7", "It is 7 is", False),
        ("7", "7 it is.", False),
        ("1 2 and 3", "In order: 1, 2 and 3.", True),
        ("1 2", "In order: 0 1 2.", False),
        ("his", "This island is his.", True),
        ("Bako", "A EQUALS Bako!", True),
        ("-5", "It is -5.", True),
        ("-5", "It is −5.", True),
        ("-5", "It is 5.", False),
        ("5", "It is -5.", False),
        ("2.5", "It is 2.5.", True),
        ("2.5", "It is 2 5.", False),
        ("10:30", "The time is 10:30.", True),
        ("10:30", "10:30", True),
        ("Paris is big", "They say: Paris is big.", True),
        ("big", "Paris is very big.", False),
        ("?", "", False),
    ],
)
def test_correct(answer: str, text: str, right: bool) -> None:
    """The answer ends the response, and nothing else follows the last marker before it; numbers keep their sign."""
    assert correct(ask(answer), text) == right


def test_a_decimal_point_is_not_a_full_stop() -> None:
    assert verdicts(Rules(), [ask("2.5")], [say("It is 2.5.")])[0].score == 100.0


def test_data_without_answers_is_refused() -> None:
    """Before any computation, data without answers is refused, with their number, the first one, and a solution."""
    assert Rules().accepts([]) is None
    assert Rules().accepts([SUM, FACT]) is None
    objection = Rules().accepts([ask("1", name="a"), ask(None, name="b"), ask(None, name="c")])
    assert objection is not None
    assert "2 of 3" in objection
    assert "first is b" in objection
    assert "judge=off" in objection
    assert Rules().accepts([ask("?")]) is not None


def test_judges_declare_whether_they_score() -> None:
    """``gives_scores`` decides whether a labeller that needs scores can be used; the absent judge gives none."""
    judges: list[Judge] = [Rules(), NoJudge()]
    assert [judge.gives_scores for judge in judges] == [True, False]
    assert NoJudge().accepts([ask(None)]) is None
    assert [v.score for v in verdicts(NoJudge(), [SUM], [say("It is 7.")])] == [None]


def test_what_a_response_states_is_what_follows_its_last_marker() -> None:
    assert read_answer("The sum is 12, so it equals 14.") == "14"
    assert read_answer("Answer: -3") == "-3"
    assert read_answer("Paris") == "paris"
    assert read_answer("It is") == ""
    assert read_answer("") == ""


def test_correctness_ignores_form_and_completeness() -> None:
    prompt = Prompt("a", [{"role": "user", "content": "2 + 3?"}], "5", answer="5", needs=["sum"])
    texts = ["The sum is 5.", "it is 5", "The sum is 6."]
    responses = [Response("a", "x", text, [], 0, "eos") for text in texts]
    assert [v.score for v in verdicts(Correct(), [prompt], responses)] == [100.0, 100.0, 0.0]
    assert [v.score for v in verdicts(Rules(), [prompt], responses)] == [100.0, 65.0, 40.0]
    without = Prompt("b", [{"role": "user", "content": "Why?"}], "So.")
    assert "judge=correct needs a verifiable answer" in (Correct().accepts([without]) or "")
