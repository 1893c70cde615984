"""The main job as users run it: whole runs by the command line, at the smoke scale."""

import json
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dnpo.records import Item, Prompt, Response
from dnpo.store import Store
from dnpo.store.provenance import commit
from dnpo.tables import read
from dnpo.tracking.client import check_reachable
from dnpo.tracking.packing import unpack
from tests import kills
from tests.commands import SMOKE, TINY, Process, numbers, succeed, summary, train

pytestmark = pytest.mark.long


def first(folder: Path) -> dict[str, Any]:
    """The summary of the run in the folder that tests share; later ones in a copy of it are newer."""
    found: dict[str, Any] = json.loads(min(folder.glob("outputs/*/*/summary.json")).read_text())
    return found


# --- what a run leaves behind


def test_a_run_reports_its_progress_and_ends_with_its_table(smoke: Path) -> None:
    out = (smoke / "stdout.txt").read_text()
    for said in ("supervised fine-tuning", "iteration 0 · generate", "iteration 1 · judge", "iteration 1 · optimise"):
        assert said in out
    assert re.search(r"iteration 1 · label +\d+ prompts in .*, \d+ pairs", out)
    assert out.index("iteration 1 · label") < out.index("iteration 1 · reference") < out.index("iteration 1 · optimise")
    header = next(line for line in out.splitlines() if line.split()[:1] == ["it."])
    for column in ("score", "accuracy", "win", "lose", "flips", "held-out loss"):
        assert column in header
    assert "dnpo report outputs/" in out
    assert "score: judge's mean" in " ".join(out.split())
    assert "mlflow ui --backend-store-uri sqlite:///mlflow.db" in out


def test_the_summary_has_table_settings_keys_versions_and_commit(smoke: Path) -> None:
    content = first(smoke)
    assert [row["iteration"] for row in content["table"]] == ["SFT", 0, 1]
    last = content["table"][-1]
    assert last["loss/policy"] > 0 > last["loss/noise"]
    assert last["eval/win"] + last["eval/tie"] + last["eval/lose"] == pytest.approx(1.0)
    families = [name for name in last if name.startswith("eval/accuracy/")]
    assert len(families) == 6
    assert last["eval/accuracy"] == pytest.approx(sum(last[f] for f in families) / 6)
    assert content["settings"]["npo"]["alpha"] == 0.1
    assert content["versions"]["torch"]
    assert "commit" in content
    for stage in content["stages"]:
        manifest = json.loads((smoke / "store" / stage["stage"] / stage["key"] / "manifest.json").read_text())
        assert manifest["key"] == stage["key"]


def test_first_iteration_is_plain_and_the_second_has_labels_by_quality(smoke: Path) -> None:
    rows = first(smoke)["table"]
    assert rows[1]["loss/noise"] is None
    assert rows[1]["pairs/flipped"] == 0
    assert rows[2]["pairs/flipped"] > 0
    pairs = [stage for stage in first(smoke)["stages"] if stage["stage"] == "pairs"]
    table = pq.read_table(smoke / "store" / "pairs" / pairs[1]["key"] / "pairs.parquet").to_pylist()
    assert {pair["chosen_source"] for pair in table} == {"human", "policy@1"}
    for pair in table:
        assert pair["flipped"] == (pair["chosen_source"] == "policy@1")
        assert pair["chosen_score"] > pair["rejected_score"] or not pair["flipped"]
        assert pair["chosen_score"] >= pair["rejected_score"]


def test_generated_rows_record_how_they_were_made(smoke: Path) -> None:
    stage = next(s for s in first(smoke)["stages"] if s["title"] == "iteration 1 · generate")
    shards = sorted((smoke / "store" / "generate" / stage["key"]).glob("shard-*.parquet"))
    assert len(shards) == 3
    for row in (row for shard in shards for row in pq.read_table(shard).to_pylist()):
        assert row["tokens"] == len(row["token_ids"]) <= 24
        assert (row["finish"] == "eos") == (row["token_ids"][-1] == 2)
        assert row["logprob"] < 0
        assert row["source"] == "policy@1"


def test_log_probabilities_of_an_iteration_are_stored_whole(smoke: Path) -> None:
    stage = [s for s in first(smoke)["stages"] if s["stage"] == "evaluate"][-1]
    kept = np.load(smoke / "store" / "evaluate" / stage["key"] / "logprobs.npz")
    assert {len(kept[name]) for name in kept.files} == {96}
    count = int(kept["compared"].sum())
    row = first(smoke)["table"][-1]
    assert row["logps/new"] == pytest.approx(kept["new"].mean())
    assert row["stagnation/ks_critical"] == pytest.approx(1.358 * (2 / count) ** 0.5, rel=1e-3)


def test_mlflow_has_settings_steps_iterations_figures_and_tags(smoke: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{smoke / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("dnpo")
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["npo.alpha"] == "0.1"
    assert tracked.data.tags["dnpo.method"] == "dnpo"
    assert tracked.data.tags["dnpo.scale"] == "smoke"
    keys = {stage["key"] for stage in first(smoke)["stages"]}
    tags, _ = unpack(tracked.data.tags, tracked.data.params)
    assert keys <= set(tags.values())
    assert tags["dnpo.npo"] == "trainable"
    kept = client.download_artifacts(tracked.info.run_id, "stages.json")
    assert set(json.loads(Path(kept).read_text()).values()) == keys
    source = {name: tracked.data.tags.get(f"mlflow.source.{name}") for name in ("name", "type", "git.commit")}
    assert source == {"name": "dnpo train", "type": "LOCAL", "git.commit": commit().rstrip("+") or None}
    # MLflow's view for comparing runs lists the tables of this tag, and begins with the first
    tables = json.loads(tracked.data.tags["mlflow.loggedArtifacts"])
    assert tables == [{"path": name, "type": "table"} for name in ("samples.json", "table.json")]
    for table in tables:
        kept = json.loads(Path(client.download_artifacts(tracked.info.run_id, table["path"])).read_text())
        assert set(kept) == {"columns", "data"}
        assert {len(row) for row in kept["data"]} == {len(set(kept["columns"]))}
        groups = [row[0] for row in kept["data"]]
        assert len(set(map(str, groups))) == len(groups), "the view shows one of the rows with the same first cell"
        assert "" not in groups
    ours = [name for name in tracked.data.tags if not name.startswith("mlflow.")]
    assert len(ours) <= 10, "more would hide the note on the run's page"
    accuracy = client.get_metric_history(tracked.info.run_id, "eval/accuracy")
    assert [(m.step, m.value) for m in accuracy] == [
        (row["iteration"] if row["iteration"] != "SFT" else -1, row["eval/accuracy"]) for row in first(smoke)["table"]
    ]
    steps = client.get_metric_history(tracked.info.run_id, "loss/policy")
    assert [m.step for m in steps] == list(range(len(steps)))
    assert len(client.get_metric_history(tracked.info.run_id, "sft/loss/policy")) == 60
    artefacts = {a.path for a in client.list_artifacts(tracked.info.run_id)}
    folders = {"logprobs", "items", "steps", "pairs", "models"}
    assert artefacts == folders | {
        "summary.json",
        "stages.json",
        "progress.png",
        "table.md",
        "table.json",
        "samples.json",
    }
    assert [a.path for a in client.list_artifacts(tracked.info.run_id, "models/iteration-1")] == [
        "models/iteration-1/README.md"
    ]
    pictures = {a.path for a in client.list_artifacts(tracked.info.run_id, "logprobs")}
    assert pictures == {
        f"logprobs/{name}.{kind}" for name in ("sft", "iteration-0", "iteration-1") for kind in ("png", "npz")
    }


# --- the store


def test_the_same_command_again_computes_nothing(finished: Path) -> None:
    before = summary(finished)
    out = succeed(finished, *SMOKE)
    assert f"all {len(before['stages'])} stages are stored already" in out
    assert out.count("stored already") == 1
    after = summary(finished)
    assert all(stage["reused"] for stage in after["stages"])
    assert after["table"] == before["table"]


def test_a_plan_shows_every_stage_and_computes_nothing(finished: Path, tmp_path: Path) -> None:
    fresh = succeed(tmp_path, *SMOKE, "plan=true")
    assert fresh.count("to do") == 16
    assert re.search(r"iteration 0 · reference +reference/[0-9a-f]{16} +to do", fresh)
    assert not (tmp_path / "store").exists()
    there = succeed(finished, *SMOKE, "plan=true")
    assert there.count(" stored") == 16
    other = succeed(finished, *SMOKE, "plan=true", "npo.alpha=0.7")
    # Another alpha shares everything up to the reference's log-probabilities of iteration 1.
    assert (other.count(" stored"), other.count("to do")) == (13, 3)


def test_settings_that_cannot_change_a_result_are_not_in_the_keys(finished: Path) -> None:
    overrides = [
        *("trainer.checkpoint_every=7", "threads=2", "device=cpu", "npo.start=1", "npo.cache_hidden=on"),
        *(f"{part}.micro_batch_size=3" for part in ("sft", "trainer")),
        *(f"{part}.checkpointing=true" for part in ("sft", "trainer")),
        *("trainer.share_prompt=false", "trainer.compile=true"),
    ]
    assert succeed(finished, *SMOKE, "plan=true", *overrides).count(" stored") == 16


def test_methods_share_iteration_0(finished: Path) -> None:
    out = succeed(finished, *SMOKE, "method=spin", "plan=true")
    assert "iteration 1 · judge" not in out
    lines = [line for line in out.splitlines() if "iteration 1" in line]
    assert [line.split()[-1] for line in lines] == ["stored", *["do"] * 5]


def test_a_part_starts_at_its_iteration(finished: Path) -> None:
    """``npo.start=1 iterations=2`` is a branch of the SPIN chain at iteration 1."""
    spin = succeed(finished, *SMOKE, "method=spin")
    assert "noise loss" not in spin
    succeed(finished, *SMOKE, "method=npo", "npo.start=1")
    rows = summary(finished)["table"]
    assert [row["loss/noise"] is None for row in rows] == [True, True, False]
    reused = {stage["title"]: stage["reused"] for stage in summary(finished)["stages"]}
    assert reused["iteration 1 · label"]
    assert not reused["iteration 1 · optimise"]


@pytest.mark.parametrize("method", ["dsl", "fixed_noise"])
def test_every_other_method_runs(method: str, finished: Path) -> None:
    succeed(finished, *SMOKE, f"method={method}")
    last = summary(finished)["table"][-1]
    assert (last["pairs/flipped"] > 0) == (method == "dsl")
    assert (last["npo/variance"] == 0.5) if method == "fixed_noise" else (last["npo/variance"] is None)


def test_an_offset_can_be_matched_to_a_tracked_run(finished: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{finished / 'mlflow.db'}")
    (tracked, *_) = client.search_runs([client.get_experiment_by_name("dnpo").experiment_id])
    values, rows = (
        {m.step: m.value for m in client.get_metric_history(tracked.info.run_id, name)}
        for name in ("npo/shift", "rows")
    )
    mean = np.average(list(values.values()), weights=[rows[step] for step in values])
    uri = f"tracking.uri=sqlite:///{finished / 'mlflow.db'}"
    succeed(finished, "scale=smoke", "method=dsl", "npo=offset", f"npo.shift=run:{tracked.info.run_id}", uri)
    assert summary(finished)["settings"]["npo"]["shift"] == pytest.approx(mean)
    assert summary(finished)["table"][-1]["npo/shift"] == pytest.approx(mean, abs=1e-5)


def test_lora_runs_through_chained_iterations(adapted: Path, tmp_path: Path) -> None:
    shutil.copytree(adapted / "store", tmp_path / "store")
    succeed(tmp_path, *SMOKE, "model.lora.rank=4", "iterations=3")
    table = summary(tmp_path)["table"]
    assert len(table) == 4
    stage = [s for s in summary(tmp_path)["stages"] if s["stage"] == "optimise"][-1]
    saved = sorted(p.name for p in (tmp_path / "store" / "optimise" / stage["key"] / "policy").iterdir())
    assert saved == ["adapter-00", "adapter-01", "adapter-02", "adapter-03"]


def test_two_runs_at_once_compute_each_stage_once(tmp_path: Path) -> None:
    both = [Process(tmp_path, *SMOKE, *TINY) for _ in range(2)]
    outs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    tables = [json.loads(p.read_text()) for p in tmp_path.glob("outputs/*/*/summary.json")]
    assert len(tables) == 2
    assert numbers(tables[0]) == numbers(tables[1])
    for stages in zip(tables[0]["stages"], tables[1]["stages"], strict=True):
        waited = any(f"another run is computing {stages[0]['title']}" in out for out, _ in outs)
        assert waited or stages[0]["reused"] or stages[1]["reused"], stages


def test_hidden_states_kept_on_disk_change_nothing_but_rounding(finished: Path) -> None:
    """The command has the same keys with and without them, so the result is removed before it is computed again."""
    settings = (*SMOKE, "method=npo", "trainer.epochs=2")
    out = succeed(finished, *settings, "npo.cache_hidden=on")
    said = " ".join(out.split())
    assert re.search(r"hidden states of [\d,]+ rejected tokens take [\d.]+ [kM]B on disk", said)
    (kept,) = finished.glob("store/hidden/*/hidden-00000.safetensors")  # of iteration 1: before it there is no noise
    assert kept.stat().st_size > 10_000
    one = summary(finished)
    for stage in one["stages"][-3:]:  # the training and its evaluation
        shutil.rmtree(finished / "store" / stage["stage"] / stage["key"])
    assert "hidden states" not in succeed(finished, *settings, "npo.cache_hidden=off")
    other = summary(finished)
    assert [stage["key"] for stage in one["stages"]] == [stage["key"] for stage in other["stages"]]
    assert [stage["reused"] for stage in other["stages"]] == [True] * (len(one["stages"]) - 3) + [False] * 3
    for name, value in one["table"][-1].items():
        if name.startswith(("loss/", "margin/", "npo/", "rewards/")) and value is not None:
            assert other["table"][-1][name] == pytest.approx(value, abs=1e-4), name
    assert one["table"][-1]["loss/noise"] < 0 < one["table"][-1]["loss/policy"]


# --- kills and interruptions


def test_without_epochs_the_policy_does_not_change(finished: Path) -> None:
    """Without training there is still a next policy: the previous policy, not the base model."""
    succeed(finished, *SMOKE, "method=spin", "iterations=1", "trainer.epochs=0")
    before, after = summary(finished)["table"]
    assert after["eval/loss"] == before["eval/loss"]


def test_kill_9_at_any_moment_changes_no_number(tiny: Path, tmp_path: Path) -> None:
    """A run that is killed repeatedly at random moments ends with the numbers of the uninterrupted run."""
    moments = random.Random(5)
    hits = 0
    for attempt in range(40):
        process = Process(tmp_path, *SMOKE, *TINY)
        try:
            # later each time, so a slow machine ends too
            process.communicate(timeout=0.3 + moments.random() + attempt / 8)
        except subprocess.TimeoutExpired:
            process.signal_group(signal.SIGKILL)
            process.communicate(timeout=60)
            hits += 1
        else:
            assert process.returncode == 0
            break
    assert hits >= 1
    assert numbers(summary(tmp_path)) == numbers(first(tiny))


def test_kills_in_short_stages_and_in_the_first_seconds_change_no_number(tiny: Path, tmp_path: Path) -> None:
    """A few of ``python -m tests.kills``."""
    expected, moments = numbers(first(tiny)), random.Random(1)
    assert kills.kill_anywhere(tmp_path, 2, (*SMOKE, *TINY), expected, moments, []) == 0
    assert kills.kill_early(tmp_path, 1, ("scale=smoke", *TINY), expected, moments) == 0


def test_ctrl_c_ends_within_seconds_and_says_how_to_continue(tmp_path: Path) -> None:
    process = Process(tmp_path, *SMOKE, "sft.steps=100000")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "store").glob("sft/*.partial/checkpoint.ckpt")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.signal_group(signal.SIGINT)
    asked = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - asked < 10
    assert process.returncode == 130
    assert "run the same command again" in out
    assert "Traceback" not in err
    assert "begun" in succeed(tmp_path, *SMOKE, "sft.steps=100000", "plan=true")


def test_a_runs_answers_are_a_table_for_mlflows_comparison(smoke: Path) -> None:
    table = json.loads(min(smoke.glob("outputs/*/*/samples.json")).read_text())
    answers = ["iteration 1", "iteration 0", "SFT"]
    scored = [each for name in answers for each in (name, f"{name}, score")]
    assert table["columns"] == ["prompt", *scored, "human", "id"], "the view shows the first two columns"
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert len({row["id"] for row in rows}) == len(rows) == 48
    evaluation = next(each["key"] for each in first(smoke)["stages"] if each["title"] == "iteration 1 · evaluate")
    folder = smoke / "store" / "evaluate" / evaluation
    greedy = [item for item in read(folder / "items.parquet", Item) if item.kind == "greedy"]
    texts = [response.text for response in read(folder / "samples.parquet", Response)][: len(greedy)]
    found = {row["id"]: (row["iteration 1"], row["iteration 1, score"]) for row in rows}
    expected = zip(greedy, texts, strict=True)
    assert found == {item.id: (text, None if item.score is None else round(item.score, 2)) for item, text in expected}
    prompts = read(next((smoke / "store" / "prompts").glob("*/test.parquet")), Prompt)
    assert {row["id"]: (row["prompt"], row["human"]) for row in rows} == {
        prompt.id: (prompt.messages[-1]["content"], prompt.human) for prompt in prompts
    }


# --- sweeps


def test_a_sweep_shares_stages_nests_its_runs_and_reports_failures(tiny: Path, migrated: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "store", tmp_path / "store")  # of one of its jobs, so that the others' remain
    shutil.copy(migrated, tmp_path / "runs.db")
    jobs = ("npo.alpha=0.01,-1,0.1", "seed=0,1")
    done = train(tmp_path, "-m", "scale=smoke", *TINY, *jobs, MLFLOW_TRACKING_URI="sqlite:///runs.db")
    assert done.returncode == 1
    assert "npo.alpha=-1: " in done.stderr
    assert done.stderr.count("failed") == 2
    assert re.search(r"npo.alpha=0.01( +\d+\.\d ± \d+\.\d){3}", done.stdout)
    assert "HYDRA" not in done.stdout
    (announced,) = re.findall(r"^dnpo \S+: a sweep of 6 jobs, in (multirun/\S+)$", done.stdout, re.MULTILINE)
    reached = re.findall(r"^job (\d) of 6: score \d+\.\d → \d+\.\d, in (\S+)$", done.stdout, re.MULTILINE)
    assert reached == [(str(number + 1), f"{announced}/{number}") for number in (0, 1, 4, 5)]
    for label in ("results", "stages", "dashboard", "next"):
        (at,) = re.finditer(rf"^{label} ", done.stdout, re.MULTILINE)
        assert at.start() > done.stdout.rindex("job 6 of 6"), "once, at the end"
    optimised = list((tmp_path / "store" / "optimise").iterdir())
    shared = ("sft", "generate", "judge", "pairs", "reference")
    counts = {name: len(list((tmp_path / "store" / name).iterdir())) for name in shared}
    assert counts == {"sft": 2, "generate": 4, "judge": 2, "pairs": 4, "reference": 4}
    assert len(optimised) == 2 + 4  # iteration 0 by seed, iteration 1 by seed and alpha

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'runs.db'}")
    runs = client.search_runs([client.get_experiment_by_name("dnpo").experiment_id])
    (parent,) = [r for r in runs if r.data.tags["dnpo.kind"] == "sweep"]
    jobs = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(jobs) == 4
    assert {r.data.tags["dnpo.seed"] for r in jobs} == {"0", "1"}
    names = {f"alpha={alpha} seed={seed}" for alpha in ("0.01", "0.1") for seed in (0, 1)}
    assert {r.info.run_name for r in jobs} == names
    assert parent.data.tags["mlflow.source.name"] == "dnpo sweep"
    last = {
        r.info.run_name: json.loads(Path(client.download_artifacts(r.info.run_id, "summary.json")).read_text())[
            "table"
        ][-1]["eval/loss"]
        for r in jobs
    }
    means = {alpha: (last[f"alpha={alpha} seed=0"] + last[f"alpha={alpha} seed=1"]) / 2 for alpha in ("0.01", "0.1")}
    tracked = {alpha: parent.data.metrics[f"mean/eval/loss/npo.alpha {alpha}"] for alpha in means}
    assert tracked == pytest.approx(means)
    assert parent.data.metrics["best/eval/loss"] == pytest.approx(min(means.values()))


def test_the_plan_of_a_sweep_shows_shared_stages(tmp_path: Path) -> None:
    out = succeed(tmp_path, "-m", *SMOKE, "npo.alpha=0.01,0.1", "plan=true")
    assert (out.count("to do"), out.count("shared with job 0")) == (16 + 3, 13)
    lines = out.splitlines()
    assert [line for line in lines if line.startswith("job ")] == [
        f"job {number} of 2: npo.alpha={alpha}" for number, alpha in ((1, "0.01"), (2, "0.1"))
    ]
    assert not any(line.startswith("results") for line in lines), "there are none"


# --- does the method work


def test_labels_by_quality_beat_labels_by_origin(tmp_path: Path) -> None:
    """Half the default world and model; first iterations of SPIN and DSL. Over three seeds DSL was 3.6 to 4.9 points
    better here, and half of the smallest of these is required. The noise may help or harm, so it is not tested."""
    smaller = ("data.train=2400", "data.validation=60", "eval.sequences=64", "eval.samples=2")
    succeed(tmp_path, "-m", "tracking=off", "iterations=1", "acts_from=0", "method=spin,dsl", *smaller)
    found = json.loads(next(tmp_path.glob("multirun/*/*/sweep.json")).read_text())
    score = {
        row["settings"].split("method=")[1].split()[0]: row["values"][0]
        for row in found
        if row["metric"] == "eval/score" and row["iteration"] == 0
    }
    assert score["dsl"] > score["spin"] + 1.8
    first, last = (json.loads(p.read_text())["table"] for p in sorted(tmp_path.glob("multirun/*/*/*/summary.json")))
    assert 0.25 < first[1]["eval/win"] + first[1]["eval/tie"] < 0.35, "about 30 % are as good as the human ones"
    assert last[1]["pairs/flipped"] > 150


# --- a method of one's own


def test_a_method_is_one_yaml_and_one_small_module(finished: Path) -> None:
    """A user's labeller that prefers longer responses runs through the whole loop."""
    (finished / "longest.py").write_text(
        "from dnpo.dsl import AgainstHuman, Labelled\n\n\n"
        "class Longest(AgainstHuman):\n"
        "    def __init__(self, *, by: int = 1) -> None:\n"
        "        self.by = by\n\n"
        "    def __call__(self, prompt, candidates):\n"
        "        human, new = candidates\n"
        "        longer = new.response.tokens >= human.response.tokens + self.by\n"
        "        return [Labelled(new, human) if longer else Labelled(human, new)]\n"
    )
    (finished / "conf" / "method").mkdir(parents=True)
    (finished / "conf" / "method" / "longest.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /dsl: null\n  - override /npo: 'off'\n"
        "dsl:\n  _target_: longest.Longest\n  by: 2\n  start: 0\n"
    )
    succeed(finished, "--config-dir=conf", *SMOKE, "method=longest", "iterations=1")
    rows = summary(finished)["table"]
    assert all(row["pairs/flipped"] > 0 for row in rows[1:])
    wrong = train(finished, "--config-dir=conf", *SMOKE, "method=longest", "+dsl.bye=3")
    assert re.search(r"dsl\.bye: .*dsl\.by\b", wrong.stderr)


# --- bad input


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["npo.alhpa=1"], r"npo\.alhpa: .*npo\.alpha"),
        (["method=spni"], r"method=spni: .*\bspin\b"),
        (["npo.alpha=-1"], r"npo\.alpha=-1: .*\b0\b"),
        (["model=local", "model.path=nowhere"], r"model\.path=nowhere: "),
        (["data=jsonl", "data.path=nowhere.jsonl", "method=spin"], r"data\.path=nowhere\.jsonl"),
        (["judge=off"], "judge=off"),
        (["data.test=2000"], r"data\.test\b"),
        (["data=jsonl", "data.pth=x"], r"data\.pth: .*data\.path"),
        (["device=gpu"], "device=gpu: .*auto, cpu, cuda or cuda:N"),
        (["trainer.optimizer.lr=-1"], r"trainer\.optimizer\.lr=-1: "),
        (["tracking=mlflow", "tracking.uri=postgresql://x"], r"tracking\.uri=postgresql://x: "),
        (["store=/dev/null/x"], "store=/dev/null/x"),
        (["data.max_prompt_tokens=2"], r"data\.max_prompt_tokens\b"),
        (["tracking=mlflow", "tracking.uri=http://127.0.0.1:9"], r"tracking\.uri=http://127\.0\.0\.1:9: "),
    ],
)
def test_bad_input_is_answered_in_one_line_before_anything_is_computed(
    overrides: list[str], named: str, tmp_path: Path
) -> None:
    done = train(tmp_path, *SMOKE, *overrides)
    assert done.returncode == 1
    assert re.search(named, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    finished = [p for p in tmp_path.glob("store/[!.]*/*") if not p.name.endswith(".partial")]
    assert finished == []


def test_bad_rows_are_named_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": " "}\n')
    done = train(tmp_path, *SMOKE, "method=spin", "data=jsonl", "data.path=rows.jsonl")
    assert done.returncode == 1
    assert "rows.jsonl:2:" in done.stderr
    assert "response" in done.stderr


def test_verifiable_rows_of_a_file_can_be_judged_by_rules(tmp_path: Path) -> None:
    """Rows with an answer have scores and accuracies like the tiny world's."""
    rows = [
        {"id": i, "prompt": f"{i} plus {i}?", "response": f"It is {2 * i}.", "answer": str(2 * i)} for i in range(120)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    succeed(
        tmp_path,
        *SMOKE,
        "data=jsonl",
        "data.path=rows.jsonl",
        "data.max_response_tokens=16",
        "judge=rules",
        "sft.steps=20",
    )
    last = summary(tmp_path)["table"][-1]
    assert 0 <= last["eval/score"] <= 100
    assert last["eval/score_human"] == 100


def test_a_server_that_hangs_is_refused_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_reachable, "__defaults__", (0.5,))  # seconds instead of ten
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        done = train(tmp_path, "scale=smoke", f"tracking.uri=http://127.0.0.1:{port}")
    assert done.returncode == 1
    assert f"tracking.uri=http://127.0.0.1:{port}" in done.stderr


# --- real data and a real model


def test_real_data_and_a_real_model(shared: Path, tmp_path: Path) -> None:
    """stories260K on 80 rows of rasbt: fine-tuning, two iterations of NPO, everything finite."""
    rows = (shared / "data" / "sft_rasbt.jsonl").read_text().splitlines()[:80]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    succeed(
        tmp_path,
        *(
            "scale=smoke",
            "tracking=off",
            "method=npo",
            "model=local",
            f"model.path={shared / 'models' / 'stories260K'}",
        ),
        *("data=jsonl", "data.path=rows.jsonl", "data.max_response_tokens=32", "eval.sequences=24", "sft.steps=8"),
    )
    table = summary(tmp_path)["table"]
    assert all(np.isfinite(v) for row in table for v in row.values() if isinstance(v, float))
    assert "eval/score" not in table[-1]
    assert table[-1]["eval/loss"] > 0
    store = Store(tmp_path / "store")
    assert sorted({p.parent.parent.name for p in store.root.glob("*/*/manifest.json")}) == [
        *("drift", "evaluate", "generate", "optimise", "pairs", "prompts", "reference", "sft")
    ]
