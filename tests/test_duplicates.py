"""Near duplicates: worked numbers, and the same pairs as every text compared with every other."""

import itertools
import json
import random
from pathlib import Path

import pytest

from dnpo.data.duplicates import jaccard, near, repeats, shingles


def test_shingles() -> None:
    assert shingles("The cat, the CAT sat!") == {"the cat the", "cat the cat", "the cat sat"}
    assert shingles("the cat   (the cat)\nsat") == shingles("The cat, the CAT sat!")
    assert shingles("Hi there!") == {"hi there"}
    assert shingles(" ?? ") == {"??"}
    assert shingles("") == {""}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is C++?", "What is C?", False),
        ("What is 2 + 2?", "What is 2 - 2?", False),
        ("What is 2 + 2?", "what is 2 + 2", True),
        ("Use 'happy.'", 'Use "happy".', True),
        ("STRASSE", "straße", True),
        ("one two", "two one", False),
    ],
)
def test_what_makes_a_text_another(one: str, other: str, same: bool) -> None:
    assert (shingles(one) == shingles(other)) is same


def test_worked_numbers() -> None:
    """Ten words have eight shingles, and another last word is in one: 7 are common, of 9."""
    one, other = "a b c d e f g h i j", "a b c d e f g h i k"
    assert jaccard(shingles(one), shingles(other)) == 7 / 9
    assert near([one], ["x", other, one], 7 / 9) == [(0, 1, 7 / 9), (0, 2, 1.0)]
    assert near([one], [other], 0.78) == []
    assert near([], [one], 0.5) == near([one], [], 0.5) == []


def texts(count: int, seed: int) -> list[str]:
    """Texts of few words, some of them changed copies of others: many pairs of every likeness."""
    rng = random.Random(seed)
    found = [" ".join(rng.choices("abcdefg", k=rng.randint(0, 14))) for _ in range(count // 2)]
    while len(found) < count:
        words = rng.choice(found).split()
        for _ in range(rng.randint(0, 2)):
            words.insert(rng.randint(0, len(words)), rng.choice("abcdefgh"))
        found.append(" ".join(words))
    return found


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 2 / 3, 0.75, 0.9, 1.0])
def test_every_pair_is_found_and_no_other(threshold: float) -> None:
    ours, others = texts(120, 1), texts(150, 2)
    likeness = {
        (i, j): jaccard(shingles(a), shingles(b))
        for (i, a), (j, b) in itertools.product(enumerate(ours), enumerate(others))
    }
    expected = [(i, j, share) for (i, j), share in sorted(likeness.items()) if share >= threshold]
    assert near(ours, others, threshold) == expected
    assert expected


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
def test_repeats_keep_the_first(threshold: float) -> None:
    some = texts(200, 3)
    kept: list[int] = []
    expected = []
    for i, text in enumerate(some):
        like = [(j, jaccard(shingles(text), shingles(some[j]))) for j in kept]
        like = [(j, share) for j, share in like if share >= threshold]
        if like:
            expected.append((i, *like[0]))
        else:
            kept.append(i)
    assert repeats(some, threshold) == expected
    assert repeats(some, threshold) == repeats(list(some), threshold)
    # What comes later changes nothing of what came before.
    assert repeats([*some, *texts(50, 4)], threshold)[: len(expected)] == expected


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.1])
def test_thresholds_that_mean_nothing(threshold: float) -> None:
    with pytest.raises(ValueError, match="expected a number above 0"):
        near(["a"], ["a"], threshold)


def test_real_prompts(shared: Path) -> None:
    """The default is above the likeness of two questions that fill one form otherwise, however long it is."""
    rows = [json.loads(line)["prompt"] for line in (shared / "data" / "sft_dolly.jsonl").read_text().splitlines()]
    found = repeats(rows, 0.9)
    assert 15 < len(found) < 30
    assert all(share == 1 for _, _, share in found)
    form = "In the series A Song of Ice and Fire, who is the founder of House {}?"
    ((_, _, share),) = near([form.format("Stark")], [form.format("Thenn")], 0.5)
    assert 0.85 < share < 0.9
