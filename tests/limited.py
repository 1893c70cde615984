"""A training whose address space is limited after two of four steps, so that a third does not fit.

It runs in a new Python, see test_optimise.py.
"""

import ctypes
import re
import resource
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dnpo.errors import OutOfMemoryError
from dnpo.optimise.npo import TrainableModule
from dnpo.optimise.objective import logistic
from dnpo.optimise.parts import PairOptimisation
from dnpo.optimise.preference import optimise
from dnpo.optimise.reference import read_scores, score
from dnpo.policy.model import Policy
from dnpo.records import Pair
from dnpo.settings import Bound

ROOM = 90 * 2**20
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of malloc.h


def _make_policy() -> Policy:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({str(i): i for i in range(64)}, "0")))
    words.eos_token = "1"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=6000,
        max_position_embeddings=256,
    )
    return Policy(LlamaForCausalLM(config), words)


class Limiter:
    """A report that, if asked, sets the limit after two steps and prints it."""

    def __init__(self, limits: bool) -> None:
        self.limits, self.done = limits, 0

    def begin(self, total: int, unit: str, done: int = 0) -> None:
        self.done = done

    def note(self, text: str) -> None:
        pass

    def steps(self, rows: list[dict[str, float]]) -> None:
        pass

    def advance(self, amount: int = 1) -> None:
        self.done += amount
        if self.limits and self.done == 2:
            (used,) = re.findall(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())
            limit = int(used) * 1024 + ROOM
            print("limit", limit, flush=True)
            resource.setrlimit(resource.RLIMIT_AS, (limit, -1))


def _ids(i: int, count: int) -> list[int]:
    return [2 + (7 * i + t) % 60 for t in range(count)]


def train_limited(folder: Path, micro: int, limit: int) -> None:
    """Train, and print the steps or the error.

    Args:
        limit: limit of the address space in bytes; 0: the training sets one.
    """
    # every tensor is mapped and freed separately, so what fits does not depend on fragmentation of the heap
    c = ctypes.CDLL(None)
    assert c.mallopt(M_MMAP_THRESHOLD, 65536) == c.mallopt(M_ARENA_MAX, 1) == 1
    torch.set_num_threads(1)
    pairs = [
        Pair(f"row-{i}", [], _ids(i, 20), "", "", _ids(i, 100), _ids(i + 1, 100), "", "", None, None, False)
        for i in range(32)
    ]
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, -1))
    else:
        (folder / "reference").mkdir()
        score(_make_policy(), pairs, autocast=False, folder=folder / "reference", report=Limiter(False))
    reference = read_scores(folder / "reference", len(pairs))
    optimizer = Bound("torch.optim.SGD", {"lr": 0.01})
    how = PairOptimisation(optimizer=optimizer, batch_size=8, micro_batch_size=micro, checkpoint_every=1)
    noise = TrainableModule(32, 64, alpha=0.1, learning_rate=0.01)
    try:
        history = optimise(
            _make_policy(),
            pairs,
            reference,
            how,
            noise=noise,
            objective=partial(logistic, beta=0.1),
            beta=0.1,
            seed=0,
            folder=folder,
            report=Limiter(not limit),
        )
        print("steps", [int(row["step"]) for row in history])
    except OutOfMemoryError as error:
        print(error)
        print("checkpoint", (folder / "checkpoint.ckpt").is_file())
