"""Pairs in TRL's conversational preference format: other libraries read them, and TRL's own trainer trains on them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dnpo.data.files import JsonLines
from dnpo.optimise import preference
from dnpo.optimise.parts import Logistic, NoNoise, PairOptimisation
from dnpo.optimise.reference import read_scores, score
from dnpo.policy.model import Policy
from dnpo.records import Pair
from dnpo.stages.files import write_preferences
from tests.commands import succeed
from tests.conftest import Report, World, torch_optimizer
from tests.trl_training import compare_run, differences, train_by_trl

HARD = 'line\nbreaks\u2028and \u0085 marks, 日本🦉, "quotes", \\ and \u0000'


def pairs(world: World, count: int = 40) -> list[Pair]:
    """Scores on some sides, on none, and never on the first rows."""
    scores = [(None, None), (90.0, 20.0), (None, 3.5)]
    return [
        replace(pair, chosen_score=scores[i % 3][0], rejected_score=scores[i % 3][1])
        for i, pair in enumerate(world.pairs(count))
    ]


def test_a_line_is_a_pair(world: World, tmp_path: Path) -> None:
    pair = replace(world.pairs(1)[0], id="x", chosen=HARD, chosen_score=90.0)
    write_preferences(tmp_path / "pairs.jsonl", [pair])
    (line,) = (tmp_path / "pairs.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "id": "x",
        "prompt": pair.messages,
        "chosen": [{"role": "assistant", "content": HARD}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
        "chosen_source": "human",
        "rejected_source": "policy@0",
        "chosen_score": 90.0,
        "rejected_score": None,
        "chosen_sample": 0,
        "rejected_sample": 0,
        "iteration": 0,
        "strength": 1.0,
        "weight": 1.0,
        "shift": 0.0,
    }


def test_the_file_appears_complete_or_not_at_all(world: World, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    bad = replace(world.pairs(1)[0], chosen_score=float("nan"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_preferences(path, [*world.pairs(3), bad])
    assert list(tmp_path.iterdir()) == []
    write_preferences(path, world.pairs(3))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_preferences(path, [bad])
    assert len(path.read_text().splitlines()) == 3
    write_preferences(path, [])
    assert path.read_text() == ""
    assert [p.name for p in tmp_path.iterdir()] == ["pairs.jsonl"]


@pytest.mark.parametrize("scored", [True, False])
def test_datasets_reads_it(world: World, tmp_path: Path, scored: bool) -> None:
    from datasets import load_dataset

    written = pairs(world) if scored else world.pairs(40)
    write_preferences(tmp_path / "pairs.jsonl", [replace(written[0], chosen=HARD), *written[1:]])
    rows = load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), split="train", cache_dir=str(tmp_path / "c"))
    assert len(rows) == 40
    assert rows[0]["chosen"] == [{"role": "assistant", "content": HARD}]
    assert rows["id"][:] == [pair.id for pair in written]
    assert rows["chosen_score"][:] == [pair.chosen_score for pair in written]


def test_dnpo_reads_it_too(world: World, tmp_path: Path) -> None:
    written = world.pairs(100)
    write_preferences(tmp_path / "pairs.jsonl", written)
    source = JsonLines(path=str(tmp_path / "pairs.jsonl"), max_prompt_tokens=9, max_response_tokens=9)
    read = {row.id: row for rows in source.read()[0].values() for row in rows}
    by_id = {pair.id: pair for pair in written}
    assert len(read) > 50  # a prompt may be asked twice
    assert all(row.messages == by_id[name].messages and row.human == by_id[name].chosen for name, row in read.items())


@pytest.mark.parametrize("scored", [True, False])
def test_trl_trains_on_it_unchanged(
    world: World, make_policy: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scored: bool
) -> None:
    trl = pytest.importorskip("trl")
    from datasets import load_dataset

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    written = pairs(world) if scored else world.pairs(40)
    write_preferences(tmp_path / "pairs.jsonl", written)
    rows = load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), split="train", cache_dir=str(tmp_path / "c"))
    policy = make_policy()
    policy.model.save_pretrained(tmp_path / "model")
    world.tokenizer.save_pretrained(tmp_path / "model")
    config = trl.DPOConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.DPOTrainer(model=str(tmp_path / "model"), args=config, train_dataset=rows)
    result = trainer.train()
    assert result.global_step == 1
    assert 0.6 < result.training_loss < 0.8  # the policy is its own reference: log 2
    before = dict(policy.model.named_parameters())
    assert any(not value.equal(before[name]) for name, value in trainer.model.named_parameters())
    # TRL makes the same tokens from a row as dnpo: one template, the same tokens.
    first = trainer.train_dataset[0]
    assert first["prompt_ids"] == written[0].prompt_ids
    assert first["chosen_ids"] == written[0].chosen_ids


@pytest.mark.parametrize("optimizer", ["RMSprop", "AdamW"])
def test_training_ends_where_trl_ends(
    world: World, make_policy: Callable[..., Policy], tmp_path: Path, report: Report, optimizer: str
) -> None:
    """The same pairs, order, optimizer, schedule and clipping: final log-probabilities differ by rounding alone."""
    pytest.importorskip("trl")
    some, seed, objective = world.pairs(47), 5, Logistic(0.1)  # which makes policy steps of 7 and of 8 pairs
    how = PairOptimisation(optimizer=torch_optimizer(optimizer, lr=1e-3), epochs=2, batch_size=8)
    ours, start = make_policy(), make_policy()
    score(ours, some, autocast=False, folder=tmp_path, report=report)
    preference.optimise(
        ours,
        some,
        read_scores(tmp_path, len(some)),
        how,
        noise=NoNoise().module(1, 1),
        objective=objective,
        beta=objective.beta,
        seed=seed,
        folder=tmp_path,
        report=report,
    )
    theirs = train_by_trl(make_policy().causal_lm, world.tokenizer, some, how, objective.beta, seed)
    assert max(differences(ours, start, some)) > 5
    assert max(differences(ours, theirs, some)) < 2e-4
    other = train_by_trl(make_policy().causal_lm, world.tokenizer, some, how, objective.beta, seed + 1)
    assert max(differences(ours, other, some)) > 0.01  # another order is seen


@pytest.mark.long
def test_a_run_on_real_pairs_ends_where_trl_ends(shared: Path, tmp_path: Path) -> None:
    """stories260K on polite against rude responses, through the whole run: its stages, and one iteration of DPO."""
    pytest.importorskip("trl")
    rows = (shared / "data" / "pref_rasbt.jsonl").read_text().splitlines()[:70]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    model = ("model=local", f"model.path={shared / 'models' / 'stories260K'}", "trainer.batch_size=16")
    data = ("data=jsonl", "data.path=rows.jsonl", "data.max_response_tokens=32", "trainer.optimizer.lr=1e-4")
    short = ("sft.steps=8", "eval.samples=1", "eval.sequences=4")
    succeed(tmp_path, "scale=smoke", "tracking=off", "method=dpo", *model, *data, *short)
    found = compare_run(tmp_path)
    assert found["pairs"] > 50
    assert found["greatest change by training"] > 1
    assert found["greatest difference"] < 1e-4 * found["greatest change by training"]
