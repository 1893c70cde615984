"""Rows are read from Parquet as they were written, for every type and every kind of missing value."""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dnpo.records import HUMAN, Pair, Prompt, ReferenceLogps, Response, Verdict, mean_over_steps, policy_source
from dnpo.running import execute
from dnpo.tables import read, read_all, schema, write

# Texts of people and models: other scripts, markup, control characters, special tokens, quotes, empty texts.
TEXTS = (
    "",
    "Ünïcödé – 日本語 🦉 ≥ y′",
    "<|assistant|> </s> <b>bold</b> & [INST] {{ messages }} {}",
    'line one\nline "two"\r\n\ttab\\n \u0000 end \u2028',
    "e\u0301 is not é",
)

PROMPTS = [
    Prompt("a", [{"role": "user", "content": "What is 1 plus 1?"}], "It is 2."),
    Prompt("b", [], "", family="arithmetic", answer="2", needs=["1", "plus"], token_ids=[1, 2, 2**40]),
    *[
        Prompt(
            f"t{i}",
            [{"role": "system", "content": t}, {"role": "user", "content": t}, {"role": "assistant", "content": t}],
            human=t,
            family=t,
            answer=t,
            needs=[t, t],
        )
        for i, t in enumerate(TEXTS)
    ],
]
RESPONSES = [
    Response("a", HUMAN, "It is 2.", [5, 6, 2], 3, "eos"),
    Response("a", policy_source(0), "", [], 0, "length", logprob=0.0),
    Response("a", policy_source(12), "It is", [5, 6], 2, "length", logprob=-1e-300),
    *[Response("a", HUMAN, t, [1], 1, "eos", -12.345678901234567) for t in TEXTS],
]
VERDICTS = [
    Verdict("a", HUMAN, None),
    Verdict("a", "policy@0", None, "no number in the answer"),
    Verdict("b", "policy@0", 0.0),
    Verdict("b", HUMAN, 100.0, "ok"),
    Verdict("b", HUMAN, 200 / 3),
    *[Verdict("c", HUMAN, None, t) for t in TEXTS],
]
PAIRS = [
    Pair("a", [], [], "", "", [], [], HUMAN, "policy@0", None, None, False),
    Pair("b", [{"role": "user", "content": "x"}], [1], "c", "r", [2], [3, 4], "policy@1", HUMAN, 75.0, 15.0, True),
    *[
        Pair("t", [{"role": "user", "content": t}], [1], t, t[::-1], [2], [3], HUMAN, "policy@0", None, 0.0, False)
        for t in TEXTS
    ],
]
REFERENCE = [
    ReferenceLogps(0, -1.5, -2.25),
    ReferenceLogps(7, 0.0, -1234.5678901234567),
    ReferenceLogps(2**40, -1e-300, -1e300),
]
KINDS = [(Prompt, PROMPTS), (Response, RESPONSES), (Verdict, VERDICTS), (Pair, PAIRS), (ReferenceLogps, REFERENCE)]


@pytest.mark.parametrize(("kind", "rows"), KINDS, ids=lambda value: getattr(value, "__name__", ""))
def test_round_trip(tmp_path: Path, kind: type[Any], rows: list[Any]) -> None:
    """Rows are equal after a round trip, of the same types, one by one and together: no type is guessed from values."""
    write(tmp_path / "all.parquet", rows, kind)
    back = read(tmp_path / "all.parquet", kind)
    assert back == rows
    for was, now in zip(rows, back, strict=True):
        for f in dataclasses.fields(kind):
            assert type(getattr(now, f.name)) is type(getattr(was, f.name)), f.name
    for row in rows:
        write(tmp_path / "one.parquet", [row], kind)
        assert read(tmp_path / "one.parquet", kind) == [row]


@pytest.mark.parametrize(("kind", "rows"), KINDS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_file_without_rows_keeps_the_schema(tmp_path: Path, kind: type[Any], rows: list[Any]) -> None:
    """A file without rows has every column with its type, so that files with and without rows can be read together."""
    write(tmp_path / "none.parquet", [], kind)
    write(tmp_path / "some.parquet", rows, kind)
    assert read(tmp_path / "none.parquet", kind) == []
    none, some = (pq.read_schema(tmp_path / f"{name}.parquet") for name in ("none", "some"))
    assert none.equals(some)
    assert none.names == [f.name for f in dataclasses.fields(kind)]
    assert not any(pa.types.is_null(column.type) for column in none)


def test_pairs_of_earlier_versions_are_read_and_shown(tmp_path: Path) -> None:
    """They lack later columns."""
    (pairs,) = (rows for kind, rows in KINDS if kind is Pair)
    write(tmp_path / "pairs.parquet", pairs, Pair)
    later = ["step", "draws"]
    pq.write_table(pq.read_table(tmp_path / "pairs.parquet").drop_columns(later), tmp_path / "earlier.parquet")
    earlier = [dataclasses.replace(pair, step=0, draws=0) for pair in pairs]
    assert read(tmp_path / "earlier.parquet", Pair) == earlier
    shown = execute._some_pairs(tmp_path / "earlier.parquet")
    assert {row["id"] for row in shown} <= {pair.id for pair in pairs}
    assert shown
    assert not any(name in row for row in shown for name in [*later, "chosen_ids"])


def test_schema_types() -> None:
    """Columns that may be empty in a whole file still have the type of the annotation."""
    assert schema(Prompt).field("needs").type == pa.list_(pa.string())
    assert schema(Prompt).field("token_ids").type == pa.list_(pa.int64())
    assert schema(Prompt).field("answer").type == pa.string()
    assert schema(Response).field("finish").type == pa.string()
    assert schema(Response).field("logprob").type == pa.float64()
    assert schema(Verdict).field("score").type == pa.float64()
    assert schema(Pair).field("flipped").type == pa.bool_()
    assert [str(field.type) for field in schema(ReferenceLogps)] == ["int64", "double", "double"]
    messages = schema(Pair).field("messages").type.value_type
    assert [(f.name, f.type) for f in messages] == [("role", pa.string()), ("content", pa.string())]


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        ([Verdict("a", HUMAN, "ninety")], Verdict),  # type: ignore[arg-type]
        ([Verdict("a", HUMAN, 1.0, "half a pair \ud83d")], Verdict),
        ([Response("a", HUMAN, "x", ["1"], 1, "eos")], Response),  # type: ignore[list-item]
    ],
    ids=["word for number", "lone surrogate", "word in list"],
)
def test_bad_rows_leave_the_old_file_and_no_other(tmp_path: Path, bad: list[Any], kind: type[Any]) -> None:
    """A file of rows is complete or missing, since a continued stage uses every file it finds."""
    good: list[Any] = VERDICTS if kind is Verdict else RESPONSES
    path = tmp_path / "rows.parquet"
    with pytest.raises((pa.ArrowException, ValueError, TypeError)):
        write(path, [*good, *bad], kind)
    assert list(tmp_path.iterdir()) == []
    write(path, good, kind)
    with pytest.raises((pa.ArrowException, ValueError, TypeError)):
        write(path, [*good, *bad], kind)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.parquet"]
    assert read(path, kind) == good


def test_a_write_that_is_killed_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An incomplete file never has its final name."""
    path = tmp_path / "rows.parquet"
    write(path, VERDICTS, Verdict)

    def stop_halfway(self: pq.ParquetWriter, table: pa.Table) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pq.ParquetWriter, "write_table", stop_halfway)
    with pytest.raises(KeyboardInterrupt):
        write(path, VERDICTS[:1], Verdict)
    assert read(path, Verdict) == VERDICTS


def test_write_replaces(tmp_path: Path) -> None:
    """Writing again leaves the new rows and nothing else."""
    path = tmp_path / "rows.parquet"
    write(path, VERDICTS, Verdict)
    write(path, VERDICTS[:1], Verdict)
    assert read(path, Verdict) == VERDICTS[:1]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.parquet"]


def test_read_all_keeps_the_order_given(tmp_path: Path) -> None:
    """Shards are read in the caller's order, not in the disk's; some have no rows or no scores."""
    parts = {"b": VERDICTS[:2], "none": [], "a": VERDICTS[2:]}
    for name, rows in parts.items():
        write(tmp_path / f"{name}.parquet", rows, Verdict)
    assert read_all([tmp_path / f"{name}.parquet" for name in parts], Verdict) == VERDICTS


def test_means_over_steps_weight_by_rows() -> None:
    """Rows have equal weights in steps of every size; steps without the metric are ignored."""
    steps = [{"a": 1.0, "rows": 3.0}, {"a": 5.0, "b": 2.0, "rows": 1.0}, {"rows": 9.0}]
    assert mean_over_steps(steps, "a") == 2.0
    assert mean_over_steps(steps, "b") == 2.0
    assert mean_over_steps([{"a": 1.0}, {"a": 2.0}], "a") == 1.5, "steps of an earlier version do not say their rows"


def test_folder_names_add_no_columns(tmp_path: Path) -> None:
    """A folder named ``alpha=1``, as sweeps make, is not taken for a partition of a data set."""
    folder = tmp_path / "id=7" / "alpha=1"
    folder.mkdir(parents=True)
    write(folder / "rows.parquet", VERDICTS, Verdict)
    assert read(folder / "rows.parquet", Verdict) == VERDICTS


def test_rows_cannot_be_changed() -> None:
    """Rows are shared between stages and cached; nobody may write into one."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        VERDICTS[0].score = 1.0  # type: ignore[misc]


def test_shown_pairs_are_the_first_flipped_ones_and_the_first_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of them are flipped if there are enough; searched in batches."""
    monkeypatch.setattr(execute, "GROUP", 7)
    monkeypatch.setattr(execute, "SHOWN_PAIRS", 10)
    pairs = [dataclasses.replace(PAIRS[0], id=f"p{i}", flipped=i % 4 == 3) for i in range(60)]
    write(tmp_path / "pairs.parquet", pairs, Pair)
    shown = [row["id"] for row in execute._some_pairs(tmp_path / "pairs.parquet")]
    assert shown == ["p3", "p7", "p11", "p15", "p19", "p0", "p1", "p2", "p4", "p5"]
    write(tmp_path / "pairs.parquet", pairs[:9], Pair)
    shown = [row["id"] for row in execute._some_pairs(tmp_path / "pairs.parquet")]
    assert shown == ["p3", "p7", "p0", "p1", "p2", "p4", "p5", "p6", "p8"]
