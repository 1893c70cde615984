"""Compute the frozen reference's numbers for the pairs of an iteration once, and keep them.

The reference is the policy at the start of the iteration, so its numbers are the same in every epoch and in every run
with this policy and these pairs. Its log-probabilities are always kept. Noise needs hidden states of rejected tokens
too; these are kept if configured and if the disk has room. Both are computed in batches of similar length and written
in shards, which are reused after a kill.

Shapes as in ``logprobs.py``; B pairs.
"""

import shutil
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnpo import disk, ranks
from dnpo.errors import Declined, DiskError
from dnpo.policy.model import Policy, by_length
from dnpo.policy.packing import pack
from dnpo.records import Pair, ReferenceLogps
from dnpo.store import Report
from dnpo.tables import lengths, read_all, write

SHARD = 1024  # pairs in a shard; a killed run loses at most one shard
SPARE = 2**30  # bytes that must stay free on the disk


@torch.no_grad()
def score(policy: Policy, pairs: Sequence[Pair], *, autocast: bool, folder: Path, report: Report) -> None:
    """Write log p(y⁺|x) and log p(y⁻|x) of every pair under the policy into shards in ``folder``.

    Args:
        policy: the reference.
        pairs: pairs with token ids.
        autocast: whether to use bf16 products, as in the training that uses the numbers.
        folder: folder for the shards; existing ones are reused.
        report: receives the progress.
    """
    shards = _shards(_count_tokens(pairs))
    paths = [folder / f"shard-{number:05d}.parquet" for number in range(len(shards))]
    report.begin(len(pairs), "pairs", sum(len(s) for s, p in zip(shards, paths, strict=True) if p.is_file()))
    ranks.wait()  # before one of them writes a shard
    for shard, path in ranks.share(list(zip(shards, paths, strict=True))):
        if path.is_file():
            continue
        write(path, _score_shard(policy, pairs, shard, autocast, report.advance), ReferenceLogps)
    ranks.wait()


@torch.no_grad()
def score_now(policy: Policy, pairs: Sequence[Pair], *, autocast: bool) -> list[ReferenceLogps]:
    """The numbers that :func:`score` writes, in the order of the pairs, without writing them."""
    shards = _shards(_count_tokens(pairs))
    rows = [row for shard in shards for row in _score_shard(policy, pairs, shard, autocast)]
    return sorted(rows, key=lambda row: row.pair)


def _score_shard(
    policy: Policy,
    pairs: Sequence[Pair],
    shard: Sequence[int],
    autocast: bool,
    advance: Callable[[int], None] = lambda count: None,
) -> list[ReferenceLogps]:
    """Log-probabilities of the pairs with these numbers, computed in batches of similar length."""
    rows: list[ReferenceLogps] = []
    read = [pairs[i] for i in shard]
    for some in by_length(_count_tokens(read)):
        these = [shard[i] for i in some]
        prompts = [read[i].prompt_ids for i in some]
        completions = [read[i].chosen_ids for i in some] + [read[i].rejected_ids for i in some]
        batch = pack(prompts * 2, completions, share_prompt=True).to(policy.device)
        with policy.evaluating(), _products(policy, autocast):
            chosen, rejected = policy.logps(batch).view(2, -1).tolist()
        rows += [ReferenceLogps(i, c, r) for i, c, r in zip(these, chosen, rejected, strict=True)]
        advance(len(these))
    return rows


def read_scores(folder: Path, count: int) -> list[ReferenceLogps]:
    """Read the results of :func:`score`, in the order of the pairs.

    Raises:
        ValueError: the log-probabilities of some pairs are missing.
    """
    rows = sorted(read_all(sorted(folder.glob("shard-*.parquet")), ReferenceLogps), key=lambda row: row.pair)
    if [row.pair for row in rows] != list(range(count)):
        raise ValueError(f"{folder}: expected the log-probabilities of {count} pairs, found {len(rows)}")
    return rows


@torch.no_grad()
def keep_hidden(
    policy: Policy,
    pairs: Sequence[Pair],
    *,
    autocast: bool,
    required: bool,
    folder: Path,
    report: Report,
    both: bool = False,
    setting: str = "npo.cache_hidden",
) -> dict[str, int]:
    """Write the policy's hidden states that predict rejected tokens into memory-mapped shards in ``folder``.

    They are stored in the type of the output head's products (bf16 under autocast), so no precision is lost.

    Args:
        required: whether a lack of room is an error; otherwise the states are recomputed in every step.
        both: whether to keep the states of chosen tokens too; for each pair they precede the states of rejected tokens.
        setting: the name of the setting that requires them.

    Raises:
        DiskError: there is no room and they are required.
        Declined: there is no room and they are not required.
    """
    from safetensors.torch import save_file

    dtype = torch.bfloat16 if autocast else policy.head.weight_VH.dtype
    count = {name: lengths(pairs, f"{name}_ids") for name in ("prompt", "chosen", "rejected")}
    kept = [c * both + r for c, r in zip(count["chosen"], count["rejected"], strict=True)]
    tokens = sum(kept)
    size = tokens * policy.head.weight_VH.shape[1] * dtype.itemsize
    written = sum(f.stat().st_size for f in folder.glob("hidden-*.safetensors"))
    free = min(ranks.gather(lambda: shutil.disk_usage(folder).free))
    need = f"the reference's hidden states of {tokens:,} {'' if both else 'rejected '}tokens take {_human(size)}"
    if size - written > free - SPARE:
        lack = f"{need}, but {folder} has {_human(free)} free, of which {_human(SPARE)} must stay free"
        if required:
            raise DiskError(f"{setting}=on: {lack}; make room, move the store (store=…), or take auto or off")
        raise Declined(f"{lack}: they are computed again in every step instead")
    report.note(f"{need} on disk ({folder})")
    shards = _shards([p + k for p, k in zip(count["prompt"], kept, strict=True)])
    paths = [folder / f"hidden-{number:05d}.safetensors" for number in range(len(shards))]
    report.begin(len(pairs), "pairs", sum(len(s) for s, p in zip(shards, paths, strict=True) if p.is_file()))
    ranks.wait()  # before one of them writes a shard
    for shard, path in ranks.share(list(zip(shards, paths, strict=True))):
        if path.is_file():
            continue
        states: list[Tensor] = []
        order: list[int] = []
        for some in by_length([count["prompt"][i] + kept[i] for i in shard]):
            these = [shard[i] for i in some]
            responses = [
                (pair.prompt_ids, ids)
                for pair in (pairs[i] for i in these)
                for ids in ([pair.chosen_ids, pair.rejected_ids] if both else [pair.rejected_ids])
            ]
            batch = pack([prompt for prompt, _ in responses], [ids for _, ids in responses])
            with policy.evaluating(), _products(policy, autocast):
                states.append(policy.hidden(batch.to(policy.device)).to(dtype).cpu())
            order += these
            report.advance(len(these))
        held = {
            "hidden": torch.cat(states),
            "pair": torch.tensor(order),
            "length": torch.tensor([kept[i] for i in order]),
        }
        if both:
            held["chosen"] = torch.tensor([count["chosen"][i] for i in order])
        aside = disk.name_aside(path)
        save_file(held, aside)
        disk.replace(aside, path)
    ranks.wait()
    return {"tokens": tokens, "bytes": size}


class KeptHidden:
    """The hidden states that :func:`keep_hidden` wrote, read from disk on demand.

    Attributes:
        both: whether they include the states of chosen tokens.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.both = False
        self.where: dict[
            int, tuple[int, int, int, int]
        ] = {}  # by pair: file, first row, first rejected row, one past the last row
        self.files = []
        for number, path in enumerate(sorted(folder.glob("hidden-*.safetensors"))):
            file: Any = safe_open(path, framework="pt")
            lengths: list[int] = file.get_tensor("length").tolist()
            self.both = "chosen" in file.keys()  # noqa: SIM118  # no mapping
            chosen: list[int] = file.get_tensor("chosen").tolist() if self.both else [0] * len(lengths)
            starts = [0, *accumulate(lengths)]
            for i, pair in enumerate(file.get_tensor("pair").tolist()):
                self.where[pair] = (number, starts[i], starts[i] + chosen[i], starts[i + 1])
            self.files.append(file.get_slice("hidden"))

    def __call__(self, pairs: Sequence[int]) -> Tensor:
        """The states of these pairs' rejected tokens, pair after pair, shape N × H."""
        found = [self.where[pair] for pair in pairs]
        return torch.cat([self.files[number][middle:end] for number, _, middle, end in found])

    def of_both(self, pairs: Sequence[int]) -> Tensor:
        """The states of these pairs' chosen tokens, pair after pair, then of their rejected tokens, shape N × H."""
        found = [self.where[pair] for pair in pairs]
        chosen = [self.files[number][start:middle] for number, start, middle, _ in found]
        return torch.cat([*chosen, self(pairs)])


def _count_tokens(pairs: Sequence[Pair]) -> list[int]:
    """The number of tokens of each pair."""
    parts = (lengths(pairs, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return [sum(part) for part in zip(*parts, strict=True)]


def _shards(lengths: Sequence[int]) -> list[list[int]]:
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i : i + SHARD] for i in range(0, len(order), SHARD)]


def _products(policy: Policy, autocast: bool) -> torch.autocast:
    return torch.autocast(policy.device.type, torch.bfloat16, enabled=autocast)


def _human(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
