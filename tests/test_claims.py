"""The claims of the papers: measures and rule by worked numbers, the file of claims against the sweeps that it reads,
and the command on tracked runs whose truth is known."""

import contextlib
import csv
import importlib.util
import io
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from analysis import claims, claims_measures, claims_page, claims_plan, claims_tables
from analysis.claims_assess import Tracked, in_force, list_needed_policies
from analysis.claims_book import FILE, Sweep, Term, read, terms
from analysis.claims_earlier import read as read_earlier
from analysis.claims_registered import Registration, describe, split
from analysis.claims_rules import Effect, Region, Role, Sample, check, correct, decide, estimate_effect, region
from analysis.selection import refuse_unlike
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from scipy import stats

from dnpo.commands.train import check_settings
from dnpo.errors import DataError, SettingsError
from dnpo.report import content as report
from dnpo.running import execute as running
from dnpo.settings import conf_folder, flat
from dnpo.stats.intervals import Estimate, Mean
from dnpo.tracking.reading import Database, TrackedRun
from dnpo.tracking.writing import MLflowTracking
from tests.commands import TINY

ROOT = Path(__file__).resolve().parent.parent
SMALL, MAP = (FILE.with_name(f"claims_{name}.yaml") for name in ("small", "map"))


# --- measures


def item(prompt: str, kind: str, score: float | None, **more: Any) -> dict[str, Any]:
    return {"id": prompt, "kind": kind, "score": score, **more}


ITEMS = [
    item("p", "human", 80.0, right=True),
    item("p", "greedy", 70.0, right=False),
    item("p", "sample", 80.0, right=True),
    item("p", "sample", 50.0, right=False),
    item("q", "human", 10.0, right=False),
    item("q", "greedy", 90.0, right=True),
    item("q", "sample", None, right=True),
    item("q", "sample", 40.0, right=True),
]


def test_a_prompt_counts_with_the_mean_of_its_answers_that_have_a_value() -> None:
    assert claims_measures.by_prompt(ITEMS) == {"p": 65.0, "q": 40.0}
    assert claims_measures.by_prompt(ITEMS, "right", "greedy") == {"p": 0.0, "q": 1.0}
    nowhere = claims_measures.by_prompt([*ITEMS, item("r", "sample", None)])
    assert math.isnan(nowhere["r"])
    with pytest.raises(DataError, match=r"\bsecond\b.*judge@second_judge"):
        claims_measures.by_prompt(ITEMS, "second")


def test_a_family_of_prompts_can_be_measured_alone() -> None:
    items = [row | {"family": "sorting" if row["id"] == "p" else "facts"} for row in ITEMS]
    assert claims_measures.by_prompt(items, family="facts") == {"q": 40.0}
    assert claims_measures.by_prompt(items, "right", "greedy", family="sorting") == {"p": 0.0}
    with pytest.raises(DataError, match="no greedy response to prompts of family sums has a value of right"):
        claims_measures.by_prompt(items, "right", "greedy", family="sums")


def test_as_good_as_human_counts_ties_and_leaves_out_what_has_no_score() -> None:
    assert claims_measures.as_good_as_human(ITEMS) == {"p": 0.5, "q": 1.0}


def test_duels_are_all_samples_against_all_samples() -> None:
    rng = np.random.default_rng(0)
    ours = [item(f"{i}", "sample", float(rng.integers(0, 4))) for i in range(7) for _ in range(3)]
    theirs = [item(f"{i}", "sample", float(rng.integers(0, 4))) for i in range(7) for _ in range(2)]
    found = claims_measures.duels(ours, theirs)
    for prompt in found:
        wins = losses = 0
        for a in [o["score"] for o in ours if o["id"] == prompt]:
            for b in [t["score"] for t in theirs if t["id"] == prompt]:
                wins += a > b
                losses += a < b
        assert found[prompt] == pytest.approx((wins - losses) / 6)
    assert claims_measures.duels(ITEMS, ITEMS) == {"p": 0.0, "q": 0.0}
    with pytest.raises(DataError, match="same held-out prompts"):
        claims_measures.duels(ours, ITEMS)


def test_a_metric_minus_another() -> None:
    row = {"iteration": 2, "stagnation/ks": 0.25, "stagnation/ks_critical": 0.05, "texts/bleu": None}
    assert claims_measures.metric(row, "stagnation/ks") == 0.25
    assert claims_measures.metric(row, "stagnation/ks", less="stagnation/ks_critical") == pytest.approx(0.2)
    with pytest.raises(DataError, match=r"texts/bleu .*iteration 2.*eval=texts"):
        claims_measures.metric(row, "texts/bleu")


def test_distance_is_the_largest_gap_of_the_distribution_functions() -> None:
    assert claims_measures.distance({"new": [1, 2], "chosen": [3, 4]}, "new", "chosen") == 1.0
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=40), rng.normal(0.5, size=30)
    gap = max(abs((a <= x).mean() - (b <= x).mean()) for x in [*a, *b])
    assert claims_measures.distance({"chosen": a, "rejected": b}, "chosen", "rejected") == pytest.approx(gap)
    with pytest.raises(DataError, match="new and rejected"):
        claims_measures.distance({"new": a}, "new", "rejected")


def series(**columns: list[float]) -> list[dict[str, float]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def test_means_over_steps_use_the_other_metric_only_if_the_first_is_missing() -> None:
    steps = series(noisy=[1.0, 3.0], clean=[5.0, 7.0])
    assert claims_measures.mean_over_steps(steps, "noisy", otherwise="clean") == 2.0
    assert claims_measures.mean_over_steps(series(clean=[5.0, 7.0]), "noisy", otherwise="clean") == 6.0
    with pytest.raises(DataError, match="noisy"):
        claims_measures.mean_over_steps(series(clean=[5.0]), "noisy")


def test_curves_do_not_mirror_each_other_once_a_common_trend_is_removed() -> None:
    # Both fall along a line; their residuals are equal, not mirrored.
    wiggle = [0.0, 1.0, -1.0, 0.0, 1.0, -1.0]
    rising, falling = [10.0 * t + w for t, w in enumerate(wiggle)], [-10.0 * t + w for t, w in enumerate(wiggle)]
    steps = series(a=rising, b=falling)
    assert claims_measures.correlation(steps, "a", "b") < -0.9
    detrended = claims_measures.correlation(steps, "a", "b", detrended=True)
    line = np.stack([np.arange(6), np.ones(6)], axis=1)
    left = [y - line @ np.linalg.lstsq(line, np.array(y), rcond=None)[0] for y in (rising, falling)]
    assert detrended == pytest.approx(float(np.corrcoef(*left)[0, 1])) == pytest.approx(1.0)
    with pytest.raises(DataError, match="must vary over them"):
        claims_measures.correlation(series(a=[1.0, 1.0, 1.0], b=[1.0, 2.0, 3.0]), "a", "b")


def test_the_ragged_last_step_counts_by_its_rows() -> None:
    """A step of 8 rows counts an eighth of one of 64, as if its rows were repeated."""
    rng = np.random.default_rng(3)
    x, y, rows = rng.normal(size=8), rng.normal(size=8), [64, 64, 64, 8] * 2
    steps = series(a=list(x), b=list(y), rows=[float(n) for n in rows])
    repeated = [np.repeat(values, rows) for values in (x, y, np.arange(8.0))]
    line = np.polyfit(repeated[2], repeated[0], 1), np.polyfit(repeated[2], repeated[1], 1)
    off = [values - np.polyval(fit, repeated[2]) for values, fit in zip(repeated[:2], line, strict=True)]
    assert claims_measures.correlation(steps, "a", "b") == pytest.approx(np.corrcoef(*repeated[:2])[0, 1])
    assert claims_measures.correlation(steps, "a", "b", detrended=True) == pytest.approx(np.corrcoef(*off)[0, 1])
    ends = [np.repeat(x[part], rows[:4]) for part in (slice(0, 4), slice(4, 8))]
    assert claims_measures.change_over_epochs(steps, "a", epochs=2) == pytest.approx(ends[1].mean() - ends[0].mean())
    slopes = [np.polyfit(np.repeat(range(4), rows[:4]), epoch, 1)[0] for epoch in ends]
    assert claims_measures.rise_within_epochs(steps, "a", epochs=2) == pytest.approx(3 * np.mean(slopes))
    assert claims_measures.share_of_steps(steps, "a", below=0.0) == pytest.approx((repeated[0] < 0).mean())


def test_epochs_rise_within_and_fall_between() -> None:
    steps = series(loss=[6.0, 7.0, 8.0, 3.0, 3.5, 4.0])
    assert claims_measures.rise_within_epochs(steps, "loss", epochs=2) == pytest.approx((2.0 + 1.0) / 2)
    assert claims_measures.change_over_epochs(steps, "loss", epochs=2) == pytest.approx(3.5 - 7.0)
    with pytest.raises(DataError, match=r"6 .*4 epochs"):
        claims_measures.rise_within_epochs(steps, "loss", epochs=4)


# --- the rule


@pytest.mark.parametrize(
    ("relation", "interval", "outcome"),
    [
        ("greater", (0.1, 2.0), "supported"),
        ("greater", (-0.1, 2.0), "undecided"),
        ("greater", (-2.0, -0.1), "contradicted"),
        ("less", (-2.0, -0.1), "supported"),
        ("less", (0.1, 2.0), "contradicted"),
        ("at_least", (-0.9, 0.5), "supported"),
        ("at_least", (-0.9, -0.1), "supported"),
        ("at_least", (-1.5, 5.0), "undecided"),
        ("at_least", (-3.0, -1.1), "contradicted"),
        ("at_most", (0.1, 0.9), "supported"),
        ("at_most", (1.1, 2.0), "contradicted"),
        ("within", (-0.9, 0.9), "supported"),
        ("within", (0.5, 1.5), "undecided"),
        ("within", (1.1, 1.5), "contradicted"),
        ("within", (-3.0, -1.1), "contradicted"),
    ],
)
def test_the_interval_decides(relation: Any, interval: tuple[float, float], outcome: str) -> None:
    where = region(relation, 0.0, 0.0 if relation in ("greater", "less") else 1.0)
    estimate = Estimate(sum(interval) / 2, *interval)
    effect = Effect(estimate, None, 5, None)
    assert decide(effect, where, None, p=0.04, p_negligible=1.0, strictly=False) == outcome
    assert decide(effect, where, None, p=0.06, p_negligible=1.0, strictly=False) == "undecided"
    assert decide(replace(effect, seeds=2), where, None, p=0.04, p_negligible=1.0, strictly=False) == "undecided"
    assert (
        decide(replace(effect, estimate=Estimate(0.0)), where, None, p=0.04, p_negligible=1.0, strictly=False)
        == "undecided"
    )
    assert check(effect, where) == ("as expected" if outcome == "supported" else "not as expected")


@pytest.mark.parametrize(
    ("interval", "outcome"),
    [((0.1, 0.9), "negligible"), ((-0.9, 0.1), "negligible"), ((0.1, 1.1), "supported"), ((-0.9, 1.1), "undecided")],
)
def test_effects_below_the_smallest_of_interest_are_negligible_even_if_not_zero(
    interval: tuple[float, float], outcome: str
) -> None:
    effect, where, band = Effect(Estimate(0.0, *interval), None, 5, None), region("greater", 0, 0), Region(-1, 1)
    assert decide(effect, where, band, p=0.04, p_negligible=0.04, strictly=True) == outcome
    loosely = decide(effect, where, band, p=0.04, p_negligible=0.04, strictly=False)
    assert loosely == ("supported" if interval[0] > 0 else outcome)
    assert decide(effect, where, band, p=0.06, p_negligible=0.04, strictly=False) == (
        "undecided" if outcome == "supported" else outcome
    )
    assert decide(effect, where, band, p=0.06, p_negligible=0.06, strictly=False) == "undecided"
    few = replace(effect, seeds=2)
    assert decide(few, where, band, p=0.04, p_negligible=0.04, strictly=True) == "undecided"


def test_p_is_computed_for_the_nearer_bound() -> None:
    def p(value: float, where: Region) -> float:
        return Effect(Estimate(value), Mean(value, 0.2, 4), 5, None).p(where)

    t = stats.t(4)
    assert p(0.5, Region(0, math.inf)) == pytest.approx(2 * t.sf(2.5))
    # 0.5 is 0.5 from the bound at 1 and 1.5 from that at -1.
    assert p(0.5, Region(-1, 1)) == pytest.approx(2 * t.sf(2.5))
    assert p(3.0, Region(-1, 1)) == pytest.approx(2 * t.sf(10))
    assert Effect(Estimate(0.5), None, 5, None).p(Region(0, math.inf)) == 1.0


def test_two_one_sided_tests_by_scipy() -> None:
    """The larger of the one-sided p, doubled: the 95 % interval lies within the bounds exactly if it is ≤ 0.05."""
    x = np.random.default_rng(0).normal(0.2, 1, 40)
    effect = estimate_effect(Sample(x[None], np.zeros((1, 40)), by_item=True))
    for sesoi in (0.3, 0.5, 0.8):
        low = stats.ttest_1samp(x, -sesoi, alternative="greater").pvalue
        high = stats.ttest_1samp(x, sesoi, alternative="less").pvalue
        found = effect.p(Region(-sesoi, sesoi))
        assert found == pytest.approx(2 * max(low, high) if max(low, high) < 0.5 else found)
        assert (found <= 0.05 and abs(effect.estimate.value) < sesoi) == Region(-sesoi, sesoi).includes(effect.estimate)


def test_one_number_per_seed_gets_the_t_interval_over_seeds() -> None:
    found = estimate_effect(Sample(np.array([[1.0], [2.0], [3.0]]), np.zeros((3, 1)), by_item=False))
    assert (found.estimate.value, found.seeds, found.items) == (2.0, 3, None)
    # t of 2 degrees of freedom is 4.303 at 97.5 %, its p in closed form 1 − t/√(t² + 2).
    t = 2.0 / (1 / math.sqrt(3))
    assert found.estimate.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert found.p(region("greater", 0, 0)) == pytest.approx(1 - t / math.sqrt(t**2 + 2))
    least = found.detectable(0.05)
    assert least is not None
    assert stats.nct.sf(4.302653, 2, least * math.sqrt(3)) == pytest.approx(0.8, abs=3e-4)
    assert found.detectable(0.05 / 4) > 1.5 * least  # type: ignore[operator]


def test_items_and_seeds_are_both_drawn() -> None:
    """The standard error of a difference over items and seeds, by three mean squares; p agrees with the interval."""
    rng = np.random.default_rng(2)
    a, b = rng.normal(1, 1, (4, 30)), rng.normal(0, 1, (4, 30))
    found = estimate_effect(Sample(a, b, by_item=True))
    difference = a - b
    items, seeds = difference.mean(0), difference.mean(1)
    residuals = difference - items - seeds[:, None] + difference.mean()
    error = math.sqrt(items.var(ddof=1) / 30 + seeds.var(ddof=1) / 4 - (residuals**2).sum() / (3 * 29) / 120)
    assert isinstance(found.model, Mean)
    assert found.model.error == pytest.approx(error)
    assert found.estimate.value == pytest.approx(difference.mean())
    assert (found.seeds, found.items) == (4, 30)
    assert found.estimate.low is not None
    for target, outside in ((found.estimate.low - 0.01, True), (found.estimate.low + 0.01, False)):
        assert (found.p(region("greater", target, 0)) < 0.05) == outside


def test_where_nothing_varies_units_have_an_exact_bound_and_numbers_have_none() -> None:
    """Identical arms: 2,400 answers without a difference show that it is negligible, never that there is one."""
    same = np.random.default_rng(0).integers(0, 2, (5, 480)) * 100.0
    found = estimate_effect(Sample(same, same.copy(), True, ends=(-100.0, 100.0)))
    assert found.p(Region(-1, 1)) == pytest.approx(0.99**2400)
    assert found.p(region("greater", 0, 0)) == 1.0
    assert decide(found, region("greater", 0, 0), Region(-1, 1), 1.0, 4 * found.p(Region(-1, 1)), True) == "negligible"
    assert "nothing varies: exact interval, from 2,400 units" in found.notes[0]
    for relation in ("greater", "less"):
        assert decide(found, region(relation, 0, 0), Region(-1, 1), 1.0, 1.0, False) == "undecided"  # type: ignore[arg-type]
    never = np.zeros((5, 1))  # the share of 3 × 57 steps a seed that are saturated
    found = estimate_effect(Sample(never, never, False, ends=(0.0, 100.0), units=5 * 3 * 57))
    assert found.estimate.high == pytest.approx(100 * (1 - 0.05 ** (1 / 855)))
    assert found.p(region("greater", 50, 0)) < 1e-9
    assert decide(found, region("greater", 50, 0), Region(45, 55), 0.01, 1.0, False) == "contradicted"
    found = estimate_effect(Sample(never, never, False))
    assert (found.estimate, found.model, found.p(Region(-1, 1))) == (Estimate(0.0), None, 1.0)
    assert found.notes == ("nothing varies, so there is no interval",)


def test_prompts_without_a_result_are_left_out_and_reported() -> None:
    a = np.array([[1.0, math.nan, 2.0], [2.0, 1.0, 4.0]])
    found = estimate_effect(Sample(a, np.zeros((2, 3)), by_item=True))
    assert (found.items, found.estimate.value) == (2, 2.25)
    assert found.notes == ("1 of 3 prompts lack a result and were left out",)
    with pytest.raises(DataError, match="no prompt has a result"):
        estimate_effect(Sample(np.full((2, 3), math.nan), np.zeros((2, 3)), by_item=True))


# --- the file of claims


def test_the_file_of_claims_is_well_formed() -> None:
    book = read(FILE)
    assert len(book.claims) == len({claim.id for claim in book.claims}) >= 30
    assert {claim.paper for claim in book.claims} == {"DNPO", "SPIN", "SPA", "robust", "OSP", "SAPO", "ours"}
    assert book.seeds == tuple(range(5, 17))
    primary = {(claim.a.split("@")[0], claim.b.split("@")[0]) for claim in book.by_role("primary")}
    assert primary == {("dsl", "spin"), ("dnpo", "spin"), ("npo", "spin"), ("npo", "constant")}
    assert all(claim.sesoi == 1 and claim.arguments["column"] == "right" for claim in book.by_role("primary"))
    assert set(book.sweeps) == {claim.sweep for claim in book.claims}
    for name in book.sweeps:
        assert (ROOT / "sweeps" / f"{name}.yaml").is_file()
    for claim in book.claims:
        assert claim.text.endswith(".")
        assert claim.where
        assert claim.unit
        assert not claim.caveat.endswith(".")


def test_every_method_of_its_sweep_has_a_claim_of_its_source() -> None:
    """Except a method that is another method's published code, and one whose source is older than language models."""
    book = read(FILE.with_name("claims_methods.yaml"))
    (sweep,) = book.sweeps
    content = yaml.safe_load((ROOT / "sweeps" / f"{sweep}.yaml").read_text(encoding="utf-8"))
    methods = set(content["hydra"]["sweeper"]["params"]["method"].split(","))
    assert {claim.sides[0][0].arm for claim in book.claims} == methods - {"spin_official", "reinforce"}
    assert book.arms == {name: {"method": name} for name in book.arms}


def jobs(sweep: str, *overrides: str) -> list[TrackedRun]:
    """The runs of a sweep under one seed, from the composed settings of its jobs."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        params = compose("train", [f"+sweep={sweep}"], return_hydra_config=True).hydra.sweeper.params
        replaced = {override.split("=")[0] for override in overrides} | {"seed"}  # as the command line replaces them
        kept = [f"{key}={value}" for key, value in params.items() if key not in replaced]
        given = [*kept, f"+sweep={sweep}", "seed=0", *overrides]
        parsed = OverridesParser.create().parse_overrides(given)
        runs = []
        for number, job in enumerate(BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]):
            cfg = compose("train", job, return_hydra_config=True)
            choices = dict(cfg.hydra.runtime.choices)
            top, starts, settings, _ = check_settings(
                OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
            )
            resolved: dict[str, Any] = {**top, **settings}
            for name, start in starts.items():
                if isinstance(settings[name], dict):  # otherwise a list, one part an iteration
                    resolved[name] = {**settings[name], "start": start}
            tags = running.tags({k: v for k, v in choices.items() if v is not None}, resolved)
            values = {key: str(value) for key, value in flat(resolved).items()}
            runs.append(TrackedRun(f"{sweep}{number}", " ".join(job), "FINISHED", number, 1.0, tags, values, "", None))
    return runs


@pytest.mark.long
def test_the_commands_of_live_methods_make_every_run_that_their_claims_need() -> None:
    """The commands are in the headers of the two sweeps; arms are recognised by settings as well as by options."""
    book = read(FILE.with_name("claims_live.yaml"))
    for sweep in book.sweeps:
        header = (ROOT / "sweeps" / f"{sweep}.yaml").read_text(encoding="utf-8").split("are enough:")[1]
        commands = re.findall(rf"#   python -m dnpo.train -m \+sweep={sweep}(.*)", header)
        assert commands
        made = [run for given in commands for run in jobs(sweep, *given.split())]
        tracked = Tracked(book.arms, {sweep: made})
        for claim in (claim for claim in book.claims if claim.sweep == sweep):
            assert tracked.missing(claim, 0) == []
    assert not Tracked(book.arms, {"osp": jobs("osp", "dsl=ranked", "strength=asked")}).policy("osp", "hard", 0, 0)
    runs = jobs("sapo", "rollout.capacity=2000")
    with pytest.raises(DataError, match=r"rollout\.segment is "):
        refuse_unlike(runs)  # two runs of one method
    refuse_unlike(runs, lambda run: run.params["rollout.segment"])  # two arms of a claim


@pytest.mark.long
@pytest.mark.parametrize(
    ("file", "sweep"), [*((FILE, sweep) for sweep in read(FILE).sweeps), (SMALL, "small"), (MAP, "noise_map")]
)
def test_every_claim_finds_all_that_it_needs_in_its_sweep(file: Path, sweep: str) -> None:
    book = read(file)
    wanted = [claim for claim in book.claims if claim.sweep == sweep]
    tracked = Tracked(book.arms, {sweep: jobs(sweep, *book.sweeps[sweep].overrides)})
    assert wanted
    for claim in wanted:
        assert tracked.missing(claim, 0) == []
        for arm, k in list_needed_policies(claim):
            policy = tracked.policy(sweep, arm, 0, k)
            assert policy is not None
            if sweep in ("ablation", "fixed_vs_trainable") and arm != "spin":
                assert int(policy.run.params["iterations"]) - 1 == k  # a branch counts with its last iteration alone
    assert tracked.missing(wanted[0], 1) != []


CLAIM = {
    "id": "one",
    "role": "secondary",
    "paper": "DNPO",
    "where": "Figure 1",
    "text": "It is better.",
    "measured": "score",
    "sweep": "main",
    "measure": "by_prompt",
    "a": "new@1",
    "b": "old@1",
    "relation": "greater",
    "sesoi": 1.0,
    "unit": "points",
}
CONTROL = {**CLAIM, "id": "control"}
ARMS = {"old": {"npo": "off"}, "new": {"npo": "trainable"}}


def write_claims(path: Path, *given: Mapping[str, Any], sweeps: Mapping[str, Any] | None = None) -> Path:
    tree = {"scale": "a test", "seeds": [0, 1, 2, 3], "sweeps": sweeps or {"main": None}, "arms": ARMS}
    filled = [{**CLAIM, **({"sesoi": 0.0} if one.get("relation") == "within" else {}), **one} for one in given]
    path.write_text(yaml.safe_dump({**tree, "claims": filled}, allow_unicode=True))
    return path


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"measure": "by_promt"}, r"claim one: there is no measure by_promt\. Did you mean by_prompt"),
        ({"arguments": {"colum": "score"}}, "claim one: arguments of by_prompt: .*colum"),
        ({"measure": "metric"}, "claim one: arguments of metric: .*name"),
        ({"sweep": "mian"}, r"claim one: sweep mian is not among main\. Did you mean main"),
        ({"a": "nwe@1"}, r"claim one: arm nwe is not among new, old\. Did you mean new"),
        ({"a": "new"}, "expected arms with iterations"),
        ({"a": ""}, "claim one: a is empty"),
        ({"relation": "at_least"}, "need a margin above 0"),
        ({"margin": 1.0}, "greater and less take none"),
        ({"relation": "bigger"}, "claim one: .*relation"),
        ({"direction": "up"}, "claim one: .*direction"),
        ({"measure": "duels", "a": "new@1,2"}, "duels compares one arm with one other, each at the same number"),
        ({"premise": {"runs": "older", "metric": "m", "least": 1}}, "arm older is not among"),
        ({"role": "main"}, "claim one: .*role"),
        ({"sesoi": 0.0}, "needs a smallest effect of interest"),
        ({"relation": "within", "margin": 1.0, "sesoi": 1.0}, "only within takes none"),
        ({"role": "check"}, "a check takes no sesoi"),
        ({"role": "primary"}, "by right answers or by a second judge"),
        ({"after": "two"}, "after: there is no claim two before it"),
        ({"after": "one"}, "after: there is no claim one before it"),
        ({"relation": "at_least", "margin": 0.5}, "need a positive control"),
        ({"control": "control"}, "other relations take none"),
        ({"relation": "at_least", "margin": 1.0, "control": "control"}, "must be below the smallest effect"),
        (
            {"relation": "at_least", "margin": 0.5, "control": "control", "arguments": {"column": "right"}},
            "control control has another arguments",
        ),
    ],
)
def test_errors_in_a_claim_are_reported(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"(?s){message}"):
        read(write_claims(tmp_path / "claims.yaml", CONTROL, wrong))


@pytest.mark.parametrize("seeds", [None, [], ["5"], [-1], [True]])
def test_a_file_fixes_its_seeds(tmp_path: Path, seeds: Any) -> None:
    path = write_claims(tmp_path / "claims.yaml", {})
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "seeds": seeds}))
    with pytest.raises(SettingsError, match=r"seeds: expected a list of whole numbers"):
        read(path)


def test_a_repeated_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"\bid one\b"):
        read(write_claims(tmp_path / "claims.yaml", {}, {}))
    with pytest.raises(SettingsError, match="scale, seeds, sweeps, arms and claims"):
        read(FILE.parent / "sweeps" / "main.yaml")
    with pytest.raises(SettingsError, match="cannot be read"):
        read(tmp_path / "none.yaml")


def test_the_two_sides_are_parsed() -> None:
    assert terms("spin@0 + dnpo-F@SFT,2") == [Term("spin", (0,)), Term("dnpo-F", ("SFT", 2))]
    assert terms("") == []


# --- the command, on runs with known results

PROMPTS = 40
SHIFT = {"old": 0.0, "new": 10.0}


def track(
    folder: Path,
    arm: str,
    seed: int,
    *,
    iterations: int = 2,
    status: str = "FINISHED",
    beta: float = 0.1,
    start: int = 1,
    commit: str = "",
    reused: str = "",
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """One run as the loop leaves it: arm ``new`` is 10 points better from ``start`` on, and right in one half more.

    Args:
        commit: the version that made it.
        reused: the version that made its stage ``iteration 0 · optimise``, if another one did.
        settings: further settings that it records.
    """
    tracking = MLflowTracking(uri=f"sqlite:///{folder / 'mlflow.db'}", artifacts=str(folder / "artifacts"))
    npo = {"old": "off", "new": "trainable"}[arm]
    tags = {"dnpo.kind": "run", "dnpo.seed": str(seed), "dnpo.npo": npo, "dnpo.dsl": "off", "dnpo.sweep_name": "main"}
    tags |= {"dnpo.scale": "smoke"} | ({"dnpo.commit": commit} if commit else {})
    sweep = folder / "multirun"
    sweep.mkdir(exist_ok=True)
    params = {"seed": seed, "iterations": iterations, "npo.start": start, "dsl.start": 0, "objective.beta": beta}
    params |= settings
    tracking.start(f"{arm} seed={seed}", params, tags, sweep)
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    table = []
    for k in ("SFT", *range(iterations)):
        acts = arm == "new" and k != "SFT" and int(k) >= start
        prompts = np.random.default_rng(0)  # some are harder, for everyone
        rng = np.random.default_rng([seed, arm == "new", -1 % 9 if k == "SFT" else int(k)])
        rows = []
        for number in range(PROMPTS):
            base = 50 + float(prompts.normal(0, 5))
            rows.append({"id": f"p{number}", "kind": "human", "sample": 0, "score": 60.0, "right": True})
            for sample in range(2):
                score = base + float(rng.normal(0, 2)) + (SHIFT[arm] if acts else 0.0)
                rows.append({"id": f"p{number}", "kind": "sample", "sample": sample, "score": score, "right": None})
        name = "sft" if k == "SFT" else f"iteration-{k}"
        path = scratch / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist([{**row, "second": None} for row in rows]), path)
        tracking.artifact(path, "items")
        saturated = 0.9 if seed else 0.1
        table.append({"iteration": k, "margin/saturated": saturated, "ks": 0.1 + 0.01 * seed + 0.5 * acts, "flat": 1.0})
    path = scratch / "summary.json"
    made_by = [
        {"commit": commit, "stages": ["prompts", "iteration 1 · optimise"]},
        {"commit": reused or commit, "stages": ["iteration 0 · optimise"]},
    ]
    policies = [f"{arm if arm == 'new' and k != 'SFT' else 'old'} {seed} {k}" for k in ("SFT", *range(iterations))]
    shared = {"key": f"sft/{seed}", "seconds": 30.0}
    stages = [shared, {"key": f"optimise/{arm} {seed}", "seconds": 60.0}]
    summary = {"table": table, "made_by": made_by, "policies": policies, "stages": stages}
    path.write_text(json.dumps(summary))
    if status == "FINISHED":
        tracking.artifact(path)
    tracking.finish(status)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def known(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database: two arms under four seeds; under the last seed one arm has no finished run."""
    folder = tmp_path_factory.mktemp("claims")
    shutil.copy(migrated, folder / "mlflow.db")
    for seed in range(4):
        track(folder, "old", seed)
        track(folder, "new", seed, status="FAILED" if seed == 3 else "FINISHED")
    return folder


@pytest.fixture
def database(known: Path, tmp_path: Path) -> str:
    """A copy of it, to which tests add."""
    shutil.copy2(known / "mlflow.db", tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def outcomes(
    tmp_path: Path, uri: str, *given: Mapping[str, Any], status: int = 0, arguments: tuple[str, ...] = ()
) -> Any:
    """Run the command on some claims; the rows of its JSON by id."""
    path = write_claims(tmp_path / "claims.yaml", *given)
    out = tmp_path / "out"
    command = ["--claims", str(path), "--uri", uri, "--out", str(out), "--no-log", "--exploratory", *arguments]
    assert claims.main(command) == status
    return {row["id"]: row for row in json.loads((out / "claims.json").read_text())["claims"]}


def test_outcomes_are_right_on_known_numbers(tmp_path: Path, database: str) -> None:
    found = outcomes(
        tmp_path,
        database,
        {"id": "better"},
        {"id": "worse", "relation": "less"},
        {"id": "no-worse", "relation": "at_least", "margin": 0.5, "control": "better"},
        {"id": "without-control", "relation": "at_least", "margin": 0.5, "control": "worse"},
        {"id": "behind", "after": "worse"},
        {"id": "in-front", "after": "better"},
        {"id": "checked", "role": "check", "sesoi": 0.0},
        {"id": "checked-worse", "role": "check", "sesoi": 0.0, "relation": "less"},
        {"id": "identical", "a": "old@1"},
        {"id": "by-ten", "relation": "within", "target": 10.0, "margin": 1.0},
        {"id": "by-twenty", "relation": "within", "target": 20.0, "margin": 1.0},
        {"id": "same-before", "a": "old@0", "b": "old@SFT"},
        {"id": "wins", "measure": "duels", "times": 100.0},
        {"id": "as-good", "measure": "as_good_as_human", "b": "", "relation": "less", "target": 90.0, "times": 100.0},
        {"id": "number", "measure": "metric", "arguments": {"name": "ks"}},
        {"id": "contrast", "a": "new@1 + old@0", "b": "old@1 + old@SFT"},
        {"id": "second", "arguments": {"column": "second"}},
        {"id": "later", "a": "new@1,2", "b": "old@1,2"},
    )
    assert {name: row["outcome"] for name, row in found.items()} == {
        "better": "supported",
        "worse": "contradicted",
        "no-worse": "supported",
        "without-control": "undecided",
        "behind": "undecided",
        "in-front": "supported",
        "checked": "as expected",
        "checked-worse": "not as expected",
        "identical": "undecided",
        "by-ten": "supported",
        "by-twenty": "contradicted",
        "same-before": "negligible",
        "wins": "supported",
        "as-good": "supported",
        "number": "undecided",
        "contrast": "supported",
        "second": "not measured",
        "later": "not measured",
    }
    better = found["better"]
    assert better["effect"] == pytest.approx(10.0, abs=0.6)
    assert better["low"] <= 10.0 <= better["high"]
    assert (better["seeds"], better["items"]) == (3, PROMPTS)
    assert better["p_adjusted"] >= better["p"]
    assert better["exploratory"] is True
    assert "its positive control worse is contradicted" in str(found["without-control"]["notes"])
    assert "its gate worse is contradicted" in str(found["behind"]["notes"])
    assert (found["checked"]["p_adjusted"], found["checked"]["effect"]) == (None, better["effect"])
    # 4 × 40 answers of one point of 100 leave more open than one point
    assert (found["identical"]["effect"], found["identical"]["p"]) == (0.0, 1.0)
    assert found["identical"]["high"] == pytest.approx(100 * (1 - 0.05 ** (1 / 160)))
    assert any("seed 3 is left out: it has no finished new@1" in note for note in better["notes"])
    assert found["contrast"]["effect"] == pytest.approx(10.0, abs=0.6)
    assert found["number"]["effect"] == pytest.approx(0.5)
    assert "nothing varies, so there is no interval" in found["number"]["notes"]  # three equal numbers prove nothing
    assert found["number"]["items"] is None
    assert "no sample response has a value of second" in found["second"]["reason"]
    assert "seed 0 has no finished new@2, old@2" in found["later"]["reason"]
    assert "dnpo sweep main" in found["later"]["reason"]


def test_claims_are_decided_over_items(tmp_path: Path, database: str) -> None:
    """Shares of wins and of answers as good as human ones, computed again from the tracked rows."""
    found = outcomes(
        tmp_path,
        database,
        {"id": "wins", "measure": "duels"},
        {"id": "as-good", "measure": "as_good_as_human", "a": "old@1", "b": ""},
    )
    wins, good = [], []
    for seed in range(4):
        sides: dict[str, list[dict[str, Any]]] = {"trainable": []}
        for run in Database(database).runs(tags={"seed": str(seed)}):
            path = run.artifact("items/iteration-1.parquet")
            assert path is not None
            if not run.finished:
                continue
            rows = [row for row in pq.read_table(path).to_pylist() if row["kind"] == "sample"]
            sides[run.option("npo")] = rows
        wins += [
            (a["score"] > b["score"]) - (a["score"] < b["score"])
            for a in sides["trainable"]
            for b in sides["off"]
            if a["id"] == b["id"]
        ]
        good += [row["score"] >= 60.0 for row in sides["off"]]
    assert found["wins"]["effect"] == pytest.approx(np.mean(wins))
    assert found["as-good"]["effect"] == pytest.approx(np.mean(good))


def test_the_correction_is_over_all_claims_of_a_role_even_unmeasured_ones(tmp_path: Path, database: str) -> None:
    number = {"id": "number", "a": "old@0", "b": "old@SFT"}
    alone = outcomes(tmp_path, database, number)
    many = [{"id": f"absent-{n}", "a": "new@2"} for n in range(9)]
    checks: list[dict[str, Any]] = [{"id": f"check-{n}", "role": "check", "sesoi": 0.0} for n in range(3)]
    right = {"arguments": {"column": "right", "kind": "human"}, "role": "primary"}
    others = outcomes(tmp_path, database, number, *many, *checks, {"id": "first", **right})
    assert others["number"]["p"] == alone["number"]["p"]
    for name in ("p", "p_negligible"):
        raw = alone["number"][name]
        assert others["number"][f"{name}_adjusted"] == pytest.approx(min(1.0, 10 * raw))
        assert others["first"][f"{name}_adjusted"] == others["first"][name]
    assert (alone["number"]["level"], others["number"]["level"]) == (0.05, pytest.approx(0.005))
    assert others["number"]["detectable"] > alone["number"]["detectable"]


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_each_role_has_its_correction(role: Role) -> None:
    from dnpo.stats.significance import benjamini_hochberg, holm

    ps = [0.001, 0.02, 0.03, 0.04, 0.9]
    assert correct(ps, role) == {"primary": holm, "secondary": benjamini_hochberg}[role](ps)
    assert correct(ps, "check") == ps


def test_the_effect_is_also_given_by_iteration(tmp_path: Path, database: str) -> None:
    found = outcomes(tmp_path, database, {"a": "old@0,1", "b": "old@0,1"}, {"id": "rise", "a": "new@1", "b": "old@0"})
    assert list(found["one"]["by_iteration"]) == ["0", "1"]
    assert found["rise"]["by_iteration"] == {}


def test_one_seed_supports_nothing(tmp_path: Path, database: str) -> None:
    found = outcomes(tmp_path, database, {}, arguments=("--seeds", "1"))["one"]
    assert (found["outcome"], found["seeds"], found["items"]) == ("undecided", 1, PROMPTS)
    assert found["low"] > 0
    assert found["p_adjusted"] < 0.05
    assert "one seed: the variation between trainings is unknown" in found["notes"]


def test_a_claim_with_a_premise_counts_the_seeds_in_which_it_held(tmp_path: Path, database: str) -> None:
    premise = {"runs": "old", "metric": "margin/saturated", "least": 0.5}
    found = outcomes(
        tmp_path, database, {"premise": premise}, {"id": "none", "premise": {**premise, "least": 2.0}}, status=0
    )
    assert found["one"]["seeds"] == 2
    assert "premise (margin/saturated ≥ 0.5 in old) held for 2 of 3 seeds" in found["one"]["notes"]
    assert found["one"]["outcome"] == "undecided"
    assert found["none"]["outcome"] == "not measured"
    assert "held for 0 of 3 seeds" in found["none"]["reason"]


def test_mixed_settings_are_refused_unless_one_is_chosen(known: Path, tmp_path: Path) -> None:
    for name in ("mlflow.db", "artifacts"):
        copy = shutil.copytree if (known / name).is_dir() else shutil.copy2
        copy(known / name, tmp_path / name)
    track(tmp_path, "new", 3, beta=0.5)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    found = outcomes(tmp_path, uri, {}, status=1)["one"]
    assert found["outcome"] == "not measured"
    assert "objective.beta" in found["reason"]
    chosen = outcomes(tmp_path, uri, {}, arguments=("--tag", "objective.beta=0.1"))["one"]
    assert (chosen["outcome"], chosen["seeds"]) == ("supported", 3)


def test_runs_from_before_and_after_a_new_setting_are_compared_with_a_note(migrated: Path, tmp_path: Path) -> None:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    part = {"sft._target_": "dnpo.optimise.parts.Optimisation"}
    for seed in range(3):
        for arm in ("old", "new"):
            track(tmp_path, arm, seed, settings=part | ({"sft.keep": "last"} if seed else {}))
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    found = outcomes(tmp_path, uri, {})["one"]
    assert (found["outcome"], found["seeds"]) == ("supported", 3)
    assert found["notes"] == ["2 runs from before these settings existed, with their defaults: sft.keep=last"]
    track(tmp_path, "new", 0, settings={**part, "sft.keep": "best"})
    reason = outcomes(tmp_path, uri, {}, status=1)["one"]["reason"]
    assert "sft.keep is last (5 runs, 1 of them by default), best (1 run)" in reason


def test_the_newest_run_counts_and_a_part_that_has_not_started_makes_no_arm() -> None:
    def run(name: str, started: int, start: int) -> TrackedRun:
        tags = {"dnpo.npo": "trainable", "dnpo.dsl": "off", "dnpo.seed": "0"}
        params = {"iterations": "3", "npo.start": str(start), "dsl.start": "9"}
        return TrackedRun(name, name, "FINISHED", started, 1.0, tags, params, "", None)

    chain, branch = run("chain", 1, 1), run("branch", 2, 2)
    assert [k for k in ("SFT", 0, 1, 2, 3) if in_force(chain, k)] == ["SFT", 1, 2]
    assert [k for k in ("SFT", 0, 1, 2, 3) if in_force(branch, k)] == ["SFT", 2]
    tracked = Tracked(ARMS, {"main": [branch, chain]})  # the newest first, as it reads them
    found = {k: tracked.policy("main", "new", 0, k) for k in (0, 1, 2)}
    assert {k: policy and policy.run.name for k, policy in found.items()} == {0: None, 1: "chain", 2: "branch"}
    assert tracked.policy("main", "old", 0, 1) is None


def test_nothing_to_read_is_reported(tmp_path: Path, database: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out"), "--exploratory"]
    assert claims.main(["--uri", f"sqlite:///{tmp_path / 'none.db'}", *out]) == 1
    assert "there is no such database" in (said := capsys.readouterr().err)
    assert "python -m analysis.claims run=true" in said
    path = write_claims(tmp_path / "c.yaml", {"sweep": "ablation"}, sweeps={"ablation": None})
    assert claims.main(["--claims", str(path), "--uri", database, "--no-log", *out]) == 1
    assert "ablation" in capsys.readouterr().out
    assert claims.main(["--seeds", "one", "--uri", database, *out]) == 1
    assert "seeds=one: " in capsys.readouterr().err
    assert claims.main(["--tag", "beta", "--uri", database, *out]) == 1
    assert "tag=beta: " in capsys.readouterr().err


@pytest.mark.parametrize("command", [claims.main, claims_plan.main])
def test_results_that_cannot_be_written_are_refused_before_anything_is_read(
    command: Callable[[list[str]], int], tmp_path: Path, database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "file").write_text("")
    for out in (file, file / "inside"):
        assert command(["--uri", database, "--out", str(out)]) == 1
        said = capsys.readouterr()
        assert said.err.startswith(f"error: out={out}: ")
        assert "expected a folder to write to" in said.err
        assert not said.out


def test_all_formats_agree_and_are_logged(known: Path, tmp_path: Path) -> None:
    for name in ("mlflow.db", "artifacts", "multirun"):
        copy = shutil.copytree if (known / name).is_dir() else shutil.copy2
        copy(known / name, tmp_path / name)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    given = {"text": "10 % of A|B_c < d & so.", "caveat": "mind 5 % & more"}
    path = write_claims(tmp_path / "claims.yaml", given, {"id": "two", "a": "new@2"})
    out = tmp_path / "out"
    assert claims.main(["--claims", str(path), "--uri", uri, "--out", str(out), "--exploratory"]) == 0
    brief = (out / claims.BRIEF).read_text()
    assert r"| 1 | 10 % of A\|B\_c &lt; d &amp; so. | > 0 | +" in brief
    assert "| supported (exploratory) |" in brief
    assert "by the number of the claim:\n\n- 1: mind 5 % &amp; more.\n\n" in brief
    texts = {p.suffix: p.read_text() for p in out.glob("claims.*")}
    assert {p.name for p in out.iterdir()} - {f"claims{suffix}" for suffix in texts} == {
        claims.BRIEF,
        "runs-main.csv",
        "seeds.csv",
    }
    assert set(texts) == {".md", ".csv", ".json", ".tex"}
    assert r"10 % of A\|B\_c &lt; d &amp; so." in texts[".md"]
    assert re.search(r"\+(9|10)\.\d \(\+9\.\d to \+10\.\d\) points", texts[".md"])
    assert texts[".md"].splitlines()[4].count(" | ") == texts[".md"].splitlines()[2].count(" | ")
    assert r"10 \% of A$|$B\_c $<$ d \& so." in texts[".tex"]
    assert texts[".csv"].count("supported") >= 1
    assert "1 supported, 0 contradicted, 0 negligible, 0 undecided, 1 not measured" in texts[".md"]
    assert "Benjamini and Hochberg's over 2 secondary claims" in texts[".md"]
    assert texts[".md"].startswith("**Secondary**")
    # 7 × 60 s, and 30 s for each of 4 seeds instead of for each run
    assert "9 min of computing, 1.2 times as much without shared stages" in texts[".md"]
    assert "main (7 runs of seeds 0-3, 1 unfinished and left out; 9 min" in texts[".md"]
    assert "without shared stages); all with scale=smoke," in texts[".md"]
    database = Database(uri)
    (logged,) = [run for run in database._all if run.tags.get("dnpo.kind") == "claims"]
    assert logged.finished
    assert logged.tags["dnpo.exploratory"] == "true"
    for name, text in texts.items():
        kept = logged.artifact(f"claims{name}")
        assert kept is not None
        assert kept.read_text() == text
    parent = database.parent(database.runs()[0])
    assert parent is not None
    beside = parent.artifact("analysis/claims.json")
    assert beside is not None
    assert beside.read_text() == texts[".json"]
    assert all(set(report.CLAIM) <= row.keys() for row in json.loads(texts[".json"])["claims"])  # what the report shows
    assert len(database.runs()) == 8  # the logged results are no training run


def test_a_table_without_its_runs_decides_as_with_them(tmp_path: Path, database: str) -> None:
    """Outcomes, p and detectable effects follow from claims.json alone, also where nothing varies."""
    given: list[dict[str, Any]] = [
        {"id": "better"},
        {"id": "worse", "relation": "less"},
        {"id": "without-control", "relation": "at_least", "margin": 0.5, "control": "worse"},
        {"id": "identical", "a": "old@1"},
        {"id": "same-before", "a": "old@0", "b": "old@SFT"},
        {"id": "number", "measure": "metric", "arguments": {"name": "ks"}},
        {"id": "premise", "premise": {"runs": "old", "metric": "margin/saturated", "least": 0.5}},
        {"id": "second", "arguments": {"column": "second"}},
    ]
    found = outcomes(tmp_path, database, *given)
    kept = tmp_path / "kept.json"
    shutil.copy(tmp_path / "out" / "claims.json", kept)
    nowhere = f"sqlite:///{tmp_path / 'none.db'}"
    again = outcomes(tmp_path, nowhere, *given, arguments=("--measured", str(kept)))
    assert {name for name, row in found.items() if again[name] != row} == {"second"}  # whose reason names the sweep
    assert again["second"]["outcome"] == "not measured"
    means = list(csv.DictReader((tmp_path / "out" / "seeds.csv").open()))
    of = [float(row["effect"]) for row in means if row["id"] == "better"]
    assert np.mean(of) == pytest.approx(found["better"]["effect"], rel=1e-5)
    assert "main (7 runs of seeds 0-3, 1 unfinished and left out; 9 min" in (tmp_path / "out/claims.md").read_text()
    more = outcomes(tmp_path, database, *given, arguments=("--measured", str(kept), "--seeds", "0"))
    assert more["better"]["seeds"] == 3, "the tracked runs have fewer seeds than the earlier table"
    assert "main (7 runs of seeds 0-3, 1 unfinished and left out; 9 min" in (tmp_path / "out/claims.md").read_text()

    kept.write_text(kept.read_text().replace('"target": 0.0', '"target": 1.0', 1))
    assert "claim better has another target there: 1.0, not 0.0" in refusal(tmp_path, nowhere, kept)
    kept.write_text("[]")
    assert "expected the claims.json of an earlier table" in refusal(tmp_path, nowhere, kept)


def refusal(tmp_path: Path, uri: str, measured: Path, *arguments: str) -> str:
    """What the command says as it refuses an earlier table."""
    command = ["--claims", str(tmp_path / "claims.yaml"), "--uri", uri, "--out", str(tmp_path / "out")]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert claims.main([*command, "--exploratory", "--measured", str(measured), *arguments]) == 1
    return said.getvalue()


def test_an_earlier_table_counts_only_for_the_claims_as_registered(migrated: Path, tmp_path: Path) -> None:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    git(tmp_path, "init", "-q")
    path = write_claims(tmp_path / "claims.yaml", {})
    registered = commit(tmp_path)
    for seed in (1, 2, 3):
        for arm in ("old", "new"):
            track(tmp_path, arm, seed, commit=registered)
    out = tmp_path / "out"
    command = ["--claims", str(path), "--uri", f"sqlite:///{tmp_path / 'mlflow.db'}", "--out", str(out), "--no-log"]
    assert claims.main(command) == 0
    kept = shutil.copy(out / "claims.json", tmp_path / "kept.json")
    (row,) = json.loads(kept.read_text())["claims"]
    assert (row["complete"], row["commits"]) == ([1, 2, 3], [registered])
    elsewhere = [*command, "--uri", f"sqlite:///{tmp_path / 'none.db'}", "--measured", str(kept)]
    assert claims.main(elsewhere) == 0
    (again,) = json.loads((out / "claims.json").read_text())["claims"]
    assert again == row
    options = claims.parser().parse_args(elsewhere)
    book, earlier = read(path), read_earlier(kept, read(path), Registration.of(path))
    assert claims.missing_seeds(book, "main", options, {}, [0, 1, 2, 3]) == [0, 1, 2, 3]
    assert claims.missing_seeds(book, "main", options, {}, [0, 1, 2, 3], earlier) == [0]

    path.write_text(path.read_text() + "# changed after the table\n")
    commit(tmp_path)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert claims.main(elsewhere) == 1
    assert f"its claims are of commit {registered[:9]}, not those of claims.yaml of commit" in said.getvalue()


def test_policies_of_runs_are_kept_as_rows(tmp_path: Path, database: str) -> None:
    outcomes(tmp_path, database, {})
    rows = list(csv.DictReader((tmp_path / "out" / "runs-main.csv").open()))
    # by seed: fine-tuning, both iterations of old, and of new the one in which its noise acts
    assert len(rows) == 4 * (1 + 2) + 3
    assert {row["npo"] for row in rows if row["iteration"] == "1"} == {"off", "trainable"}
    assert all(float(row["flat"]) == 1.0 for row in rows)


def test_tables_replace_what_a_page_has_between_the_marks(tmp_path: Path, database: str) -> None:
    page = tmp_path / "page.md"
    first, last = claims_page.marks("claims")
    page.write_text(f"# Results\n\n{first}\nold\n{last}\n\n## After\n")
    outcomes(tmp_path, database, {}, arguments=("--page", str(page)))
    brief = (tmp_path / "out" / claims.BRIEF).read_text()
    assert page.read_text() == f"# Results\n\n{first}\n\n{brief}\n{last}\n\n## After\n"
    for wrong in (f"{first}\n", f"{last} {first}"):
        page.write_text(wrong)
        outcomes(tmp_path, database, {}, status=1, arguments=("--page", str(page)))
        assert page.read_text() == wrong


def test_an_override_applies_to_every_sweep_or_to_one() -> None:
    given = ["threads=2", "main:eval.texts.encoder=a:b", "eval=smoke"]
    options = claims.parser().parse_args(["--jobs", "1", *(part for o in given for part in ("--override", o))])
    sweep = Sweep(overrides=["eval=texts"])
    main, other = (claims.sweep_command(name, sweep, [0], options) for name in ("main", "ablation"))
    assert main[-3:] == ["threads=2", "eval.texts.encoder=a:b", "eval=smoke"]
    assert other[-2:] == ["threads=2", "eval=smoke"]
    assert "eval=texts" not in main + other, "what is asked for beats the file of claims"


def test_numbers_are_written_as_people_read_them() -> None:
    assert [claims_tables.p_text(p) for p in (0.0004, 0.0312, 0.42)] == ["< 0.001", "0.031", "0.42"]
    assert claims_tables.ranges([1, 3, 4, 5, 9]) == "1, 3-5, 9"


# --- claims before runs


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder: Path) -> str:
    for path in folder.glob("*.yaml"):
        git(folder, "add", path.name)
    git(folder, "commit", "--allow-empty", "-m", "A version")
    return git(folder, "rev-parse", "HEAD")


def test_only_runs_made_after_the_claims_test_them(
    migrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    git(tmp_path, "init", "-q")
    before = commit(tmp_path)
    path = write_claims(tmp_path / "claims.yaml", {})
    command = ["--claims", str(path), "--uri", f"sqlite:///{tmp_path / 'mlflow.db'}", "--out", str(tmp_path / "out")]
    command += ["--no-log"]
    for arm in ("old", "new"):
        track(tmp_path, arm, 0, commit=before)
    assert claims.main(command) == 1
    assert "claims.yaml is not committed" in capsys.readouterr().err
    registered = commit(tmp_path)
    assert claims.main(command) == 1
    said = capsys.readouterr().out
    assert f"2 runs: commit {before[:9]}, which made it, is older than claims.yaml of commit {registered[:9]}" in said
    assert "exploratory=true shows them" in said

    for seed in (1, 2, 3):
        for arm in ("old", "new"):
            track(tmp_path, arm, seed, commit=registered)
    track(tmp_path, "new", 4, commit=commit(tmp_path))  # a seed that the file does not fix
    assert claims.main(command) == 0
    (row,) = json.loads((tmp_path / "out" / "claims.json").read_text())["claims"]
    assert (row["outcome"], row["seeds"], row["exploratory"]) == ("supported", 3, False)
    assert "3 of the 4 seeds fixed beforehand" in row["notes"]
    text = (tmp_path / "out" / "claims.md").read_text()
    assert f"Claims: claims.yaml of commit {registered[:9]}" in text
    assert "left out: 2 runs: commit" in text
    assert "exploratory" not in text

    assert claims.main([*command, "--seeds", "3,4"]) == 1
    assert "claims.yaml fixes seeds 0-3, so 4 cannot test its claims; exploratory=true" in capsys.readouterr().err
    path.write_text(path.read_text() + "# changed after the runs\n")
    assert claims.main(command) == 1
    assert "claims.yaml has changes that are not committed" in capsys.readouterr().err
    commit(tmp_path)
    assert claims.main(command) == 1
    assert f"6 runs: commit {registered[:9]}, which made it, is older than" in capsys.readouterr().out
    assert claims.main([*command, "--exploratory"]) == 0
    (row,) = json.loads((tmp_path / "out" / "claims.json").read_text())["claims"]
    assert (row["outcome"], row["seeds"], row["exploratory"]) == ("supported", 4, True)


def test_stages_computed_before_the_claims_do_not_test_them(migrated: Path, tmp_path: Path) -> None:
    """Reused stages count by the version that made them; stages of unknown origin do not count."""
    shutil.copy(migrated, tmp_path / "mlflow.db")
    git(tmp_path, "init", "-q")
    before = commit(tmp_path)
    path = write_claims(tmp_path / "claims.yaml", {})
    after = commit(tmp_path)
    for arm, more in (
        ("old", {"commit": after}),
        ("new", {"commit": after, "reused": before}),
        ("new", {"commit": f"{after}+"}),
        ("new", {"commit": "0" * 40}),
        ("new", {}),
    ):
        track(tmp_path, arm, 0, **more)  # type: ignore[arg-type]
    runs = Database(f"sqlite:///{tmp_path / 'mlflow.db'}").runs()
    registration = Registration.of(path)
    kept, objections = split(registration, runs)
    assert [run.tags["dnpo.commit"].rstrip("+") for run in kept] == [after, after]
    assert sorted(objections.values()) == [1, 1, 1]
    text = describe(objections)
    assert f"1 run: commit {before[:9]}, which made it, is older than claims.yaml of commit {after[:9]}" in text
    assert "this repository does not know the commit 000000000 that made it" in text
    assert "it was made outside a git repository" in text
    assert registration.objection(replace(runs[0], tags={}, artifacts=(tmp_path / "nowhere").as_uri())) == (
        "it is not known which commit made it"
    )


# --- running what is missing


def test_only_missing_seeds_are_run(tmp_path: Path, database: str) -> None:
    sweeps = {
        "main": {
            "overrides": ["eval=texts", "iterations=3"],
            "where_installed": {"no_such_package": ["a=b"], "yaml": ["c=d"]},
        }
    }
    book = read(write_claims(tmp_path / "claims.yaml", {}, sweeps=sweeps))
    more = ["--jobs", "1", "--override", "eval=smoke", "--override", "scale=smoke", "--exploratory"]
    options = claims.parser().parse_args(["--uri", database, *more])
    seeds = claims.missing_seeds(book, "main", options, {}, [0, 1, 2, 3, 4])
    assert seeds == [3, 4]
    assert claims.missing_seeds(book, "main", options, {"objective.beta": "7"}, [0]) == [0]
    command = claims.sweep_command("main", book.sweeps["main"], seeds, options)
    assert command[1:6] == ["-m", "dnpo.train", "-m", "+sweep=main", "seed=3,4"]
    assert f"tracking.uri={database}" in command
    assert command[-4:] == ["iterations=3", "c=d", "eval=smoke", "scale=smoke"]
    assert "hydra/launcher=joblib" not in command
    side_by_side = claims.parser().parse_args(["--uri", database, "--jobs", "2"])
    installed = importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is not None
    assert (
        "hydra.launcher.n_jobs=2" in claims.sweep_command("main", book.sweeps["main"], [0], side_by_side)
    ) == installed


def test_a_failed_sweep_is_reported_and_existing_runs_are_evaluated(
    tmp_path: Path, database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = outcomes(
        tmp_path, database, {}, status=1, arguments=("--run", "--seeds", "0,1,2,4", "--override", "no.such.setting=1")
    )
    assert (found["one"]["outcome"], found["one"]["seeds"]) == ("supported", 3)
    said = capsys.readouterr()
    assert "+sweep=main seed=4 " in said.out
    assert re.search("sweep main: failed after .* see .*main.log", said.err)
    assert "no.such.setting" in (tmp_path / "out" / "main.log").read_text()
    assert (
        claims.main(["--run", "--jobs", "0", "--uri", database, "--out", str(tmp_path / "out"), "--exploratory"]) == 1
    )
    assert "jobs=0: " in capsys.readouterr().err


@pytest.mark.long
def test_one_command_runs_the_sweep_and_prints_the_outcome(
    tiny: Path, migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny / "store", tmp_path / "store")
    shutil.copy(migrated, tmp_path / "mlflow.db")
    path = write_claims(
        tmp_path / "claims.yaml",
        {"arguments": {"column": "score", "kind": "sample"}, "a": "new@0", "b": "old@SFT"},
        {"id": "second", "arguments": {"column": "second"}, "a": "old@0", "b": "old@SFT", "matters": ["second_judge."]},
        {"id": "mirror", "measure": "correlation", "a": "new@0", "b": "", "relation": "less"}
        | {"arguments": {"first": "loss/policy", "second": "loss/noise"}},
        {
            "id": "moved",
            "measure": "distance",
            "a": "old@0",
            "b": "",
            "arguments": {"first": "rejected", "second": "new"},
        },
        sweeps={"main": {"overrides": ["judge@second_judge=correct"]}},
    )
    command = ["--claims", str(path), "--run", "--seeds", "0", "--jobs", "1", "--exploratory"]
    for setting in (*TINY, "scale=smoke", "iterations=1", "acts_from=0", "dsl=off", "method=spin,npo"):
        command += ["--override", setting]
    monkeypatch.chdir(tmp_path)
    assert claims.main(command) == 0
    assert re.search(r"sweep main: \d+ s\n", capsys.readouterr().out)
    assert claims.main(command) == 0
    assert "sweep main: complete for seeds 0\n" in capsys.readouterr().out
    rows = {row["id"]: row for row in json.loads((tmp_path / "claims" / "claims.json").read_text())["claims"]}
    assert {row["outcome"] for row in rows.values()} == {"undecided"}
    assert all(row["seeds"] == 1 and row["effect"] is not None for row in rows.values())
    assert -1 <= rows["mirror"]["effect"] <= 1
    assert 0 <= rows["moved"]["effect"] <= 1
