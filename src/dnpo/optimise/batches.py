"""Two kinds of micro-batches: of sequences, and of pairs with the reference's log-probabilities.

Shapes as in ``objective.py`` and ``logprobs.py``: B pairs, N completion tokens, H hidden size.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from dnpo.errors import SettingsError
from dnpo.optimise.npo import NoiseModule
from dnpo.optimise.objective import Facts, Objective, PairLogps
from dnpo.optimise.parts import watches
from dnpo.optimise.reference import KeptHidden
from dnpo.optimise.steps import Slice
from dnpo.policy.packing import Packed, pack
from dnpo.records import Pair, ReferenceLogps
from dnpo.seeding import derive
from dnpo.tables import column


class MicroBatch(Protocol):
    """Rows that go through the model at once."""

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of its rows, for messages."""

    @property
    def share(self) -> float:
        """The weight of its mean loss in its policy step."""

    @property
    def tokens(self) -> int:
        """The number of tokens that go through the model."""

    def to(self, device: torch.device) -> Self:
        """Return it with all tensors on another device."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch: for fine-tuning, one sequence for each row; for B pairs, the chosen responses, then the rejected.

    Attributes:
        packed: prompts and completions.
        ids: ids of its rows.
        share: the weight of its mean loss in its policy step.
    """

    packed: Packed
    ids: tuple[str, ...]
    share: float

    @property
    def tokens(self) -> int:
        """The number of tokens that go through the model, in prompts and completions."""
        return len(self.packed.ids_T)

    def to(self, device: torch.device) -> Self:
        """Return it with all tensors on another device."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in held.items() if hasattr(value, "to")})


# --- of pairs


@dataclass(frozen=True)
class Scored:
    """A pair, with the reference's log-probabilities for training.

    Attributes:
        number: its number among all pairs of the training.
        reference: the reference's log-probabilities; None if the objective reads none, or if they are computed in the
            training step.
        made: the policy step before which the policy responded; 0 for pairs made before training.
    """

    number: int
    pair: Pair
    reference: ReferenceLogps | None
    made: int = 0


class Reading(NamedTuple):
    """Parts of the pairs and of the reference that a training reads.

    Attributes:
        rejected: whether it reads rejected responses.
        noisy: whether noise reads the reference's hidden states of rejected tokens.
        all_states: whether the objective reads the reference's hidden states of all completion tokens.
    """

    rejected: bool
    noisy: bool
    all_states: bool

    @property
    def states(self) -> bool:
        """Whether it reads any hidden states."""
        return self.noisy or self.all_states

    @classmethod
    def of(cls, objective: Objective, noise: NoiseModule) -> "Reading":
        """The data that this objective and this noise read."""
        every_step = any(watch.reads_states for watch in watches(objective, 1))
        return cls(reads_rejected(objective), noise.reads_states, every_step)


@dataclass(frozen=True)
class PairBatch(Batch):
    """A micro-batch of B pairs with the reference's log-probabilities.

    Attributes:
        reference: the reference's log-probabilities; 0 if the objective reads none.
        expected: the policy's log-probabilities before the first update; None in later steps.
        facts: strengths, weights, shifts and lengths of the pairs.
        share: the sum of the pairs' weights, divided by that of all pairs of the policy step.
        rejected: prompts with rejected responses only, if the noise reads hidden states.
        hidden_NH: the reference's hidden states of these, if they have been kept.
        seeds: seeds of the noise, one for each pair.
        rejected_share: the weight, in the policy step, of a mean over the batch's rejected tokens.
        numbers: the numbers of its pairs among all pairs.
        states_NH: the reference's hidden states of all its completion tokens, if the objective reads them and they have
            been kept.
        notes: further metrics of the policy step, which are known before it is computed.
    """

    reference: PairLogps
    expected: PairLogps | None
    facts: Facts
    rejected: Packed | None
    hidden_NH: Tensor | None
    seeds: tuple[int, ...]
    rejected_share: float
    numbers: tuple[int, ...] = ()
    states_NH: Tensor | None = None
    notes: Mapping[str, float] = field(default_factory=dict)


class Collate:
    """Makes micro-batches of pairs.

    Attributes:
        notes: returns further metrics of the present policy step, which are known before it is computed; None if rows
            are made before training.

    Args:
        reads: what the training reads.
        share_prompt: whether the prompt of a pair is computed once for both responses.
        seed: seed of the noise.
        expect: returns the policy's log-probabilities of rows before training; None if they are not known.
        hidden: the reference's hidden states, if they have been kept.
    """

    def __init__(
        self,
        reads: Reading,
        share_prompt: bool,
        seed: int,
        expect: Callable[[Sequence[Scored]], list[ReferenceLogps] | None],
        hidden: KeptHidden | None,
    ) -> None:
        self.reads, self.share_prompt, self.seed, self.expect, self.hidden = reads, share_prompt, seed, expect, hidden
        self.notes: Callable[[], dict[str, float]] | None = None

    def __call__(self, piece: Slice[Scored]) -> PairBatch:
        """The micro-batch of these rows."""
        reads, hidden, rows = self.reads, self.hidden, piece.rows
        both, some, numbers = reads.rejected, [row.pair for row in rows], tuple(row.number for row in rows)
        prompts, rejected = [p.prompt_ids for p in some], [p.rejected_ids for p in some]
        chosen = [p.chosen_ids for p in some]
        expected = self.expect(rows) if not piece.step else None
        nothing = ReferenceLogps(0, 0.0, 0.0)
        return PairBatch(
            packed=pack(prompts * 2, chosen + rejected, share_prompt=self.share_prompt)
            if both
            else pack(prompts, chosen),
            ids=tuple(p.id for p in some),
            share=sum(p.weight for p in some) / sum(row.pair.weight for row in piece.group),
            reference=to_tensors([row.reference or nothing for row in rows], both),
            expected=None if expected is None else to_tensors(expected, both),
            facts=make_facts(some),
            rejected=pack(prompts, rejected) if reads.noisy else None,
            hidden_NH=hidden(numbers) if reads.noisy and not reads.all_states and hidden is not None else None,
            seeds=tuple(derive(self.seed, "noise", piece.step, i) for i in numbers),
            rejected_share=sum(map(len, rejected)) / max(sum(len(row.pair.rejected_ids) for row in piece.group), 1),
            numbers=numbers,
            states_NH=hidden.of_both(numbers) if reads.all_states and hidden is not None and hidden.both else None,
            notes=self._describe(piece) if self.notes is not None else {},
        )

    def _describe(self, piece: Slice[Scored]) -> dict[str, float]:
        """The metrics of the step, and the mean age in policy steps of the micro-batch's pairs."""
        assert self.notes is not None, "live rows"
        return {**self.notes(), "rollout/age": sum(piece.step - row.made for row in piece.rows) / len(piece.rows)}


def reads_rejected(objective: Objective) -> bool:
    """Whether an objective reads rejected responses."""
    return bool(getattr(objective, "reads_rejected", True))


def to_tensors(rows: Sequence[ReferenceLogps], both: bool = True) -> PairLogps:
    """The log-probabilities of B pairs, on the CPU; 0 for rejected responses unless both are read."""
    return PairLogps(
        torch.tensor([row.chosen for row in rows]), torch.tensor([row.rejected if both else 0.0 for row in rows])
    )


def make_facts(pairs: Sequence[Pair]) -> Facts:
    """The facts of pairs, on the CPU."""
    return Facts(
        strength_B=torch.tensor([pair.strength for pair in pairs]),
        weight_B=torch.tensor([pair.weight for pair in pairs]),
        shift_B=torch.tensor([pair.shift for pair in pairs]),
        chosen_tokens_B=torch.tensor([float(len(pair.chosen_ids)) for pair in pairs]),
        rejected_tokens_B=torch.tensor([float(len(pair.rejected_ids)) for pair in pairs]),
    )


def with_weight(pairs: Sequence[Pair]) -> list[int]:
    """The numbers of the pairs whose weight is not 0. Other pairs would be read without effect.

    Raises:
        SettingsError: a weight is negative, or all are 0.
    """
    weights = column(pairs, "weight")
    for number, weight in enumerate(weights):
        if not 0 <= weight < math.inf:
            pair = pairs[number]
            raise SettingsError(f"pair {pair.id}: weight {weight}; expected a finite number that is not negative")
    used = [number for number, weight in enumerate(weights) if weight > 0]
    if pairs and not used:
        raise SettingsError("all pairs have the weight 0; at least one has to have more")
    return used
