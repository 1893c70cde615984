"""Several sources as one, with a weight for each."""

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from dnpo.data import SPLITS, LongResponses, Source
from dnpo.data.distinct import remove_duplicates
from dnpo.errors import DataError, SettingsError
from dnpo.records import Prompt
from dnpo.seeding import derive
from dnpo.settings import Count, Fraction, Natural, Positive, named_within, nearest, part_key, require
from dnpo.tables import Collector, column, take

VERSION = 1  # part of stage keys; must be raised when a change of the code gives other rows for the same sources
LIMITS = ("max_prompt_tokens", "max_response_tokens", "long_responses")
AT = "/"  # between a source's name and the id of one of its rows


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The rows of several sources. Each source splits its rows, and removes duplicates among them, by its own settings.

    A row's id begins with the name of its source, which is also the family of rows that have none.

    Args:
        sources: the sources by name, such as ``+data@data.sources.chat=jsonl data.sources.chat.path=FILE``.
        weights: by name, the share of the training rows that a source gives, relative to the others; null: every source
            gives all of its training rows. Rows are drawn without replacement; held-out rows are all taken.
        rows: number of training rows in all; 0: as many as the weights allow.
        near_duplicates: remove rows whose prompt resembles another at least this much, across all sources; measured as
            in a single source. 0 removes only equal prompts.
        seed: seed of the draw.
        max_prompt_tokens: longer prompts are dropped; replaces the sources' limits.
        max_response_tokens: maximum length of responses; replaces the sources' limits.
        long_responses: ``cut`` cuts longer human responses as samples are cut, ``drop`` drops their rows.

    Raises:
        SettingsError: a weight belongs to no source, a source has no weight, or ``rows`` has no effect.
    """

    drawn_with_replacement: ClassVar[bool] = False

    sources: Mapping[str, Any]
    weights: dict[str, Positive] | None = None
    rows: Natural = 0
    near_duplicates: Fraction = 0.9
    seed: Natural = 0
    max_prompt_tokens: Count
    max_response_tokens: Count
    long_responses: LongResponses = "cut"

    def __post_init__(self) -> None:
        if not self.sources:
            raise SettingsError("sources: there is none; give +data@data.sources.NAME=jsonl, and its settings")
        for name, source in self.sources.items():
            if AT in name:
                raise SettingsError(f"sources.{name}: expected a name without {AT}")
            require(f"sources.{name}", source, Source)
        if self.weights is None:
            if self.rows:
                raise SettingsError(f"rows={self.rows}: has an effect only with weights for the sources")
            return
        for name in self.weights:
            if name not in self.sources:
                raise SettingsError(f"weights.{name}: there is no such source.{nearest(name, self.sources)}")
        for name in self.sources:
            if name not in self.weights:
                raise SettingsError(f"weights.{name}: needs a value, as every source does; or leave the source out")

    def identity(self) -> Mapping[str, Any]:
        """The sources' identities; weights, number of rows and seed only if rows are drawn."""
        drawn = {"weights": dict(self.weights), "rows": self.rows, "seed": self.seed} if self.weights else {}
        sources = {}
        for name in sorted(self.sources):
            with self._named(name):
                sources[name] = part_key(self.sources[name])
        return {"mix": VERSION, "sources": sources, "near_duplicates": self.near_duplicates, **drawn}

    def read(self) -> tuple[dict[str, Sequence[Prompt]], dict[str, Any]]:
        """Return the rows by split, in an order that depends on their ids alone.

        Raises:
            DataError: a source cannot be read, has no row left, or has too few rows for its weight.
        """
        rows, facts = self._by_split
        return dict(rows), dict(facts)

    @cached_property
    def _by_split(self) -> tuple[dict[str, Sequence[Prompt]], dict[str, Any]]:
        rows: dict[str, Collector[Prompt]] = {split: Collector(Prompt) for split in SPLITS}
        facts: dict[str, Any] = {"removed": Counter(), "examples": [], "unusable": {}, "unread": [], "notes": []}
        for name in sorted(self.sources):
            with self._named(name):
                found, its_facts = self.sources[name].read()
            for split in SPLITS:
                for row in found[split]:
                    rows[split].add(replace(row, id=f"{name}{AT}{row.id}", family=row.family or name))
            facts["removed"].update(its_facts.get("removed", {}))
            facts["examples"] += its_facts.get("examples", [])
            facts["unusable"] |= {f"{name}: {why}": count for why, count in its_facts.get("unusable", {}).items()}
            facts["unread"] += [f"{name}: {each}" for each in its_facts.get("unread", [])]
            facts["notes"] += self._compare_limits(name)
        everything = {split: some.finish() for split, some in rows.items()}
        left, removed, examples = remove_duplicates(everything, self.near_duplicates)
        facts["removed"].update(removed)
        facts["removed"], facts["examples"] = dict(facts["removed"]), [*examples, *facts["examples"]]
        if not facts["unusable"]:
            del facts["unusable"]
        chosen = {**left, "train": take(left["train"], self._draw(column(left["train"], "id")))}
        mixed = {split: take(some, _in_order(column(some, "id"))) for split, some in chosen.items()}
        facts["sources"] = {split: count_sources(some) for split, some in mixed.items()}
        return mixed, {**facts, **{f"{split}_rows": len(some) for split, some in mixed.items()}}

    def _draw(self, ids: Sequence[str]) -> list[int]:
        """The numbers of the training rows to take."""
        places: dict[str, list[int]] = {name: [] for name in sorted(self.sources)}
        for number, id in enumerate(ids):
            places[id.partition(AT)[0]].append(number)
        for name, some in places.items():
            if not some:
                raise DataError(
                    f"data.sources.{name}: none of its training rows is left after duplicates are removed "
                    f"(data.near_duplicates={self.near_duplicates}); leave it out, or take other rows"
                )
        if self.weights is None:
            return list(range(len(ids)))
        total = sum(self.weights.values())
        shares = {name: self.weights[name] / total for name in places}
        most = min(int(len(some) / shares[name]) for name, some in places.items())
        counts = _divide(self.rows or most, shares)
        for name, some in places.items():
            if counts[name] > len(some):
                raise DataError(
                    f"data.weights.{name}={self.weights[name]:g}: with data.rows={self.rows} this source should give "
                    f"{counts[name]:,} training rows, but it has {len(some):,}; expected at most data.rows={most}, or "
                    "a smaller weight"
                )
            if not counts[name]:
                raise DataError(
                    f"data.weights.{name}={self.weights[name]:g}: of {self.rows or most:,} training rows this source "
                    "gives none; raise the weight or data.rows, or leave the source out"
                )
        drawn: list[int] = []
        for name, some in places.items():
            drawn += random.Random(derive(self.seed, "mix", name)).sample(some, counts[name])
        return drawn

    def _compare_limits(self, name: str) -> list[str]:
        """Say which limits of a source are replaced."""
        own = self.sources[name]
        return [
            f"data.sources.{name}.{limit}={getattr(own, limit)}: data.{limit}={getattr(self, limit)} applies instead"
            for limit in LIMITS
            if getattr(own, limit) != getattr(self, limit)
        ]

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Make the errors of a source name its settings by their place in the mix."""
        settings = [each for each in dir(type(self.sources[name])) if not each.startswith("_")]
        fields = getattr(type(self.sources[name]), "__dataclass_fields__", {})
        with named_within({f"data.{each}": f"data.sources.{name}.{each}" for each in {*settings, *fields}}):
            yield


def count_sources(rows: Sequence[Prompt]) -> dict[str, int]:
    """Count the rows of a mix by their source, which their ids name."""
    return dict(sorted(Counter(id.partition(AT)[0] for id in column(rows, "id")).items()))


def describe_sources(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Describe the number of rows of each source, by split."""
    parts = (f"{split} {', '.join(f'{name} {n:,}' for name, n in some.items())}" for split, some in counts.items())
    return f"Rows by source: {'; '.join(parts)}"


def _divide(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Divide a number by shares: round down, and give what is left to the largest remainders."""
    exact = {name: total * share for name, share in shares.items()}
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (counts[name] - exact[name], name))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _in_order(ids: Sequence[str]) -> list[int]:
    """Order rows by a hash of their ids, so that the sources are mixed everywhere."""
    return sorted(range(len(ids)), key=lambda number: hashlib.sha256(ids[number].encode()).digest())
