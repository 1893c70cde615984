"""TRL's training step: ``DPOTrainer`` of the installed version, on the same pairs.

Batches go through the trainer's collator into its ``training_step`` (forward and backward); then the optimizer makes
its step. Only data loading is left out. Precision and optimizer are the same as for other variants, without gradient
checkpointing. On a GPU, TRL computes log-probabilities in tiles with Triton; on a CPU it also scores prompts and
padding.
"""

import copy
import os
import tempfile
from typing import Any

from benchmarks.naive import Padded, run_padded_body
from benchmarks.problem import Pairs
from benchmarks.variant import BETA, Skip, Variant


class Trl(Variant):
    """``DPOTrainer`` on the batches of a benchmark."""

    def __init__(self, objective: str, reference: str, **setting: Any) -> None:
        if objective != "dpo":
            raise Skip("TRL has no NPO of this kind")
        os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TQDM_DISABLE="1")
        try:
            from datasets import Dataset
            from tokenizers import Tokenizer, models
            from transformers import PreTrainedTokenizerFast
            from trl import DPOConfig, DPOTrainer
        except ImportError as error:
            raise Skip(f"TRL is not installed ({error}): pip install trl==1.16.0") from error
        super().__init__(objective, reference, **setting)

        class Encoded(DPOTrainer):
            """Accepts pairs that are already token ids."""

            def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
                return dataset

        self._folder = tempfile.TemporaryDirectory()
        settings = DPOConfig(
            output_dir=self._folder.name,
            beta=BETA,
            precompute_ref_log_probs=reference == "cached",
            per_device_train_batch_size=len(self.batches[0].prompts),
            activation_checkpointing=False,
            max_length=None,
            bf16=False,
            use_cpu=self.device.type == "cpu",
            report_to=[],
        )
        words = {name: i for i, name in enumerate(("<pad>", "<s>", "</s>"))}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words)), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        )
        make: Any = Encoded
        self.trainer = make(
            self.model,
            ref_model=None if reference == "cached" or setting["lora"] else copy.deepcopy(self.model),
            args=settings,
            train_dataset=Dataset.from_list([row for batch in self.batches for row in _rows(batch)]),
            processing_class=tokenizer,
            optimizers=(self.optimizers[0], None),
        )
        self.trainer.current_gradient_accumulation_steps = 1
        prepared: Any = self.trainer.train_dataset
        at = 0
        self._inputs = []
        for batch in self.batches:
            self._inputs.append([prepared[i] for i in range(at, at + len(batch.prompts))])
            at += len(batch.prompts)

    def forward_backward(self, index: int) -> float:
        """Collate the batch, and call the trainer's ``training_step``."""
        return float(self.trainer.training_step(self.model, self.trainer.data_collator(self._inputs[index])))

    def body(self, index: int) -> None:
        """Forward and backward of the blocks on padded rows."""
        run_padded_body(self.model, Padded(self.batches[index], self.device))


def _rows(batch: Pairs) -> list[dict[str, list[int]]]:
    return [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, chosen, rejected in zip(batch.prompts, batch.chosen, batch.rejected, strict=True)
    ]
