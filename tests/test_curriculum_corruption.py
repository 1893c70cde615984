"""The corruptions by which measures for pruning are tried, and the area under the ROC curve."""

import ast
import random

import numpy as np
import pytest
from benchmarks.corruption import CODE, TEXT, auc, corrupt, functions, respond_in_pairs, tiny_texts

from dnpo.data.tinyworld import FAMILIES, problems

FUNCTION = """\
def last(rows, n):
    total = 0
    for i in range(n):
        if rows[i] == 3 and i < n:  # compare
            total += rows[i]
    return total
"""


def test_auc_equals_scikit_learns() -> None:
    assert auc([2, 3], [1, 2]) == 0.875
    draw = np.random.default_rng(0)
    for _ in range(20):
        corrupted, original = draw.integers(0, 9, 30), draw.integers(0, 7, 50)
        metrics = pytest.importorskip("sklearn.metrics")
        labels, values = [1] * 30 + [0] * 50, np.concatenate([corrupted, original])
        assert auc(corrupted, original) == pytest.approx(metrics.roc_auc_score(labels, values))


def test_code_is_corrupted_as_documented() -> None:
    made = {name: corruption(random.Random(0), FUNCTION) for name, corruption in CODE.items()}
    assert made["invalid names"] == FUNCTION.replace("total", "1total").replace("for i", "for 1i").replace(
        "[i]", "[1i]"
    ).replace("and i", "and 1i")
    assert made["conditions negated"] == FUNCTION.replace("==", "!=").replace("i < n", "i >= n")
    assert made["indices off by one"] == FUNCTION.replace("[i]", "[i + 1]")
    dropped = made["closing brackets"] or ""
    assert dropped.count(")") + dropped.count("]") == 2  # of 4 a third, rounded up
    assert [letter for letter in FUNCTION if letter not in ")]"] == [letter for letter in dropped if letter not in ")]"]
    assert all(corruption(random.Random(0), "pass\n") is None for corruption in CODE.values())


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_the_syntax_of_code_is_broken_at_the_intended_place() -> None:
    code = functions(60)
    assert code == functions(60)
    assert len(set(code)) == 60
    for name, corruption in CODE.items():
        both = corrupt([("", each) for each in code], corruption, 0)
        assert len(both[0]) > 5
        broken = 0
        for changed, original in zip(*both, strict=True):
            assert changed.id == original.id
            assert changed.chosen != original.chosen
            try:
                ast.parse(changed.chosen)
            except SyntaxError:
                broken += 1
        syntax = name in ("closing brackets", "invalid names")
        assert broken == (len(both[0]) if syntax else 0), name


def test_texts_are_corrupted_in_matched_pairs() -> None:
    made = {name: corruption(random.Random(1), "5 plus 3 is 8.") for name, corruption in TEXT.items()}
    assert made["truncated"] == "5 plus"
    assert sorted((made["words reordered"] or "").split()) == sorted(["5", "plus", "3", "is", "8."])
    assert made["said twice"] == "5 plus 3 is 8. 5 plus 3 is 8."
    assert TEXT["truncated"](random.Random(0), "word") is None
    assert TEXT["words reordered"](random.Random(0), "a a") is None


def test_flaws_leave_the_rest_of_a_response_as_it_is() -> None:
    for family in FAMILIES:
        for seed, problem in enumerate(problems(family, 1)[:20]):
            made = respond_in_pairs(problem, seed)
            phrasings = [each for each in problem.phrasings if made[""] == each.format(problem.answer)]
            assert len(phrasings) == 1
            assert made["wrong answer"] in [phrasings[0].format(wrong) for wrong in problem.wrong]
            assert made["incomplete"] == problem.short.format(problem.answer)
            assert made["sloppy"] != made[""]
    assert len(list(tiny_texts(13))) == 13
