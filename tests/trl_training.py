"""TRL's own training on pairs: a second witness of what training on them ends in."""

import copy
import os
import tempfile
from collections.abc import Sequence
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler

from dnpo.optimise.parts import PairOptimisation
from dnpo.policy.model import Policy
from dnpo.records import Pair


def train_by_trl(
    start: Any, tokenizer: Any, pairs: Sequence[Pair], optimisation: PairOptimisation, beta: float, seed: int
) -> Policy:
    """Train by TRL's ``DPOTrainer``: the same tokens in the same order, optimizer, schedule and clipping.

    Args:
        start: the causal language model that both trainings begin with; it is copied.
        pairs: as many as fill policy steps of one size, which is the only kind that TRL has.
        seed: seed of the order of the pairs.
    """
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TQDM_DISABLE="1")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Encoded(DPOTrainer):  # type: ignore[misc, unused-ignore]
        """Takes pairs that are token ids already, in the order in which they come."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

    groups = optimisation.groups(len(pairs), seed)
    (size,) = {len(group) for group in groups}
    ordered = [pairs[i] for group in groups for i in group]
    rows = [{"prompt_ids": p.prompt_ids, "chosen_ids": p.chosen_ids, "rejected_ids": p.rejected_ids} for p in ordered]
    model = copy.deepcopy(start)
    model.set_attn_implementation("eager")
    optimizer = optimisation.optimizer(list(model.parameters()))
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder,
            beta=beta,
            num_train_epochs=1,
            per_device_train_batch_size=size,
            max_grad_norm=optimisation.clip,
            max_length=None,
            precompute_ref_log_probs=False,
            activation_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        make: Any = Encoded
        trainer = make(
            model,
            ref_model=copy.deepcopy(model),
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            optimizers=(optimizer, LambdaLR(optimizer, lambda step: optimisation.factor(step, len(groups)))),
        )
        result = trainer.train()
    assert result.global_step == len(groups)
    return Policy(model.eval(), tokenizer)


def differences(ours: Policy, theirs: Policy, pairs: Sequence[Pair]) -> list[float]:
    """By how much two policies' log-probabilities of responses differ, in nats; the chosen ones first."""
    prompts = [pair.prompt_ids for pair in pairs] * 2
    responses = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    both = zip(ours.score(prompts, responses), theirs.score(prompts, responses), strict=True)
    return [abs(one - other) for one, other in both]
