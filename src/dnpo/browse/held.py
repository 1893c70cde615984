"""The answers of all policies to the held-out prompts, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, PositiveInt

from dnpo.browse.runs import Run, is_there
from dnpo.browse.texts import (
    beginning,
    contains,
    conversation,
    last_message,
    messages_contain,
    numbers,
    page_of,
    plain,
    read_columns,
    visible,
)
from dnpo.errors import DataError, StoreError
from dnpo.tracking.reading import SFT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[np.float32]

PAGE = 50
GREEDY, SAMPLES = "greedy", "samples"


class HeldQuery(BaseModel):
    """Which held-out prompts to list, and in which order.

    Attributes:
        q: a text to search for in the prompt's id, its messages, its human response and all answers.
        family: the task family; "" for all.
        a, b: the two policies to be compared, as ``RUN.ITERATION``; "" for the default ones.
        answer: the answer whose score counts: the greedy one, or the mean over samples.
        outcome: whether b's answer wins or loses against the human response, is right or wrong, or became right
            (``gained``) or wrong (``lost``) from a to b.
        change: the sign of the difference between b's score and a's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    q: str = ""
    family: str = ""
    a: str = ""
    b: str = ""
    answer: Literal["greedy", "samples"] = "greedy"
    outcome: Literal["", "wins", "loses", "right", "wrong", "gained", "lost"] = ""
    change: Literal["", "rose", "fell", "same"] = ""
    sort: Literal["worst", "best", "changed", "fell", "rose", "unlikely", "longest", "order"] = "worst"
    page: PositiveInt = 1


@dataclass(frozen=True)
class Answers:
    """One policy's answers to the prompts of the table.

    The arrays of numbers have one row per answer, the greedy one first, and one column per prompt. Missing numbers are
    NaN.

    Attributes:
        run: number of the run.
        iteration: ``SFT`` or the iteration's number.
        place: the number of each prompt of the table among the prompts of the run; −1 if the run does not have it.
        count: number of the run's prompts.
        details: for each answer its text, the reason for a missing score, and how it ended.
        human: scores of the human responses.
        right: 1 if the answer is right, 0 if it is wrong.
        logprob: in nats, under the policy itself.
    """

    run: int
    iteration: str
    place: "NDArray[np.int64]"
    count: int
    details: pa.Table
    human: "Numbers"
    score: "Numbers"
    second: "Numbers"
    right: "Numbers"
    tokens: "Numbers"
    logprob: "Numbers"

    @property
    def key(self) -> str:
        """The name in links."""
        return f"{self.run}.{self.iteration}"

    def measure(self, name: str, answer: str) -> "Numbers":
        """A number for each prompt: of the greedy answer, or the mean over samples."""
        values: Numbers = getattr(self, name)
        return values[0] if answer == GREEDY else _mean(values[1:])

    def contain(self, text: str) -> "NDArray[np.bool_]":
        """For each prompt of the table, whether any answer contains a text."""
        hits = contains(self.details.column("text"), text).reshape(-1, self.count)
        own: NDArray[np.bool_] = np.logical_or.reduce(hits, axis=0)
        return (self.place >= 0) & own[self.place]

    def text(self, row: int, answer: int) -> str | None:
        """The text of an answer; None if the run does not have the prompt."""
        if self.place[row] < 0:
            return None
        found: str = self.details.column("text")[answer * self.count + int(self.place[row])].as_py()
        return found

    def describe(self, row: int) -> list[dict[str, Any]]:
        """All answers to one prompt; the run must have this prompt."""
        return [self._describe(row, answer) for answer in range(len(self.score))]

    def _describe(self, row: int, answer: int) -> dict[str, Any]:
        details = self.details.slice(answer * self.count + int(self.place[row]), 1).to_pylist()[0]
        return {
            "title": f"sample {answer}" if answer else GREEDY,
            "text": visible(details["text"]),
            "score": plain(self.score[answer, row]),
            "second": plain(self.second[answer, row]),
            "reason": visible(details.get("reason")),
            "right": plain(self.right[answer, row]),
            "logprob": plain(self.logprob[answer, row]),
            "tokens": plain(self.tokens[answer, row]),
            "cut": details["finish"] == "length",
        }


def _mean(values: "Numbers") -> "Numbers":
    """The mean of each column over the rows that have a number."""
    known = np.isfinite(values)
    counts = known.sum(0)
    total = np.where(known, values, 0).sum(0)
    return np.where(counts, total / np.maximum(counts, 1), np.nan).astype(np.float32)


class Held:
    """The held-out prompts of several runs, with the answers of all policies.

    Prompts with the same id, messages and human response are one row, so runs on the same data share their rows.

    Args:
        runs: the runs.

    Raises:
        DataError: a file does not belong to the prompts.
        StoreError: a file is damaged.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        tables = {run: _read_prompts(run) for run in dict.fromkeys((run.prompts, run.split) for run in runs)}
        self.prompts, places = _join(list(tables.values()))
        by_folder = dict(zip(tables, places, strict=True))
        read: dict[tuple[Path, Path | None], dict[str, Any]] = {}
        self.policies: list[Answers] = []
        for number, run in enumerate(runs):
            place = by_folder[run.prompts, run.split]
            for iteration, folder in run.evaluations():
                key = (folder, run.second_judging(folder))
                if key not in read:  # runs share evaluations
                    read[key] = _read_answers(*key, len(tables[run.prompts, run.split]), place)
                self.policies.append(Answers(number, iteration, place, **read[key]))
        self.by_key = {policy.key: policy for policy in self.policies}

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def families(self) -> list[str]:
        """The task families, in the order of the data."""
        return [family for family in self.prompts.column("family").unique().to_pylist() if family]

    @property
    def usual(self) -> tuple[Answers, Answers]:
        """The policies compared by default: the first and last of one run, or the last ones of two runs.

        The two runs have the same seed, the first that several have, so that their difference is not one of seeds; if
        no seed is shared, they are the first and the last run.
        """
        if len(self.runs) == 1:
            return self.policies[0], self.policies[-1]
        seeds = [run.seed for run in self.runs]
        shared = next((seed for seed in seeds if seeds.count(seed) > 1), None)
        numbers = [number for number, seed in enumerate(seeds) if shared is None or seed == shared]
        last = {policy.run: policy for policy in self.policies}
        return last[numbers[0]], last[numbers[-1]]

    def compared(self, query: HeldQuery) -> tuple[Answers, Answers]:
        """The two policies that a query compares.

        Raises:
            DataError: there is no such policy.
        """
        for name in (query.a, query.b):
            if name and name not in self.by_key:
                raise DataError(f"{name}: there is no such policy here")
        a, b = self.usual
        return self.by_key[query.a] if query.a else a, self.by_key[query.b] if query.b else b

    def select(self, query: HeldQuery) -> "NDArray[np.int64]":
        """The numbers of the prompts that a query asks for, in its order."""
        a, b = self.compared(query)
        old, new = (policy.measure("score", query.answer) for policy in (a, b))
        change = new - old
        wanted = np.ones(len(self), bool)
        if query.family:
            wanted &= np.asarray(self.prompts.column("family").to_numpy(zero_copy_only=False) == query.family)
        if query.change:
            wanted &= {"rose": change > 0, "fell": change < 0, "same": change == 0}[query.change]
        if query.outcome:
            was, right = (policy.measure("right", query.answer) for policy in (a, b))
            wanted &= {
                "wins": new > b.human,
                "loses": new < b.human,
                "right": right >= 0.5,
                "wrong": right < 0.5,
                "gained": (was < 0.5) & (right >= 0.5),
                "lost": (was >= 0.5) & (right < 0.5),
            }[query.outcome]
        if query.q:
            wanted &= self._contain(query.q)
        rows: NDArray[np.int64] = np.flatnonzero(wanted)
        if query.sort == "order":
            return rows
        order: Numbers = {
            "worst": new,
            "best": -new,
            "changed": -abs(change),
            "fell": change,
            "rose": -change,
            "unlikely": b.measure("logprob", query.answer),
            "longest": -b.measure("tokens", query.answer),
        }[query.sort]
        return rows[np.argsort(order[rows], kind="stable")]

    def _contain(self, text: str) -> "NDArray[np.bool_]":
        found = messages_contain(self.prompts.column("messages"), text)
        for name in ("id", "human"):
            found |= contains(self.prompts.column(name), text)
        seen: set[int] = set()
        for policy in self.policies:
            if id(policy.details) not in seen:
                seen.add(id(policy.details))
                found |= policy.contain(text)
        return found

    def show_page(self, query: HeldQuery) -> dict[str, Any]:
        """A page of the prompts that a query asks for."""
        rows = self.select(query)
        a, b = self.compared(query)
        shown = page_of(rows, query.page, PAGE)
        entries = self.prompts.take(pa.array(shown, pa.int64())).to_pylist()
        sides = [self._list_answers(policy, query.answer, shown) for policy in (a, b)]
        listed = [
            {
                "row": row,
                "id": visible(prompt["id"]),
                "family": visible(prompt["family"]),
                "prompt": last_message(prompt["messages"]),
                "human": {"text": beginning(prompt["human"]), "score": plain(b.human[row])},
                "sides": [side[place] for side in sides],
            }
            for place, (row, prompt) in enumerate(zip(shown, entries, strict=True))
        ]
        titles = [self.title(policy) for policy in (a, b)]
        counts = {"total": len(rows), "of": len(self), "size": PAGE}
        return {**counts, "families": self.families, "titles": titles, "rows": listed}

    def _list_answers(self, policy: Answers, answer: str, rows: Sequence[int]) -> list[dict[str, Any]]:
        """One policy's answers to some prompts: greedy ones, or the first samples with means over all."""
        score, right, logprob = (policy.measure(name, answer) for name in ("score", "right", "logprob"))
        number = 0 if answer == GREEDY or len(policy.score) == 1 else 1
        return [
            {
                "text": beginning(policy.text(row, number)),
                "score": plain(score[row]),
                "right": plain(right[row]),
                "logprob": plain(logprob[row]),
            }
            for row in rows
        ]

    def title(self, policy: Answers) -> str:
        """The name of a policy, with its run's name if there are several runs."""
        own = policy.iteration if policy.iteration == SFT else f"iteration {policy.iteration}"
        return own if len(self.runs) == 1 else f"{visible(self.runs[policy.run].name)} · {own}"

    def show_row(self, row: int) -> dict[str, Any]:
        """A prompt with all answers of all policies.

        Raises:
            DataError: there is no such row.
        """
        if not 0 <= row < len(self):
            raise DataError(f"row={row}: there are {len(self):,} rows, numbered from 0")
        prompt = self.prompts.slice(row, 1).to_pylist()[0]
        runs = []
        for number, run in enumerate(self.runs):
            own = [policy for policy in self.policies if policy.run == number]
            iterations = [
                {"iteration": policy.iteration, "answers": policy.describe(row)}
                for policy in own
                if policy.place[row] >= 0
            ]
            human = plain(own[0].human[row]) if own else None
            runs.append({"name": visible(run.name), "human": human, "iterations": iterations})
        return {
            "row": row,
            "id": visible(prompt["id"]),
            "family": visible(prompt["family"]),
            "answer": visible(prompt["answer"]) or None,
            "messages": conversation(prompt["messages"]),
            "human": visible(prompt["human"]),
            "runs": [run for run in runs if run["iterations"]],
        }


PROMPT = ("id", "family", "messages", "human", "answer")


def _read_prompts(place: tuple[Path, str]) -> pa.Table:
    folder, split = place
    return read_columns(folder / f"{split}.parquet", PROMPT).select(PROMPT)


def _join(tables: Sequence[pa.Table]) -> "tuple[pa.Table, list[NDArray[np.int64]]]":
    """Join tables of prompts into one without repetitions.

    Returns:
        The joint table, and for each table the number of each joint row in it; −1 if it lacks the row.
    """
    if len(tables) == 1:
        return tables[0], [np.arange(len(tables[0]))]
    numbers_of: dict[tuple[str, str, str], int] = {}
    parts, found = [], []
    for table in tables:
        fresh, joint = [], []
        for i, row in enumerate(table.select(("id", "messages", "human")).to_pylist()):
            key = (row["id"], str(row["messages"]), row["human"])
            if key not in numbers_of:
                numbers_of[key] = len(numbers_of)
                fresh.append(i)
            joint.append(numbers_of[key])
        parts.append(table.take(pa.array(fresh, pa.int64())))
        found.append(joint)
    places = []
    for joint in found:
        place = np.full(len(numbers_of), -1)
        place[joint] = np.arange(len(joint))
        places.append(place)
    return pa.concat_tables(parts).combine_chunks(), places


def _read_answers(folder: Path, second: Path | None, count: int, place: "NDArray[np.int64]") -> dict[str, Any]:
    """Read the answers of one policy; return arguments of :class:`Answers`."""
    results = second if second is not None and is_there(second) else folder
    items = read_columns(results / "items.parquet", ("score", "second", "right", "tokens", "logprob"))
    answers = len(items) - count  # human responses are first
    details = read_columns(folder / "samples.parquet", ("text", "finish")).slice(0, answers).combine_chunks()
    if len(details) != answers or answers % count:
        raise DataError(f"{folder}: its answers do not match the {count:,} held-out prompts")
    if (folder / "verdicts.parquet").is_file():
        reasons = read_columns(folder / "verdicts.parquet", ("reason",)).slice(count)
        if len(reasons) != answers:
            raise StoreError(f"{folder}: its verdicts and its answers differ in number")
        details = details.append_column("reason", reasons.column("reason"))

    def arrange(name: str) -> "Numbers":
        values = numbers(items, name).reshape(-1, count)
        return np.where(place >= 0, values[:, place], np.nan).astype(np.float32)

    arranged = {name: arrange(name) for name in ("score", "second", "right", "tokens", "logprob")}
    return {
        "count": count,
        "details": details,
        "human": arranged["score"][0],
        **{name: values[1:] for name, values in arranged.items()},
    }
