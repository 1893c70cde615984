"""Stages in shards give the same rows as in one shard, and a killed stage loses at most one shard."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir

from dnpo import disk, dsl, tables
from dnpo.commands.train import build
from dnpo.judges import make_verdict
from dnpo.judges.longer import Longer
from dnpo.optimise import reference as references
from dnpo.policy import tokenizer
from dnpo.records import Verdict
from dnpo.settings import conf_folder
from dnpo.stages import files, verbs
from dnpo.stages.before import fine_tune, prepare
from dnpo.stages.files import Portion, Shards, divide
from dnpo.stages.verbs import evaluate, generate, judge, label, reference
from dnpo.store import MANIFEST, Stage, Store, manifest
from dnpo.tables import read
from tests.conftest import Report, World

SETTINGS = (
    "scale=smoke",
    "iterations=1",
    "acts_from=0",
    "judge=longer",
    'npo="off"',
    'sft="off"',
    'tracking="off"',
    "data.train=40",
    "data.validation=9",
    "data.test=9",
    "eval.samples=1",
    "eval.sequences=12",
    "generate.shard_size=10",
)
ROWS = 7  # in a shard, a row group


class Killed(BaseException):
    """The error that ends a stage in these tests."""


def lay_out(folder: Path) -> tuple[list[Stage], Store]:
    """The stages that process rows, in order."""
    with initialize_config_dir(str(conf_folder()), version_base=None):
        run, _, _ = build(compose("train", [*SETTINGS, f"ledger={folder / 'ledger.sqlite'}"]))
    (plan,) = run.plans
    prompts = prepare(run, None)
    policy = fine_tune(run, None, prompts=prompts)
    responses = generate(run, plan, prompts=prompts, policy=policy)
    verdicts = judge(run, plan, prompts=prompts, responses=responses)
    pairs = label(run, plan, prompts=prompts, responses=responses, verdicts=verdicts)
    scores = reference(run, plan, prompts=prompts, policy=policy, pairs=pairs)
    evaluation = evaluate(run, plan, prompts=prompts, policy=policy, pairs=pairs)
    found = [prompts, policy, responses, verdicts, pairs, scores, evaluation]
    return [stage for stage in found if stage is not None], Store(folder / "store")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Stage], Store]:
    """All stages, each in one shard."""
    stages, store = lay_out(tmp_path_factory.mktemp("whole"))
    for stage in stages:
        store.get(stage, Report())
    return stages, store


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows in a shard and in a row group."""
    monkeypatch.setattr(files, "SIZE", ROWS)
    monkeypatch.setattr(references, "SHARD", ROWS)
    monkeypatch.setattr(tables, "GROUP", ROWS)


def contents(folder: Path) -> dict[str, Any]:
    """The rows of a stage, and its other files except weights."""
    found: dict[str, Any] = {"facts": manifest(folder)["facts"]}
    for path in sorted(each for each in folder.rglob("*") if each.is_file() and each.name != MANIFEST):
        name = path.relative_to(folder).as_posix()
        found[name] = pq.read_table(path).to_pylist() if path.suffix == ".parquet" else path.read_bytes()
    return found


def test_shards_change_nothing(whole: tuple[list[Stage], Store], small: None, tmp_path: Path) -> None:
    """Every file is the same; the reference's numbers, from other batches, only up to rounding."""
    stages, store = lay_out(tmp_path)
    assert [stage.key for stage in stages] == [stage.key for stage in whole[0]]
    for stage in stages:
        found, expected = contents(store.get(stage, Report())), contents(whole[1].folder(stage))
        if stage.name == "reference":
            assert len(found) > len(expected), "several shards"
            rows, others = (
                sorted(
                    (row for name, some in each.items() if "shard" in name for row in some), key=lambda row: row["pair"]
                )
                for each in (found, expected)
            )
            assert [row["pair"] for row in rows] == [row["pair"] for row in others]
            for side in ("chosen", "rejected"):
                assert [row[side] for row in rows] == pytest.approx([row[side] for row in others], abs=1e-4)
        elif stage.name == "judge":  # human responses come first in every shard
            key = json.dumps
            assert sorted(found["verdicts.parquet"], key=key) == sorted(expected["verdicts.parquet"], key=key)
            assert found["facts"] == expected["facts"]
        else:
            assert found == expected


@pytest.mark.parametrize(
    ("name", "module", "part"),
    [("prompts", tokenizer, "encode_many"), ("judge", verbs, "ask"), ("pairs", dsl, "label_some")],
)
def test_killed_stage_loses_one_shard(
    whole: tuple[list[Stage], Store],
    small: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    module: Any,
    part: str,
) -> None:
    """After a kill in its fourth shard, the stage computes only this and later shards."""
    stages, store = lay_out(tmp_path)
    (stage,) = (stage for stage in stages if stage.name == name)
    inputs = {each: whole[1].folder(needed) for each, needed in stage.inputs.items()}
    work, calls, last = getattr(module, part), [0], [4]

    def count(*given: Any, **named: Any) -> Any:
        calls[0] += bool(given[1] if part == "encode_many" else True)  # without rows to encode there is no shard
        if calls[0] == last[0]:
            raise Killed
        return work(*given, **named)

    monkeypatch.setattr(module, part, count)
    with pytest.raises(Killed):
        store._compute(stage, inputs, Report())
    made = calls[0]
    last[0] = 0
    report = Report()
    store._compute(stage, inputs, report)
    total = sum(-(-rows // ROWS) for rows in ((40, 9, 9) if name == "prompts" else (40,)))
    assert made == 4
    assert calls[0] == total + 1, "the one in which it was killed was begun twice"
    assert report.done == report.total or name != "judge"
    expected = contents(whole[1].folder(stage))
    found = contents(store.folder(stage))
    assert found.keys() == expected.keys()
    assert {name: len(rows) for name, rows in found.items()} == {name: len(rows) for name, rows in expected.items()}
    assert not list(store.folder(stage).rglob("shards*"))


def test_a_kill_at_any_moment_loses_one_shard(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before each written file in turn, and between removals of files."""
    rows = [Verdict(f"r{i}", "human", float(i)) for i in range(5 * ROWS - 2)]
    parts = list(tables.in_parts(rows, ROWS))
    replace, made = disk.replace, [0]

    def work(some: list[Verdict]) -> files.Shard:
        made[0] += 1
        return {"one": some, "other": some[:1]}, {"rows": len(some)}

    def killing(at: int) -> Callable[[Path, Path], None]:
        left = [at]

        def replace_or_die(aside: Path, path: Path) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            replace(aside, path)

        return replace_or_die

    moments = 0
    while True:
        folder = tmp_path / f"{moments}"
        made[0] = 0
        monkeypatch.setattr(disk, "replace", killing(moments))
        try:
            Shards(folder, "rows", {"one": Verdict, "other": Verdict}).make(parts, work)
        except Killed:
            monkeypatch.setattr(disk, "replace", replace)
        else:
            break
        again = Shards(folder, "rows", {"one": Verdict, "other": Verdict})
        done = again.done
        facts = again.make(parts, work)
        assert made[0] <= len(parts) + 1
        assert done >= len(parts) or made[0] > done
        assert facts == [{"rows": len(part)} for part in parts]
        assert read(folder / "one.parquet", Verdict) == rows
        assert read(folder / "other.parquet", Verdict) == [part[0] for part in parts]
        assert sorted(path.name for path in folder.iterdir()) == [".rows.json", "one.parquet", "other.parquet"]
        assert Shards(folder, "rows", {"one": Verdict, "other": Verdict}).make([], work) == facts
        moments += 1
    assert moments >= 3 * len(parts) + 3, "each file of a shard, both joined files, and what says that all are made"


def test_a_judge_that_fails_is_asked_again(whole: tuple[list[Stage], Store], tmp_path: Path) -> None:
    """Verdicts without scores are removed if too many of them end the stage."""
    stages, store = lay_out(tmp_path)
    (stage,) = (stage for stage in stages if stage.name == "judge")
    inputs = {each: whole[1].folder(needed) for each, needed in stage.inputs.items()}

    def refuse(self: Longer, prompts: Any, responses: Any, ledger: Any, report: Any) -> list[Verdict]:
        return [make_verdict(response, None, "asleep") for response in responses]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Longer, "__call__", refuse)
        for _ in range(2):
            with pytest.raises(Exception, match="80 of 80 responses have no score"):
                store._compute(stage, inputs, Report())
    store._compute(stage, inputs, Report())
    assert contents(store.folder(stage)) == contents(whole[1].folder(stage))


def test_rows_in_another_order_are_refused(world: World) -> None:
    from dnpo.evaluate import Held

    held = Held(world.prompts[:9], world.human[:9])
    assert [len(some.prompts) for some in divide(held, 4, held.human)] == [4, 4, 1]
    assert [len(some.others[0]) for some in divide(held, 4, held.human[2:7])] == [2, 3, 0]
    with pytest.raises(ValueError, match="does not follow the order of the prompts"):
        list(divide(held, 4, held.human[::-1]))


def test_progress_of_a_shard_counts_towards_its_stage() -> None:
    """Ten responses with twenty questions, five of which are answered already."""
    report = Report()
    portion = Portion(report, 10)
    portion.begin(20, "questions", 5)
    seen = [report.done]
    for _ in range(15):
        portion.advance()
        seen.append(report.done)
    assert seen[0] == 2
    assert seen == sorted(seen)
    assert seen[-1] == 10
