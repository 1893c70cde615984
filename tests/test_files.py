"""Rows of JSON lines files and of the hub: every error with its place and field, splits, samples, identity."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dnpo.data import SPLITS
from dnpo.data.files import Hub, JsonLines
from dnpo.errors import DataError
from dnpo.records import Prompt
from dnpo.settings import check

LIMITS = {"max_prompt_tokens": 64, "max_response_tokens": 64}
SHARED = Path(__file__).parents[2] / "shared" / "data"
USER = {"role": "user", "content": "Why?"}
ASSISTANT = {"role": "assistant", "content": "Because."}


def pairs(n: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"id": f"r{i}", "prompt": f"question {i}", "response": f"answer {i}"} for i in range(start, start + n)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def jsonl(path: Path, **settings: Any) -> JsonLines:
    return JsonLines(path=str(path), **{**LIMITS, **settings})


def everything(source: JsonLines | Hub) -> dict[str, Prompt]:
    return {row.id: row for rows in source.read()[0].values() for row in rows}


def places(source: JsonLines | Hub) -> dict[str, str]:
    return {row.id: split for split, rows in source.read()[0].items() for row in rows}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


# --- rows -------------------------------------------------------------------------------------------------------------


def test_both_forms_of_a_row(file: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {
            "id": 7,
            "prompt": "2 + 2?",
            "response": "4.",
            "answer": "4",
            "family": "sums",
            "extra": [1],
            "messages": None,
        },
        {"id": "chat", "messages": [system, USER, ASSISTANT, {"role": "tool"}, "ignored"], "prompt": "not this"},
        "",
        "   ",
        *pairs(200),
    ]
    read = everything(jsonl(write(file, rows)))
    assert len(read) == 202
    assert read["7"] == Prompt("7", [{"role": "user", "content": "2 + 2?"}], "4.", "sums", "4")
    assert read["chat"] == Prompt("chat", [system, USER], "Because.")
    assert read["r3"].answer is None


def test_a_row_without_an_id_is_known_by_its_content(file: Path) -> None:
    plain = {"prompt": "Why?", "response": "Because."}
    as_messages = {"messages": [USER, ASSISTANT]}
    names = [set(everything(jsonl(write(file, [row, *pairs(100)])))) for row in (plain, as_messages)]
    assert names[0] == names[1]
    (name,) = names[0] - {f"r{i}" for i in range(100)}
    assert len(name) == 16
    assert int(name, 16)
    # Where the prompt ends and the response begins matters.
    other = [{"prompt": "ab", "response": "c"}, {"prompt": "a", "response": "bc"}]
    assert len(everything(jsonl(write(file, [*other, *pairs(100)])))) == 102


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row) for row in pairs(100)).encode())
    assert len(everything(jsonl(file))) == 100


BAD = [
    ('{"prompt": ', "not JSON", "one object a line"),
    ("[" * 100_000, "not JSON", "one object a line"),
    ('["a", "b"]', "is not an object", "prompt and response, or messages"),
    ('"text"', "is not an object", "prompt and response, or messages"),
    ({"response": "a"}, "no prompt", "the row has response"),
    ({"prompt": "a", "chosen": "b"}, "no response", "the row has prompt, chosen"),
    ({}, "no prompt", "the row has nothing"),
    ({"prompt": None, "response": "a"}, "no prompt", "prompt and response, or messages"),
    ({"prompt": "", "response": "a"}, "prompt is empty", "expected text"),
    ({"prompt": "a", "response": " \n\t"}, "response is empty", "expected text"),
    ({"prompt": ["a"], "response": "a"}, "prompt is ['a']", "expected text"),
    ({"prompt": "a", "response": 3}, "response is 3", "expected text"),
    ('{"prompt": "\\ud83d", "response": "a"}', "prompt is not valid Unicode", "expected text"),
    ({"prompt": "a", "response": "b", "id": 1.5}, "id is 1.5", "expected text"),
    ({"prompt": "a", "response": "b", "id": True}, "id is True", "expected text"),
    ({"prompt": "a", "response": "b", "id": ""}, "id is empty", "expected text"),
    ({"prompt": "a", "response": "b", "answer": 4}, "answer is 4", "expected text"),
    ({"prompt": "a", "response": "b", "answer": " "}, "answer is empty", "expected text"),
    ({"prompt": "a", "response": "b", "family": []}, "family is []", "expected text"),
    ({"messages": "hello"}, "messages is 'hello'", "a list of turns"),
    ({"messages": []}, "messages", "no user turn followed by an assistant turn"),
    ({"messages": [USER]}, "messages", "no user turn followed by an assistant turn"),
    ({"messages": ["hello"]}, "messages[0] is 'hello'", "role and content"),
    ({"messages": [ASSISTANT, USER]}, "messages[0].role is 'assistant'", "system or user"),
    ({"messages": [USER, USER, ASSISTANT]}, "messages[1].role is 'user'", "expected assistant"),
    ({"messages": [{"content": "a"}, ASSISTANT]}, "messages[0].role is None", "system or user"),
    ({"messages": [{"role": "user"}, ASSISTANT]}, "messages[0].content is None", "expected text"),
    ({"messages": [USER, {**ASSISTANT, "content": " "}]}, "messages[1].content is empty", "expected text"),
    ({"messages": [USER, {**ASSISTANT, "content": ["a"]}]}, "messages[1].content is ['a']", "expected text"),
]


@pytest.mark.parametrize(("row", "problem", "expected"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_row_is_named_by_line_and_field(file: Path, row: Any, problem: str, expected: str) -> None:
    write(file, [*pairs(2), "", row, *pairs(3, start=2)])  # a blank line counts as a line
    with pytest.raises(DataError) as caught:
        jsonl(file).read()
    assert str(caught.value).startswith(f"{file}:4: ")
    assert problem in str(caught.value)
    assert expected in str(caught.value)


def test_duplicate_ids_are_refused_with_both_lines(file: Path) -> None:
    rows = [*pairs(5), {"id": "r1", "prompt": "another", "response": "one"}]
    with pytest.raises(DataError, match=f"^{file}:6: id 'r1' .*{file}:2"):
        jsonl(write(file, rows)).read()
    rows = [{"id": 1, "prompt": "a", "response": "b"}, {"id": "1", "prompt": "c", "response": "d"}]
    with pytest.raises(DataError, match=f"^{file}:2: id '1' .*{file}:1"):
        jsonl(write(file, rows)).read()
    rows = [{"prompt": "a", "response": "b"}, *pairs(5), {"prompt": "a", "response": "b"}]
    with pytest.raises(DataError, match=f"^{file}:7: identical to {file}:1 .*remove one"):
        jsonl(write(file, rows)).read()


def test_a_file_that_cannot_be_read_is_named_by_its_setting(tmp_path: Path, file: Path) -> None:
    for path, problem in ((tmp_path / "none.jsonl", "No such file"), (tmp_path, "Is a directory")):
        for call in (jsonl(path).identity, jsonl(path).read):
            with pytest.raises(DataError, match=f"^data.path={path}: {problem}"):
                call()
    for content in (b"", b"\n  \n"):
        file.write_bytes(content)
        with pytest.raises(DataError, match=f"^data.path={file}: there are no rows"):
            jsonl(file).read()
    file.write_bytes(json.dumps(pairs(1)[0]).encode() + '\n{"prompt": "café"'.encode("latin-1"))
    with pytest.raises(DataError, match=f"^data.path={file}: line 2 is not UTF-8"):
        jsonl(file).read()


# --- splits, sample, identity -----------------------------------------------------------------------------------------


def test_adding_rows_moves_none(file: Path) -> None:
    few = places(jsonl(write(file, pairs(300)), holdout=0.2))
    many = places(jsonl(write(file, [*pairs(700, start=300), *pairs(300)]), holdout=0.2))
    assert few.items() <= many.items()
    sizes = [list(many.values()).count(split) for split in SPLITS]
    assert sum(sizes) == 1000
    assert 740 < sizes[0] < 860
    assert all(60 < size < 140 for size in sizes[1:])
    # A larger share keeps what was held out.
    more = places(jsonl(file, holdout=0.4))
    assert all(more[name] != "train" for name, split in many.items() if split != "train")


def test_the_sample_is_drawn_with_the_seed_before_the_split(file: Path) -> None:
    write(file, pairs(500))
    drawn = [places(jsonl(file, sample=200, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(some) for some in drawn] == [200] * 3
    assert drawn[2].items() <= places(jsonl(file)).items()
    train = [int(row.id[1:]) for row in jsonl(file, sample=200).read()[0]["train"]]
    assert train == sorted(train)  # in the order of the file
    assert len(places(jsonl(file, sample=500))) == 500
    with pytest.raises(DataError, match=r"^data\.sample=501: more than the 500 rows"):
        jsonl(file, sample=501).read()


@pytest.mark.parametrize(("holdout", "split"), [(0.0, "validation"), (1.0, "train")])
def test_no_split_may_be_empty(file: Path, holdout: float, split: str) -> None:
    with pytest.raises(DataError, match=rf"^data\.holdout={holdout}: none of the 50 rows is left for {split}"):
        jsonl(write(file, pairs(50)), holdout=holdout).read()


def test_a_held_out_prompt_is_never_trained_on(file: Path) -> None:
    rows = pairs(200)
    held = {name for name, split in places(jsonl(write(file, rows))).items() if split != "train"}
    again = [{**row, "id": f"again-{row['id']}", "response": "otherwise"} for row in rows]
    rows, facts = jsonl(write(file, rows + again)).read()
    prompts = {split: {row.messages[-1]["content"] for row in some} for split, some in rows.items()}
    assert not prompts["train"] & (prompts["validation"] | prompts["test"])
    removed = 400 - sum(map(len, rows.values()))
    assert facts["train_rows_like_held_out"] == removed > len(held) // 2
    assert [facts[f"{split}_rows"] for split in SPLITS] == [len(rows[split]) for split in SPLITS]


def test_reading_again_gives_the_same_rows_whatever_was_done_to_them(file: Path) -> None:
    source = jsonl(write(file, pairs(100)))
    rows, facts = source.read()
    assert source.read() == (rows, facts)
    rows["train"].clear()
    facts["train"] = {}
    again, facts = source.read()
    assert again["train"]
    assert "train" not in facts


def test_identity_is_of_the_content(tmp_path: Path) -> None:
    one, other = (jsonl(write(tmp_path / name, pairs(9))) for name in ("a.jsonl", "b.jsonl"))
    assert one.identity() == other.identity()
    assert str(tmp_path) not in json.dumps(one.identity())
    write(tmp_path / "b.jsonl", pairs(8))
    assert one.identity() != other.identity()
    a = tmp_path / "a.jsonl"
    assert jsonl(a, seed=1).identity() == one.identity()
    assert jsonl(a, seed=1, sample=3).identity() != jsonl(a, seed=2, sample=3).identity()
    assert jsonl(a, sample=3).identity() != one.identity() != jsonl(a, holdout=0.2).identity()


def test_the_settings_are_the_signature() -> None:
    given = {"_target_": "dnpo.data.files.JsonLines", "path": "x", "holdout": 0, **LIMITS}
    assert check("data", given)["holdout"] == 0.0
    assert check("data", {"_target_": "dnpo.data.files.Hub", "name": "x", "config": None, "revision": None, **LIMITS})


def test_real_rows() -> None:
    path = SHARED / "sft_rasbt.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not here: the shared data lie outside the repository")
    rows, facts = jsonl(path).read()
    assert sum(map(len, rows.values())) + facts["train_rows_like_held_out"] == 1100
    assert all(row.id.startswith("rasbt-") for some in rows.values() for row in some)


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_hub(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """No test asks the hub, and each has a cache of its own."""
    if "hub" not in request.node.name:
        return None
    import datasets
    import huggingface_hub.constants

    monkeypatch = request.getfixturevalue("monkeypatch")
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes rows as a split of a data set in the hub's layout, and gives its folder."""

    def write(rows: list[dict[str, Any]], split: str = "train", folder: str = "set") -> Path:
        from datasets import Dataset

        (tmp_path / folder / "data").mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(tmp_path / folder / "data" / f"{split}-00000-of-00001.parquet")
        return tmp_path / folder

    return write


def hub(name: Path | str, **settings: Any) -> Hub:
    return Hub(name=str(name), **{**LIMITS, **settings})


def ultrachat(n: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"Question {i}?",
            "prompt_id": f"{i:04x}",
            "messages": [
                {"content": f"Question {i}?", "role": "user"},
                {"content": f"Answer {i}.", "role": "assistant"},
                {"content": "And?", "role": "user"},
                {"content": "", "role": "assistant"},
            ],
        }
        for i in range(n)
    ]


def test_hub_folder(save: Save, file: Path) -> None:
    folder = save(pairs(300))
    assert hub(folder).read() == jsonl(write(file, pairs(300))).read()
    assert hub(folder, sample=200, seed=5).read() == jsonl(file, sample=200, seed=5).read()


def test_hub_folder_of_json_lines(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", [*pairs(100), {"prompt": "No id?", "response": "None."}])
    assert len(everything(hub(tmp_path / "set"))) == 101


def test_hub_folder_comes_before_anything_else_of_its_name(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(pairs(100), folder="json")  # to the library, "json" alone is a file format
    monkeypatch.chdir(folder.parent)
    assert len(everything(hub("json"))) == 100


def test_hub_rows_like_ultrachat(save: Save) -> None:
    save(ultrachat(3), "test_sft")
    folder = save(ultrachat(200), "train_sft")
    read = everything(hub(folder, split="train_sft", sample=150, seed=3))
    assert len(read) == 150
    row = next(iter(read.values()))
    number = int(row.id, 16)
    assert row == Prompt(row.id, [{"role": "user", "content": f"Question {number}?"}], f"Answer {number}.")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"id": "x", "prompt": "a", "response": " "}, "response is empty"),
        ({"id": "x", "prompt": None, "response": "a"}, "no prompt"),
        ({"id": "r2", "prompt": "a", "response": "b"}, r"id 'r2' is that of {}\[train\] row 2 already"),
    ],
)
def test_hub_bad_rows_are_named_by_split_and_number(save: Save, row: dict[str, Any], problem: str) -> None:
    folder = save([*pairs(5), row])
    with pytest.raises(DataError, match=rf"^{folder}\[train\] row 5: {problem.format(folder)}"):
        hub(folder).read()


def test_hub_rows_without_an_id_column(save: Save) -> None:
    rows = [{"prompt": f"{i}?", "response": "Yes."} for i in range(100)]
    assert len(everything(hub(save(rows)))) == 100
    folder = save([*rows, rows[4]], folder="twice")
    with pytest.raises(DataError, match=rf"^{folder}\[train\] row 100: identical to {folder}\[train\] row 4 .*remove"):
        hub(folder).read()
    folder = save([{"text": "some"}], folder="text")
    with pytest.raises(DataError, match=rf"^{folder}\[train\] row 0: no prompt; .*the row has text"):
        hub(folder).read()


def test_hub_folder_problems_name_the_setting(save: Save, tmp_path: Path) -> None:
    folder = save(ultrachat(50), "train_sft")
    with pytest.raises(DataError, match=r"^data\.split=train: .*'train_sft'"):
        hub(folder).read()
    with pytest.raises(DataError, match=r"^data\.split=train_sft\[: "):
        hub(folder, split="train_sft[").read()
    with pytest.raises(DataError, match=r"^data\.config=small: .*'default'") as caught:
        hub(folder, config="small", split="train_sft").read()
    assert isinstance(caught.value.__cause__, ValueError)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=f"^data.name={tmp_path / 'empty'}: this folder cannot be read"):
        hub(tmp_path / "empty").read()
    with pytest.raises(DataError, match=r"^data\.sample=51: more than the 50 rows"):
        hub(folder, split="train_sft", sample=51).read()


def test_hub_folder_identity_is_of_the_content(save: Save) -> None:
    one, other = hub(save(pairs(9), folder="a")), hub(save(pairs(9), folder="b"))
    assert one.identity() == other.identity()
    save(pairs(8), folder="b")
    assert one.identity() != other.identity()
    assert hub(one.name, split="x").identity() != one.identity() == hub(one.name, seed=3).identity()


@pytest.mark.parametrize("offline", [True, False], ids=["switched off", "refused"])
def test_hub_unreachable(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    if not offline:  # a real connection, to a port where nobody listens, without the pauses between attempts
        import datasets
        import huggingface_hub.constants
        from huggingface_hub.utils import _http

        nobody = "http://127.0.0.1:9"
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", nobody)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
        template = nobody + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    source = hub("someone/nothing")
    assert source.identity()["revision"] == "unpinned"
    with pytest.raises(DataError, match=r"^data\.name=someone/nothing: .*data=jsonl.*HF_HOME") as caught:
        source.read()
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert hub("someone/nothing", revision="v1").identity()["revision"] == "v1"


def test_hub_identity_is_the_commit_and_this_commit_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    class Api:
        def dataset_info(self, name: str, **settings: Any) -> Any:
            return huggingface_hub.hf_api.DatasetInfo(id=name, sha="c" * 40, tags=[], private=False)

    def load(name: str, config: str | None, **settings: Any) -> Any:
        assert settings == {"split": "train", "revision": "c" * 40}
        return datasets.Dataset.from_list(pairs(100))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = hub("someone/something", revision="main")
    assert source.identity() == {
        "name": "someone/something",
        "revision": "c" * 40,
        "config": None,
        "split": "train",
        "sample": 0,
        "holdout": 0.1,
    }
    assert len(everything(source)) == 100


def test_hub_offline_takes_the_cache_but_no_other_commit(save: Save, no_hub: Path) -> None:
    """A cache as the library makes it for a data set of the hub: its folders are named by name and commit."""
    hub(save(pairs(100))).read()
    (made,) = (no_hub / "set" / "default" / "0.0.0").glob("*/dataset_info.json")
    commit = "d" * 40
    there = no_hub / "someone___set" / "default" / "0.0.0" / commit
    shutil.copytree(made.parent, there)
    assert len(everything(hub("someone/set"))) == 100
    assert len(everything(hub("someone/set", revision=commit))) == 100
    with pytest.raises(DataError, match=rf"^data\.revision={'e' * 40}: .*give data\.revision={commit}"):
        hub("someone/set", revision="e" * 40).read()
