"""The command that evaluates one model: the same numbers as the run's, and win rates against another model."""

import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from dnpo.commands.evaluate import IDLE, PARTS, check_settings, describe_outcome, other_model, table
from dnpo.errors import SettingsError
from dnpo.judges.asked.ledger import Ledger
from dnpo.loop import chain
from dnpo.records import Item
from dnpo.running import console as screen
from dnpo.settings import build, conf_folder
from dnpo.stages.duels import Duel, outcome, read_duels
from dnpo.stages.plan import Run
from dnpo.stats.wins import wins
from dnpo.tables import read
from tests.commands import run_command, succeed

SMALL = ("data=tinyworld_smoke", "eval=smoke", "generate=smoke")
NEEDED = {
    **{("judge", kind): [f"judge.{key}=x"] for kind, key in (("openai", "model"), ("hf", "path"), ("reward", "path"))},
    **{("data", kind): ["data.path=x"] for kind in ("jsonl", "parquet", "csv", "arrow")},
    ("data", "mix"): ["+data@data.sources.world=tinyworld"],
}
GROUPS = [name for name in PARTS if (conf_folder() / name).is_dir() and name not in ("model", "sft")]
OPTIONS = sorted((group, path.stem) for group in GROUPS for path in (conf_folder() / group).glob("*.yaml"))


def settings(*overrides: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return check_settings(compose("evaluate", overrides=list(overrides)))


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group: str, option: str) -> None:
    settings(f"{group}={option}", *NEEDED.get((group, option), []))


def keys(tmp_path: Path, *overrides: str) -> list[str]:
    """The keys of the stages of an evaluation."""
    (tmp_path / "config.json").touch()
    _, found = settings(f"model.path={tmp_path}", *overrides)
    parts: dict[str, Any] = {name: build(name, found[name]) for name in PARTS if name != "tracking"}
    with Ledger(tmp_path / "ledger.sqlite", "") as ledger:
        (measured,) = chain(Run(seed=0, device="cpu", plans=(), ledger=ledger, **parts))
    return [stage.key for stage in measured.stages]


def test_settings_that_the_help_leaves_out_change_nothing(tmp_path: Path) -> None:
    given = {"generate.append_eos": "++generate.append_eos=true", "eval.initial": "++eval.initial=true"}
    assert {*given, "sft", "model.lora"} == set(IDLE)  # these two are of a training, which is refused
    assert keys(tmp_path, *given.values()) == keys(tmp_path)
    assert keys(tmp_path, "eval.samples=2") != keys(tmp_path)


def documented() -> list[str]:
    """The arguments of every command at the head of the settings."""
    return re.findall(r"python -m dnpo\.evaluate +([a-z][^#\n`]*)", (conf_folder() / "evaluate.yaml").read_text())


@pytest.mark.parametrize("arguments", documented())
def test_every_documented_command_composes(arguments: str) -> None:
    settings(*(word for word in arguments.split() if not word.startswith("-")))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sft=finetune"], "sft: a model is measured as it is"),
        (["data=jsonl"], r"data\.path: needs a value"),
        (["seed=-1"], r"seed=-1: expected a whole number of at least 0"),
        (["length_controlled=3"], r"length_controlled=3: .*true or false"),
        (["eval.split=train"], r"eval\.split='train'"),
        (["+model.pathh=x"], r"model\.pathh: unknown setting\. Did you mean model\.path"),
    ],
)
def test_wrong_settings_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        settings(*overrides)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("scale=smoke", "scale: the settings of evaluate have no such part; leave scale=smoke out"),
        ("dsl=off", "dsl: the settings of evaluate have no such part; leave dsl=off out"),
        ("+scale=smoke", "+scale=smoke: sets trainer, which the settings of evaluate do not have"),
    ],
)
def test_an_option_of_another_command_is_not_offered(tmp_path: Path, given: str, message: str) -> None:
    done = evaluate(tmp_path, "model.path=x", given)
    assert (done.returncode, done.stderr) == (1, f"error: {message}\n")


def test_a_title_keeps_its_path_whole(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/folder" * 20
    screen.Console().table(table({"model": {"eval/loss": 2.0}}, f"Evaluation of {path}"), fold=True)
    assert path in capsys.readouterr().out


def test_the_other_model_is_parsed(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "config.json").touch()
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").touch()
    ours = {"path": "x", "name": None, "revision": "abc", "dtype": "bfloat16"}
    folder = other_model(str(tmp_path / "whole"), ours)
    assert folder == {"path": str(tmp_path / "whole"), "name": None, "revision": None, "dtype": "bfloat16"}
    assert other_model("some-one/some.model", ours)["name"] == "some-one/some.model"
    for wrong in (str(tmp_path), "outputs/2026/x/models/sft", "no such"):
        with pytest.raises(SettingsError, match=rf"against={wrong}: "):
            other_model(wrong, ours)
    for setting in (lambda path: other_model(path, ours), lambda path: settings(f"model.path={path}")):
        with pytest.raises(SettingsError, match=r"dnpo export"):
            setting(str(tmp_path / "adapters"))


# --- what is shown


def lines(rows: dict[str, dict[str, float]]) -> list[str]:
    with (console := Console(width=100, file=io.StringIO())).capture() as captured:
        console.print(table(rows, "Title"))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_metrics_are_printed_in_groups() -> None:
    """Shares in percent, whole counts, and a dash for a missing value."""
    ours = {"eval/accuracy/facts": 0.125, "eval/accuracy": 0.25, "eval/score": 61.25, "leaderboard/arc": 0.3}
    shown = lines({"model": ours | {"drift/kl": 1.23456}, "against": {"eval/score": 50.0, "eval/unscored": 3}})
    assert [re.split(r"  +", line.strip()) for line in shown[1:]] == [
        ["model", "against"],
        ["drift"],
        ["KL of the policy to its reference, nats", "1.235", "–"],
        ["Held-out prompts"],
        ["Right greedy answers", "25.0 %", "–"],
        ["Judge's score of sampled answers, points of 100", "61.2", "50.0"],
        ["Responses without a score", "–", "3"],
        ["Right greedy answers by family"],
        ["Right greedy answers, facts", "12.5 %", "–"],
        ["Benchmarks"],
        ["ARC", "30.0 %", "–"],
    ]


def test_duels_in_words() -> None:
    duel = Duel("p", 0, "a", "b", 60.0, 50.0, 1.0, 8.0, 4, "")
    rows = [replace(duel, id=str(i)) for i in range(3)] + [replace(duel, ours_score=None, preference=None)]
    told = "\n".join(describe_outcome(outcome(rows, True, 0), "judge=x"))
    assert "Duels under judge=x: wins 100.0 % (100.0 to 100.0), ties 0.0 %" in told
    assert "p = 0.25; 3 duels on 3 prompts" in told
    assert "1 duel on 1 prompt" in "\n".join(describe_outcome(outcome(rows[:1], False, 0), "judge=x"))
    assert "differ by 8.0 points" in told
    assert "at the same length: all differences in length are 4" in told
    assert "note: 1 of 4 duels lack a score and are left out" in told
    even = [replace(duel, id=f"{n}{d}", difference=d, ours_score=50.0 + n) for n in (-1, 0, 1) for d in (-3, 0, 9)]
    told = "\n".join(
        describe_outcome(outcome([replace(d, preference=0.5 + (d.ours_score - 50) / 2) for d in even], True, 0), "x")
    )
    assert "at the same length 50.0 % (" in told
    assert "the model's responses are 2.0 characters longer on average than the other side's" in told
    assert "the effect of length on winning is 0.00 (log-odds)" in told
    other = [replace(d, difference=-d.difference, preference=0.5 + (d.ours_score - 50) / 2) for d in even]
    told = "\n".join(describe_outcome(outcome(other, True, 0), "x"))
    assert "the model's responses are 2.0 characters shorter on average than the other side's" in told


# --- whole commands


def evaluate(cwd: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return run_command(cwd, "dnpo.evaluate.__main__", *arguments)


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return found


@pytest.fixture(scope="module")
def trained(smoke: Path, migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which DNPO has run for two iterations."""
    cwd = tmp_path_factory.mktemp("trained")
    shutil.copytree(smoke / "store", cwd / "store")
    for name in ("t.db", "a.db"):
        shutil.copy(migrated, cwd / name)
    succeed(cwd, "scale=smoke", "eval.samples=2", "tracking=off", "hydra.run.dir=run")
    return cwd


@pytest.mark.long
def test_a_model_of_a_run_gets_the_runs_numbers(trained: Path) -> None:
    """Loss, accuracy, greedy and sampled scores are computed again from the run's folder."""
    place = ("model.path=run/models/iteration-1", *SMALL, "eval.samples=2", "store=elsewhere")
    done = evaluate(trained, *place, "hydra.run.dir=first", "tracking.uri=sqlite:///t.db")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    ours = results(trained / "first")["metrics"]["model"]
    (theirs,) = [r for r in json.loads((trained / "run" / "summary.json").read_text())["table"] if r["iteration"] == 1]
    same = [name for name in ours if name.startswith("eval/")]
    assert {"eval/loss", "eval/accuracy", "eval/score", "eval/score_greedy", "eval/win", "eval/pass_at_2"} <= set(same)
    assert {name: ours[name] for name in same} == pytest.approx({name: theirs[name] for name in same}, abs=1e-9)
    items = [
        read(trained / f / "items" / n, Item) for f, n in (("first", "model.parquet"), ("run", "iteration-1.parquet"))
    ]
    assert [(i.id, i.kind, i.sample, i.score, i.right) for i in items[0]] == [
        (i.id, i.kind, i.sample, i.score, i.right) for i in items[1]
    ]
    # what was measured is found, and what is shown is the same
    again = evaluate(trained, *place, "hydra.run.dir=second", "tracking=off")
    assert again.stdout.count("stored already") == 3
    assert results(trained / "second")["metrics"] == results(trained / "first")["metrics"]

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{trained / 't.db'}")
    (tracked,) = client.search_runs([client.get_experiment_by_name("dnpo").experiment_id])
    assert (tracked.info.status, tracked.data.tags["dnpo.kind"]) == ("FINISHED", "evaluation")
    assert tracked.data.tags["dnpo.judge"] == "rules"
    assert tracked.data.metrics["eval/score"] == ours["eval/score"]
    assert {file.path for file in client.list_artifacts(tracked.info.run_id)} == {
        "evaluation.json",
        "items",
        "logprobs",
        "stages.json",
    }


@pytest.mark.long
def test_duels_against_another_model_people_and_itself(trained: Path) -> None:
    """Against another model, against people, and against itself."""
    ours = ("model.path=run/models/iteration-1", *SMALL, "eval.samples=2")
    against = "against=run/models/sft"
    done = evaluate(trained, *ours, against, "length_controlled=true", "hydra.run.dir=a", "tracking.uri=sqlite:///a.db")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Duels under judge=rules: wins \S+ % \(\S+ to \S+\), ties .*losses ", done.stdout)
    assert "at the same length" in done.stdout
    assert done.stdout.count("checks passed") == 1
    for title in ("model · weights ", "against · weights ", "model · evaluate ", "against · evaluate "):
        assert title in done.stdout
    found = results(trained / "a")
    (first,) = [
        r for r in json.loads((trained / "run" / "summary.json").read_text())["table"] if r["iteration"] == "SFT"
    ]
    assert found["metrics"]["against"]["eval/score"] == pytest.approx(first["eval/score"], abs=1e-9)
    rows = read_duels(trained / "a" / "duels.parquet")
    assert len(rows) == 48 * 2
    scores = {}
    for name in ("model", "against"):
        items = read(trained / "a" / "items" / f"{name}.parquet", Item)
        scores[name] = {(i.id, i.sample): i.score for i in items if i.kind == "sample"}
    keys = list(scores["model"])
    assert [(d.id, d.sample, d.ours_score) for d in rows] == [(*key, scores["model"][key]) for key in keys]
    assert [d.theirs_score for d in rows] == [scores["against"][key] for key in keys]
    told = wins([d.ours_score for d in rows], [d.theirs_score for d in rows], [d.id for d in rows])
    assert found["duels"]["wins"]["rate"]["value"] == told.rate.value

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{trained / 'a.db'}")
    (tracked,) = client.search_runs([client.get_experiment_by_name("dnpo").experiment_id])
    assert tracked.data.metrics["duels/rate"] == told.rate.value
    assert tracked.data.metrics["against/eval/score"] == found["metrics"]["against"]["eval/score"]
    assert tracked.data.tags["dnpo.against"] == "run/models/sft"

    human = evaluate(trained, *ours, "against=human", "hydra.run.dir=h", "tracking=off")
    assert human.returncode == 0, human.stderr
    shares, metrics = results(trained / "h")["duels"]["wins"], results(trained / "h")["metrics"]["model"]
    assert [shares[n]["value"] for n in ("win", "tie", "lose")] == [
        metrics[f"eval/{n}"] for n in ("win", "tie", "lose")
    ]

    itself = evaluate(trained, *ours, "against=run/models/iteration-1", "hydra.run.dir=i", "tracking=off")
    assert itself.returncode == 0, itself.stderr
    assert results(trained / "i")["duels"]["wins"]["tie"]["value"] == 1.0


@pytest.mark.long
def test_without_a_judge_and_with_the_users_data(trained: Path) -> None:
    rows = [{"prompt": f"Sort {i} 3 2.", "response": f"It is 2 3 {i}."} for i in range(60)]
    (trained / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ("model.path=run/models/sft", "data=jsonl", "data.path=rows.jsonl", "data.near_duplicates=0", "tracking=off")
    own = (*own, "data.holdout=0.4", "eval=smoke", "generate=smoke", "data.max_response_tokens=24")
    done = evaluate(trained, *own, "hydra.run.dir=own")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(results(trained / "own")["metrics"]["model"]) == {
        *(f"eval/{name}" for name in ("loss", "tokens", "human_tokens", "cut")),
        "logps/chosen",
        "logps/new",
    }
    assert pq.read_table(trained / "own" / "items" / "model.parquet")["score"].null_count > 0
    for wrong, message in (
        ((*own, "against=human"), r"error: against=human: judge=off .*\n"),
        ((*own, "judge=rules"), r"error: .*labels: judge=rules .*"),
        (
            (*own, "data.sample=4", "data.holdout=0.001"),
            r"error: data\.holdout=0\.001: .*\b4\b.*",
        ),
        (
            (*SMALL, "tracking=off"),
            r"error: model: .*model\.path.* model\.name.*\n",
        ),
        ((*own, "model.path=rows.jsonl"), r"error: model\.path=rows\.jsonl: .*\n"),
        ((*own, "judge=longer", "against=nowhere/at/all"), r"error: against=nowhere/at/all: .*\n"),
    ):
        refused = evaluate(trained, *wrong)
        assert refused.returncode == 1
        assert re.fullmatch(message, refused.stderr, re.DOTALL), refused.stderr
