"""The values that describe a run, and the decorator that turns a verb into a stage.

A verb is a function that does the work of one stage. ``loop.py`` calls the decorated verb with stages, and it returns a
stage without computing anything. The function itself is called only when the store computes the stage, with the folders
of the stage's inputs.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from dnpo.data.curriculum import NoCurriculum
from dnpo.data.prompts import All
from dnpo.dsl import HardLabels
from dnpo.optimise.parts import NoAverage
from dnpo.policy.base import read_saved
from dnpo.settings import Count, Natural, neutral
from dnpo.store import Report, Stage, Verify

if TYPE_CHECKING:
    from dnpo.data import Source
    from dnpo.data.curriculum import Curriculum
    from dnpo.data.prompts import Prompts
    from dnpo.dsl import Labeller, Strength
    from dnpo.evaluate import Evaluation
    from dnpo.generate import Ahead, Given, Sampling
    from dnpo.judges import Judge
    from dnpo.judges.asked.ledger import Ledger
    from dnpo.judges.augment import Augmentation
    from dnpo.optimise.parts import MovingAverage, Noise, Objective, Optimisation, PairOptimisation
    from dnpo.policy.base import ModelPart
    from dnpo.policy.model import Policy

Start = Literal["previous", "initial", "base"]
Reference = Literal["start", "initial", "ema", "none"]


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run that belong to no part.

    Attributes:
        iterations: number of iterations; they are numbered from 0.
        seed: seed of all random draws.
        sft_rows: number of training rows for fine-tuning only; the iterations use the others. 0: both use all rows.
        start: the policy whose weights training begins with; see :class:`Plan`.
        reference: the policy that is the reference; see :class:`Plan`.
        acts_from: the iteration at which noise and labels by score start; ``last`` is the run's last. It is the default
            of ``dsl.start`` and ``npo.start``, and has no other effect.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: number of torch's CPU threads.
        store: folder of finished stages (setting ``store.root``).
        remote: address of a store shared with other machines (setting ``store.remote``).
        verify: how finished stages are checked at their first use: by ``digests`` (every file is read once) or
            ``sizes``.
        ledger: file of judge calls, so that none is paid for twice.
        plan: only list the stages, whether they are stored, what the judge would cost, and whether the run would be
            refused.
        check: only run the checks that precede a run.
        wide: show all columns of the results at the end.
        keep: the policy that the run is for, which is exported unless another is named: the ``last``, or the ``best``.
        patience: iterations in a row without a better policy after which the run ends; 0: it does all iterations.
        best_by: the metric that decides which policy is better, such as ``eval/accuracy``; null: the judge's score, or
            the held-out loss if nothing is scored.
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
    start: Start | list[Start] = "previous"
    reference: Reference | list[Reference] = "start"
    acts_from: Natural | Literal["last"] = neutral(1)
    verify: Verify = neutral("digests")
    remote: str | None = neutral(None)
    wide: bool = neutral(False)
    keep: Literal["last", "best"] = neutral("last")
    patience: Natural = 0
    best_by: str | None = neutral(None)


BEFORE = -1  # in place of an iteration's number, for the stages before the first


@dataclass(frozen=True)
class Plan:
    """The parts of iteration ``k``; noise and labels by score are off before their start.

    Attributes:
        start: the policy whose weights training begins with: the ``previous`` iteration's, the ``initial`` one (after
            fine-tuning), or the ``base`` model (before fine-tuning).
        prompts: chooses the training prompts.
        rollout: decides how and when the policy responds to them.
        judge: scores the responses.
        dsl: makes pairs from them.
        strength: computes how sure the pairs' labels are.
        curriculum: chooses and weighs the pairs to train on.
        ema: a moving average of the policy's weights in training, for parts that read it.
        reference: the policy that is the reference: the one that training starts from (``start``), the ``initial`` one,
            the moving average of the weights (``ema``), or ``none``.
    """

    k: int
    rollout: "Ahead | Given"  # Live is a subclass of Ahead
    judge: "Judge"
    dsl: "Labeller"
    objective: "Objective"
    npo: "Noise"
    trainer: "PairOptimisation"
    start: Start = "previous"
    prompts: "Prompts" = field(default_factory=All)
    strength: "Strength" = field(default_factory=HardLabels)
    curriculum: "Curriculum" = field(default_factory=NoCurriculum)
    ema: "NoAverage | MovingAverage" = field(default_factory=NoAverage)
    reference: Reference = "start"

    @property
    def reads_reference(self) -> bool:
        """Whether the objective reads a reference."""
        return self.reference != "none" and bool(getattr(self.objective, "reads_reference", True))

    @property
    def reads_average(self) -> bool:
        """Whether anything reads the moving average."""
        return (self.reads_reference and self.reference == "ema") or getattr(self.rollout, "by", "policy") == "ema"

    @property
    def makes_pairs(self) -> bool:
        """Whether pairs are made; some objectives learn from scored responses instead."""
        return not hasattr(self.objective, "train")

    @property
    def judges(self) -> bool:
        """Whether the judge scores responses."""
        return self.dsl.needs_scores if self.makes_pairs else True


@dataclass(frozen=True)
class Run:
    """A whole run: the parts that all iterations share, and a plan for each iteration.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        generate: how policies sample in evaluations.
        judge: gives the scores of evaluations; labels may have another judge, see :class:`Plan`.
        sft_rows: number of training rows for fine-tuning only; 0: it uses the same rows as the iterations.
        augment: how a copy of the initial policy is taught before it judges.
        ranks: number of processes that share the work of a stage.
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
    augment: "Augmentation | None" = None
    ranks: int = 1

    @property
    def limit(self) -> int:
        """The maximum number of tokens of a response, human or generated."""
        return self.data.max_response_tokens

    @property
    def teaches(self) -> bool:
        """Whether a judge asks a copy of the initial policy that is taught first."""
        asked = [plan.judge for plan in self.plans if plan.judges or plan.strength.asks]
        return bool(self.augment and self.augment.rows and any("taught" in judge.reads_policies for judge in asked))

    def trainings(self) -> "Iterator[tuple[str, Optimisation]]":
        """The settings of every training, each with its name."""
        yield "sft", self.sft
        if self.augment is not None:
            yield "augment.optimisation", self.augment.optimisation
        yield from (("trainer", plan.trainer) for plan in self.plans)

    def policy(self, inputs: Mapping[str, Path], name: str = "policy") -> "Policy":
        """Load the policy of this name among a stage's inputs, or the base model if there is none."""
        from dnpo.policy.model import device_of

        folder = None
        if name in inputs:
            folder = inputs[name] / "policy"
            read_saved(folder)
        return self.model.load(inputs["prompts"] / "model", folder, device_of(self.device))


@dataclass(frozen=True)
class Iteration:
    """The stages of one iteration.

    Attributes:
        k: its number; ``BEFORE`` for fine-tuning.
        policy: the policy that it trained.
        taught: before the first iteration, the policy that judges can ask: a copy taught to judge, or the policy
            itself.
        labelled: the stage of the pairs that it made; this is the training if they are made in training.
        pairs: the stage of the pairs that it trained on: ``labelled``, unless there is a curriculum.
        like: the training whose noise this one matches.
    """

    k: int
    prompts: Stage
    policy: Stage
    evaluation: Stage
    measures: tuple[Stage, ...] = ()
    responses: Stage | None = None
    verdicts: Stage | None = None
    labelled: Stage | None = None
    pairs: Stage | None = None
    reference: Stage | None = None
    like: Stage | None = None
    taught: Stage | None = None

    @property
    def stages(self) -> list[Stage]:
        """The iteration's own stages, in the order in which they run."""
        first = [self.prompts] if self.k == BEFORE else []
        labelled = self.labelled if self.labelled is not self.policy else None  # the pairs come from rollouts
        arranged = None if self.pairs is self.labelled or self.pairs is self.policy else self.pairs
        data = [*first, self.responses, self.verdicts, labelled, arranged]
        lessons = self.taught if self.taught is not self.policy else None
        own = [*data, self.reference, self.like, self.policy, self.evaluation, *self.measures, lessons]
        return [stage for stage in own if stage is not None]


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

    def __call__(
        self, run: Run, plan: Any, /, *, caches: Mapping[str, Stage] = ..., **inputs: Stage | None
    ) -> Stage: ...


class OptionalVerb(Protocol):
    """A verb that returns None for plans that do not need it."""

    def __call__(
        self, run: Run, plan: Any, /, *, caches: Mapping[str, Stage] = ..., **inputs: Stage | None
    ) -> Stage | None: ...


def verb(
    name: str,
    version: int,
    settings: Callable[[Run, Any], Mapping[str, Any]],
    title: str = "",
    reads: Callable[[Any], Collection[str]] | None = None,
    shared: bool = False,
) -> Callable[[Callable[[Run, Any, Task], Facts]], Verb]:
    """Turn a function that does the work of a stage into a function that lays the stage out.

    Args:
        name: name of the stage and of its folder in the store.
        version: must be raised whenever a change of the code changes results.
        settings: returns the settings of run and plan that determine the result, as plain values for the key.
        title: the stage's title for people; by default its name.
        reads: returns the names of the inputs that a plan reads; by default all inputs that ``loop.py`` passes.
        shared: whether several processes can share the work, see ``ranks.py``.
    """

    def decorate(work: Callable[[Run, Any, Task], Facts]) -> Verb:
        @wraps(work)
        def lay_out(
            run: Run, plan: Any, /, *, caches: Mapping[str, Stage] | None = None, **inputs: Stage | None
        ) -> Stage:
            k = plan.k if isinstance(plan, Plan) else BEFORE if plan is None else int(plan)
            read = inputs if reads is None else reads(plan)
            return Stage(
                name=name,
                title=f"iteration {k} · {title or name}" if k > BEFORE else title or name,
                version=version,
                settings=settings(run, plan),
                inputs={each: stage for each, stage in inputs.items() if stage is not None and each in read},
                work=lambda folder, found, report: work(run, plan, Task(k, folder, found, report)),
                caches=caches or {},
                device=run.device,
                shared=shared,
            )

        return lay_out

    return decorate


def only_if(needed: Callable[[Plan], bool]) -> Callable[[Verb], OptionalVerb]:
    """Make a verb optional: for a plan that does not need it, it lays out nothing."""

    def decorate(lay_out: Verb) -> OptionalVerb:
        @wraps(lay_out)
        def perhaps(run: Run, plan: Plan, /, **inputs: Any) -> Stage | None:
            return lay_out(run, plan, **inputs) if needed(plan) else None

        return perhaps

    return decorate
