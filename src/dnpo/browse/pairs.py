"""The pairs that an iteration trained on."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, PositiveInt

from dnpo.browse.held import PAGE
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
from dnpo.errors import DataError
from dnpo.records import HUMAN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[np.float32]

KEPT = 6  # iterations whose pairs stay in memory
SIDES = ("chosen", "rejected")
NUMBERS = {"flipped": 0.0, "strength": 1.0, "weight": 1.0, "shift": 0.0, "step": 0.0, "draws": 0.0}
TEXTS = ("id", "messages", "chosen", "rejected", "chosen_source", "rejected_source")
SCORES = ("chosen_score", "rejected_score", "chosen_sample", "rejected_sample")


class PairsQuery(BaseModel):
    """Which pairs to list, and in which order.

    Attributes:
        of: the iteration, as ``RUN.ITERATION``; "" for the first.
        q: a text to search for in the prompt's id, its messages and the responses.
        family: the task family of the prompt; "" for all.
        flipped: whether a generated response was chosen over the human one.
        gap: the sign of the score difference between chosen and rejected response, or ``unscored``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    of: str = ""
    q: str = ""
    family: str = ""
    flipped: Literal["", "yes", "no"] = ""
    gap: Literal["", "above", "equal", "below", "unscored"] = ""
    sort: Literal["worst", "wide", "narrow", "unsure", "heavy", "unlikely", "order"] = "worst"
    page: PositiveInt = 1


@dataclass(frozen=True)
class Source:
    """Where the pairs of one iteration are.

    Attributes:
        run: number of the run.
        file: a file of pairs, or of single responses with a score.
    """

    run: int
    iteration: str
    file: Path

    @property
    def key(self) -> str:
        """The name in links."""
        return f"{self.run}.{self.iteration}"


class Pairs:
    """The pairs of one iteration. Responses without a counterpart have no rejected side."""

    def __init__(self, run: Run, file: Path) -> None:
        train = read_columns(run.prompts / "train.parquet", ("id", "family", "messages", "human", "answer"))
        table = read_columns(file, (*TEXTS, *SCORES, *NUMBERS, "source", "text", "score", "sample", "logprob"))
        place = pc.index_in(table.column("id"), value_set=train.column("id").combine_chunks())
        if "text" in table.column_names:  # responses, each trained on alone
            of_one = {"text": "chosen", "source": "chosen_source", "score": "chosen_score", "sample": "chosen_sample"}
            table = table.rename_columns([of_one.get(name, name) for name in table.column_names])
            table = table.append_column("messages", train.column("messages").take(place))
        self.table, self.prompts = table, train.take(place)
        self.number = {name: numbers(table, name, default) for name, default in NUMBERS.items()}
        self.number |= {name: numbers(table, name) for name in SCORES}
        self.logprob = {side: np.full(len(table), np.nan, np.float32) for side in SIDES}
        self.logprob["chosen"] = numbers(table, "logprob")
        reference = run.reference(file)
        if reference is not None and is_there(reference):
            self._read_reference(sorted(reference.glob("shard-*.parquet")))

    def _read_reference(self, shards: Sequence[Path]) -> None:
        for shard in shards:
            logps = read_columns(shard, ("pair", *SIDES))
            rows = logps.column("pair").to_numpy()
            for side in SIDES:
                self.logprob[side][rows] = numbers(logps, side)

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def families(self) -> list[str]:
        """The task families, in the order of the data."""
        return [family for family in self.prompts.column("family").unique().to_pylist() if family]

    @cached_property
    def gap(self) -> "Numbers":
        """The score of the chosen response minus the score of the rejected one."""
        return self.number["chosen_score"] - self.number["rejected_score"]

    def select(self, query: PairsQuery) -> "NDArray[np.int64]":
        """The numbers of the pairs that a query asks for, in its order."""
        wanted = np.ones(len(self), bool)
        if query.family:
            wanted &= np.asarray(self.prompts.column("family").to_numpy(zero_copy_only=False) == query.family)
        if query.flipped:
            wanted &= (self.number["flipped"] > 0) == (query.flipped == "yes")
        if query.gap:
            wanted &= {
                "above": self.gap > 0,
                "equal": self.gap == 0,
                "below": self.gap < 0,
                "unscored": ~np.isfinite(self.gap),
            }[query.gap]
        if query.q:
            wanted &= self._contain(query.q)
        rows: NDArray[np.int64] = np.flatnonzero(wanted)
        if query.sort == "order":
            return rows
        order: Numbers = {
            "worst": self.number["chosen_score"],
            "wide": -abs(self.gap),
            "narrow": abs(self.gap),
            "unsure": self.number["strength"],
            "heavy": -self.number["weight"],
            "unlikely": self.logprob["chosen"],
        }[query.sort]
        return rows[np.argsort(order[rows], kind="stable")]

    def _contain(self, text: str) -> "NDArray[np.bool_]":
        found = messages_contain(self.table.column("messages"), text)
        for name in ("id", *SIDES):
            if name in self.table.column_names:
                found |= contains(self.table.column(name), text)
        return found

    def show_page(self, query: PairsQuery) -> dict[str, Any]:
        """A page of the pairs that a query asks for."""
        rows = self.select(query)
        shown = page_of(rows, query.page, PAGE)
        number = pa.array(shown, pa.int64())
        entries = zip(shown, self.table.take(number).to_pylist(), self.prompts.take(number).to_pylist(), strict=True)
        listed = [
            {
                "row": row,
                "id": visible(pair["id"]),
                "family": visible(prompt["family"]),
                "prompt": last_message(pair["messages"] or []),
                "sides": [{**side, "text": beginning(side["text"])} for side in self._sides(row, pair)],
                **self._facts(row),
            }
            for row, pair, prompt in entries
        ]
        return {"total": len(rows), "of": len(self), "size": PAGE, "families": self.families, "rows": listed}

    def show_row(self, row: int) -> dict[str, Any]:
        """A pair with its prompt, and the human response if that is neither of its sides.

        Raises:
            DataError: there is no such row.
        """
        if not 0 <= row < len(self):
            raise DataError(f"row={row}: there are {len(self):,} rows, numbered from 0")
        pair, prompt = (table.slice(row, 1).to_pylist()[0] for table in (self.table, self.prompts))
        sides = self._sides(row, pair)
        others = HUMAN not in {side["source"] for side in sides}
        return {
            "row": row,
            "id": visible(pair["id"]),
            "family": visible(prompt["family"]),
            "answer": visible(prompt["answer"]) or None,
            "messages": conversation(pair["messages"] or []),
            "human": visible(prompt["human"]) if others else None,
            "sides": [{**side, "text": visible(side["text"])} for side in sides],
            **self._facts(row),
        }

    def _sides(self, row: int, pair: dict[str, Any]) -> list[dict[str, Any]]:
        single = not pair.get("rejected_source")
        return [
            {
                "side": "response" if single and "rejected" not in pair else side,
                "text": pair[side],
                "source": visible(pair[f"{side}_source"]),
                "sample": plain(self.number[f"{side}_sample"][row]),
                "score": plain(self.number[f"{side}_score"][row]),
                "logprob": plain(self.logprob[side][row]),
            }
            for side in (SIDES[:1] if single else SIDES)
        ]

    def _facts(self, row: int) -> dict[str, Any]:
        facts = {name: plain(values[row]) for name, values in self.number.items() if name in NUMBERS}
        return {**facts, "flipped": bool(facts["flipped"]), "gap": plain(self.gap[row])}


class AllPairs:
    """The pairs of all iterations of several runs; an iteration's pairs are read at their first use."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.sources = {
            source.key: source
            for number, run in enumerate(runs)
            for iteration, file in run.trained_on()
            if is_there(file.parent)
            for source in [Source(number, iteration, file)]
        }
        self._read: OrderedDict[str, Pairs] = OrderedDict()

    def show_page(self, query: PairsQuery) -> dict[str, Any]:
        """A page of the pairs that a query asks for; if there are none, the iterations that have some (``elsewhere``).

        Raises:
            DataError: there is no such iteration.
            StoreError: a file is damaged.
        """
        page = self.of(query.of).show_page(query)
        others = [] if page["total"] else self.sources
        return page | {"elsewhere": [[key, many] for key in others if (many := len(self.of(key).select(query)))]}

    def of(self, key: str) -> Pairs:
        """The pairs of an iteration.

        Raises:
            DataError: there is no such iteration.
            StoreError: a file is damaged.
        """
        if not self.sources:
            raise DataError("these runs have no training pairs")
        key = key or next(iter(self.sources))
        if key not in self.sources:
            raise DataError(f"{key}: there is no such iteration here")
        if key not in self._read:
            source = self.sources[key]
            self._read[key] = Pairs(self.runs[source.run], source.file)
            while len(self._read) > KEPT:
                self._read.popitem(last=False)
        self._read.move_to_end(key)
        return self._read[key]
