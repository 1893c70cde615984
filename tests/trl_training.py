"""TRL's own training on pairs, for comparison with this package's training.

``python -m tests.trl_training FOLDER`` compares a finished run of ``method=dpo`` in that folder.
"""

import copy
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from dnpo.optimise.parts import PairOptimisation
from dnpo.optimise.steps import arrange
from dnpo.policy.model import Policy
from dnpo.records import Pair
from dnpo.seeding import derive


def train_by_trl(
    start: Any, tokenizer: Any, pairs: Sequence[Pair], optimisation: PairOptimisation, beta: float, seed: int
) -> Policy:
    """Train by TRL's ``DPOTrainer``: the same tokens in the same order, optimizer, schedule and clipping.

    Args:
        start: the causal language model that both trainings begin with; it is copied.
        seed: seed of the order of the pairs.
    """
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TQDM_DISABLE="1")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Encoded(DPOTrainer):  # type: ignore[misc, unused-ignore]
        """Takes pairs of token ids, in the given order."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def get_train_dataloader(self) -> Any:
            return DataLoader(self.train_dataset, batch_sampler=groups, collate_fn=self.data_collator)

    groups: Any = arrange(optimisation, len(pairs), seed)
    rows = [{"prompt_ids": p.prompt_ids, "chosen_ids": p.chosen_ids, "rejected_ids": p.rejected_ids} for p in pairs]
    model = copy.deepcopy(start)
    model.set_attn_implementation("eager")
    optimizer = optimisation.optimizer(list(model.parameters()))
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder,
            beta=beta,
            num_train_epochs=1,
            per_device_train_batch_size=len(groups[0]),
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
    """Differences of two policies' log-probabilities of responses, in nats; the chosen ones first."""
    prompts = [pair.prompt_ids for pair in pairs] * 2
    responses = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    both = zip(ours.score(prompts, responses), theirs.score(prompts, responses), strict=True)
    return [abs(one - other) for one, other in both]


def compare_run(folder: Path) -> dict[str, float]:
    """Repeat by TRL's trainer what a finished run with one iteration trained by the logistic loss, and compare.

    Returns:
        The greatest difference of final log-probabilities, in nats; their mean difference; their greatest change by
            training; numbers of pairs and of policy steps.
    """
    from dnpo.settings import CONTENTS, build, check
    from dnpo.store import manifest
    from dnpo.tables import read

    (stage,) = (folder / "store" / "optimise").iterdir()
    made = manifest(stage)
    inputs = {name: folder / "store" / key for name, key in made["inputs"].items()}
    settings = max(folder.glob("outputs/*/*/summary.json"), key=lambda path: path.stat().st_mtime_ns)
    tree = json.loads(settings.read_text())["settings"]
    parts = {"model": {name: value for name, value in tree["model"].items() if name != CONTENTS}}
    with chdir(folder):  # paths in the settings are relative to it
        model, how = (build(name, check(name, parts.get(name, tree[name]))) for name in ("model", "trainer"))
    seed = derive(made["settings"]["seed"], "optimise", 0)

    def load(at: Path) -> Policy:
        policy: Policy = model.load(inputs["prompts"] / "model", at / "policy", "cpu")
        return policy

    pairs = read(inputs["pairs"] / "pairs.parquet", Pair)
    start, ours = load(inputs["policy"]), load(stage)
    theirs = train_by_trl(
        load(inputs["policy"]).causal_lm, start.tokenizer, pairs, how, tree["objective"]["beta"], seed
    )
    off = differences(ours, theirs, pairs)
    return {
        "greatest difference": max(off),
        "mean difference": sum(off) / len(off),
        "greatest change by training": max(differences(ours, start, pairs)),
        "pairs": len(pairs),
        "policy steps": len(arrange(how, len(pairs), seed)),
    }


if __name__ == "__main__":
    for name, value in compare_run(Path(sys.argv[1])).items():
        print(f"{name}: {value:.3g}")
