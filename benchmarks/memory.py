"""Memory added by a training step, by batch size and length: ours compared with a plain implementation.

    python -m benchmarks.memory                     # the head-heavy model
    python -m benchmarks.memory --pairs 4 --lengths 512 --shape 7b --lora 16
    python -m benchmarks.memory --objectives        # ours with every objective, relative to the logistic one

The added memory is the peak of allocations in forward and backward, see ``harness.measure_added_memory``. Weights,
optimizer state and gradients exist before the step and do not count. Each implementation's blocks are also run alone:
every loss needs their activations, so the ratio compares the memory beyond them. The reference is always cached. A size
that does not fit into memory is ``nan``.

With ``--objectives`` the model is narrow and has a large vocabulary. Compared with the logistic objective, a step may
add only the data that the objective reads: a few tensors of hidden states; for the extrapolated policy, one more tile
of logits; for noise, the kept tiles and the gradients of its weights.
"""

import argparse
import math

from benchmarks import harness
from benchmarks.harness import Facts, Worker
from benchmarks.problem import SHAPES, Shape, batches
from benchmarks.variant import NOISY, OBJECTIVES
from benchmarks.worker import add_arguments, pass_on
from dnpo.wording import percent

RATIO = {"head": 0.06}  # maximum of ours over naive beyond the blocks, for pairs with drawn lengths
NOISE = {"head": 260.0}  # MB that NPO may add to DPO
MEASURED = (
    ("naive", "naive-dpo-cached", "memory"),
    ("ours", "ours-dpo-cached", "memory"),
    ("blocks alone", "ours-dpo-cached", "body_memory"),
    ("naive blocks", "naive-dpo-cached", "body_memory"),
    ("ours NPO", "ours-npo-cached", "memory"),
    ("naive NPO", "naive-npo-cached", "memory"),
)
OBJECTIVE_SHAPE = "wide-vocabulary"
STATES = 4  # float32 tensors of all hidden states that an objective may add
NOISE_TILES = 6  # tiles of rejected tokens, besides kept ones


def main() -> None:
    """Measure, print, write."""
    parser = harness.common_arguments("memory", "Memory that a training step adds.")
    add_arguments(parser, sizes=False)
    parser.add_argument("--pairs", type=int, nargs="+", default=[2, 4, 8], help="batch sizes (default: 2 4 8)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024],
                        help="tokens of every sequence (default: 256 512 1024)")  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=[m[0] for m in MEASURED], default=[m[0] for m in MEASURED],
                        metavar="WHAT", help=f"of {', '.join(m[0] for m in MEASURED)}")  # fmt: skip
    parser.add_argument("--objectives", action="store_true", help="ours with every objective; the other options are "
                        "--lora, --dtype, --device, --seed and --kept")  # fmt: skip
    given = parser.parse_args()
    if given.objectives:
        _objectives(given)
        return
    drawn = (SHAPES[given.shape].pairs, None)
    found = _measure(given, [drawn, *((pairs, length) for pairs in given.pairs for length in given.lengths)])
    print(f"{given.shape} model: MB added by forward and backward\n")
    names = list(found[0]["megabytes"])
    ratios = {"naive", "ours", "blocks alone", "naive blocks"} <= set(names)
    headings = ["pairs × length", *names, *(["ours / naive", "beyond the blocks"] if ratios else [])]
    rows = [
        [
            f"{row['pairs']} × {row['length'] or 'drawn'}",
            *(f"{row['megabytes'][name]:,.1f}" for name in names),
            *([f"{whole:.3f}" for whole in _ratios(row["megabytes"])] if ratios else []),
        ]
        for row in found
    ]
    print(harness.table(headings, rows))
    checks = list(_checks(given, found, names))
    if checks:
        print("\n" + "\n".join(f"{'met' if c['met'] else 'MISSED'}: {c['what']}" for c in checks))
    out = given.out if given.shape == "head" else given.out.with_stem(f"{given.out.stem}-{given.shape}")
    harness.save(out, {"shape": vars(SHAPES[given.shape]), "lora": given.lora, "added": found, "checks": checks})


def _objectives(given: argparse.Namespace) -> None:
    """Measure ours under every objective, print, write."""
    given.shape, given.pairs = OBJECTIVE_SHAPE, None
    shape = SHAPES[OBJECTIVE_SHAPE]
    (batch,) = batches(shape, 1, given.seed)
    tokens, rejected = batch.completion_tokens, batch.rejected_tokens
    logits = 4e-6 * tokens * shape.vocabulary
    print(
        f"{tokens:,} completion tokens, {shape.vocabulary:,} entries, width {shape.hidden}: all logits would be "
        f"{logits:,.1f} MB in float32\n"
    )
    found: list[Facts] = []
    for name in ("dpo", *OBJECTIVES, "npo", *NOISY):
        harness.progress(name)
        worker = Worker("benchmarks.worker", [f"ours-{name}-cached", *pass_on(given)], given.threads)
        added = worker.ask(do="memory", batch=0).get("bytes", math.nan) / 1e6
        worker.stop()
        more = added - (found[0]["added"] if found else added)
        found.append(
            {"objective": name, "added": added, "more": more, "allowed": _allowed(name, shape, tokens, rejected)}
        )
    harness.progress("")
    for row in found:
        row["met"] = row["more"] <= row["allowed"]
    cells = [
        [
            "logistic" if row["objective"] == "dpo" else row["objective"],
            f"{row['added']:,.1f}",
            f"{row['more']:+,.1f}",
            f"{row['allowed']:,.1f}",
            percent(row["added"] / logits),
            "met" if row["met"] else "MISSED",
        ]
        for row in found
    ]
    print(harness.table(("objective", "MB added", "over logistic", "at most", "of all logits", "target"), cells))
    out = given.out.with_stem(f"{given.out.stem}-objectives")
    harness.save(out, {"shape": vars(shape), "tokens": tokens, "logits": logits, "lora": given.lora, "added": found})


def _allowed(name: str, shape: Shape, tokens: int, rejected: int) -> float:
    """The MB that an objective may add to the logistic one."""
    from dnpo.optimise.npo import KEPT
    from dnpo.policy.logprobs import ROWS, TILE

    device = harness.default_device().type
    tile = min(TILE[device], shape.vocabulary)
    allowed = STATES * tokens * shape.hidden * 4
    if name.startswith("refined"):
        allowed += 2 * min(tokens, ROWS) * tile * 4
    if name.endswith("npo"):
        allowed += KEPT[device] + NOISE_TILES * rejected * tile * 4 + 3 * shape.vocabulary * (shape.hidden + 1) * 4
    return allowed / 1e6


def _measure(given: argparse.Namespace, sizes: list[tuple[int, int | None]]) -> list[Facts]:
    """Measure the MB of every requested variant at every size, with one process for each variant."""
    found: list[Facts] = [{"pairs": pairs, "length": length, "megabytes": {}} for pairs, length in sizes]
    names = [f"{pairs}x{length}" if length else str(pairs) for pairs, length in sizes]
    for variant in dict.fromkeys(variant for name, variant, _ in MEASURED if name in given.only):
        harness.progress(variant)
        worker = Worker("benchmarks.worker", [variant, *pass_on(given), "--sizes", *names], given.threads)
        for i, row in enumerate(found):
            for name, its, request in MEASURED:
                if its == variant and name in given.only:
                    harness.progress(f"{name}: {names[i]}")
                    row["megabytes"][name] = worker.ask(do=request, batch=i).get("bytes", math.nan) / 1e6
        worker.stop()
    harness.progress("")
    return found


def _ratios(megabytes: dict[str, float]) -> tuple[float, float]:
    """Ours over naive: the whole memory that a step adds, and the memory beyond its blocks."""
    beyond = megabytes["ours"] - megabytes["blocks alone"], megabytes["naive"] - megabytes["naive blocks"]
    return megabytes["ours"] / megabytes["naive"], beyond[0] / beyond[1]


def _checks(given: argparse.Namespace, found: list[Facts], names: list[str]) -> list[Facts]:
    """Compare the figures with their targets."""
    checks: list[Facts] = []

    def check(what: str, met: bool) -> None:
        checks.append({"what": what, "met": met})

    megabytes = {(row["pairs"], row["length"]): row["megabytes"] for row in found}
    if {"naive", "ours", "blocks alone", "naive blocks"} <= set(names) and given.shape in RATIO:
        drawn = _ratios(next(iter(megabytes.values())))[1]
        what = (
            f"with drawn lengths, ours adds {drawn:.3f} of what naive adds beyond the blocks (≤ {RATIO[given.shape]})"
        )
        check(what, drawn <= RATIO[given.shape])
    if {"ours", "blocks alone"} <= set(names):
        for (pairs, length), small in megabytes.items():
            for grown in ((2 * pairs, length), (pairs, 2 * length if length else None)):
                if length is None or grown not in megabytes:
                    continue
                more, blocks = (megabytes[grown][n] - small[n] for n in ("ours", "blocks alone"))
                what = (
                    f"{pairs} × {length} → {grown[0]} × {grown[1]}: ours adds {more:,.1f} MB, the blocks {blocks:,.1f}"
                )
                check(what, more <= 1.02 * blocks)
    if {"ours", "ours NPO"} <= set(names) and given.shape in NOISE:
        most = max(m["ours NPO"] - m["ours"] for m in megabytes.values())
        check(f"NPO adds at most {most:,.1f} MB to DPO (≤ {NOISE[given.shape]:g})", most <= NOISE[given.shape])
    return checks


if __name__ == "__main__":
    main()
