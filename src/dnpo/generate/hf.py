"""Generate responses to prompts, in shards.

A sample depends only on the policy, its prompt, its number and the seed. It does not depend on other prompts, their
order, the number of samples of a prompt, a kill in between or (up to the rounding of logits) the batch size. Each row
draws from its own random stream, so rows can join and leave the batch freely. Prompts wait in a queue, the longest
first; rows that finish leave the batch, and the next prompts take their places. A prompt is read once for all of its
rows, even if they join at different times.

Shapes: N prompts, R rows in progress, P distinct prompts that are read at once, M rows that move, L columns of the
cache, V vocabulary in G groups of C entries, D size of a head.
"""

import inspect
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from dnpo import ranks
from dnpo.errors import ModelError, SettingsError
from dnpo.generate import Ahead, Sampling
from dnpo.policy.model import Policy
from dnpo.records import Finish, Prompt, Response
from dnpo.seeding import derive
from dnpo.store import Report
from dnpo.tables import Rows, values, write

FREE = 0.25  # share of a batch that must be free before more prompts are read, since each read has a fixed cost
GROUP = 64  # vocabulary entries in a group of _pick


class Engine(Protocol):
    """Samples the responses of one policy in another process."""

    def complete(
        self, rows: Sequence[tuple[Prompt, int]], sampling: Sampling, limit: int, seed: int, report: Report
    ) -> list[list[int]]:
        """Complete each prompt, up to and including a stop token or cut at the limit.

        Args:
            rows: prompts, each with the number of its sample; all samples of a prompt are consecutive rows.
            sampling: temperature and truncation.
            limit: maximum number of completion tokens.
            seed: seed of the samples, together with the prompts' ids.
            report: receives the progress.
        """

    def compare(self, responses: Sequence[Response], scores: Sequence[Sequence[float]]) -> None:
        """Compare its log-probabilities of the last responses with those of the policy in this process.

        Args:
            responses: the responses that were made of the completions; a last token may have been replaced.
            scores: the policy's log-probability of each token.
        """


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
    engine: Engine | None = None,
) -> Rows[Response]:
    """Generate responses to each prompt; shards in ``folder`` are reused.

    Responses have the order of the prompts; samples of the same prompt follow each other, in the order of their
    numbers.

    Args:
        policy: the policy that responds.
        prompts: prompts with ``token_ids``.
        sampling: how to sample; plain settings give one sample a prompt.
        source: ``source`` of the responses.
        limit: maximum number of completion tokens.
        seed: seed of the samples, together with the prompts' ids.
        folder: folder for the shards, in Parquet.
        report: receives the progress.
        engine: samples; None samples in this process.
    """
    rollout = Ahead.like(sampling)
    shards = [prompts[first : first + rollout.shard_size] for first in range(0, len(prompts), rollout.shard_size)]
    paths = [folder / f"shard-{number:05d}.parquet" for number in range(len(shards))]
    done = sum(len(shard) for shard, path in zip(shards, paths, strict=True) if path.is_file())
    report.begin(len(prompts) * rollout.samples, "responses", done * rollout.samples)
    ranks.wait()  # before one of them writes a shard
    earlier: Counter[str] = Counter()
    own = ranks.share(paths)
    for shard, path in zip(shards, paths, strict=True):
        if path.is_file() or path not in own:
            earlier.update(id for id in values(shard, "id") for _ in range(rollout.samples))
        else:
            rows = number_samples([prompt for prompt in shard for _ in range(rollout.samples)], earlier)
            responses = _answer(policy, rows, rollout, source, limit, seed, report, engine)
            write(path, responses, Response)
    ranks.wait()
    found = Rows.open(paths, Response)
    ended = sum(finish == "length" for finish in found.column("finish"))
    if rollout.append_eos and ended:
        report.note(
            f"append_eos=true: {ended:,} of {len(found):,} responses were cut and end with an end-of-sequence token "
            "that the policy did not generate"
        )
    return found


def sample(
    policy: Policy,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    source: str,
    limit: int,
    seed: int,
    report: Report,
    engine: Engine | None = None,
) -> list[Response]:
    """Generate a response to each prompt, with its log-probability under the policy (temperature 1, no truncation).

    A prompt that occurs n times gets n different samples. A rollout's ``samples`` is not read here.
    """
    rollout = replace(Ahead.like(sampling), samples=1)
    rows = ranks.share(number_samples(prompts))
    return ranks.join_shares(_answer(policy, rows, rollout, source, limit, seed, report, engine))


def number_samples(prompts: Sequence[Prompt], earlier: Counter[str] | None = None) -> list[tuple[Prompt, int]]:
    """Give each prompt the number of its sample, which distinguishes the samples of one prompt.

    Args:
        earlier: number of earlier samples of each prompt, by id; the new ones are added.
    """
    earlier = Counter() if earlier is None else earlier
    rows = []
    for prompt in prompts:
        rows.append((prompt, earlier[prompt.id]))
        earlier[prompt.id] += 1
    return rows


def _answer(
    policy: Policy,
    rows: Sequence[tuple[Prompt, int]],
    rollout: Ahead,
    source: str,
    limit: int,
    seed: int,
    report: Report,
    engine: Engine | None,
) -> list[Response]:
    """Sample, score and decode a response for each row.

    Args:
        rows: prompts, each with the number of its sample; all samples of a prompt are consecutive rows.
    """
    cut_at = min(rollout.max_tokens or limit, limit)
    if engine is None:
        ids = [prompt.token_ids for prompt, _ in rows]
        streams = [derive(seed, "sample", prompt.id, number) for prompt, number in rows]
        with policy.evaluating(), memory_for(rollout):
            completions = complete(policy, ids, rollout, cut_at, streams, report)
    else:
        completions = engine.complete(rows, rollout, cut_at, seed, report)
    stops = policy.stop_ids
    whole = [bool(completion) and completion[-1] in stops for completion in completions]
    if rollout.append_eos:
        completions = [
            completion if ends else [*completion[: limit - 1], stops[0]]
            for completion, ends in zip(completions, whole, strict=True)
        ]
    return record(policy, rows, completions, whole, source, rollout.samples, engine)


def record(
    policy: Policy,
    rows: Sequence[tuple[Prompt, int]],
    completions: Sequence[list[int]],
    whole: Sequence[bool],
    source: str,
    samples: int = 1,
    engine: Engine | None = None,
) -> list[Response]:
    """Turn completions into responses, with log-probabilities and texts.

    Args:
        rows: the prompt of each completion, with the number of its sample.
        whole: whether each completion ended, and was not cut.
        samples: number of consecutive rows with the same prompt.
        engine: the engine that sampled them; None for this process.
    """
    prompts = [prompt.token_ids for prompt, _ in rows]
    by_token: list[list[float]] = []
    with policy.evaluating():
        if engine is None:
            logps = policy.score(prompts, completions, samples=samples)
        else:
            logps, by_token = policy.score_tokens(prompts, completions, samples=samples)
    responses = []
    for (prompt, number), completion, ends, logp in zip(rows, completions, whole, logps, strict=True):
        finish: Finish = "eos" if ends else "length"
        text = str(policy.tokenizer.decode(completion, skip_special_tokens=True)).strip()
        responses.append(Response(prompt.id, source, text, completion, len(completion), finish, logp, number))
    if engine is not None:
        engine.compare(responses, by_token)
    return responses


@torch.no_grad()
def complete(
    policy: Policy,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    limit: int | Sequence[int],
    streams: Sequence[int],
    report: Report | None,
    endless: Collection[int] = (),
    begun: Sequence[list[int]] | None = None,
) -> list[list[int]]:
    """Complete prompts, up to and including a stop token or cut at the limit, in the order of the prompts.

    Args:
        policy: a policy in evaluation mode.
        prompts: token ids; none may be empty.
        sampling: temperature, truncation and batch size.
        limit: maximum number of completion tokens, one number for all rows or one for each; at least 1.
        streams: an integer for each row, the seed of its draws.
        report: receives the progress, if there is one.
        endless: numbers of the rows in which no stop token is drawn; they end at the limit.
        begun: the first tokens of each completion, if some are drawn already; none may be complete.
    """
    completions = [list(tokens) for tokens in begun or [[]] * len(prompts)]
    prompts = [ids + tokens for ids, tokens in zip(prompts, completions, strict=True)] if begun else prompts
    limits = [limit] * len(prompts) if isinstance(limit, int) else limit
    warp = make_warp(sampling)
    queue, stop_ids = _queue(prompts, sampling.batch_size), policy.stop_ids
    stops = set(stop_ids)
    live: list[int] = []  # numbers of the prompts in the batch
    batch = _Batch(policy, min(sampling.batch_size, len(prompts)))
    while queue or live:
        if queue and batch.has_room(len(queue[-1])):
            more: list[int] = []
            while queue and len(live) + len(more) + len(queue[-1]) <= sampling.batch_size:
                more += queue.pop()
            batch.admit([prompts[i] for i in more], prompts[queue[-1][0]] if queue else None)
            live += more
        if endless and (held := [[r] for r, i in enumerate(live) if i in endless]):
            batch.logits_RV[held, stop_ids] = -torch.inf
        places = [(streams[i], len(completions[i])) for i in live]
        tokens = draw(batch.logits_RV, places, warp)  # the only place that waits for the device
        for i, token in zip(live, tokens, strict=True):
            completions[i].append(token)
        on = [r for r, i in enumerate(live) if tokens[r] not in stops and len(completions[i]) < limits[i]]
        if len(on) < len(live):
            if report is not None:
                report.advance(len(live) - len(on))
            on = batch.keep(on)
            live = [live[r] for r in on]
        if live:
            batch.read([tokens[r] for r in on])
    return completions


class _Batch:
    """Rows in progress, padded on the left so that all end in the cache's last column.

    Attributes:
        lengths: number of tokens of each row in the cache, R numbers.
        logits_RV: logits of each row's next token.
    """

    def __init__(self, policy: Policy, size: int) -> None:
        self._model, self._device, self._pad_id, self._size = policy.causal_lm, policy.device, policy.pad_id, size
        self._accepted = inspect.signature(self._model.forward).parameters
        if "past_key_values" not in self._accepted:
            raise ModelError(f"model: {type(self._model).__name__} takes no past_key_values; it is not supported")
        # Rows can join if all layers keep keys and values by column. Other caches, such as the state of linear
        # attention, have no columns: there a batch runs to its end before the next begins.
        layers = DynamicCache(config=self._model.config).layers
        self._joinable = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        self.lengths: list[int] = []
        self.logits_RV = torch.empty(0, device=self._device)
        self._cache: Any = None
        self._kept: _Prompts | None = None  # a prompt for which more rows will join

    def has_room(self, rows: int) -> bool:
        """Whether this many rows should join now: they fit, and enough of the batch is free for a read to pay off."""
        free = self._size - len(self.lengths)
        return not self.lengths or (self._joinable and free >= max(rows, self._size * FREE))

    def admit(self, prompts: Sequence[list[int]], following: list[int] | None = None) -> None:
        """Read prompts and append them to the rows; equal prompts are read once.

        Args:
            prompts: none may be longer than the longest row or than an earlier prompt.
            following: the first prompt of the next call; it is not read again if it is the last one here.
        """
        rest = list(prompts)
        if self._kept is not None:
            again = [ids for ids in prompts if tuple(ids) in self._kept.row]
            self._join(self._kept, again)
            rest = rest[len(again) :]
        if rest:
            self._kept = None
            distinct = list(dict.fromkeys(map(tuple, rest)))
            found = self._read_prompts(distinct)
            self._join(found, rest)
            if self._joinable and following == rest[-1]:
                self._kept = found.only(distinct[-1])
        if following != prompts[-1]:
            self._kept = None

    def _read_prompts(self, prompts: Sequence[tuple[int, ...]]) -> "_Prompts":
        lengths = [len(ids) for ids in prompts]
        width = max(lengths)
        # A cache without a configuration also keeps tokens outside of a sliding window; the mask hides them.
        cache: Any = DynamicCache() if self._joinable else DynamicCache(config=self._model.config)
        ids_PL = [[self._pad_id] * (width - len(ids)) + list(ids) for ids in prompts]
        logits_PV = self._read(ids_PL, lengths, width, cache)
        return _Prompts({ids: row for row, ids in enumerate(prompts)}, cache, logits_PV)

    def _join(self, found: "_Prompts", prompts: Sequence[list[int]]) -> None:
        """Append a row for each of these prompts, which must be among the read ones."""
        if not prompts:
            return
        take_R = torch.tensor([found.row[tuple(ids)] for ids in prompts], device=self._device)
        logits_RV = found.logits_PV[take_R]
        if self.lengths:
            self.logits_RV = torch.cat([self.logits_RV, logits_RV])
        else:
            self.logits_RV, self._width = logits_RV, max(map(len, found.row))
            self._cache = found.cache
            if self._joinable:
                self._cache = Cache([_Window(x.keys[:0], x.values[:0], self._size) for x in found.cache.layers])
        if self._joinable:
            for window, layer in zip(self._cache.layers, found.cache.layers, strict=True):
                window.admit(layer.keys, layer.values, take_R)
        else:
            self._cache.reorder_cache(take_R)  # the only way to select rows that all kinds of layers have
        self.lengths += map(len, prompts)

    def read(self, tokens: list[int]) -> None:
        """Read one token of every row."""
        self.lengths = [n + 1 for n in self.lengths]
        self._width += 1
        self.logits_RV = self._read([[token] for token in tokens], self.lengths, self._width, self._cache)

    def keep(self, rows: list[int]) -> list[int]:
        """Drop all other rows; :meth:`read` must be called next.

        Returns:
            The rows in their new order: the last ones fill the gaps, so that few rows are moved.
        """
        kept, last = set(rows), [r for r in rows if r >= len(rows)]
        order = [r if r in kept else last.pop() for r in range(len(rows))]
        self.lengths = [self.lengths[r] for r in order]
        if not order:
            self._cache = None  # free its memory before the next prompts are read
        elif self._joinable:
            self._width = max(self.lengths)  # drop columns in which only dropped rows had tokens
            moves = [(to, r) for to, r in enumerate(order) if to != r]
            to_M, from_M = torch.tensor(moves, dtype=torch.long, device=self._device).reshape(-1, 2).T
            for window in self._cache.layers:
                window.keep(len(order), self._width, to_M, from_M)
        else:
            self._cache.reorder_cache(torch.tensor(order, device=self._device))
        return order

    def _read(self, ids_RL: list[list[int]], lengths: list[int], width: int, cache: Any) -> Tensor:
        """The logits after the last token of every row, shape R × V; afterwards the cache has ``width`` columns."""
        column_L = torch.arange(width, device=self._device)
        start_R1 = torch.tensor([[width - n] for n in lengths], device=self._device)
        options: dict[str, Any] = {
            "position_ids": (column_L - start_R1).clamp(min=0)[:, -len(ids_RL[0]) :],
            "logits_to_keep": 1,
        }
        out = self._model(
            input_ids=torch.tensor(ids_RL, device=self._device),
            attention_mask=(column_L >= start_R1).long(),
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in options.items() if name in self._accepted},
        )
        return cast(Tensor, out.logits[:, -1])


class _Prompts(NamedTuple):
    """Distinct prompts that have been read, padded on the left.

    Attributes:
        row: the row of each prompt.
        cache: their keys and values.
        logits_PV: logits of the token after each prompt.
    """

    row: dict[tuple[int, ...], int]
    cache: Any
    logits_PV: Tensor

    def only(self, ids: tuple[int, ...]) -> "_Prompts":
        """A copy of one of them."""
        one = slice(self.row[ids], self.row[ids] + 1)
        layers: list[Any] = [
            _Window(x.keys[one, :, -len(ids) :], x.values[one, :, -len(ids) :], 1) for x in self.cache.layers
        ]
        return _Prompts({ids: 0}, Cache(layers), self.logits_PV[one].clone())


class _Window(DynamicLayer):  # type: ignore[no-untyped-call]  # its base ships without annotations
    """One layer's keys and values while rows join and leave: a window into larger buffers.

    A step writes one column to the right of the window; transformers' cache would copy all columns. When rows leave,
    only the rows that fill the gaps are copied.

    Attributes:
        keys, values: the window, R × heads × L × D.
    """

    keys: Tensor
    values: Tensor
    _SPARE = 64  # columns to the right of the window when the buffers are new

    def __init__(self, keys: Tensor, values: Tensor, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized, self._size = True, size
        self._open(keys, values)

    def _open(self, keys: Tensor, values: Tensor) -> None:
        """Allocate buffers, with the window at their left."""
        rows, self._end = keys.shape[0], keys.shape[2]
        # Zeros: masked values are multiplied by 0, which would turn NaN or infinity into NaN.
        self._buffers = [
            x.new_zeros(self._size, x.shape[1], self._end + self._SPARE, x.shape[3]) for x in (keys, values)
        ]
        for buffer, x in zip(self._buffers, (keys, values), strict=True):
            buffer[:rows, :, : self._end] = x
        self._show(rows, self._end)

    def _show(self, rows: int, width: int) -> None:
        self.keys, self.values = (x[:rows, :, self._end - width : self._end] for x in self._buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append one token of every row; called by the model."""
        if self._end == self._buffers[0].shape[2]:
            self._open(self.keys, self.values)
        rows, width = self.keys.shape[0], self.keys.shape[2]
        self._end += 1
        self._show(rows, width + 1)
        self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states
        return self.keys, self.values

    def admit(self, keys: Tensor, values: Tensor, take_R: Tensor) -> None:
        """Append these rows of another layer, which must not be wider; they end in the same column."""
        rows, width = self.keys.shape[0], self.keys.shape[2]
        self._show(rows + len(take_R), width)
        for x, new in ((self.keys, keys), (self.values, values)):
            x[rows:, :, width - new.shape[2] :] = new[take_R]

    def keep(self, rows: int, width: int, to_M: Tensor, from_M: Tensor) -> None:
        """Move rows into gaps, then keep only ``rows`` rows and ``width`` columns."""
        self._show(len(self.keys), width)
        for x in (self.keys, self.values):
            x[to_M] = x[from_M]
        self._show(rows, width)


def draw(logits_RV: Tensor, places: Sequence[tuple[int, int]], warp: Any) -> list[int]:
    """Draw the next token of each row, as :func:`_pick` does.

    Raises:
        ModelError: logits are NaN or infinite.
    """
    tokens = cast(list[int], _pick(logits_RV, places, warp).tolist())
    if -1 in tokens:
        raise ModelError("the policy's logits are NaN or infinite: there is nothing to sample from")
    return tokens


def _pick(logits_RV: Tensor, places: Sequence[tuple[int, int]], warp: Any) -> Tensor:
    """Draw the next token of each row, shape R; -1 if the logits are NaN or infinite.

    This is Gumbel-max in its exponential form: with independent E ~ Exp(1), the largest p / E belongs to entry v with
    probability p_v. First a group of entries is drawn by the group's total, then an entry of that group, so a row needs
    G + C random numbers instead of V. Each number belongs to a row, a token and an entry. So if two sets of
    probabilities differ slightly, their draws differ about as often as their total-variation distance.

    Args:
        logits_RV: the model's logits.
        places: each row's random stream, and its number of tokens.
        warp: applies temperature and truncation; None takes the likeliest token.
    """
    scores_RV = logits_RV.float()
    if warp is None:
        token_R = scores_RV.argmax(-1)
    else:
        share_RV = warp(None, scores_RV).softmax(-1)
        groups = -(-share_RV.shape[1] // GROUP)
        share_RGC = pad(share_RV, (0, groups * GROUP - share_RV.shape[1])).view(-1, groups, GROUP)
        wait_RG, wait_RC = torch.split(_exponential(places, groups + GROUP, share_RV.device), [groups, GROUP], -1)
        group_R = (share_RGC.sum(-1) / wait_RG).argmax(-1)
        share_RC = share_RGC[torch.arange(len(share_RGC), device=group_R.device), group_R]
        token_R = group_R * GROUP + (share_RC / wait_RC).argmax(-1)
    return token_R.where(scores_RV.amax(-1).isfinite(), -1)


def _exponential(places: Sequence[tuple[int, int]], count: int, device: torch.device) -> Tensor:
    """``count`` numbers from Exp(1) for each (stream, token), R × count, float64; order and batch do not change them.

    They come from SplitMix64 (Steele, Lea and Flood 2014), a generator whose n-th number is a function of n.
    """
    stream_R1, token_R1 = torch.tensor(places, dtype=torch.int64, device=device).view(-1, 2, 1).unbind(1)
    number_RX = token_R1 * count + torch.arange(1, count + 1, device=device)
    bits_RX = stream_R1 + number_RX * -0x61C8864680B583EB  # 2⁶⁴ over the golden ratio, as a signed number
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        bits_RX = (bits_RX ^ _shift(bits_RX, shift)) * factor
    bits_RX = bits_RX ^ _shift(bits_RX, 31)
    uniform_RX = (_shift(bits_RX, 11).double() + 0.5) * 2.0**-53
    return uniform_RX.log().neg()


def _shift(value: Tensor, by: int) -> Tensor:
    """Shift 64 bits to the right, with zeros from the left."""
    shifted: Tensor = (value >> by) & (2 ** (64 - by) - 1)
    return shifted


def make_warp(sampling: Sampling) -> Any:
    """The sampler's changes to the probabilities, in transformers' order; None for greedy decoding."""
    if sampling.temperature == 0:
        return None
    warp: Any = LogitsProcessorList()
    if sampling.temperature != 1:
        warp.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        warp.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warp.append(TopPLogitsWarper(sampling.top_p))
    return warp


def _queue(prompts: Sequence[list[int]], batch_size: int) -> list[list[int]]:
    """Group the numbers of equal prompts, which are read together, by ascending length; the queue is read from its end.

    The longest prompts are taken first, so that a lack of memory is seen at once. A group is at most the share ``FREE``
    of the batch, so that many samples of one prompt do not wait until the batch is empty.
    """
    most = max(int(batch_size * FREE), 1)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
    groups = [list(group) for _, group in groupby(order, key=lambda i: prompts[i])]
    return [group[n : n + most] for group in groups for n in range(0, len(group), most)]


@contextmanager
def memory_for(sampling: Sampling) -> Iterator[None]:
    """Turn a lack of memory into an error that names the setting to change.

    Raises:
        SettingsError: there is too little memory; names ``generate.batch_size``.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise SettingsError(
            f"generate.batch_size={sampling.batch_size}: such a batch does not fit into memory; try a smaller one"
        ) from error
