"""Estimate the disk and memory that a run's remaining stages need, with the formulas of ``machine.py``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dnpo.generate import Live
from dnpo.optimise.npo import NoiseModule
from dnpo.optimise.parts import MatchedOffset, Optimisation, watches
from dnpo.optimise.steps import arrange
from dnpo.policy.model import Policy, device_of
from dnpo.running.gate import machine
from dnpo.running.gate.finding import Finding
from dnpo.running.gate.machine import Counts, ModelShape
from dnpo.stages.plan import Iteration, Plan, Run
from dnpo.stages.rollouts import count_rollouts
from dnpo.stages.verbs import cache_mode, with_matched_noise
from dnpo.store import Stage, Store


def counts(sizes: Mapping[str, int], measured: str, lengths: Sequence[tuple[int, int]], limit: int) -> Counts:
    """Count how much data the run reads and writes.

    Args:
        sizes: number of rows by split.
        measured: the split that policies are measured on.
        lengths: tokens of prompt and human response of some rows, within the limits.
        limit: maximum tokens of a generated response.
    """
    prompts, responses = zip(*lengths, strict=True)
    return Counts(
        train=sizes["train"],
        held=sizes[measured],
        all=sum(sizes.values()),
        prompt=sum(prompts) / len(prompts),
        response=sum(responses) / len(responses),
        longest_prompt=max(prompts),
        longest_response=max(responses),
        limit=limit,
    )


def findings(
    run: Run,
    iterations: Sequence[Iteration],
    store: Store,
    todo: Sequence[Stage],
    counts: Counts,
    policy: Policy,
    folder: Path,
) -> list[Finding]:
    """Check disk and memory.

    Args:
        todo: the stages that will be computed.
        policy: the base model on the meta device.
        folder: the folder of the base model in the prompts stage.
    """
    of = machine.shape(policy, run.model.lora, run.model.quantization)
    device = str(device_of(run.device))  # auto is the GPU if there is one
    files = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    base, tokenizer = sum(files.values()), sum(size for file, size in files.items() if file.suffix != ".safetensors")
    trainings = [t for t in _trainings(run, of, counts) if iterations[t.k + 1].policy in todo]
    kept = sum(tables(stage.name, run, counts) + (base if stage.name == "prompts" else 0) for stage in todo)
    kept += sum(machine.policy_bytes(of, t.number) + tokenizer + (0 if t.declines else t.states) for t in trainings)
    kept += sum(t.made for t in trainings)
    optional = sum(t.states for t in trainings if t.declines)
    # what is made in a training is in small files until it ends
    passing = max((machine.checkpoint_bytes(of, t.how, t.noise_parameters) + t.made for t in trainings), default=0)
    if _exports(run, of, counts) and any(stage.name in ("generate", "evaluate") for stage in todo):
        passing = max(passing, of.weights + tokenizer)
    result = [machine.disk(kept, passing, optional, store.root)]
    for name, what in (("sft", "fine-tuning"), ("trainer", "training")):
        needed = [
            machine.training_bytes(of, t.how, counts, t.noise, t.needs_copy, device, t.number, _parts(run, t.how))
            for t in trainings
            if (t.noise is None) == (name == "sft")
        ]
        if needed:
            setting = f"{name}.micro_batch_size, {name}.checkpointing, model.lora.rank"
            result.append(machine.memory(what, *max(needed, key=sum), device, setting))
    if run.generate.engine is None and any(stage.name in ("generate", "evaluate") for stage in todo):
        need = machine.generating_bytes(of, run.generate, counts, max((t.number for t in trainings), default=0))
        result.append(machine.memory("generating", *need, device, "generate.batch_size", of="weights"))
    return result


def _parts(run: Run, how: Optimisation) -> int:
    """The number of processes that share the weights of a training."""
    return run.ranks if how.parallel == "sharded" else 1


def tables(name: str, run: Run, counts: Counts) -> int:
    """Return the maximum number of bytes of the tables that a stage of this name writes."""
    both, limit = counts.prompt + counts.response, counts.limit
    most = max([plan.rollout.samples for plan in run.plans], default=1) or 1  # responses to a prompt
    samples = counts.held * (1 + run.eval.samples) + run.eval.sequences
    rows_and_tokens: dict[str, tuple[float, float]] = {
        "prompts": (2 * counts.all, both / 2),
        "generate": (most * counts.train, limit),
        "judge": ((1 + most) * counts.train, 0),
        "pairs": (2 * most * counts.train, both + limit),  # once for dnpo, once as text for other trainers
        "curriculum": (2 * most * counts.train, both + limit),
        "reference": (most * counts.train, 0),
        "evaluate": (samples, limit),
    }
    return machine.table_bytes(*rows_and_tokens.get(name, (0, 0)))


def live_bytes(plan: Plan, counts: Counts) -> int:
    """Return the maximum number of bytes of the responses and pairs that are made in a training."""
    how = plan.rollout
    if not isinstance(how, Live):
        return 0
    rollouts = count_rollouts(how, counts.train, plan.trainer.epochs, plan.trainer.steps)
    rows = rollouts * min(how.prompts or counts.train, counts.train) * how.samples
    tokens = counts.prompt + counts.limit
    pairs = machine.table_bytes(2 * rows, tokens + counts.limit) if plan.makes_pairs else 0  # as in `tables`
    return machine.table_bytes(rows, tokens) + pairs


def _exports(run: Run, of: ModelShape, counts: Counts) -> bool:
    """Whether a stage writes whole weights for a server that it starts, as its policy is stored in another form."""
    engines = [run.generate.engine, *(getattr(plan.rollout, "engine", None) for plan in run.plans)]
    launched = any(engine is not None and engine.launch is not None for engine in engines)
    return launched and (of.adapted or not arrange(run.sft, counts.train, 0))


@dataclass(frozen=True)
class _Training:
    """One training of the run.

    Attributes:
        k: number of its iteration; −1 is fine-tuning.
        number: number of trainings behind its policy, including itself.
        how: settings of the training.
        noise: noise module on the meta device; None for fine-tuning.
        reads: whether every step reads hidden states of a reference.
        states: bytes of the hidden states that are kept for it.
        declines: whether it trains without kept states if there is no room.
        made: bytes of the responses and pairs that are made in it.
    """

    k: int
    number: int
    how: Optimisation
    noise: NoiseModule | None
    reads: bool
    states: int
    declines: bool
    made: int = 0

    @property
    def noise_parameters(self) -> int:
        """Number of parameters of the noise."""
        return 0 if self.noise is None else sum(p.numel() for p in self.noise.parameters())

    @property
    def needs_copy(self) -> bool:
        """Whether it needs a frozen copy of the model."""
        return self.reads and not self.states


def _trainings(run: Run, of: ModelShape, counts: Counts) -> list[_Training]:
    trainings = []
    if arrange(run.sft, counts.train, 0):
        trainings.append(_Training(-1, 1, run.sft, None, False, 0, False))
    first = len(trainings) + 1
    plans = [plan for each in run.plans for plan in (with_matched_noise(each), each) if plan is not None]
    for plan in plans:
        states = _states(plan, of, counts)
        part = plan.npo
        with torch.device("meta"):
            noise = (part.at(0.0) if isinstance(part, MatchedOffset) else part).module(of.width, of.vocabulary)
        reads = noise.reads_states or any(w.reads_states for w in watches(plan.objective, 1))
        declines = cache_mode(plan)[0] != "on"
        made = live_bytes(plan, counts)
        trainings.append(_Training(plan.k, first + plan.k, plan.trainer, noise, reads, states, declines, made))
    return trainings


def _states(plan: Plan, of: ModelShape, counts: Counts) -> int:
    """Return the bytes of the hidden states that are kept, by the same rule as ``stages.hidden``."""
    (keep, both), trainer = cache_mode(plan), plan.trainer
    if keep == "off" or (keep == "auto" and trainer.passes(counts.train) <= 1):
        return 0
    return (1 + both) * machine.hidden_bytes(of, counts, trainer.autocast)
