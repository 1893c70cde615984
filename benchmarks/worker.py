"""Run one variant of a training step as a worker; ``harness.Worker`` starts the process and sends requests.

python -m benchmarks.worker ours-dpo-cached --shape tiny     # then lines such as {"do": "run", "batch": 0}
"""

import argparse
from typing import Any

import torch

from benchmarks import harness
from benchmarks.flops import count_flops, formula
from benchmarks.harness import Facts
from benchmarks.problem import SHAPES, batches
from benchmarks.variant import NOISY, OBJECTIVES, Skip, Variant

NAMES = (
    *(f"{who}-{objective}-{reference}" for who in ("naive", "ours") for objective in ("dpo", "npo")
      for reference in ("online", "cached")),
    *("trl-dpo-online", "trl-dpo-cached"),
    *(f"ours-{objective}-cached" for objective in (*OBJECTIVES, *NOISY)),
)  # fmt: skip


def build(name: str, **setting: Any) -> Variant:
    """Build a variant by its name: implementation, objective, and ``online`` or ``cached`` reference."""
    who, objective, reference = name.split("-")
    if who == "naive":
        from benchmarks.naive import Naive

        return Naive(objective, reference, **setting)
    if who == "trl":
        from benchmarks.trl_step import Trl

        return Trl(objective, reference, **setting)
    from benchmarks.ours import Ours

    return Ours(objective, reference, **setting)


def add_arguments(parser: argparse.ArgumentParser, sizes: bool = True) -> None:
    """Add the options that define the training; commands pass them on to their workers.

    Args:
        parser: gets them.
        sizes: whether to include batch size and length.
    """
    parser.add_argument("--shape", choices=SHAPES, default="head", help="of the model and the pairs (default: head)")
    parser.add_argument("--lora", type=int, default=0, metavar="R", help="rank of adapters; 0 trains all weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 for 7b, else float32")
    parser.add_argument("--device", help="default: the GPU if there is one")
    if sizes:
        parser.add_argument("--pairs", type=int, help="a batch (default: 4)")
        parser.add_argument("--length", type=int, help="of every sequence, a quarter of it the prompt")
    parser.add_argument("--seed", type=int, default=0, help="draws the pairs")
    parser.add_argument(
        "--kept",
        type=int,
        metavar="MB",
        help="of tiles that ours keeps for the backward pass, for log-probabilities and for noise each (default: as "
        "dnpo does); with 0 all are recomputed",
    )


def pass_on(given: argparse.Namespace) -> list[str]:
    """Turn the options of :func:`add_arguments` into arguments again."""
    found: list[str] = []
    for name in ("shape", "lora", "dtype", "device", "pairs", "length", "seed", "kept"):
        value = getattr(given, name, None)
        if value is not None and not isinstance(value, list):
            found += [f"--{name}", str(value)]
    return found


def dtype_of(given: argparse.Namespace) -> torch.dtype:
    """The type of weights and of matrix products."""
    found = getattr(torch, given.dtype or ("bfloat16" if given.shape == "7b" else "float32"))
    assert isinstance(found, torch.dtype)
    return found


def main() -> None:
    """Build the variant and answer requests: ``run``, ``memory``, ``body_memory`` and ``flops`` of a batch."""
    harness.claim_output()
    parser = argparse.ArgumentParser()
    parser.add_argument("variant", choices=NAMES)
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--sizes", nargs="+", help="a batch of each size instead: PAIRS, or PAIRSxLENGTH")
    parser.add_argument("--threads", type=int, default=1)
    add_arguments(parser)
    given = parser.parse_args()
    _serve(given)


def _serve(given: argparse.Namespace) -> None:
    torch.set_num_threads(given.threads)
    device = torch.device(given.device) if given.device else harness.default_device()
    shape = SHAPES[given.shape]
    some = batches(shape, given.batches, given.seed, given.pairs, given.length)
    if given.sizes:
        numbers = [list(map(int, size.split("x"))) for size in given.sizes]
        some = [batch for n in numbers for batch in batches(shape, 1, given.seed, *n)]
    if given.kept is not None:
        from dnpo.optimise import npo
        from dnpo.policy import logprobs

        for kept in (logprobs.KEPT, npo.KEPT):
            kept.update(dict.fromkeys(kept, given.kept * 10**6))
    try:
        variant = build(given.variant, shape=shape, device=device, dtype=dtype_of(given), lora=given.lora, batches=some)
    except (Skip, torch.OutOfMemoryError) as reason:
        harness.answer(lambda request: {}, {"skip": str(reason).splitlines()[0]})
        return

    warm: list[bool] = []

    def calculate_flops(index: int) -> Facts | None:
        """The formula covers neither adapters nor other objectives."""
        known = given.variant.split("-")[1] in ("dpo", "npo")
        return None if given.lora or not known else formula(given.variant, shape, some[index], device)

    def handle(request: Facts) -> Facts:
        index = request["batch"] % len(some)
        if request["do"] == "run":
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            facts, loss = harness.measure_time(lambda: variant.step(index), device)
            peak = {"peak": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
            return {**facts, **peak, "loss": loss, "tokens": some[index].tokens, "flops": calculate_flops(index)}
        if request["do"] == "flops":
            return {**count_flops(variant, index), "formula": calculate_flops(index)}
        work = variant.forward_backward if request["do"] == "memory" else variant.body
        if not warm:
            work(0)  # the first run also allocates memory that is kept, which is not part of a step
            warm.append(True)
        variant.prepare_gradients()
        return {"bytes": harness.measure_added_memory(lambda: work(index), device)}

    harness.answer(handle, {"variant": given.variant, "device": str(device)})


if __name__ == "__main__":
    main()
