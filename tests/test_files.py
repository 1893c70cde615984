"""Rows of files in every format and of the hub: every error with its line and field, splits, samples, identity."""

import csv
import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dnpo.data import SPLITS
from dnpo.data.files import Arrow, Csv, Files, JsonLines, Parquet
from dnpo.data.hub import Hub
from dnpo.errors import DataError, SettingsError
from dnpo.records import Prompt
from dnpo.settings import check

LIMITS = {"max_prompt_tokens": 64, "max_response_tokens": 64}
SHARED = Path(__file__).parents[2] / "shared" / "data"
USER = {"role": "user", "content": "Why?"}
ASSISTANT = {"role": "assistant", "content": "Because."}


def pairs(n: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"id": f"r{i}", "prompt": f"question {i}", "response": f"answer {i}"} for i in range(start, start + n)]


REMOVED = ("repeated", "equal_to_earlier", "equal_to_held_out", "near_earlier", "near_held_out")


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def jsonl(path: Path, **settings: Any) -> JsonLines:
    return JsonLines(path=str(path), **{**LIMITS, **settings})


def everything(source: Files | Hub) -> dict[str, Prompt]:
    return {row.id: row for rows in source.read()[0].values() for row in rows}


def whole(source: Any) -> tuple[dict[str, list[Prompt]], dict[str, Any]]:
    """The result of a source, with its rows as lists."""
    rows, facts = source.read()
    return {split: list(some) for split, some in rows.items()}, facts


def places(source: Files | Hub) -> dict[str, str]:
    return {row.id: split for split, rows in source.read()[0].items() for row in rows}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def save_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def save_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        out = csv.DictWriter(stream, list(rows[0]))
        out.writeheader()
        out.writerows(rows)


def save_arrow(path: Path, rows: list[dict[str, Any]]) -> None:
    """As ``datasets`` writes one shard."""
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)


FORMATS: list[tuple[type[Files], Callable[[Path, list[dict[str, Any]]], Any]]] = [
    (JsonLines, write),
    (Parquet, save_parquet),
    (Csv, save_csv),
    (Arrow, save_arrow),
]
every_format = pytest.mark.parametrize(("kind", "saved"), FORMATS, ids=lambda value: getattr(value, "__name__", ""))


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
        {"id": "chat", "messages": [system, USER, ASSISTANT, {"role": "tool"}, "ignored"], "prompt": "Why?"},
        "",
        "   ",
        *pairs(200),
    ]
    read = everything(jsonl(write(file, rows)))
    assert len(read) == 202
    assert read["7"] == Prompt("7", [{"role": "user", "content": "2 + 2?"}], "4.", "sums", "4")
    assert read["chat"] == Prompt("chat", [system, USER], "Because.")
    assert read["r3"].answer is None


def test_a_row_without_an_id_gets_one_from_its_content(file: Path) -> None:
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
    ('["a", "b"]', "is not an object", "prompt and response, messages"),
    ('"text"', "is not an object", "prompt and response, messages"),
    ({"response": "a"}, "no prompt", "the row has response"),
    ({"prompt": "a", "rejected": "b"}, "no response", "the row has prompt, rejected"),
    ({"chosen": "a"}, "no prompt", "the row has chosen"),
    ({"prompt": "a", "chosen": []}, "chosen is empty", "a list of turns"),
    ({"prompt": "a", "chosen": [USER]}, "chosen[0].role is 'user'", "expected assistant"),
    ({"prompt": "a", "chosen": [USER, ASSISTANT]}, "chosen does not begin with the prompt", "one assistant turn"),
    ({"prompt": "a", "chosen": [ASSISTANT, USER, ASSISTANT]}, "chosen[0].role is 'assistant'", "system or user"),
    ({"chosen": [USER]}, "chosen has no user turn", "followed by an assistant turn"),
    ({"prompt": [], "chosen": "b"}, "prompt is empty", "a list of turns"),
    (
        {"prompt": [{"role": "system", "content": ""}], "chosen": "b"},
        "prompt does not end with a user turn",
        "a user's",
    ),
    ({"prompt": [USER, ASSISTANT], "chosen": "b"}, "prompt does not end with a user turn", "the last a user's"),
    ({"prompt": [{**USER, "content": [1]}], "chosen": "b"}, "prompt[0].content is [1]", "expected text"),
    ({"prompt_id": 1.5, "prompt": "a", "response": "b"}, "prompt_id is 1.5", "expected text"),
    ({}, "no prompt", "the row has nothing"),
    ({"prompt": None, "response": "a"}, "no prompt", "prompt and response, messages"),
    ({"prompt": "", "response": "a"}, "prompt is empty", "expected text"),
    ({"prompt": "a", "response": " \n\t"}, "response is empty", "expected text"),
    ({"prompt": ["a"], "response": "a"}, "prompt[0] is 'a'", "role and content"),
    ({"prompt": "a", "response": 3}, "response is 3", "expected text"),
    ('{"prompt": "\\ud83d", "response": "a"}', "prompt is not valid Unicode", "expected text"),
    ({"prompt": "a", "response": "b", "id": 1.5}, "id is 1.5", "expected text"),
    ({"prompt": "a", "response": "b", "id": True}, "id is True", "expected text"),
    ({"prompt": "a", "response": "b", "id": ""}, "id is empty", "expected text"),
    ({"prompt": "a", "response": "b", "answer": True}, "answer is True", "'{answer: null}' leaves the column out"),
    ({"prompt": "a", "response": "b", "answer": ["x"]}, "answer is ['x']", "'{answer: null}' leaves the column out"),
    ({"prompt": "a", "response": "b", "answer": float("nan")}, "answer is nan", "expected text"),
    ({"prompt": "a", "response": "b", "family": 0.5}, "family is 0.5", "'{family: null}' leaves the column out"),
    ({"prompt": "a", "response": "b", "answer": " "}, "answer is empty", "expected text"),
    ({"prompt": "a", "response": "b", "family": []}, "family is []", "expected text"),
    ({"messages": "hello"}, "messages is 'hello'", "a list of turns"),
    ({"messages": []}, "messages is empty", "a list of turns"),
    ({"prompt": "\u200b\ufeff", "response": "a"}, "prompt is empty", "expected text"),
    ({"prompt": "a", "response": "\u0301 \u0300"}, "response is empty", "expected text"),
    ({"prompt": "a", "response": "\u200e\u202a \u2066"}, "response is empty", "expected text"),
    ({"prompt": "a", "response": "\u00ad\u2060\u3164\ufe0f\U000e0041"}, "response is empty", "expected text"),
    ({"messages": [USER, {**ASSISTANT, "content": "\u200d"}]}, "messages[1].content is empty", "expected text"),
    ({"messages": [USER, {**ASSISTANT, "content": []}]}, "messages[1].content is empty", "expected text"),
    ({"messages": [USER, {**ASSISTANT, "tool_calls": [{}]}]}, "messages[1] has tool_calls: a tool call", "text alone"),
    ({"messages": [USER, {"role": "tool", "content": "a"}]}, "messages[1].role is 'tool': a tool call", "text alone"),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "b"}]},
        "a tool call",
        "text",
    ),
    ({"conversations": [{"from": "gpt", "value": "a"}]}, "conversations[0].from is 'gpt': an assistant opens", "user"),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "narrator", "value": "b"}]},
        "from is 'narrator'; expected assistant. Known: ai, assistant",
        "data.roles='{NAME: user}'",
    ),
    ({"messages": [{**USER, "content": [{"type": "image_url"}]}, ASSISTANT]}, "is of type 'image_url'", "type text"),
    ({"messages": [{**USER, "role": "usr"}, ASSISTANT]}, "role is 'usr'; expected system or user", "Did you mean user"),
    ({"messages": [USER, {**ASSISTANT, "role": "asistant"}]}, "is 'asistant'; expected", "Did you mean assistant"),
    ({"messages": "[{'role': 'user' 'content'"}, "messages is \"[{'role'", "or such a list as JSON text"),
    (
        {"messages": [USER, ASSISTANT], "prompt": "Else?", "response": "No."},
        "messages and prompt, and",
        "{prompt: null}",
    ),
    (
        {"messages": [USER, ASSISTANT], "prompt": "Why?", "response": "No."},
        "contain response ('No.')",
        "'{messages: null}'",
    ),
    (
        {"messages": [USER, ASSISTANT], "prompt": "Else?"},
        "messages does not contain prompt ('Else?')",
        "{prompt: null}",
    ),
    (
        {"prompt": "a", "response": "b", "conversations": [USER, ASSISTANT]},
        "conversations and prompt",
        "{prompt: null}",
    ),
    ({"messages": [USER, ASSISTANT], "conversation": [USER]}, "messages and conversation are not the same", "null"),
    ({"prompt": "a", "response": "b", "chosen": "c"}, "response and chosen are not the same", "'{response: null}'"),
    ({"prompt": "a", "response": "\ufffd\ufffd \ufffd"}, "response is empty", "expected text"),
    ({"prompt": "\ue000\U000f0001", "response": "a"}, "prompt is empty", "expected text"),
    ({"messages": [USER, {**ASSISTANT, "content": "\ufffc\n"}]}, "messages[1].content is empty", "expected text"),
    ({"prompt": "a", "response": "b", "answer": False}, "answer is False", "such as the word 'true' or 'yes'"),
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


def test_an_id_with_another_content_is_refused_with_both_lines(file: Path) -> None:
    rows = [*pairs(5), {"id": "r1", "prompt": "another", "response": "one"}]
    with pytest.raises(DataError, match=f"^{file}:6: {file}:2 has the same id 'r1'"):
        jsonl(write(file, rows)).read()
    rows = [{"id": 1, "prompt": "a", "response": "b"}, {"id": "1", "prompt": "c", "response": "d"}]
    with pytest.raises(DataError, match=f"^{file}:2: {file}:1 has the same id '1'"):
        jsonl(write(file, [*rows, *pairs(5)])).read()
    rows = [{"prompt": "a", "response": "b"}, *pairs(5), {"prompt": "a", "response": "b", "answer": "b"}]
    with pytest.raises(DataError, match=f"^{file}:7: {file}:1 has the same prompt and response .*remove one"):
        jsonl(write(file, rows)).read()


def test_a_repeated_row_is_left_out(file: Path) -> None:
    without_id = {"prompt": "a", "response": "b"}
    rows, facts = jsonl(write(file, [*pairs(100), without_id, *pairs(3), without_id])).read()
    assert sum(map(len, rows.values())) == 101
    assert facts["removed"] == dict(zip(REMOVED, (4, 0, 0, 0, 0), strict=True))


def test_a_prompt_id_names_a_prompt_and_not_a_row(file: Path) -> None:
    """Two conversations may begin with one prompt; their ids differ, and the first has the prompt's id."""
    more = [USER, {"role": "assistant", "content": "Go on."}, {"role": "user", "content": "More."}, ASSISTANT]
    rows = [{"prompt_id": "x", "messages": [USER, ASSISTANT]}, {"prompt_id": "x", "messages": more}]
    names = set(everything(jsonl(write(file, [*pairs(100), *rows, rows[1]]), turns="all")))
    assert "x" in names
    assert len([name for name in names if name.startswith("x-")]) == 1
    assert len(names) == 102


def test_trl_preference_rows(file: Path) -> None:
    """Plain and conversational rows, with the prompt in its own field or within; chosen is the human response."""
    system = {"role": "system", "content": "Be brief."}
    rude = {"role": "assistant", "content": "Who cares?"}
    earlier = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello, you."}]
    rows = [
        {"id": "plain", "prompt": "Why?", "chosen": "Because.", "rejected": "Who cares?"},
        {"id": "apart", "prompt": [system, USER], "chosen": [ASSISTANT], "rejected": [rude]},
        {"id": "within", "chosen": [*earlier, USER, ASSISTANT], "rejected": [*earlier, USER, rude]},
        {"id": "both", "prompt": "Why? ", "chosen": [{**USER, "content": "Why? "}, ASSISTANT], "rejected": []},
        {"id": "mixed", "prompt": [*earlier, {**USER, "content": "Why now?"}], "response": "Because."},
    ]
    read = everything(jsonl(write(file, [*rows, *pairs(100)]), near_duplicates=0.0))
    assert read["plain"] == Prompt("plain", [USER], "Because.", rejected="Who cares?")
    assert read["apart"] == Prompt("apart", [system, USER], "Because.", rejected="Who cares?")
    assert read["within"] == Prompt("within", [*earlier, USER], "Because.", rejected="Who cares?")
    assert read["both"].human == "Because."
    assert read["mixed"].messages[-1]["content"] == "Why now?"


def sharegpt(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def test_unambiguous_forms_are_read(file: Path) -> None:
    """ShareGPT's turns, contents in parts, empty system turns, numbers as labels, and empty lists in other rows."""
    silent, brief = ({"role": "system", "content": text} for text in ("", "Be brief."))
    parts = [{"type": "text", "text": "Why "}, {"type": "text", "text": "so?"}]
    rows = [
        {"id": "sharegpt", "conversations": sharegpt("Why?", "Because.", "So?", "So.")},
        {"id": "one", "conversation": [{"from": "system", "value": "Be brief."}, *sharegpt("Why now?", "Because.")]},
        {"id": "silent", "messages": [silent, {**USER, "content": "Why this?"}, ASSISTANT]},
        {"id": "null", "messages": [{"role": "system", "content": None}, {**USER, "content": "Why that?"}, ASSISTANT]},
        {"id": "parts", "messages": [brief, {**USER, "content": parts}, ASSISTANT]},
        {"id": "sides", "prompt": [parts[0], {"type": "text", "text": "us?"}], "response": [parts[0]]},
        {"id": "called", "messages": [{"role": "User", "content": "Why me?"}, {**ASSISTANT, "tool_calls": []}]},
        {"id": "beside", "messages": [], "prompt": "Why not?", "response": "Because."},
        {"id": 5.0, "prompt": "2 + 3?", "response": "5.", "answer": 5, "family": 7},
        {"id": "half", "prompt": "1 / 2?", "response": "0.5.", "answer": 0.5},
        {
            "id": "plain",
            "prompt": "Why you?",
            "response": "Because.",
            "conversations": sharegpt("Why you?", "Because."),
        },
        *pairs(100),
    ]
    read = everything(jsonl(write(file, rows), near_duplicates=0.0))
    assert read["sharegpt"] == Prompt("sharegpt", [USER], "Because.")
    assert read["one"].messages == [brief, {**USER, "content": "Why now?"}]
    assert read["silent"] == Prompt("silent", [{**USER, "content": "Why this?"}], "Because.")
    assert read["null"].messages == [{**USER, "content": "Why that?"}]
    assert read["parts"].messages == [brief, {**USER, "content": "Why so?"}]
    assert (read["sides"].messages[0]["content"], read["sides"].human) == ("Why us?", "Why ")
    assert read["called"].messages == [{**USER, "content": "Why me?"}]
    assert read["beside"].messages == [{**USER, "content": "Why not?"}]
    assert (read["5"].answer, read["5"].family, read["half"].answer) == ("5", "7", "0.5")
    assert read["plain"].human == "Because."
    assert everything(jsonl(file, turns="all", near_duplicates=0.0))["sharegpt"].human == "So."


def test_turns_that_are_written_as_text(tmp_path: Path) -> None:
    """Conversations that were saved in a CSV file, as JSON or in Python's notation."""
    talk = [{"role": "user", "content": 'Why "so"?'}, {"role": "assistant", "content": "It's so."}]
    wanted = Prompt("x", talk[:1], talk[1]["content"])
    written = [json.dumps(talk), json.dumps(talk, indent=1), str(talk)]
    rows = [{"id": "x", field: text} for text in written for field in ("messages", "conversations", "chosen")]
    rows += [{"id": "x", "prompt": json.dumps(talk[:1]), "chosen": text} for text in written]
    rows += [{"id": "x", "prompt": json.dumps(talk[:1]), "response": json.dumps(talk[1:])}]
    rows += [{"id": "x", "prompt": talk[0]["content"], "chosen": json.dumps(talk)}]
    for row in rows:
        assert everything(jsonl(write(tmp_path / "rows.jsonl", [row, *pairs(100)])))["x"] == wanted, row
        save_csv(
            tmp_path / "rows.csv", [{**dict.fromkeys(pairs(1)[0]), **dict.fromkeys(row), **each} for each in [row]]
        )
        with pytest.raises(DataError, match="none of the 1 rows"):  # they are read, but there are too few
            Csv(path=str(tmp_path / "rows.csv"), **LIMITS).read()
    # a text that is no conversation stays a text
    for text in ('["a", "b"]', "[1] says so", '[{"role": "user"}]'):
        row = {"id": "x", "prompt": "Write a list.", "response": text}
        assert everything(jsonl(write(tmp_path / "rows.jsonl", [row, *pairs(100)])))["x"].human == text


@pytest.mark.parametrize(
    ("system", "user", "assistant"),
    [
        ("developer", "prompter", "bard"),
        ("System", "Human", "gpt4"),
        ("system", "user", "GPT-3.5-turbo"),
        ("developer", "user", "Claude"),
        ("system", "prompter", "chatbot"),
    ],
)
def test_roles_of_known_names(system: str, user: str, assistant: str, file: Path) -> None:
    talk = [
        {"from": system, "value": "Be brief."},
        {"from": user, "value": "Why?"},
        {"from": assistant, "value": "So."},
    ]
    read = everything(jsonl(write(file, [{"id": "x", "conversations": talk}, *pairs(100)])))["x"]
    assert read == Prompt("x", [{"role": "system", "content": "Be brief."}, USER], "So.")


def test_roles_that_a_setting_names(file: Path) -> None:
    talk = [{"role": "Narrator", "content": "Why?"}, {"role": "oracle", "content": "So."}]
    write(file, [{"id": "x", "messages": talk}, {"id": "y", "prompt": talk[:1], "chosen": talk}, *pairs(100)])
    named = jsonl(file, roles={"narrator": "user", "Oracle": "assistant"})
    assert everything(named)["x"] == Prompt("x", [USER], "So.")
    assert "roles" in named.identity()
    assert "roles" not in jsonl(file).identity()
    with pytest.raises(SettingsError, match=r"^data\.roles=.*narrator.*expected "):
        check(
            "data", {"_target_": "dnpo.data.files.JsonLines", "path": str(file), **LIMITS, "roles": {"narrator": "x"}}
        )


def test_two_forms_with_the_same_content(file: Path) -> None:
    """The form of UltraChat, UltraFeedback and others."""
    later = [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "So."}]
    rows = [
        {"id": "a", "prompt": "Why? ", "messages": [USER, ASSISTANT, *later]},
        {"id": "b", "prompt": "Why?", "chosen": [USER, ASSISTANT], "rejected": "No.", "messages": [USER, ASSISTANT]},
        {"id": "c", "prompt": "Why?", "response": "Because.", "messages": [USER, ASSISTANT], "conversation": None},
        {"id": "d", "prompt": "Why?", "response": "Because.", "chosen": [ASSISTANT], "messages": []},
        *pairs(100),
    ]
    read = everything(jsonl(write(file, rows), near_duplicates=0.0, holdout=0.5))
    assert all(row.human == "Because." for name, row in read.items() if name in "abcd")


def test_visible_characters_are_text(file: Path) -> None:
    texts = ["?", "👩\u200d🚀", "\u200f؟", "e\u0301", "न\u200d"]
    rows = [{"prompt": f"{text} {i}", "response": text} for i, text in enumerate(texts)]
    assert {row.human for row in everything(jsonl(write(file, [*pairs(100), *rows]))).values()} >= {*texts}


@pytest.mark.parametrize("indent", [None, 2])
def test_one_list_of_rows(tmp_path: Path, file: Path, indent: int | None) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\ufeff\n" + json.dumps(pairs(100), indent=indent))
    assert everything(jsonl(path)) == everything(jsonl(write(file, pairs(100))))
    path.write_text(json.dumps([*pairs(3), {"prompt": "a", "response": ""}], indent=indent))
    with pytest.raises(DataError, match=rf"^{path} row 3: response is empty"):
        jsonl(path).read()
    path.write_text(json.dumps(pairs(9), indent=indent)[:-9])
    with pytest.raises(DataError, match=rf"^{path}.*: not JSON \(.*expected one object a line, or one list of objects"):
        jsonl(path).read()
    path.write_text(json.dumps({"version": 1, "data": pairs(9)}, indent=indent))
    with pytest.raises(DataError, match=r"version, data; expected" if indent else "columns version, data; expected"):
        jsonl(path).read()


@pytest.mark.parametrize(("kind", "suffix"), [(JsonLines, ".jsonl"), (Csv, ".csv")])
def test_packed_files(kind: Any, suffix: str, tmp_path: Path, file: Path) -> None:
    """Recognised by their first bytes under any name, and in a folder by their extension."""
    plain, packed = tmp_path / f"rows{suffix}", tmp_path / "folder" / f"rows{suffix}.gz"
    packed.parent.mkdir()
    (save_csv if kind is Csv else write)(plain, pairs(100))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    expected = everything(kind(path=str(plain), **LIMITS))
    other = tmp_path / "other"
    shutil.copy(packed, other)
    for path in (packed, packed.parent, other):
        assert everything(kind(path=str(path), **LIMITS)) == expected
    shutil.copy(plain, packed.parent)
    with pytest.raises(DataError, match=rf"^data\.path={packed.parent}: rows{suffix} exists plain and packed"):
        kind(path=str(packed.parent), **LIMITS).read()
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(DataError, match=f"^{packed}: cannot be read to its end"):
        kind(path=str(packed), **LIMITS).read()


@pytest.mark.parametrize("kind", [JsonLines, Csv])
@pytest.mark.parametrize(
    ("content", "name"),
    [(b"PK\x03\x04rest", "zip"), (b"PAR1rest", "data=parquet"), ("id".encode("utf-16"), "UTF-16"), (b"BZh9", "bzip2")],
)
def test_values_that_are_not_text_are_named(kind: Any, content: bytes, name: str, file: Path) -> None:
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"^{file}: is .*{name}.*; expected text in UTF-8, plain or gzip"):
        kind(path=str(file), **LIMITS).read()


def test_unusable_rows_are_counted_by_reason(file: Path) -> None:
    bad = [{"prompt": "a", "response": ""}, '{"prompt"', {"prompt": "b", "response": " "}, {"prompt": ["c"]}]
    write(file, [*pairs(2), *bad, {"id": "r1", "prompt": "another", "response": "one"}, *pairs(98, start=2)])
    with pytest.raises(DataError) as caught:
        jsonl(file).read()
    lines = str(caught.value).split("\n       ")
    assert lines[0] == f"{file}:3: response is empty; expected text"
    assert lines[1:3] == ["5 of 105 rows cannot be used:", f"2: response is empty (the first is {file}:3)"]
    assert set(lines[3:6]) == {
        f"1: not JSON (the first is {file}:4)",
        f"1: no response (the first is {file}:6)",
        f"1: the id of another row (the first is {file}:7)",
    }
    assert "data.bad_rows=drop" in lines[6]
    dropping = jsonl(file, bad_rows="drop")
    rows, facts = dropping.read()
    assert sum(map(len, rows.values())) == 100
    assert facts["unusable"]["response is empty"] == {"rows": 2, "first": f"{file}:3"}
    assert sum(some["rows"] for some in facts["unusable"].values()) == 5
    assert dropping.identity() == {**jsonl(file).identity(), "bad_rows": "drop"}
    write(file, bad)
    with pytest.raises(DataError, match=f"^{file}:1: response is empty.*\n.*4 of 4 rows cannot be used"):
        jsonl(file, bad_rows="drop").read()
    with pytest.raises(SettingsError, match=r"^data\.bad_rows='skip'"):
        check("data", {"_target_": "dnpo.data.files.Csv", "path": "x", "bad_rows": "skip", **LIMITS})


@every_format
def test_unusable_rows_of_every_format(kind: Any, saved: Any, tmp_path: Path) -> None:
    path = tmp_path / f"rows{kind.suffix}"
    saved(path, [*pairs(100), *({"id": f"b{i}", "prompt": f"{i}?", "response": "\u200b"} for i in range(7))])
    with pytest.raises(DataError, match=r"7 of 107 rows cannot be used"):
        kind(path=str(path), **LIMITS).read()
    rows, facts = kind(path=str(path), bad_rows="drop", **LIMITS).read()
    assert sum(map(len, rows.values())) == 100
    assert [some["rows"] for some in facts["unusable"].values()] == [7]


def test_all_turns_or_the_first(file: Path) -> None:
    chat = [USER, {"role": "assistant", "content": "Guess."}, {"role": "user", "content": "No."}, ASSISTANT]
    rows = [{"id": "chat", "messages": [*chat, {"role": "user", "content": "Thanks."}]}, *pairs(100)]
    write(file, rows)
    assert everything(jsonl(file))["chat"] == Prompt("chat", [USER], "Guess.")
    assert everything(jsonl(file, turns="all"))["chat"] == Prompt("chat", chat[:3], "Because.")
    write(file, [{"id": "chat", "messages": [*chat[:2], {"role": "user", "content": ""}]}, *pairs(100)])
    assert everything(jsonl(file))["chat"].human == "Guess."
    with pytest.raises(DataError, match=rf"^{file}:1: messages\[2\]\.content is empty"):
        jsonl(file, turns="all").read()


def test_a_file_that_cannot_be_read_is_named_by_its_setting(tmp_path: Path, file: Path) -> None:
    for path, problem in (
        (tmp_path / "none.jsonl", "No such file"),
        (tmp_path, r"there is no \*.jsonl in this folder"),
    ):
        for call in (jsonl(path).identity, jsonl(path).read):
            with pytest.raises(DataError, match=f"^data.path={path}: {problem}"):
                call()
    for content in (b"", b"\n  \n"):
        file.write_bytes(content)
        with pytest.raises(DataError, match=f"^data.path={file}: there are no rows"):
            jsonl(file).read()
    file.write_bytes(json.dumps(pairs(1)[0]).encode() + '\n{"prompt": "café"'.encode("latin-1"))
    with pytest.raises(DataError, match=f"^{file}:2: not UTF-8"):
        jsonl(file).read()


# --- columns ----------------------------------------------------------------------------------------------------------


def test_columns_under_other_names(file: Path) -> None:
    """A mapped field is read from its column alone, and no other form of row is accepted."""
    chat = [USER, ASSISTANT]
    rows = [
        {"key": row["id"], "instruction": row["prompt"], "answer": row["response"], "prompt": "x", "messages": chat}
        for row in pairs(100)
    ]
    columns = {"id": "key", "prompt": "instruction", "response": "answer"}
    assert everything(jsonl(write(file, rows), columns=columns)) == everything(jsonl(write(file, pairs(100))))
    write(file, [{"better": row["response"], **row, "response": "worse"} for row in pairs(100)])
    assert everything(jsonl(file, columns={"chosen": "better"}))["r7"].human == "answer 7"
    write(file, [{"talk": [{**USER, "content": row["prompt"]}, ASSISTANT], **row} for row in pairs(100)])
    assert everything(jsonl(file, columns={"messages": "talk"}))["r7"].human == "Because."


def test_missing_columns_are_named(file: Path) -> None:
    write(file, [{"instruction": row["prompt"], "output": row["response"], "id": row["id"]} for row in pairs(9)])
    with pytest.raises(DataError, match=r"^data\.columns\.prompt=instrction: .*Did you mean instruction\?"):
        jsonl(file, columns={"prompt": "instrction"}).read()
    for columns in (None, {"prompt": "instruction"}):
        with pytest.raises(
            DataError, match=rf"^data\.path={file}: it has the columns instruction, output, id; expected"
        ):
            jsonl(file, columns=columns).read()
    with pytest.raises(SettingsError, match=r"^data\.columns=.*'id', 'prompt', 'response'"):
        check("data", {"_target_": "dnpo.data.files.Csv", "path": "x", "columns": {"promt": "x"}, **LIMITS})


ALPACA = [{"instruction": "Sum up.", "input": f"text number {i}", "output": f"answer {i}"} for i in range(99)] + [
    {"instruction": "Say hello.", "input": "", "output": "Hello."}
]


@pytest.mark.parametrize("missing", ["", None, "\u200b \n"])
def test_joined_columns(file: Path, missing: str | None) -> None:
    """Parts without text are left out, for every way to write no text."""
    write(file, [*ALPACA[:-1], {**ALPACA[-1], "input": missing}])
    columns = {"prompt": ["instruction", "input"], "response": "output"}
    asked = {row.messages[0]["content"]: row.human for row in everything(jsonl(file, columns=columns)).values()}
    assert len(asked) == 100
    assert asked["Sum up.\n\ntext number 7"] == "answer 7"
    assert asked["Say hello."] == "Hello."
    spaced = jsonl(file, columns=columns, join=" ")
    assert "Sum up. text number 7" in {row.messages[0]["content"] for row in everything(spaced).values()}
    assert spaced.identity() != jsonl(file, columns=columns).identity()
    assert jsonl(file, join=" ").identity() == jsonl(file).identity(), "nothing is joined"


@every_format
def test_joined_columns_of_every_format(kind: Any, saved: Any, tmp_path: Path) -> None:
    path = tmp_path / f"rows{kind.suffix}"
    saved(path, [{**row, "number": i} for i, row in enumerate(ALPACA)])
    columns = {"prompt": ["instruction", "input"], "response": "output", "id": ["number", "output"]}
    read = everything(kind(path=str(path), columns=columns, join="/", **LIMITS))
    assert read["7/answer 7"].messages == [{"role": "user", "content": "Sum up./text number 7"}]


def test_columns_that_cannot_be_joined_are_refused(file: Path) -> None:
    write(file, ALPACA)
    with pytest.raises(DataError, match=r"^data\.columns\.prompt=inptu: .*Did you mean input\?"):
        jsonl(file, columns={"prompt": ["instruction", "inptu"], "response": "output"}).read()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"messages": ["a", "b"]}, r"messages=.*: expected one column, or null"),
        ({"messages": []}, r"messages=.*: expected one column, or null"),
        ({"prompt": []}, r"prompt=\[\]: expected one column or several, or null"),
        ({"prompt": ["instruction", "instruction"]}, r"prompt=.*: names a column twice"),
        ({"answer": ["a", "b", "a"]}, r"answer=.*: names a column twice"),
        ({"prompt": "output", "response": "output"}, r"prompt=output: is also the column of response"),
        ({"prompt": ["a", "b"], "chosen": ["a", "b"]}, r"prompt=.*: is also the column of chosen"),
    ]
    for columns, message in wrong:
        with pytest.raises(SettingsError, match=rf"^columns\.{message}"):
            jsonl(file, columns=columns)
    assert jsonl(file, columns={"prompt": "a", "response": "b", "answer": "b"}).columns  # an answer may be the response
    write(file, [{**row, "input": [1]} for row in ALPACA])
    with pytest.raises(DataError, match=rf"^{file}:1: input is \[1\]; expected text"):
        jsonl(file, columns={"prompt": ["instruction", "input"], "response": "output"}).read()


def test_a_column_with_another_meaning_can_be_disconnected(file: Path) -> None:
    rows = [{**row, "id": "a", "prompt_id": 0.5, "answer": [i], "family": {}} for i, row in enumerate(pairs(100))]
    write(file, rows)
    with pytest.raises(DataError, match=r"'\{family: null\}' leaves the column out"):
        jsonl(file).read()
    unplugged = {"id": None, "answer": None, "family": None}
    read = everything(jsonl(file, columns=unplugged))
    assert len(read) == 100
    assert {(row.answer, row.family) for row in read.values()} == {(None, "")}
    with pytest.raises(DataError, match=rf"^{file}:2: .*the same id 'a' .*'\{{id: null\}}' leaves the column out"):
        jsonl(file, columns={"answer": None, "family": None}).read()
    write(file, [{**row, "messages": [USER]} for row in pairs(100)])
    assert len(everything(jsonl(file, columns={"messages": None}))) == 100


@every_format
def test_unread_columns_of_text_are_named(kind: Any, saved: Any, tmp_path: Path) -> None:
    def unread(rows: list[dict[str, Any]], **settings: Any) -> list[str]:
        path = tmp_path / f"rows{kind.suffix}"
        saved(path, rows)
        found: list[str] = kind(path=str(path), **LIMITS, **settings).read()[1]["unread"]
        return found

    other = [{**row, "source": "web", "rejected": "not this one", "n": 3} for row in ALPACA]
    renumbered = [{**row, "instruction": f"{row['instruction']} {i}"} for i, row in enumerate(other)]
    assert unread(renumbered, columns={"prompt": "instruction", "response": "output"}) == ["input"]
    with pytest.raises(DataError, match=r"removed 98 of these.* input: unread text"):
        unread(other, columns={"prompt": "instruction", "response": "output"})
    assert unread(other, columns={"prompt": ["instruction", "input"], "response": "output"}) == []
    assert unread([{**row, "answer": "some words"} for row in pairs(100)], columns={"answer": None}) == []
    last = [*pairs(99), {**pairs(1, start=99)[0]}]
    assert unread([{**row, "system": "你好" if row is last[-1] else ""} for row in last]) == ["system"]
    if kind is not Csv:
        assert unread([{**row, "history": [["Say hello.", "Hello."]]} for row in pairs(100)]) == ["history"]


def test_alpaca_files_are_refused_with_the_mapping_to_use(file: Path) -> None:
    with pytest.raises(DataError, match=r"\{prompt: \[instruction, input\], response: output\}"):
        jsonl(write(file, ALPACA)).read()


# --- formats ----------------------------------------------------------------------------------------------------------


@every_format
def test_every_format_gives_the_same_rows(kind: Any, saved: Any, tmp_path: Path, file: Path) -> None:
    """From one file, from a folder of several, and from a pattern; a sample too."""
    rows = [{**row, "prompt": f'{row["prompt"]},\n"Ünï日本🦉"\u2028', "answer": row["response"]} for row in pairs(300)]
    expected = jsonl(write(file, rows))
    one, folder = tmp_path / f"one{kind.suffix}", tmp_path / "folder"
    folder.mkdir()
    saved(one, rows)
    for i in range(3):
        saved(folder / f"part-{i}{kind.suffix}", rows[100 * i : 100 * (i + 1)])
    (folder / "README.md").write_text("not rows")
    for path in (one, folder, f"{folder}/part-*"):
        for settings in ({}, {"sample": 120, "seed": 4}):
            source = kind(path=str(path), **LIMITS, **settings)
            assert whole(source) == whole(jsonl(file, **settings)), (path, settings)
    assert len(everything(expected)) == 300


@every_format
def test_adding_rows_moves_no_row_to_another_split_in_any_format(kind: Any, saved: Any, tmp_path: Path) -> None:
    path = tmp_path / f"rows{kind.suffix}"
    saved(path, pairs(200))
    few = places(kind(path=str(path), holdout=0.2, **LIMITS))
    saved(path, [*pairs(300, start=200), *pairs(200)])
    many = places(kind(path=str(path), holdout=0.2, **LIMITS))
    assert len(few) == 200
    assert few.items() <= many.items()


@every_format
def test_identity_and_problems_of_every_format(kind: Any, saved: Any, tmp_path: Path) -> None:
    def source(path: Path | str, **settings: Any) -> Any:
        return kind(path=str(path), **LIMITS, **settings)

    one, other = (tmp_path / f"{name}{kind.suffix}" for name in "ab")
    saved(one, pairs(9))
    saved(other, pairs(9))
    assert source(one).identity() == source(other).identity()
    assert str(tmp_path) not in json.dumps(source(one).identity())
    with_another_name = (JsonLines if kind is not JsonLines else Csv)(path=str(one), **LIMITS)
    assert with_another_name.identity() != source(one).identity(), "read as another format it is something else"
    saved(other, pairs(8))
    assert source(one).identity() != source(other).identity() != source(tmp_path).identity()
    for name, value in {"turns": "all", "near_duplicates": 0.5, "columns": {"answer": "x"}, "holdout": 0.3}.items():
        assert source(one, **{name: value}).identity() != source(one).identity(), name
    assert source(one, long_responses="drop").identity() == source(one).identity()  # stages handle long rows
    with pytest.raises(DataError, match=rf"^data\.path={tmp_path}/none\*: No such file; .*\{kind.suffix}"):
        source(f"{tmp_path}/none*").read()
    (tmp_path / "above" / "train").mkdir(parents=True)
    with pytest.raises(
        DataError, match=rf"^data\.path={tmp_path}/above: there is no \*\{kind.suffix} .*there is train/"
    ):
        source(tmp_path / "above").read()
    with pytest.raises(DataError, match=r"^data\.columns\.prompt=promt: .*Did you mean prompt"):
        source(one, columns={"prompt": "promt"}).read()
    saved(other, [{"instruction": "a", "output": "b"}])
    with pytest.raises(DataError, match=rf"^data\.path={other}: it has the columns instruction, output; expected"):
        source(other, columns={"prompt": "instruction"}).read()
    saved(other, [*pairs(4), {"id": "x", "prompt": "a", "response": " "}])
    with pytest.raises(DataError, match=rf"^{other}(:| row )\d: response is empty"):
        source(other).read()


@pytest.mark.parametrize("kind", [Parquet, Arrow])
def test_columns_hold_conversations_too(kind: Any, tmp_path: Path) -> None:
    rows = [{"prompt": [{**USER, "content": f"Is {i}?"}], "chosen": [ASSISTANT], "n": i} for i in range(100)]
    path = tmp_path / f"rows{kind.suffix}"
    dict(FORMATS)[kind](path, rows)
    read = everything(kind(path=str(path), **LIMITS))
    assert {row.messages[0]["content"] for row in read.values()} == {f"Is {i}?" for i in range(100)}
    assert {row.human for row in read.values()} == {"Because."}


def test_a_folder_saved_by_datasets_is_read(tmp_path: Path, file: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list(pairs(300))
    rows.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    read = whole(Arrow(path=str(tmp_path / "saved"), **LIMITS))
    assert read == whole(jsonl(write(file, pairs(300))))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match=r"there is no \*\.arrow in this folder; .*there is train/"):
        Arrow(path=str(tmp_path / "splits"), **LIMITS).read()
    assert len(everything(Arrow(path=str(tmp_path / "splits" / "train"), **LIMITS))) == 300


@pytest.mark.parametrize("kind", [Parquet, Arrow])
def test_a_file_of_another_format_is_named(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / f"rows{kind.suffix}"
    path.write_text("prompt,response\na,b\n")
    with pytest.raises(DataError, match=rf"^{path}: cannot be read as {kind.__name__} \("):
        kind(path=str(path), **LIMITS).read()


@pytest.mark.parametrize("name", [b"prompt", b"zzzz"])
def test_a_damaged_name_or_text_is_named_by_its_file(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.Table.from_pylist([{**row, "zzzz": "some text"} for row in pairs(50)])
    pq.write_table(table, path, compression="none", store_schema=False, use_dictionary=False)
    whole = path.read_bytes()
    for damaged in (whole.replace(name, b"\xff" * len(name)), whole.replace(b"question 7", b"question\xff7")):
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"^{path}: cannot be read as Parquet \("):
            Parquet(path=str(path), **LIMITS).read()


def test_files_whose_columns_differ_in_type(tmp_path: Path) -> None:
    save_parquet(tmp_path / "a.parquet", pairs(5))
    save_parquet(tmp_path / "b.parquet", [{"prompt": [USER], "response": [ASSISTANT]}])
    with pytest.raises(DataError, match=rf"^data\.path={tmp_path}: its files differ in the types of their columns"):
        Parquet(path=str(tmp_path), **LIMITS).read()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'id,prompt,response\n\n1,a,b\n2,"a\nb",c\n3,a\n', r"{}:6: 2 cells, but the header has 3"),
        (b"id,prompt,response\n1,a,b,c\n", r"{}:2: 4 cells, but the header has 3"),
        (b'id,prompt,response\n1,"a"b,c\n', r"{}:2: not CSV \(.*expected comma-separated values with a header"),
        (b'id,prompt,response\n1,a,b\n2,"a\n,b\n', r"{}:3: not CSV \("),
        (b"id,prompt,prompt\n1,a,b\n", r"{}:1: a column name occurs twice"),
        (b"a;question, all;c\n1;a;b\n", r"{}:2: 1 cells, but the header has 2\. If ';' separates .*save the file"),
        (b"a;b, c;d\n1;a,x;b\n", r"data\.path={}: it has the columns a;b,  c;d; .*If ';' separates .*save the file"),
        (b"a|b,c|d\n1|a,b|c\n", r"data\.path={}: it has the columns .*If '|' separates"),
        (b"id;prompt|response\n1;a|b\n", r"data\.path={}: it has the columns id;prompt\|response; expected"),
        (b"id,prompt,response\n1,a,\n", r"{}:2: no response"),
        ("id,prompt,response\n1,café,b\n".encode("latin-1"), r"{}: not UTF-8 .*iconv -f WINDOWS-1252 -t UTF-8"),
        ("id;prompt;response\n1;“a”;b\n".encode("cp1252"), r"{}: not UTF-8 .*save the file in UTF-8"),
        (b"id,prompt,response\n", r"data\.path={}: there are no rows"),
        (b"", r"data\.path={}: there are no rows"),
    ],
    ids=lambda value: str(value)[-20:],
)
def test_a_csv_that_cannot_be_used(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(text)
    with pytest.raises(DataError, match="^" + message.format(path)):
        Csv(path=str(path), **LIMITS).read()


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_a_header_with_a_comma_and_another_separator(tmp_path: Path, mark: str) -> None:
    """The separator is clear if only one of them gives known names."""
    path = tmp_path / "rows.csv"
    lines = [
        ["id", "prompt", "response", "notes, if any"],
        *([f"r{i}", f"question {i}", "a, b", ""] for i in range(100)),
    ]
    path.write_text("".join(mark.join(line) + "\n" for line in lines))
    assert everything(Csv(path=str(path), **LIMITS))["r7"].human == "a, b"
    path.write_text(f"id,prompt,response,a{mark}b\n" + "".join(f"r{i},question {i},b,\n" for i in range(100)))
    assert everything(Csv(path=str(path), **LIMITS))["r7"].human == "b"


def test_json_lines_in_another_encoding_are_refused_with_advice(file: Path) -> None:
    file.write_bytes(json.dumps({"prompt": "café", "response": "b"}, ensure_ascii=False).encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=rf"^{file}:1: not UTF-8 .*iconv -f WINDOWS-1252 -t UTF-8"):
        jsonl(file).read()


def test_a_csv_keeps_text_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    long = "word " * 100_000
    path.write_bytes(
        "".join(
            [
                "\ufeffid,prompt,response,answer\r\n",
                *(f"{i},0{i}.0?,{i:03d},\r\n" for i in range(100)),
                f'x,y,"{long}",1\r\n',
            ]
        ).encode()
    )
    read = everything(Csv(path=str(path), **LIMITS))
    assert read["7"] == Prompt("7", [{"role": "user", "content": "07.0?"}], "007")
    assert (read["x"].human, read["x"].answer) == (long, "1")


# --- splits, sample, identity -----------------------------------------------------------------------------------------


def test_adding_rows_moves_no_row_to_another_split(file: Path) -> None:
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
    message = rf"^data\.holdout={holdout}: none of the 50 rows is left for {split}\. .* 0 into {split}"
    with pytest.raises(DataError, match=message):
        jsonl(write(file, pairs(50)), holdout=holdout).read()


def test_a_held_out_prompt_is_never_trained_on(file: Path) -> None:
    """No prompt occurs twice: held-out rows are kept before others, and of others the first."""
    rows = pairs(200)
    held = {name for name, split in places(jsonl(write(file, rows))).items() if split != "train"}
    again = [{**row, "id": f"again-{row['id']}", "response": "otherwise"} for row in rows]
    kept, facts = jsonl(write(file, rows + again)).read()
    prompts = [row.messages[-1]["content"] for some in kept.values() for row in some]
    assert sorted(prompts) == sorted(row["prompt"] for row in rows)
    assert facts["removed"]["equal_to_held_out"] > len(held) // 2
    assert facts["removed"]["equal_to_held_out"] + facts["removed"]["equal_to_earlier"] == 200
    assert held <= {row.id.removeprefix("again-") for split in SPLITS[1:] for row in kept[split]}
    assert [facts[f"{split}_rows"] for split in SPLITS] == [len(kept[split]) for split in SPLITS]


def test_near_duplicates_are_removed_from_the_threshold_on(file: Path) -> None:
    rows = [{**row, "prompt": " ".join(f"w{i}x{n}" for n in range(40))} for i, row in enumerate(pairs(200))]
    where = places(jsonl(write(file, rows)))
    held = next(row for row in rows if where[row["id"]] == "test")
    train = next(row for row in rows if where[row["id"]] == "train")
    # The last word is in one of 38 shingles, so 37 of 39 are common; punctuation at the end is in no shingle.
    marked = [{**row, "id": f"!{row['id']}", "prompt": row["prompt"] + "!"} for row in (held, train)]
    changed = [{**row, "id": f"+{row['id']}", "prompt": row["prompt"] + "9"} for row in (held, train)]
    write(file, [*rows, *marked, *changed])
    for threshold, removed in ((0.0, 0), (0.9, 4), (37 / 39, 4), (0.96, 2), (1.0, 2)):
        facts = jsonl(file, near_duplicates=threshold).read()[1]["removed"]
        assert facts["near_earlier"] + facts["near_held_out"] == removed, threshold
        assert facts["equal_to_earlier"] == facts["equal_to_held_out"] == 0
    system = {"role": "system", "content": "Be brief. " * 50}
    write(file, [{"messages": [system, {**USER, "content": f"Is {i}?"}, ASSISTANT]} for i in range(100)])
    assert len(everything(jsonl(file))) == 100, "system turns do not count"


def test_two_removed_rows_are_shown(file: Path) -> None:
    """They are shown from their first difference on, after a common beginning of any length."""
    form = "the same words as before " * 9
    rows = [*pairs(100), *({"id": f"n{i}", "prompt": f"{form}, end{'!' * i}", "response": "a"} for i in range(4))]
    facts = jsonl(write(file, [*rows, {**rows[0], "id": "again"}])).read()[1]
    assert facts["removed"]["near_earlier"] + facts["removed"]["near_held_out"] == 3
    assert len(facts["examples"]) == 2
    assert all(re.fullmatch(r"n\d is like n\d \(1\.00: “….*end!*” and “….*end!*”\)", it) for it in facts["examples"])
    (example,) = jsonl(write(file, [*pairs(100), {**pairs(1)[0], "id": "again"}])).read()[1]["examples"]
    assert example in {
        f"{a} is like {b} (1.00: “question 0” and “question 0”)" for a, b in (("again", "r0"), ("r0", "again"))
    }
    assert jsonl(write(file, pairs(100))).read()[1]["examples"] == []


def test_a_long_comparison_is_announced(file: Path, monkeypatch: Any, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("dnpo.data.distinct.SILENT", 0.0)
    monkeypatch.setattr("dnpo.data.distinct.INTERVAL", 0.0)
    jsonl(write(file, pairs(50))).read()
    assert capfd.readouterr().err.splitlines()[-1] == "comparing prompts: 50 of 50"


def test_a_split_emptied_by_duplicates_is_reported(file: Path) -> None:
    write(file, [{**row, "prompt": "always this"} for row in pairs(100)])
    with pytest.raises(DataError, match=r"data\.near_duplicates=0\.9 removed 99 of these"):
        jsonl(file).read()


def test_reading_again_gives_the_same_rows_even_if_the_caller_changed_them(file: Path) -> None:
    source = jsonl(write(file, pairs(100)))
    rows, facts = source.read()
    assert whole(source) == ({split: list(some) for split, some in rows.items()}, facts)
    rows.clear()
    facts["train"] = {}
    again, facts = source.read()
    assert again["train"]
    assert "train" not in facts


def test_the_identity_depends_on_the_content(tmp_path: Path) -> None:
    one, other = (jsonl(write(tmp_path / name, pairs(9))) for name in ("a.jsonl", "b.jsonl"))
    assert one.identity() == other.identity()
    assert str(tmp_path) not in json.dumps(one.identity())
    write(tmp_path / "b.jsonl", pairs(8))
    assert one.identity() != other.identity()
    a = tmp_path / "a.jsonl"
    assert jsonl(a, seed=1).identity() == one.identity()
    assert jsonl(a, seed=1, sample=3).identity() != jsonl(a, seed=2, sample=3).identity()
    assert jsonl(a, sample=3).identity() != one.identity() != jsonl(a, holdout=0.2).identity()


def test_settings_are_checked_by_the_signature() -> None:
    given = {"_target_": "dnpo.data.files.JsonLines", "path": "x", "holdout": 0, **LIMITS}
    assert check("data", given)["holdout"] == 0.0
    assert check("data", {"_target_": "dnpo.data.hub.Hub", "name": "x", "config": None, "revision": None, **LIMITS})


def test_real_rows() -> None:
    path = SHARED / "sft_rasbt.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not here: the shared data lie outside the repository")
    rows, facts = jsonl(path).read()
    assert sum(map(len, rows.values())) + sum(facts["removed"].values()) == 1100
    assert 20 < sum(facts["removed"].values()) < 50
    assert all(row.id.startswith("rasbt-") for some in rows.values() for row in some)


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_hub(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """No test connects to the hub, and each has its own cache."""
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
    """Writes rows as a split of a data set in the hub's layout, and returns its folder."""

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
    assert whole(hub(folder)) == whole(jsonl(write(file, pairs(300))))
    assert whole(hub(folder, sample=200, seed=5)) == whole(jsonl(file, sample=200, seed=5))


def test_hub_folder_of_json_lines(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", [*pairs(100), {"prompt": "No id?", "response": "None."}])
    assert len(everything(hub(tmp_path / "set"))) == 101


def test_a_hub_folder_is_preferred_to_anything_else_of_its_name(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
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
        ({"id": "r2", "prompt": "a", "response": "b"}, r"{}\[train\] row 2 has the same id 'r2'"),
    ],
)
def test_hub_bad_rows_are_named_by_split_and_number(save: Save, row: dict[str, Any], problem: str) -> None:
    folder = save([*pairs(5), row])
    with pytest.raises(DataError, match=rf"^{folder}\[train\] row 5: {problem.format(folder)}"):
        hub(folder).read()


def test_hub_rows_without_an_id_column(save: Save) -> None:
    rows = [{"prompt": f"{i}?", "response": "Yes."} for i in range(100)]
    assert len(everything(hub(save(rows)))) == 100
    assert len(everything(hub(save([*rows, rows[4]], folder="twice")))) == 100
    folder = save([{"text": "some"}], folder="text")
    with pytest.raises(
        DataError, match=rf"^data\.name={folder}: it has the columns text; expected prompt and response"
    ):
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


def test_the_identity_of_a_hub_folder_depends_on_the_content(save: Save) -> None:
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
        "rows": 4,
        "columns": {},
        "turns": "first",
        "sample": 0,
        "holdout": 0.1,
        "near_duplicates": 0.9,
    }
    assert len(everything(source)) == 100


def test_hub_offline_uses_the_cache_but_no_other_commit(save: Save, no_hub: Path) -> None:
    """The library's cache of a data set of the hub: its folders are named by name and commit."""
    hub(save(pairs(100))).read()
    (made,) = (no_hub / "set" / "default" / "0.0.0").glob("*/dataset_info.json")
    commit = "d" * 40
    there = no_hub / "someone___set" / "default" / "0.0.0" / commit
    shutil.copytree(made.parent, there)
    assert len(everything(hub("someone/set"))) == 100
    assert len(everything(hub("someone/set", revision=commit))) == 100
    with pytest.raises(DataError, match=rf"^data\.revision={'e' * 40}: .*give data\.revision={commit}"):
        hub("someone/set", revision="e" * 40).read()
