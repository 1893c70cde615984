"""Rows that someone else wrote: a JSON lines file, or a data set of the Hugging Face hub.

A row has ``prompt`` and ``response``, or ``messages``: system turns if any, the first user turn and the first assistant
answer to it (later turns are ignored). It may have an ``id``, a verifiable ``answer`` and a ``family``. Fields that are
null count as absent, and other fields are ignored.
"""

import hashlib
import json
import os
import random
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from dnpo.data import SPLITS
from dnpo.errors import DataError
from dnpo.records import Message, Prompt
from dnpo.seeding import derive
from dnpo.settings import Count, Fraction, Natural
from dnpo.store import content_hash

FIELDS = ("id", "prompt", "response", "messages", "answer", "family")
FORMS = "expected prompt and response, or messages"


class _Rows(ABC):
    """What the sources here have in common: the draw, the split, and the settings of both."""

    def __init__(
        self, setting: str, sample: int, holdout: float, seed: int, max_prompt_tokens: int, max_response_tokens: int
    ) -> None:
        self.setting, self.sample, self.holdout, self.seed = setting, sample, holdout, seed
        self.max_prompt_tokens, self.max_response_tokens = max_prompt_tokens, max_response_tokens

    @abstractmethod
    def _contents(self) -> Mapping[str, Any]:
        """What decides the rows before any are drawn."""

    @abstractmethod
    def _prompts(self) -> list[Prompt]:
        """The rows that :meth:`_draw` draws."""

    def identity(self) -> Mapping[str, Any]:
        """What decides the rows. Where all are taken, the seed changes nothing."""
        draw = {"sample": self.sample, "holdout": self.holdout}
        return {**self._contents(), **draw, **({"seed": self.seed} if self.sample else {})}

    def read(self) -> tuple[dict[str, list[Prompt]], dict[str, Any]]:
        """Rows by split, and how many training rows were left out because their prompt is held out.

        Raises:
            DataError: there are no rows, a row cannot be used, fewer than ``sample``, or none for one of the splits.
        """
        rows, facts = self._by_split
        return {split: list(some) for split, some in rows.items()}, dict(facts)

    @cached_property
    def _by_split(self) -> tuple[dict[str, list[Prompt]], dict[str, Any]]:
        """A row's split depends on its id alone, so that adding rows moves none."""
        prompts = self._prompts()
        rows: dict[str, list[Prompt]] = {split: [] for split in SPLITS}
        for prompt in prompts:
            place = _fraction(prompt.id)
            held = "validation" if place < self.holdout / 2 else "test"
            rows[held if place < self.holdout else "train"].append(prompt)
        never = {_conversation(prompt) for split in ("validation", "test") for prompt in rows[split]}
        drawn = len(rows["train"])
        rows["train"] = [prompt for prompt in rows["train"] if _conversation(prompt) not in never]
        for split, some in rows.items():
            if not some:
                raise DataError(
                    f"data.holdout={self.holdout}: none of the {len(prompts):,} rows is left for {split} (half of this "
                    "share goes to validation, half to test, the rest to train); change it, or take more rows"
                )
        sizes = {f"{split}_rows": len(some) for split, some in rows.items()}
        return rows, {"train_rows_like_held_out": drawn - len(rows["train"]), **sizes}

    def _draw(self, total: int) -> list[int]:
        """Which of ``total`` rows to take, in their order."""
        if not total:
            raise DataError(f"{self.setting}: there are no rows in it; {FORMS}")
        if self.sample > total:
            raise DataError(f"data.sample={self.sample}: more than the {total:,} rows in {self.setting}; 0 takes all")
        if not self.sample:
            return list(range(total))
        return sorted(random.Random(derive(self.seed, "sample")).sample(range(total), self.sample))


class JsonLines(_Rows):
    """A file with one JSON object a line; blank lines are skipped. Every row is checked, also where few are drawn.

    Args:
        path: the file, in UTF-8.
        sample: rows to draw; 0 takes all.
        holdout: share of the rows held out, half for validation and half for test, by a hash of the id.
        seed: draws the sample.
        max_prompt_tokens: longer prompts are dropped.
        max_response_tokens: responses are cut there.
    """

    def __init__(
        self,
        *,
        path: str,
        sample: Natural = 0,
        holdout: Fraction = 0.1,
        seed: Natural = 0,
        max_prompt_tokens: Count,
        max_response_tokens: Count,
    ) -> None:
        super().__init__(f"data.path={path}", sample, holdout, seed, max_prompt_tokens, max_response_tokens)
        self.path = Path(path)

    def _contents(self) -> Mapping[str, Any]:
        with self._open():
            return {"content": content_hash(self.path)}

    def _prompts(self) -> list[Prompt]:
        with self._open() as stream:
            prompts = _checked(self._parsed(stream))
        return [prompts[i] for i in self._draw(len(prompts))]

    def _open(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise DataError(f"{self.setting}: {error.strerror}; expected a file of JSON lines") from error

    def _parsed(self, stream: BinaryIO) -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{self.path}:{number}"
            try:
                raw = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise DataError(f"{self.setting}: line {number} is not UTF-8 ({error.reason})") from error
            except (ValueError, RecursionError) as error:
                problem = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise DataError(f"{where}: not JSON ({problem}); expected one object a line") from error
            yield where, raw


class Hub(_Rows):
    """A data set of the Hugging Face hub, or a local folder in the hub's layout. Its code is never run.

    Only rows that are drawn are read and checked. Rows without an ``id`` column are known by ``prompt_id`` if there is
    one (UltraChat).

    Args:
        name: on the hub, such as ``HuggingFaceH4/ultrachat_200k``; or a folder with data files.
        config: which of its configurations; null takes its default.
        split: the split of the data set that becomes train, validation and test here.
        revision: a commit, branch or tag; null takes the newest.
        sample, holdout, seed, max_prompt_tokens, max_response_tokens: see :class:`JsonLines`.
    """

    def __init__(
        self,
        *,
        name: str,
        config: str | None = None,
        split: str = "train",
        revision: str | None = None,
        sample: Natural = 0,
        holdout: Fraction = 0.1,
        seed: Natural = 0,
        max_prompt_tokens: Count,
        max_response_tokens: Count,
    ) -> None:
        super().__init__(f"data.name={name}", sample, holdout, seed, max_prompt_tokens, max_response_tokens)
        self.name, self.config, self.split, self.revision = name, config, split, revision
        self.folder = Path(name).absolute() if os.path.isdir(name) else None

    def _contents(self) -> Mapping[str, Any]:
        part = {"config": self.config, "split": self.split}
        if self.folder is not None:
            return {"content": content_hash(self.folder), **part}
        return {"name": self.name, "revision": self._commit or "unpinned", **part}

    @cached_property
    def _commit(self) -> str | None:
        """The commit that is read; offline the revision as given, or None for whatever the cache has."""
        from huggingface_hub import HfApi

        try:
            return HfApi().dataset_info(self.name, revision=self.revision, timeout=10).sha
        except Exception:  # whatever is wrong here is wrong again when the rows are loaded, and reported there
            return self.revision

    def _prompts(self) -> list[Prompt]:
        rows = self._load()
        if "id" not in rows.column_names and "prompt_id" in rows.column_names:
            rows = rows.rename_column("prompt_id", "id")
        rows = rows.select_columns([field for field in FIELDS if field in rows.column_names] or rows.column_names)
        drawn = self._draw(len(rows))
        labels = (f"{self.name}[{self.split}] row {i}" for i in drawn)
        return _checked(zip(labels, rows.select(drawn), strict=True))

    def _load(self) -> Any:
        from datasets import load_dataset

        where, revision = (str(self.folder), None) if self.folder is not None else (self.name, self._commit)
        try:
            rows = load_dataset(where, self.config, split=self.split, revision=revision)
        except Exception as error:
            raise DataError(self._explain(error)) from error
        # Without the hub the library takes whatever commit its cache has, also where another one was asked for.
        cached = {Path(file["filename"]).parent.name for file in rows.cache_files}
        for commit in cached - {revision}:
            if revision is not None and len(commit) == 40:
                raise DataError(
                    f"data.revision={revision}: cannot be loaded from the hub, and the cache has another commit of "
                    f"{self.name}; connect, or give data.revision={commit}"
                )
        return rows

    def _explain(self, error: Exception) -> str:
        """What to change; where a split or config is unknown, the library's own text lists those there are."""
        text = f"({type(error).__name__}: {error})"
        marks = {
            f"data.config={self.config}": ("BuilderConfig", "Config name is missing"),
            f"data.split={self.split}": ("Unknown split", "Split name", "Unrecognized instruction"),
        }
        for setting, phrases in marks.items():
            if any(phrase in text for phrase in phrases):
                return f"{setting}: cannot be read from {self.name} {text}"
        if self.folder is not None:
            return f"{self.setting}: this folder cannot be read {text}"
        return (
            f"{self.setting}: cannot be loaded from the hub {text}; without the hub, give a local folder in its layout "
            "(data.name=…), a file (data=jsonl data.path=…), or a cache that has it (HF_HOME)"
        )


def _checked(rows: Iterable[tuple[str, Any]]) -> list[Prompt]:
    """Prompts from raw rows, each with where it stands, such as ``some.jsonl:3``; no id occurs twice."""
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    for where, raw in rows:
        prompt = _prompt(where, raw)
        if prompt.id in seen:
            if raw.get("id") is None:
                problem = (
                    f"identical to {seen[prompt.id]} in prompt and response, and without an id; remove one of them"
                )
            else:
                problem = f"id {prompt.id!r} is that of {seen[prompt.id]} already; expected another"
            raise DataError(f"{where}: {problem}")
        seen[prompt.id] = where
        prompts.append(prompt)
    return prompts


def _prompt(where: str, raw: Any) -> Prompt:
    """One raw row as a prompt."""
    if not isinstance(raw, Mapping):
        raise DataError(f"{where}: {reprlib.repr(raw)} is not an object; {FORMS}")
    row = {field: raw[field] for field in FIELDS if raw.get(field) is not None}
    if "messages" in row:
        *messages, last = _turns(where, row["messages"])
        human = last["content"]
    else:
        for field in ("prompt", "response"):
            if field not in row:
                raise DataError(f"{where}: no {field}; {FORMS} (the row has {', '.join(map(str, raw)) or 'nothing'})")
        messages = [{"role": "user", "content": _text(where, "prompt", row["prompt"])}]
        human = _text(where, "response", row["response"])
    name = row.get("id")
    if name is None:
        said = json.dumps([*([turn["role"], turn["content"]] for turn in messages), human])
        name = hashlib.sha256(said.encode()).hexdigest()[:16]
    elif isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    return Prompt(
        id=_text(where, "id", name),
        messages=messages,
        human=human,
        family=_text(where, "family", row.get("family", ""), empty=True),
        answer=_text(where, "answer", row["answer"]) if "answer" in row else None,
    )


def _turns(where: str, messages: Any) -> list[Message]:
    """The system turns at the beginning, the user turn after them and the assistant's answer to that."""
    if not isinstance(messages, list):
        raise DataError(
            f"{where}: messages is {reprlib.repr(messages)}; expected a list of turns with role and content"
        )
    turns: list[Message] = []
    wanted: tuple[str, ...] = ("system", "user")
    for i, turn in enumerate(messages):
        if not isinstance(turn, Mapping):
            raise DataError(f"{where}: messages[{i}] is {reprlib.repr(turn)}; expected a turn with role and content")
        role = turn.get("role")
        if role not in wanted:
            raise DataError(f"{where}: messages[{i}].role is {role!r}; expected {' or '.join(wanted)}")
        turns.append({"role": role, "content": _text(where, f"messages[{i}].content", turn.get("content"))})
        if role == "assistant":
            return turns
        if role == "user":
            wanted = ("assistant",)
    raise DataError(f"{where}: messages has no user turn followed by an assistant turn")


def _text(where: str, field: str, value: Any, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {field} is {reprlib.repr(value)}; expected text")
    if not empty and not value.strip():
        raise DataError(f"{where}: {field} is empty; expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character: "\ud83d"
        raise DataError(f"{where}: {field} is not valid Unicode ({error.reason}); expected text") from error
    return value


def _conversation(prompt: Prompt) -> tuple[str, ...]:
    return tuple(text for turn in prompt.messages for text in (turn["role"], turn["content"]))


def _fraction(name: str) -> float:
    """A fixed place in [0, 1) for every id."""
    return (int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 11) / 2**53
