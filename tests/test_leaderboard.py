"""The leaderboard: rows become lm-eval's tasks, and lm-eval's numbers are those of the policy itself."""

import json
import random
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dnpo.errors import DataError, ModelError, SettingsError
from dnpo.evaluate import Evaluation
from dnpo.evaluate.leaderboard import BenchmarkItem, Leaderboard, LeaderboardResult, _item, harness, measure
from dnpo.evaluate.leaderboard.rows import offline
from dnpo.policy.loading import load
from dnpo.policy.model import Policy
from dnpo.policy.packing import ATTENTION
from dnpo.running.gate.measures import findings
from dnpo.settings import rename_settings

from .commands import run_command, train
from .conftest import SHARED, Report

SAMPLES, STORIES = SHARED / "data" / "bench_mini", SHARED / "models" / "stories260K"
shared = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the shared samples are not there")


def lines(path: Path, *rows: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def questions(count: int, start: int = 0, **more: Any) -> list[dict[str, Any]]:
    """Sums with four choices; the right one is at a random position."""
    return [
        {
            "id": f"q{n}",
            "question": f"what is {n} + 1?",
            "choices": [str(n + 1 + (k - n) % 4) for k in range(4)],
            **more,
        }
        | {"answer": n % 4}
        for n in range(start, start + count)
    ]


# Rows


def test_settings_are_named_as_in_a_run(tmp_path: Path) -> None:
    there = ("scale=smoke", "tracking=off", "judge=off", "method=spin", "eval=leaderboard")
    done = train(tmp_path, *there, "eval.leaderboard.source=nowhere")
    assert done.stderr.startswith("error: eval.leaderboard.source=nowhere: there is no such folder; expected hub")
    done = train(tmp_path, *there, "eval.leaderboard.benchmarks=[ark]")
    assert done.stderr.startswith("error: eval.leaderboard.benchmarks: there is no ark. Did you mean arc")
    (finding,) = findings(Evaluation(leaderboard=Leaderboard(source=str(tmp_path))), {"leaderboard"})
    assert finding.text.startswith(f"eval.leaderboard.source={tmp_path}: has no arc_easy_test.jsonl")
    assert "in eval.leaderboard.benchmarks=[…]" in finding.text
    hub_only = Leaderboard(source=str(tmp_path), benchmarks=["ifeval"])
    (finding,) = findings(Evaluation(leaderboard=hub_only), {"leaderboard"})
    assert finding.text.startswith("eval.leaderboard.benchmarks: ifeval is only on the hub; leave it out, or give ")


def test_only_names_of_settings_are_renamed_in_messages() -> None:
    names = {"source": "eval.leaderboard.source", "judge": "second_judge"}
    for text, wanted in {
        "source=x: none; give source=hub": "eval.leaderboard.source=x: none; give eval.leaderboard.source=hub",
        "judge.model: unknown": "second_judge.model: unknown",
        "judge: it ends": "second_judge: it ends",
        "the judge of a source. No": "the judge of a source. No",
        "/judge.model my_source=x eval.source=y": "/judge.model my_source=x eval.source=y",
    }.items():
        assert rename_settings(text, names) == wanted


def test_the_position_of_the_true_answer_is_random(tmp_path: Path) -> None:
    """In the rows the true answer is always first; in the items its position is random, and the labels agree."""
    rows = [
        {
            "id": f"t{n}",
            "question": f"why {n}?",
            "mc1": {"choices": [f"true {n}", "b", "c", "d"], "labels": [1, 0, 0, 0]},
            "mc2": {"choices": [f"true {n}", "true too", "c", "d"], "labels": [1, 1, 0, 0]},
        }
        for n in range(200)
    ]
    lines(tmp_path / "truthfulqa.jsonl", *rows)
    (one,), (two,) = (offline(tmp_path, f"truthfulqa_mc{k}") for k in (1, 2))
    places = [row["gold"] for row in one.rows]
    assert all(30 < places.count(k) < 70 for k in range(4))
    assert all(row["choices"][row["gold"]].startswith("true") for row in one.rows)
    for row in two.rows:
        assert [choice.startswith("true") for choice in row["choices"]] == [label == 1 for label in row["labels"]]
    assert one.rows == offline(tmp_path, "truthfulqa_mc1")[0].rows


def test_few_shot_examples_of_benchmarks(tmp_path: Path) -> None:
    """ARC easy takes its examples from challenge and says so; no item is its own example; MMLU's share its subject."""
    lines(tmp_path / "arc_easy_test.jsonl", *questions(3))
    lines(tmp_path / "arc_challenge_fewshot.jsonl", *questions(4))
    (task,) = offline(tmp_path, "arc_easy")
    assert [row["id"] for row in task.examples] == ["q3"]
    assert task.note == "arc_easy takes its examples from arc_challenge_fewshot.jsonl"
    lines(tmp_path / "arc_easy_fewshot.jsonl", *questions(2, 10))
    (task,) = offline(tmp_path, "arc_easy")
    assert len(task.examples) == 2
    assert not task.note
    lines(tmp_path / "mmlu_test.jsonl", *questions(2, subject="a"), *questions(1, 5, subject="b_c"))
    lines(tmp_path / "mmlu_fewshot.jsonl", *questions(5, 20, subject="a"))
    a, b = offline(tmp_path, "mmlu")
    assert [(t.definition["task"], len(t.rows), len(t.examples)) for t in (a, b)] == [
        ("mmlu_a", 2, 5),
        ("mmlu_b_c", 1, 0),
    ]


WRONG = [
    ("arc_easy", {"question": "?", "choices": ["a", "b"], "answer": 2}, "answer is 2, expected a number from 0 to 1"),
    ("arc_easy", {"question": "?", "choices": ["a", ""], "answer": 0}, "expected a list of texts"),
    ("arc_easy", {"question": "?", "choices": ["a", "b"]}, "has no answer, which arc_easy needs"),
    ("arc_easy", {"question": "\u200b", "choices": ["a", "b"], "answer": 0}, "expected a text"),
    ("arc_easy", {"question": "?", "choices": ["a", "\u200e"], "answer": 0}, "expected a list of texts"),
    ("mmlu", {"subject": "s", "question": "?", "choices": ["a", "b"], "answer": 0}, "2 choices, expected 4"),
    ("gsm8k", {"question": "?", "answer": "5"}, "expected one that ends in #### NUMBER"),
    ("winogrande", {"context_options": ["a"], "continuation": "c", "answer": 0}, "1 beginnings, expected 2"),
    ("truthfulqa_mc1", {"question": "?", "mc1": {"choices": ["a", "b"], "labels": [1, 1]}}, "and a single 1"),
    ("truthfulqa_mc2", {"question": "?", "mc2": {"choices": ["a", "b"], "labels": [0, 0]}}, "at least one 1"),
    ("truthfulqa_mc1", {"question": "?", "mc1": None}, "cannot be used for truthfulqa_mc1"),
]


@pytest.mark.parametrize(("task", "row", "message"), WRONG)
def test_unusable_rows_are_named(tmp_path: Path, task: str, row: dict[str, Any], message: str) -> None:
    stem = task.partition("_mc")[0]
    lines(tmp_path / f"{stem}_test.jsonl", row)
    with pytest.raises(DataError, match=rf"{stem}_test.jsonl:1: .*{message}"):
        offline(tmp_path, task)


def test_unusable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no arc_easy_test.jsonl, .* benchmarks="):
        offline(tmp_path, "arc_easy")
    (tmp_path / "arc_easy_test.jsonl").write_text("")
    with pytest.raises(DataError, match="has no rows"):
        offline(tmp_path, "arc_easy")
    lines(tmp_path / "arc_easy_test.jsonl", *questions(1), *questions(1))
    with pytest.raises(DataError, match=r"test.jsonl:2: .*q0"):
        offline(tmp_path, "arc_easy")
    lines(tmp_path / "arc_easy_test.jsonl", *questions(3), {"id": "x"}, {"id": "y"})
    with pytest.raises(DataError, match=r"test.jsonl:4: has no question(.|\n)*2 of 5 rows .*\n *2: has no question"):
        offline(tmp_path, "arc_easy")
    (tmp_path / "arc_easy_test.jsonl").write_bytes(b'{"question": "caf\xe9"}')
    with pytest.raises(DataError, match=r"test.jsonl:1: not UTF-8"):
        offline(tmp_path, "arc_easy")
    (tmp_path / "arc_easy_test.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"test.jsonl:1: .*JSON"):
        offline(tmp_path, "arc_easy")


# Settings


def test_settings() -> None:
    paper = {"arc": 25, "truthfulqa": 0, "winogrande": 5, "gsm8k": 5, "hellaswag": 10, "mmlu": 5}
    assert Leaderboard().examples == paper
    assert Leaderboard(benchmarks=["arc", "arc"], shots={"arc": 3, "mmlu": 1}).examples == {"arc": 3}
    with pytest.raises(SettingsError, match=r"hellaswog.*hellaswag"):
        Leaderboard(benchmarks=["hellaswog"])
    with pytest.raises(SettingsError, match=r"shots.truthfulqa=2: expected 0"):
        Leaderboard(shots={"truthfulqa": 2})
    with pytest.raises(SettingsError, match="none given"):
        Leaderboard(benchmarks=[])


def test_without_lm_eval(make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dnpo.evaluate.leaderboard.harness.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r'pip install "dnpo\[eval\]"'):
        measure(make_policy(), Leaderboard(), Report())


def test_sources(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(SettingsError, match=r"source=.*none"):
        measure(make_policy(), Leaderboard(source=str(tmp_path / "none")), Report())
    with pytest.raises(SettingsError, match="ifeval"):
        measure(make_policy(), Leaderboard(source=str(tmp_path), benchmarks=["ifeval"]), Report())


def test_nan_log_likelihoods_are_refused() -> None:
    """The argmax of several NaN is the first index, so a broken model would seem right if the first choice is right."""
    sample = {"task": "arc_easy", "doc": {"id": "q"}, "doc_id": 0, "filtered_resps": [(float("nan"), False)] * 2}
    with pytest.raises(ModelError, match="arc_easy, item q: the log-likelihoods"):
        _item("arc", sample, set())


def test_probability_of_the_true_answers() -> None:
    """By hand: (e⁰ + e⁻¹) / (e⁰ + e⁻¹ + e⁻²); the same a thousand nats lower, where exp underflows."""
    pytest.importorskip("lm_eval")
    from lm_eval.tasks.truthfulqa.utils import process_results_mc2

    doc = {"mc2_targets": {"labels": [1, 0, 1]}}
    results = [(-1.0, False), (-2.0, False), (0.0, False)]
    by_hand = (1 + np.exp(-1)) / (1 + np.exp(-1) + np.exp(-2))
    assert harness.mass_of_the_true(doc, results)["acc"] == pytest.approx(by_hand)
    assert harness.mass_of_the_true(doc, results)["acc"] == pytest.approx(process_results_mc2(doc, results)["acc"])
    deeper = [(logp - 1000, greedy) for logp, greedy in results]
    assert harness.mass_of_the_true(doc, deeper)["acc"] == pytest.approx(by_hand)


# Through lm-eval


def small(folder: Path) -> Path:
    """Files for three benchmarks that the tests' small policies can read: their context is short."""
    lines(folder / "arc_easy_test.jsonl", *questions(6))
    lines(folder / "arc_challenge_test.jsonl", *questions(5, 100))
    lines(folder / "arc_challenge_fewshot.jsonl", *questions(2, 50))
    lines(folder / "mmlu_test.jsonl", *questions(3, subject="sums"), *questions(1, 9, subject="more_sums"))
    lines(folder / "gsm8k_test.jsonl", {"question": "1 + 1?", "answer": "#### 2"})
    return folder


def test_a_small_run(make_policy: Callable[..., Policy], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    policy = make_policy()
    policy.model.train()
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), len(policy.tokenizer))
    report = Report()
    result = measure(policy, Leaderboard(source=str(small(tmp_path)), benchmarks=["arc", "gsm8k", "mmlu"]), report)
    assert capfd.readouterr() == ("", "")
    assert policy.model.training
    assert policy.causal_lm.config._attn_implementation == ATTENTION
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), len(policy.tokenizer))
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    assert before[3] == after[3]
    assert report.done == report.total == 3

    assert result.average is None  # three of six have no average
    assert result.scores["arc"].items == 11
    assert result.scores["arc"].shots == (2, 2)
    means = [np.mean([i.score for i in result.items if i.task == f"arc_{t}"]) for t in ("easy", "challenge")]
    assert result.scores["arc"].score == pytest.approx(np.mean(means))
    mmlu = [i.score for i in result.items if i.benchmark == "mmlu"]
    assert result.scores["mmlu"].score == pytest.approx(np.mean(mmlu))
    notes = result.notes()
    assert "arc: arc_easy takes its examples from arc_challenge_fewshot.jsonl" in notes
    assert "arc: 2 of 25 examples before each question: there are no more rows" in notes
    assert "mmlu: 0 of 5 examples before each question: there are no more rows" in notes
    assert result.metrics()["leaderboard/arc"] == result.scores["arc"].score
    assert "leaderboard/average" not in result.metrics()

    result.write(tmp_path, {"model": "m"})
    written = json.loads((tmp_path / "leaderboard.json").read_text())
    assert written["scores"]["arc"]["score"] == result.scores["arc"].score
    kept = [BenchmarkItem(**row) for row in pq.read_table(tmp_path / "leaderboard-items.parquet").to_pylist()]
    assert kept == result.items
    assert {i.id for i in kept if i.task == "arc_easy"} == {f"q{n}" for n in range(6)}

    again = measure(policy, Leaderboard(source=str(tmp_path), benchmarks=["mmlu"], limit=1), Report())
    assert [i.id for i in again.items] == ["q0", "q9"]
    assert [i.prompt_hash for i in again.items] == [i.prompt_hash for i in kept if i.id in ("q0", "q9")][-2:]


def test_an_answer_that_does_not_fit(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    row = {"question": "?", "choices": ["no", "word " * 500], "answer": 0}
    lines(tmp_path / "arc_easy_test.jsonl", row)
    lines(tmp_path / "arc_challenge_test.jsonl", row)
    with pytest.raises(ModelError, match=r"arc_easy: .*\d+ tokens.* \d+"):
        measure(make_policy(), Leaderboard(source=str(tmp_path), benchmarks=["arc"]), Report())


def test_the_hub_does_not_answer(make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")

    def silent(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach 'allenai/winogrande' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr("datasets.load_dataset", silent)
    with pytest.raises(DataError, match=r"source=hub: winogrande .*Couldn't reach .*source="):
        measure(make_policy(), Leaderboard(benchmarks=["winogrande"]), Report())


# On the samples of the six, with a real model


def measured(
    policy: Policy, leaderboard: Leaderboard, monkeypatch: pytest.MonkeyPatch
) -> tuple[LeaderboardResult, list[dict[str, Any]]]:
    """The result, and lm-eval's own output for every item."""
    said: list[dict[str, Any]] = []
    ask = harness.run

    def run(*args: Any) -> list[dict[str, Any]]:
        said.extend(found := ask(*args))
        return found

    monkeypatch.setattr(harness, "run", run)
    return measure(policy, leaderboard, Report()), said


def ids_of(policy: Policy, sample: Mapping[str, Any], context: int) -> list[tuple[list[int], list[int]]]:
    """Tokens of an item's prompt and of its choices, cut to the context."""
    found = []
    for prompt, choice in sample["arguments"]:
        whole = policy.tokenizer.encode(prompt + choice)
        answer = whole[len(policy.tokenizer.encode(prompt)) :]
        found.append((whole[-(context + 1) :][: -len(answer)], answer))
    return found


def own_numbers(policy: Policy, said: list[dict[str, Any]], context: int) -> list[tuple[list[float], float, bool]]:
    """Log-likelihoods and score of every multiple-choice item by the policy itself, and whether choices nearly tie."""
    ids = [ids_of(policy, sample, context) for sample in said]
    flat = [pair for item in ids for pair in item]
    with policy.evaluating():
        logps = iter(policy.score([p for p, _ in flat], [a for _, a in flat]))
    found = []
    for sample, item in zip(said, ids, strict=True):
        own = np.array([next(logps) for _ in item])
        doc, task = sample["doc"], sample["task"]
        if task == "truthfulqa_mc2":
            chances = np.exp(own - own.max())
            found.append((own.tolist(), float(chances[np.array(doc["labels"]) == 1].sum() / chances.sum()), False))
            continue
        right = doc["gold"] if "gold" in doc else doc["answer"]
        by_length = task.startswith("arc") or task == "hellaswag"
        value = own / [len(text) for text in doc["choices"]] if by_length else own
        best, second = np.sort(value)[::-1][:2]
        found.append((own.tolist(), float(value.argmax() == right), bool(best - second < 1e-5)))
    return found


@shared
@pytest.mark.long
def test_results_equal_the_policys_own_log_likelihoods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every choice's log-likelihood to 1e-3, and every multiple-choice item's score; also with prompts that are cut."""
    pytest.importorskip("lm_eval")
    policy = load(str(STORIES), None)
    benchmarks = ["arc", "truthfulqa", "winogrande", "hellaswag", "mmlu"]
    result, said = measured(policy, Leaderboard(source=str(SAMPLES), benchmarks=benchmarks, limit=4), monkeypatch)
    assert len(result.items) == len(said) == 6 * 4 + 114
    assert sum(item.cut for item in result.items) > 8
    own = own_numbers(policy, said, 512)
    assert not any(close for *_, close in own)
    for item, (logps, score, _) in zip(result.items, own, strict=True):
        assert item.logps == pytest.approx(logps, abs=1e-3)
        assert item.score == pytest.approx(score, abs=0 if item.task != "truthfulqa_mc2" else 1e-4)


def of_the_hub(path: str, name: str | None = None, **_: Any) -> Any:
    """The shared samples in the hub's format of these data sets."""
    from datasets import Dataset

    def rows(stem: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (SAMPLES / f"{stem}.jsonl").read_text().splitlines()]

    def arc(stem: str) -> list[dict[str, Any]]:
        return [
            row | {"choices": {"text": row["choices"], "label": list("ABCD")}, "answerKey": "ABCD"[row["answer"]]}
            for row in rows(stem)
        ]

    def winogrande(row: dict[str, Any]) -> dict[str, Any]:
        first, second = row["context_options"]
        same = next(n for n in range(len(first)) if first[: n + 1] != second[: n + 1])
        return {
            "sentence": f"{first[:same]}_ {row['continuation']}",
            "option1": first[same:],
            "option2": second[same:],
            "answer": str(row["answer"] + 1),
        }

    if path == "allenai/ai2_arc":
        kind = str(name).lower().replace("-", "_")
        splits = {"train": arc("arc_challenge_fewshot"), "test": arc(f"{kind}_test")}
        splits["validation"] = splits["train"]
    elif path == "truthfulqa/truthful_qa":
        asked = rows("truthfulqa")
        mixed = [{"question": r["question"], "mc1_targets": r["mc1"], "mc2_targets": r["mc2"]} for r in asked]
        splits = {"validation": mixed}
    elif path == "allenai/winogrande":
        found = [winogrande(row) for row in rows("winogrande_val")]
        splits = {"train": found, "validation": found}
    elif path == "openai/gsm8k":
        splits = {"train": rows("gsm8k_train_fewshot"), "test": rows("gsm8k_test")}
    elif path == "Rowan/hellaswag":
        found = [r | {"ctx_a": r["ctx"], "ctx_b": "", "label": str(r["label"])} for r in rows("hellaswag_val")]
        splits = {"train": found, "validation": found}
    else:
        assert path == "cais/mmlu"
        found = [row for row in rows("mmlu_test") if row["subject"] == name]
        splits = {"test": found, "dev": found}
    return {split: Dataset.from_list(found) for split, found in splits.items()}


@shared
@pytest.mark.long
def test_data_of_the_hub_and_of_files_give_the_same_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own definitions on data in the hub's format: the same prompts, numbers and scores, item by item."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.load_dataset", of_the_hub)
    policy = load(str(STORIES), None)
    shots = {"arc": 2, "gsm8k": 2, "winogrande": 0, "hellaswag": 0, "mmlu": 0}
    files = measure(policy, Leaderboard(source=str(SAMPLES), shots=shots, limit=3), Report())
    hub = measure(policy, Leaderboard(shots=shots, limit=3), Report())
    for name in files.scores:
        ours, theirs = ([item for item in r.items if item.benchmark == name] for r in (files, hub))
        ours.sort(key=lambda item: (item.task, item.prompt_hash, item.response))
        theirs.sort(key=lambda item: (item.task, item.prompt_hash, item.response))
        assert [i.prompt_hash for i in ours] == [i.prompt_hash for i in theirs], name
        assert [i.score for i in ours] == pytest.approx([i.score for i in theirs], abs=1e-6), name
        assert [i.response for i in ours] == [i.response for i in theirs], name
        for one, other in zip(ours, theirs, strict=True):
            assert sorted(one.logps) == pytest.approx(sorted(other.logps), abs=1e-3)
        assert files.scores[name].score == pytest.approx(hub.scores[name].score, abs=1e-6)
    assert files.average == pytest.approx(hub.average, abs=1e-6)


# The command


def command(cwd: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return run_command(cwd, "dnpo.leaderboard", "model.path=model", "source=rows", *arguments)


@pytest.mark.long
def test_the_command(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    make_policy().save(tmp_path / "model")
    (tmp_path / "rows").mkdir()
    small(tmp_path / "rows")
    done = command(tmp_path, "benchmarks=[mmlu,arc]", "shots.arc=1", "hydra.run.dir=out", "tracking.uri=sqlite:///t.db")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Leaderboard of model" in done.stdout
    assert "note: mmlu: 0 of 5 examples before each question: there are no more rows" in done.stdout
    written = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    assert written["settings"]["shots"]["arc"] == 1
    assert len(written["model"]["content"]) == 64
    assert written["average"] is None
    assert pq.read_table(tmp_path / "out" / "leaderboard-items.parquet").num_rows == 15
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 't.db'}")
    (tracked,) = client.search_runs([client.get_experiment_by_name("dnpo").experiment_id])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.metrics["leaderboard/mmlu"] == pytest.approx(written["scores"]["mmlu"]["score"])
    assert tracked.data.tags["dnpo.kind"] == "leaderboard"

    wrong = command(tmp_path, "benchmark=[arc]", "tracking=off")
    assert wrong.returncode == 1
    assert re.fullmatch(r"error: benchmark: .*\bbenchmarks\b.*\n", wrong.stderr)
    missing = command(tmp_path, "benchmarks=[hellaswag]", "tracking=off")
    assert missing.returncode == 1
    assert "hellaswag_test.jsonl" in missing.stderr
    assert missing.stderr.startswith("error: source=rows: ")


# Any other task of lm-eval


OWN = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
num_fewshot: {shots}
fewshot_split: test
metric_list: [{{metric: acc_norm}}, {{metric: acc}}]
"""


SUMS = [row | {"choices": [text * (1 + k) for k, text in enumerate(row["choices"])]} for row in questions(12)]


def own(folder: Path, *names: str, shots: int = 0) -> Path:
    """A folder with tasks over questions, and a group of them all."""
    lines(folder / "rows.jsonl", *SUMS)
    for name in names:
        text = OWN.format(name=name, data=folder / "rows.jsonl", shots=shots)
        (folder / f"{name}.yaml").write_text(text)
    (folder / "all.yaml").write_text(f"group: all_sums\ntask: [{', '.join(names)}]\n")
    return folder


def test_a_custom_task(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = own(tmp_path / "tasks", "sums", "more_sums")
    given: dict[str, Any] = {"benchmarks": [], "include_path": str(folder)}
    policy = make_policy()
    result = measure(policy, Leaderboard(tasks=["sums"], **given), Report())
    score = result.scores["sums"]
    assert [item.id for item in result.items] == [row["id"] for row in SUMS]
    right, plain = [], []
    for item, row in zip(result.items, SUMS, strict=True):
        by_length = [logp / len(text) for logp, text in zip(item.logps, row["choices"], strict=True)]
        right.append(float(np.argmax(by_length) == row["answer"]))  # the definition names acc_norm first
        plain.append(float(np.argmax(item.logps) == row["answer"]))
        assert item.score == right[-1]
        assert item.benchmark == "sums"
    assert np.mean(right) != np.mean(plain)
    assert score.score == pytest.approx(np.mean(right))
    assert result.metrics()["tasks/sums"] == score.score
    assert result.average is None
    assert "sums: the score is lm-eval's acc_norm, on the task" in result.notes()

    both = measure(policy, Leaderboard(tasks=["all_sums"], limit=2, **given), Report()).scores["all_sums"]
    assert set(both.tasks) == {"sums", "more_sums"}
    assert both.items == 4
    assert both.score == pytest.approx(np.mean(list(both.tasks.values())))


def test_few_shot_examples_of_a_task(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    given: dict[str, Any] = {"benchmarks": [], "tasks": ["sums"], "include_path": str(own(tmp_path, "sums", shots=1))}
    hashes = []
    for shots, expected in ((None, 1), ({"sums": 0}, 0)):
        result = measure(make_policy(), Leaderboard(shots=shots, **given), Report())
        assert result.scores["sums"].shots == (expected, expected)
        hashes.append([item.prompt_hash for item in result.items])
    assert set(hashes[0]).isdisjoint(hashes[1])


def test_the_key_has_everything_that_decides_a_tasks_results(tmp_path: Path) -> None:
    plain = Leaderboard().identity()
    assert set(plain) == {"source", "shots", "limit"}  # as before there were tasks
    folder = own(tmp_path, "sums")
    first = Leaderboard(tasks=["sums"], include_path=str(folder)).identity()
    lines(folder / "rows.jsonl", *questions(5))
    assert Leaderboard(tasks=["sums"], include_path=str(folder)).identity()["own"] != first["own"]
    assert str(folder) not in json.dumps(first)


@pytest.mark.long
def test_tasks_that_cannot_be_measured_are_named_before_anything_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = str(own(tmp_path / "tasks", "sums"))
    with pytest.raises(SettingsError, match=r"include_path=.*only with tasks"):
        Leaderboard(include_path=folder)
    with pytest.raises(SettingsError, match="none given"):
        Leaderboard(benchmarks=[], tasks=[])
    with pytest.raises(SettingsError, match=r"include_path=.*nowhere: there is no such folder"):
        Leaderboard(tasks=["sums"], include_path=str(tmp_path / "nowhere")).check()
    with pytest.raises(SettingsError, match=r"benchmarks: there is no sums"):
        Leaderboard(shots={"sums": 1})
    (tmp_path / "tasks" / "rows.jsonl").unlink()
    with pytest.raises(DataError, match="tasks: sums cannot be loaded"):
        Leaderboard(benchmarks=[], tasks=["sums"], include_path=folder).check()
    done = run_command(tmp_path, "dnpo.leaderboard", "model.path=nowhere", "benchmarks=[]", "tasks=[ifevall]")
    assert done.returncode == 1
    assert re.match(
        r"error: tasks: there is no task, group or tag ifevall in lm-eval; .*Did you mean ifeval", done.stderr
    )
    run = Evaluation(leaderboard=Leaderboard(benchmarks=[], tasks=["sumz"], include_path=folder))
    (finding,) = findings(run, {"leaderboard"})
    assert finding.level == "stop"
    assert finding.text.startswith("eval.leaderboard.tasks: there is no task, group or tag sumz in lm-eval or in ")


@pytest.mark.long
def test_the_command_measures_a_custom_task(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    make_policy().save(tmp_path / "model")
    own(tmp_path / "tasks", "sums")
    given = ("model.path=model", "benchmarks=[]", "tasks=[sums]", "include_path=tasks", "tracking=off")
    done = run_command(tmp_path, "dnpo.leaderboard", *given, "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    written = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    assert re.search(rf"^sums +{written['scores']['sums']['score']:.3f} +12 ", done.stdout, re.MULTILINE), done.stdout
