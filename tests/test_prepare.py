"""The stage of prompts: rows that are too long in tokens, removed rows, and the settings in the stage's key."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dnpo.data.files import JsonLines
from dnpo.data.tinyworld import TinyWorld
from dnpo.errors import DataError, ModelError
from dnpo.records import Prompt, Response
from dnpo.stages.before import prepare
from dnpo.store import Stage
from dnpo.tables import read
from tests.conftest import Report, World

WORDS = "one two three four five six seven eight nine ten"


class Model:
    """An existing model with a context of 200 tokens."""

    def __init__(self, world: World) -> None:
        config = SimpleNamespace(max_position_embeddings=200)
        self.policy = SimpleNamespace(tokenizer=world.tokenizer, stop_ids=(), causal_lm=SimpleNamespace(config=config))

    def identity(self) -> dict[str, Any]:
        return {}

    def base(self, folder: Path, rows: list[Prompt]) -> None:
        pass

    def load(self, *where: Any) -> Any:
        return self.policy


def stage(world: World, data: Any) -> Stage:
    run: Any = SimpleNamespace(data=data, model=Model(world), limit=data.max_response_tokens, sft_rows=0, device="cpu")
    return prepare(run, None)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Every fifth response and every seventh prompt is long, and one prompt occurs twice."""
    rows = [
        {
            "id": f"r{i}",
            "prompt": f"question {i} " + WORDS * (8 if i % 7 == 0 else 0),
            "response": f"answer {i} " + WORDS * (4 if i % 5 == 0 else 0),
        }
        for i in range(200)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[1], "id": "again"}]))
    return path


def source(file: Path, **settings: Any) -> JsonLines:
    return JsonLines(
        path=str(file), near_duplicates=0.0, **{"max_prompt_tokens": 60, "max_response_tokens": 40} | settings
    )


def test_a_row_that_a_template_cuts_is_named(world: World, file: Path, tmp_path: Path, report: Report) -> None:
    """Every row is checked; the gate checks a sample."""
    cuts = copy.deepcopy(world.tokenizer)
    cuts.chat_template = cuts.chat_template.replace("message['content']", "message['content'][:40]")
    data = source(file)
    with pytest.raises(ModelError, match=r"row r\d+ of \w+: model\.chat_template: leaves out .* turn"):
        stage(world._replace(tokenizer=cuts), data).work(tmp_path, {}, report)


@pytest.mark.parametrize("way", ["cut", "drop"])
def test_too_long_responses_are_counted_and_reported(
    world: World, file: Path, tmp_path: Path, report: Report, way: Any
) -> None:
    data = source(file, long_responses=way)
    facts = stage(world, data).work(tmp_path, {}, report)
    rows, _ = data.read()
    assert sum(facts["removed"].values()) == 1
    assert "1 equal to" in report.notes[0]
    assert "like" in report.notes[0]
    for split, some in rows.items():
        numbers = [1 if row.id == "again" else int(row.id[1:]) for row in some]
        fitting = [i for i in numbers if i % 7]
        long = [i for i in fitting if i % 5 == 0]
        human = read(tmp_path / f"{split}-human.parquet", Response)
        kept = [i for i in fitting if way == "cut" or i not in long]
        assert [r.id for r in human] == [p.id for p in read(tmp_path / f"{split}.parquet", Prompt)]
        assert len(human) == len(kept)
        assert sum(r.finish == "length" for r in human) == (len(long) if way == "cut" else 0)
        assert facts[split] == {
            "rows": len(kept),
            "too_long": len(numbers) - len(fitting),
            "human_cut" if way == "cut" else "human_dropped": len(long),
        }
        what = "cut there" if way == "cut" else "dropped with their prompts"
        (note,) = [note for note in report.notes if f"human responses of {split}" in note]
        assert note == f"{len(long)} of {len(some)} human responses of {split} are longer than 40 tokens: {what}"


def test_dropped_rows_are_reported_and_in_the_key(world: World, file: Path, tmp_path: Path, report: Report) -> None:
    plain = stage(world, source(file)).key
    assert stage(world, source(file, bad_rows="fail", join="+")).key == plain
    assert stage(world, source(file, bad_rows="drop")).key != plain
    with file.open("a") as stream:
        stream.write('{"prompt": "a", "response": ""}\n' * 3)
    facts = stage(world, source(file, bad_rows="drop")).work(tmp_path, {}, report)
    said = f"rows that cannot be used are left out: 3: response is empty (the first is {file}:202)"
    assert said in report.notes
    assert facts["unusable"] == {"response is empty": {"rows": 3, "first": f"{file}:202"}}


def test_nothing_is_reported_if_no_row_is_too_long(world: World, tmp_path: Path, report: Report) -> None:
    facts = stage(world, TinyWorld(train=60, validation=6, test=6)).work(tmp_path, {}, report)
    assert report.notes == []
    assert facts["train"] == {"rows": 60, "too_long": 0, "human_cut": 0}


def test_a_limit_that_drops_everything_is_named(world: World, file: Path, tmp_path: Path, report: Report) -> None:
    with pytest.raises(
        DataError, match=r"^data\.long_responses=drop: all 1\d\d human responses of train .*long_responses=cut"
    ):
        stage(world, source(file, long_responses="drop", max_response_tokens=1)).work(tmp_path, {}, report)
    with pytest.raises(DataError, match=r"^data: none of the .* fits into 2 tokens"):
        stage(world, source(file, max_prompt_tokens=2)).work(tmp_path / "other", {}, report)


def test_the_treatment_of_long_responses_is_in_the_key_unless_it_is_the_default(world: World, file: Path) -> None:
    assert "long_responses" not in stage(world, source(file)).settings
    assert "long_responses" not in stage(world, TinyWorld()).settings
    assert stage(world, source(file)).key != stage(world, source(file, long_responses="drop")).key
