"""Over-optimisation: constructed histories, the measures behind it, and a run that learns from a judge of length."""

import html
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dnpo.records import Item
from dnpo.running.ending import find_gains
from dnpo.stats.intervals import Estimate
from dnpo.stats.overoptimised import describe_overoptimisation, find_overoptimisation
from dnpo.stats.prompts import loss_by_prompt
from dnpo.tables import write
from dnpo.tracking.reading import Database
from tests.commands import run_command, succeed, summary

UP, DOWN, FLAT = Estimate(5.0, 2.0, 8.0), Estimate(-5.0, -8.0, -2.0), Estimate(1.0, -2.0, 4.0)
TOUCHING = Estimate(2.0, 0.0, 4.0)
BARE = Estimate(5.0)  # one prompt, or no results by prompt


@pytest.mark.parametrize(
    ("score", "second", "right", "loss", "against"),
    [
        (UP, DOWN, FLAT, FLAT, ["second/score"]),
        (UP, FLAT, DOWN, FLAT, ["eval/accuracy"]),
        (UP, DOWN, DOWN, UP, ["second/score", "eval/accuracy", "eval/loss"]),
        (UP, FLAT, FLAT, UP, ["eval/loss"]),
        (UP, None, None, UP, ["eval/loss"]),
        (UP, UP, FLAT, UP, None),  # another measure confirms the gain
        (UP, UP, DOWN, UP, ["eval/accuracy"]),
        (UP, UP, UP, DOWN, None),
        (UP, FLAT, FLAT, FLAT, None),
        (UP, None, None, None, None),
        (FLAT, DOWN, DOWN, UP, None),  # nothing rises
        (DOWN, DOWN, DOWN, UP, None),
        (TOUCHING, DOWN, FLAT, FLAT, None),
        (UP, FLAT, FLAT, TOUCHING, None),
        (BARE, DOWN, FLAT, FLAT, None),
        (UP, Estimate(-5.0), FLAT, FLAT, None),
        (None, DOWN, DOWN, UP, None),
    ],
)
def test_histories(
    score: Estimate | None,
    second: Estimate | None,
    right: Estimate | None,
    loss: Estimate | None,
    against: list[str] | None,
) -> None:
    given = {"eval/score": score, "second/score": second, "eval/accuracy": right, "eval/loss": loss}
    gains = {name: gain for name, gain in given.items() if gain is not None}
    found = find_overoptimisation(gains)
    assert (None if found is None else list(found)[1:]) == against
    if found is not None:
        assert found["eval/score"] == {"value": 5.0, "low": 2.0, "high": 8.0}
        assert json.loads(json.dumps(found)) == found


def test_the_warning_names_measures_intervals_and_the_figure() -> None:
    found = find_overoptimisation({"eval/score": UP, "eval/accuracy": Estimate(-0.125, -0.25, -0.01)})
    assert found is not None
    text = describe_overoptimisation(found, "progress.png")
    for part in ("+5.0 points of 100", "+2.0 to +8.0", "−12.5 percentage points", "−25.0 to −1.0", "progress.png"):
        assert part in text


def test_the_mean_of_the_losses_by_prompt_is_the_loss_a_token() -> None:
    """By hand: losses of 6 and 2 nats over 3 and 1 tokens are 2 nats a token, at 2 tokens on average 3 and 1."""
    rows = {"id": ["a", "b", "a"], "kind": ["human", "human", "greedy"], "tokens": [3, 1, 9]}
    table = pa.table({**rows, "logprob": [-6.0, -2.0, -1.0]})
    assert loss_by_prompt(table) == {"a": 3.0, "b": 1.0}
    assert loss_by_prompt(pa.table({**rows, "logprob": [None, None, -1.0]})) == {}  # a file of earlier versions
    assert loss_by_prompt(table.slice(2)) == {}


def test_gains_are_over_prompts_from_the_first_policy_to_the_last(tmp_path: Path) -> None:
    draw, folders = np.random.default_rng(0), []
    for k, (score, second, logprob) in enumerate([(40.0, 60.0, -4.0), (0.0, 0.0, -90.0), (50.0, 55.0, -6.0)]):
        folder = tmp_path / str(k)
        folder.mkdir()
        noise = draw.normal(0, 1, (3, 40))
        noise -= noise.mean(1, keepdims=True)
        items = [
            Item(str(i), "", kind, 0, score + noise[0, i], second + noise[1, i], None, 2, logprob + noise[2, i] / 10)
            for kind in ("human", "greedy", "sample")
            for i in range(40)
        ]
        write(folder / "items.parquet", items, Item)
        folders.append(folder)
    gains = find_gains(folders)
    for name, gain in (("eval/score", 10.0), ("second/score", -5.0), ("eval/loss", 1.0)):
        assert gains[name].value == pytest.approx(gain)
    found = find_overoptimisation(gains)
    assert found is not None
    assert list(found) == ["eval/score", "second/score", "eval/loss"]


LENGTH = ("scale=smoke", "method=dsl", "dsl.start=0", "iterations=2", "trainer.optimizer.lr=1e-2", "judge.half=20")


@pytest.mark.long
def test_a_run_that_learns_from_a_judge_of_length_warns(tmp_path: Path) -> None:
    """On the screen, in the note in MLflow and in the report; not if another judge gives the scores."""
    words = (*LENGTH, "judge=noisy", "judge.length=1", "judge@second_judge=correct")
    shown = succeed(tmp_path, *words)
    found = summary(tmp_path)["overoptimised"]
    assert found["eval/score"]["low"] > 0 > found["second/score"]["high"]
    warning = describe_overoptimisation(found, "progress.png")
    assert f"warning: {warning}" in shown
    (folder,) = tmp_path.glob("outputs/*/*")
    assert (folder / "progress.png").is_file()
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    (run,) = [each for each in Database(uri).runs() if each.tags.get("dnpo.kind") == "run"]
    assert "Over-optimised?" in run.tags["mlflow.note.content"]
    done = run_command(tmp_path, "dnpo.commands.report", str(folder), "--out", "page.html", "--no-log")
    assert done.returncode == 0, done.stderr
    page = html.unescape((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "Over-optimised?" in page
    assert "KL" in page
    # the same training, scored by a judge that it does not learn from
    succeed(tmp_path, *words, "eval.judge=${typical.judge}")
    assert summary(tmp_path)["overoptimised"] is None
