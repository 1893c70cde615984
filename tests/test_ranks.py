"""Training on several processes gives the weights of one process, up to rounding."""

import copy
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dnpo import ranks
from dnpo.errors import NonFiniteLossError, OutOfMemoryError, StepZeroError
from dnpo.optimise.npo import NoiseModule, SilentModule, TrainableModule
from dnpo.optimise.parts import Logistic, Objective, PairOptimisation, Refined
from dnpo.optimise.preference import PreferenceTraining, optimise
from dnpo.optimise.reference import read_scores, score
from dnpo.optimise.steps import arrange
from dnpo.optimise.training import CHECKPOINT, Training
from dnpo.policy.lora import Lora
from dnpo.policy.model import Policy
from dnpo.records import Pair
from dnpo.settings import Bound
from tests.conftest import Report, World
from tests.ranks import on_ranks, succeed

MakePolicy = Callable[..., Policy]

WEIGHTS, SHARED_WEIGHTS, METRICS = 5e-5, 1e-4, 1e-4  # greatest differences between one process and two


SEED = 3
ON_RANK_1 = arrange(PairOptimisation(Bound("torch.optim.SGD", {}), batch_size=8), 22, SEED)[0][1]
"""The index of a pair on rank 1 in the first step."""


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        settings: of the training.
        lora: rank of the adapter.
        noise: whether noise is trained too.
        objective: the loss.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    lora: int = 0
    noise: bool = True
    objective: Objective = field(default_factory=lambda: Logistic(beta=1.0))

    @property
    def optimisation(self) -> PairOptimisation:
        given: dict[str, Any] = {
            "optimizer": Bound("torch.optim.SGD", {"lr": 0.02, "momentum": 0.9}),
            "batch_size": 8,
            "micro_batch_size": 3,
            "epochs": 2,
            "checkpoint_every": 2,
        }
        return PairOptimisation(**{**given, **self.settings})


@dataclass(frozen=True)
class Ended:
    """The result of a training on one rank."""

    weights: dict[str, Tensor]
    noise: list[Tensor]
    history: list[dict[str, float]]
    reported: int


def train(case: Case, policy: Policy, pairs: list[Pair], folder: Path, off_by: float = 0.0) -> Ended:
    """Score the pairs and train on them, as the stages of an iteration do.

    Args:
        off_by: error added to the log-probability of the pair ``ON_RANK_1``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    score(policy, pairs, autocast=False, folder=folder, report=Report())
    reference = read_scores(folder, len(pairs))
    reference[ON_RANK_1] = replace(reference[ON_RANK_1], chosen=reference[ON_RANK_1].chosen + off_by)
    policy.model = Lora(rank=case.lora).on(policy.model, seed=0)
    noise: NoiseModule = SilentModule()
    if case.noise:
        entries, width = policy.head.weight_VH.shape
        noise = TrainableModule(width, entries, alpha=0.3, learning_rate=0.01)
    report = Report()
    history = optimise(
        policy,
        pairs,
        reference,
        case.optimisation,
        noise=noise,
        objective=case.objective,
        beta=1.0,
        seed=SEED,
        folder=folder,
        report=report,
    )
    policy.save(folder / "policy")
    ranks.wait()
    files = sorted((folder / "policy").rglob("*.safetensors"))
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return Ended(weights, [p.detach().clone() for p in noise.parameters()], history, report.done)


def train_each(cases: list[Case], policy: Policy, pairs: list[Pair], folder: Path) -> list[Ended]:
    """Several trainings, one after the other, each from the same policy."""
    return [train(case, copy.deepcopy(policy), pairs, folder / str(number)) for number, case in enumerate(cases)]


def compare(one: Ended, two: Ended, weights: float = WEIGHTS, metrics: float = METRICS) -> None:
    """The same weights and metrics, up to rounding."""
    assert one.weights.keys() == two.weights.keys()
    for name, tensor in one.weights.items():
        assert (tensor - two.weights[name]).abs().max() <= weights, name
    for mine, other in zip(one.noise, two.noise, strict=True):
        assert (mine - other).abs().max() <= weights
    assert len(one.history) == len(two.history)
    for row, same in zip(one.history, two.history, strict=True):
        assert row.keys() == same.keys()
        for name, value in row.items():
            if name != "tokens_per_second":
                assert abs(value - same[name]) <= metrics * max(1.0, abs(value)), (row["step"], name)


def equal(one: Ended, two: Ended) -> bool:
    """Whether all bits are the same."""
    tensors = zip([*one.weights.values(), *one.noise], [*two.weights.values(), *two.noise], strict=True)
    timed = [[{**row, "tokens_per_second": 0.0} for row in each.history] for each in (one, two)]
    return all(torch.equal(a, b) for a, b in tensors) and timed[0] == timed[1]


CASES = [
    Case(),
    Case({"batch_size": 7, "epochs": 1}),  # 22 pairs in steps of 5 and 6
    Case(lora=4),
    Case(noise=False, objective=Refined(beta=1.0, warmup=0.0, window=8, percentile=40.0, extrapolation=0.0)),
]


def test_two_processes_train_like_one(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    pairs = world.pairs(22)
    ones = train_each(CASES, make_policy(), pairs, tmp_path / "one")
    first, second = succeed(2, train_each, CASES, make_policy(), pairs, tmp_path / "two")
    for one, two, other in zip(ones, first, second, strict=True):
        compare(one, two)
        assert equal(two, other), "all ranks have the same weights and know the same metrics"
        assert two.reported == len(two.history)
        assert other.reported == 0


def train_until_death(case: Case, policy: Policy, pairs: list[Pair], folder: Path, step: int) -> Ended:
    """The same, but rank 1 is killed within this step, after its gradients are computed."""
    update = Training._step

    def update_or_die(self: Training, *given: Any) -> None:
        if ranks.rank() == 1 and self.policy_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        update(self, *given)

    Training._step = update_or_die  # type: ignore[method-assign]
    return train(case, policy, pairs, folder)


SHARDED = [
    Case({"parallel": "sharded"}),
    Case({"parallel": "sharded", "batch_size": 7, "micro_batch_size": 1}),  # a rank has fewer micro-batches
    Case({"parallel": "sharded"}, lora=4),
]


def test_processes_that_share_the_weights_train_like_one(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    pairs = world.pairs(22)
    alone = [replace(case, settings={**case.settings, "parallel": "replicated"}) for case in SHARDED]
    ones = train_each(alone, make_policy(), pairs, tmp_path / "one")
    first, second = succeed(2, train_each, SHARDED, make_policy(), pairs, tmp_path / "two")
    for one, two, other in zip(ones, first, second, strict=True):
        compare(one, two, weights=SHARED_WEIGHTS)
        assert equal(two, other)


@pytest.mark.parametrize("parallel", ["replicated", "sharded"])
def test_a_killed_rank_is_continued_bit_for_bit(
    parallel: str, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """With the same number of ranks the bits are equal; one process can also continue from the same checkpoint."""
    pairs, case = world.pairs(22), Case({"parallel": parallel})
    (undisturbed,), _ = succeed(2, train_each, [case], make_policy(), pairs, tmp_path / "undisturbed")
    first, second = on_ranks(2, train_until_death, case, make_policy(), pairs, tmp_path / "two", 4)
    assert isinstance(first, RuntimeError), "it does not wait for the other"
    assert second is None
    assert (tmp_path / "two" / CHECKPOINT).is_file()
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    continued, _ = succeed(2, train, case, make_policy(), pairs, tmp_path / "two")
    assert equal(undisturbed, continued)
    alone = train(Case(), make_policy(), pairs, tmp_path / "one")
    compare(undisturbed, alone, weights=SHARED_WEIGHTS if parallel == "sharded" else WEIGHTS)
    assert alone.history[:4] == continued.history[:4], "timings included: these steps are not repeated"


def fail(policy: Policy, pairs: list[Pair], folder: Path) -> list[Exception]:
    """The error after a failure with a pair on rank 1."""
    poisoned = [
        replace(pair, strength=float("nan")) if number == ON_RANK_1 else pair for number, pair in enumerate(pairs)
    ]
    terms = PreferenceTraining.terms

    def lack_memory(self: PreferenceTraining, batch: Any) -> Any:
        if len(batch.ids) > 1 and pairs[ON_RANK_1].id in batch.ids:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
        return terms(self, batch)

    def train_without_memory() -> None:
        PreferenceTraining.terms = lack_memory  # type: ignore[method-assign]
        train(Case(), copy.deepcopy(policy), pairs, folder / "memory")

    def fail_in_another_way() -> None:
        ranks.gather(lambda: [0][ranks.rank()])

    attempts = [
        lambda: train(Case(), copy.deepcopy(policy), poisoned, folder / "nan"),
        lambda: train(Case(), copy.deepcopy(policy), pairs, folder / "other", off_by=0.1),
        train_without_memory,
        fail_in_another_way,
    ]
    return [raised_by(attempt) for attempt in attempts]


def raised_by(attempt: Callable[[], Any]) -> Exception:
    """The error that it raises."""
    try:
        attempt()
    except Exception as error:
        return error
    raise AssertionError("nothing is raised")


def test_an_error_on_one_rank_is_raised_on_all_with_its_name(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    pairs = world.pairs(22)
    row = pairs[ON_RANK_1].id
    both = succeed(2, fail, make_policy(), pairs, tmp_path)
    for not_finite, not_the_start, no_memory, _ in both:
        assert isinstance(not_finite, NonFiniteLossError)
        assert row in str(not_finite)
        assert isinstance(not_the_start, StepZeroError)
        assert row in str(not_the_start)
        assert isinstance(no_memory, OutOfMemoryError)
        assert "trainer.micro_batch_size=1 fits" in str(no_memory)
    assert [type(errors[-1]) for errors in both] == [ranks.FailedElsewhere, IndexError]
