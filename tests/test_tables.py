"""Rows that are read by row group equal the written rows, in any order and with any columns."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dnpo import tables
from dnpo.errors import StoreError
from dnpo.records import Pair, Prompt, Response, Verdict
from dnpo.tables import Collector, Rows, Writer, in_parts, read, write
from tests.test_records import PAIRS, PROMPTS, RESPONSES, VERDICTS

KINDS: list[tuple[type, list[Any]]] = [(Prompt, PROMPTS), (Response, RESPONSES), (Verdict, VERDICTS), (Pair, PAIRS)]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows in a row group."""
    monkeypatch.setattr(tables, "GROUP", 3)


def make(count: int) -> list[Response]:
    """Responses that all differ, some of them empty."""
    return [
        Response(f"r{i}", "human", "x" * i, list(range(i % 5)), i % 5, "eos", None if i % 3 else -0.5 * i)
        for i in range(count)
    ]


@pytest.mark.parametrize(("kind", "rows"), KINDS)
def test_rows_equal_those_of_read(tmp_path: Path, kind: type, rows: list[Any]) -> None:
    """Every type of value and every missing value, read as objects and by row group."""
    path = tmp_path / "rows.parquet"
    write(path, rows, kind)
    found = Rows.open([path], kind)
    assert pq.read_metadata(path).num_row_groups == -(-len(rows) // 3)
    assert list(found) == read(path, kind) == rows
    assert [found[i] for i in range(len(rows))] == rows
    again: Collector[Any] = Collector(kind)
    for row in rows:
        again.add(row)
    assert list(again.finish()) == rows


def test_any_selection_of_rows_equals_a_lists(tmp_path: Path) -> None:
    rows = make(31)
    paths = [tmp_path / f"{i}.parquet" for i in range(3)]
    for path, some in zip(paths, (rows[:10], rows[10:10], rows[10:]), strict=True):
        write(path, some, Response)
    draw = random.Random(0)
    plain = rows
    found = Rows.open(paths, Response)
    for _ in range(40):
        if draw.random() < 0.5:
            first, last = sorted((draw.randrange(-2, len(plain) + 2), draw.randrange(len(plain) + 2)))
            plain, found = plain[first:last], found[first:last]
        elif plain:
            numbers = [draw.randrange(len(plain)) for _ in range(draw.randrange(1, 40))]
            plain, found = [plain[i] for i in numbers], found.take(numbers)
        assert len(found) == len(plain)
        assert list(found) == plain
        assert found.column("text") == [row.text for row in plain]
        assert found.lengths("token_ids").tolist() == [len(row.token_ids) for row in plain]
        loaded = found.load(["id", "token_ids"])
        assert [(row.id, row.token_ids, row.text, row.sample) for row in loaded] == [
            (row.id, row.token_ids, "", 0) for row in plain
        ]
        whole = list(loaded)
        for i in range(-len(plain), len(plain)):
            assert found[i] == plain[i]
            assert loaded[i] == whole[i]
        if not plain:
            plain, found = rows, Rows.open(paths, Response)
    with pytest.raises(IndexError):
        found[len(plain)]


def test_only_requested_columns_are_read(tmp_path: Path) -> None:
    """The other fields get their defaults, or are empty, and no two rows share a list."""
    path = tmp_path / "rows.parquet"
    write(path, PAIRS, Pair)
    first, second, *_ = Rows.open([path], Pair, ["id", "chosen_ids"])
    assert first == Pair(PAIRS[0].id, [], [], "", "", PAIRS[0].chosen_ids, [], "", "", None, None, False)
    assert first.messages is not second.messages


def test_columns_of_later_versions_get_their_defaults(tmp_path: Path) -> None:
    path, earlier = tmp_path / "rows.parquet", tmp_path / "earlier.parquet"
    write(path, PAIRS, Pair)
    pq.write_table(pq.read_table(path).drop_columns(["strength", "weight", "draws"]), earlier)
    assert list(Rows.open([earlier], Pair)) == [replace(pair, strength=1.0, weight=1.0, draws=0) for pair in PAIRS]


def test_the_writer_and_write_make_the_same_file(tmp_path: Path) -> None:
    rows = make(20)
    whole, some, joined = (tmp_path / f"{name}.parquet" for name in ("whole", "some", "joined"))
    write(whole, rows, Response)
    with Writer(some, Response) as writer:
        for part in in_parts(rows, 7):
            writer.add(part)
    assert whole.read_bytes() == some.read_bytes()
    with Writer(joined, Response) as writer:
        writer.copy(whole)
        writer.add(rows[:2])
        writer.copy(some)
    assert read(joined, Response) == [*rows, *rows[:2], *rows]


def test_file_of_a_writer_that_fails_does_not_appear(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "rows.parquet", Response)
    with pytest.raises(KeyError), writer:
        writer.add([*make(9), {}["no such row"]])
    assert not list(tmp_path.iterdir())


def test_damaged_row_group_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write(path, make(9), Response)
    damaged = bytearray(path.read_bytes())
    damaged[60:64] = b"????"
    path.write_bytes(bytes(damaged))
    with pytest.raises(StoreError, match=r"rows\.parquet: is damaged"):
        list(Rows.open([path], Response))
    path.write_bytes(b"PAR1")
    with pytest.raises(StoreError, match=r"rows\.parquet: is damaged"):
        Rows.open([path], Response)
