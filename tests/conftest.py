"""What several tests share: a quiet report, a small encoded world, and a random policy for it."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

# Before torch is imported anywhere: tests run side by side, and the models are tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from dnpo.data.tinyworld import TinyWorld
from dnpo.judges import Judge
from dnpo.judges.asked.ledger import Ledger
from dnpo.policy.model import Policy
from dnpo.policy.tokenizer import encode, human_response, train_tokenizer
from dnpo.records import Pair, Prompt, Response, Verdict
from dnpo.settings import Bound

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


def torch_optimizer(name: str, **settings: Any) -> Bound:
    """An optimizer of torch, as a run's settings have it."""
    return Bound(f"torch.optim.{name}", settings)


class Report:
    """Remembers what a stage reports."""

    def __init__(self) -> None:
        self.total, self.done = 0, 0
        self.notes: list[str] = []
        self.rows: list[dict[str, float]] = []

    def begin(self, total: int, unit: str, done: int = 0) -> None:
        self.total, self.done = total, done

    def advance(self, amount: int = 1) -> None:
        self.done += amount

    def note(self, text: str) -> None:
        self.notes.append(text)

    def status(self, text: str) -> None:
        self.words = text

    def steps(self, rows: list[dict[str, float]]) -> None:
        self.rows += rows


class World(NamedTuple):
    """Encoded prompts with their human responses, and the tokenizer that encoded them."""

    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    human: list[Response]

    def pairs(self, count: int) -> list[Pair]:
        """Human responses against those to other prompts: as good as any for the mathematics."""
        found = []
        for i in range(count):
            prompt, chosen, rejected = self.prompts[i], self.human[i], self.human[(i + 7) % len(self.human)]
            found.append(
                Pair(
                    id=prompt.id,
                    messages=prompt.messages,
                    prompt_ids=prompt.token_ids,
                    chosen=chosen.text,
                    rejected=rejected.text,
                    chosen_ids=chosen.token_ids,
                    rejected_ids=rejected.token_ids,
                    chosen_source="human",
                    rejected_source="policy@0",
                    chosen_score=None,
                    rejected_score=None,
                    flipped=False,
                )
            )
        return found


def verdicts(judge: Judge, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Verdict]:
    """What a judge says that needs no ledger."""
    return judge(prompts, responses, Ledger(Path("there-is-no-such-folder/ledger.sqlite")), Report())


@pytest.fixture
def report() -> Report:
    return Report()


@pytest.fixture(scope="session")
def world() -> World:
    rows, _ = TinyWorld(train=240, validation=12, test=12).read()
    tokenizer = train_tokenizer(rows["train"], 300)
    prompts, human = [], []
    for row in rows["train"]:
        prompt_ids, ids = encode(tokenizer, row.messages, row.human)
        prompts.append(replace(row, token_ids=prompt_ids))
        human.append(human_response(tokenizer, row, ids, 24))
    return World(tokenizer, prompts, human)


@pytest.fixture
def make_policy(world: World) -> Callable[..., Policy]:
    """A random policy; the same at every call with the same seed."""

    def make(seed: int = 0, **config: Any) -> Policy:
        shape: dict[str, Any] = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 96,
            "vocab_size": len(world.tokenizer),
            "initializer_range": 0.2,
            "pad_token_id": world.tokenizer.pad_token_id,
            "bos_token_id": world.tokenizer.bos_token_id,
            "eos_token_id": world.tokenizer.eos_token_id,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Policy(LlamaForCausalLM(LlamaConfig(**(shape | config))), world.tokenizer)

    return make


@pytest.fixture
def shared() -> Path:
    """The folder of real data and models beside the checkout."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the folder shared/ with real data and a real model is not beside the checkout")
    return SHARED
