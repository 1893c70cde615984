"""Several sources as one: shares, counts by source, duplicates across sources, and what is refused."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dnpo.data.files import JsonLines
from dnpo.data.mix import Mixture
from dnpo.data.tinyworld import TinyWorld
from dnpo.errors import DataError, SettingsError
from dnpo.settings import part_key
from tests.commands import SMOKE, TINY, succeed, summary, train

LIMITS: dict[str, Any] = {"max_prompt_tokens": 256, "max_response_tokens": 128}
WORDS = [a + b + c for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]


def write(path: Path, rows: int, seed: int, more: tuple[str, ...] = ()) -> JsonLines:
    """A file of rows with random words, after which come rows with these prompts."""
    draw = random.Random(seed)
    prompts = [" ".join(draw.sample(WORDS, 8)) for _ in range(rows)]
    lines = [json.dumps({"prompt": prompt, "response": f"Number {n}."}) for n, prompt in enumerate([*prompts, *more])]
    path.write_text("\n".join(lines) + "\n")
    return JsonLines(path=str(path), **LIMITS)


def prompt_of(path: Path, number: int) -> str:
    return str(json.loads(path.read_text().splitlines()[number])["prompt"])


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, JsonLines]:
    return {"chat": write(tmp_path / "chat.jsonl", 200, 1), "code": write(tmp_path / "code.jsonl", 120, 2)}


def counts(mix: Mixture, split: str = "train") -> dict[str, int]:
    rows, facts = mix.read()
    found = Counter(row.id.partition("/")[0] for row in rows[split])
    assert dict(found) == facts["sources"][split]
    return dict(found)


def test_without_weights_every_source_gives_all_its_rows(pair: dict[str, JsonLines]) -> None:
    rows, facts = Mixture(sources=pair, **LIMITS).read()
    for split in ("train", "validation", "test"):
        own = {name: len(source.read()[0][split]) for name, source in pair.items()}
        assert facts["sources"][split] == own
    ids = [row.id for row in rows["train"]]
    assert len(set(ids)) == len(ids)
    first = Counter(id.partition("/")[0] for id in ids[: len(ids) // 2])
    assert min(first.values()) > len(ids) // 8, "the sources are mixed everywhere"
    assert {row.family for row in rows["train"]} == {"chat", "code"}


def test_weights_decide_the_shares(pair: dict[str, JsonLines]) -> None:
    assert counts(Mixture(sources=pair, weights={"chat": 3, "code": 1}, rows=100, **LIMITS)) == {
        "chat": 75,
        "code": 25,
    }
    assert counts(Mixture(sources=pair, weights={"chat": 1, "code": 1}, rows=101, **LIMITS)) == {
        "chat": 51,
        "code": 50,
    }
    there = counts(Mixture(sources=pair, **LIMITS))
    most = counts(Mixture(sources=pair, weights={"chat": 1, "code": 2}, **LIMITS))
    assert there["code"] - most["code"] <= 1, "as many as there are without repeating"
    assert abs(2 * most["chat"] - most["code"]) <= 1
    held = counts(Mixture(sources=pair, weights={"chat": 3, "code": 1}, rows=100, **LIMITS), "test")
    assert held == counts(Mixture(sources=pair, **LIMITS), "test")  # held-out rows are all taken


def test_the_draw_depends_on_the_seed_alone(pair: dict[str, JsonLines]) -> None:
    def ids(seed: int, sources: dict[str, JsonLines]) -> list[str]:
        mix = Mixture(sources=sources, weights={"chat": 1, "code": 1}, rows=60, seed=seed, **LIMITS)
        return [row.id for row in mix.read()[0]["train"]]

    turned = dict(reversed(pair.items()))
    assert ids(0, pair) == ids(0, turned)
    assert ids(0, pair) != ids(1, pair)
    keys = [part_key(Mixture(sources=some, **LIMITS)) for some in (pair, turned)]
    assert json.dumps(keys[0], sort_keys=True) == json.dumps(keys[1], sort_keys=True)
    weighted = part_key(Mixture(sources=pair, weights={"chat": 1, "code": 1}, **LIMITS))
    assert weighted != keys[0]
    assert "seed" in weighted
    assert "seed" not in keys[0]


def test_duplicates_across_sources_are_removed_and_counted(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", 100, 1)
    equal, near = prompt_of(tmp_path / "a.jsonl", 3), f"{prompt_of(tmp_path / 'a.jsonl', 5)}."
    other = write(tmp_path / "b.jsonl", 100, 2, (equal, near))
    rows, facts = Mixture(sources={"a": one, "b": other}, **LIMITS).read()
    turned, _ = Mixture(sources={"b": other, "a": one}, **LIMITS).read()
    assert {split: [row.id for row in some] for split, some in turned.items()} == {
        split: [row.id for row in some] for split, some in rows.items()
    }
    texts = [row.messages[-1]["content"] for some in rows.values() for row in some]
    assert texts.count(equal) == 1
    assert sum(text.rstrip(".") == near.rstrip(".") for text in texts) == 1
    assert sum(facts["removed"].values()) == 2
    assert sum(sum(some.values()) for some in facts["sources"].values()) == 200
    assert any("a/" in each and "b/" in each for each in facts["examples"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"chat": 1, "coed": 1}}, "weights.coed: there is no such source. Did you mean code?"),
        ({"weights": {"chat": 1}}, "weights.code: needs a value"),
        ({"rows": 10}, "rows=10: has an effect only with weights"),
    ],
)
def test_meaningless_settings_are_refused(pair: dict[str, JsonLines], settings: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        Mixture(sources=pair, **settings, **LIMITS)


def test_a_source_with_too_few_rows_is_named_with_the_possible_number(pair: dict[str, JsonLines]) -> None:
    with pytest.raises(DataError, match=r"data\.weights\.code=1: .*expected at most data\.rows=(\d+)") as raised:
        Mixture(sources=pair, weights={"chat": 1, "code": 1}, rows=300, **LIMITS).read()
    found = re.search(r"at most data\.rows=(\d+)", str(raised.value))
    assert found is not None
    possible = int(found[1])
    assert (
        sum(counts(Mixture(sources=pair, weights={"chat": 1, "code": 1}, rows=possible, **LIMITS)).values()) == possible
    )
    with pytest.raises(DataError, match=r"data\.weights\.code=0\.001: .*gives none"):
        Mixture(sources=pair, weights={"chat": 1, "code": 0.001}, rows=100, **LIMITS).read()


def test_a_source_that_only_repeats_another_is_refused(tmp_path: Path, pair: dict[str, JsonLines]) -> None:
    with pytest.raises(DataError, match=r"data\.sources\.code: none of its training rows is left"):
        Mixture(sources={"chat": pair["chat"], "code": pair["chat"]}, **LIMITS).read()


def test_errors_of_a_source_name_its_place(tmp_path: Path, pair: dict[str, JsonLines]) -> None:
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    bad = JsonLines(path=str(tmp_path / "bad.jsonl"), **LIMITS)
    with pytest.raises(DataError, match=r"data\.sources\.bad\.path=.*data\.sources\.bad\.columns="):
        Mixture(sources={"chat": pair["chat"], "bad": bad}, **LIMITS).read()


def test_limits_of_a_source_that_are_overridden_are_reported(pair: dict[str, JsonLines]) -> None:
    world = TinyWorld(train=48, validation=12, test=12, max_prompt_tokens=48, max_response_tokens=24)
    _, facts = Mixture(sources={"chat": pair["chat"], "world": world}, **LIMITS).read()
    assert facts["notes"] == [
        "data.sources.world.max_prompt_tokens=48: data.max_prompt_tokens=256 applies instead",
        "data.sources.world.max_response_tokens=24: data.max_response_tokens=128 applies instead",
    ]


GIVEN = (
    *("data=mix", "+data@data.sources.chat=jsonl", "data.sources.chat.path=chat.jsonl"),
    *("+data@data.sources.code=jsonl", "data.sources.code.path=code.jsonl", "data.sources.code.holdout=0.2"),
    *("data.max_prompt_tokens=64", "data.max_response_tokens=24", "judge=longer"),
)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["data.weights={chat: -1, code: 1}"], "data.weights.*expected {NAME: a number above 0, …}"),
        (["data.weights={chat: 1, cood: 1}"], r"data\.weights\.cood: there is no such source"),
        (["data.sources.chat.pth=x"], r"data\.sources\.chat\.pth"),
        (["+data.sources.other=7"], r"data\.sources"),
        (["data.weights={chat: 1, code: 1}", "data.rows=9000"], r"data\.weights\.(chat|code)=1: .*at most data\.rows="),
    ],
)
def test_a_mix_is_refused_before_anything_is_computed(
    tmp_path: Path, pair: dict[str, JsonLines], given: list[str], message: str
) -> None:
    done = train(tmp_path, *SMOKE, *GIVEN, *given)
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "store" / "prompts").exists()


@pytest.mark.long
def test_a_run_on_a_mix_shows_and_records_the_rows_by_source(
    tmp_path: Path, pair: dict[str, JsonLines], migrated: Path
) -> None:
    import shutil

    from mlflow import MlflowClient

    shutil.copy(migrated, tmp_path / "mlflow.db")
    tiny = [each for each in TINY if not each.startswith("data.")]
    weights = ("data.weights={chat: 3, code: 1}", "data.rows=48")
    printed = succeed(tmp_path, "scale=smoke", *tiny, *GIVEN, *weights, "iterations=1")
    found = summary(tmp_path)["sources"]
    assert found["train"] == {"chat": 36, "code": 12}
    assert f"train chat 36, code 12; validation chat {found['validation']['chat']}" in printed
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = (
        each
        for experiment in client.search_experiments()
        for each in client.search_runs([experiment.experiment_id])
        if each.data.tags.get("dnpo.kind") == "run"
    )
    profiles = {each.dataset.name: json.loads(each.dataset.profile) for each in run.inputs.dataset_inputs}
    assert profiles["train"]["sources"] == {"chat": 36, "code": 12}
    assert "train chat 36, code 12" in run.data.tags["mlflow.note.content"]
