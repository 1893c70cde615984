"""Policy + prompts → responses, in shards.

A shard's samples depend on the policy, its prompts, the seed and the layout of its batches, and on nothing else: not on
the shards before it, nor on whether the run was killed in between. Prompts of a shard are batched by length.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from dnpo.model import Policy
from dnpo.records import Finish, Prompt, Response, read_all, write
from dnpo.seeding import derive
from dnpo.settings import Count, Fraction, Natural, NonNegative
from dnpo.store import Report


class Sampling:
    """How to sample: what ``generate=…`` configures.

    Args:
        temperature: 0 is greedy.
        top_k: sample from the k likeliest tokens; 0 means from all.
        top_p: sample from the smallest set of tokens with this much probability.
        batch_size: prompts at once. The same seed with another batch size gives other samples.
        shard_size: prompts of one shard, which is what a killed run can lose.
    """

    def __init__(
        self,
        *,
        temperature: NonNegative = 1.0,
        top_k: Natural = 0,
        top_p: Fraction = 1.0,
        batch_size: Count = 64,
        shard_size: Count = 512,
    ) -> None:
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.batch_size, self.shard_size = batch_size, shard_size

    def greedy(self) -> "Sampling":
        """The same layout, without chance."""
        return Sampling(temperature=0.0, batch_size=self.batch_size, shard_size=self.shard_size)


def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    source: str,
    limit: int,
    seed: int,
    folder: Path,
    report: Report,
) -> list[Response]:
    """One response to each prompt, in the order of the prompts; shards that are in ``folder`` are not made again.

    Args:
        policy: samples with its own template's prompts, ``Prompt.token_ids``.
        prompts: encoded ones.
        sampling: temperature and layout.
        source: what the rows say they come from.
        limit: completion tokens at most.
        seed: with the number of the shard it decides the shard's samples.
        folder: where the shards are written, as Parquet.
        report: told of every batch.
    """
    shards = [prompts[i : i + sampling.shard_size] for i in range(0, len(prompts), sampling.shard_size)]
    paths = [folder / f"shard-{number:05d}.parquet" for number in range(len(shards))]
    report.begin(len(prompts), "responses", sum(len(s) for s, p in zip(shards, paths, strict=True) if p.is_file()))
    for number, (shard, path) in enumerate(zip(shards, paths, strict=True)):
        if not path.is_file():
            write(path, sample(policy, shard, sampling, source, limit, derive(seed, "shard", number), report), Response)
    return read_all(paths, Response)


@torch.no_grad()
def sample(
    policy: Policy, prompts: Sequence[Prompt], sampling: Sampling, source: str, limit: int, seed: int, report: Report
) -> list[Response]:
    """One response to each prompt, with its log-probability under the policy (at temperature 1, of all tokens)."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
    completions: list[list[int]] = [[] for _ in prompts]
    devices = [policy.device] if policy.device.type == "cuda" else []
    with policy.evaluating(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for start in range(0, len(order), sampling.batch_size):
            some = order[start : start + sampling.batch_size]
            for i, ids in zip(some, _complete(policy, [prompts[i] for i in some], sampling, limit), strict=True):
                completions[i] = ids
            report.advance(len(some))
        logps = policy.score([p.token_ids for p in prompts], completions, sampling.batch_size)
    stops = set(policy.stop_ids)
    rows = []
    for prompt, ids, logp in zip(prompts, completions, logps, strict=True):
        finish: Finish = "eos" if ids and ids[-1] in stops else "length"
        text = str(policy.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        rows.append(Response(prompt.id, source, text, ids, len(ids), finish, logp))
    return rows


def _complete(policy: Policy, prompts: Sequence[Prompt], sampling: Sampling, limit: int) -> list[list[int]]:
    """Completions up to and with their end-of-sequence token, or cut at the limit without one."""
    longest = max(len(p.token_ids) for p in prompts)
    ids = torch.full((len(prompts), longest), policy.pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # on the left, so that all completions begin at the same place
        ids[row, longest - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
        mask[row, longest - len(prompt.token_ids) :] = 1
    chance: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        chance = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
    # A configuration of its own, so that defaults a model brings along do not leak in.
    configure: Any = GenerationConfig  # ships without annotations
    config = configure(
        max_new_tokens=limit, pad_token_id=policy.pad_id, eos_token_id=policy.stop_ids, num_beams=1, **chance
    )
    generator: Any = policy.causal_lm
    out = generator.generate(
        input_ids=ids.to(policy.device), attention_mask=mask.to(policy.device), generation_config=config
    )[:, longest:].tolist()
    stops = set(policy.stop_ids)
    found = []
    for row in out:
        end = next((t for t, token in enumerate(row) if token in stops), None)
        found.append(row if end is None else row[: end + 1])
    return found
