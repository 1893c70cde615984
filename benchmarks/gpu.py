"""Measure on one GPU in parts of at most 7 minutes, 25 in all; without a GPU, rehearse them at a tiny size.

    benchmarks/gpu.sh correctness   # the kernels against their definitions in float64; first, since the rest needs them
    benchmarks/gpu.sh lora          # a training step of a 7B model with random weights: dnpo and TRL, DPO and NPO
    benchmarks/gpu.sh full          # the same with all weights trained
    benchmarks/gpu.sh qlora         # the same with adapters on quantised weights
    benchmarks/gpu.sh generation    # tokens/s of sampling, dnpo and transformers
    benchmarks/gpu.sh all

Each part writes ``benchmarks/results/gpu-PART.json`` (``--out`` changes the folder) after every figure, so that a part
that runs out of time keeps its figures. Every model is measured in a separate process, which is ended when the part's
time is over. If something is missing or does not fit, ``skipped`` names it, and the part continues.

It needs torch, transformers, peft, accelerate, Lightning and safetensors, and none of dnpo's other dependencies. TRL
(with datasets) and bitsandbytes are used where they are installed. For a machine without network, bring missing
packages as wheels. With network, run ``pip download --no-deps -d wheels peft==0.21.2 trl==1.16.0 bitsandbytes==0.50.2
…`` (with ``--python-version`` of the other machine); on the other machine, ``pip install --no-index --no-deps --target
site wheels/*`` and ``PYTHONPATH=site benchmarks/gpu.sh PART``.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Facts
from benchmarks.problem import SHAPES, Pairs, Shape, batches, model
from benchmarks.variant import Skip

SECONDS = {"correctness": 240, "lora": 420, "full": 300, "qlora": 240, "generation": 300}  # 25 minutes
ROUNDS = 6
RANK = 16
STEPS = {
    "lora": ("ours-dpo-cached", "trl-dpo-cached", "ours-npo-cached", "ours-dpo-online", "trl-dpo-online"),
    "full": ("ours-dpo-cached", "trl-dpo-cached", "ours-npo-cached"),
    "qlora": ("nf4:ours-dpo-cached", "nf4:trl-dpo-cached", "nf4:ours-npo-cached", "int8:ours-dpo-cached"),
}
SAMPLERS = ("ours", "generate", "continuous")  # dnpo, transformers' generate, and its continuous batching


class Part:
    """A part's results, written after every change.

    Args:
        name: the part.
        folder: the folder of its file.
        tiny: whether this is a rehearsal at a tiny size.
    """

    def __init__(self, name: str, folder: Path, tiny: bool) -> None:
        self.tiny, self.path = tiny, folder / f"gpu-{name}.json"
        self.end = time.monotonic() + SECONDS[name]
        size = "tiny, a rehearsal" if tiny else "7B"
        self.content: Facts = {"part": name, "size": size, "done": False, "results": [], "skipped": {}}
        self.save()

    def save(self) -> None:
        """Write the file; if that fails, the earlier one is kept."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".partial")
        aside.write_text(json.dumps({**self.content, "machine": harness.machine()}, indent=2) + "\n")
        aside.replace(self.path)

    def measure(self, name: str, *arguments: str) -> list[Facts]:
        """Run a measurement in a separate process, and save each result as soon as it arrives.

        Returns:
            Its results so far, if the part's time is over or the process ended early.
        """
        left, found = self.end - time.monotonic(), []
        if left <= 0:
            self.skip(name, "no time left")
            return []
        tiny = ["--tiny"] if self.tiny else []
        command = [sys.executable, *harness.modules("benchmarks.gpu"), "--one", *arguments, *tiny]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
            timer = threading.Timer(left, process.kill)
            timer.start()
            assert process.stdout is not None
            for line in process.stdout:
                facts = json.loads(line)
                if "skip" in facts:
                    self.skip(facts.pop("name", name), facts["skip"])
                else:
                    found.append({"name": name, **facts})
                    self.content["results"].append(found[-1])
                    self.save()
            status = process.wait()
            timer.cancel()
            if status:
                log.seek(0)
                over = time.monotonic() >= self.end
                self.skip(name, "no time left" if over else f"ended with {status}: {log.read()[-2000:]}")
        return found

    def skip(self, name: str, reason: str) -> None:
        """Record and print why something was not measured."""
        self.content["skipped"][name] = reason
        print(f"{name}: left out: {reason.strip().splitlines()[-1]}")
        self.save()

    def summarise(self, facts: Facts) -> None:
        """Add a line of the part's table."""
        self.content.setdefault("summary", []).append(facts)
        print("  ".join(f"{name} {value}" for name, value in facts.items()))
        self.save()


def main() -> None:
    """Measure one part, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=(*SECONDS, "all"))
    parser.add_argument("--tiny", action="store_true", help="rehearse at a tiny size; always so without a GPU")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the JSON files")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    tiny = given.tiny or not torch.cuda.is_available()
    if given.one:
        harness.claim_output()
        what, *arguments = given.one
        try:
            for facts in ONE[what](tiny, *arguments):
                harness.say(facts)
        except (Skip, ImportError, torch.OutOfMemoryError) as reason:
            harness.say({"skip": f"{type(reason).__name__}: {str(reason).splitlines()[0]}"})
        return
    if given.part is None:
        parser.error(f"give a part: {', '.join(SECONDS)} or all")
    if tiny and not given.tiny:
        print("no GPU here: a rehearsal at a tiny size on the CPU, whose figures say nothing about a GPU")
    failed = [name for name in (SECONDS if given.part == "all" else [given.part]) if not run(name, given.out, tiny)]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def run(name: str, folder: Path, tiny: bool) -> bool:
    """Measure a part; whether all its checks passed."""
    part = Part(name, folder, tiny)
    print(f"\n{name} ({part.content['size']}), at most {SECONDS[name]} s")
    if name == "correctness":
        checks = part.measure("correctness", "correctness")
        for check in checks:
            within = "ok" if check["ok"] else "FAILED"
            print(f"{check['check']:56} {check['value']:.3g} of {check['limit']:.3g}  {within}")
            if "error" in check:
                print(check["error"])
        good = bool(checks) and all(check["ok"] for check in checks) and "correctness" not in part.content["skipped"]
    elif name == "generation":
        good = _generation(part)
    else:
        good = _steps(part, name)
    part.content |= {"done": True, "good": good}
    part.save()
    print(f"written to {part.path}")
    return good


def _steps(part: Part, name: str) -> bool:
    measured = part.measure("matmul", "matmul")
    rate = measured[0]["flops_per_second"] if measured else None
    for variant in STEPS[name]:
        runs = part.measure(variant, "step", name, variant)[1:]  # the first only warms up
        if runs:
            seconds = statistics.median(run["seconds"] for run in runs)
            flops = statistics.median(run["flops"] / run["seconds"] for run in runs)
            speed = statistics.median(run["tokens"] / run["seconds"] for run in runs)
            facts = {"variant": variant, "seconds": round(seconds, 4), "tokens_per_second": round(speed)}
            facts |= {"share_of_matmul": round(flops / rate, 3)} if rate else {}
            part.summarise({**facts, "peak_gb": round(max(run["peak"] for run in runs) / 1e9, 2), "rounds": len(runs)})
    return any("ours" in each["variant"] for each in part.content.get("summary", []))


def _generation(part: Part) -> bool:
    for samples in (1, 8):
        for sampler in SAMPLERS:
            name = f"{sampler}, {samples} a prompt"
            runs = part.measure(name, "generation", sampler, str(samples))
            if runs:
                speed = statistics.median(run["tokens"] / run["seconds"] for run in runs)
                part.summarise({"variant": name, "tokens_per_second": round(speed), "rounds": len(runs)})
    return any("ours" in each["variant"] for each in part.content.get("summary", []))


# --- speed, each in its own process


def _size(tiny: bool) -> tuple[Shape, torch.device, torch.dtype]:
    device = harness.default_device()
    return SHAPES["tiny" if tiny else "7b"], device, torch.float32 if device.type == "cpu" else torch.bfloat16


def measure_matmul(tiny: bool) -> Iterator[Facts]:
    """The rate of large square products, to which other rates are relative."""
    _, device, dtype = _size(tiny)
    rate = harness.matmul_rate(device, dtype, *((256, 4) if tiny else ()))
    yield {"flops_per_second": rate, "dtype": str(dtype), "device": str(device)}


def measure_step(tiny: bool, part: str, variant: str) -> Iterator[Facts]:
    """Steps of one variant, each on another batch, after a step that is not measured."""
    from benchmarks.worker import build

    shape, device, dtype = _size(tiny)
    quantization, _, name = variant.rpartition(":")
    some = batches(shape, ROUNDS)
    lora = 0 if part == "full" else min(RANK, shape.hidden // 4)
    stepping = build(
        name, shape=shape, device=device, dtype=dtype, lora=lora, quantization=quantization or None, batches=some
    )
    for index in (0, *range(ROUNDS)):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        facts, loss = harness.measure_time(lambda index=index: stepping.step(index), device)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        flops = count_needed(shape, some[index], "npo" in name, lora > 0)
        yield {**facts, "loss": loss, "tokens": some[index].tokens, "flops": flops, "peak": peak}


def count_needed(shape: Shape, pairs: Pairs, noisy: bool, adapted: bool) -> int:
    """The FLOP of the matrix products that a step needs, in blocks, head and noise.

    A prompt counts once for both responses. Frozen weights need no gradient, so they take two products for each entry
    and token; trained weights take three. Attention, adapters and the reference are not counted, so the share of the
    measured rate is a lower bound.
    """
    products = 2 if adapted else 3
    head = shape.hidden * shape.vocabulary
    noise = 3 * head * pairs.rejected_tokens if noisy else 0
    return 2 * (products * (shape.body_weights * pairs.shared_tokens + head * pairs.completion_tokens) + noise)


def measure_generation(tiny: bool, sampler: str, copies: str) -> Iterator[Facts]:
    """Rounds of sampling from random weights, so that completions end at random."""
    from benchmarks.generate import NoText
    from dnpo.policy.model import Policy

    shape, device, dtype = _size(tiny)
    samples, stop_every = int(copies), 100
    rows, limit, shortest, longest = (16, 6, 4, 8) if tiny else (128, 256, 64, 512)

    class Stopping(Policy):
        @property
        def pad_id(self) -> int:
            return shape.vocabulary - 1

        @property
        def stop_ids(self) -> list[int]:
            return list(range(0, shape.vocabulary // 2, stop_every))

    tokenizer: Any = NoText()
    policy = Stopping(model(shape, device, dtype).eval(), tokenizer)
    draw = Random(0)
    prompts = [
        [draw.randrange(shape.vocabulary // 2, shape.vocabulary) for _ in range(draw.randint(shortest, longest))]
        for _ in range(rows // samples)
    ]
    work = {"ours": _sample_ours, "generate": _sample_generate, "continuous": _sample_continuous}[sampler]
    work(policy, prompts[:2], samples, 4, 0)
    for seed in range(1 if tiny else 2):
        facts, completions = harness.measure_time(lambda seed=seed: work(policy, prompts, samples, limit, seed), device)
        yield {**facts, "tokens": sum(map(len, completions)), "rows": len(completions)}


BATCH = 64  # rows at once, for all samplers


def _sample_ours(policy: Any, prompts: list[list[int]], samples: int, limit: int, seed: int) -> list[list[int]]:
    from dnpo.generate import Sampling
    from dnpo.generate.hf import complete

    rows = [ids for ids in prompts for _ in range(samples)]
    streams = [1000 * seed + number for number in range(len(rows))]
    return complete(policy, rows, Sampling(batch_size=BATCH), limit, streams, None)


def _sample_generate(policy: Any, prompts: list[list[int]], samples: int, limit: int, seed: int) -> list[list[int]]:
    policy.causal_lm.set_attn_implementation(policy.own_attention)
    torch.manual_seed(seed)
    stops, ordered, found = set(policy.stop_ids), sorted(prompts, key=len), []
    for first in range(0, len(ordered), BATCH // samples):
        some = ordered[first : first + BATCH // samples]
        width = max(map(len, some))
        ids = torch.tensor([[policy.pad_id] * (width - len(p)) + p for p in some], device=policy.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some], device=policy.device)
        how = _chance(policy, limit, num_return_sequences=samples)
        out = policy.causal_lm.generate(input_ids=ids, attention_mask=mask, generation_config=how)
        for row in out[:, width:].tolist():
            end = next((t for t, token in enumerate(row) if token in stops), limit)
            found.append(row[: end + 1])
    return found


def _sample_continuous(policy: Any, prompts: list[list[int]], samples: int, limit: int, seed: int) -> list[list[int]]:
    from transformers import ContinuousBatchingConfig

    policy.causal_lm.set_attn_implementation(policy.own_attention)
    torch.manual_seed(seed)
    page, longest = 32, max(map(len, prompts)) + limit
    options = ContinuousBatchingConfig(
        page_size=page, num_blocks=BATCH * -(-longest // page), max_batch_tokens=max(256, 2 * BATCH)
    )
    rows = [ids for ids in prompts for _ in range(samples)]
    out = policy.causal_lm.generate_batch(
        rows, generation_config=_chance(policy, limit), continuous_batching_config=options
    )
    return [result.generated_tokens for result in out.values()]


def _chance(policy: Any, limit: int, **more: Any) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=limit,
        pad_token_id=policy.pad_id,
        eos_token_id=policy.stop_ids,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        **more,
    )


def check_all(tiny: bool) -> Iterator[Facts]:
    """The checks of ``gpu_checks.py``, one after another."""
    from benchmarks.gpu_checks import CHECKS

    for check in CHECKS:
        try:
            yield from check(tiny)
        except Skip as reason:
            yield {"name": check.__name__, "skip": str(reason)}
        except Exception:  # a kernel that does not run here must not hide the results of others
            yield {"check": check.__name__, "value": 1, "limit": 0, "ok": False, "error": traceback.format_exc()}


ONE: dict[str, Callable[..., Iterator[Facts]]] = {
    "matmul": measure_matmul,
    "step": measure_step,
    "generation": measure_generation,
    "correctness": check_all,
}


if __name__ == "__main__":
    main()
