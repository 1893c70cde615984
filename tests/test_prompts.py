"""The prompts of an iteration: divided by conversation, without the seed, and refused if there are too few."""

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import yaml

from dnpo.data.prompts import All, Fresh, Prompts, Seed, divide
from dnpo.data.seen import hash_conversation
from dnpo.data.tinyworld import TinyWorld
from dnpo.errors import DataError, SettingsError
from dnpo.records import Prompt
from dnpo.settings import build, check, conf_folder, part_key, require


def asked(sizes: list[int], paired: int = 0, shuffle: int = 0) -> list[Prompt]:
    """Prompts of conversations with these numbers of rows; the first ``paired`` rows have pairs."""
    texts = [f"question {i}" for i, size in enumerate(sizes) for _ in range(size)]
    rows = [
        Prompt(f"r{i}", [{"role": "user", "content": text}], "yes", rejected="no" if i < paired else None)
        for i, text in enumerate(texts)
    ]
    random.Random(shuffle).shuffle(rows)
    return rows


def hashes(rows: list[Prompt]) -> set[str]:
    return {hash_conversation(row.messages) for row in rows}


def ids(rows: list[Prompt]) -> list[str]:
    return [row.id for row in rows]


@pytest.fixture(scope="module")
def tiny() -> list[Prompt]:
    return TinyWorld().read()[0]["train"]


# --- dividing


def test_the_worked_numbers() -> None:
    """Conversations of 1, 1, 4 and 2 rows in the order of their hashes, divided 1:3 and 1:1."""
    texts = sorted((f"question {i}" for i in range(4)), key=lambda text: hashes([question(text)]).pop())
    rows = [replace(question(text), id=text) for text, n in zip(texts, (1, 1, 4, 2), strict=True) for _ in range(n)]
    assert [len(part) for part in divide(rows, [1, 3])] == [2, 6]
    assert [len(part) for part in divide(rows, [1, 1])] == [2, 6]  # the place of the third is 1/2: not below the half
    assert [len(part) for part in divide(rows, [1.01, 1])] == [6, 2]


def question(text: str) -> Prompt:
    return Prompt("", [{"role": "user", "content": text}], "")


@pytest.mark.parametrize("trial", range(20))
def test_parts_hold_every_row_once_and_no_conversation_twice(trial: int) -> None:
    """By brute force: rows are in the order of the hashes; a conversation belongs to the part with its middle row."""
    draw = random.Random(trial)
    rows = asked([draw.randint(1, 6) for _ in range(draw.randint(1, 40))], shuffle=trial)
    shares = [draw.uniform(0.1, 9) for _ in range(draw.randint(1, 6))]
    parts = divide(rows, shares)
    assert sorted(name for part in parts for name in ids(part)) == sorted(ids(rows))
    assert sum(len(hashes(part)) for part in parts) == len(hashes(rows))
    order = ids(rows)
    assert all(ids(part) == sorted(ids(part), key=order.index) for part in parts)
    lined = sorted(rows, key=lambda row: hash_conversation(row.messages))
    edges = [sum(shares[: i + 1]) / sum(shares) * len(rows) for i in range(len(shares) - 1)]
    for name in hashes(rows):
        there = [i for i, row in enumerate(lined) if hash_conversation(row.messages) == name]
        middle = (there[0] + there[-1] + 1) / 2
        (part,) = [i for i, some in enumerate(parts) if name in hashes(some)]
        assert part == len([edge for edge in edges if edge <= middle])
    largest = max(Counter(hash_conversation(row.messages) for row in rows).values())
    for part, share in zip(parts, shares, strict=True):
        assert abs(len(part) - share / sum(shares) * len(rows)) <= largest


def test_ids_and_the_order_of_rows_decide_nothing() -> None:
    rows = asked([1, 2, 3] * 9)
    renamed = [replace(row, id=f"other {i}") for i, row in enumerate(reversed(rows))]
    for part, other in zip(divide(rows, [2, 8, 20]), divide(renamed, [2, 8, 20]), strict=True):
        assert hashes(part) == hashes(other)


# --- the parts


def test_fresh_parts_of_the_tiny_world(tiny: list[Prompt]) -> None:
    """2:8:20:30, with the seed first: its 4,800 rows have fewer different questions, and each is in one part."""
    part = Fresh(shares=[8, 20, 30], seed_share=2 / 60)
    parts = [part(tiny, k) for k in range(4)]
    for some, share in zip(parts, (2, 8, 20, 30), strict=True):
        assert len(some) == pytest.approx(80 * share, abs=10)
    assert sum(map(len, parts)) == len(tiny) == 4800
    assert sum(len(hashes(some)) for some in parts) == len(hashes(tiny)) < 2000
    assert Seed(2 / 60)(tiny, 3) == parts[0]
    assert part.parts(tiny) == parts
    assert Fresh(shares=[2, 8, 20, 30])(tiny, 0) == parts[0]


@pytest.mark.parametrize("paired", [5, 60])
def test_prompts_with_pairs_are_the_seed_if_some_prompts_have_them(paired: int) -> None:
    rows = asked([2] * 50, paired=paired)
    seed = Seed(0.1)(rows, 0)
    assert seed == [row for row in rows if row.rejected is not None]
    fresh = Fresh(shares=[1, 2], seed_share=0.1)
    assert fresh(rows, 0) == seed
    others = [*fresh(rows, 1), *fresh(rows, 2)]
    assert not hashes(seed) & hashes(others)
    assert all(row.rejected is None for row in others)
    assert len(others) == 100 - 2 * len(hashes(seed))
    few = Seed(0.1, pairs="share")(rows, 0)
    assert len(few) == min(paired, 10)
    assert {row.id for row in few} <= {row.id for row in seed}


@pytest.mark.parametrize("paired", [0, 100])
def test_a_share_is_the_seed_if_all_or_no_prompts_have_pairs(paired: int) -> None:
    rows = asked([1] * 100, paired=paired)
    assert len(Seed(0.1)(rows, 0)) == len(Seed(0.1, pairs="share")(rows, 0)) == 10
    plain = [replace(row, rejected=None) for row in rows]
    assert ids(Seed(0.1)(rows, 0)) == ids(Seed(0.1)(plain, 0))


def test_all_and_seed_are_the_same_in_every_iteration() -> None:
    rows = asked([1, 2] * 20)
    for part in (All(), Seed(0.2)):
        assert part(rows, 0) == part(rows, 7)
    assert All()(rows, 3) == rows


# --- what is refused


def test_more_iterations_than_parts_are_refused() -> None:
    Fresh(shares=[1, 2]).check(2)
    Fresh(shares=[1, 2], seed_share=0.1).check(3)
    with pytest.raises(SettingsError, match=r"^prompts\.shares=\[1, 2\]: has 2 parts, but iterations=3 needs 3; add"):
        Fresh(shares=[1, 2]).check(3)
    with pytest.raises(
        SettingsError, match=r"has 2 parts in addition to the seed, but iterations=9 needs 8; .* at most 3 it"
    ):
        Fresh(shares=[1, 2], seed_share=0.1).check(9)
    with pytest.raises(SettingsError, match="iterations=3 needs 3"):
        Fresh(shares=[1, 2])(asked([1] * 9), 2)
    All().check(10**6)


def test_fewer_prompts_than_iterations_are_refused() -> None:
    for rows in (asked([1] * 3), asked([40, 1, 1]), []):  # rows with the same text are one prompt
        part = Fresh(shares=[1, 1, 1, 1])
        empty = part.parts(rows).index([])
        with pytest.raises(DataError, match=rf"^prompts\.shares=.* leave none for iteration {empty} of 4 parts; take"):
            part(rows, empty)
    with pytest.raises(DataError, match=r"^prompts\.share=0.01: of 3 training prompts \(3 different conversations\)"):
        Seed(0.01)(asked([1] * 3), 0)
    with pytest.raises(SettingsError, match=r"^prompts\.share=0"):
        Seed(0.0).check(1)
    with pytest.raises(DataError, match="leave none for iteration 1"):  # every conversation has a pair
        Fresh(shares=[1], seed_share=0.1)(asked([2] * 1, paired=1), 1)


@pytest.mark.parametrize("shares", [[], [0], [-1.0, 2], None, "all"])
def test_shares_are_checked_by_name(shares: Any) -> None:
    with pytest.raises(SettingsError, match=r"^prompts\.shares"):
        build("prompts", check("prompts", {"_target_": "dnpo.data.prompts.Fresh", "shares": shares}))


@pytest.mark.parametrize("name", ["all", "seed", "fresh"])
def test_settings_make_parts_with_keys(name: str) -> None:
    settings = yaml.safe_load((conf_folder() / "prompts" / f"{name}.yaml").read_text())
    part = build("prompts", check("prompts", settings))
    require("prompts", part, Prompts)
    assert part_key(part)["_target_"] == name.capitalize()
    assert {*settings} == {*part_key(part)}
    part.check(4)
    assert part(asked([1] * 400), 3)
