"""How costs grow: of log-probabilities and noise with tokens and vocabulary, of the reference with pairs.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --only noise/vocabulary

Sizes double from point to point. ``per unit`` is seconds over size, relative to the smallest size: 1 is linear.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Facts, Worker
from benchmarks.problem import SHAPES, batches, model
from benchmarks.quiet import Quiet

HIDDEN = 256
TOKENS, VOCABULARY = 512, 32_000  # the constant value of one while the other grows
GRID: dict[str, tuple[int, ...]] = {
    "log-probabilities/tokens": (256, 512, 1024, 2048),
    "log-probabilities/vocabulary": (4_000, 8_000, 16_000, 32_000, 64_000),
    "noise/tokens": (256, 512, 1024, 2048),
    "noise/vocabulary": (4_000, 8_000, 16_000, 32_000, 64_000),
    "reference/pairs": (4, 8, 16, 32),
}


def main() -> None:
    """Measure, print, write; with ``--worker``, do the measured work."""
    parser = harness.common_arguments("scaling", "How the cost grows.")
    parser.add_argument("--rounds", type=int, default=3, help="measured runs at each size (default: 3)")
    parser.add_argument("--only", nargs="+", choices=GRID, default=list(GRID), metavar="WHAT",
                        help=f"of {', '.join(GRID)}")  # fmt: skip
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--worker", choices=GRID, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        _serve(given)
        return
    found = {what: _measure(what, given) for what in given.only}
    for what, sizes in found.items():
        first = next(iter(sizes))
        unit = {size: statistics.median(r["seconds"] for r in facts["runs"]) / size for size, facts in sizes.items()}
        rows = [
            [
                f"{size:,}",
                harness.summary([r["seconds"] for r in facts["runs"]], "{:.3f}"),
                f"{unit[size] / unit[first]:.2f}",
                f"{facts['bytes'] / 1e6:,.1f}",
            ]
            for size, facts in sizes.items()
        ]
        print(f"\n{what}\n" + harness.table((what.split("/")[1], "seconds", "per unit", "MB added"), rows))
    harness.save(given.out, {"hidden": HIDDEN, "tokens": TOKENS, "vocabulary": VOCABULARY, "scaling": found})


def _measure(what: str, given: argparse.Namespace) -> dict[int, Facts]:
    """Measure all sizes in turn, round by round, in a separate process."""
    device = ["--device", given.device] if given.device else []
    worker = Worker("benchmarks.scaling", ["--worker", what, *device], given.threads)
    found: dict[int, Facts] = {size: {"runs": []} for size in GRID[what]}
    for size in found:
        harness.progress(f"{what}: {size}")
        found[size]["bytes"] = worker.ask(do="memory", size=size)["bytes"]
    for i in range(given.rounds):
        for size in found:
            harness.progress(f"{what}: {size}, round {i + 1} of {given.rounds}")
            found[size]["runs"].append(worker.ask(do="run", size=size))
    harness.progress("")
    worker.stop()
    return found


def _serve(given: argparse.Namespace) -> None:
    harness.claim_output()
    torch.set_num_threads(given.threads)
    device = torch.device(given.device) if given.device else harness.default_device()
    make = {"log-probabilities": _log_probabilities, "noise": _noise, "reference": _reference}
    kind, axis = given.worker.split("/")
    works: dict[int, Callable[[], Any]] = {}

    def handle(request: Facts) -> Facts:
        size = request["size"]
        if size not in works:
            tokens, vocabulary = (TOKENS, size) if axis == "vocabulary" else (size, VOCABULARY)
            works[size] = make[kind](tokens, vocabulary, device)
            works[size]()  # warm-up
        if request["do"] == "memory":
            return {"bytes": harness.measure_added_memory(works[size], device)}
        return harness.measure_time(works[size], device)[0]

    harness.answer(handle, {})


def _log_probabilities(tokens: int, vocabulary: int, device: torch.device) -> Callable[[], Any]:
    """Forward and backward of the primitive under every loss."""
    from dnpo.policy.logprobs import Head, token_logps

    torch.manual_seed(0)
    hidden_NH = torch.randn(tokens, HIDDEN, device=device, requires_grad=True)
    weight_VH = torch.randn(vocabulary, HIDDEN, device=device).mul_(0.02).requires_grad_()
    target_N = torch.randint(vocabulary, (tokens,), device=device)

    def work() -> None:
        hidden_NH.grad = weight_VH.grad = None
        token_logps(hidden_NH, Head(weight_VH), target_N).sum().backward()

    return work


def _noise(tokens: int, vocabulary: int, device: torch.device) -> Callable[[], Any]:
    """Forward and backward of trainable noise on four rejected responses with kept hidden states."""
    from dnpo.optimise.npo import Rejected, TrainableModule
    from dnpo.policy.logprobs import Head

    torch.manual_seed(0)
    hidden_NH = torch.randn(tokens, HIDDEN, device=device)
    head = Head(torch.randn(vocabulary, HIDDEN, device=device).mul_(0.02))
    target_N = torch.randint(vocabulary, (tokens,), device=device)
    noise = TrainableModule(HIDDEN, vocabulary).to(device)
    rejected = Rejected(hidden_NH, head, target_N, (tokens // 4,) * 4, (0, 1, 2, 3))

    def work() -> None:
        noise.zero_grad()
        noisy, _ = noise(torch.zeros(4, device=device), rejected)
        (noisy.noise_B.mean() + noise.alpha * noisy.variance).backward()

    return work


def _reference(pairs: int, vocabulary: int, device: torch.device) -> Callable[[], Any]:
    """The stage that computes the reference's log-probabilities, on pairs of the head-heavy shape."""
    from dnpo.optimise import reference
    from dnpo.policy.model import Policy
    from dnpo.records import Pair

    tokenizer: Any = None  # only rendering and generation need one
    policy = Policy(model(SHAPES["head"], device, torch.float32), tokenizer)
    (some,) = batches(SHAPES["head"], 1, pairs=pairs)
    rows = [
        Pair(str(i), [], prompt, "", "", chosen, rejected, "", "", None, None, False)
        for i, (prompt, chosen, rejected) in enumerate(zip(some.prompts, some.chosen, some.rejected, strict=True))
    ]

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            reference.score(policy, rows, autocast=False, folder=Path(folder), report=Quiet())

    return work


if __name__ == "__main__":
    main()
