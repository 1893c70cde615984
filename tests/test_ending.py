"""What a run shows at its end, and its progress while it computes."""

import functools
import io
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console as RichConsole
from scipy import stats

from dnpo.catalogue import metric
from dnpo.records import Item
from dnpo.report.comparison import MeasureComparison, ReportMeasure
from dnpo.running import console as module
from dnpo.running.console import BEST, COMPACT, NARROW, Console, compact_table, wide_table
from dnpo.running.ending import find_intervals, sentences, show_results
from dnpo.running.execute import show_job
from dnpo.running.gate import Finding, show
from dnpo.running.sweep import _gather, _show_comparison, _show_places, _show_spread, describe_place, name_job
from dnpo.screen import ScreenTable
from dnpo.stats.intervals import Estimate
from dnpo.stats.paired import compare_paired
from dnpo.stats.prompts import by_prompt, change, mean
from dnpo.stats.table import Cell
from dnpo.stats.table import table as stats_table
from dnpo.store import Store
from dnpo.tables import write


def printed(table: Any) -> str:
    stream = io.StringIO()
    RichConsole(file=stream, width=200).print(table)
    return stream.getvalue()


@pytest.mark.parametrize("seed", range(20))
def test_the_table_fits_any_terminal_for_all_measures(seed: int) -> None:
    random = np.random.default_rng(seed)
    names = [name for name in COMPACT if random.random() < 0.8] or ["eval/loss"]
    rows = [
        {
            "iteration": "SFT" if k == 0 else k,
            **{
                name: None if random.random() < 0.2 else random.choice([1, 100, 1e4]) * random.random()
                for name in names
            },
        }
        for k in range(4)
    ]
    halves = {"eval/score": [1.0, None, 22.2, 3.0], "eval/accuracy": [0.02] * 4}
    around = {
        name: [None if half is None else Estimate(0.0, -half, half) for half in by] for name, by in halves.items()
    }
    text = printed(compact_table(rows, around, 2))
    lines = text.splitlines()
    assert max(map(len, (line.rstrip() for line in lines))) <= NARROW
    assert [line.split()[0] == BEST for line in lines[2:]] == [False, False, True, False]
    first = next((name for name in COMPACT if any(row.get(name) is not None for row in rows)), "")
    assert metric(first).heading in lines[1]


@pytest.mark.parametrize("scored", [(), ("eval/score",), ("eval/score", "second/score")], ids=len)
@pytest.mark.parametrize("right", [(), ("leaderboard/average",), ("eval/accuracy",)], ids=str)
@pytest.mark.parametrize("labelled", [(), ("pairs/flips",)], ids=len)
@pytest.mark.parametrize("compared", [(), ("eval/win", "eval/lose")], ids=len)
def test_similar_runs_have_the_same_columns(
    scored: tuple[str, ...], right: tuple[str, ...], labelled: tuple[str, ...], compared: tuple[str, ...]
) -> None:
    """What is measured decides on the columns, however long the numbers are; all of them fit."""
    others = ("drift/kl", "eval/loss", "stagnation/ks", "loss/policy", "seconds")
    shown = set()
    for points, share, half, other in ((1.0, 0.01, 0.1, 0.1), (99.9, 0.5, 9.9, 12.3), (100.0, 1.0, 22.2, 150.7)):
        row: dict[str, Any] = {"iteration": "SFT", **dict.fromkeys(scored, points), **dict.fromkeys(others, other)}
        row |= dict.fromkeys((*right, *labelled, *compared), share)
        around = {name: [Estimate(points, points - half, points + half)] for name in scored}
        if "eval/accuracy" in right:
            around["eval/accuracy"] = [Estimate(share, share - half / 100, share + half / 100)]
        table = compact_table([row], around, 0)
        assert max(len(line.rstrip()) for line in printed(table).splitlines()) <= NARROW
        shown.add(tuple(str(column.header) for column in table.columns))
    assert len(shown) == 1
    measured = [metric(name).heading for name in COMPACT if name in row]
    count = len(table.columns) - 1
    assert shown.pop()[1:] == tuple(measured[:count]), "the most important ones, in their order"
    assert count >= min(6, len(measured)), "the room is used"


def test_the_wide_table_has_all_that_the_narrow_one_has() -> None:
    """The mark, the intervals, and family names that are not cut."""
    rows = [
        {"iteration": "SFT", "eval/score": 20.0, "eval/accuracy/arithmetic": 0.5},
        {"iteration": 0, "eval/score": 3.0},
    ]
    around = {"eval/score": [Estimate(20.0, 18.0, 22.0), None]}
    lines = printed(wide_table(rows, around, 0)).splitlines()
    assert lines[1].split() == ["it.", "score", "arithmetic,", "%"]
    assert lines[2].split() == [BEST, "SFT", "20.0", "±2.0", "50.0"]
    assert lines[3].split() == ["0", "3.0", "–"]


def items(folder: Path, scores: np.ndarray, right: np.ndarray) -> Path:
    """An evaluation: two samples and a greedy response to each prompt."""
    folder.mkdir()
    rows = [
        Item(str(i), "all", kind, sample, float(score), None, bool(right[i]), 5, -1.0)
        for i, pair in enumerate(scores)
        for kind, sample, score in (("sample", 0, pair[0]), ("sample", 1, pair[1]), ("greedy", 0, 0.0))
    ]
    write(folder / "items.parquet", rows, Item)
    return folder


def test_the_end_reports_each_improvement_and_its_size(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    before, after = random.uniform(20, 40, (40, 2)), random.uniform(30, 60, (40, 2))
    right = random.random(40) < 0.5
    folders = [items(tmp_path / "sft", before, right), items(tmp_path / "0", after, right)]
    rows = [
        {"iteration": "SFT", "eval/score": before.mean(), "eval/accuracy": right.mean(), "eval/loss": 2.1671},
        {"iteration": 0, "eval/score": after.mean(), "eval/accuracy": right.mean(), "eval/loss": 150.739},
    ]
    out = io.StringIO()
    console = Console(width=79)
    console.rich = RichConsole(file=out, width=79, soft_wrap=True, highlight=False)
    shown: list[str] = []
    console.table = lambda table, split=False: shown.append(printed(table))  # type: ignore[method-assign]
    show_results(console, rows, folders)
    difference = compare_paired(after.mean(1), before.mean(1), kind="scores", interval="t").difference
    low, high = f"{difference.low:+.1f}", f"{difference.high:+.1f}"
    gained = f"{after.mean() - before.mean():+.1f}"
    assert f"better ({gained}; 95 % interval {low} to {high})" in out.getvalue()
    assert "unchanged on every prompt" in out.getvalue()
    assert "Held-out loss of human responses: 2.167 → 150.739 nats a token (+148.572)." in out.getvalue()
    half = stats.t.ppf(0.975, 39) * stats.sem(before.mean(1))
    assert f"{before.mean():.1f} ±{half:.1f}" in shown[0]
    assert shown[0].splitlines()[-1].startswith(f"{BEST}   0 ")
    shown.clear()
    out.truncate(0)
    show_results(console, rows, folders, wide=True)
    assert f"{before.mean():.1f} ±{half:.1f}" in shown[0]
    assert f"better ({gained}; 95 % interval {low} to {high})" in out.getvalue()
    assert "wide=true" not in out.getvalue()


def test_the_half_interval_equals_a_t_tests_over_prompts() -> None:
    values = np.random.default_rng(1).normal(50, 10, 30)
    found = mean(values[None])
    low, high = stats.t.interval(0.95, 29, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))


@pytest.mark.parametrize("right", [0, 1, 2, 38, 39, 40])
def test_the_interval_of_a_share_stays_between_0_and_1(right: int, tmp_path: Path) -> None:
    """Few right answers of 40, and nearly all: a t interval would pass 0 or 1."""
    answers = np.arange(40) < right
    folder = items(tmp_path / "evaluation", np.full((40, 2), 50.0), answers)
    (found,) = find_intervals([folder])["eval/accuracy"]
    assert found is not None
    assert found.value == pytest.approx(right / 40)
    assert found.low is not None
    assert found.high is not None
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high
    n, z = 40, stats.t.ppf(0.975, 39)
    if 0 < right < 40:
        n = 39  # the effective number: the error has n − 1 in its denominator
    centre = (right / 40 + z**2 / (2 * n)) / (1 + z**2 / n)
    assert (found.low + found.high) / 2 == pytest.approx(centre, abs=2e-3)


def test_results_by_prompt_are_means_over_scored_samples() -> None:
    import pyarrow as pa

    table = pa.table({"id": ["a", "a", "b", "b"], "kind": ["sample"] * 3 + ["greedy"], "score": [1.0, 3.0, None, 9.0]})
    found = by_prompt(table, "sample", "score")
    assert found["a"] == 2.0
    assert np.isnan(found["b"])
    assert by_prompt(table, "human", "score") == {}
    assert change({"a": 1.0, "b": 2.0}, {"a": 1.0, "c": 2.0}) is None
    assert change({"a": 1.0}, {"a": 2.0}) is None


@pytest.mark.parametrize(
    ("rows", "by", "best"),
    [
        ([{"eval/score": 1.0}, {"eval/score": 3.0}, {"eval/score": 2.0}], None, 1),
        ([{"eval/loss": 1.0}, {"eval/loss": 3.0}, {"eval/loss": 0.5}], None, 2),
        ([{"eval/score": None, "eval/loss": 1.0}, {"eval/score": 3.0, "eval/loss": 0.1}], None, None),
        ([{"eval/score": 1.0}], None, None),
        ([{"eval/score": 1.0, "eval/loss": 2.0}, {"eval/score": 3.0, "eval/loss": 2.5}], "eval/loss", 0),
        ([{"eval/score": 3.0, "eval/pass_at_4": 0.1}, {"eval/score": 1.0, "eval/pass_at_4": 0.2}], "eval/pass_at_4", 1),
    ],
)
def test_the_marked_row_is_the_best_by_the_chosen_metric(
    rows: list[dict[str, Any]], by: str | None, best: int | None, tmp_path: Path
) -> None:
    """Without a choice it is the score, or the held-out loss if nothing is scored."""
    out, shown = io.StringIO(), list[str]()
    console = Console(width=79)
    console.rich = RichConsole(file=out, width=79, soft_wrap=True, highlight=False)
    console.table = lambda table, split=False: shown.append(printed(table))  # type: ignore[method-assign]
    show_results(console, [{"iteration": k, **row} for k, row in enumerate(rows)], [tmp_path] * len(rows), by)
    marks = [line.startswith(BEST) for line in shown[0].splitlines()[-len(rows) :]]
    assert marks == [number == best for number in range(len(rows))]
    label = metric(by or ("eval/score" if "eval/score" in rows[0] else "eval/loss")).label
    assert (f"{BEST} marks the best {label}." in out.getvalue()) is (best is not None)


def test_without_results_by_prompt_there_is_no_interval() -> None:
    rows = [{"iteration": "SFT", "eval/score": 1.0}, {"iteration": 0, "eval/score": 2.0}]
    assert sentences(rows, {"eval/score": [{}, {}]}, "eval/score") == [
        f"{BEST} marks the best score. All columns: table.md among the results, or wide=true."
    ]


@pytest.mark.parametrize(("name", "change", "told"), [("score", -5, True), ("score", 5, False), ("loss", 5, False)])
def test_a_run_that_gets_worse_by_its_judge_points_to_what_to_look_at(name: str, change: int, told: bool) -> None:
    """Not if the held-out loss alone rises: it does so in most runs that help."""
    metric = f"eval/{name}"
    rows = [{"iteration": "SFT", metric: 50.0}, {"iteration": 0, metric: 50.0 + change}]
    first = {str(n): 50 + 0.01 * n for n in range(9)}
    last = {key: value + change + value / 500 for key, value in first.items()}
    said = "\n".join(sentences(rows, {metric: [first, last]}, metric))
    assert ("worse (" in said) is (change < 0 or name == "loss")
    assert ("docs/reading-a-run.md" in said) is told


def test_each_measure_has_one_sentence() -> None:
    """The held-out loss has an interval if its results by prompt are there, and is told without one otherwise."""
    rows = [{"iteration": "SFT", "eval/loss": 1.0}, {"iteration": 0, "eval/loss": 2.0}]
    first = {str(n): 1.0 + 0.01 * n for n in range(9)}
    for last in ({key: value + 1 + value / 9 for key, value in first.items()}, first, {}):
        told = [
            text for text in sentences(rows, {"eval/loss": [first, last]}, None) if text.startswith("Held-out loss")
        ]
        assert len(told) == 1
        assert ("interval" in told[0]) is (len(last) > 0 and last != first)


def test_stages_are_numbered_and_the_remaining_time_is_forecast(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    console = Console(width=79)
    console.begin(["generate", "optimise", "generate", "optimise"], there={0})
    console.report_reuse("a", "key")
    with console.stage("b", lambda rows, total: None) as report:
        now[0] += 30
        assert console.left() == ""  # how long generating takes is not known yet
        report.begin(10, "steps")
        report.advance()
    with console.stage("c", lambda rows, total: None):
        assert console.left() == "further stages: about 30 s"
        now[0] += 5
    with console.stage("d", lambda rows, total: None) as report:
        assert console.left() == ""
        report.begin(10, "steps")
        now[0] += module.HEARTBEAT + 1
        report.advance()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if "/4" in line] == [
        ["1/4", "a"],
        ["2/4", "b"],
        ["3/4", "c"],
        ["4/4", "d"],
    ]
    assert any("d: 1/10 steps" in line for line in lines)


def test_a_job_reports_its_number_in_the_sweep_and_the_remaining_time(tmp_path: Path) -> None:
    def write_settings(sweeper: dict[str, Any], *given: str) -> None:
        content = {"hydra": {"sweeper": sweeper, "overrides": {"task": list(given)}}}
        (tmp_path / "multirun.yaml").write_text(yaml.safe_dump(content))

    all_of_them = {
        "_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        "params": {"method": "spin,dnpo,osp", "seed": "0,1"},
    }
    write_settings(all_of_them, "+sweep=methods", "seed=5")
    assert describe_place(tmp_path, 0) == "job 1 of 3"
    write_settings({**all_of_them, "params": None}, "npo.alpha=0.1,0.2", "seed=range(0,4)", "eval.samples=2")
    assert describe_place(tmp_path, 6) == "job 7 of 8"
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "summary.json").touch()
    begun = time.time() - 60
    os.utime(tmp_path / "multirun.yaml", (begun, begun))
    assert describe_place(tmp_path, 1) == "job 2 of 8, about 7 min left"
    assert name_job(tmp_path, 1) == "job 2 of 8"
    write_settings({**all_of_them, "params": None}, "npo.alpha=interval(0,1)")
    assert describe_place(tmp_path, 0) == "job 1"
    write_settings({"_target_": "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"}, "a=1")
    assert describe_place(tmp_path, 4) == "job 5"
    (tmp_path / "multirun.yaml").unlink()
    assert describe_place(tmp_path, 4) == "job 5"


@pytest.mark.parametrize(
    ("choice", "shown"),
    [
        ({}, "score 22.3 → 20.0"),
        ({"best": {"iteration": 0, "by": "eval/accuracy", "value": 0.5}, "kept": 1}, "accuracy 10.0 → 50.0 %"),
    ],
)
def test_a_job_of_a_sweep_ends_with_a_line_and_its_warnings(choice: dict[str, Any], shown: str, tmp_path: Path) -> None:
    rows = [
        {"iteration": name, "eval/score": score, "eval/accuracy": right}
        for name, score, right in (("SFT", 22.3, 0.1), (0, 22.4, 0.5), (1, 20.0, 0.2))
    ]
    made_by = [{"dnpo": version, "stages": [version]} for version in ("1", "2")]
    summary = {"table": rows, "overoptimised": [], "judge_agreement": [], "made_by": made_by, "sources": {}}
    summary |= {"choice": choice, "settings": {"keep": "best", "eval": {"split": "test"}}} if choice else {}
    console, out = terminal(79)
    folder = Path("multirun/2026-11-30/19-59-49-624397/0")
    job = functools.partial(show_job, console, summary, [], folder, Store(tmp_path), "job 1 of 4")
    job(wide=False)
    lines = plain(out)
    assert lines[0].startswith("keep=best" if choice else "warning: ")
    assert "warning: the stages of this run were not all made in the same way" in " ".join(lines)
    assert "Another store (store=FOLDER)" in " ".join(lines)
    assert " ".join(lines).endswith(f"job 1 of 4: {shown}, in {folder}")
    if not choice:
        assert lines[-1].startswith("job 1"), "it fits a line"
    assert "Results by iteration" not in " ".join(lines)
    job(wide=True)
    assert "Results by iteration" in plain(out)
    assert "accuracy, %" in " ".join(plain(out))


def test_the_loss_of_the_last_step_is_shown_and_all_steps_are_passed_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    passed: list[dict[str, float]] = []
    with Console(width=79).stage("training", lambda rows, total: passed.extend(rows)) as report:
        report.begin(100, "steps")
        report.steps([])
        report.steps([{"step": 1, "loss/policy": 0.7}, {"step": 2, "loss/policy": 0.69314}])
        now[0] += module.HEARTBEAT + 1
        report.advance(1)
    assert [row["step"] for row in passed] == [1, 2]
    line, summary = capsys.readouterr().out.splitlines()
    assert "1/100 steps, 0.016/s, about" in line
    assert "loss 0.6931" in line
    assert "1 step in 61.0 s, 0.016/s" in summary, "a slow stage does not seem to stand still"


@pytest.mark.parametrize("rest", [0.0, 0.3, 6.0])
@pytest.mark.parametrize(
    ("done", "took"), [(4800, 4.352), (144, 0.0805), (60, 3.41), (6, 0.72), (12_000, 7200.0), (0, 1.0)]
)
def test_the_numbers_at_a_stages_end_agree(
    done: int, took: float, rest: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units divided by their seconds are the speed; loading, or other units that were counted before, are apart."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Console(width=200).stage("evaluate", lambda rows, total: None) as report:
        report.begin(100, "responses")
        now[0] += rest
        report.begin(done, "verdicts")
        now[0] += took
        report.advance(done)
        report.status("2 identical")
    shown = capsys.readouterr().out
    found = re.search(
        r"evaluate +([\d,]+) verdicts in ([\d.,]+) s(?:, ([\d.,]+)/s)?(?:, ([\d.,]+) s in all)?, 2 id", shown
    )
    assert found, shown
    units, seconds, speed, whole = (float(text.replace(",", "")) if text else None for text in found.groups())
    assert (units, seconds) == (done, pytest.approx(took, rel=0.02))
    assert speed == (pytest.approx(done / seconds, rel=0.03) if done else None)
    assert whole == (pytest.approx(took + rest, rel=0.02) if rest else None)


def test_a_stage_that_does_not_advance_is_reported_every_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT", 0.05)
    with Console(width=79).stage("loading", lambda rows, total: None) as report:
        time.sleep(0.2)
        report.begin(10, "steps")
        report.advance(3)
        time.sleep(0.3)
    time.sleep(0.15)
    *lines, summary = capsys.readouterr().out.splitlines()
    assert sum("loading: computing for 0." in line for line in lines) >= 2
    waiting = [line for line in lines if re.search(r"3/10 steps, .*about .* left, no news for 0\.", line)]
    assert len(waiting) >= 2
    assert "3 steps in" in summary, "nothing is printed after the end of a stage"


def test_on_a_terminal_the_bar_shows_the_time_since_the_last_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    console = Console(width=200)
    console.rich = RichConsole(file=stream, width=200, force_terminal=True)
    with console.stage("training", lambda rows, total: None) as report:
        report.begin(100, "steps")
        report.steps([{"step": 1, "loss/policy": 0.5}])
        report.advance()
        report.progress.refresh()
        shown = stream.getvalue()
        assert "loss 0.5" in shown
        assert "no news" not in shown
        report.moved -= 3 * module.HEARTBEAT
        report.progress.refresh()
        assert "no news for 3 min" in stream.getvalue()
        report.advance()
        stream.truncate(0)
        report.progress.refresh()
        assert "no news" not in stream.getvalue()
    assert not [line for line in stream.getvalue().splitlines() if "training: " in line], "the bar is enough"


def terminal(width: int) -> tuple[Console, io.StringIO]:
    """A console on a terminal of this width, and what it prints."""
    console = Console(width=width)
    console.rich = RichConsole(file=(out := io.StringIO()), width=width, soft_wrap=True, force_terminal=True)
    return console, out


def plain(out: io.StringIO) -> list[str]:
    return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").splitlines()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_bar_is_one_line_that_leaves_out_whole_parts(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Console, "left", lambda self: "further stages: about 2 h 5 min")
    console, out = terminal(width)
    console.begin(["generate"] * 16, ())
    with console.stage("iteration 10 · reference", lambda rows, total: None) as report:
        report.begin(200_000, "responses")
        report.steps([{"step": 1, "loss/policy": 0.69314}])
        report.status("$1,204.50")
        for _ in range(3):
            time.sleep(0.01)
            report.advance(1000)
        report.progress.refresh()
        lines = [line.rstrip() for line in plain(out) if line.strip()]
    assert all("iteration 10 · reference" in line and len(line) <= width for line in lines), "no second line"
    _, _, shown = lines[-1].rpartition("━ ")
    parts = shown.split(", ") if shown else []
    wanted = [
        r"3,000/200,000 responses",
        r"[\d.]+ .* left",
        r"loss 0\.6931",
        r"\$1,204\.50",
        r"[\d,]+/s",
        "further .* min",
    ]
    assert len(parts) >= {60: 0, 80: 1, 120: 3, 200: 6}[width]
    assert all(
        any(re.fullmatch(pattern, part) for pattern in wanted) for part in re.split(r", (?!\d{3})", shown) if part
    )


@pytest.mark.parametrize(
    ("there", "shown"),
    [
        ({0}, ["1/4 a stored already (a)", "2/4 b done", "3/4 c done", "4/4 d done"]),
        ({0, 1, 3}, ["the first 2 of 4 stages are stored already", "3/4 c done", "4/4 d stored already (d)"]),
        ({0, 1, 2, 3}, ["all 4 stages are stored already"]),
    ],
)
def test_one_line_says_that_the_first_stages_are_stored(there: set[int], shown: list[str]) -> None:
    console, out = terminal(80)
    console.begin(["label"] * 4, there)
    for number, title in enumerate("abcd"):
        if number in there:
            console.report_reuse(title, title)
        else:
            with console.stage(title, lambda rows, total: None):
                pass
    lines = [" ".join(line.split()).partition(" in ")[0] for line in plain(out)]
    assert [line for line in lines if "stored" in line or "done" in line] == shown


@pytest.mark.parametrize("width", [80, 120])
def test_the_line_of_a_finished_stage_continues_below_its_numbers(width: int) -> None:
    console, out = terminal(width)
    console.begin(["label"] * 16, ())
    with console.stage("iteration 1 · label", lambda rows, total: None) as report:
        report.begin(192, "prompts")
        report.advance(192)
        report.status("189 pairs, 3 identical, 12 of them without a score")
    console.report_reuse("iteration 1 · optimise", "optimise/127ebd6d044924fc")
    done = [line for line in plain(out) if line.strip() and "━" not in line]
    begins = done[0].index("192 prompts")
    others = done[1:-1]
    assert all(len(line) < width for line in done)
    assert others
    assert all(line[:begins].isspace() and not line[begins].isspace() for line in others)
    assert done[-1].index("stored already") == begins


def test_a_link_stands_whole_on_a_narrow_terminal() -> None:
    link = "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning"
    lines = [f"dashboard   {link}", f"            {link}", "next        dnpo browse outputs/1"]
    for width, wanted in (
        (80, ["dashboard", f"    {link}", f"    {link}", lines[2]]),
        (74, ["dashboard", f" {link}", f" {link}", lines[2]]),
        (120, lines),
    ):
        console, out = terminal(width)
        for line in lines:
            console.place(line)
        assert plain(out) == wanted


def test_sentences_end_lines_between_words_on_a_terminal() -> None:
    text = "Judge's score: 22.3 → 20.0 points of 100, no clear change (−2.3; 95 % interval −4.9 to +0.4)."
    for terminal in (True, False):
        out, console = io.StringIO(), Console(width=80)
        console.rich = RichConsole(file=out, width=80, soft_wrap=True, highlight=False, force_terminal=terminal)
        console.tell(text)
        lines = out.getvalue().splitlines()
        assert max(map(len, lines)) < 80 or not terminal
        assert " ".join(lines) == text
        assert len(lines) == 1 + terminal


def test_the_lines_of_checks_fold_at_the_width_of_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Finding("memory, generating", "warn", " ".join(["a long sentence"] * 12), "generate.batch_size")]
    monkeypatch.setenv("COLUMNS", "80")
    show(Console(), found, everything=True)
    assert len(capsys.readouterr().out.splitlines()) == 2  # a file has a line for each check
    monkeypatch.setenv("FORCE_COLOR", "1")
    show(Console(), found, everything=True)
    *lines, count = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert count == "0 checks passed, 1 warning"
    assert len(lines) > 3
    assert max(map(len, lines)) <= 80
    assert {line[:26] for line in lines[1:]} == {" " * 26}


def test_a_sweep_ends_with_the_intervals_of_the_report_and_the_next_commands(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    means = stats_table({name: {"SFT": Cell(Estimate(19.71, 15.0, 24.4))} for name in ("spin", "dnpo")})
    differences = stats_table({"dnpo": {"k = 1": Cell(Estimate(-0.81, -4.6, 3.0), 0.6, signed=True)}})
    measure = ReportMeasure(metric("eval/score"))
    _show_comparison([MeasureComparison(measure, means, differences, "spin", ("One seed only.",))])
    (tmp_path / "sweep.json").touch()
    _show_places(tmp_path, ["store", "store"], ["dashboard   mlflow ui", "            http://127.0.0.1:5000"])
    out = capsys.readouterr().out
    assert re.search(r"^spin +19\.7 ± 4\.7$", out, re.MULTILINE)
    assert re.search(r"^Differences from spin, paired\nsettings +k = 1\ndnpo +−0\.8 ± 3\.8$", out, re.MULTILINE)
    assert "half of the 95 % interval" in out
    assert "One seed only." in out
    shown = os.path.relpath(tmp_path)
    assert out.splitlines()[-7:] == [
        f"results     {tmp_path}",
        f"numbers     {tmp_path}/sweep.json",
        "stages      store",
        *("dashboard   mlflow ui", "            http://127.0.0.1:5000"),
        *(f"next        dnpo report {shown}", f"            dnpo browse {shown}"),
    ]
    _show_places(tmp_path, ["a", "b"], ())
    out = capsys.readouterr().out
    assert "stages      a, b\n" in out
    assert out.endswith(f"next        dnpo browse {shown}\n"), "a report needs tracked runs"


def test_without_tracking_a_sweep_ends_with_means_and_standard_deviations(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(first: float, last: float) -> dict[str, Any]:
        return {"table": [{"iteration": "SFT", "eval/accuracy": first}, {"iteration": 0, "eval/accuracy": last}]}

    jobs = [(["method=spin", "scale=smoke", f"seed={n}"], run(0.1 * n, 0.2)) for n in (1, 3)]
    jobs.append((["method=dnpo", "scale=smoke", "seed=1"], run(0.5, 0.25)))
    numbers = _gather(tmp_path, jobs)
    assert json.loads((tmp_path / "sweep.json").read_text()) == numbers
    assert {each["metric"] for each in numbers} == {"eval/accuracy"}
    _show_spread(numbers)
    out = capsys.readouterr().out
    assert "all jobs: scale=smoke" in out
    assert re.search(r"^method=spin +2 +20\.0 ± 14\.1 +20\.0 ± 0\.0$", out, re.MULTILINE)
    assert re.search(r"^method=dnpo +1 +50\.0 +25\.0$", out, re.MULTILINE)
    assert _gather(tmp_path, []) == []


def test_a_wide_table_without_a_title_is_split_into_parts_without_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = ScreenTable()
    for heading in ("stage", "needed by", "by"):
        table.add_column(heading, no_wrap=True)
    table.add_row("sft/0123", "r" * 60, "m" * 60)
    monkeypatch.setenv("FORCE_COLOR", "1")
    Console(width=80).table(table, split=True)
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert [line.split() for line in lines] == [
        *(["stage", "needed", "by"], ["sft/0123", "r" * 60], []),
        *(["stage", "by"], ["sft/0123", "m" * 60]),
    ]


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("how", [{}, {"split": True}, {"fold": True}, None], ids=str)
def test_no_line_of_a_table_ends_with_blanks(
    how: dict[str, bool] | None, terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    table = ScreenTable("A title", padding=(0, 2, 0, 0))
    for heading in ("stage", "made", "what"):
        table.add_column(heading)
    table.add_row("sft/0123", "yesterday", "short")
    table.add_row("sft/4567", "", "a longer text", style="bold")
    console = Console(width=26)
    if how is None:
        console.table_cut(table)
    else:
        console.table(table, **how)
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert len(lines) >= 4
    assert [line for line in lines if line.endswith(" ")] == []


def test_the_parts_of_a_wide_table_cut_no_cell(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part is as wide as its cells need, whatever the columns' places in the whole table."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    random = np.random.default_rng(0)
    for width in range(30, 60):
        table = ScreenTable()
        cells = ["x" * int(random.integers(1, 13)) for _ in range(12)]
        for cell in cells:
            table.add_column(cell, justify="right", no_wrap=True)
        table.add_row(*cells)
        Console(width=width).table(table, split=True)
        shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
        assert "…" not in shown
        lines = [line for line in shown.splitlines() if line]
        assert [cell for line in lines[1::2] for cell in line.split()[1:]] == cells[1:]
        assert {len(line) for line in lines if len(line) > width} == set()


def test_a_long_list_is_cut_at_the_width_of_the_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = ScreenTable()
    for heading in ("stage", "by"):
        table.add_column(heading, no_wrap=True)
    table.add_row("sft/0123", "x" * 100)
    table.add_row("sft/4567", "short")
    monkeypatch.setenv("COLUMNS", "80")
    Console().table_cut(table)
    assert "x" * 100 in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    Console().table_cut(table)
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert [line.split() for line in lines] == [
        ["stage", "by"],
        ["sft/0123", "x" * 69 + "…"],
        ["sft/4567", "short"],
        lines[-1].split(),
    ]
    assert "| cat" in lines[-1]
