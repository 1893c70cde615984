"""The maps of judges and of noise: sweeps, numbers, what they refuse, and the place of a measured judge."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analysis import command, fig15_judge_accuracy, fig16_noise_map
from analysis.fig15_judge_accuracy import ERRORS, LENGTH, Labelling, _read_gain
from analysis.fig16_noise_map import Place
from analysis.results import average, benchmarks, estimate, results
from analysis.selection import CONSTANT, DNPO, DSL, NPO, SPIN, Absent

from dnpo.judges.agreement.table import ON_MAP, notes
from dnpo.stats.intervals import Estimate
from dnpo.stats.paired import compare_paired
from tests.recording import Recorder, analysis, chosen, read
from tests.test_sweeps import built, jobs, laid_out, trainings

SWEEP = "judge_accuracy"


def test_spin_is_trained_once_for_all_judges_and_rules_measure_everything() -> None:
    """Of 7 jobs, iteration 0 is shared; a judge without errors differs from SPIN and from one with errors."""
    found = jobs(SWEEP, "seed=0", "data.flaws=0.15")
    assert len(found) == 7
    counts = trainings(found)
    assert counts["iteration 0 · optimise"] == 1
    assert {counts[f"iteration {k} · optimise"] for k in (1, 2, 3)} == {7}
    assert {type(built(*job)[0].judge).__name__ for job in found} == {"Rules"}
    evaluated = {laid_out(job)[1].evaluation.key for job in found}
    assert len(evaluated) == 1
    by_length = jobs("judge_length", "seed=0")
    spin = next(job for job in by_length if "+sweep/labels=origin" in job)
    same = next(job for job in jobs(SWEEP, "seed=0", "data.flaws=0.3") if "+sweep/labels=origin" in job)
    assert [i.evaluation.key for i in laid_out(spin)] == [i.evaluation.key for i in laid_out(same)]


def test_gains_are_paired_means_over_iterations(recorder: Recorder, tmp_path: Path) -> None:
    assert analysis(recorder, "fig15", "--out", str(tmp_path), "--no-log") == 0
    rows = read(tmp_path / "fig15_judge_accuracy.csv")
    assert [(row["flaws"], row["judge"], row["dial"]) for row in rows] == [
        (flaws, judge, dial)
        for flaws in ("0.15", "0.5")
        for judge, dial in (("", "0.0"), (LENGTH, "0.5"), (ERRORS, "0.0"), (ERRORS, "0.25"), (ERRORS, "0.45"))
    ]
    cells = chosen(recorder, sweeps=[SWEEP]).named(lambda run: repr(Labelling.of(run)), fig15_judge_accuracy._is_own)
    measure, own = average(benchmarks(cells)), [repr(each) for each in (Labelling(0.5, ERRORS, 0.25), Labelling(0.5))]
    sides = [np.mean([results(cells, measure, name, k, [0, 1]) for k in (1, 2)], axis=0) for name in own]
    expected = compare_paired(*sides, interval="t").difference
    (row,) = (row for row in rows if (row["flaws"], row["judge"], row["dial"]) == ("0.5", ERRORS, "0.25"))
    shown = [float(row[name]) for name in ("mean", "low", "high")]
    assert shown == pytest.approx([100 * (each or 0.0) for each in (expected.value, expected.low, expected.high)])
    by_seed = dict(part.split(": ") for part in row["by_seed"].split(", "))
    assert {int(seed): float(gain) for seed, gain in by_seed.items()} == pytest.approx(
        dict(enumerate(100 * (sides[0] - sides[1]).mean(1))), rel=1e-5
    )
    right = {(row["judge"], row["dial"]): float(row["right_labels_mean"]) for row in rows if row["flaws"] == "0.5"}
    assert right["", "0.0"] == pytest.approx(50.0)
    assert right[ERRORS, "0.45"] == pytest.approx(55.0)
    assert (tmp_path / "fig15_judge_accuracy.tex").is_file()


@pytest.mark.parametrize(
    ("value", "low", "high", "p_holm", "reading"),
    [
        (1.5, 0.1, 3.0, 0.05, "better"),
        (-1.5, -3.0, -0.1, 0.04, "worse"),
        (1.5, 0.1, 3.0, 0.051, "open"),  # only before the correction
        (-1.5, -3.0, -0.1, 0.5, "open"),
        (0.0, -0.9, 0.9, 1.0, "negligible"),
        (-0.2, -1.0, 0.5, 1.0, "open"),
        (0.3, -0.5, 1.2, 1.0, "open"),
        (0.3, 0.1, 0.5, 0.01, "better"),  # different from nothing, though small
        (0.3, 0.1, 0.5, 0.3, "negligible"),
        (0.3, None, None, 1.0, "open"),
    ],
)
def test_a_gain_is_read_as_one_of_four(
    value: float, low: float | None, high: float | None, p_holm: float, reading: str
) -> None:
    assert _read_gain(Estimate(value, low, high), p_holm) == reading


def test_seeds_that_all_agree_give_no_interval() -> None:
    """Three seeds whose labels are all right are three measurements, not three labels."""
    assert estimate(np.ones((3, 1)), "share") == Estimate(1.0)
    assert estimate(np.array([[0.9], [0.9], [0.9]]), "share") == Estimate(0.9)
    assert estimate(np.array([[0.9], [0.8], [0.9]]), "share").low is not None
    assert estimate(np.ones((3, 20)), "share").low is not None  # 20 answers, all right


def test_runs_that_the_map_cannot_place_are_refused(recorder: Recorder) -> None:
    def draw(sweep: str) -> None:
        command.load(command.scripts()["fig15_judge_accuracy"]).make(chosen(recorder, "strange", sweeps=[sweep]))

    params = {"data.flaws": "0.3", "eval.judge._target_": "rules"}
    for sweep, method, more, message in (
        ("both faults", DSL, {"judge.error": "0.1", "judge.length": "0.1"}, "judge.error and judge.length"),
        ("noise", DNPO, {}, f"a run of {DNPO}"),
        ("no spin", DSL, {"judge.error": "0.1"}, "no run of"),
    ):
        recorder.run(
            method, 0, experiment="strange", sweep=sweep, params={**params, **more}, more={"labels/decided": 0.4}
        )
        with pytest.raises(Absent, match=message):
            draw(sweep)
    for method in (SPIN, DSL):
        recorder.run(method, 0, experiment="strange", sweep="no answers", params={**params, "judge.error": "0.1"})
    with pytest.raises(Absent, match="labels/decided is not tracked"):
        draw("no answers")


def test_the_map_has_the_judges_of_its_sweep() -> None:
    labels = {given.partition("=")[2] for job in jobs(SWEEP, "seed=0") for given in job if "sweep/labels" in given}
    assert {f"judge_{share}" for share in ON_MAP} == labels - {"origin"}


def measured(value: float, low: float | None, high: float | None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "rows": 90, "reason": ""}


@pytest.mark.parametrize(
    ("accuracy", "bias", "parts"),
    [
        (
            (0.648, 0.577, 0.719),
            (0.02, -0.05, 0.09),
            (
                "accuracy 64.8 % (57.7 to 71.9): between the map's judges of 55 % and 75 %",
                "Read the curve of random errors",
            ),
        ),
        (
            (0.55, 0.45, 0.65),
            (0.02, -0.05, 0.09),
            ("(45.0 to 65.0), which includes chance: at most as good as the map's judge of 65 %", "random errors"),
        ),
        ((0.65, 0.58, 0.72), (0.12, 0.03, 0.21), ("Read the curve of a preference for length", "longer", "+12.0 pp")),
        (
            (0.65, 0.58, 0.72),
            (-0.12, -0.21, -0.03),
            ("No curve fits: it prefers shorter", "−12.0 pp", "no such judges"),
        ),
        ((0.98, 0.96, 0.99), (0.0, -0.1, 0.1), ("between the map's judges of 95 % and 100 %",)),
        ((1.0, 1.0, 1.0), (0.0, -0.1, 0.1), ("at the map's judge of 100 %",)),
        ((0.3, 0.2, 0.4), (0.0, -0.1, 0.1), ("at most as good as the map's judge of 55 %",)),
    ],
)
def test_a_measured_judge_has_a_place_on_the_map(
    accuracy: tuple[float, float, float], bias: tuple[float, float, float], parts: tuple[str, ...]
) -> None:
    report = {"labels": {}, "verdicts": {}, "unscored": 0}
    measures = {"accuracy": measured(*accuracy), "length_bias": measured(*bias)}
    *_, place = notes({**report, "measures": measures})
    assert all(part in place for part in (*parts, "fig15"))
    alone = notes({**report, "measures": {**measures, "accuracy": measured(1.0, None, None)}})
    assert len(alone) == 1  # one row has no interval, hence no place


# --- where noise helps


def test_the_noise_map_trains_once_for_each_place() -> None:
    """Jobs of a seed and share have generation and labels in common; β, epochs and noise only change the training."""
    found = jobs("noise_map", "seed=0", "data.flaws=0.3")
    assert len(found) == 24
    assert trainings(found).total() == 24  # the constant's stage of trainable noise is that of its own job
    assert len({laid_out(job)[1].labelled.key for job in found}) == 1  # type: ignore[union-attr]


def test_effects_of_noise_are_paired_in_each_place(recorder: Recorder, tmp_path: Path) -> None:
    assert analysis(recorder, "fig16", "--out", str(tmp_path), "--no-log") == 0
    rows = [
        {**row, "method": row["method"].removeprefix("'")}  # written so that no program takes +NPO for a formula
        for row in read(tmp_path / "fig16_noise_map.csv")
    ]
    assert [(row["method"], row["base"], row["epochs"]) for row in rows] == [
        (method, base, epochs) for method, base in fig16_noise_map.PAIRS for epochs in ("2", "6")
    ]
    cells = chosen(recorder, sweeps=["noise_map"]).named(lambda run: repr(Place.of(run)), fig16_noise_map._is_own)
    measure, own = average(benchmarks(cells)), [repr(Place(method, 0.3, 5.0, 6)) for method in (NPO, CONSTANT)]
    sides = [results(cells, measure, name, 0, [0, 1]) for name in own]
    expected = compare_paired(*sides, interval="t").difference
    (row,) = (row for row in rows if (row["method"], row["base"], row["epochs"]) == (NPO, CONSTANT, "6"))
    shown = [float(row[name]) for name in ("mean", "low", "high")]
    assert shown == pytest.approx([100 * (each or 0.0) for each in (expected.value, expected.low, expected.high)])
    assert float(row["saturation"]) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("low", "high", "negligible"), [(-0.9, 0.9, True), (-1.0, 0.9, False), (0.1, 0.9, True), (None, None, False)]
)
def test_an_effect_is_negligible_if_its_interval_is(low: float | None, high: float | None, negligible: bool) -> None:
    assert fig16_noise_map._is_negligible(Estimate(0.0, low, high)) is negligible
