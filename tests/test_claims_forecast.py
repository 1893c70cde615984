"""The planner's forecast beside the actual runs: by worked numbers, by simulation, and by the two commands."""

import csv
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analysis import claims, claims_forecast, claims_page, claims_plan
from analysis.claims_assess import Result
from analysis.claims_book import Claim, read
from analysis.claims_forecast import Forecast, Forecasts, Row, conclude, describe, join
from analysis.claims_rules import Effect
from scipy import stats

from dnpo.errors import DataError
from dnpo.running.console import Console
from dnpo.stats.intervals import Components, Mean
from tests.test_claims import CLAIM, PROMPTS, commit, git, track, write_claims


def claim(**given: Any) -> Claim:
    return Claim.model_validate({"scale": "a test", **CLAIM, "sesoi": 0.001, **given})


def row(error: float, value: float = 3.0, outcome: str = "supported", **given: Any) -> Row:
    """A claim planned for four seeds of variance 4, so with error 1, and measured with another error."""
    planned = Components(4.0, 0.0, 0.0).mean(4, 1)
    mean = Mean(value, error, 3.0)
    result = Result(claim(**given), outcome, Effect(mean.estimate(), mean, 4, None))  # type: ignore[arg-type]
    return Row(1, result, Forecast(0.05, 4, None, planned, planned.detectable(0.05, negligible=0.001)))


def test_the_outcomes_fit_a_terminal_of_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long names, outcomes and units; each role is named once, above its claims."""
    long = [
        row(1.0, -0.1234, outcome, role=role, id="x" * 33, unit="points of 100 answers", digits=3).result
        for role, outcome in (("secondary", "not measured"), ("secondary", "negligible"), ("check", "not as expected"))
    ]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    Console(width=80).table(claims.on_screen(long), fold=True)
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.strip() for line in lines if line.strip() in ("secondary", "check")] == ["secondary", "check"]
    assert sum("x" * 33 in line for line in lines) == 3
    assert "…" not in "".join(lines)


def test_ratio_and_power_by_hand() -> None:
    """A t test of three degrees of freedom, as the smallest effect of interest is far below the interval's width."""
    twice = row(error=2.0)
    assert twice.forecast.planned.error == 1.0
    assert stats.nct.sf(stats.t.ppf(0.975, 3), 3, twice.forecast.detectable) == pytest.approx(0.8, abs=1e-3)
    assert twice.ratio == pytest.approx(2.0, abs=1e-3)
    assert row(error=0.5).ratio == pytest.approx(0.5, abs=1e-3)
    assert twice.power == pytest.approx(stats.nct.sf(stats.t.ppf(0.975, 3), 3, 3.0), abs=1e-3)
    assert row(1.0, value=-3.0).power == twice.power
    assert row(1.0, value=13.0, target=10.0).power == twice.power
    assert row(1.0, relation="within", sesoi=0.0, margin=1.0).power is None


@pytest.mark.parametrize(("value", "sesoi"), [(3.0, 0.001), (1.0, 0.001), (0.9, 1.5), (1.6, 2.0)])
def test_power_is_how_often_a_simulated_test_finds_the_effect(value: float, sesoi: float) -> None:
    """Four seeds are drawn 40,000 times; the interval must exclude 0, and reach beyond the smallest effect of interest.

    The effect counts as found with its own sign only, which leaves out at most 2.5 % of a null.
    """
    found = replace(row(1.0, value).forecast, planned=Components(0.25, 0.0, 0.0).mean(4, 1))
    asked = Row(1, row(1.0, value, sesoi=sesoi).result, found)
    draws = np.random.default_rng(4).normal(value, 0.5, (40_000, 4))
    means, halves = draws.mean(1), stats.t.ppf(0.975, 3) * draws.std(1, ddof=1) / 2
    assert asked.power == pytest.approx(((means > halves) & (means + halves > sesoi)).mean(), abs=0.01)


def test_the_conclusion_counts_what_was_measured_as_planned() -> None:
    rows = [
        row(1.0, 9.0),
        row(1.4, 9.0, "contradicted"),
        row(1.6, 9.0, "undecided"),
        row(3.0, 0.5, "negligible"),
        row(0.6, 0.5),
    ]
    assert conclude(rows) == (
        "The actual smallest effect is 1.40 times the forecast one (median of 5 claims); for 2 of 5 the two differ "
        "by a factor of at most 1.5. For the effects that were measured, the forecast gave 3 of 5 claims with a "
        "direction a power of 80 % or more, and 2 of these 3 were found (supported or contradicted). Of the other "
        "2: found 1, negligible 1."
    )
    waiting = replace(rows[2], result=replace(rows[2].result, held_back=("its gate is undecided",)))
    assert "3 of these 3 were found" in conclude([*rows[:2], waiting, *rows[3:]])
    effect = rows[0].result.effect
    assert effect is not None
    fewer = replace(rows[0], result=replace(rows[0].result, effect=replace(effect, seeds=3)))
    assert conclude([fewer]) == "No claim was measured on the planned numbers of seeds and prompts."
    still = replace(rows[0], result=replace(rows[0].result, effect=replace(effect, model=None)))
    assert conclude([still]).startswith("For the effects that")


def test_claims_that_are_only_planned_or_only_measured_are_named() -> None:
    measured, forecast = row(1.0).result, row(1.0).forecast
    results = [
        measured,
        replace(measured, claim=claim(id="unplanned")),
        Result(claim(id="unmeasured"), "not measured", reason="no runs"),
        replace(measured, claim=claim(id="checked", role="check", sesoi=0.0)),
    ]
    forecasts = Forecasts({"one": replace(forecast, seeds=5), "unmeasured": forecast}, (7, 8, 9))
    rows = join(forecasts, results)
    assert [(each.place, each.result.claim.id) for each in rows] == [(1, "one")]
    head, *notes, last = describe(forecasts, rows, results)
    assert head.endswith("Pilot: seeds 7-9.")
    assert notes == [
        "2: measured, without a forecast.",
        "3: forecast, but not measured.",
        "1: not counted below, because it was planned for 5 and measured on other numbers of seeds or prompts.",
    ]
    assert last == conclude(rows)


# --- the two commands


GIVEN: tuple[dict[str, Any], ...] = (
    {"id": "first"},
    {"id": "number", "measure": "metric", "arguments": {"name": "ks"}},
    {"id": "checked", "role": "check", "sesoi": 0.0},
)


@pytest.fixture(scope="module")
def planned(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with registered claims, a pilot of seeds 7 to 9, its plan, and runs of the seeds of the claims."""
    folder = tmp_path_factory.mktemp("forecast")
    shutil.copy(migrated, folder / "mlflow.db")
    for seed in (7, 8, 9):
        for arm in ("old", "new"):
            track(folder, arm, seed)
    git(folder, "init", "-q")
    path = write_claims(folder / "claims.yaml", *GIVEN)
    registered = commit(folder)
    for seed in range(4):
        for arm in ("old", "new"):
            track(folder, arm, seed, commit=registered)
    assert claims_plan.main([*command(folder, path), "--seeds", "7,8,9"]) == 0
    return folder


def command(folder: Path, path: Path | None = None, out: str = "claims") -> list[str]:
    """The settings that both commands need."""
    given = ["--claims", str(path or folder / "claims.yaml"), "--uri", f"sqlite:///{folder / 'mlflow.db'}"]
    return [*given, "--out", str(folder / out)]


def test_the_forecast_is_written_beside_the_actual_runs(
    planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, last = claims_page.marks("forecast")
    page = tmp_path / "page.md"
    page.write_text(f"{' '.join(claims_page.marks('claims'))}\n\n{first}\nold\n{last}\n\n## After\n")
    asked = [*command(planned), "--no-log", "--page", str(page)]
    assert claims.main(asked) == 0
    assert "its forecast is left as it was; forecast=… makes it again" in capsys.readouterr().out
    assert claims.main([*asked, "--forecast", str(planned / "claims")]) == 0
    said = capsys.readouterr().out
    text = (planned / "claims" / "forecast.md").read_text()
    assert page.read_text().endswith(f"{first}\n\n{text}\n{last}\n\n## After\n")
    assert "old" not in page.read_text().partition(first)[2]
    (found,) = csv.DictReader((planned / "claims" / "forecast.csv").open())
    (plan,) = csv.DictReader((planned / "claims" / "plan.csv").open())
    assert plan["registered"] == git(planned, "rev-parse", "HEAD")
    assert plan["pilot"] == "7 8 9"
    assert (found["seeds_planned"], found["seeds"], found["items"]) == ("4", "4", str(PROMPTS))
    assert found["forecast"] == plan["detectable"]
    (row,) = [each for each in csv.DictReader((planned / "claims" / "claims.csv").open()) if each["id"] == "first"]
    assert (found["actual"], found["effect"], found["outcome"]) == (row["detectable"], row["effect"], "supported")
    assert float(found["half"]) == pytest.approx((float(row["high"]) - float(row["low"])) / 2)
    assert float(found["ratio"]) == pytest.approx(float(row["detectable"]) / float(plan["detectable"]))
    assert 0.7 < float(found["ratio"]) < 1.4, "the same noise in pilot and runs"
    assert (float(found["power"]), found["found"]) == (pytest.approx(1.0), "1")
    assert f"| 1 | first | secondary | 4 × {PROMPTS} | points |" in text
    assert "| 100 | supported |" in text
    assert "2: measured, without a forecast." in text, "nothing varies in its pilot"
    conclusion = f"The actual smallest effect is {float(found['ratio']):.2f} times the forecast one (median of 1 claim)"
    assert conclusion in text
    assert f"Forecast: {conclusion}" in " ".join(said.split())


def test_a_forecast_of_something_else_is_refused(
    planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each reason is named before any run is read; an exploratory table takes a plan of another commit."""
    kept = (planned / "claims" / "plan.csv").read_text()
    registered = git(planned, "rev-parse", "HEAD")
    file = tmp_path / "plan.csv"

    def refused(text: str, *more: str) -> str:
        file.write_text(text)
        asked = command(planned, out="refused")
        assert claims.main([*asked, "--no-log", "--forecast", str(tmp_path), *more]) == 1
        assert not (planned / "refused").exists()
        return " ".join(capsys.readouterr().err.split())

    assert f"forecast={file}: it plans claims of commit 123456789, not those of claims.yaml of commit" in refused(
        kept.replace(registered, "123456789abc")
    )
    assert "it plans claims of commit none, not those" in refused(kept.replace(registered, ""))
    assert "frist: no such claim is tested in claims.yaml. Plan again" in refused(kept.replace("first", "frist"))
    assert "checked: no such claim is tested" in refused(kept.replace("first", "checked"))
    assert "it plans 12 seeds for first, but claims.yaml fixes 4" in refused(kept.replace(",4,40,", ",12,40,"))
    assert "its pilot has seeds 2-3 of the claims" in refused(kept.replace("7 8 9", "2 3 7"))
    assert "wrote (it has no 'registered')" in refused(kept.replace("registered", "commit"))
    assert "one line for each claim; it has 0 lines" in refused(kept.splitlines()[0] + "\n")
    assert "one line for each claim; it has 2 lines" in refused(kept + kept.splitlines()[1] + "\n")
    assert "expected a plan.csv that dnpo claims plan wrote" in refused(kept.replace(",4,40,", ",four,40,"))
    assert "expected a plan.csv" in refused("\0")
    page = tmp_path / "page.md"
    page.write_text("\n".join(claims_page.marks("claims")))
    assert f"page={page}: expected a line <!-- forecast -->" in refused(kept, "--page", str(page))
    file.unlink()
    assert claims.main([*command(planned), "--forecast", str(file)]) == 1
    assert f"forecast={file}: expected a plan.csv" in " ".join(capsys.readouterr().err.split())
    file.write_text(kept.replace(registered, ""))
    taken = [*command(planned, out="taken"), "--no-log", "--seeds", "0,1,2", "--exploratory"]
    assert claims.main([*taken, "--forecast", str(file)]) == 0
    text = (planned / "taken" / "forecast.md").read_text()
    assert "| supported (exploratory) |" in text
    assert (
        f"1: not counted below, because it was planned for 4 × {PROMPTS} and measured on other "
        f"numbers of seeds or prompts." in text
    )
    assert text.rstrip().endswith("No claim was measured on the planned numbers of seeds and prompts.")


def test_the_forecast_is_what_the_planner_says(planned: Path) -> None:
    """The mean that is rebuilt from the file of the plan has the detectable effect that the planner wrote there."""
    book = read(planned / "claims.yaml")
    found = claims_forecast.read(planned / "claims" / "plan.csv", book, None).by_claim["first"]
    assert found.planned.detectable(found.level, negligible=book.claims[0].sesoi) == pytest.approx(found.detectable)
    rows = list(csv.DictReader((planned / "claims" / "plan.csv").open()))
    rows[0] |= {f"variance_{name}": "0" for name in ("seeds", "prompts", "rest")}
    with (planned / "still.csv").open("w") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(DataError, match="claim first has no variances"):
        claims_forecast.read(planned / "still.csv", book, None)
