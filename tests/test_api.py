"""Runs from Python: ``dnpo.compose``, ``dnpo.run``, ``dnpo.open``."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import dnpo
from dnpo.errors import DnpoError, SettingsError
from tests.commands import SMOKE, TINY


def test_importing_dnpo_takes_no_time_and_offers_five_names() -> None:
    code = (
        "import sys, dnpo; dnpo.__version__; print(sorted(m for m in sys.modules if m in ('torch', 'hydra', 'pandas')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert set(dnpo.__all__) == {"Result", "Settings", "__version__", "compose", "open", "run"}
    with pytest.raises(AttributeError, match="no attribute 'rum'"):
        dnpo.rum  # noqa: B018


def test_settings_are_composed_and_checked_as_by_the_command() -> None:
    settings = dnpo.compose("method=spin", "seed=3", "npo=off")
    assert settings.overrides == ("method=spin", "seed=3", "npo=off")
    assert settings.values["seed"] == 3
    assert settings.values["dsl"]["_target_"] == "dnpo.dsl.HumanChosen"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("seeed=1", "seeed: unknown setting. Did you mean seed"),
        ("metod=spin", "metod: unknown setting. Did you mean method"),
        ("nope=1", "nope: unknown setting. With --help, the command lists all settings."),
        ("sweep=main", "sweep: none of its options is chosen by default; give +sweep=…"),
        ("seed=-1", "seed=-1"),
        ("method=spinn", "Did you mean spin"),
        ("npo.alfa=1", "npo.alfa: unknown setting. Did you mean npo.alpha"),
        ("tracking.uri=postgresql://me:secret@host/db", "tracking.uri"),
    ],
)
def test_wrong_settings_raise_the_commands_message(given: str, message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        dnpo.compose(given)
    assert message in str(refused.value)
    assert "secret" not in str(refused.value).replace("secrets", "")


def test_a_run_from_python_equals_the_commands(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    settings = dnpo.compose(*SMOKE, *TINY, f"store={tiny / 'store'}", "verify=sizes")
    plan = settings.plan()
    assert plan["there"].all()
    result = dnpo.run(settings, "out")
    by_command = json.loads(next(tiny.glob("outputs/*/*/summary.json")).read_text())
    assert [stage["key"] for stage in result.summary["stages"]] == [stage["key"] for stage in by_command["stages"]]
    assert result.summary["table"] == by_command["table"]
    assert list(result.table.index) == result.iterations == ["SFT", 0, 1]
    assert result.table.loc[1, "eval/score"] == by_command["table"][2]["eval/score"]
    assert (tmp_path / "here" / "out" / "summary.json").is_file()
    assert not (tmp_path / "here" / "outputs").exists()
    assert result.summary["choices"]["method"] == "dnpo"
    again = dnpo.open("out")
    assert again.table.equals(result.table)


def test_a_finished_run_can_be_inspected(tiny: Path) -> None:
    result = dnpo.open(next(tiny.glob("outputs/*/*/summary.json")).parent)
    samples = result.samples(1)
    assert samples["kind"].value_counts().to_dict() == {"greedy": 12, "sample": 12}
    assert samples[["prompt", "human", "response"]].notna().all(axis=None)
    mean = samples[samples["kind"] == "sample"]["score"].mean()
    assert mean == pytest.approx(result.table.loc[1, "eval/score"])
    assert samples["response"].str.len().gt(0).mean() > 0.5
    pairs = result.pairs(0)
    assert len(pairs) == result.table.loc[0, "pairs/pairs"]
    assert not pairs["flipped"].any()  # labels by origin in iteration 0
    assert (result.policy("sft") / "config.json").is_file()
    assert result.policy() == result.policy(1)
    with pytest.raises(SettingsError, match="iteration 7: this run has SFT, 0, 1"):
        result.samples(7)
    with pytest.raises(SettingsError, match="iteration SFT: was trained on no pairs"):
        result.pairs("SFT")  # type: ignore[arg-type]


def test_pairs_are_those_that_an_iteration_was_trained_on(tiny: Path, tmp_path: Path) -> None:
    """A curriculum chooses among the labelled ones; a training with rollouts makes its own."""
    result = dnpo.open(next(tiny.glob("outputs/*/*/summary.json")).parent)
    labelled, stages = result.pairs(1), result.summary["stages"]
    policies = tuple(replace(policy, store=tmp_path) for policy in result._policies)
    key = next(stage["key"] for stage in stages if (stage["stage"], stage["iteration"]) == ("optimise", 1))
    for rows, name, found in (
        (3, "curriculum/chosen", [*stages, {"stage": "curriculum", "key": "chosen", "iteration": 1}]),
        (2, f"optimise/{key}", [stage for stage in stages if stage["stage"] != "pairs"]),
    ):
        (tmp_path / name).mkdir(parents=True)
        labelled.head(rows).to_parquet(tmp_path / name / "pairs.parquet")
        other = replace(result, summary={**result.summary, "stages": found}, _policies=policies)
        assert list(other.pairs(1)["id"]) == list(labelled["id"].head(rows))


def test_refusals_and_missing_runs_are_reported(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match="no finished run there"):
        dnpo.open(tmp_path)
    with pytest.raises(SettingsError, match="plan"):
        dnpo.run(dnpo.compose(*SMOKE, "plan=true"))
    with pytest.raises(DnpoError, match="absent"):
        dnpo.run(dnpo.compose(*SMOKE, "data=jsonl", "data.path=absent.jsonl", "judge=longer"))
    moved = dnpo.open(next(tiny.glob("outputs/*/*/summary.json")).parent, store=tmp_path / "elsewhere")
    with pytest.raises(SettingsError, match="is missing"):
        moved.samples()
    assert os.listdir(tmp_path) != []
