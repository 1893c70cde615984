"""The rows that flow through a run, and their Parquet files.

``Prompt`` → ``Response`` → ``Verdict`` → ``Pair``. A row is a frozen dataclass of plain values; a file of rows is one
Parquet table whose schema follows from the dataclass, so that empty lists and missing scores keep their type.
"""

import dataclasses
import json
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dnpo import disk
from dnpo.errors import StoreError

if TYPE_CHECKING:
    import pyarrow as pa
    from _typeshed import DataclassInstance

Message = dict[str, str]
Finish = Literal["eos", "length"]
GROUP = 4096  # rows in a row group of a file, which is read at once
HUMAN = "human"
GIVEN = "given"


def policy_source(iteration: int) -> str:
    """The source of responses that the policy of this iteration generated."""
    return f"policy@{iteration}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation up to its next response, with the response that a human gave.

    Attributes:
        id: unique within its data.
        messages: ``role``/``content`` turns up to the response, without it.
        human: the text of the human response.
        family: task family of verifiable data, "" otherwise.
        answer: the verifiable answer, if there is one.
        needs: words that a complete response has to mention (verifiable data).
        token_ids: the rendered prompt, beginning-of-sequence included; empty until a tokenizer has seen it.
        rejected: the rejected text, if the data have a pair; ``human`` is then the chosen one.
        human_score: the data's rating of the human response.
        rejected_score: the data's rating of the rejected response.
    """

    id: str
    messages: list[Message]
    human: str
    family: str = ""
    answer: str | None = None
    needs: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    rejected: str | None = None
    human_score: float | None = None
    rejected_score: float | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """One response to the prompt of the same id.

    Attributes:
        source: ``human``, ``given`` for the rejected response of a pair in the data, or ``policy@k``.
        token_ids: completion tokens; the last is end-of-sequence if ``finish`` is ``eos``, or if one was appended to a
            response that was cut (``rollout.append_eos``).
        tokens: number of completion tokens.
        finish: ``eos``, or ``length`` for one cut at the limit.
        logprob: log-probability of the completion under the policy that generated it, in nats; None for human ones.
        sample: its number among the responses of this source to the prompt, from 0.
    """

    id: str
    source: str
    text: str
    token_ids: list[int]
    tokens: int
    finish: Finish
    logprob: float | None = None
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's verdict on one response: a score, mostly 0-100, or None with the reason why there is none.

    Attributes:
        sample: number of the response among its source's responses to the prompt.
        disagreement: in points: between the two orders of a comparison, or between the members of an ensemble (their
            standard deviation); None if there is nothing to compare.
    """

    id: str
    source: str
    score: float | None
    reason: str = ""
    disagreement: float | None = None
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Pair:
    """A chosen and a rejected response to one prompt, with the source, sample and score of each side.

    Pairs are unique by id, iteration, step, and both samples.

    Attributes:
        rejected: "" with no ``rejected_ids`` if a labeller chooses responses without rejecting any.
        flipped: whether a generated response was chosen over the human one.
        iteration: the iteration that labelled it.
        strength: p(y⁺ ≻ y⁻), how sure the label is; 1 for hard labels.
        weight: its weight in the loss of a step.
        shift: how far σ(margin) is lowered in the loss, for robust training.
        step: the policy step that followed when it was made, if that was during training (``rollout=live``).
        draws: how many policy steps trained on it, with ``rollout=live``.
    """

    id: str
    messages: list[Message]
    prompt_ids: list[int]
    chosen: str
    rejected: str
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_source: str
    rejected_source: str
    chosen_score: float | None
    rejected_score: float | None
    flipped: bool
    chosen_sample: int = 0
    rejected_sample: int = 0
    iteration: int = 0
    strength: float = 1.0
    weight: float = 1.0
    shift: float = 0.0
    step: int = 0
    draws: int = 0


@dataclass(frozen=True, slots=True)
class Rollout:
    """A response that was made and judged while a policy was trained; fields as in :class:`Response`.

    Attributes:
        rollout: the number of the rollout that it belongs to.
        step: the policy step that followed when that rollout was made.
        prompt_ids: the rendered prompt.
        score: the judge's; None without a judge, or if it gave none.
        reason: why there is no score.
        disagreement: as in :class:`Verdict`.
    """

    id: str
    source: str
    text: str
    prompt_ids: list[int]
    token_ids: list[int]
    tokens: int
    finish: Finish
    logprob: float | None
    sample: int
    score: float | None
    reason: str
    rollout: int
    step: int
    disagreement: float | None = None


@dataclass(frozen=True, slots=True)
class ReferenceLogps:
    """log p_r(y⁺|x) and log p_r(y⁻|x) of a pair, in nats.

    Attributes:
        pair: its number among the pairs of the iteration.
    """

    pair: int
    chosen: float
    rejected: float


@dataclass(frozen=True, slots=True)
class Item:
    """The result of one held-out response, for comparisons that are paired over prompts.

    Attributes:
        id: of the prompt.
        kind: ``human``, ``greedy``, or ``sample``, of which there are several.
        sample: its number among the samples, 0 otherwise.
        score: None if the judge gave none.
        second: the second judge's score; None if there is none.
        right: whether it gives the prompt's answer; None if prompts have none.
        logprob: in nats, under the policy that generated it; None for human ones.
    """

    id: str
    family: str
    kind: Literal["human", "greedy", "sample"]
    sample: int
    score: float | None
    second: float | None
    right: bool | None
    tokens: int
    logprob: float | None


Row = TypeVar("Row", bound="DataclassInstance")


def write(path: Path, rows: Sequence[Row], kind: type[Row]) -> None:
    """Write rows to a Parquet file, which is complete or does not exist."""
    import pyarrow.parquet as pq

    aside = disk.name_aside(path)
    try:
        with pq.ParquetWriter(aside, schema(kind), write_page_checksum=True) as file:
            for first in range(0, max(len(rows), 1), GROUP):
                file.write_table(to_table(rows[first : first + GROUP], kind))
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    disk.replace(aside, path)


def to_table(rows: Sequence[Row], kind: type[Row]) -> "pa.Table":
    """The Arrow table of rows."""
    import pyarrow as pa

    columns = {f.name: [getattr(row, f.name) for row in rows] for f in dataclasses.fields(kind)}
    return pa.table(columns, schema=schema(kind))


def read(path: Path, kind: type[Row]) -> list[Row]:
    """Read the rows that :func:`write` wrote.

    Raises:
        StoreError: the file is damaged.
    """
    import pyarrow.parquet as pq

    with undamaged(path):
        return [kind(**row) for row in pq.read_table(path, page_checksum_verification=True).to_pylist()]


@contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Turn Arrow's errors for a damaged file into an error that names the file.

    Raises:
        StoreError: the file is damaged.
    """
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, TypeError) as error:  # OSError: a checksum differs
        raise StoreError(f"{path}: is damaged ({error}); remove it, and the same command makes it again") from error


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


def read_all(paths: Iterable[Path], kind: type[Row]) -> list[Row]:
    """Read several files of rows, in the order given."""
    return [row for path in paths for row in read(path, kind)]


def mean_over_steps(steps: Sequence[Mapping[str, float]], name: str) -> float:
    """The mean of a metric over those training steps that have it, each weighted by its rows."""
    weights = [(step[name], step.get("rows", 1.0)) for step in steps if name in step]
    return sum(value * rows for value, rows in weights) / sum(rows for _, rows in weights)


def schema(kind: type) -> "pa.Schema":
    """The Arrow schema of a row type, from its annotations."""
    import pyarrow as pa

    return pa.schema([(name, _arrow(hint)) for name, hint in get_type_hints(kind).items()])


def _arrow(hint: Any) -> "pa.DataType":
    import pyarrow as pa

    if hint == Message:
        return pa.struct([("role", pa.string()), ("content", pa.string())])
    if get_origin(hint) is Literal:
        return pa.string()
    if get_origin(hint) is list:
        return pa.list_(_arrow(get_args(hint)[0]))
    if get_origin(hint) in (Union, types.UnionType):
        return _arrow(next(arg for arg in get_args(hint) if arg is not type(None)))
    return {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}[hint]
