"""An invented world: six families of short instructions with verifiable answers, and humans who make mistakes.

The families replace the six benchmarks of the DNPO paper: small arithmetic, unit conversion, reversing words, sorting
numbers, counting letters, and a fixed table of invented facts. A third of the facts have a *myth*, a wrong answer that
most human annotators give (in place of TruthfulQA).

The facts of this world, its problems and the held-out prompts are fixed. The seed only draws the training data: which
problems are asked, in which wording, and how well the human answers. So runs with different seeds are evaluated on the
same prompts.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from dnpo.data import SPLITS, LongResponses
from dnpo.data.seen import hash_conversation
from dnpo.data.verifiable import points
from dnpo.errors import SettingsError
from dnpo.records import Prompt
from dnpo.seeding import derive
from dnpo.settings import Count, Fraction, Natural, Range

FAMILIES = ("arithmetic", "conversion", "reversal", "sorting", "counting", "facts")
WORLD = 20250210  # the seed of everything that is fixed
VERSION = 1  # part of stage keys; must be raised when a change below changes the world
POOL = 2400  # maximum number of problems in a family
FACTS = 168  # number of facts, if it is not set

VERBS = re.compile(r"\b(is|are|equals)\b")

Flaw = Literal["wrong", "incomplete", "sloppy"]
FLAWS: tuple[Flaw, ...] = ("wrong", "incomplete", "sloppy")


@dataclass(frozen=True)
class Problem:
    """A problem, with all ways to ask and to answer it.

    Attributes:
        wordings: ways to ask it.
        phrasings: ways to answer it, with ``{}`` in place of the answer.
        answer: the right answer.
        needs: words that a complete response mentions.
        wrong: plausible wrong answers.
        short: an incomplete answer, without some of the words in ``needs``.
        myth: a wrong answer that most people believe.
    """

    key: str
    wordings: tuple[str, ...]
    phrasings: tuple[str, ...]
    answer: str
    needs: tuple[str, ...]
    wrong: tuple[str, ...]
    short: str
    myth: str | None = None


@dataclass(frozen=True, kw_only=True)
class TinyWorld:
    """The tiny world as a data source.

    Args:
        train: number of training rows, spread evenly over the families.
        validation: number of held-out prompts for choosing settings, spread evenly over the families. No held-out
            prompt occurs in training.
        test: number of held-out prompts for reporting, spread likewise. Validation and test together have at most a
            quarter of any family's distinct prompts.
        flaws: probability that a human response is wrong, incomplete or sloppy (a third each).
        myths: probability that a human gives the myth, if there is one; in addition to ``flaws``.
        difficulty: 1 (small numbers, short lists) to 5.
        steps: operations of an arithmetic problem. With 2, complete responses also mention the result of the first one.
        facts: number of invented facts. A larger number adds facts to those of a smaller one, and changes the myths.
        gold_pairs: share of the training rows that have a pair. A second human responds; the response with more points
            is chosen (``human``), the other ``rejected``; with equal points there is no pair. A hash of the
            conversation decides which rows have pairs, so equal conversations go together.
        seed: seed of the training data.
        max_prompt_tokens: maximum length of a prompt; the rows here are far shorter with any usual tokenizer.
        max_response_tokens: maximum length of a response; the rows here are far shorter with any usual tokenizer.
    """

    long_responses: ClassVar[LongResponses] = "cut"
    drawn_with_replacement: ClassVar[bool] = True

    train: Count = 4800
    validation: Count = 240
    test: Count = 480
    flaws: Fraction = 0.3
    myths: Fraction = 0.55
    difficulty: Literal[1, 2, 3, 4, 5] = 1
    steps: Literal[1, 2] = 1
    facts: Annotated[int, Range(ge=len(FAMILIES), le=800)] = FACTS
    gold_pairs: Fraction = 0.0
    seed: Natural = 0
    max_prompt_tokens: Count = 48
    max_response_tokens: Count = 24

    @property
    def sizes(self) -> dict[str, int]:
        """The number of rows to draw, by split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def identity(self) -> Mapping[str, Any]:
        """Everything that decides the rows."""
        return {
            "world": VERSION,
            **self.sizes,
            "flaws": self.flaws,
            "myths": self.myths,
            "difficulty": self.difficulty,
            "seed": self.seed,
            **({"steps": self.steps} if self.steps > 1 else {}),
            **({"facts": self.facts} if self.facts != FACTS else {}),
            **({"gold_pairs": self.gold_pairs} if self.gold_pairs else {}),
        }

    def read(self) -> tuple[dict[str, list[Prompt]], dict[str, Any]]:
        """Return the rows by split, and the numbers of flawed human responses, and of gold pairs if there are any.

        Raises:
            SettingsError: the held-out prompts would exceed a quarter of a family's prompts.
        """
        rows: dict[str, list[Prompt]] = {split: [] for split in SPLITS}
        asked: dict[str, Problem] = {}
        flawed = 0
        for number, family in enumerate(FAMILIES):
            questions = self._split(family, number)
            asked |= {wording: problem for problem, wording in questions["train"]}
            for split in ("validation", "test"):  # the same for every seed
                draw = random.Random(derive(WORLD, split, family))
                rows[split] += [self._row(draw, family, *question)[0] for question in questions[split]]
            draw = random.Random(derive(self.seed, "train", family))
            for _ in range(_share(self.sizes["train"], number)):
                row, is_flawed = self._row(draw, family, *draw.choice(questions["train"]))
                rows["train"].append(row)
                flawed += is_flawed
        random.Random(derive(self.seed, "order")).shuffle(rows["train"])
        for split, drawn in rows.items():
            rows[split] = [replace(row, id=f"{split}-{i:05d}") for i, row in enumerate(drawn)]
        pairs: dict[str, int] = {}
        if self.gold_pairs:
            rows["train"], pairs = self._add_pairs(rows["train"], asked)
        return rows, {
            "flawed_human_responses": flawed,
            **pairs,
            **{f"{split}_rows": len(drawn) for split, drawn in rows.items()},
        }

    def _split(self, family: str, number: int) -> dict[str, list[tuple[Problem, str]]]:
        """Choose the questions (a problem and a wording) of each split.

        Facts cannot be guessed, so for them a single wording is held out and the others are in the training data. In
        all other families the problem itself is held out, and asked in one wording.
        """
        pool = problems(family, self.difficulty, self.steps, self.facts)
        by_hash = sorted(pool, key=lambda problem: hashlib.sha256(f"{family}/{problem.key}".encode()).digest())
        sizes = {split: _share(self.sizes[split], number) for split in ("validation", "test")}
        held, everything = sum(sizes.values()), sum(len(problem.wordings) for problem in pool)
        if held > everything // 4 or held > len(pool) * 3 // 4:
            raise SettingsError(
                f"data.validation + data.test: {held} held-out prompts of {family}, but at most a quarter of its "
                f"{everything} distinct prompts may be held out; lower them"
            )
        asked = [(problem, problem.wordings[i % len(problem.wordings)]) for i, problem in enumerate(by_hash)]
        out = {"test": asked[: sizes["test"]], "validation": asked[sizes["test"] : held]}
        kept = by_hash if family == "facts" else by_hash[held:]
        never = {question for questions in out.values() for question in questions}
        out["train"] = [(p, wording) for p in kept for wording in p.wordings if (p, wording) not in never]
        return out

    def _row(self, draw: random.Random, family: str, problem: Problem, wording: str) -> tuple[Prompt, bool]:
        """Make a prompt with one human's response, and return whether the response is flawed."""
        human, is_flawed = self._respond(draw, problem)
        prompt = Prompt(
            id="",
            messages=[{"role": "user", "content": wording}],
            human=human,
            family=family,
            answer=problem.answer,
            needs=list(problem.needs),
        )
        return prompt, is_flawed

    def _respond(self, draw: random.Random, problem: Problem) -> tuple[str, bool]:
        """Draw a human and write their response; return whether it is flawed."""
        answer = problem.answer
        flaw: Flaw | None = None
        if problem.myth is not None and draw.random() < self.myths:
            answer = problem.myth
        if draw.random() < self.flaws:
            flaw = draw.choice(FLAWS)
        return respond(draw, problem, answer, flaw), flaw is not None or answer != problem.answer

    def _add_pairs(self, rows: list[Prompt], problem_of: Mapping[str, Problem]) -> tuple[list[Prompt], dict[str, int]]:
        """Add pairs to rows, one conversation after the other, until enough rows have one; count pairs and ties."""
        same: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            same.setdefault(hash_conversation(row.messages), []).append(i)
        rows, pairs, ties = list(rows), 0, 0
        for _, some in sorted(same.items()):
            if pairs >= round(self.gold_pairs * len(rows)):
                break
            for i in some:
                draw = random.Random(derive(self.seed, "gold pair", rows[i].id))
                other, _ = self._respond(draw, problem_of[rows[i].messages[0]["content"]])
                rows[i] = _pair(rows[i], other)
                pairs += rows[i].rejected is not None
                ties += rows[i].rejected is None
        return rows, {"gold_pairs": pairs, "tied_gold_pairs": ties}


def _pair(row: Prompt, other: str) -> Prompt:
    """Pair the row's human response with another response if their points differ; the better one is chosen."""
    ours, theirs = points(row, row.human), points(row, other)
    if ours == theirs:
        return row
    chosen, rejected = (row.human, other) if ours > theirs else (other, row.human)
    return replace(
        row, human=chosen, rejected=rejected, human_score=max(ours, theirs), rejected_score=min(ours, theirs)
    )


def respond(draw: random.Random, problem: Problem, answer: str, flaw: Flaw | None) -> str:
    """Write the response of a human who believes ``answer``, flawless or with one flaw."""
    if flaw == "wrong":
        answer = draw.choice(problem.wrong)
    text = draw.choice(problem.phrasings).format(answer)
    if flaw == "incomplete":
        text = problem.short.format(answer)
    if flaw == "sloppy":
        text = _sloppy(draw, text)
    return text


def _sloppy(draw: random.Random, text: str) -> str:
    """Make two of these mistakes, or one if only one is possible: no initial capital, no full stop, a repeated word."""
    habits: list[Callable[[str], str]] = [lambda s: s.removesuffix(".")]
    if text[0].isalpha():
        habits.append(lambda s: s[0].lower() + s[1:])
    if re.search(VERBS, text):
        habits.append(lambda s: re.sub(VERBS, r"\1 \1", s, count=1))
    for habit in draw.sample(habits, min(2, len(habits))):
        text = habit(text)
    return text


def _share(total: int, number: int) -> int:
    """The share of family ``number`` in ``total`` rows spread evenly."""
    return total // len(FAMILIES) + (number < total % len(FAMILIES))


# --- the contents of the world ----------------------------------------------------------------------------------------

WORDS = tuple(
    """
    red fox sun map dog cup hat pen sky ice owl jar key lamp milk moon nest oak rain salt star tree wind yarn bell
    boat cave corn door frog gold hill
    """.split()  # noqa: SIM905 (a list of words reads best as words)
)
LONG_WORDS = tuple(
    """
    banana letter pepper bottle summer kitten garden winter silver button copper pillow carrot yellow rabbit
    ladder mirror tomato butter cookie dinner hammer puzzle rocket tunnel wallet zipper needle coffee turtle
    parrot meadow
    """.split()  # noqa: SIM905 (a list of words reads best as words)
)
UNITS = (
    ("m", "cm", 100),
    ("km", "m", 1000),
    ("kg", "g", 1000),
    ("hours", "minutes", 60),
    ("weeks", "days", 7),
    ("dozens", "eggs", 12),
)
RELATIONS = (
    ("capital", ("ovia", "land", "mar", "stan")),
    ("king", ("ovia", "land", "mar", "stan")),
    ("river", ("ovia", "land", "mar", "stan")),
    ("colour", ("bird", "fish", "moth", "wolf")),
)


def problems(family: str, difficulty: int, steps: int = 1, facts: int = FACTS) -> list[Problem]:
    """All problems of a family, or a fixed sample of ``POOL`` if there are more; the same at every call.

    Args:
        difficulty, steps, facts: as in :class:`TinyWorld`.
    """
    draw = random.Random(derive(WORLD, family))
    makers: dict[str, Callable[[], Iterator[Problem]]] = {
        "arithmetic": lambda: _arithmetic(difficulty) if steps == 1 else _two_steps(difficulty, draw),
        "conversion": lambda: _conversion(difficulty),
        "reversal": lambda: _reversal(difficulty, draw),
        "sorting": lambda: _sorting(difficulty, draw),
        "counting": _counting,
        "facts": lambda: _facts(facts, draw),
    }
    everything = {p.key: p for p in makers[family]()}
    pool = list(everything.values())
    if len(pool) > POOL:
        pool = random.Random(derive(WORLD, "pool", family)).sample(pool, POOL)
    return pool


def _arithmetic(difficulty: int) -> Iterator[Problem]:
    top = 8 + 4 * difficulty
    for a in range(top):
        for b in range(top):
            for word, value in (("plus", a + b), ("minus", a - b)):
                if value < 0:
                    continue
                near = [value + d for d in (-10, -2, -1, 1, 2, 10) if value + d >= 0]
                yield Problem(
                    key=f"{a} {word} {b}",
                    wordings=(f"What is {a} {word} {b}?", f"Work out {a} {word} {b}.", f"{a} {word} {b} is what?"),
                    phrasings=(f"{a} {word} {b} is {{}}.", f"{a} {word} {b} equals {{}}."),
                    answer=str(value),
                    needs=(str(a), word, str(b)),
                    wrong=tuple(map(str, near)),
                    short="It is {}.",
                )


def _two_steps(difficulty: int, draw: random.Random) -> Iterator[Problem]:
    """Sums and differences of three numbers, from left to right; no result is below 0."""
    top = 8 + 4 * difficulty
    signs = {"plus": 1, "minus": -1}
    for _ in range(4 * POOL):
        (a, b, c), (one, two) = (draw.randrange(top) for _ in range(3)), (draw.choice(tuple(signs)) for _ in range(2))
        between = a + signs[one] * b
        value = between + signs[two] * c
        if between < 0 or value < 0:
            continue
        question = f"{a} {one} {b} {two} {c}"
        near = {str(v) for v in (between, *(value + d for d in (-10, -2, -1, 1, 2, 10))) if v >= 0 and v != value}
        yield Problem(
            key=question,
            wordings=(f"What is {question}?", f"Work out {question}.", f"{question} is what?"),
            phrasings=(
                f"{a} {one} {b} is {between}, and {between} {two} {c} is {{}}.",
                f"{a} {one} {b} equals {between}, so {question} equals {{}}.",
            ),
            answer=str(value),
            needs=(str(a), one, str(b), str(between), two, str(c)),
            wrong=tuple(sorted(near)),
            short="It is {}.",
        )


def _conversion(difficulty: int) -> Iterator[Problem]:
    for large, small, factor in UNITS:
        for n in range(2, 17 + 25 * difficulty):
            value = n * factor
            near = (n * factor * 10, (n + 1) * factor, n + factor, (n - 1) * factor)
            yield Problem(
                key=f"{n} {large}",
                wordings=(f"How many {small} are in {n} {large}?", f"Convert {n} {large} to {small}."),
                phrasings=(f"{n} {large} are {{}}.", f"In {small}, {n} {large} are {{}}."),
                answer=f"{value} {small}",
                needs=(str(n), large),
                wrong=tuple(f"{v} {small}" for v in near if v != value),
                short="That is {}.",
            )


def _reversal(difficulty: int, draw: random.Random) -> Iterator[Problem]:
    for _ in range(4 * POOL):
        words = draw.sample(WORDS[: 8 + 8 * difficulty], draw.randint(2, 1 + difficulty))
        answer = words[::-1]
        wrong = [words, [*answer[:-2], answer[-1], answer[-2]], answer[1:] + answer[:1]]
        yield _list_problem(
            words,
            answer,
            wrong,
            wordings=("Reverse the words {}.", "Say {} backwards.", "Turn around: {}."),
            phrasings=("Reversed, the words are {}.", "Backwards: {}."),
        )


def _sorting(difficulty: int, draw: random.Random) -> Iterator[Problem]:
    for _ in range(4 * POOL):
        numbers = draw.sample(range(10 + 5 * difficulty), draw.randint(2, 1 + difficulty))
        answer = sorted(numbers)
        wrong = [answer[::-1], [*answer[:-2], answer[-1], answer[-2]], answer[1:] + answer[:1]]
        yield _list_problem(
            [str(n) for n in numbers],
            [str(n) for n in answer],
            [[str(n) for n in w] for w in wrong],
            wordings=("Sort the numbers {}.", "Put {} in order.", "Order: {}."),
            phrasings=("Sorted, the numbers are {}.", "In order: {}."),
        )


def _list_problem(
    items: list[str],
    answer: list[str],
    wrong: list[list[str]],
    wordings: tuple[str, ...],
    phrasings: tuple[str, ...],
) -> Problem:
    right = " ".join(answer)
    return Problem(
        key=" ".join(items),
        wordings=tuple(wording.format(" ".join(items)) for wording in wordings),
        phrasings=phrasings,
        answer=right,
        needs=tuple(answer),
        wrong=tuple(sorted({" ".join(w) for w in wrong} - {right})),
        # An incomplete answer lacks the last item.
        short=phrasings[0].format(" ".join(answer[:-1])),
    )


def _counting() -> Iterator[Problem]:
    for word in LONG_WORDS + WORDS:
        for letter in sorted(set(word) | {"e", "t"}):
            count = word.count(letter)
            yield Problem(
                key=f"{letter} {word}",
                wordings=(
                    f"How many times is {letter} in {word}?",
                    f"Count the letter {letter} in {word}.",
                    f"How often does {word} have {letter}?",
                ),
                phrasings=(f"The number of {letter} in {word} is {{}}.", f"Letter {letter} in {word}: {{}}."),
                answer=str(count),
                needs=(letter, word),
                wrong=tuple(str(n) for n in (count - 1, count + 1, count + 2) if n >= 0),
                short="It is {}.",
            )


def _facts(count: int, draw: random.Random) -> Iterator[Problem]:
    """Invented facts. Every third has a myth: the answer to another question about the same relation."""
    starts = [a + b for a in ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "t", "v", "z") for b in "aeiou"]
    table: list[tuple[str, str, str]] = []
    for number in range(count):
        relation, endings = RELATIONS[number % len(RELATIONS)]
        while True:
            subject = (draw.choice(starts) + draw.choice(endings)).capitalize()
            if all(known[:2] != (relation, subject) for known in table):
                break
        colour = draw.choice(("red", "blue", "green", "white", "black", "grey", "pink", "brown"))
        name = (draw.choice(starts) + draw.choice(starts)).capitalize()
        table.append((relation, subject, colour if relation == "colour" else name))
    for number, (relation, subject, value) in enumerate(table):
        others = sorted({v for r, _, v in table if r == relation and v != value})
        yield Problem(
            key=f"{relation} {subject}",
            wordings=(
                f"What is the {relation} of {subject}?",
                f"Name the {relation} of {subject}.",
                f"Tell me {subject}'s {relation}.",
            ),
            phrasings=(f"The {relation} of {subject} is {{}}.", f"{subject}'s {relation} is {{}}."),
            answer=value,
            needs=(relation, subject),
            wrong=tuple(others),
            short="It is {}.",
            myth=draw.choice(others) if number % 3 == 0 else None,
        )
