"""Judges that know the answer: 100 points or none, and the forms of an answer that count.

Expectations are worked out by hand from the documented rules.
"""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from dnpo.errors import SettingsError
from dnpo.judges.exact.answers import Checker, Choice, Exact, Numeric, final_number, gold_number, normalise, numbers
from dnpo.records import HUMAN, Prompt, Response, Verdict
from tests.conftest import verdicts


def judge(checker: Checker, answer: str | None, text: str) -> Verdict:
    prompt = Prompt("p", [{"role": "user", "content": "?"}], "human", answer=answer)
    (verdict,) = verdicts(checker, [prompt], [Response("p", HUMAN, text, [1, 2], 2, "eos")])
    return verdict


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("#### 72", "72"),
        ("The answer is 72.", "72"),
        ("The answer is: **1,234.50**", "1234.5"),
        ("**Answer:** $5", "5"),
        ("**Answer**: -5", "-5"),
        ("That is -$3.", "-3"),
        ("That is $-3.", "-3"),
        ("That is −3.", "-3"),
        ("We have 10-5", "5"),
        ("We have (7)-5", "5"),
        ("10 - 5", "5"),
        ("First 5, then 6, at last 7 eggs", "7"),
        # a mark counts before later numbers
        ("The answer is 7. I checked it 2 times.", "7"),
        ("Answer: 3 + 4 = 7, of 9.", "7"),
        (r"So \boxed{42}, in 3 steps", "42"),
        (r"So \boxed{\frac{1}{2}}", "1/2"),
        (r"It is \$18", "18"),
        # the last mark counts, and #### before the others
        ("The answer is 3. No, the answer is 4.", "4"),
        ("The answer is 3.\n#### 4", "4"),
        ("The answer is:\n\n12", "12"),
        ("1/2", "0.5"),
        (".25 of it", "0.25"),
        ("about 1e3", "1000"),
        ("50%", "50"),
        ("72.00", "72"),
        ("in 1,234,567 years", "1234567"),
        ("1, 2, 3", "3"),
        ("no number", None),
        ("a B12 vitamin", None),
        ("", None),
    ],
)
def test_final_number(text: str, value: str | None) -> None:
    assert final_number(text) == (None if value is None else Fraction(value))


def test_a_list_is_not_read_as_thousands() -> None:
    assert numbers("1,23 and 12,3456") == [1, 23, 12, 3456]


def test_gold_numbers() -> None:
    """Only the number after the mark counts, not the steps of the solution."""
    assert gold_number("She has 16 - 3 = <<16-3=13>>13.\n#### 1,018") == 1018
    assert gold_number("72") == 72
    assert gold_number("there is none") is None


def test_numeric_verdicts() -> None:
    assert judge(Numeric(), "so 3 * 6 = 18\n#### 18", "She makes $18.00 every day.").score == 100.0
    assert judge(Numeric(), "18", "It is 18.5.").score == 0.0
    # a response without an answer is wrong: it gets a score, and the judge has not failed
    silent = judge(Numeric(), "18", "I do not know.")
    assert (silent.score, silent.reason) == (0.0, "no number in the response")
    assert judge(Numeric(), None, "18").score is None


def test_on_real_problems(shared: Path) -> None:
    """Every gold solution of GSM8K counts as its answer, in several forms, and no other number does."""
    rows = [json.loads(line) for line in (shared / "data/bench_mini/gsm8k_test.jsonl").open()]
    prompts = [
        Prompt(r["id"], [{"role": "user", "content": r["question"]}], r["answer"], answer=r["answer"]) for r in rows
    ]
    assert len(rows) > 50
    assert Numeric().accepts(prompts) is None
    for row in rows:
        solution, _, gold = row["answer"].partition("####")
        for text in (row["answer"], f"{solution}\nThe answer is {gold.strip()}.", f"It is ${gold.strip()}.00."):
            assert judge(Numeric(), row["answer"], text).score == 100.0, (row["id"], text)
        assert judge(Numeric(), row["answer"], f"{solution}\n#### {gold_number(gold)}1").score == 0.0


def test_on_real_choices(shared: Path) -> None:
    rows = [json.loads(line) for line in (shared / "data/bench_mini/mmlu_test.jsonl").open()]
    for row in rows:
        right, wrong = "ABCD"[row["answer"]], "ABCD"[row["answer"] - 1]
        text = row["choices"][row["answer"]]
        for said in (right, f"({right}) {text}", f"{right}. {text}", f"The answer is {right}.", f"**Answer: {right}**"):
            assert judge(Choice(letters="ABCD"), right, said).score == 100.0, said
            assert judge(Choice(letters="ABCD"), wrong, said).score == 0.0, said


# --- choices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        (" **(B)**. ", "B"),
        ("B) blue", "B"),
        ("B. Because A is wrong", "B"),
        ("The answer is (c).", "C"),
        ("The correct answer is option D", "D"),
        (r"\boxed{\text{A}}", "A"),
        ("The answer is A. No: the answer is B.", "B"),
        ("It could be (A), but rather (C).", "C"),
        ("Let me think about it.\nD", "D"),
        # words are not letters
        ("A dog", None),
        ("The answer is a dog", None),
        ("The answer is a.", "A"),
        ("**Answer**: (b) it is", "B"),
        ("The answer is about nothing", None),
        ("I think so", None),
        ("E.g. nothing", None),
        ("", None),
    ],
)
def test_choice(text: str, letter: str | None) -> None:
    assert Choice().letter(text) == letter


def test_choice_settings() -> None:
    assert judge(Choice(letters="1234"), "3", "The answer is 3").score == 100.0
    assert judge(Choice(letters="ABC"), "B", "(D)").score == 0.0
    assert judge(Choice(), "(b)", "B").score == 100.0
    objection = Choice(letters="ABC").accepts([Prompt("x", [], "", answer="D"), Prompt("y", [], "", answer="A")])
    assert objection is not None
    assert "judge=choice" in objection
    assert "1 of 2" in objection
    with pytest.raises(SettingsError, match="letters=AA: expected different letters"):
        Choice(letters="AA")


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "text", "exact", "normalised"),
    [
        ("Paris", " Paris\n", 100.0, 100.0),
        ("Paris", "paris.", 0.0, 100.0),
        ("The Eiffel Tower", "eiffel   tower!", 0.0, 100.0),
        ("ﬁne", "fine", 0.0, 100.0),
        ("2.5", "25", 0.0, 0.0),
        ("-5", "5", 0.0, 0.0),
        ("well-known", "well known", 0.0, 100.0),
        ("Paris", "It is Paris", 0.0, 0.0),
        ("Paris", "", 0.0, 0.0),
    ],
)
def test_texts(answer: str, text: str, exact: float, normalised: float) -> None:
    assert judge(Exact(normalised=False), answer, text).score == exact
    assert judge(Exact(normalised=True), answer, text).score == normalised


def test_normal_form() -> None:
    assert normalise("  The “Cat” costs -2.50, an  apple.") == "cat costs -2.50 apple"
    assert Exact().accepts([Prompt("x", [], "", answer="the")]) is not None
    assert Exact(normalised=False).accepts([Prompt("x", [], "", answer="the")]) is None
