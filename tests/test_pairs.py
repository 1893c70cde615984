"""Pairs of the data: every form and format, invalid pairs, and the contents of the stage."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dnpo.data.files import Csv, Files, JsonLines
from dnpo.data.rows import SCORES
from dnpo.errors import DataError
from dnpo.records import GIVEN, Prompt, Response
from dnpo.stages.before import prepare
from dnpo.stages.files import open_given, read_split, write_preferences
from dnpo.store import Stage, Store
from dnpo.tables import read
from dnpo.tracking.datasets import list_datasets
from tests.conftest import SHARED, Report, World
from tests.test_files import FORMATS, LIMITS, Save, every_format, everything, hub, jsonl, save, write

__all__ = ["save"]  # a fixture

SYSTEM = {"role": "system", "content": "Be brief."}


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def plain(n: int = 100) -> list[dict[str, Any]]:
    return [{"id": f"r{i}", "prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(n)]


def within(row: dict[str, Any], *before: dict[str, str]) -> dict[str, Any]:
    """The same pair as whole conversations, without a prompt."""
    shared = [*before, said("user", row["prompt"])]
    sides = {side: [*shared, said("assistant", row[side])] for side in ("chosen", "rejected")}
    return {"id": row["id"], **sides}


def apart(row: dict[str, Any], *before: dict[str, str]) -> dict[str, Any]:
    """The same pair as lists of turns, with the prompt apart."""
    sides = {side: [said("assistant", row[side])] for side in ("chosen", "rejected")}
    return {"id": row["id"], "prompt": [*before, said("user", row["prompt"])], **sides}


def expected(n: int = 100, *before: dict[str, str], scores: bool = False) -> dict[str, Prompt]:
    return {
        f"r{i}": Prompt(
            f"r{i}",
            [*before, said("user", f"question {i}")],
            f"good {i}",
            rejected=f"bad {i}",
            human_score=i / 2 if scores else None,
            rejected_score=-1.0 if scores else None,
        )
        for i in range(n)
    }


# --- forms and formats


@every_format
def test_texts_of_every_format(kind: type[Files], saved: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / f"rows{kind.suffix}"
    saved(path, plain())
    assert everything(kind(path=str(path), **LIMITS)) == expected()
    saved(path, [{**row, "score_chosen": i / 2, "score_rejected": -1} for i, row in enumerate(plain())])
    assert everything(kind(path=str(path), **LIMITS)) == expected(scores=True)


@pytest.mark.parametrize(("kind", "saved"), [each for each in FORMATS if each[0] is not Csv])
@pytest.mark.parametrize("form", [within, apart])
def test_conversations_of_every_format(
    kind: type[Files], saved: Callable[..., Any], form: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / f"rows{kind.suffix}"
    for before in ([], [SYSTEM], [said("user", "Hello."), said("assistant", "Yes?")]):
        saved(path, [form(row, *before) for row in plain()])
        source = kind(path=str(path), near_duplicates=0.0, **LIMITS)
        assert everything(source) == expected(100, *before)


def test_hub_pairs(save: Save) -> None:
    """As in UltraFeedback binarized: a separate prompt, whole conversations, and the chosen one again as messages."""
    rows = []
    for i, row in enumerate(plain()):
        both = within(row)
        rows.append(both | {"prompt": row["prompt"], "messages": both["chosen"]})
        rows[-1] |= {"score_chosen": i / 2, "score_rejected": -1.0}
    assert everything(hub(save(rows))) == expected(scores=True)


def test_sides_may_have_different_forms(tmp_path: Path) -> None:
    """A text, one turn or the whole conversation, independently for prompt, chosen and rejected."""
    question, good, bad = said("user", "Why?"), said("assistant", "Because."), said("assistant", "Who cares?")
    prompts: list[Any] = ["Why?", [question]]
    chosen: list[Any] = ["Because.", [good], [question, good]]
    rejected: list[Any] = ["Who cares?", [bad], [question, bad]]
    for forms in itertools.product(prompts, chosen, rejected):
        row = dict(zip(("prompt", "chosen", "rejected"), forms, strict=True))
        found = everything(jsonl(write(tmp_path / "rows.jsonl", [{**row, "id": "x"}, *plain()])))["x"]
        assert found == Prompt("x", [question], "Because.", rejected="Who cares?"), row


@pytest.mark.parametrize("nothing", [None, [], "absent"])
def test_rows_with_and_without_pairs_in_one_file(tmp_path: Path, nothing: Any) -> None:
    gone = {} if nothing == "absent" else {"rejected": nothing}
    chosen = [{"id": f"c{i}", "prompt": f"other {i}", "chosen": "Fine.", **gone} for i in range(50)]
    answered = [{"id": f"a{i}", "prompt": f"another {i}", "response": "Fine.", **gone} for i in range(50)]
    read = everything(jsonl(write(tmp_path / "rows.jsonl", [*plain(), *chosen, *answered])))
    assert {name: row for name, row in read.items() if name.startswith("r")} == expected()
    others = [row for name, row in read.items() if not name.startswith("r")]
    assert len(others) == 100
    assert {(row.human, row.rejected, row.human_score) for row in others} == {("Fine.", None, None)}


@pytest.mark.parametrize("names", list(zip(SCORES["chosen"], SCORES["rejected"], strict=True)))
def test_ratings_under_the_names_in_common_data(tmp_path: Path, names: tuple[str, str]) -> None:
    for scores in ((9.5, 2), ("9.5", "2")):  # CSV has them as text
        rows = [{**row, **dict(zip(names, scores, strict=True))} for row in plain()]
        found = everything(jsonl(write(tmp_path / "rows.jsonl", rows)))["r7"]
        assert (found.human_score, found.rejected_score) == (9.5, 2.0)


def test_columns_of_other_names(tmp_path: Path) -> None:
    """A mapped form excludes the others: with response or messages mapped, there is no pair."""
    file = tmp_path / "rows.jsonl"
    rows = [
        {"key": row["id"], "q": row["prompt"], "good": row["chosen"], "bad": row["rejected"], "stars": i / 2, "low": -1}
        for i, row in enumerate(plain())
    ]
    names = {"id": "key", "prompt": "q", "chosen": "good", "rejected": "bad"}
    assert everything(jsonl(write(file, rows), columns=names)) == expected()
    rated = {**names, "chosen_score": "stars", "rejected_score": "low"}
    assert everything(jsonl(file, columns=rated)) == expected(scores=True)
    alone = {"id": "key", "prompt": "q", "response": "good", "chosen_score": "stars"}
    assert everything(jsonl(file, columns=alone))["r8"].human_score == 4.0
    for columns in ({"rejected": None}, {"response": "reply"}):
        unpaired = everything(jsonl(write(file, [{**row, "reply": row["chosen"]} for row in plain()]), columns=columns))
        assert unpaired["r7"] == Prompt("r7", [said("user", "question 7")], "good 7")


# --- invalid pairs


PAIR = {"prompt": "Why?", "chosen": "Because.", "rejected": "Who cares?"}
TALK = [said("user", "Why?"), said("assistant", "Because.")]
OTHER = [said("user", "Why so?"), said("assistant", "Who cares?")]
BAD = [
    ({**PAIR, "rejected": "Because."}, "chosen and rejected are the same", "'Because.'"),
    ({**PAIR, "rejected": TALK}, "chosen and rejected are the same", "'Because.'"),
    ({**PAIR, "rejected": " "}, "rejected is empty", "expected text"),
    ({**PAIR, "rejected": 3}, "rejected is not text", "rejected is 3"),
    ({**PAIR, "rejected": OTHER}, "rejected does not begin with the prompt", "with the prompt's turns first"),
    ({**PAIR, "rejected": TALK[:1]}, "rejected has a turn of another role", "expected assistant"),
    ({"chosen": TALK, "rejected": OTHER}, "chosen and rejected differ before their last turns", "one conversation"),
    (
        {"chosen": [*TALK, *OTHER], "rejected": [*TALK[:1], *OTHER[1:]]},
        "chosen and rejected differ before their last turns",
        "one conversation",
    ),
    ({"chosen": TALK, "rejected": "Who cares?"}, "no prompt", "the row has chosen, rejected"),
    ({"prompt": "Why?", "rejected": "Who cares?"}, "no response", "the row has prompt, rejected"),
    ({**PAIR, "response": "So."}, "response and chosen differ", "'{response: null}' or"),
    ({**PAIR, "messages": OTHER}, "messages and prompt differ", "'{messages: null}' or"),
    ({"prompt": "Why?", "response": "So.", "rejected": "No."}, "rejected without chosen", "'{chosen: response}'"),
    ({"messages": TALK, "rejected": OTHER}, "rejected without chosen", "'{chosen: messages}'"),
    ({**PAIR, "chosen_score": "high"}, "chosen_score is not a number", "'high'; expected a number"),
    ({**PAIR, "rejected_rating": True}, "rejected_rating is not a number", "True; expected a number"),
    ({**PAIR, "score_rejected": float("nan")}, "score_rejected is not a number", "expected a number"),
    ({**PAIR, "score_rejected": float("inf")}, "score_rejected is not a number", "expected a number"),
    (
        {**PAIR, "score_chosen": 1, "chosen_rating": 2},
        "score_chosen and chosen_rating differ",
        "{chosen_score: score_c",
    ),
]


@pytest.mark.parametrize(("row", "reason", "told"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_pair_is_named_and_counted_by_its_reason(tmp_path: Path, row: Any, reason: str, told: str) -> None:
    file = write(tmp_path / "rows.jsonl", [*plain(2), row, *plain()[2:], row])
    with pytest.raises(DataError) as caught:
        jsonl(file).read()
    assert str(caught.value).startswith(f"{file}:3: ")
    assert told in str(caught.value)
    assert f"2: {reason} (the first is {file}:3)" in str(caught.value)
    rows, facts = jsonl(file, bad_rows="drop").read()
    assert facts["unusable"] == {reason: {"rows": 2, "first": f"{file}:3"}}
    assert sum(map(len, rows.values())) == 100


def test_a_second_form_with_the_same_content_does_no_harm(tmp_path: Path) -> None:
    for more in (
        {"messages": TALK},
        {"response": "Because."},
        {"messages": []},
        {"score_chosen": 1, "chosen_score": 1},
    ):
        found = everything(jsonl(write(tmp_path / "rows.jsonl", [{**PAIR, "id": "x", **more}, *plain()])))["x"]
        assert (found.human, found.rejected) == ("Because.", "Who cares?")


def test_pairs_that_differ_in_the_rejected_response_alone_are_other_rows(tmp_path: Path) -> None:
    """Rows without an id get two ids; the second is removed as a repeated prompt, and counted."""
    file = write(tmp_path / "rows.jsonl", [PAIR, PAIR, {**PAIR, "rejected": "Go away."}, *plain()])
    removed = jsonl(file).read()[1]["removed"]
    assert removed["repeated"] == 1
    assert removed["equal_to_earlier"] + removed["equal_to_held_out"] == 1
    with pytest.raises(DataError, match="another answer, family or score"):
        jsonl(write(file, [PAIR, {**PAIR, "chosen_score": 3}, *plain()])).read()


def test_of_two_rows_with_one_prompt_the_one_with_a_pair_is_kept(tmp_path: Path) -> None:
    """For any order of the rows, which does not change; a held-out prompt is still removed from training."""
    paired = plain(60)
    alone = [{"id": f"s{i}", "prompt": row["prompt"], "response": row["chosen"]} for i, row in enumerate(plain(100))]
    rows = {}
    for name, some in {"before": [*paired, *alone], "after": [*alone, *paired]}.items():
        rows[name], facts = jsonl(write(tmp_path / "rows.jsonl", some), near_duplicates=0.0).read()
        assert sum(facts["removed"].values()) == 60
    kept = {name: {row.id for row in found["train"]} for name, found in rows.items()}
    assert kept["before"] == kept["after"]
    assert sum(name.startswith("r") for name in kept["after"]) > 40
    ids = [row.id for row in rows["after"]["train"]]
    assert ids == sorted(ids, key=[row["id"] for row in [*alone, *paired]].index)


# --- the stage


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


def stage_of(world: World, file: Path, **settings: Any) -> Stage:
    data = JsonLines(path=str(file), **{"max_prompt_tokens": 100, "max_response_tokens": 40} | settings)
    run: Any = SimpleNamespace(data=data, model=Model(world), limit=data.max_response_tokens, sft_rows=0, device="cpu")
    return prepare(run, None)


def prepared(world: World, file: Path, folder: Path, report: Report, **settings: Any) -> dict[str, Any]:
    folder.mkdir()
    return dict(stage_of(world, file, **settings).work(folder, {}, report))


WORDS = "one two three four five six seven eight nine ten " * 3


@pytest.mark.parametrize("way", ["cut", "drop"])
def test_rejected_responses_are_encoded_as_chosen_ones(world: World, tmp_path: Path, report: Report, way: Any) -> None:
    """Swapping the sides swaps the two files, cut and dropped rows included."""
    rows = [
        {
            **row,
            "chosen": f"{row['chosen']} {WORDS if i % 5 == 0 else ''}",
            "rejected": f"{row['rejected']} {WORDS if i % 3 == 0 else ''}",
        }
        for i, row in enumerate(plain())
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    facts = prepared(world, file, tmp_path / "one", report, long_responses=way)
    write(file, [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows])
    prepared(world, file, tmp_path / "other", Report(), long_responses=way)
    for split in ("train", "validation", "test"):
        held, given = read_split(tmp_path / "one", split), open_given(tmp_path / "one", split)
        other, swapped = read_split(tmp_path / "other", split), open_given(tmp_path / "other", split)
        assert [r.id for r in given] == [p.id for p in held.prompts] == [r.id for r in held.human]
        assert {r.source for r in given} <= {GIVEN}
        assert contents(given) == contents(other.human)
        assert contents(swapped) == contents(held.human)
        long = sum(int(p.id[1:]) % 3 == 0 for p in held.prompts)
        assert sum(r.finish == "length" for r in given) == long
        assert facts[split]["pairs"] == len(given)
        assert (long == 0) == (way == "drop")
        if way == "cut":
            assert facts[split]["given_cut"] == long
    assert any(f"rejected responses of train are longer than 40 tokens: {way}" in note for note in report.notes)


def contents(responses: Any) -> list[tuple[Any, ...]]:
    return [(r.id, r.text, r.token_ids, r.tokens, r.finish) for r in responses]


def test_pairs_with_the_same_tokens_on_both_sides_are_left_out(world: World, tmp_path: Path, report: Report) -> None:
    """They differ only in the part that is cut, or in spaces that the template removes."""
    rows = plain()
    for row in rows[::4]:
        row |= {"chosen": f"{WORDS} yes", "rejected": f"{WORDS} no"}
    facts = prepared(world, write(tmp_path / "rows.jsonl", rows), tmp_path / "one", report)
    held, given = read_split(tmp_path / "one", "train"), {r.id for r in open_given(tmp_path / "one", "train")}
    same = {p.id for p in held.prompts if int(p.id[1:]) % 4 == 0}
    assert facts["train"]["given_same"] == len(same) > 0
    assert given == {p.id for p in held.prompts} - same
    assert {p.id for p in held.prompts if p.rejected is None} == same
    assert any("have the same tokens on both sides" in note for note in report.notes)


def test_data_without_pairs_add_no_files(world: World, tmp_path: Path, report: Report) -> None:
    rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in plain()]
    facts = prepared(world, write(tmp_path / "rows.jsonl", rows), tmp_path / "one", report)
    assert set(facts["train"]) == {"rows", "too_long", "human_cut"}
    assert not list((tmp_path / "one").glob("*given*"))
    assert not open_given(tmp_path / "one", "train")
    assert read(tmp_path / "one" / "train-human.parquet", Response)


def test_a_split_with_pairs_is_one_data_set_with_its_rejected_responses(
    world: World, tmp_path: Path, report: Report
) -> None:
    """Files with responses are not data sets; the digest covers both sides."""
    digests = []
    for word in ("bad", "worse"):
        file = write(tmp_path / "rows.jsonl", [{**row, "rejected": f"{word} {row['id']}"} for row in plain()])
        stage = stage_of(world, file)
        store = Store(tmp_path / "store")
        store.get(stage, report)
        iteration: Any = SimpleNamespace(prompts=stage, pairs=None, k=-1)
        settings = {"data": {"path": str(file)}, "eval": {"split": "test"}}
        found = {each.name: each for each in list_datasets(iteration, store, settings)}
        assert found.keys() == {"train", "validation", "test"}
        assert "rejected" in found["train"].columns
        digests.append(found["train"].digest)
    assert digests[0] != digests[1]


def test_when_no_pair_fits_it_is_named(world: World, tmp_path: Path, report: Report) -> None:
    rows = [{**row, "rejected": row["rejected"] + WORDS} for row in plain()]
    with pytest.raises(DataError, match=r"^data\.long_responses=drop: no pair of train .*data\.long_responses=cut"):
        prepared(world, write(tmp_path / "rows.jsonl", rows), tmp_path / "one", report, long_responses="drop")


# --- export and import


def test_our_own_export_is_read_again(world: World, tmp_path: Path) -> None:
    pairs = world.pairs(200)
    write_preferences(tmp_path / "pairs.jsonl", pairs)
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    kept = [row for row in lines if row["chosen"] != row["rejected"]]
    read = everything(jsonl(write(tmp_path / "rows.jsonl", [{**row, "chosen_score": 2.5} for row in kept])))
    by_id = {pair.id: pair for pair in pairs}
    assert len(read) > 30
    for name, row in read.items():
        assert (row.human, row.rejected) == (by_id[name].chosen, by_id[name].rejected)
        assert (row.human_score, row.rejected_score) == (2.5, None)


def test_real_pairs() -> None:
    path = SHARED / "data" / "pref_rasbt.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not here: the shared data lie outside the repository")
    raw = {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}
    rows, facts = jsonl(path, bad_rows="drop").read()
    read = [row for some in rows.values() for row in some]
    bad = sum(reason["rows"] for reason in facts.get("unusable", {}).values())
    assert len(read) + sum(facts["removed"].values()) + bad == len(raw) == 1094
    assert all((row.human, row.rejected) == (raw[row.id]["chosen"], raw[row.id]["rejected"]) for row in read)
