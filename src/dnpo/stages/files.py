"""Read and write files that several stages use, and make rows shard by shard.

Only one shard is in memory at a time, and a killed run loses at most one.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from dnpo import disk, ranks
from dnpo.data.prompts import All
from dnpo.evaluate import Held
from dnpo.policy.base import describe_saved
from dnpo.records import Pair, Prompt, Response, mean_over_steps
from dnpo.stages.plan import Plan
from dnpo.store import Report, manifest, write_json
from dnpo.tables import Made, Rows, Writer, column, in_parts, read, take, write

if TYPE_CHECKING:
    from dnpo.policy.model import Policy

SIZE = 4096  # prompts in a shard
# Fields of a pair that training reads; an objective that reads more has to add them.
TRAINED_ON = ("id", "prompt_ids", "chosen_ids", "rejected_ids", "strength", "weight", "shift")

Part = TypeVar("Part")
Facts = dict[str, Any]
Shard = tuple[Mapping[str, Sequence[Any]], Facts]  # rows by file, and facts


def read_split(folder: Path, split: str) -> Held:
    """Read the prompts of a split and the human responses to them."""
    return Held(read(folder / f"{split}.parquet", Prompt), read(folder / f"{split}-human.parquet", Response))


def open_split(folder: Path, split: str) -> Held:
    """The rows of :func:`read_split`, read only when they are used: there may be many training prompts."""
    prompts, human = folder / f"{split}.parquet", folder / f"{split}-human.parquet"
    return Held(Rows.open([prompts], Prompt), Rows.open([human], Response))


def open_given(folder: Path, split: str) -> Rows[Response]:
    """The rejected responses of pairs in the data, in a split; none if the data have no pairs."""
    path = folder / f"{split}-given.parquet"
    return Rows.open([path] if path.is_file() else [], Response)


def open_train(plan: Plan, folder: Path) -> Held:
    """The training prompts that an iteration uses, and the human responses to them."""
    train = open_split(folder, "train")
    if isinstance(plan.prompts, All):
        return train
    used = set(column(plan.prompts(train.prompts, plan.k), "id"))
    numbers = [i for i, id in enumerate(column(train.prompts, "id")) if id in used]
    return Held(take(train.prompts, numbers), take(train.human, numbers))


def open_candidates(plan: Plan, inputs: Mapping[str, Path]) -> Sequence[Response]:
    """An iteration's responses, in the order of its prompts: generated ones, or the rejected ones of the data."""
    if "responses" in inputs:
        return Rows.open(sorted(inputs["responses"].glob("shard-*.parquet")), Response)
    used = set(column(open_train(plan, inputs["prompts"]).prompts, "id"))
    given = open_given(inputs["prompts"], "train")
    return given.take([i for i, id in enumerate(given.column("id")) if id in used])


def load_pairs(folder: Path) -> Sequence[Pair]:
    """The pairs of a stage, in memory. If there are many, texts are left out, which training does not read."""
    pairs = Rows.open([folder / "pairs.parquet"], Pair)
    return list(pairs) if len(pairs) <= SIZE else pairs.load(TRAINED_ON)


def load_sequences(folder: Path, split: str) -> Sequence[tuple[str, list[int], list[int]]]:
    """The ids of a split's prompts, with the token ids of prompts and human responses."""
    prompts, human = open_split(folder, split)
    if len(prompts) > SIZE and isinstance(prompts, Rows) and isinstance(human, Rows):
        prompts, human = prompts.load(["id", "token_ids"]), human.load(["token_ids"])

        def make(number: int) -> tuple[str, list[int], list[int]]:
            prompt = prompts[number]
            return prompt.id, prompt.token_ids, human[number].token_ids

        return Made(len(prompts), make)
    return [(prompt.id, prompt.token_ids, response.token_ids) for prompt, response in zip(prompts, human, strict=True)]


def write_preferences(path: Path, pairs: Iterable[Pair]) -> None:
    """Write pairs as JSON lines in TRL's conversational preference format, which TRL's and other trainers read.

    Each line has ``prompt``, ``chosen`` and ``rejected`` as lists of messages, and the id, sources, samples, scores,
    strength and weight of the pair. The file is complete or does not exist.
    """
    rows = (
        {
            "id": pair.id,
            "prompt": pair.messages,
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
            "chosen_source": pair.chosen_source,
            "rejected_source": pair.rejected_source,
            "chosen_score": pair.chosen_score,
            "rejected_score": pair.rejected_score,
            "chosen_sample": pair.chosen_sample,
            "rejected_sample": pair.rejected_sample,
            "iteration": pair.iteration,
            "strength": pair.strength,
            "weight": pair.weight,
            "shift": pair.shift,
        }
        for pair in pairs
    )
    aside = disk.name_aside(path)
    try:
        with aside.open("w", encoding="ascii") as stream:
            stream.writelines(f"{json.dumps(row, allow_nan=False)}\n" for row in rows)
        disk.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def count_labels(folder: Path) -> dict[str, Any]:
    """The counts of labelling, from the stage that labelled: a separate one, or a training that also labels."""
    facts = manifest(folder)["facts"]
    counts: dict[str, Any] = facts.get("labels", facts)
    return counts


def write_trained(
    policy: "Policy", history: list[dict[str, float]], folder: Path, earlier: Path | None
) -> dict[str, Any]:
    """Write a trained policy and its step metrics; if training made no step, write the policy that it began with.

    If several processes have trained it, one of them writes it, and the facts of the others are empty. The checkpoint
    is removed last, so a stage that is killed while it writes continues from the checkpoint.
    """
    from dnpo.optimise.training import discard_checkpoint

    if history:
        policy.save(folder / "policy", earlier)
    if not ranks.leads():
        return {}
    if not history and earlier is not None:
        shutil.copytree(earlier, folder / "policy", dirs_exist_ok=True)
    elif not history:
        (folder / "policy").mkdir(exist_ok=True)  # empty: the base model itself
    write_json(folder / "steps.json", history)
    discard_checkpoint(folder)
    facts = {"policy_steps": len(history), "policy": describe_saved(folder / "policy")}
    tenth = history[-max(len(history) // 10, 1) :]
    first = history[: max(len(history) // 10, 1)]
    means = {f"{name} (last tenth)": mean_over_steps(tenth, name) for name in history[-1]} if history else {}
    starts = {f"{name} (first tenth)": mean_over_steps(first, name) for name in history[0]} if history else {}
    return {**facts, **starts, **means}


# --- shards


class Shards:
    """The shards of a file, or of several files of the same rows. When all are made, each file's shards are joined.

    Until then they are in ``shards/NAME``. A shard has a file with its facts, which is written last. A hidden file
    shows that all shards are made; the store removes it when it closes the folder.

    Args:
        folder: the stage's folder.
        name: the name of the shards, unique in the folder.
        kinds: the types of rows, by the names of the files.
    """

    def __init__(self, folder: Path, name: str, kinds: Mapping[str, type]) -> None:
        self.folder, self.kinds = folder, kinds
        self._shards, self._all = folder / "shards" / name, folder / f".{name}.json"

    @property
    def done(self) -> int:
        """The number of shards that an earlier run made."""
        return len(self._read_all() if self._all.is_file() else list(self._shards.glob("*.json")))

    def make(self, parts: Iterable[Part], work: Callable[[Part], Shard]) -> list[Facts]:
        """Make the missing shards, join all, and return the facts of each.

        Args:
            parts: the input of each shard; read only if a shard is missing.
            work: returns the rows of a shard by file, and its facts, which must be plain values.
        """
        if not self._all.is_file():
            self._shards.mkdir(parents=True, exist_ok=True)
            found = [self._make(number, part, work) for number, part in enumerate(parts)]
            for name, kind in self.kinds.items():
                self._join(self.folder / f"{name}.parquet", kind, len(found))
            write_json(self._all, found)
        shutil.rmtree(self._shards, ignore_errors=True)
        if self._shards.parent.is_dir() and not any(self._shards.parent.iterdir()):
            self._shards.parent.rmdir()
        return self._read_all()

    def discard(self) -> None:
        """Remove the joined files, so that all shards are made again."""
        self._all.unlink()
        for name in self.kinds:
            (self.folder / f"{name}.parquet").unlink()

    def _make(self, number: int, part: Part, work: Callable[[Part], Shard]) -> Facts:
        path = self._shards / f"{number:05d}.json"
        if not path.is_file():
            rows, facts = work(part)
            for name, kind in self.kinds.items():
                write(self._shards / f"{number:05d}-{name}.parquet", rows[name], kind)
            write_json(path, facts)
        found: Facts = json.loads(path.read_text())
        return found

    def _join(self, path: Path, kind: type, count: int) -> None:
        writer: Writer[Any]
        with Writer(path, kind) as writer:
            for number in range(count):
                writer.copy(self._shards / f"{number:05d}-{path.name}")

    def _read_all(self) -> list[Facts]:
        found: list[Facts] = json.loads(self._all.read_text())
        return found


class Candidates(NamedTuple):
    """The prompts of a shard, with the rows of other sequences that belong to them.

    Attributes:
        held: the prompts, with the human responses.
        others: for each further sequence, its rows with the ids of these prompts.
    """

    held: Held
    others: list[list[Any]]

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The prompts."""
        return self.held.prompts

    @property
    def human(self) -> Sequence[Response]:
        """The human responses."""
        return self.held.human


def divide(train: Held, size: int, *others: Iterable[Any]) -> Iterator[Candidates]:
    """Cut prompts into shards, each with the human responses and with the rows of other sequences.

    Args:
        size: prompts in a shard.
        others: rows with the ids of prompts, in the order of the prompts.

    Raises:
        ValueError: rows of another sequence are in another order, or have no prompt.
    """
    rest = [_Following(rows) for rows in others]
    for prompts, human in zip(in_parts(train.prompts, size), in_parts(train.human, size), strict=True):
        ids = {prompt.id for prompt in prompts}
        yield Candidates(Held(prompts, human), [following.up_to(ids) for following in rest])
    for following in rest:
        if following.next is not None:
            raise ValueError(f"{following.next.id}: its row does not follow the order of the prompts")


class _Following:
    """Rows in the order of prompts, returned shard by shard."""

    def __init__(self, rows: Iterable[Any]) -> None:
        self._rows = iter(rows)
        self.next = next(self._rows, None)

    def up_to(self, ids: set[str]) -> list[Any]:
        """The next rows, up to the first whose id is not among these."""
        found = []
        while self.next is not None and self.next.id in ids:
            found.append(self.next)
            self.next = next(self._rows, None)
        return found


class Portion:
    """Reports the progress of a shard as part of the stage's progress.

    Args:
        report: receives the stage's progress.
        rows: the number of rows in the shard, in the stage's unit.
    """

    def __init__(self, report: Report, rows: int) -> None:
        self.report, self.rows = report, rows
        self._total = self._done = self._told = 0

    def begin(self, total: int, unit: str, done: int = 0) -> None:
        """Take the shard's total."""
        self._total = total
        self.advance(done)

    def advance(self, amount: int = 1) -> None:
        """Pass on a share of the rows."""
        self._done += amount
        told = self.rows * self._done // max(self._total, 1)
        self.report.advance(told - self._told)
        self._told = told

    def note(self, text: str) -> None:
        """Pass it on."""
        self.report.note(text)

    def status(self, text: str) -> None:
        """Pass it on."""
        self.report.status(text)

    def steps(self, rows: list[dict[str, float]]) -> None:
        """Pass them on."""
        self.report.steps(rows)


def split_by_source(rows: Rows[Any], source: str) -> tuple[Rows[Any], Rows[Any]]:
    """The rows of one source, and all other rows."""
    sources = column(rows, "source")
    own = [i for i, each in enumerate(sources) if each == source]
    return rows.take(own), rows.take([i for i, each in enumerate(sources) if each != source])
