"""The tiny world: fixed facts and held-out prompts, true answers, and human errors at the set rate.

Answers are derived again here from the text of the prompts, without the code that made them.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import pytest

from dnpo.data.tinyworld import FACTS, FAMILIES, VERSION, WORDS, Problem, TinyWorld, problems
from dnpo.data.verifiable import completeness, correct, form
from dnpo.errors import SettingsError
from dnpo.judges.exact.rules import Rules
from dnpo.records import HUMAN, Prompt, Response
from tests.conftest import verdicts

HELD_OUT = ("validation", "test")
HARDER = (2, 2, 504)  # difficulty, steps and facts of data=tinyworld_harder
Rows = dict[str, list[Prompt]]


@cache
def read(**settings: Any) -> tuple[Rows, dict[str, Any]]:
    """The rows of a world; no test changes them."""
    return TinyWorld(**settings).read()


@cache
def pool(family: str, difficulty: int = 1, steps: int = 1, facts: int = FACTS) -> tuple[Problem, ...]:
    """The problems of a family."""
    return tuple(problems(family, difficulty, steps, facts))


@cache
def problem_of(difficulty: int = 1) -> dict[str, Problem]:
    """The problem that each prompt asks."""
    return {wording: p for family in FAMILIES for p in pool(family, difficulty) for wording in p.wordings}


def asked(row: Prompt) -> str:
    """The text of a prompt."""
    (message,) = row.messages
    assert message["role"] == "user"
    return message["content"]


def scores(rows: list[Prompt]) -> list[float]:
    """The exact judge's scores of the human responses."""
    found = [v.score for v in verdicts(Rules(), rows, [Response(r.id, HUMAN, r.human, [], 0, "eos") for r in rows])]
    assert None not in found
    return [s for s in found if s is not None]


def digest(content: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def within(successes: int, trials: int, probability: float) -> bool:
    """Whether a number of successes is within four standard deviations of its expectation."""
    return abs(successes - trials * probability) <= 4 * math.sqrt(trials * probability * (1 - probability))


# --- what is fixed ----------------------------------------------------------------------------------------------------


def test_same_seed_same_rows() -> None:
    """A run can be repeated: two readings agree in every row, ids and human responses included."""
    one, two = (TinyWorld(train=600, seed=5).read() for _ in range(2))
    assert one == two


def test_another_seed_draws_other_training_rows_and_the_same_held_out_rows() -> None:
    """Runs of different seeds are compared on the same prompts, with the same human responses to them."""
    (one, _), (two, _) = read(seed=0), read(seed=1)
    for split in HELD_OUT:
        assert one[split] == two[split]
    shared = sum((Counter(map(asked, one["train"])) & Counter(map(asked, two["train"]))).values())
    assert [asked(r) for r in one["train"]] != [asked(r) for r in two["train"]]
    assert shared < 0.9 * len(one["train"])
    # The order of families differs as well, so families are mixed under every seed.
    assert [r.family for r in one["train"]] != [r.family for r in two["train"]]


@pytest.mark.parametrize(
    "changed",
    [{"train": 60}, {"train": 60, "flaws": 0.0}, {"train": 60, "myths": 0.0}],
    ids=["train", "flaws", "myths"],
)
def test_held_out_prompts_do_not_depend_on_the_training_data(changed: dict[str, Any]) -> None:
    """Ablations of the training data are tested on the same prompts."""
    for split in HELD_OUT:
        assert list(map(asked, read(**changed)[0][split])) == list(map(asked, read()[0][split]))


GOLDEN_VERSION = 1  # of the world with the golden values below


def test_golden_values_belong_to_this_version() -> None:
    """Golden values and ``VERSION`` change together: stores keep results of the old world under the old keys."""
    assert VERSION == GOLDEN_VERSION
    assert TinyWorld().identity()["world"] == VERSION


def test_facts_are_golden() -> None:
    """The true facts and the common myths must never change: trained models have learned them."""
    table = [(p.key, p.answer, p.myth) for p in pool("facts")]
    assert len(table) == 168
    assert digest(table) == "cbc1d07ba194215f"
    assert pool("facts", 5) == pool("facts", 1)


@pytest.mark.parametrize(
    ("family", "difficulty", "count", "golden"),
    [
        ("arithmetic", 1, 222, "8bc6234ffde97efb"),
        ("conversion", 1, 240, "bd883e4fcb7dbf71"),
        ("reversal", 1, 240, "b17619df2e8736e6"),
        ("sorting", 1, 210, "1d36050f131f9a95"),
        ("counting", 1, 341, "d8392532d384e8ff"),
        ("facts", 1, 168, "fe0774f57f112e75"),
        ("arithmetic", 2, 392, "afff066e2036c7a7"),
        ("conversion", 2, 390, "21dc48435f1e47c5"),
        ("reversal", 2, 2400, "9591f092653d141f"),
        ("sorting", 2, 2400, "752bddc7f08be854"),
        ("counting", 2, 341, "d8392532d384e8ff"),
        ("facts", 2, 168, "fe0774f57f112e75"),
    ],
)
def test_problems_are_golden(family: str, difficulty: int, count: int, golden: str) -> None:
    """The set of problems decides the held-out prompts; a change would make earlier results incomparable."""
    assert len(pool(family, difficulty)) == count
    assert digest([[p.key, p.wordings, p.answer, p.needs] for p in pool(family, difficulty)]) == golden


def test_problems_of_two_steps_are_golden() -> None:
    """The problems of the harder world decide its held-out prompts too."""
    found = pool("arithmetic", *HARDER)
    assert len(found) == 2400
    assert digest([[p.key, p.wordings, p.answer, p.needs] for p in found]) == "4365d34ab4c75faa"
    assert digest([(p.key, p.answer, p.myth) for p in pool("facts", *HARDER)]) == "fcf7369fb2e2af5c"


def test_more_facts_keep_the_earlier_ones() -> None:
    """A world with more facts has those of a world with fewer."""
    few, many = ([(p.key, p.answer) for p in pool("facts", 1, 1, count)] for count in (FACTS, 504))
    assert len(many) == len(set(many)) == 504
    assert many[:FACTS] == few


def test_answers_in_two_steps_mention_the_first() -> None:
    """A complete answer shows the result of the first operation; the short one does not, and loses points for it."""
    for p in pool("arithmetic", *HARDER):
        a, one, b, _, _ = p.key.split()
        between = str(eval(f"{a} {'+' if one == 'plus' else '-'} {b}"))
        assert between in p.needs
        assert all(f" {between}," in phrasing for phrasing in p.phrasings)
        row = Prompt("p", [], "", answer=p.answer, needs=list(p.needs))
        assert completeness(row, p.short.format(p.answer)) < 1


@pytest.mark.parametrize(("difficulty", "golden"), [(1, "9b86e56a876a8f4f"), (2, "226a151d57c36ecf")])
def test_held_out_prompts_are_golden(difficulty: int, golden: str) -> None:
    """The test prompts themselves, in their order."""
    rows, _ = read(train=60, difficulty=difficulty)
    assert digest([[asked(r), r.answer, r.needs] for split in HELD_OUT for r in rows[split]]) == golden


def test_identity_has_everything_that_decides_the_rows() -> None:
    """The store finds data by the identity: other rows must give another one; a limit on length must not."""
    base = TinyWorld().identity()
    changes: dict[str, Any] = {
        "train": 60,
        "validation": 60,
        "test": 60,
        "flaws": 0.2,
        "myths": 0.5,
        "difficulty": 3,
        "steps": 2,
        "facts": 169,
        "seed": 1,
    }
    for name, value in changes.items():
        assert TinyWorld(**{name: value}).identity() != base, name
    assert TinyWorld(max_prompt_tokens=50, max_response_tokens=30).identity() == base
    json.dumps(base)


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("difficulty", [1, 3])
def test_held_out_prompts_never_occur_in_training(seed: int, difficulty: int) -> None:
    """No prompt is in training and test; except for facts, neither is its problem in another wording."""
    rows, _ = read(train=2400, seed=seed, difficulty=difficulty)
    asks = problem_of(difficulty)
    trained = set(map(asked, rows["train"]))
    trained_problems = {(r.family, asks[asked(r)].key) for r in rows["train"]}
    for split in HELD_OUT:
        for row in rows[split]:
            assert asked(row) not in trained
            assert row.family == "facts" or (row.family, asks[asked(row)].key) not in trained_problems


def test_validation_and_test_are_disjoint_and_without_repetition() -> None:
    """Settings are chosen on one and reported on the other; no problem is in both, in any wording."""
    rows, _ = read()
    keys = [(r.family, problem_of()[asked(r)].key) for split in HELD_OUT for r in rows[split]]
    assert len(keys) == 720
    assert len(set(keys)) == len(keys)


def test_held_out_facts_are_trained_on_in_other_wordings() -> None:
    """A fact cannot be derived: the test asks a known fact in a new wording."""
    rows, _ = read()
    trained = {problem_of()[asked(r)].key for r in rows["train"] if r.family == "facts"}
    held = {problem_of()[asked(r)].key for split in HELD_OUT for r in rows[split] if r.family == "facts"}
    assert len(held & trained) >= 0.95 * len(held)


def test_six_families_in_even_shares() -> None:
    """Every family counts equally in training and in every average over a split."""
    rows, facts = read()
    for split, size in (("train", 4800), ("validation", 240), ("test", 480)):
        assert facts[f"{split}_rows"] == len(rows[split]) == size
        assert Counter(r.family for r in rows[split]) == dict.fromkeys(FAMILIES, size // 6)
        assert len({r.id for r in rows[split]}) == size
    odd, _ = TinyWorld(train=100, validation=13, test=7).read()
    for split, size in (("train", 100), ("validation", 13), ("test", 7)):
        shares = [Counter(r.family for r in odd[split])[family] for family in FAMILIES]
        assert sum(shares) == size
        assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("difficulty", [1, 2, 3, 5])
def test_at_most_a_quarter_is_held_out(difficulty: int) -> None:
    """By default at least three quarters of every family's prompts remain for training."""
    rows, _ = read(train=60, difficulty=difficulty)
    for family in FAMILIES:
        distinct = {wording for p in pool(family, difficulty) for wording in p.wordings}
        held = {asked(r) for split in HELD_OUT for r in rows[split] if r.family == family}
        assert 0 < len(held) <= len(distinct) / 4


@pytest.mark.parametrize(
    ("difficulty", "family", "limit", "distinct"), [(1, "conversion", 120, 480), (2, "facts", 126, 504)]
)
def test_more_than_a_quarter_is_refused(difficulty: Literal[1, 2], family: str, limit: int, distinct: int) -> None:
    """The limit is exact for the smallest family, and the message says what to lower and why.

    There are 240 conversions in two wordings at difficulty 1, and 168 facts in three.
    """
    validation, test = 6 * 40, 6 * (limit - 40)
    rows, _ = TinyWorld(train=60, validation=validation, test=test, difficulty=difficulty).read()
    assert sum(r.family == family for split in HELD_OUT for r in rows[split]) == limit
    message = rf"data\.validation \+ data\.test: {limit + 1} held-out prompts of {family}.* {distinct} "
    with pytest.raises(SettingsError, match=message):
        TinyWorld(train=60, validation=validation, test=test + 6, difficulty=difficulty).read()


# --- human responses --------------------------------------------------------------------------------------------------


def test_flaw_rate() -> None:
    """Without myths three in ten human responses are flawed; the exact judge finds exactly these."""
    rows, facts = read(flaws=0.3, myths=0.0)
    flawed = facts["flawed_human_responses"]
    assert within(flawed, 4800, 0.3)
    assert sum(s < 100 for s in scores(rows["train"])) == flawed
    held = [s for split in HELD_OUT for s in scores(rows[split])]
    assert within(sum(s < 100 for s in held), len(held), 0.3)


def test_flaws_and_myths_are_all_found_by_the_judge() -> None:
    """With myths too, the count in the manifest is the number of human responses below 100."""
    rows, facts = read()
    assert sum(s < 100 for s in scores(rows["train"])) == facts["flawed_human_responses"]


def test_flawless_humans_score_100() -> None:
    """Without flaws and myths every human response is perfect: the judge subtracts points only for flaws."""
    rows, facts = read(flaws=0.0, myths=0.0)
    assert facts["flawed_human_responses"] == 0
    for split in rows:
        assert set(scores(rows[split])) == {100.0}


def test_flaws_come_in_three_equal_kinds() -> None:
    """Wrong, incomplete and sloppy responses are a third each, in families where the kinds can be distinguished."""
    rows, _ = read(flaws=1.0, myths=0.0)
    kinds: Counter[tuple[bool, bool, bool]] = Counter()
    for row in rows["train"]:
        if row.family not in ("reversal", "sorting"):  # there an incomplete answer lacks an item and is wrong as well
            kinds[not correct(row, row.human), completeness(row, row.human) < 1, form(row.human) < 15] += 1
    assert set(kinds) == {(True, False, False), (False, True, False), (False, False, True)}
    for count in kinds.values():
        assert within(count, kinds.total(), 1 / 3)


def test_myths() -> None:
    """A third of the facts have a myth; 55 % of the answers to these facts repeat it, and no other answers do."""
    table = pool("facts")
    values = {p.key.split()[0]: set[str]() for p in table}
    for p in table:
        values[p.key.split()[0]].add(p.answer)
    myths = [p for p in table if p.myth is not None]
    assert len(myths) == len(table) / 3
    for p in myths:
        assert p.myth != p.answer
        assert p.myth in values[p.key.split()[0]]  # plausible: the true answer to another question of the kind
    assert all(p.myth is None for family in FAMILIES if family != "facts" for p in pool(family))

    rows, facts = read(train=12000, flaws=0.0, myths=0.55)
    asks = problem_of()
    told, repeated = 0, 0
    for row in rows["train"]:
        p = asks[asked(row)]
        believes = p.myth is not None and correct(replace(row, answer=p.myth), row.human)
        assert believes or correct(row, row.human)
        told += p.myth is not None
        repeated += believes
        assert row.answer == p.answer  # the truth stays the truth
    assert told > 500
    assert within(repeated, told, 0.55)
    assert facts["flawed_human_responses"] == repeated
    assert sum(s < 100 for s in scores(rows["train"])) == repeated


# --- problems ---------------------------------------------------------------------------------------------------------

FACTORS = {
    ("m", "cm"): 100,
    ("km", "m"): 1000,
    ("kg", "g"): 1000,
    ("hours", "minutes"): 60,
    ("weeks", "days"): 7,
    ("dozens", "eggs"): 12,
}


def solve(family: str, question: str) -> str:
    """The answer to a question, from its text alone."""

    def match(*patterns: str) -> dict[str, str]:
        found = [m for m in (re.fullmatch(pattern, question) for pattern in patterns) if m]
        assert len(found) == 1, f"{question!r} is not one of the known wordings"
        return found[0].groupdict()

    if family == "arithmetic":
        sum_ = r"(?P<sum>\d+(?: (?:plus|minus) \d+){1,2})"
        m = match(rf"What is {sum_}\?", rf"Work out {sum_}\.", rf"{sum_} is what\?")
        return str(eval(m["sum"].replace("plus", "+").replace("minus", "-")))
    if family == "conversion":
        m = match(
            r"How many (?P<small>\w+) are in (?P<n>\d+) (?P<large>\w+)\?",
            r"Convert (?P<n>\d+) (?P<large>\w+) to (?P<small>\w+)\.",
        )
        return f"{int(m['n']) * FACTORS[m['large'], m['small']]} {m['small']}"
    if family == "reversal":
        items = r"(?P<items>[a-z]+(?: [a-z]+)+)"
        m = match(rf"Reverse the words {items}\.", rf"Say {items} backwards\.", rf"Turn around: {items}\.")
        return " ".join(reversed(m["items"].split()))
    if family == "sorting":
        items = r"(?P<items>\d+(?: \d+)+)"
        m = match(rf"Sort the numbers {items}\.", rf"Put {items} in order\.", rf"Order: {items}\.")
        return " ".join(sorted(m["items"].split(), key=int))
    if family == "counting":
        m = match(
            r"How many times is (?P<letter>[a-z]) in (?P<word>[a-z]+)\?",
            r"Count the letter (?P<letter>[a-z]) in (?P<word>[a-z]+)\.",
            r"How often does (?P<word>[a-z]+) have (?P<letter>[a-z])\?",
        )
        return str(sum(c == m["letter"] for c in m["word"]))
    m = match(
        r"What is the (?P<relation>[a-z]+) of (?P<subject>[A-Z][a-z]+)\?",
        r"Name the (?P<relation>[a-z]+) of (?P<subject>[A-Z][a-z]+)\.",
        r"Tell me (?P<subject>[A-Z][a-z]+)'s (?P<relation>[a-z]+)\.",
    )
    return f"{m['relation']} {m['subject']}"


@pytest.mark.parametrize("difficulty", [1, 2, 5])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "facts"])
def test_answers_are_true(family: str, difficulty: int) -> None:
    """The "verifiable answer" of every problem is what its prompt asks for, in every wording."""
    for p in [*pool(family, difficulty), *(pool(family, difficulty, 2) if family == "arithmetic" else ())]:
        assert {solve(family, wording) for wording in p.wordings} == {p.answer}


def test_wordings_of_a_fact_name_the_same_relation() -> None:
    """Every wording of a fact names the same relation and subject, and no two facts contradict each other."""
    table = pool("facts")
    for p in table:
        assert {solve("facts", wording) for wording in p.wordings} == {p.key}
        assert " ".join(p.needs) == p.key
    assert len({p.key for p in table}) == len(table)


@pytest.mark.parametrize(("difficulty", "steps", "facts"), [(1, 1, FACTS), (2, 1, FACTS), (5, 1, FACTS), (2, 2, 504)])
def test_no_prompt_has_two_answers(difficulty: int, steps: int, facts: int) -> None:
    """No two problems, of whatever family, share a wording."""
    wordings = [w for family in FAMILIES for p in pool(family, difficulty, steps, facts) for w in p.wordings]
    assert len(set(wordings)) == len(wordings)


@pytest.mark.parametrize("harder", [(), HARDER], ids=["default", "harder"])
@pytest.mark.parametrize("family", FAMILIES)
def test_wordings_and_phrasings(family: str, harder: tuple[int, ...]) -> None:
    """Two or three wordings of a question and two of an answer, each with one place for the answer."""
    for p in pool(family, *harder):
        assert len(set(p.wordings)) == len(p.wordings) == (2 if family == "conversion" else 3)
        assert len(set(p.phrasings)) == len(p.phrasings) == 2
        assert all(phrasing.count("{}") == 1 for phrasing in p.phrasings)


def answers(p: Problem, candidates: tuple[str, ...]) -> Iterator[tuple[Prompt, Response]]:
    """Each candidate in each phrasing, as a response to the problem's prompt."""
    row = Prompt("p", [], "", answer=p.answer, needs=list(p.needs))
    for candidate in candidates:
        for phrasing in p.phrasings:
            yield row, Response("p", HUMAN, phrasing.format(candidate), [], 0, "eos")


@pytest.mark.parametrize("harder", [(), HARDER], ids=["default", "harder"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_judge_agrees_with_every_problem(family: str, harder: tuple[int, ...]) -> None:
    """The right answer scores 100 in every phrasing; every wrong one, and every myth, loses exactly the 60 points."""
    judge = Rules()
    for p in pool(family, *harder)[:: 1 + 3 * bool(harder)]:
        assert p.wrong
        assert p.answer not in p.wrong
        for row, response in answers(p, (p.answer,)):
            assert verdicts(judge, [row], [response])[0].score == 100.0, response.text
        for row, response in answers(p, (*p.wrong, *([p.myth] if p.myth else []))):
            assert verdicts(judge, [row], [response])[0].score == 40.0, response.text


@pytest.mark.parametrize("difficulty", [1, 2, 3, 4, 5])
def test_difficulty_sets_the_size_of_problems(difficulty: int) -> None:
    """Numbers and lists grow as documented; families without a size do not change."""
    operands = [int(n) for p in pool("arithmetic", difficulty) for n in re.findall(r"\d+", p.key)]
    assert (min(operands), max(operands)) == (0, 7 + 4 * difficulty)
    amounts = [int(p.key.split()[0]) for p in pool("conversion", difficulty)]
    assert (min(amounts), max(amounts)) == (2, 16 + 25 * difficulty)
    for family in ("reversal", "sorting"):
        lengths = {len(p.key.split()) for p in pool(family, difficulty)}
        assert lengths == set(range(2, 2 + difficulty))
    numbers = {int(n) for p in pool("sorting", difficulty) for n in p.key.split()}
    assert numbers == set(range(10 + 5 * difficulty))
    words = {word for p in pool("reversal", difficulty) for word in p.key.split()}
    assert words == set(WORDS[: 8 + 8 * difficulty])
    for family in ("counting", "facts"):
        assert pool(family, difficulty) == pool(family, 1)


def test_list_items_do_not_repeat() -> None:
    """A right answer never repeats itself, since the judge subtracts points for a word twice in a row."""
    for family in ("reversal", "sorting"):
        for p in pool(family, 5):
            items = p.key.split()
            assert len(set(items)) == len(items)


# --- gold pairs


@pytest.mark.parametrize("share", [0.0333, 0.2, 1.0])
def test_gold_pairs_are_ordered_by_the_judge(share: float) -> None:
    """The chosen response is better by a new call of the judge; everything else is as without pairs."""
    plain, paired = read()[0]["train"], read(gold_pairs=share)[0]["train"]
    have = [row for row in paired if row.rejected is not None]
    better = dict(zip(ids(have), scores(have), strict=True))
    worse = dict(zip(ids(have), scores([replace(row, human=str(row.rejected)) for row in have]), strict=True))
    assert all(better[row.id] == row.human_score > row.rejected_score == worse[row.id] for row in have)
    kept = 0
    for before, after in zip(plain, paired, strict=True):
        if after.rejected is None:
            assert after == before
            continue
        assert before.human in (after.human, after.rejected)
        assert replace(after, human="", rejected=None, human_score=None, rejected_score=None) == replace(
            before, human=""
        )
        kept += before.human == after.human
    assert 0.35 < kept / len(have) < 0.65  # two human responses of equal quality


def ids(rows: list[Prompt]) -> list[str]:
    return [row.id for row in rows]


def test_the_set_number_of_gold_pairs_is_made_with_whole_conversations() -> None:
    rows, facts = read(gold_pairs=0.0333)
    assert facts["gold_pairs"] == sum(row.rejected is not None for row in rows["train"]) == 160
    first = {asked(row) for row in rows["train"] if row.rejected is not None}
    touched = [row for row in rows["train"] if asked(row) in first]
    assert len(touched) <= 160 + facts["tied_gold_pairs"]
    assert all(row.rejected is None for split in HELD_OUT for row in rows[split])
    more, counts = read(gold_pairs=0.2)
    assert counts["gold_pairs"] == pytest.approx(960, abs=5)
    few = {row.id: row for row in rows["train"] if row.rejected is not None}
    assert few.items() <= {row.id: row for row in more["train"]}.items()  # a larger share adds pairs, and moves none
    everything, all_counts = read(gold_pairs=1.0)
    assert all_counts["gold_pairs"] + all_counts["tied_gold_pairs"] == len(everything["train"])


def test_gold_pairs_are_in_the_key_if_there_are_any() -> None:
    assert "gold_pairs" not in TinyWorld().identity()
    assert TinyWorld(gold_pairs=0.1).identity() == {**TinyWorld().identity(), "gold_pairs": 0.1}
    assert "gold_pairs" not in read()[1]
    assert read(gold_pairs=0.1, seed=1)[0] != read(gold_pairs=0.1)[0]
