"""A run as plain values, and what a verb needs to become a stage.

A verb is a function that does one stage's work. In ``loop.py`` it is called with stages and returns a stage: nothing is
computed until the store asks for it. When its turn comes, the function itself is called with the folders of its inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from dnpo.settings import Count, Natural, neutral
from dnpo.store import Report, Stage

if TYPE_CHECKING:
    from dnpo.data import Source
    from dnpo.dsl import Labeller
    from dnpo.evaluate import Evaluation
    from dnpo.generate import Sampling
    from dnpo.judges import Judge
    from dnpo.judges.asked.ledger import Ledger
    from dnpo.optimise.parts import Noise, Objective, Optimisation, PairOptimisation
    from dnpo.policy.base import ModelPart
    from dnpo.policy.model import Policy


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run as a whole, beside those of its parts.

    Attributes:
        iterations: how many; they are numbered from 0.
        seed: of everything that is left to chance.
        sft_rows: training rows that fine-tuning alone reads; the iterations have the others. 0: both read all.
        acts_from: the iteration at which labels by score and noise start, where ``dsl.start`` and ``npo.start`` (in
            which its effect shows) say nothing else; ``last`` is the run's last.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: of torch on the CPU.
        store: folder of finished stages.
        ledger: file of judge calls, so that none is paid for twice.
        plan: print the stages, whether they are there and what the judge would cost, and run nothing.
        check: make the checks that come before a run, and run nothing.
    """

    iterations: Count
    seed: Natural
    sft_rows: Natural
    device: str = neutral()
    threads: Count = neutral()
    store: str = neutral()
    ledger: str = neutral()
    plan: bool = neutral()
    check: bool = neutral()
    acts_from: Natural | Literal["last"] = neutral(1)


BEFORE = -1  # the number of what comes before the first iteration


@dataclass(frozen=True)
class Plan:
    """What is in force at iteration ``k``: parts that have not started yet are absent ones here."""

    k: int
    generate: "Sampling"
    judge: "Judge"
    dsl: "Labeller"
    objective: "Objective"
    npo: "Noise"
    trainer: "PairOptimisation"


@dataclass(frozen=True)
class Run:
    """A whole run: the parts that hold throughout, and a plan for each iteration.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        sft_rows: training rows that fine-tuning alone reads; 0: it reads those of the iterations.
    """

    seed: int
    device: str
    data: "Source"
    model: "ModelPart"
    sft: "Optimisation"
    generate: "Sampling"
    judge: "Judge"
    second_judge: "Judge"
    eval: "Evaluation"
    plans: Sequence[Plan]
    ledger: "Ledger"
    sft_rows: int = 0

    @property
    def limit(self) -> int:
        """Completion tokens at most, of human and of generated responses alike."""
        return self.data.max_response_tokens

    def policy(self, inputs: Mapping[str, Path]) -> "Policy":
        """The policy among a stage's inputs, or the base model where there is none."""
        from dnpo.policy.model import device_of

        folder = inputs["policy"] / "policy" if "policy" in inputs else None
        return self.model.load(inputs["prompts"] / "model", folder, device_of(self.device))


class Task(NamedTuple):
    """What a verb works on when its turn comes.

    Attributes:
        k: the iteration; ``BEFORE`` for what comes before the first.
        folder: where its results go.
        inputs: the folders of its inputs' results.
        report: where it tells how far it is.
    """

    k: int
    folder: Path
    inputs: Mapping[str, Path]
    report: Report


Facts = dict[str, Any]


class Verb(Protocol):
    """A verb as ``loop.py`` calls it: with stages, and it gives a stage."""

    def __call__(self, run: Run, plan: Any, /, *, aids: Mapping[str, Stage] = ..., **inputs: Stage | None) -> Stage: ...


def verb(
    name: str, version: int, settings: Callable[[Run, Any], Mapping[str, Any]], title: str = ""
) -> Callable[[Callable[[Run, Any, Task], Facts]], Verb]:
    """Turn the function that does a stage's work into one that lays the stage out.

    Args:
        name: of the stage's folder in the store.
        version: raised by hand whenever a change of the code changes results.
        settings: of run and plan, what decides the result beside the inputs: plain values that go into the key.
        title: what people read; by default the name.
    """

    def decorate(work: Callable[[Run, Any, Task], Facts]) -> Verb:
        @wraps(work)
        def lay_out(
            run: Run, plan: Any, /, *, aids: Mapping[str, Stage] | None = None, **inputs: Stage | None
        ) -> Stage:
            k = plan.k if isinstance(plan, Plan) else BEFORE if plan is None else int(plan)
            return Stage(
                name=name,
                title=f"iteration {k} · {title or name}" if k > BEFORE else title or name,
                version=version,
                settings=settings(run, plan),
                inputs={each: stage for each, stage in inputs.items() if stage is not None},
                work=lambda folder, found, report: work(run, plan, Task(k, folder, found, report)),
                aids=aids or {},
            )

        return lay_out

    return decorate
