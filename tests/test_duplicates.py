"""Near duplicates: worked numbers, and the same pairs as by a comparison of all texts with all others."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from dnpo.data.duplicates import COMMON, MANY, _Index, near, repeats

MARKS = re.compile(r"""[\s.,;:!?'"`´‘’“”„«»()\[\]{}…]+""")


def shingles(text: str) -> frozenset[str]:
    """Every three successive words; all words of a shorter text; the text itself where it has no words."""
    words = re.findall(r"\w+|[^\w ]", MARKS.sub(" ", text.casefold()))
    return frozenset({" ".join(words[i : i + 3]) for i in range(len(words) - 2)} or {" ".join(words) or text.strip()})


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)


def own_shingles(texts: list[str]) -> list[frozenset[str]]:
    """Without shingles of more than one text in twenty, unless none would remain."""
    sets = [shingles(text) for text in texts]
    counts = Counter(shingle for some in sets for shingle in some)
    form = {shingle for shingle, count in counts.items() if count > max(len(texts) * COMMON, MANY)}
    return [some - form or some for some in sets]


def test_shingles() -> None:
    """The plain rules with which the index is compared below."""
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
def test_changes_that_make_a_text_a_different_one(one: str, other: str, same: bool) -> None:
    assert (near([one], [other], 1.0) == [(0, 0, 1.0)]) is same


def test_worked_numbers() -> None:
    """Ten words have eight shingles. Another last word changes one of them: 7 of 9 are common."""
    one, other = "a b c d e f g h i j", "a b c d e f g h i k"
    assert jaccard(shingles(one), shingles(other)) == 7 / 9
    assert near([one], ["x", other, one], 7 / 9) == [(0, 1, 7 / 9), (0, 2, 1.0)]
    assert near([one], [other], 0.78) == []
    assert near([], [one], 0.5) == near([one], [], 0.5) == near([], [], 0.5) == []
    assert repeats([], 0.5) == []


def texts(count: int, seed: int) -> list[str]:
    """Texts with few different words, some of them changed copies of others: many pairs of every similarity."""
    rng = random.Random(seed)
    found = [" ".join(rng.choices("abcdefg", k=rng.randint(0, 14))) for _ in range(count // 2)]
    while len(found) < count:
        words = rng.choice(found).split()
        for _ in range(rng.randint(0, 2)):
            words.insert(rng.randint(0, len(words)), rng.choice("abcdefgh"))
        found.append(" ".join(words))
    return found


def filled(count: int, seed: int) -> list[str]:
    """Such texts in one of three templates or in none. Two thirds use the first; some consist of a template alone."""
    rng = random.Random(seed)
    forms = ["please " + " ".join(f"{name}{i}" for i in range(12)) for name in "xyz"]
    some = texts(count, seed)
    return [f"{rng.choice([*[forms[0]] * 6, *forms[1:], ''])} {text if rng.random() < 0.9 else ''}" for text in some]


@pytest.mark.parametrize("make", [texts, filled])
@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 2 / 3, 0.75, 0.9, 1.0])
def test_exactly_the_similar_pairs_are_found(threshold: float, make: Callable[[int, int], list[str]]) -> None:
    ours, others = make(120, 1), make(150, 2)
    sets = own_shingles([*ours, *others])
    likeness = {(i, j): jaccard(sets[i], sets[len(ours) + j]) for i in range(len(ours)) for j in range(len(others))}
    expected = [(i, j, share) for (i, j), share in sorted(likeness.items()) if share >= threshold]
    assert near(ours, others, threshold) == expected
    assert expected


@pytest.mark.parametrize("make", [texts, filled])
@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
def test_of_repeated_texts_the_first_is_kept(threshold: float, make: Callable[[int, int], list[str]]) -> None:
    some = make(200, 3)
    sets = own_shingles(some)
    kept: list[int] = []
    expected = []
    for i in range(len(some)):
        like = [(j, jaccard(sets[i], sets[j])) for j in kept]
        like = [(j, share) for j, share in like if share >= threshold]
        if like:
            expected.append((i, *like[0]))
        else:
            kept.append(i)
    assert repeats(some, threshold) == expected
    assert expected


def test_later_rows_do_not_change_the_result_for_earlier_ones() -> None:
    found = repeats(texts(200, 3), 0.6)
    assert repeats([*texts(200, 3), *texts(50, 4)], 0.6)[: len(found)] == found


def test_a_template_that_most_texts_share_does_not_make_them_similar() -> None:
    """Eight different words after 151 common ones; an earlier version took all but the first for repeats."""
    form = " ".join(f"form{i}" for i in range(151))
    own = [" ".join(f"{i}x{n}" for n in range(8)) for i in range(100)]
    assert repeats([f"{form} {text}" for text in own], 0.9) == []
    # A text of the template alone is compared whole, and so are a few texts.
    assert [i for i, *_ in repeats([*own, *[f"{form} {'!' * i}" for i in range(150)]], 0.9)] == [*range(101, 250)]
    assert len(repeats([f"{form} {text}" for text in own[:MANY]], 0.9)) == MANY - 1


def test_texts_that_share_a_template_are_not_all_compared() -> None:
    """If too few texts have the template to leave it out, the order in the sets bounds the common part."""
    form = " ".join(f"form{i}" for i in range(151))
    rng = random.Random(0)
    some = [f"{form} {' '.join(str(rng.random()) for _ in range(6))}" for _ in range(400)]
    some += [" ".join(str(rng.random()) for _ in range(99)) for _ in range(500)]
    compared = 0

    class Counted(_Index):
        def _members(self, i: int) -> list[int]:
            nonlocal compared
            compared += 1
            return super()._members(i)

    index = Counted(some, 0.9)
    for i in range(len(some)):
        assert index.like(i) == []
        index.add(i)
    assert compared == 0


def test_progress_is_reported_to_the_end() -> None:
    told: list[tuple[str, int, int]] = []
    repeats(texts(10, 1), 0.9, lambda *what: told.append(what))
    assert [done for what, done, of in told if what == "comparing prompts"] == list(range(1, 11))
    assert {of for *_, of in told} == {10}


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.1])
def test_meaningless_thresholds_are_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="expected a number above 0"):
        near(["a"], ["a"], threshold)


def test_real_prompts(shared: Path) -> None:
    """The default is above the similarity of two questions from one template with other fillings, of any length."""
    rows = [json.loads(line)["prompt"] for line in (shared / "data" / "sft_dolly.jsonl").read_text().splitlines()]
    found = repeats(rows, 0.9)
    assert 15 < len(found) < 30
    assert all(share == 1 for _, _, share in found)
    form = "In the series A Song of Ice and Fire, who is the founder of House {}?"
    ((_, _, share),) = near([form.format("Stark")], [form.format("Thenn")], 0.5)
    assert 0.85 < share < 0.9


def test_several_templates_do_not_make_texts_similar() -> None:
    """As in a data set of a few templates with many fillings each."""
    rng = random.Random(5)
    forms = [" ".join(f"w{form}x{n}" for n in range(60)) for form in range(6)]
    texts = [f"{forms[n % 6]} " + " ".join(f"o{rng.randrange(10**6)}" for _ in range(4)) for n in range(600)]
    assert repeats(texts, 0.9) == []
    assert [i for i, *_ in repeats([*texts, texts[0] + " and"], 0.7)] == [600]
