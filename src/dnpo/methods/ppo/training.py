"""Train a policy, together with a value head, on responses that it gave during the training.

Shapes as in ``equations.py``; B rollouts of a micro-batch, H hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Adam

from dnpo.methods.ppo import ClippedRatio
from dnpo.methods.ppo.equations import (
    advantages,
    divergence,
    explained_variance,
    is_clipped,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from dnpo.optimise.batches import Batch
from dnpo.optimise.live import Clock, LiveSteps, Source, require
from dnpo.optimise.parts import Optimisation
from dnpo.optimise.steps import Slice, arrange
from dnpo.optimise.training import Training, fit, make_fused
from dnpo.policy.logprobs import token_logps
from dnpo.policy.model import Policy, by_length
from dnpo.policy.packing import pack
from dnpo.records import Rollout
from dnpo.store import Report
from dnpo.tables import read, read_all, write


@dataclass(frozen=True)
class Experience:
    """A rollout, with numbers that were computed when it was made. Lists have one number for each token.

    Attributes:
        id: of the prompt.
        rollout, sample: as in :class:`~dnpo.records.Rollout`.
        prompt_ids: the prompt's token ids.
        token_ids: the response's token ids.
        logps: log-probabilities under the policy that responded, in nats.
        values: values before each token, by the value head as it was then.
        advantages: advantages, whitened over the rollout if the settings say so.
        returns: the targets of the value head: advantages before whitening, plus values.
        later: the discounted sum of rewards from each token to the end.
        log_ratio: log-probability under the policy that responded, minus the one under the reference; 0 without a
            reference.
    """

    id: str
    rollout: int
    sample: int
    prompt_ids: list[int]
    token_ids: list[int]
    logps: list[float]
    values: list[float]
    advantages: list[float]
    returns: list[float]
    later: list[float]
    log_ratio: float


@dataclass(frozen=True)
class ExperienceBatch(Batch):
    """A micro-batch of rollouts with N tokens; its share of a policy step is its share of the tokens.

    Attributes:
        logp_N, value_N, advantage_N, return_N: as in :class:`Experience`, in float64.
    """

    logp_N: Tensor
    value_N: Tensor
    advantage_N: Tensor
    return_N: Tensor


class ValueHead(nn.Module):
    """A linear map of hidden states to values, at first 0 everywhere."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight_H = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """The values, shape N, in float32 or wider for any precision of the hidden states."""
        wide_NH = hidden_NH.to(torch.promote_types(hidden_NH.dtype, self.weight_H.dtype))
        return (wide_NH * self.weight_H).sum(-1) + self.bias


class Observer:
    """Computes values and advantages of responses' tokens, with the present policy and value head.

    Args:
        policy: the policy in training.
        reference: the frozen reference; None if β is 0.
        settings: how to learn from rollouts.
        autocast: as in :class:`~dnpo.optimise.parts.Optimisation`, so that the training computes the same numbers.
    """

    def __init__(self, policy: Policy, reference: Policy | None, settings: ClippedRatio, autocast: bool) -> None:
        self.policy, self.reference, self.settings, self.autocast = policy, reference, settings, autocast
        self.value_head = ValueHead(policy.head.weight_VH.shape[1]).to(policy.device)

    @torch.no_grad()
    def __call__(self, rollouts: Sequence[Rollout]) -> list[Experience]:
        """Make experiences of a rollout's responses, except responses without a score."""
        scored = [rollout for rollout in rollouts if rollout.score is not None]
        if not scored:
            return []
        logps, references, values = self._read(scored)
        logp_SL, reference_SL, value_SL = (pad_sequence(some, batch_first=True) for some in (logps, references, values))
        how, lengths = self.settings, [len(some) for some in logps]
        reward_S = how.reward_scale * torch.tensor([rollout.score for rollout in scored], dtype=torch.float64)
        reward_SL = token_rewards(reward_S, logp_SL, reference_SL, torch.tensor(lengths), beta=how.beta)
        advantage_SL = advantages(reward_SL, value_SL, discount=how.discount, trace=how.trace)
        later_SL = advantages(reward_SL, torch.zeros_like(value_SL), discount=how.discount, trace=1.0)
        advantage_N = torch.cat([some[:n] for some, n in zip(advantage_SL, lengths, strict=True)])
        weights = torch.split(whiten(advantage_N) if how.whiten else advantage_N, lengths)
        return [
            Experience(
                id=rollout.id,
                rollout=rollout.rollout,
                sample=rollout.sample,
                prompt_ids=list(rollout.prompt_ids),
                token_ids=list(rollout.token_ids),
                logps=logps[s].tolist(),
                values=values[s].tolist(),
                advantages=weights[s].tolist(),
                returns=(advantage_SL[s, :n] + values[s]).tolist(),
                later=later_SL[s, :n].tolist(),
                log_ratio=float((logps[s] - references[s]).sum()),
            )
            for s, (rollout, n) in enumerate(zip(scored, lengths, strict=True))
        ]

    def _read(self, rollouts: Sequence[Rollout]) -> list[list[Tensor]]:
        """Log-probabilities of each response's tokens under policy and reference, and values; float64, on the CPU."""
        found: list[list[Tensor]] = [[torch.empty(0)] * len(rollouts) for _ in range(3)]
        device = self.policy.device
        products = torch.autocast(device.type, torch.bfloat16, enabled=self.autocast)
        with self.policy.evaluating(), products:
            for some in by_length([len(r.prompt_ids) + len(r.token_ids) for r in rollouts]):
                packed = pack([rollouts[s].prompt_ids for s in some], [rollouts[s].token_ids for s in some]).to(device)
                hidden_NH = self.policy.hidden(packed)
                logp_N = token_logps(hidden_NH, self.policy.head, packed.target_N)
                reference_N = logp_N
                if self.reference is not None:
                    reference_N = token_logps(self.reference.hidden(packed), self.reference.head, packed.target_N)
                for kind, value_N in enumerate((logp_N, reference_N, self.value_head(hidden_NH))):
                    parts = torch.split(value_N.double().cpu(), list(packed.completions))
                    for s, part_n in zip(some, parts, strict=True):
                        found[kind][s] = part_n
        return found


class Observed:
    """A source of experiences. It takes rollouts from another source and computes their experiences.

    Experiences are written to files: a training that continues after a kill could not compute them again, since the
    policy and value head have changed.

    Args:
        source: makes the rollouts.
        observe: makes experiences from rollouts.
        folder: folder for the files.
    """

    def __init__(self, source: Source[Rollout], observe: Observer, folder: Path) -> None:
        self.source, self.observe, self.folder = source, observe, folder

    @property
    def per_pass(self) -> int:
        """Number of rollouts in one pass over the prompts."""
        return self.source.per_pass

    def ask(self, rollout: int) -> None:
        """Let the policy respond, as it is now."""
        self.source.ask(rollout)

    def check(self, rollouts: int) -> None:
        """Check that the first ``rollouts`` rollouts and their experiences are on the disk."""
        self.source.check(rollouts)
        require([self._file(rollout) for rollout in range(rollouts)])

    def take(self, rollout: int, first: int, step: int) -> list[Experience]:
        """The experiences of a rollout."""
        rollouts, path = self.source.take(rollout, first, step), self._file(rollout)
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write(path, self.observe(rollouts), Experience)
        return read(path, Experience)

    def measure(self, rollout: int) -> dict[str, float]:
        """Metrics of a rollout that has been taken: the source's, and means over its tokens."""
        rows = read(self._file(rollout), Experience)
        measured = dict(self.source.measure(rollout))
        if rows and self.observe.reference is not None:
            measured["rollout/kl"] = sum(row.log_ratio for row in rows) / len(rows)
        if rows and self.observe.settings.value_learning_rate:
            measured["value/explained"] = explained_variance(_join(rows, "values"), _join(rows, "later"))
        return measured

    def describe(self, rollout: int) -> str:
        """A few words on the work so far."""
        return self.source.describe(rollout)

    def explain(self) -> str:
        """Why the rollouts taken so far have no rows."""
        return self.source.explain()

    def _file(self, rollout: int) -> Path:
        return self.folder / f"{rollout:06d}.parquet"


class RolloutTraining(Training):
    """Trains the policy by the clipped loss of importance ratios, and the value head by squared errors.

    Args:
        observer: makes the experiences; its value head is trained.
        notes: returns further metrics of the present policy step, which are known before it is computed.
    """

    title = "training on rollouts"
    policy: Policy

    def __init__(
        self,
        observer: Observer,
        optimisation: Optimisation,
        total: int,
        report: Report,
        notes: Callable[[], Mapping[str, float]],
    ) -> None:
        super().__init__(observer.policy, optimisation, total, report)
        self.settings, self.value_head, self.notes = observer.settings, observer.value_head, notes

    @property
    def players(self) -> list[tuple[str, nn.Module]]:
        """The policy, and the value head if it learns."""
        learns = self.settings.value_learning_rate > 0
        return [*super().players, *([("value", self.value_head)] if learns else [])]

    def configure_optimizers(self) -> Any:
        """The policy's optimizer and, for the value head, Adam with a separate constant learning rate."""
        optimizers, schedules = super().configure_optimizers()
        if len(self.players) > 1:
            how = {"lr": self.settings.value_learning_rate}
            optimizers.append(make_fused(Adam, list(self.value_head.parameters()), how))
        return optimizers, schedules

    def _step(self, row: dict[str, float], ids: Sequence[str], tokens: int) -> None:
        super()._step({**row, **self.notes()}, ids, tokens)

    def terms(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the tokens of the micro-batch: the policy's loss plus the value head's."""
        assert isinstance(batch, ExperienceBatch)
        how = self.settings
        hidden_NH = self.policy.hidden(batch.packed)
        logp_N = token_logps(hidden_NH, self.policy.head, batch.packed.target_N)
        old_N, advantage_N = batch.logp_N.to(logp_N), batch.advantage_N.to(logp_N)
        clip = how.clip or float("inf")
        loss = policy_loss(logp_N, old_N, advantage_N, clip=clip).mean()
        metrics = {
            "loss/policy": loss,
            "ratio/clipped": is_clipped(logp_N.detach(), old_N, advantage_N, clip=clip).mean(),
            "ratio/kl": divergence(logp_N.detach(), old_N).mean(),
        }
        if len(self.players) == 1:
            return loss, metrics
        value_N = self.value_head(_weigh_gradient(hidden_NH, how.value_weight))
        bound = how.value_clip or float("inf")
        value = value_loss(value_N, batch.value_N.to(value_N), batch.return_N.to(value_N), clip=bound).mean()
        return loss + value, {**metrics, "loss/value": value}


def _weigh_gradient(hidden_NH: Tensor, weight: float) -> Tensor:
    """Return the same values; their gradient is multiplied by ``weight``."""
    still_NH = hidden_NH.detach()
    return still_NH + weight * (hidden_NH - still_NH) if weight else still_NH


def _join(rows: Sequence[Experience], name: str) -> Tensor:
    """Join a field of the experiences into one tensor over all tokens."""
    return torch.tensor([number for row in rows for number in getattr(row, name)], dtype=torch.float64)


def collate(piece: Slice[Experience]) -> ExperienceBatch:
    """Make a micro-batch of rollouts."""
    some = piece.rows
    return ExperienceBatch(
        packed=pack([row.prompt_ids for row in some], [row.token_ids for row in some]),
        ids=tuple(row.id for row in some),
        share=sum(len(row.token_ids) for row in some) / sum(len(row.token_ids) for row in piece.group),
        logp_N=_join(some, "logps"),
        value_N=_join(some, "values"),
        advantage_N=_join(some, "advantages"),
        return_N=_join(some, "returns"),
    )


def train(
    settings: ClippedRatio,
    policy: Policy,
    *,
    source: Source[Rollout],
    clock: Clock,
    reference: Policy | None,
    optimisation: Optimisation,
    seed: int,
    folder: Path,
    report: Report,
) -> tuple[list[dict[str, float]], int]:
    """Train the policy in place; see :meth:`ClippedRatio.train`."""
    observer = Observer(policy, reference, settings, optimisation.autocast)
    seen = Observed(source, observer, folder / "rollouts" / "seen")
    live: LiveSteps[Experience, ExperienceBatch] = LiveSteps(
        seen,
        clock,
        batch_size=optimisation.batch_size,
        epochs=optimisation.epochs,
        steps=optimisation.steps,
        order=lambda rows: arrange(optimisation, rows, seed),
        seed=seed,
        report=report,
        micro_batch_size=optimisation.rows_at_once,
        collate=collate,
    )
    training = RolloutTraining(observer, optimisation, len(live), report, lambda: live.notes)
    history = fit(training, live, folder)
    rows = read_all(sorted(seen.folder.glob("*.parquet")), Experience)
    write(folder / "experiences.parquet", rows, Experience)
    tokens = [len(row.prompt_ids) + len(row.token_ids) for row in rows]
    return history, sum(draws * count for draws, count in zip(live.draws, tokens, strict=True))
