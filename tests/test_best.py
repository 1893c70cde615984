"""Which policy a run keeps, and when it ends early."""

import json
import math
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

import dnpo
from dnpo.catalogue import GROUPS
from dnpo.commands.train import build
from dnpo.errors import SettingsError
from dnpo.running.best import KeptPolicy, find_best, has, kept, sentences
from dnpo.running.export import find_policy, read_summary
from dnpo.settings import conf_folder
from tests.commands import SMOKE, TINY, numbers, run_command, succeed, summary, train

ENDS = ("iterations=4", "keep=best", "patience=1", "eval.split=validation")


def rows(**columns: list[float | None]) -> list[dict[str, Any]]:
    lengths = {len(values) for values in columns.values()}
    return [
        {"iteration": "SFT" if k == 0 else k - 1, **{f"eval/{name}": values[k] for name, values in columns.items()}}
        for k in range(lengths.pop())
    ]


@pytest.mark.parametrize(
    ("choice", "table", "best"),
    [
        (KeptPolicy("best"), rows(score=[50, 60, 55], loss=[1.0, 3.0, 2.0]), 1),
        (KeptPolicy("best"), rows(loss=[2.0, 1.0, 3.0]), 1),  # lower is better, and nothing is scored
        (KeptPolicy("best", best_by="eval/loss"), rows(score=[50, 60, 55], loss=[1.0, 3.0, 2.0]), 0),
        (KeptPolicy("best"), rows(score=[50, 60, 60]), 1),  # the first of equals
        (KeptPolicy("best"), rows(score=[math.nan, 10, 5]), 1),
    ],
)
def test_the_best_policy_is_the_first_with_the_best_value(choice: KeptPolicy, table: Any, best: int) -> None:
    assert find_best(table, choice.metric_of(table)) == best
    assert choice.describe(table, 2)["choice"]["kept"] == best


def test_a_run_ends_after_enough_iterations_without_improvement() -> None:
    scores: list[float | None] = [50, 49, 60, 58, 59, 61]
    ends = {
        patience: next((n for n in range(1, 7) if KeptPolicy(patience=patience).is_over(rows(score=scores[:n]))), None)
        for patience in (0, 1, 2, 3)
    }
    assert ends == {0: None, 1: 2, 2: 5, 3: None}


def test_a_policy_without_the_number_is_refused() -> None:
    with pytest.raises(SettingsError, match="best_by=eval/accuracy: the policy after iteration 0"):
        KeptPolicy("best", best_by="eval/accuracy").is_over(rows(accuracy=[0.5, None]))


def test_a_run_without_keep_or_stop_chooses_no_policy() -> None:
    assert KeptPolicy().describe(rows(score=[2, 1]), 3) == {}
    assert kept({"table": rows(score=[2, 1])}) == 1
    assert sentences({"table": rows(score=[2, 1])}) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["best_by=eval/score"], "best_by=eval/score: has an effect only with keep=best or patience=…"),
        (["keep=best", "best_by=eval/scoer"], "best_by=eval/scoer: no metric of this name.*Did you mean eval/score"),
        (["keep=best", "best_by=eval/tokens"], "best_by=eval/tokens: neither direction"),
        (["patience=1", "best_by=second/score"], "best_by=second/score: this run does not measure it.*second_judge="),
        (["patience=1", "best_by=leaderboard/arc"], "best_by=leaderboard/arc: this run does not measure it"),
        (["keep=best", "judge=off", "dsl=off", "best_by=eval/score"], "best_by=eval/score: this run does not measure"),
        (
            ["keep=best", "judge=off", "dsl=off", "best_by=eval/win"],
            "best_by=eval/win: this run does not measure.*scores",
        ),
        (["keep=best", "best_by=heldout/loss"], "best_by=heldout/loss: this run does not measure.*sft.keep=best"),
        (["keep=best", "best_by=heldout/loss", "sft.keep=best"], "best_by=heldout/loss: .*needs trainer.keep=best"),
        (["patience=1", "best_by=loss/policy", "trainer.epochs=0"], "best_by=loss/policy: .*trainer.epochs or steps"),
        (["patience=1", "best_by=pairs/wrong"], "best_by=pairs/wrong: is not measured for the fine-tuned policy"),
        (["keep=best", "best_by=duels/rate"], "best_by=duels/rate: is not measured for"),
        (["keep=best", "best_by=eval/engine_max"], "best_by=eval/engine_max: this run .*generate=server"),
        (["keep=best", "best_by=eval/pass_at_3"], "best_by=eval/pass_at_3: this run .*needs eval.samples=3"),
        (["keep=best", "best_by=eval/accuracy/poems"], "best_by=eval/accuracy/poems: .*rows of the family poems"),
        (["keep=first"], "keep='first'"),
        (["patience=-1"], "patience=-1"),
    ],
)
def test_meaningless_settings_of_the_choice_are_refused_by_name(tmp_path: Path, given: list[str], message: str) -> None:
    import re

    done = train(tmp_path, *SMOKE, "method=spin" if "judge=off" in given else "method=dnpo", *given)
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "store" / "prompts").exists()  # nothing has been computed


@pytest.mark.long
def test_a_metric_is_accepted_exactly_if_the_run_measures_it_for_every_policy(smoke: Path) -> None:
    table = json.loads(min(smoke.glob("outputs/*/*/summary.json")).read_text())["table"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        run, _, _ = build(compose("train", overrides=list(SMOKE)))
    better = [each.name for group in GROUPS for each in group.metrics if each.better]
    names = [name for name in better if "<" not in name] + ["eval/pass_at_1", "eval/accuracy/facts", "second/win"]
    accepted = set()
    for name in names:
        with suppress(SettingsError):
            KeptPolicy("best", best_by=name).check(run)
            accepted.add(name)
    assert accepted == {name for name in names if all(has(row, name) for row in table)}
    assert {"eval/score", "eval/accuracy", "eval/loss"} < accepted


@pytest.mark.long
def test_a_run_ends_early_keeps_its_best_policy_and_resumes_with_the_same_result(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "store", tmp_path / "store", symlinks=True)
    printed = train(tmp_path, *SMOKE, *TINY, *ENDS)
    assert printed.returncode == 0, printed.stderr
    assert "warning" not in printed.stderr  # the split is not test
    found = summary(tmp_path)
    scores = [row["eval/score"] for row in found["table"]]
    best = scores.index(max(scores))
    assert best == len(scores) - 2, scores  # it ended one iteration after the best
    assert len(scores) < 5, scores
    assert found["choice"]["kept"] == best
    assert found["choice"]["ended"] == {"iterations": len(scores) - 1, "planned": 4, "patience": 1}
    place = found["table"][best]["iteration"]
    words = f"ended after {len(scores) - 1} of 4 iterations"
    assert words in printed.stdout
    assert (
        f"the best policy is that after {'fine-tuning' if place == 'SFT' else f'iteration {place}'}" in printed.stdout
    )

    (folder,) = (path.parent for path in tmp_path.glob("outputs/*/*/summary.json"))
    name = "sft" if place == "SFT" else f"iteration-{place}"
    assert find_policy(read_summary(folder), None, None).name == name
    assert dnpo.open(folder).policy().name == name
    done = run_command(tmp_path, "dnpo.export", str(folder), "to=copy")
    assert done.returncode == 0, done.stderr
    assert f"{name} (" in done.stdout

    # As after a kill in the last training: the same command gives the same result.
    for stage in found["stages"]:
        if stage["iteration"] == found["table"][-1]["iteration"] and stage["stage"] in ("optimise", "evaluate"):
            shutil.rmtree(tmp_path / "store" / stage["stage"] / stage["key"])
    again = succeed(tmp_path, *SMOKE, *TINY, *ENDS)
    assert words in again
    assert summary(tmp_path)["choice"] == found["choice"]
    assert numbers(summary(tmp_path)) == numbers(found)

    # Without these settings the first iterations are the same, and their stages are reused.
    succeed(tmp_path, *SMOKE, *TINY, f"iterations={len(scores) - 1}", "eval.split=validation")
    plain = summary(tmp_path)
    assert "choice" not in plain
    assert numbers(plain) == numbers(found)
    assert [stage["key"] for stage in plain["stages"]] == [stage["key"] for stage in found["stages"]]
    assert json.loads((folder / "summary.json").read_text())["choice"] == found["choice"]  # each run has its own
