"""The data sets that a run reads, as a tracking store records them: identified by digest, never by path."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dnpo.records import Pair
from dnpo.stages.files import count_labels
from dnpo.stages.plan import Iteration
from dnpo.store import Stage, Store, manifest
from dnpo.tracking.paths import change_paths, last_part

TRAINING, EVALUATION, UNUSED = "training", "evaluation", "not used"
COLUMNS = ("id", "messages", "human", "answer", "needs")  # of a prompt, without its token ids
RESPONSES = ("-human", "-given")  # ends of the names of files with responses to prompts


@dataclass(frozen=True)
class Dataset:
    """Rows that a run reads.

    Attributes:
        digest: hash of the rows, at most 36 characters.
        context: what they are used for: ``training``, ``evaluation``, or ``not used``.
        kind: type of ``source``: ``hugging_face``, ``local`` or ``code``.
        source: where they came from, as plain values.
        facts: counts about the rows, such as how many were dropped.
    """

    name: str
    digest: str
    context: str
    kind: str
    source: Mapping[str, Any]
    rows: int
    columns: Sequence[str]
    facts: Mapping[str, Any] = field(default_factory=dict)


def list_datasets(iteration: Iteration, store: Store, settings: Mapping[str, Any]) -> list[Dataset]:
    """List the data sets that no earlier iteration reads: all prompt splits before iteration 0, then the pairs.

    Args:
        settings: nested settings of the run.
    """
    if iteration.pairs is not None:
        return [_pairs(iteration.k, iteration.pairs, store)]
    return [] if iteration.k >= 0 else _splits(iteration, store.folder(iteration.prompts), settings)


def _splits(iteration: Iteration, prompts: Path, settings: Mapping[str, Any]) -> list[Dataset]:
    """Describe each split of the encoded prompts."""
    import pyarrow.parquet as pq

    facts = manifest(prompts)["facts"]
    kind, source = _source(settings["data"], iteration.prompts.settings["data"])
    datasets = []
    for path in sorted(prompts.glob("*.parquet")):
        if path.stem.endswith(RESPONSES):
            continue
        columns = [*COLUMNS, *(["rejected"] if path.with_stem(f"{path.stem}-given").is_file() else [])]
        table = pq.read_table(path, columns=columns)
        held_out = path.stem in ("validation", "test")
        used = EVALUATION if path.stem == settings["eval"]["split"] else UNUSED
        datasets.append(
            Dataset(
                name=path.stem,
                digest=_digest(table.to_pylist()),
                context=used if held_out else TRAINING,
                kind=kind,
                source=source,
                rows=table.num_rows,
                columns=columns,
                facts=facts.get(path.stem, {}),
            )
        )
    return datasets


def _pairs(k: int, stage: Stage, store: Store) -> Dataset:
    """Describe the pairs that iteration ``k`` trains on."""
    facts = count_labels(store.folder(stage))
    columns = [each.name for each in fields(Pair)]
    where = {"uri": f"{stage.name}/{stage.key}"}
    count = facts["trained"] if "trained" in facts else facts["pairs"]  # with a curriculum; otherwise all pairs
    return Dataset(f"pairs-{k}", stage.key, TRAINING, "local", where, count, columns, facts)


def _source(data: Mapping[str, Any], identity: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return where the rows come from: a data set on the hub, files, or the code that makes them."""
    if data.get("name") is not None:
        return "hugging_face", {"path": data["name"], "revision": identity.get("revision")}
    if data.get("path") is not None:
        return "local", {"uri": change_paths(str(data["path"]), last_part)}
    return "code", {"tags": {"mlflow.source.name": data["_target_"]}}


def _digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the first 16 hexadecimal digits of the rows' SHA-256."""
    whole = hashlib.sha256()
    for row in rows:
        whole.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return whole.hexdigest()[:16]
