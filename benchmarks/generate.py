"""Speed of generation: rows that come and go in one batch, against what transformers offers.

    python -m benchmarks.generate

One process a measurement, the variants in turn; prints a table and writes ``benchmarks/results/generate.json``. A ratio
is one round's seconds over those of ``refill`` in the same round; its median stands with its quartiles. Seconds are the
process's own on a CPU, which others may share, and the wall's on a GPU; it runs on the GPU if there is one.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results" / "generate.json"


class Load(NamedTuple):
    """Prompts, and a model with random weights whose completions end by chance.

    Attributes:
        prompts: distinct prompts.
        copies: how often each is asked.
        lengths: shortest and longest prompt.
        limit: completion tokens at most.
        mean: completion tokens on average, if nothing were cut: one token in so many ends a completion.
        batch_size: rows at once.
        shape: of the Llama model.
    """

    prompts: int
    copies: int
    lengths: tuple[int, int]
    limit: int
    mean: int
    batch_size: int
    shape: dict[str, int]

    def token_ids(self) -> list[list[int]]:
        """Token ids of every prompt, copies included; none of them ends a completion."""
        draw, vocabulary = Random(0), self.shape["vocab_size"]
        some = [
            [draw.randrange(vocabulary // 2, vocabulary) for _ in range(draw.randint(*self.lengths))]
            for _ in range(self.prompts)
        ]
        return some * self.copies


LOADS = {
    # The default scale's evaluation: 480 held-out prompts of the tiny world, four samples of each.
    "tiny world": Load(
        prompts=480,
        copies=4,
        lengths=(10, 48),
        limit=24,
        mean=10,
        batch_size=128,
        shape={
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "vocab_size": 400,
            "max_position_embeddings": 128,
        },
    ),
    # Responses of very different lengths from a larger vocabulary, one of each prompt.
    "long responses": Load(
        prompts=96,
        copies=1,
        lengths=(16, 96),
        limit=128,
        mean=40,
        batch_size=32,
        shape={
            "hidden_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "intermediate_size": 688,
            "vocab_size": 32000,
            "max_position_embeddings": 512,
        },
    ),
}


def make_policy(load: Load) -> Any:
    """The load's model as a policy; on the GPU if there is one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dnpo.policy.model import Policy, device_of

    class Stopping(Policy):
        @property
        def pad_id(self) -> int:
            return load.shape["vocab_size"] - 1

        @property
        def stop_ids(self) -> list[int]:
            return list(range(0, load.shape["vocab_size"] // 2, max(load.mean // 2, 1)))

    torch.manual_seed(0)
    tokenizer: Any = None  # no text is made
    return Stopping(LlamaForCausalLM(LlamaConfig(**load.shape)).eval().to(device_of("auto")), tokenizer)


class Quiet:
    """A report that is not read."""

    def advance(self, amount: int = 1) -> None:
        """Nothing."""


def refill(policy: Any, load: Load, seed: int) -> list[list[int]]:
    """What this project does."""
    return _ours(policy, load.token_ids(), load, seed)


def no_refill(policy: Any, load: Load, seed: int) -> list[list[int]]:
    """The same, a batch at a time: rows leave, but none joins."""
    return [row for some in _batches(load, in_order=True) for row in _ours(policy, some, load, seed)]


def hf_by_length(policy: Any, load: Load, seed: int) -> list[list[int]]:
    """``generate`` of transformers on batches of similar length."""
    return [row for some in _batches(load, in_order=True) for row in _hf(policy, some, load, seed)]


def hf_as_they_come(policy: Any, load: Load, seed: int) -> list[list[int]]:
    """``generate`` of transformers on batches in the order of the data."""
    return [row for some in _batches(load, in_order=False) for row in _hf(policy, some, load, seed)]


def hf_continuous(policy: Any, load: Load, seed: int) -> list[list[int]]:
    """``generate_batch`` of transformers, with memory for as many rows as the others have."""
    import torch
    from transformers import ContinuousBatchingConfig

    torch.manual_seed(seed)
    page, longest = 32, load.lengths[1] + load.limit
    options = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=load.batch_size * -(-longest // page),
        max_batch_tokens=max(256, 2 * load.batch_size),
    )
    out = policy.causal_lm.generate_batch(
        load.token_ids(), generation_config=_chance(policy, load), continuous_batching_config=options
    )
    return [result.generated_tokens for result in out.values()]


VARIANTS: dict[str, Callable[[Any, Load, int], list[list[int]]]] = {
    f.__name__: f for f in (refill, no_refill, hf_by_length, hf_as_they_come, hf_continuous)
}


def _ours(policy: Any, prompts: list[list[int]], load: Load, seed: int) -> list[list[int]]:
    import torch

    from dnpo.generate import Sampling
    from dnpo.generate.hf import complete
    from dnpo.seeding import derive

    with torch.no_grad():
        streams = [derive(seed, number, *ids) for number, ids in enumerate(prompts)]
        return complete(policy, prompts, Sampling(batch_size=load.batch_size), load.limit, streams, Quiet())


def _hf(policy: Any, prompts: list[list[int]], load: Load, seed: int) -> list[list[int]]:
    import torch

    torch.manual_seed(seed)
    longest = max(map(len, prompts))
    ids = torch.tensor([[policy.pad_id] * (longest - len(p)) + p for p in prompts], device=policy.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=policy.device)
    out = policy.causal_lm.generate(input_ids=ids, attention_mask=mask, generation_config=_chance(policy, load))
    stops = set(policy.stop_ids)
    found = []
    for row in out[:, longest:].tolist():
        end = next((t for t, token in enumerate(row) if token in stops), load.limit)
        found.append(row[: end + 1])
    return found


def _chance(policy: Any, load: Load) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=load.limit,
        pad_token_id=policy.pad_id,
        eos_token_id=policy.stop_ids,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )


def _batches(load: Load, in_order: bool) -> list[list[list[int]]]:
    prompts = load.token_ids()
    if in_order:
        prompts.sort(key=len)
    return [prompts[n : n + load.batch_size] for n in range(0, len(prompts), load.batch_size)]


def measure(variant: str, load: str, seed: int) -> dict[str, Any]:
    """One run in this process, after a small one to warm up."""
    import torch

    policy, size = make_policy(LOADS[load]), LOADS[load]
    run = VARIANTS[variant]
    run(policy, size._replace(prompts=8, copies=1, limit=4), seed)
    gpu = policy.device.type == "cuda"
    if gpu:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    completions = run(policy, size, seed)
    if gpu:
        torch.cuda.synchronize()
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "rows": len(completions),
        "tokens": sum(map(len, completions)),
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
    }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def main() -> None:
    """Measure all variants in turn, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--load", choices=LOADS, action="append", help="all without")
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="all without")
    parser.add_argument("--one", nargs=3, metavar=("VARIANT", "LOAD", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        variant, load, seed = options.one
        print(json.dumps(measure(variant, load, int(seed))))
        return
    variants = list(dict.fromkeys(["refill", *(options.variant or VARIANTS)]))
    figures: dict[str, Any] = {"python": platform.python_version(), "rounds": options.rounds, "loads": {}}
    for load in options.load or LOADS:
        runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
        for seed in range(options.rounds):
            for variant in variants[seed % len(variants) :] + variants[: seed % len(variants)]:
                command = [sys.executable, __file__, "--one", variant, load, str(seed)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode == 0:
                    runs[variant].append(json.loads(done.stdout.splitlines()[-1]))
                else:
                    sys.exit(f"{variant} on {load}:\n{done.stderr}")
        figures["loads"][load] = _summary(load, runs)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\n{RESULTS}")


def _summary(load: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One load's table, printed and returned."""
    device = runs["refill"][0]["device"]
    key = "cpu_s" if device.startswith("CPU") else "wall_s"
    print(f"\n{load}, {device}")
    print(f"{'':16} {'wall s':>8} {'CPU s':>8} {'tokens/s':>9}   {key}, times refill's (quartiles)")
    table = {}
    for variant, some in runs.items():
        ratios = [one[key] / ours[key] for one, ours in zip(some, runs["refill"], strict=True)]
        wall, cpu = (quartiles([one[name] for one in some]) for name in ("wall_s", "cpu_s"))
        rate = quartiles([one["tokens"] / one[key] for one in some])
        ratio = quartiles(ratios)
        spread = f"{ratio[1]:.2f} ({ratio[0]:.2f}-{ratio[2]:.2f})"
        print(f"{variant:16} {wall[1]:8.2f} {cpu[1]:8.2f} {rate[1]:9,.0f}   {spread}")
        table[variant] = {"wall_s": wall, "cpu_s": cpu, "tokens_per_s": rate, "ratio": ratio, "runs": some}
    return table


if __name__ == "__main__":
    main()
