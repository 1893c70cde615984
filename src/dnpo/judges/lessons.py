"""The training for ``augment.py``: fine-tuning with a separate weight for each token of a reply."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor

from dnpo.optimise.batches import Batch
from dnpo.optimise.parts import Optimisation
from dnpo.optimise.steps import Batches, Slice, arrange
from dnpo.optimise.training import Training, fit
from dnpo.policy.logprobs import token_logps
from dnpo.policy.model import Policy
from dnpo.policy.packing import pack
from dnpo.store import Report

if TYPE_CHECKING:
    from dnpo.judges.augment import JudgeRow


def weighted_nll(logp_N: Tensor, weight_N: Tensor) -> Tensor:
    """−Σ w log p / Σ w. For log-probabilities −1 and −3 with weights 3 and 1: 6 / 4 = 1.5."""
    return -(weight_N * logp_N).sum() / weight_N.sum()


@dataclass(frozen=True)
class LessonBatch(Batch):
    """A micro-batch of questions; ``weight_N`` are the weights of the tokens of all replies."""

    weight_N: Tensor


class Lessons(Training):
    """Training on questions with known answers: the weighted mean negative log-likelihood of the replies."""

    title: ClassVar[str] = "preference augmentation"
    setting: ClassVar[str] = "augment.optimisation"
    remedy: ClassVar[str] = (
        "lower its learning rate (augment.optimisation.optimizer.lr) or look at these rows. The last checkpoint is kept"
    )

    policy: Policy

    def terms(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted mean over all tokens of the micro-batch's replies."""
        lessons = cast(LessonBatch, batch)
        packed = lessons.packed
        logp_N = token_logps(self.policy.hidden(packed), self.policy.head, packed.target_N)
        loss = weighted_nll(logp_N, lessons.weight_N)
        return loss, {"loss/policy": loss}


def teach(
    policy: Policy, rows: Sequence["JudgeRow"], optimisation: Optimisation, *, seed: int, folder: Path, report: Report
) -> list[dict[str, float]]:
    """Train the policy in place; see :func:`dnpo.judges.augment.augment`."""

    def collate(piece: "Slice[JudgeRow]") -> LessonBatch:
        some = piece.rows
        return LessonBatch(
            packed=pack([row.prompt_ids for row in some], [row.ids for row in some]),
            ids=tuple(row.id for row in some),
            share=sum(sum(row.weights) for row in some) / sum(sum(row.weights) for row in piece.group),
            weight_N=torch.tensor([weight for row in some for weight in row.weights]),
        )

    groups = arrange(optimisation, len(rows), seed)
    module = Lessons(policy, optimisation, len(groups), report)
    return fit(module, Batches(rows, groups, optimisation.rows_at_once, collate), folder)
