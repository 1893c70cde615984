"""What the protocol of claims finds in simulated tables, and what its planner promises."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analysis import claims_plan
from analysis.claims_assess import Result, decide_role
from analysis.claims_book import FILE, read
from analysis.claims_plan import Plan, plan
from analysis.claims_rules import Outcome, Sample, estimate_effect, strictest

from dnpo.stats.intervals import Array, Components, estimate_mean
from tests.test_claims import PROMPTS, track, write_claims

TABLES = 1000
PRIMARY = read(FILE).by_role("primary")
LEVEL = strictest("primary", len(PRIMARY))
# Right greedy answers of dsl, dnpo and npo less those of spin, and npo less fixed noise, points of 100: seeds 0 to 4 of
# the sweep ``methods``, 480 prompts, mean over k = 1..3.
PILOT = [
    Components(0.0, 2.52, 199.06),
    Components(0.0, 6.78, 228.58),
    Components(0.827, 11.85, 158.20),
    Components(0.419, 0.0, 158.38),
]
SEEDS, ITEMS = 12, 480


def simulate(
    rng: np.random.Generator, parts: Components, effect: float, seeds: int = SEEDS, items: int = ITEMS
) -> Array:
    """Differences by seed and prompt around a true effect."""
    by_seed = rng.normal(effect, math.sqrt(parts.seeds), (seeds, 1))
    by_item = rng.normal(0, math.sqrt(parts.items), (1, items))
    made: Array = by_seed + by_item + rng.normal(0, math.sqrt(parts.rest), (seeds, items))
    return made


def table(rng: np.random.Generator, effects: list[float | None]) -> list[Outcome]:
    """The outcomes of the four primary claims with these true effects; None: identical arms."""
    results = []
    for claim, parts, effect in zip(PRIMARY, PILOT, effects, strict=True):
        x = np.zeros((SEEDS, ITEMS)) if effect is None else simulate(rng, parts, effect)
        found = estimate_effect(Sample(x, np.zeros_like(x), True, claim.ends))
        results.append(Result(claim, "undecided", found))
    return [result.outcome for result in decide_role("primary", results).values()]


def planned(which: int) -> Plan:
    return plan(PRIMARY[which], PILOT[which], LEVEL, SEEDS, ITEMS, effect=1.0)


@pytest.mark.long
@pytest.mark.parametrize("which", range(4))
def test_the_effect_that_the_plan_names_is_found_in_80_percent_of_tables(which: int) -> None:
    """One claim has the effect that the plan names for it; the other three arms have none."""
    rng, found = np.random.default_rng([8, which]), Counter[Outcome]()
    wrong = 0
    effects: list[float | None] = [0.0] * 4
    effects[which] = planned(which).detectable
    for _ in range(TABLES):
        outcomes = table(rng, effects)
        found[outcomes.pop(which)] += 1
        wrong += bool({"supported", "contradicted"} & set(outcomes))
    assert 0.77 <= found["supported"] / TABLES <= 0.83
    assert found["contradicted"] <= 1
    assert wrong / TABLES <= 0.065


@pytest.mark.long
def test_four_nulls_are_found_in_one_of_twenty_tables() -> None:
    rng = np.random.default_rng(5)
    tables = [table(rng, [0.0] * 4) for _ in range(TABLES)]
    assert sum("supported" in found or "contradicted" in found for found in tables) / TABLES <= 0.065
    for which in range(4):
        shown = sum(found[which] == "negligible" for found in tables) / TABLES
        forecast = planned(which).planned.power_of_equivalence(1.0, LEVEL)
        assert shown >= forecast - 0.04  # Holm's later steps find a little more


@pytest.mark.long
def test_effects_of_interest_are_called_negligible_in_one_of_twenty_tables() -> None:
    rng = np.random.default_rng(6)
    tables = [table(rng, [1.0, -1.0, 1.0, -1.0]) for _ in range(TABLES)]
    assert sum("negligible" in found for found in tables) / TABLES <= 0.065


def test_identical_arms_are_negligible_never_supported() -> None:
    rng = np.random.default_rng(7)
    for others in ([0.0, 3.0, -3.0], [None, None, None]):
        for _ in range(20):
            found = table(rng, [None, *others])
            assert found[0] == "negligible"
            assert others[0] is not None or found == ["negligible"] * 4


# --- the planner


def test_a_plan_by_hand() -> None:
    """Four seeds of variance 4 alone: error 1; what is detected by a t test of three degrees of freedom."""
    from scipy import stats

    claim = PRIMARY[0]
    found = plan(claim, Components(4.0, 0.0, 0.0), 0.05, 4, None, effect=2.0)
    threshold = stats.t.ppf(0.975, 3)
    assert stats.nct.sf(threshold, 3, found.detectable) == pytest.approx(0.8, abs=3e-4)
    assert found.planned.power(found.detectable, 0.05) == pytest.approx(0.8, abs=1e-4)
    assert found.prompts_needed is None
    needed = plan(claim.model_copy(update={"sesoi": 0.0}), found.components, 0.05, 4, None, effect=2.0).seeds_needed
    assert needed is not None
    for count, enough in ((needed, True), (needed - 1, False)):
        error = 2 / math.sqrt(count)
        power = stats.nct.sf(stats.t.ppf(0.975, count - 1), count - 1, 2.0 / error)
        assert (power >= 0.8) == enough
    wide = plan(claim, Components(4.0, 100.0, 400.0), 0.0125, 12, 480, effect=0.1)
    assert (wide.seeds_needed, wide.prompts_needed) == (None, None)
    # where the interval is narrow, an effect under the smallest one of interest is negligible and not found
    precise = Components(0.0, 0.0, 5.0).mean(12, 480)
    plain, found = precise.detectable(0.05), plan(claim, Components(0.0, 0.0, 5.0), 0.05, 12, 480, effect=1.0)
    assert plain < 0.2
    rng = np.random.default_rng(1)
    means = rng.normal(found.detectable, precise.error, 100_000)
    halves = stats.t.ppf(0.975, precise.df) * precise.error * np.sqrt(rng.chisquare(precise.df, 100_000) / precise.df)
    assert ((means > halves) & (means + halves > 1)).mean() == pytest.approx(0.8, abs=0.005)
    assert 0.8 < found.detectable < 1
    few = plan(claim, Components(0.0, 0.0, 400.0), 0.0125, 12, 480, effect=1.0)
    assert few.prompts_needed is not None
    for count, enough in ((few.prompts_needed, True), (few.prompts_needed - 1, False)):
        assert (few.components.mean(12, count).detectable(0.0125, negligible=claim.sesoi) <= 1.0) == enough


@pytest.mark.parametrize("effect", [0.6, 0.8, 0.95, 1.0, 1.5])
def test_seeds_that_are_enough_are_found_though_more_would_call_the_effect_negligible(effect: float) -> None:
    """Compared with all numbers of seeds: below the smallest effect of interest the power rises, and falls again."""
    (claim, *_) = read(FILE).by_role("primary")
    components = Components(0.5, 0.0, 770.0)
    found = plan(claim, components, 0.05, 12, 480, effect=effect)
    power = [components.mean(count, 480).power(effect, 0.05, claim.sesoi) for count in range(2, 401)]
    enough = [count for count, each in enumerate(power, 2) if each >= 0.8]
    if effect < 0.9 * claim.sesoi:
        assert power[-1] < 0.8  # often negligible by then
    if not enough:
        assert found.seeds_needed is None
    else:
        assert found.seeds_needed == enough[0]


def test_forecasts_of_negligible_match_simulation() -> None:
    """An interval of half width t · error around 0 lies within ± 2 as often as the forecast says."""
    parts, rng = Components(1.0, 20.0, 30.0), np.random.default_rng(9)
    forecast = parts.mean(12, 60).power_of_equivalence(2.5, 0.05)
    within = 0
    for _ in range(1000):
        mean = estimate_mean(simulate(rng, parts, 0.0, 12, 60))
        assert mean is not None
        interval = mean.estimate()
        within += interval.low > -2.5 and interval.high < 2.5  # type: ignore[operator]
    assert 0.2 < forecast < 0.98
    assert within / 1000 == pytest.approx(forecast, abs=0.05)
    assert parts.mean(12, 60).power_of_equivalence(0.1, 0.05) == 0.0


def test_the_command_plans_from_a_pilot(migrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.copy(migrated, tmp_path / "mlflow.db")
    for seed in (7, 8, 9):
        for arm in ("old", "new"):
            track(tmp_path, arm, seed)
    path = write_claims(
        tmp_path / "claims.yaml",
        {"id": "unseen", "a": "new@2"},
        {"id": "second"},
        {"id": "number", "measure": "metric", "arguments": {"name": "flat"}},
        {"id": "checked", "role": "check", "sesoi": 0.0},
    )
    out = tmp_path / "out"
    command = ["--claims", str(path), "--uri", f"sqlite:///{tmp_path / 'mlflow.db'}", "--out", str(out)]
    assert claims_plan.main(command) == 0
    said = capsys.readouterr().out
    assert "secondary second" in said
    assert f"4 seeds × {PROMPTS} prompts detect " in said
    assert "Pilot: 6 runs of seeds 7-9. A variance between 3 seeds" in said
    assert "1: without a pilot: sweep main is complete for no seed" in said
    assert "3: without a pilot: nothing varies in the pilot" in said
    assert "checked" not in said
    assert "of the pilot are fixed for the claims" not in said
    head, row = (out / "plan.csv").read_text().splitlines()
    found: dict[str, Any] = dict(zip(head.split(","), row.split(","), strict=True))
    # two samples a prompt with a standard deviation of 2 on either side: 4/2 + 4/2
    assert float(found["variance_rest"]) == pytest.approx(4.0, rel=0.35)
    assert float(found["level"]) == pytest.approx(0.05 / 3)
    assert (found["seeds"], found["prompts"]) == ("4", str(PROMPTS))
    assert "| 2 | second | secondary | 0.0167 | points |" in (out / "plan.md").read_text()
    assert 2 <= int(found["seeds_needed"]) <= 10
    assert claims_plan.main([*command, "--effect", "0.001", "--seeds", "7,8"]) == 0
    assert "0.001 points need over 1,000 seeds" in (said := capsys.readouterr().out)
    assert "of seeds 7-8" in said
    assert claims_plan.main([*command, "--effect", "0"]) == 1
    assert "effect=0: expected a number above 0" in capsys.readouterr().err
    assert claims_plan.main([*command, "--seeds", "7"]) == 1
    assert (said := capsys.readouterr().err).startswith("error: no claim has a pilot.\n1: without a pilot: ")
    assert "\n2-3: without a pilot: a pilot needs two seeds or more" in said
    track(tmp_path, "old", 0)
    track(tmp_path, "new", 0)
    assert claims_plan.main(command) == 0
    assert "Seeds 0 of the pilot are fixed for the claims: these runs are no pilot" in capsys.readouterr().out
