"""Figures and tables from tracked runs: the runs used, the numbers, and the messages if runs are missing.

Runs are written into a real MLflow database in the form of real runs, with results drawn from a seed; the last test
makes real runs.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from analysis import command, published
from analysis.results import against, average, benchmarks, duel, estimate, outcome, results, score
from analysis.selection import CONSTANT, DNPO, DSL, FIXED, NPO, SPIN, Absent, _name_methods, method_of
from analysis.watched import LOSS

from dnpo import catalogue
from dnpo.errors import DataError
from dnpo.stats.paired import compare_paired
from dnpo.tracking.reading import SFT
from tests.commands import TINY, run_command, succeed
from tests.recording import FAMILIES, RIVALS, Recorder, analysis, chosen, read

# --- which runs count -------------------------------------------------------------------------------------------------


def test_methods_are_recognised_by_labels_and_noise_not_by_their_tag(recorder: Recorder) -> None:
    for sweep, methods in (
        ("main", [SPIN, DNPO]),
        ("ablation", [SPIN, DSL, NPO, DNPO]),
        ("fixed_vs_trainable", [SPIN, NPO, FIXED, CONSTANT]),
    ):
        runs = chosen(recorder, sweeps=[sweep])
        assert {run.option("method") for run in runs.finished} == {"spin"}
        assert list(dict.fromkeys(sorted(map(method_of, runs.finished), key=methods.index))) == methods


def test_a_chain_has_all_iterations_and_a_branch_only_its_last(recorder: Recorder) -> None:
    chains = chosen(recorder, sweeps=["main"]).chains()
    assert (chains.methods, chains.iterations, chains.seeds) == ([SPIN, DNPO], [SFT, 0, 1, 2], [0, 1, 2])
    branches = chosen(recorder, sweeps=["ablation"]).branches()
    assert (branches.methods, branches.iterations, branches.seeds) == ([SPIN, DSL, NPO, DNPO], [1, 2], [0, 1])
    assert all(run.last["iteration"] == k for (_, k, _), run in branches.runs.items())
    assert (chains.notes, branches.notes) == ((), ())


def test_chains_are_not_taken_for_branches(recorder: Recorder) -> None:
    with pytest.raises(Absent, match=r"sweep main .*SPIN"):
        chosen(recorder, sweeps=["main"]).branches()


def test_no_match_is_reported_with_what_exists(
    recorder: Recorder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert analysis(recorder, "all", "--sweep", "mine", "--out", str(tmp_path)) == 1
    error = capsys.readouterr().err
    assert "mine" in error
    assert "main (6 runs)" in error
    assert analysis(recorder, "fig05", "--tag", "npo.alpha=7", "--out", str(tmp_path)) == 1
    assert "npo.alpha=7" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_missing_run_is_named(recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    assert analysis(recorder, "fig05", "--runs", "feedbeef") == 1
    assert "feedbeef" in capsys.readouterr().err


def test_wrong_requests_are_refused(recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    assert analysis(recorder, "fig6") == 1
    assert re.search(r"fig6: .*\bfig06\b", capsys.readouterr().err)
    assert analysis(recorder, "fig06", "--tag", "alpha") == 1
    assert "tag=alpha: " in capsys.readouterr().err
    assert command.main(["fig06", "--uri", "sqlite:///there-is-none.db"]) == 1
    assert "there-is-none.db" in capsys.readouterr().err


def test_unfinished_runs_are_left_out_and_missing_cells_named(recorder: Recorder, tmp_path: Path) -> None:
    for seed in range(2):
        recorder.run(SPIN, seed, experiment="half")
    recorder.run(DNPO, 0, experiment="half")
    recorder.run(DNPO, 1, experiment="half", status="FAILED")
    recorder.run(SPIN, 2, experiment="half", status="RUNNING")
    recorder.run(DNPO, 2, experiment="half", status="KILLED")
    cells = chosen(recorder, "half", sweeps=["main"]).chains()
    assert cells.seeds == [0, 1]
    assert cells.missing == [f"DNPO {k} seed 1" for k in ("SFT", "k=0", "k=1", "k=2")]
    assert any("1 FAILED" in n and "1 RUNNING" in n and "1 KILLED" in n for n in cells.notes)
    assert analysis(recorder, "fig06", "table01", "fig07", "--out", str(tmp_path), experiment="half") == 0
    picture, table = (tmp_path / "fig06_judge_score.svg").read_text(), (tmp_path / "table01_main.md").read_text()
    for words in ("Left out as not finished", "Missing: DNPO SFT seed 1"):
        assert words in table
    assert "Missing" in texts_of(picture, "fig06", recorder, "half")
    # A paired comparison has the seeds that both sides have.
    assert {row["seeds"] for row in read(tmp_path / "fig07_dnpo_vs_spin.csv")} == {"1"}


def texts_of(svg: str, name: str, recorder: Recorder, experiment: str) -> str:
    """The footer of a picture, read from the figure, since lines of a text are separate in an SVG."""
    assert svg.startswith("<?xml")
    script = command.load(command.scripts()[command.resolve([name])[0]])
    made = script.make(chosen(recorder, experiment, sweeps=[script.SWEEP]))
    return str(made.figure.get_supxlabel())


def test_no_finished_run_gives_a_message(recorder: Recorder) -> None:
    recorder.run(SPIN, 0, experiment="none", status="RUNNING")
    with pytest.raises(DataError, match=r"sweep main: .*1 RUNNING"):
        chosen(recorder, "none", sweeps=["main"])


def test_figures_and_tables_say_that_there_is_one_seed(recorder: Recorder, tmp_path: Path) -> None:
    tag = ["--tag", "dnpo.seed=0", "--out", str(tmp_path), "--no-log"]
    assert analysis(recorder, "fig05", "fig06", "fig07", "table01", "table05", *tag) == 0
    made = command.load(command.scripts()["fig05_benchmark"]).make(
        chosen(recorder, sweeps=["main"], tags={"dnpo.seed": "0"})
    )
    assert "ONE SEED (0)" in made.figure.get_supxlabel()
    assert "over items;" in made.figure.get_supxlabel()
    assert "One seed (0): intervals are over items only" in (tmp_path / "table01_main.md").read_text()
    assert all(float(row["low"]) < float(row["mean"]) for row in read(tmp_path / "fig05_benchmark.csv"))
    # BLEU is one number for each run, so one seed has no interval and no test.
    bleu = [row for row in read(tmp_path / "table05_text_metrics.csv") if row["row"].startswith("BLEU")]
    assert bleu
    assert not any(row["low"] or row["p"] for row in bleu)


def test_the_newest_run_of_the_same_settings_and_seed_counts(recorder: Recorder) -> None:
    old = recorder.run(SPIN, 0, experiment="twice")
    new = recorder.run(SPIN, 0, experiment="twice")
    cells = chosen(recorder, "twice", sweeps=["main"]).chains()
    assert [run.id for run in cells.used] == [new] != [old]
    assert cells.notes == ("1 run left out: a newer one has the same settings and seed",)


@pytest.mark.parametrize(
    ("params", "shown"),
    [
        ({"objective.beta": "5.0"}, "objective.beta is 1.0 (2 runs), 5.0 (1 run)"),
        ({"npo.alpha": "0.01"}, "npo.alpha is 0.1 (1 run), 0.01 (1 run)"),
        ({"eval.samples": "8"}, "eval.samples is absent (2 runs), 8 (1 run)"),
        ({"data.seed": "99"}, "data.seed is the run's seed (2 runs), 99 (1 run)"),
    ],
)
def test_mixed_settings_are_refused_by_name(recorder: Recorder, params: dict[str, str], shown: str) -> None:
    experiment = f"mixed {next(iter(params))}"
    for method in (SPIN, DNPO):
        recorder.run(method, 0, experiment=experiment)
    recorder.run(DNPO, 1, experiment=experiment, params=params)
    with pytest.raises(DataError) as error:
        chosen(recorder, experiment, sweeps=["main"]).chains()
    name, value = next(iter(params.items()))
    assert shown in str(error.value)
    assert f"tag={name}=" in str(error.value)
    narrowed = chosen(recorder, experiment, sweeps=["main"], tags={name: value}).chains()
    assert narrowed.seeds == [1]


def test_a_run_from_before_a_setting_counts_with_its_default(recorder: Recorder) -> None:
    """A note says so; another value is refused, and so is a setting whose default this version cannot know."""
    part = {"sft._target_": "dnpo.optimise.parts.Optimisation"}
    recorder.run(SPIN, 0, experiment="settings", params=part)
    recorder.run(DNPO, 0, experiment="settings", params={**part, "sft.keep": "last", "sft.patience": "0"})
    note = "1 run from before these settings existed, with their defaults: sft.keep=last, sft.patience=0"
    assert chosen(recorder, "settings", sweeps=["main"]).chains().notes == (note,)
    recorder.run(DNPO, 1, experiment="settings", params={**part, "sft.keep": "best"})
    with pytest.raises(DataError) as error:
        chosen(recorder, "settings", sweeps=["main"]).chains()
    assert "comparison: sft.keep is last (2 runs, 1 of them by default), best (1 run). Narrow" in str(error.value)
    recorder.run(SPIN, 0, experiment="newer", params=part)
    recorder.run(DNPO, 0, experiment="newer", params={**part, "sft.unheard_of": "7"})
    with pytest.raises(
        DataError, match=r"sft\.unheard_of is absent .* does not know sft\.unheard_of; install the version that"
    ):
        chosen(recorder, "newer", sweeps=["main"]).chains()


def test_the_same_seed_under_two_settings_is_not_a_repetition(recorder: Recorder) -> None:
    recorder.run(NPO, 0, experiment="alphas")
    recorder.run(NPO, 0, experiment="alphas", params={"npo.alpha": "1.0"})
    with pytest.raises(DataError, match=r"npo\.alpha is 0\.1 \(1 run\), 1\.0 \(1 run\)"):
        chosen(recorder, "alphas", sweeps=["main"]).chains()


def test_branches_from_different_iterations_are_not_a_chain(recorder: Recorder) -> None:
    runs = chosen(recorder, sweeps=["ablation"])
    with pytest.raises(DataError, match=r"dsl\.start is 1 \(\d runs\), 2 .*tag=dsl\.start="):
        runs.chains()
    assert chosen(recorder, sweeps=["ablation"], tags={"dsl.start": "1"}).chains().iterations == [SFT, 0, 1]


def test_settings_without_effect_do_not_matter(recorder: Recorder) -> None:
    recorder.run(SPIN, 0, experiment="alike")
    other = {"threads": "8", "device": "cuda", "tracking.uri": "x", "trainer.micro_batch_size": "4", "dsl.start": "7"}
    recorder.run(DNPO, 0, experiment="alike", params=other | {"dsl.start": "1", "second_judge._target_": "judge"})
    runs = chosen(recorder, "alike", sweeps=["main"])
    assert runs.chains().methods == [SPIN, DNPO]
    with pytest.raises(DataError, match="second_judge"):  # it matters if the second judge is shown
        runs.chains(matters=["second_judge."])


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_means_over_items_equal_the_tables_of_the_runs(recorder: Recorder) -> None:
    cells = chosen(recorder, sweeps=["main"]).chains()
    those = benchmarks(cells)
    assert [each.label for each in those] == list(FAMILIES)
    measures = [*those, average(those), score(), score("second"), outcome("win"), outcome("tie", "second")]
    for measure in measures:
        for method in cells.methods:
            for k in cells.iterations:
                x_SI = results(cells, measure, method, k, cells.seeds)
                assert x_SI.shape[0] == 3
                assert x_SI.shape[1] in (recorder.prompts, recorder.prompts // 6)
                rows = [run.row(k)[measure.name] for run in cells.of(method, k)]
                np.testing.assert_allclose(x_SI.mean(1), rows, atol=1e-12)


def test_a_benchmark_weighs_its_tasks_as_the_leaderboard_does(recorder: Recorder) -> None:
    for seed in range(2):
        for method in (SPIN, DNPO):
            recorder.run(method, seed, experiment="board", leaderboard=True)
    cells = chosen(recorder, "board", sweeps=["main"]).chains()
    those = benchmarks(cells)
    assert [each.label for each in those] == ["ARC", "TruthfulQA", "Winogrande", "GSM8K", "HellaSwag", "MMLU"]
    for measure in [*those, average(those)]:
        x_SI = results(cells, measure, DNPO, 1, cells.seeds)
        rows = [run.row(1)[measure.name] for run in cells.of(DNPO, 1)]
        np.testing.assert_allclose(x_SI.mean(1), rows, atol=1e-12)


def test_a_comparison_equals_dnpos_paired_comparison(recorder: Recorder) -> None:
    cells = chosen(recorder, sweeps=["main"]).chains()
    a_SI, b_SI = (results(cells, score(), method, 2, cells.seeds) for method in (DNPO, SPIN))
    found, expected = against(a_SI, b_SI), compare_paired(a_SI, b_SI, interval="t")
    assert found is not None
    assert (found.difference, found.p, found.detectable) == (expected.difference, expected.p, expected.detectable)
    assert found.difference.value == pytest.approx((a_SI - b_SI).mean())


def test_without_items_only_seeds_are_compared() -> None:
    a_S1, b_S1 = np.array([[0.3], [0.5], [0.4]]), np.array([[0.2], [0.3], [0.3]])
    # differences 0.1, 0.2, 0.1: mean 0.1333, standard error 0.0333, t of 2 degrees of freedom 4.3027
    found = against(a_S1, b_S1)
    assert found is not None
    assert found.difference.value == pytest.approx(0.13333, abs=1e-5)
    assert found.difference.low == pytest.approx(0.13333 - 4.30265 * 0.033333, abs=1e-5)
    assert found.p == pytest.approx(0.057191, abs=1e-6)  # t = 4
    assert estimate(a_S1[:1]).low is None
    assert against(a_S1[:1], b_S1[:1]) is None


def test_items_without_a_score_are_left_out() -> None:
    x_SI = np.array([[1.0, np.nan, 3.0], [2.0, 5.0, 4.0]])
    assert estimate(x_SI).value == 2.5
    with pytest.raises(Absent, match="no item has a value under every seed"):
        estimate(np.array([[np.nan], [1.0]]))


def test_answers_without_a_score_are_left_out_and_reported(recorder: Recorder, tmp_path: Path) -> None:
    recorder.run(SPIN, 0, experiment="unscored", unscored=2)
    recorder.run(DNPO, 0, experiment="unscored", unscored=3)
    cells = chosen(recorder, "unscored", sweeps=["main"]).chains()
    for name in ("fig06_judge_score", "fig07_dnpo_vs_spin"):
        made = command.load(command.scripts()[name]).make(chosen(recorder, "unscored", sweeps=["main"]))
        assert "Up to 3 items that lack a score under some seed are left out." in made.figure.get_supxlabel()
    assert analysis(recorder, "fig06", "--out", str(tmp_path), "--no-log", experiment="unscored") == 0
    for row in (row for row in read(tmp_path / "fig06_judge_score.csv")[:-1] if not row["base"]):
        k = row["iteration"] if row["iteration"] == SFT else int(row["iteration"])
        assert float(row["mean"]) == pytest.approx(cells.of(row["method"], k)[0].row(k)["eval/score"])
        left = {SPIN: 2, DNPO: 3}[row["method"]]
        assert (int(row["items"]), int(row["unscored"])) == (recorder.prompts - left, left)


def test_a_duel_compares_sample_by_sample(recorder: Recorder) -> None:
    cells = chosen(recorder, sweeps=["main"]).chains()
    ours, theirs = cells.runs[DNPO, 1, 0], cells.runs[SPIN, 1, 0]
    found = duel(ours, theirs, 1)
    tables = [pq.read_table(run.artifact("items/iteration-1.parquet")).to_pylist() for run in (ours, theirs)]
    wins = 0
    for mine in tables[0]:
        for other in tables[1]:
            same = all(mine[name] == other[name] for name in ("id", "kind", "sample"))
            wins += same and mine["kind"] == "sample" and mine["score"] > other["score"]
    assert sum(found["win"].values()) * recorder.samples == pytest.approx(wins)
    for prompt in found["win"]:
        assert sum(found[name][prompt] for name in ("win", "tie", "lose")) == pytest.approx(1)


# --- figures and tables -----------------------------------------------------------------------------------------------


def test_pictures_have_print_quality_and_the_numbers_drawn(recorder: Recorder, tmp_path: Path) -> None:
    assert analysis(recorder, "fig06", "--out", str(tmp_path), "--no-log") == 0
    from PIL import Image

    with Image.open(tmp_path / "fig06_judge_score.png") as image:
        assert min(image.info["dpi"]) >= 299.9
        assert image.size[0] >= 3.3 * 300
    rows = read(tmp_path / "fig06_judge_score.csv")
    cells = chosen(recorder, sweeps=["main"]).chains()
    for row in (row for row in rows[:-1] if not row["base"]):
        k = row["iteration"] if row["iteration"] == SFT else int(row["iteration"])
        expected = np.mean([run.row(k)["eval/score"] for run in cells.of(row["method"], k)])
        assert float(row["mean"]) == pytest.approx(expected)
        assert float(row["low"]) < expected < float(row["high"])
    assert float(rows[-1]["mean"]) == pytest.approx(cells.of(SPIN, 0)[0].row(0)["eval/score_human"])


def test_the_same_runs_give_the_same_files(recorder: Recorder, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert analysis(recorder, "fig05", "table01", "--out", str(tmp_path / name), "--no-log") == 0
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_runs_outside_a_sweep_get_their_figures(recorder: Recorder, tmp_path: Path) -> None:
    ids = [recorder.run(method, 0, experiment="loose", sweep=None) for method in (SPIN, DNPO)]
    assert analysis(recorder, "fig05", "--runs", *ids, "--out", str(tmp_path), experiment="loose") == 0
    for run in ids:
        assert "analysis/fig05_benchmark.csv" in {each.path for each in recorder.client.list_artifacts(run, "analysis")}
    assert analysis(recorder, "fig06", "--sweep", "any", "--out", str(tmp_path), "--no-log", experiment="loose") == 0
    assert len(recorder.client.list_artifacts(ids[0], "analysis")) == 5


def test_one_failed_figure_does_not_stop_the_others(
    recorder: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recorder.run(DNPO, 0, experiment="broken", texts=True)
    broken = tmp_path / "iteration-1.json"
    broken.write_text("no JSON")
    recorder.client.log_artifact(run, str(broken), "steps")
    assert analysis(recorder, "fig06", "fig07", "fig09", "--out", str(tmp_path), experiment="broken") == 1
    out = capsys.readouterr().out
    assert "JSONDecodeError" in out
    assert "fig07_dnpo_vs_spin: the selection has no run of SPIN" in out
    assert "1 drawn, 1 skipped, 1 failed" in out
    # Missing data are not a failure if anything can be drawn.
    assert analysis(recorder, "fig06", "fig07", "--out", str(tmp_path), experiment="broken") == 0
    assert analysis(recorder, "fig07", "--out", str(tmp_path), experiment="broken") == 1


def test_measures_that_were_not_tracked_are_named(
    recorder: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analysis(recorder, "table05", "--sweep", "ablation", "--tag", "dsl.start=1", "--out", str(tmp_path)) == 1
    assert "eval=texts" in capsys.readouterr().out


def test_tables_compare_with_spin_and_keep_the_papers_numbers_apart(recorder: Recorder, tmp_path: Path) -> None:
    assert analysis(recorder, "table01", "table07", "--out", str(tmp_path), "--no-log") == 0
    rows = read(tmp_path / "table01_main.csv")
    assert {row["row"] for row in rows if row["p"]} == {"DNPO, k=1", "DNPO, k=2"}
    cells = chosen(recorder, sweeps=["main"]).chains()
    a_SI, b_SI = (results(cells, average(benchmarks(cells)), method, 2, cells.seeds) for method in (DNPO, SPIN))
    (cell,) = [row for row in rows if (row["row"], row["column"]) == ("DNPO, k=2", "Average")]
    assert float(cell["value"]) == pytest.approx(a_SI.mean())
    assert float(cell["p"]) == pytest.approx(compare_paired(a_SI, b_SI, interval="t").p)
    assert float(cell["p_holm"]) >= float(cell["p"])
    assert (cell["star"] == "1") == (float(cell["p_holm"]) <= 0.05)
    paper = [row for row in rows if row["column"] == published.COLUMN]
    assert {row["row"]: float(row["value"]) for row in paper}["DNPO, k=1"] == 0.604
    assert "Minimum detectable difference" in (tmp_path / "table01_main.md").read_text()
    text = (tmp_path / "table07_fixed_vs_trainable.tex").read_text()
    assert "+NPO $-$ constant, k=1" in text
    assert text.count("\\\\\n") == 1 + len({row["row"] for row in read(tmp_path / "table07_fixed_vs_trainable.csv")})


def test_tables_show_loss_and_kl_beside_the_results(recorder: Recorder, tmp_path: Path) -> None:
    names = ("table01_main", "table02_rivals", "table06_ablation", "table07_fixed_vs_trainable")
    assert analysis(recorder, *names, "--out", str(tmp_path), "--no-log") == 0
    loss, kl = (catalogue.metric(name).label for name in ("eval/loss", "drift/initial"))
    cells, marked = chosen(recorder, sweeps=["main"]).chains(), 0
    rows = {(row["row"], row["column"]): row for row in read(tmp_path / "table01_main.csv")}
    assert (SFT, loss) in rows
    assert (SFT, kl) not in rows, "the initial policy has no KL to itself"
    for k in (1, 2):
        tracked = [run.row(k) for run in cells.of(DNPO, k)]
        for column, name in ((loss, "eval/loss"), (kl, "drift/initial")):
            cell = rows[f"{DNPO}, k={k}", column]
            assert float(cell["value"]) == pytest.approx(np.mean([row[name] for row in tracked]))
            assert cell["low"]
            assert not cell["p"], "it would weaken the correction of the gains"
        apart = [
            against(*(results(cells, measure, method, k, cells.seeds) for method in (DNPO, SPIN)))
            for measure in (average(benchmarks(cells)), LOSS)
        ]
        worse = all(each is not None and each.difference.low is not None and each.difference.low > 0 for each in apart)
        assert rows[f"{DNPO}, k={k}", loss]["text"].endswith("†") == worse
        assert not rows[f"{SPIN}, k={k}", loss]["text"].endswith("†")
        marked += worse
    assert marked
    assert "†: the average is better than the other side's" in (tmp_path / "table01_main.md").read_text()
    assert f"| *{loss}* | *{kl}* |" in (tmp_path / "table01_main.md").read_text()
    others = {name: {row["column"] for row in read(tmp_path / f"{name}.csv")} for name in names}
    assert all({loss, kl} <= columns for columns in others.values())
    differences = {(row["row"], row["column"]): row for row in read(tmp_path / f"{names[-1]}.csv")}
    assert differences[f"'{NPO} − constant, k=1", loss]["text"][0] in "+−0"


def test_without_spin_a_table_shows_what_there_is_and_compares_nothing(recorder: Recorder, tmp_path: Path) -> None:
    arguments = ["--tag", "dnpo.dsl=score", "--out", str(tmp_path), "--no-log"]
    assert analysis(recorder, "table01", "table05", *arguments) == 0
    for name in ("table01_main", "table05_text_metrics"):
        rows = [row for row in read(tmp_path / f"{name}.csv") if row["low"]]
        assert any("DNPO" in row["row"] for row in rows)
        assert not any(row["p"] for row in rows)


def test_the_table_of_all_methods_has_their_final_numbers_and_costs(recorder: Recorder, tmp_path: Path) -> None:
    cells = chosen(recorder, sweeps=["methods"]).rivals()
    assert cells.methods == ["spin", "dnpo", "dpo", "mine"]
    assert cells.notes == ()
    assert analysis(recorder, "table02", "fig14", "--out", str(tmp_path), "--no-log") == 0
    rows = {(row["row"], row["column"]): row for row in read(tmp_path / "table02_rivals.csv")}
    points = {row["method"]: row for row in read(tmp_path / "fig14_methods.csv")}
    for name, (_, iterations) in RIVALS.items():
        ends = [run.last for run in cells.at_end(name)]
        assert [row["iteration"] for row in ends] == [iterations - 1] * 2
        shares = {
            "generated/tokens": 1000.5 * iterations,  # of seeds 0 and 1
            "trained/tokens": 5000 * iterations,
            "judge/verdicts": {"dnpo": 80, "mine": 40}.get(name, 0),  # not in iteration 0
            "seconds": 2 * iterations,  # neither fine-tuning nor measuring
            "drift/initial": 0.1 * iterations + 0.005,
            "eval/score": np.mean([row["eval/score"] for row in ends]),
        }
        for column, expected in shares.items():
            assert float(points[name][f"{column}_mean"]) == pytest.approx(expected)
            assert float(rows[name, catalogue.metric(column).label]["value"]) == pytest.approx(expected)
        assert float(points[name]["trained/flop_mean"]) == pytest.approx(6 * 300_000 * 5000 * iterations)
    begun = [run.row(SFT)["eval/score"] for run in cells.at_end("spin")]
    assert float(rows["fine-tuned", "score"]["value"]) == pytest.approx(np.mean(begun))
    assert rows["dnpo", "score"]["p"]
    assert not rows["spin", "score"]["p"]
    assert {name for name, column in rows if column == published.COLUMN} == {"dnpo", "PPO (not run here)"}
    here = {name: row["text"] for (name, column), row in rows.items() if column == "here"}
    gain = np.mean([run.last["eval/score"] - run.row(SFT)["eval/score"] for run in cells.at_end("dpo")])
    assert here["dpo"].startswith(f"undecided: dpo@0 − dpo@SFT {gain:+.1f} (".replace("-", "−"))  # two seeds
    assert here["dnpo"] == "not measured"  # it has fewer iterations than the claim
    assert here["mine"] == ""
    assert "Rafailov" in rows["dpo", "claim"]["text"]


def test_methods_may_differ_in_anything_but_their_start_and_measures(recorder: Recorder) -> None:
    where = "beginnings"
    of_mine = {"rollout.samples": "8", "judge._target_": "own", "eval.judge._target_": "rules"}
    recorder.run(SPIN, 0, experiment=where, params={"judge._target_": "rules"})
    recorder.run(SPIN, 0, experiment=where, params=of_mine, tags={"dnpo.method": "mine"})
    assert chosen(recorder, where, sweeps=["main"]).rivals().methods == ["spin", "mine"]
    recorder.run(SPIN, 1, experiment=where, params=of_mine, tags={"dnpo.method": "mine"})
    assert chosen(recorder, where, sweeps=["main"]).rivals().notes == ("missing: seed 1 of spin",)
    recorder.run(SPIN, 2, experiment=where, params=of_mine, tags={"dnpo.method": "mine"})
    assert chosen(recorder, where, sweeps=["main"]).rivals().notes == ("missing: seeds 1-2 of spin",)
    assert _name_methods(["spin", "mine", "dpo"], ["spin", "mine", "dpo", "ipo"]) == "all methods but ipo"
    recorder.run(SPIN, 1, experiment=where, params={"judge._target_": "rules", "model.width": "8"})
    with pytest.raises(DataError, match=r"model\.width is absent"):
        chosen(recorder, where, sweeps=["main"]).rivals()
    recorder.run(SPIN, 2, experiment=where, params={"judge._target_": "longer"})
    with pytest.raises(DataError, match="different judges"):
        chosen(recorder, where, sweeps=["main"]).rivals()


def test_published_averages_equal_the_means_of_their_cells() -> None:
    printed = {**published.MAIN, **published.BRANCHES, **published.RIVALS}
    printed.pop(DNPO)  # table 2 of the paper: its six numbers average 0.598, and 0.604 is printed
    for cells in printed.values():
        assert len(cells) == 7
        assert cells[-1] == pytest.approx(np.mean(cells[:6]), abs=0.0011)
    for cells in published.TEXTS.values():
        assert cells[-1] == pytest.approx(np.mean(cells[2:5]), abs=0.0006)


def test_the_papers_curve_is_drawn_only_with_runs_of_its_setting(recorder: Recorder) -> None:
    setting = {"tags": {"dnpo.scale": "7b"}, "params": {"eval.leaderboard": "x"}}
    for method in (SPIN, DNPO):
        recorder.run(method, 0, experiment="paper", leaderboard=True, **setting)  # type: ignore[arg-type]
    script = command.load(command.scripts()["fig05_benchmark"])
    labels = {}
    for experiment in ("paper", "dnpo"):
        axis = script.make(chosen(recorder, experiment, sweeps=["main"])).figure.axes[0]
        labels[experiment] = axis.get_legend_handles_labels()[1]
    assert {"SPIN, paper", "DNPO, paper"} <= set(labels["paper"])
    assert set(labels["dnpo"]) == {SPIN, DNPO}


def test_every_required_figure_and_table_exists(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {name.split("_")[0] for name in command.scripts()}
    assert numbers == {f"fig{n:02}" for n in (1, 2, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16)} | {
        f"table{n:02}" for n in (1, 2, 5, 6, 7)
    }
    assert command.resolve(["fig12"]) == ["fig11_second_judge"]
    assert command.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in command.scripts())


def test_on_a_terminal_titles_of_figures_continue_below_each_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command.main(["--list"]) == 0
    whole = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    further = [line for line in lines if line.startswith(" ")]
    assert further
    assert all(len(line) < 80 for line in lines)
    assert all(line[: command.BESIDE].isspace() and line[command.BESIDE] != " " for line in further)
    assert "\n".join(lines).split() == whole.split()


@pytest.mark.long
def test_real_runs_are_drawn_with_the_numbers_of_their_summaries(tiny: Path, migrated: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "store", tmp_path / "store")
    shutil.copy(migrated, tmp_path / "mlflow.db")
    succeed(tmp_path, "-m", "+sweep=main", "scale=smoke", *TINY, "seed=0,1", "judge@second_judge=correct")
    drawn = run_command(tmp_path, "analysis.command", "all", "--out", "figures")
    assert drawn.returncode == 0, drawn.stdout + drawn.stderr
    assert "drawn" in drawn.stdout
    summaries = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("multirun/*/*/*/summary.json"))]
    assert len(summaries) == 4
    names = {path.stem for path in (tmp_path / "figures").glob("*.csv")}
    wanted = {"fig01", "fig02", "fig05", "fig06", "fig07", "fig09", "fig10", "fig11", "table01"}
    assert wanted <= {name.split("_")[0] for name in names}
    for name, metric, scale in (("fig05_benchmark", "eval/accuracy", 100), ("fig06_judge_score", "eval/score", 1)):
        for row in read(tmp_path / "figures" / f"{name}.csv"):
            if row["method"] not in (SPIN, DNPO) or row["base"]:
                continue
            labels = {SPIN: "dnpo.dsl.HumanChosen", DNPO: "dnpo.dsl.HigherScoreChosen"}[row["method"]]
            values = [
                iteration[metric]
                for summary in summaries
                if summary["settings"]["dsl"]["_target_"] == labels
                for iteration in summary["table"]
                if str(iteration["iteration"]) == row["iteration"]
            ]
            assert len(values) == 2
            assert float(row["mean"]) == pytest.approx(scale * np.mean(values), abs=1e-9)
    for row in read(tmp_path / "figures" / "table01_main.csv"):
        if row["row"] != "DNPO, k=1" or row["column"] not in FAMILIES:
            continue
        values = [
            summary["table"][-1][f"eval/accuracy/{row['column']}"]
            for summary in summaries
            if summary["settings"]["dsl"]["_target_"].endswith("HigherScoreChosen")
        ]
        assert float(row["value"]) == pytest.approx(np.mean(values), abs=1e-9)
