"""Curricula that read earlier iterations, and several curricula in turn: which pairs stay, and what is refused."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from dnpo.data.curriculum import Context, Counts, Curriculum, NoCurriculum
from dnpo.data.curriculum.earlier import Accumulate, Mix, apportion, hash_of
from dnpo.errors import SettingsError
from dnpo.records import Pair
from dnpo.settings import build, check, part_key

PATH = "dnpo.data.curriculum"


def embed(pairs: Sequence[Pair]) -> np.ndarray:
    raise AssertionError("nothing here embeds")


def context(iteration: int) -> Context:
    return Context(0, iteration, embed)


def pair(name: str, iteration: int, words: int = 0, sample: int = 0) -> Pair:
    """A pair of a prompt; ``words`` decides the tokens of the rejected response."""
    number = int.from_bytes(hash_of(name)[:2])
    return Pair(
        id=name,
        messages=[{"role": "user", "content": name}],
        prompt_ids=[1, number],
        chosen="yes",
        rejected="no",
        chosen_ids=[7],
        rejected_ids=[8, words],
        chosen_source="human",
        rejected_source=f"policy@{iteration}",
        chosen_score=None,
        rejected_score=None,
        flipped=False,
        rejected_sample=sample,
        iteration=iteration,
    )


def written(iteration: int, count: int, first: int = 0) -> list[Pair]:
    """One pair per prompt, whose tokens differ from those in every other iteration."""
    return [pair(f"row-{i}", iteration, words=iteration + 1) for i in range(first, first + count)]


# --- accumulate


def test_accumulate_adds_the_last_iterations() -> None:
    new, old, older = written(2, 5), written(1, 4), written(0, 3)
    assert Accumulate(last=1)(new, [old, older], context(2)) == ([*new, *old], {"earlier": 4, "repeated": 0})
    assert Accumulate(last=2)(new, [old, older], context(2)) == ([*new, *old, *older], {"earlier": 7, "repeated": 0})
    assert Accumulate(last=5)(new, [old], context(1))[0] == [*new, *old], "early iterations take what there is"
    assert Accumulate(last=1)(new, [], context(0)) == (new, {"earlier": 0, "repeated": 0})
    assert Accumulate(last=3).reads_history == 3


def test_accumulate_keeps_the_newest_of_equal_pairs() -> None:
    new = [pair("a", 2, words=1), pair("b", 2, words=2)]
    old = [replace(pair("a", 1, words=1), strength=0.3), pair("b", 1, words=5)]
    older = [pair("b", 0, words=5), pair("b", 0, words=6)]
    kept, counts = Accumulate(last=2)(new, [old, older], context(2))
    assert kept == [*new, old[1], older[1]]
    assert counts == {"earlier": 2, "repeated": 2}


def test_accumulate_leaves_repeats_within_an_iteration() -> None:
    """Duplicates belong to the data: a row that is drawn twice counts twice, as it does without a curriculum."""
    twice = [pair("a", 1), pair("a", 1, sample=1)]
    assert Accumulate()(twice, [], context(0))[0] == twice
    assert Accumulate()([], [twice], context(1))[0] == twice


# --- mix


def test_mix_halves_by_a_hash_of_the_id() -> None:
    """Each id occurs once and the total is the same, half from each iteration; the order of rows does not matter."""
    new, old = written(1, 101), written(0, 101)
    kept, counts = Mix()(new, [old], context(1))
    assert Counter(each.iteration for each in kept) == {1: 51, 0: 50}
    assert len({each.id for each in kept}) == len(kept) == 101
    assert counts == {"earlier": 50, "short": 0}
    by_hash = sorted((each.id for each in new), key=hash_of)
    assert {each.id for each in kept if each.iteration == 1} == set(by_hash[:51])
    again, _ = Mix()(new[::-1], [old[50:] + old[:50]], context(1))
    assert sorted(again, key=lambda each: each.id) == sorted(kept, key=lambda each: each.id)


def test_mix_trains_on_every_pair_once() -> None:
    """With a share of one half, iteration k + 1 takes exactly the pairs of iteration k that iteration k left out."""
    iterations = [written(k, 40) for k in range(4)]
    used: Counter[tuple[str, int]] = Counter()
    for k in range(1, 4):
        kept, _ = Mix()(iterations[k], iterations[k - 1 :: -1], context(k))
        used.update((each.id, each.iteration) for each in kept)
    assert set(used.values()) == {1}
    assert {each for each in used if each[1] in (1, 2)} == {(each.id, k) for k in (1, 2) for each in iterations[k]}


def test_mix_in_iteration_0_takes_its_own_pairs() -> None:
    new = written(0, 9)
    assert Mix()(new, [], context(0)) == (new, {"earlier": 0, "short": 0})


def test_mix_scales_the_shares_of_iterations_that_exist() -> None:
    kept, _ = Mix(shares=[0.5, 0.25, 0.25])(written(1, 90), [written(0, 90)], context(1))
    assert Counter(each.iteration for each in kept) == {1: 60, 0: 30}
    kept, _ = Mix(shares=[2, 1, 1])(written(2, 40), [written(1, 40), written(0, 40)], context(2))
    assert Counter(each.iteration for each in kept) == {2: 20, 1: 10, 0: 10}
    assert len({each.id for each in kept}) == 40


def test_mix_with_different_prompts_and_with_few_pairs() -> None:
    """With different ids each iteration gives its share; if an iteration has too few pairs, the newest gives more."""
    kept, counts = Mix()(written(1, 20), [written(0, 20, first=100)], context(1))
    assert Counter(each.iteration for each in kept) == {1: 10, 0: 10}
    kept, counts = Mix()(written(1, 20), [written(0, 4)], context(1))
    assert Counter(each.iteration for each in kept) == {1: 16, 0: 4}
    assert counts == {"earlier": 4, "short": 6}
    several = [pair(f"row-{i}", 1, words=s, sample=s) for i in range(5) for s in range(3)]
    kept, counts = Mix()(several, [[replace(each, iteration=0) for each in several]], context(1))
    assert Counter(each.iteration for each in kept) == {1: 8, 0: 7}


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([0.5, -0.5], r"curriculum\.shares.*-0\.5.*expected a list of numbers of at least 0"),
        ([0.0, 0.0], r"curriculum\.shares=\[0\.0, 0\.0\]: they sum to 0"),
        ([], r"curriculum\.shares=\[\]: they sum to 0"),
        (["x"], r"curriculum\.shares.*number"),
    ],
)
def test_mix_refuses_shares(shares: list[Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        build("curriculum", check("curriculum", {"_target_": f"{PATH}.earlier.Mix", "shares": shares}))


def test_mix_refuses_shares_of_iterations_that_do_not_exist() -> None:
    Mix().check(0, 2)
    with pytest.raises(SettingsError, match=r"curriculum\.shares=.*3 iterations, but with iterations=2"):
        Mix(shares=[1, 1, 1]).check(0, 2)
    with pytest.raises(SettingsError, match=r"curriculum\.shares=.*in iteration 0 .*sum to 0"):
        Mix(shares=[0, 1]).check(0, 2)
    Mix(shares=[0, 1]).check(1, 2)


def test_counts_are_apportioned() -> None:
    assert apportion(5, [0.5, 0.5]) == [3, 2]
    assert apportion(10, [0.55, 0.3, 0.15]) == [6, 3, 1]
    for total in range(60):
        parts = apportion(total, [0.5, 0.3, 0.2])
        assert sum(parts) == total
        assert all(abs(part - total * share) < 1 for part, share in zip(parts, [0.5, 0.3, 0.2], strict=True))


# --- in turn


@dataclass(frozen=True)
class Last(Curriculum):
    """Keeps the last pairs."""

    needs_scores = True

    number: int = 1

    def __call__(
        self, pairs: Sequence[Pair], history: Sequence[Sequence[Pair]], context: Context
    ) -> tuple[list[Pair], Counts]:
        return list(pairs[-self.number :]), {"left": self.number}


def in_turn(**parts: dict[str, Any]) -> Any:
    tree = {"_target_": f"{PATH}.InTurn", "parts": parts}
    return build("curriculum", check("curriculum", tree))


ADD = {"_target_": f"{PATH}.earlier.Accumulate", "last": 2}
LAST = {"_target_": "tests.test_curriculum.Last", "number": 3}


def test_parts_are_applied_in_turn() -> None:
    new, old = written(1, 5), written(0, 5)
    both = in_turn(add=ADD, last=LAST)
    assert (both.reads_history, both.needs_scores, both.embeds) == (2, True, False)
    assert both(new, [old], context(1)) == (old[-3:], {"earlier": 5, "repeated": 0, "left": 3})
    assert in_turn(last=LAST, add=ADD)(new, [old], context(1))[0] == [*new[-3:], *old]
    assert in_turn(once=LAST, again=LAST)(new, [old], context(1)) == (new[-3:], {"left": 6})


def test_the_key_of_successive_parts_has_their_order_and_not_their_names() -> None:
    key = part_key(in_turn(add=ADD, last=LAST))
    assert key == part_key(in_turn(first=ADD, second=LAST))
    assert key != part_key(in_turn(last=LAST, add=ADD))
    assert key != part_key(in_turn(add=ADD))


def test_successive_parts_are_checked() -> None:
    with pytest.raises(SettingsError, match=r"curriculum\.parts: has none"):
        in_turn()
    with pytest.raises(SettingsError, match=r"curriculum\.parts\.x.*has no .*reads_history"):
        in_turn(x={"_target_": "dnpo.dsl.HumanChosen"})
    with pytest.raises(SettingsError, match=r"curriculum\.shares"):
        in_turn(mix={"_target_": f"{PATH}.earlier.Mix", "shares": [1.0, 1.0, 1.0]}).check(0, 2)


def test_no_curriculum() -> None:
    new = written(1, 3)
    part = NoCurriculum()
    assert part(new, [], context(1)) == (new, {})
    assert (part.reads_history, part.needs_scores, part.embeds) == (0, False, False)
