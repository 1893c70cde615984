"""The values that describe a run, and the decorator that turns a verb into a stage.

A verb is a function that does the work of one stage. ``loop.py`` calls it with stages, and it returns a stage without
computing anything. Only when the store computes the stage is the function itself called, with its inputs' folders.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from dnpo.policy.base import read_saved
from dnpo.settings import Count, Natural, neutral
from dnpo.store import Report, Stage, Verify

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
    """The settings of a run that belong to no part.

    Attributes:
        iterations: number of iterations; they are numbered from 0.
        seed: seed of all random draws.
        sft_rows: number of training rows for fine-tuning only; the iterations use the others. 0: both use all rows.
        acts_from: the iteration at which labels by score and noise start; ``last`` is the run's last. It is the default
            of ``dsl.start`` and ``npo.start``, and affects results only through them.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: number of torch's CPU threads.
        store: folder of finished stages.
        verify: what finished stages are compared by at their first use: ``digests`` (every file is read once) or
            ``sizes``.
        ledger: file of judge calls, so that none is paid for twice.
        plan: list the stages, whether they are stored and what the judge would cost, and run nothing.
        check: run the checks that precede a run, and nothing else.
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
    verify: Verify = neutral("digests")


BEFORE = -1  # in place of an iteration's number, for the stages before the first


@dataclass(frozen=True)
class Plan:
    """The parts in force at iteration ``k``; labels by score and noise are off before their start."""

    k: int
    generate: "Sampling"
    judge: "Judge"
    dsl: "Labeller"
    objective: "Objective"
    npo: "Noise"
    trainer: "PairOptimisation"


@dataclass(frozen=True)
class Run:
    """A whole run: the parts that stay the same, and a plan for each iteration.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        sft_rows: number of training rows for fine-tuning only; 0: it uses the same rows as the iterations.
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
        """The maximum number of tokens of a response, human or generated."""
        return self.data.max_response_tokens

    def policy(self, inputs: Mapping[str, Path]) -> "Policy":
        """Load the policy among a stage's inputs, or the base model if there is none."""
        from dnpo.policy.model import device_of

        folder = None
        if "policy" in inputs:
            folder = inputs["policy"] / "policy"
            read_saved(folder)
        return self.model.load(inputs["prompts"] / "model", folder, device_of(self.device))


class Task(NamedTuple):
    """The task of a verb when its stage is computed.

    Attributes:
        k: the iteration; ``BEFORE`` before the first.
        folder: folder for the results.
        inputs: folders of the inputs, by name.
        report: receives the progress.
    """

    k: int
    folder: Path
    inputs: Mapping[str, Path]
    report: Report


Facts = dict[str, Any]


class Verb(Protocol):
    """A verb as ``loop.py`` calls it: it takes stages and returns a stage."""

    def __call__(self, run: Run, plan: Any, /, *, aids: Mapping[str, Stage] = ..., **inputs: Stage | None) -> Stage: ...


def verb(
    name: str, version: int, settings: Callable[[Run, Any], Mapping[str, Any]], title: str = ""
) -> Callable[[Callable[[Run, Any, Task], Facts]], Verb]:
    """Turn a function that does the work of a stage into one that lays the stage out.

    Args:
        name: name of the stage and of its folder in the store.
        version: must be raised whenever a change of the code changes results.
        settings: gives the settings of run and plan that decide the result, as plain values for the key.
        title: the stage's title for people; by default its name.
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
                device=run.device,
            )

        return lay_out

    return decorate
