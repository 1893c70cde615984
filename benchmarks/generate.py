"""Speed of generation: rows that join and leave one batch, compared with transformers.

    python -m benchmarks.generate
    python -m benchmarks.generate --load "tiny world, K = 1" --load "tiny world, K = 8"
    python -m benchmarks.generate --load "8 samples, long prompts" --load "8 samples, short prompts"

K is the number of samples of each prompt. The loads of the last command are whole stages, with log-probabilities and
files: one run of 8 samples a prompt, against 8 runs of one sample.

transformers uses its own scaled dot-product attention: ``generate`` (``hf_…``) samples a batch at a time; continuous
batching (``hf_continuous``) has a paged cache for one batch, where the samples of a prompt share pages.

Each measurement runs in its own process, the variants in turn. The command prints a table and writes
``benchmarks/results/generate.json``. A ratio divides one round's seconds by the seconds of the load's first variant in
the same round; the table has its median with quartiles. It runs on the GPU if there is one. Seconds are CPU seconds of
the process on a CPU, which others may share, and wall clock on a GPU.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from benchmarks.quiet import Quiet

RESULTS = Path(__file__).parent / "results" / "generate.json"


class Load(NamedTuple):
    """Prompts, and a model with random weights whose completions end at random.

    Attributes:
        prompts: distinct prompts.
        copies: number of samples of each prompt, K.
        lengths: shortest and longest prompt.
        limit: completion tokens at most.
        mean: mean number of completion tokens n without a limit: each token ends its completion with probability 1/n;
            0: none does.
        batch_size: rows at once.
        shape: of the Llama model.
        samples: of each prompt, in a whole stage; 0: only completions are measured.
    """

    prompts: int
    copies: int
    lengths: tuple[int, int]
    limit: int
    mean: int
    batch_size: int
    shape: dict[str, int]
    samples: int = 0

    def token_ids(self) -> list[list[int]]:
        """Token ids of every prompt, copies included; none of them ends a completion."""
        return self.distinct() * self.copies

    def distinct(self) -> list[list[int]]:
        """Token ids of every prompt, each once."""
        draw, vocabulary = Random(0), self.shape["vocab_size"]
        return [
            [draw.randrange(vocabulary // 2, vocabulary) for _ in range(draw.randint(*self.lengths))]
            for _ in range(self.prompts)
        ]


TINY = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "vocab_size": 400,
    "max_position_embeddings": 128,
}
LARGER = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "intermediate_size": 688,
    "vocab_size": 32000,
    "max_position_embeddings": 512,
}
STORIES = {
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 172,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
LOADS = {
    # Prompts of the tiny world, for a model of the default scale.
    "tiny world, K = 1": Load(960, 1, (10, 48), 24, 10, 128, TINY),
    "tiny world, K = 8": Load(120, 8, (10, 48), 24, 10, 128, TINY),
    # Responses of very different lengths from a larger vocabulary.
    "long responses, K = 1": Load(96, 1, (16, 96), 128, 40, 32, LARGER),
    "long responses, K = 8": Load(12, 8, (16, 96), 128, 40, 32, LARGER),
    # Questions of GSM8K for a tokenizer of 512 entries have 50-286 tokens, 139 on average.
    "8 samples, long prompts": Load(256, 1, (50, 230), 64, 0, 128, STORIES, samples=8),
    # Short instructions (rasbt's, Dolly's questions) have 8-123 tokens there, 33 on average.
    # Reading the prompt and scoring it, which all samples share, take 11 % and 10 % of the CPU seconds of eight runs of
    # one sample (with long prompts 38 % and 19 %). The rest is decoding, so the ratio is at least 0.82.
    "8 samples, short prompts": Load(256, 1, (16, 50), 64, 0, 128, STORIES, samples=8),
}


class NoText:
    """A tokenizer that decodes nothing."""

    eos_token_id = 0

    def decode(self, *_: Any, **__: Any) -> str:
        """No text."""
        return ""


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
            return list(range(0, load.shape["vocab_size"] // 2, max(load.mean // 2, 1))) if load.mean else []

    torch.manual_seed(0)
    tokenizer: Any = NoText()
    return Stopping(LlamaForCausalLM(LlamaConfig(**load.shape)).eval().to(device_of("auto")), tokenizer)


def refill(policy: Any, load: Load, seed: int) -> list[list[int]]:
    """The method of this project."""
    return _ours(policy, load.token_ids(), load, seed)


def no_refill(policy: Any, load: Load, seed: int) -> list[list[int]]:
    """The same, one batch after the other: rows leave, but none joins."""
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
    policy.causal_lm.set_attn_implementation("sdpa")
    out = policy.causal_lm.generate_batch(
        load.distinct(),
        generation_config=_chance(policy, load, num_return_sequences=load.copies),
        continuous_batching_config=options,
    )
    return [result.generated_tokens for result in out.values()]


def single_runs(policy: Any, load: Load, seed: int) -> list[list[int]]:
    """A stage with one sample of each prompt, as often as there are samples."""
    return [row for number in range(load.samples) for row in _stage(policy, load, 1, seed + number)]


def several_samples(policy: Any, load: Load, seed: int) -> list[list[int]]:
    """One stage with all samples of each prompt."""
    return _stage(policy, load, load.samples, seed)


Variant = Callable[[Any, Load, int], list[list[int]]]
VARIANTS: dict[str, Variant] = {
    f.__name__: f for f in (refill, no_refill, hf_by_length, hf_as_they_come, hf_continuous)
}
STAGES: dict[str, Variant] = {f.__name__: f for f in (single_runs, several_samples)}


def variants_of(load: Load) -> dict[str, Variant]:
    """The variants that are compared on a load; ratios are relative to the first."""
    return STAGES if load.samples else VARIANTS


def _stage(policy: Any, load: Load, samples: int, seed: int) -> list[list[int]]:
    from dnpo.generate import Ahead
    from dnpo.generate.hf import generate
    from dnpo.records import Prompt

    prompts = [Prompt(str(number), [], "", token_ids=ids) for number, ids in enumerate(load.token_ids())]
    rollout = Ahead(samples=samples, batch_size=load.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        rows = generate(
            policy,
            prompts,
            rollout,
            source="policy@0",
            limit=load.limit,
            seed=seed,
            folder=Path(folder),
            report=Quiet(),
        )
        return [row.token_ids for row in rows]  # they are read from the folder


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
    policy.causal_lm.set_attn_implementation("sdpa")
    out = policy.causal_lm.generate(input_ids=ids, attention_mask=mask, generation_config=_chance(policy, load))
    stops = set(policy.stop_ids)
    found = []
    for row in out[:, longest:].tolist():
        end = next((t for t, token in enumerate(row) if token in stops), load.limit)
        found.append(row[: end + 1])
    return found


def _chance(policy: Any, load: Load, **more: Any) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=load.limit,
        pad_token_id=policy.pad_id,
        eos_token_id=policy.stop_ids,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        **more,
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
    run = variants_of(size)[variant]
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
    parser.add_argument("--load", choices=LOADS, action="append", help="default: all")
    parser.add_argument("--variant", choices=VARIANTS | STAGES, action="append", help="default: all")
    parser.add_argument("--one", nargs=3, metavar=("VARIANT", "LOAD", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        variant, load, seed = options.one
        print(json.dumps(measure(variant, load, int(seed))))
        return
    figures: dict[str, Any] = {"python": platform.python_version(), "rounds": options.rounds, "loads": {}}
    for load in options.load or LOADS:
        first, *others = variants_of(LOADS[load])
        variants = [first, *(name for name in others if name in (options.variant or others))]
        runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
        for seed in range(options.rounds):
            for variant in variants[seed % len(variants) :] + variants[: seed % len(variants)]:
                command = [sys.executable, "-m", "benchmarks.generate", "--one", variant, load, str(seed)]
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
    first = next(iter(runs))
    device = runs[first][0]["device"]
    key = "cpu_s" if device.startswith("CPU") else "wall_s"
    print(f"\n{load}, {device}")
    print(f"{'':16} {'wall s':>8} {'CPU s':>8} {'tokens/s':>9}   {key}, times {first}'s (quartiles)")
    table = {}
    for variant, some in runs.items():
        ratios = [one[key] / ours[key] for one, ours in zip(some, runs[first], strict=True)]
        wall, cpu = (quartiles([one[name] for one in some]) for name in ("wall_s", "cpu_s"))
        rate = quartiles([one["tokens"] / one[key] for one in some])
        ratio = quartiles(ratios)
        spread = f"{ratio[1]:.2f} ({ratio[0]:.2f}-{ratio[2]:.2f})"
        print(f"{variant:16} {wall[1]:8.2f} {cpu[1]:8.2f} {rate[1]:9,.0f}   {spread}")
        table[variant] = {"wall_s": wall, "cpu_s": cpu, "tokens_per_s": rate, "ratio": ratio, "runs": some}
    return table


if __name__ == "__main__":
    main()
