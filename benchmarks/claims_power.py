"""How often does the protocol of claims find real effects, and effects that do not exist? Simulated tables of claims.

    python -m benchmarks.claims_power                    # 1,000 tables each
    python -m benchmarks.claims_power --tables 200

Part one is the size of the test over seeds and prompts: how often it finds, at 5 %, an effect in simulated differences
that have none, for several numbers of seeds and sources of variance. Part two has tables of the primary claims, with
the variances of a pilot or with right and wrong answers whose probabilities vary by prompt and seed. There are four
kinds of tables: one claim has the effect that ``dnpo claims plan`` names and the others have none; no claim has an
effect; all have the smallest effect of interest; or one has identical arms.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from analysis.claims_assess import Result, decide_role
from analysis.claims_book import FILE, read
from analysis.claims_plan import plan
from analysis.claims_rules import Sample, estimate_effect, strictest
from scipy.special import expit

from dnpo.stats.intervals import Array, Components, estimate_components, estimate_mean

PRIMARY = read(FILE).by_role("primary")
LEVEL = strictest("primary", len(PRIMARY))
SEEDS, PROMPTS = len(read(FILE).seeds), 480
# right greedy answers, points of 100, seeds 0 to 4 of the sweep methods: dsl, dnpo and npo − spin, npo − fixed_noise
PILOT = (
    Components(0.0, 2.52, 199.06),
    Components(0.0, 6.78, 228.58),
    Components(0.827, 11.85, 158.20),
    Components(0.419, 0.0, 158.38),
)
SCENARIOS = {  # standard deviations of seeds, prompts and the rest
    "seeds and prompts": (0.4, 1.0, 1.0),
    "prompts": (0.0, 1.0, 1.0),
    "neither": (0.0, 0.0, 1.0),
    "little of both": (0.05, 0.3, 1.0),
    "seeds": (1.0, 0.0, 1.0),
    "answers": (0.03, 0.1, 0.4),
}
Draw = Callable[[np.random.Generator, int, float], Array]


def normal(rng: np.random.Generator, parts: Components, effect: float, seeds: int, items: int) -> Array:
    """Differences by seed and prompt around an effect."""
    by_seed = rng.normal(effect, parts.seeds**0.5, (seeds, 1))
    by_item = rng.normal(0, parts.items**0.5, (1, items))
    made: Array = by_seed + by_item + rng.normal(0, parts.rest**0.5, (seeds, items))
    return made


def from_pilot(rng: np.random.Generator, which: int, effect: float) -> Array:
    """Differences of a primary claim with the variances of the pilot."""
    return normal(rng, PILOT[which], effect, SEEDS, PROMPTS)


def answers(rng: np.random.Generator, which: int, effect: float) -> Array:
    """Differences of right and wrong answers, points of 100, mean of three iterations.

    Prompts differ in difficulty, and arms by prompt and by seed. The effect raises one side's probabilities p in
    proportion to p (1 − p), so sure answers stay sure.
    """
    hard_I = rng.normal(0, 2.5, PROMPTS)
    ours_SI, theirs_SI = (
        expit(hard_I + rng.normal(0, 0.15, (SEEDS, 1)) + rng.normal(0, 0.5, (SEEDS, PROMPTS))) for _ in range(2)
    )
    ours_SI += effect / 100 * ours_SI * (1 - ours_SI) / DOUBT
    a_SI, b_SI = ((rng.random((3, SEEDS, PROMPTS)) < side_SI).mean(0) for side_SI in (ours_SI, theirs_SI))
    difference: Array = 100 * (a_SI - b_SI)
    return difference


_P = expit(np.random.default_rng(0).normal(0, (2.5**2 + 0.15**2 + 0.5**2) ** 0.5, 1_000_000))
DOUBT = float((_P * (1 - _P)).mean())  # mean of p (1 − p) over prompts and seeds


def size(tables: int) -> dict[str, dict[str, float]]:
    """The share of tests at 5 % that find an effect where there is none, by numbers of seeds and scenario."""
    found = {}
    for seeds in (3, 5, 12):
        shares = {}
        for name, (by_seed, by_item, rest) in SCENARIOS.items():
            rng = np.random.default_rng([seeds, len(name)])
            parts = Components(by_seed**2, by_item**2, rest**2)
            means = (estimate_mean(normal(rng, parts, 0.0, seeds, PROMPTS)) for _ in range(tables))
            shares[name] = float(np.mean([mean is not None and mean.p() <= 0.05 for mean in means]))
        found[f"{seeds} seeds"] = shares
    return found


def outcomes(draw: Draw, effects: Sequence[float | None], tables: int, seed: int) -> list[Counter[str]]:
    """Counts of the outcomes of each claim, and last of errors in whole tables.

    Args:
        effects: true effects; None: identical arms.
    """
    rng = np.random.default_rng(seed)
    counts: list[Counter[str]] = [Counter() for _ in range(len(PRIMARY) + 1)]
    for _ in range(tables):
        results = []
        for which, (claim, effect) in enumerate(zip(PRIMARY, effects, strict=True)):
            x = np.zeros((SEEDS, PROMPTS)) if effect is None else draw(rng, which, effect)
            results.append(Result(claim, "undecided", estimate_effect(Sample(x, np.zeros_like(x), True, claim.ends))))
        decided = [result.outcome for result in decide_role("primary", results).values()]
        for count, outcome in zip(counts, decided, strict=False):
            count[outcome] += 1
        pairs = list(zip(decided, effects, strict=True))
        counts[-1]["wrong effect"] += any(o in ("supported", "contradicted") and not e for o, e in pairs)
        counts[-1]["wrong negligible"] += any(o == "negligible" and e is not None and abs(e) >= 1 for o, e in pairs)
    return counts


def main() -> None:
    """Run the command."""
    options = argparse.ArgumentParser(description="Size and power of the protocol of claims, by simulation.")
    options.add_argument("--tables", type=int, default=1000)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/claims_power.json"))
    asked = options.parse_args()
    began = time.process_time()
    results: dict[str, Any] = {"tables": asked.tables, "size": size(asked.tables)}
    print(f"Found at 5 % without an effect, {PROMPTS} prompts, % of {asked.tables:,}:")
    print(f"{'':12}" + "".join(f"{name:>20}" for name in SCENARIOS))
    for seeds, shares in results["size"].items():
        print(f"{seeds:12}" + "".join(f"{100 * share:20.1f}" for share in shares.values()))
    for name, draw in (("pilot", from_pilot), ("answers", answers)):
        parts = PILOT if draw is from_pilot else _variances(draw)
        named = [
            plan(claim, each, LEVEL, SEEDS, PROMPTS, claim.sesoi).detectable
            for claim, each in zip(PRIMARY, parts, strict=True)
        ]
        cases: dict[str, list[float | None]] = {
            f"claim {which + 1} as planned": [named[which] if each == which else 0.0 for each in range(len(PRIMARY))]
            for which in range(len(PRIMARY) if draw is from_pilot else 1)
        }
        cases["no effect"] = [0.0] * len(PRIMARY)
        cases["of interest"] = [1.0, -1.0, 1.0, -1.0]
        cases["one identical"] = [None, 0.0, 0.0, 0.0]
        print(f"\n{name}: the plan names {', '.join(f'{effect:.2f}' for effect in named)} points; % of tables")
        for case, effects in cases.items():
            counts = outcomes(draw, effects, asked.tables, len(case))
            shares = [{k: 100 * v / asked.tables for k, v in sorted(count.items())} for count in counts]
            results[f"{name}, {case}"] = {"effects": effects, "shares": shares}
            shown = "; ".join(
                ", ".join(f"{outcome} {share:.1f}" for outcome, share in each.items()) for each in shares[:-1]
            )
            whole = ", ".join(f"{what} {share:.1f}" for what, share in shares[-1].items())
            print(f"  {case:20} {shown} | {whole}")
    results["cpu_seconds"] = time.process_time() - began
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(results, indent=1))
    print(f"\n{results['cpu_seconds']:.0f} CPU seconds; {asked.out}")


def _variances(draw: Draw) -> list[Components]:
    """Variances of simulated differences without an effect, from many pilots."""
    pilots = [estimate_components(draw(np.random.default_rng([1, seed]), 0, 0.0)) for seed in range(200)]
    mean = Components(*(float(np.mean([getattr(p, part) for p in pilots])) for part in ("seeds", "items", "rest")))
    return [mean] * len(PRIMARY)


if __name__ == "__main__":
    main()
