"""Seconds of a training step: ours, a plain implementation and TRL's ``DPOTrainer``; and NPO relative to DPO.

python -m benchmarks.step                       # the head-heavy model; TRL where it is installed
python -m benchmarks.step --shape body          # the body-heavy one
python -m benchmarks.step --shape 7b --lora 16  # a Mistral 7B with random weights, on a GPU
python -m benchmarks.step --objectives          # ours with other objectives, relative to the logistic one, 20 rounds
python -m benchmarks.step --flops               # counted matrix products against the closed formula
"""

import argparse
import statistics
from functools import partial

import torch

from benchmarks import harness
from benchmarks.harness import Facts, Worker
from benchmarks.problem import SHAPES, Pairs, Shape, batches
from benchmarks.variant import NOISY, OBJECTIVES
from benchmarks.worker import NAMES, add_arguments, dtype_of, pass_on
from dnpo.wording import percent

# numerator, denominator, target on the head-heavy model and on the body-heavy one
RATIOS: tuple[tuple[str, str, dict[str, float]], ...] = (
    ("ours-dpo-online", "naive-dpo-online", {"head": 0.46}),
    ("ours-dpo-cached", "naive-dpo-online", {"head": 0.35}),
    ("ours-dpo-cached", "naive-dpo-cached", {}),
    ("ours-dpo-cached", "trl-dpo-cached", {"head": 0.30}),
    ("ours-npo-cached", "ours-dpo-cached", {"head": 1.60, "body": 1.06}),
    ("ours-npo-online", "ours-dpo-cached", {}),
    ("naive-npo-cached", "naive-dpo-cached", {}),
    ("ours-npo-cached", "naive-npo-cached", {}),
)
LOGISTIC = ("ours-dpo-cached", "ours-dpo-online")
LIMITS = {"soft": 1.05, "weighted": 1.05, "ipo": 1.05, "simpo": 1.05, "nll": 0.6, "refined": 1.35, "statistics": 1.1}
OTHERS: tuple[tuple[str, str, dict[str, float]], ...] = (
    *((f"ours-{name}-cached", LOGISTIC[0], {"head": limit, "body": limit}) for name, limit in LIMITS.items()),
    ("ours-orpo-cached", LOGISTIC[1], {"head": 0.85, "body": 0.85}),
)
DEFAULT = tuple(
    name
    for name in NAMES
    if name not in ("trl-dpo-online", "naive-npo-online") and name.split("-")[1] not in (*OBJECTIVES, *NOISY)
)
TRL_NOTE = (
    "On a CPU TRL falls back to scoring every position of padded rows; on a GPU it tiles as dnpo does, but pads rows."
)


def main() -> None:
    """Measure, print, write."""
    parser = harness.common_arguments("step", "Seconds of a training step, variant against variant.")
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, help="measured steps of each variant (default: 6, of objectives 20)")
    parser.add_argument(
        "--objectives", action="store_true", help="ours with other objectives, relative to the logistic one"
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="VARIANT",
                        help=f"of {', '.join(NAMES)}")  # fmt: skip
    parser.add_argument("--flops", action="store_true", help="count matrix products instead of seconds")
    parser.add_argument("--one-at-a-time", action="store_true", help="start a new worker for every run, so that only "
                        "one model is in memory (always so for 7b)")  # fmt: skip
    given = parser.parse_args()
    given.rounds = given.rounds or (20 if given.objectives else 6)
    others = [*LOGISTIC, *(name for name, _, _ in OTHERS)]
    given.only = given.only or (others if given.objectives else DEFAULT)
    if given.flops and given.lora:
        parser.error("--flops: the formula is for models whose weights are all trained, not for --lora")
    shape = SHAPES[given.shape]
    adapters = f", LoRA {given.lora}" if given.lora else ""
    kept = "" if given.kept is None else f", {given.kept} MB of tiles kept"
    title = f"{given.shape} model{adapters}, {given.pairs or shape.pairs} pairs a batch{kept}"
    found = _flops(given, title) if given.flops else _seconds(given, title)
    suffix = (
        f"-{given.shape}"
        + (f"-kept{given.kept}" if kept else "")
        + (f"-lora{given.lora}" if given.lora else "")
        + ("-objectives" if given.objectives else "")
        + ("-flops" if given.flops else "")
    )
    out = given.out if given.out != harness.RESULTS / "step.json" else harness.RESULTS / f"step{suffix}.json"
    harness.save(out, {"shape": vars(shape), "lora": given.lora, "kept_mb": given.kept, **found})


def _worker(name: str, given: argparse.Namespace) -> Worker:
    return Worker("benchmarks.worker", [name, "--batches", str(given.rounds), *pass_on(given)], given.threads)


def _seconds(given: argparse.Namespace, title: str) -> Facts:
    keep = not (given.one_at_a_time or given.shape == "7b")
    runs, skipped = harness.interleave(
        {name: partial(_worker, name, given) for name in given.only}, given.rounds, keep=keep
    )
    device = torch.device(given.device) if given.device else harness.default_device()
    kind = "seconds of wall clock" if device.type == "cuda" else "CPU seconds"
    print(f"{title}; {kind} of a step, median (quartiles) of {given.rounds} rounds")
    print("tokens are counted in both sequences of every pair, without padding\n")
    rate = harness.matmul_rate(device, dtype_of(given)) if device.type == "cuda" else None
    seconds = {name: [run["seconds"] for run in found] for name, found in runs.items()}
    headings = ["variant", "seconds", "tokens/s"] + (["peak GB", "share of matmul rate"] if rate else [])
    rows = []
    for name, found in runs.items():
        speed = statistics.median(run["tokens"] / run["seconds"] for run in found)
        rows.append([name, harness.summary(seconds[name]), f"{speed:,.0f}"])
        if rate:
            rows[-1] += [f"{max(run['peak'] for run in found) / 1e9:.1f}", _share(found, rate)]
    print(harness.table(headings, rows))
    for name, reason in skipped.items():
        print(f"{name}: left out: {reason}")
    ratios = [
        harness.ratio(f"{over} / {under}", seconds[over], seconds[under], targets.get(given.shape))
        for over, under, targets in (*RATIOS, *OTHERS)
        if over in seconds and under in seconds
    ]
    if ratios:
        print("\n" + harness.table(harness.RATIO_HEADINGS, [harness.ratio_row(r) for r in ratios]))
    if any(name.startswith("trl") for name in runs) and device.type == "cpu":
        print(f"\n{TRL_NOTE}")
    agreement = _agreement(runs)
    if agreement is not None:
        print(f"\nlosses of DPO variants on the same batch differ by at most {agreement:.1g}")
    return {"unit": kind, "runs": runs, "ratios": ratios, "skipped": skipped, "losses_differ_by": agreement,
            "matmul_flops_per_second": rate, "note": TRL_NOTE}  # fmt: skip


def _share(runs: list[Facts], rate: float) -> str:
    """The rate of the matrix products of blocks and head, relative to the device's rate on large products."""
    if runs[0]["flops"] is None:
        return ""
    return percent(statistics.median(sum(run["flops"].values()) / run["seconds"] for run in runs) / rate, 0)


def _agreement(runs: dict[str, list[Facts]]) -> float | None:
    """The largest difference between losses that should be equal, if there is more than one."""
    losses = [[run["loss"] for run in found] for name, found in runs.items() if "-dpo-" in name]
    if len(losses) < 2:
        return None
    return max(max(same) - min(same) for same in zip(*losses, strict=True))


def _flops(given: argparse.Namespace, title: str) -> Facts:
    given.rounds = 1
    (pairs,) = batches(SHAPES[given.shape], 1, given.seed, given.pairs, given.length)
    print(f"{title}; matrix products of one step in GFLOP, counted and by formula\n")
    rows: list[list[str]] = []
    found: dict[str, Facts] = {}
    for name in given.only:
        worker = _worker(name, given)
        if "skip" in worker.facts:
            print(f"{name}: left out: {worker.facts['skip']}")
            worker.stop()
            continue
        found[name] = worker.ask(do="flops", batch=0)
        worker.stop()
        rows.append([name, *_compare(found[name])])
    print(harness.table(("variant", "blocks", "formula", "off by", "head", "formula", "off by", "attention"), rows))
    print("\nAttention includes rotary positions, and entries above the diagonal where a variant computes them.\n")
    noise = _noise(found, SHAPES[given.shape], pairs)
    return {"variants": found, "npo_minus_dpo": noise}


def _compare(flops: Facts) -> list[str]:
    """Make the cells of one variant, and add the error of the formula to its facts."""
    counts, expected = flops["step"], flops["formula"]
    # The blocks alone are counted forward and backward; the frozen reference's blocks by formula.
    body, head = flops["body"]["linear"], counts["linear"] - flops["body"]["linear"] - expected["reference body"]
    flops["off_by"] = {"body": body - expected["body"], "head": head - expected["head"]}
    body, expected_body = (v + expected["reference body"] for v in (body, expected["body"]))
    cells = [f"{v / 1e9:,.3f}" for v in (body, expected_body, head, expected["head"], counts["attention"])]
    return [*cells[:2], f"{flops['off_by']['body']:,d}", *cells[2:4], f"{flops['off_by']['head']:,d}", cells[4]]


def _noise(found: dict[str, Facts], shape: Shape, pairs: Pairs) -> Facts | None:
    """Compare the products that NPO adds to DPO with the formula."""
    if not {"ours-npo-cached", "ours-dpo-cached"} <= set(found):
        return None
    dpo = found["ours-dpo-cached"]["step"]["linear"]
    once = 2 * shape.hidden * shape.vocabulary * pairs.rejected_tokens
    facts: Facts = {}
    for name in ("ours-npo-cached", "ours-npo-online"):
        if name not in found:
            continue
        expected = found[name]["formula"]
        noise = expected["head"] - found["ours-dpo-cached"]["formula"]["head"]
        more = found[name]["step"]["linear"] - dpo
        facts[name] = {"counted": more, "formula": noise + expected["reference body"], "products": noise / once}
        print(
            f"{name} − ours-dpo-cached: {more:,d} FLOP counted; {noise / once:.3g} × 2·H·V a rejected token + "
            f"{expected['reference body']:,d} for the reference's blocks = {facts[name]['formula']:,d}; "
            f"off by {more - facts[name]['formula']:,d}"
        )
    return facts


if __name__ == "__main__":
    main()
