"""Fixtures of several tests: a quiet report, a small encoded world, a random policy for it, and a finished run."""

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from filelock import FileLock

from dnpo.records import Pair, Prompt, Response, Verdict
from dnpo.settings import Bound

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dnpo.judges import Judge
    from dnpo.policy.model import Policy
    from tests.recording import Recorder

# Before torch is imported: tests run in parallel, and the models are tiny. Fixtures import it, and not this module,
# because xdist imports this module before it starts the workers, and would take seconds longer to start them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
gc.set_threshold(20_000)  # imports make many objects and no garbage

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


def torch_optimizer(name: str, **settings: Any) -> Bound:
    """An optimizer of torch, in the form of a run's settings."""
    return Bound(f"torch.optim.{name}", settings)


EXPENSIVE = {
    "app",
    "chromium",
    "done",
    "imported",
    "known",
    "recorder",
    "serial",
    "server",
    "swept",
    "trained",
    "whole",
}
"""Fixtures that each worker makes separately, in seconds."""


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

    tokenizer: "PreTrainedTokenizerBase"
    prompts: list[Prompt]
    human: list[Response]

    def pairs(self, count: int) -> list[Pair]:
        """Pairs of human responses with human responses to other prompts, which suffice to test the mathematics."""
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


def verdicts(judge: "Judge", prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Verdict]:
    """The verdicts of a judge that needs no ledger."""
    from dnpo.judges.asked.ledger import Ledger

    return judge(prompts, responses, Ledger(Path("there-is-no-such-folder/ledger.sqlite")), Report())


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that one worker fills and all read."""
    shared = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    folder, done = shared / name, shared / f"{name}.done"
    with FileLock(shared / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # remains of another worker's failure
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--dist loadgroup`, keep tests that share slow fixtures on one worker.

    The group is written behind the name, where the scheduler reads it. xdist 3.8 does so for its mark ``xdist_group``,
    but in an attribute that pytest 9.2 no longer reads. Long tests run first, so that no worker waits long for the
    other at the end.
    """
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    for item in items if getattr(config.option, "loadgroup", False) else ():
        shared = sorted(EXPENSIVE & set(getattr(item, "fixturenames", ())))
        if shared:
            item._id = type(item._id).parse(f"{item.nodeid}@{item.path.stem}.{shared[0]}")


@pytest.fixture(scope="session", autouse=True)
def quick() -> None:
    """Keep compositions of settings and do not wait for the disk, which saves much time."""
    from absl import logging as absl_logging

    from tests.composing import keep_compositions
    from tests.unsynced import leave_to_the_kernel

    keep_compositions()
    leave_to_the_kernel()
    # When Hydra sets up logging, absl's handler closes its stream unless that is one of Python's own; pytest's is not.
    absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Restore environment variables that a test or its callees have set."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs, to copy, since its migrations take seconds."""

    def migrate(folder: Path) -> None:
        from mlflow import MlflowClient

        MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}").search_experiments()

    return make_once(tmp_path_factory, "migrated", migrate) / "mlflow.db"


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which DNPO has run at the smoke scale under seed 0, tracked; to be read or copied, never changed."""

    from tests.commands import succeed

    def run(folder: Path) -> None:
        (folder / "stdout.txt").write_text(succeed(folder, "scale=smoke", TESTS_DRAW="all"))

    return make_once(tmp_path_factory, "smoke", run)


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of DNPO with adapters; tests read or copy it, and never change it."""
    from tests.commands import SMOKE, succeed

    return make_once(tmp_path_factory, "adapted", lambda folder: succeed(folder, *SMOKE, "model.lora.rank=4"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of DNPO with the settings ``TINY``; tests read or copy it, and never change it."""
    from tests.commands import SMOKE, TINY, succeed

    return make_once(tmp_path_factory, "tiny", lambda folder: succeed(folder, *SMOKE, *TINY))


@pytest.fixture
def finished(smoke: Path, tmp_path: Path) -> Path:
    """A copy of ``tiny``, in which further runs find the stages that they share with DNPO."""
    return shutil.copytree(smoke, tmp_path / "finished", symlinks=True)


@pytest.fixture
def report() -> Report:
    return Report()


@pytest.fixture(scope="session")
def world() -> World:
    from dnpo.data.tinyworld import TinyWorld
    from dnpo.policy.tokenizer import encode, human_response, train_tokenizer

    rows, _ = TinyWorld(train=240, validation=12, test=12).read()
    tokenizer = train_tokenizer(rows["train"], 300)
    prompts, human = [], []
    for row in rows["train"]:
        prompt_ids, ids = encode(tokenizer, row.messages, row.human)
        prompts.append(replace(row, token_ids=prompt_ids))
        human.append(human_response(tokenizer, row, ids, 24))
    return World(tokenizer, prompts, human)


@pytest.fixture
def make_policy(world: World) -> Callable[..., "Policy"]:
    """A random policy; the same at every call with the same seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dnpo.policy.model import Policy

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
    """The folder of real data and models next to the checkout."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the folder shared/ with real data and a real model is not beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def recorder(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> "Recorder":
    """A store with the sweeps of all figures: ``main`` with three seeds, the others with two."""
    from analysis.selection import CONSTANT, DNPO, DSL, FIXED, NPO, SPIN

    from tests.recording import RIVALS, Recorder, record_judges, record_noise

    folder = tmp_path_factory.mktemp("tracked")
    shutil.copy(migrated, folder / "mlflow.db")
    found = Recorder(folder)
    for seed in range(3):
        for method in (SPIN, DNPO):
            found.run(method, seed, texts=True)
    for seed in range(2):
        for k in (1, 2):
            for method in (SPIN, DSL, NPO, DNPO):
                found.run(method, seed, sweep="ablation", iterations=k + 1, start=k)
        for method in (SPIN, FIXED, NPO, CONSTANT):
            found.run(method, seed, sweep="fixed_vs_trainable", iterations=2)
        for name, (method, iterations) in RIVALS.items():
            settings = {"rollout.samples": str(iterations)}
            found.run(method, seed, sweep="methods", iterations=iterations, params=settings, tags={"dnpo.method": name})
    record_judges(found, 2)
    record_noise(found, 2)
    return found
