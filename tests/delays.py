"""Make the short stages of a small run long enough to be killed; called in a run's process before it begins."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dnpo.stages import verbs
from dnpo.store import Report, Stage, Store

SECONDS = 0.5  # in each of judge, labels and reference
STEP = 0.25  # before each step of a training
AT = "at.txt"  # file in the run's folder with the stage that is being computed


def delay() -> None:
    """Wait in judge, labels and reference, without changing results, and record which stage is being computed."""
    from dnpo import dsl
    from dnpo.optimise import reference

    verbs.ask = _wait(verbs.ask)
    dsl.label_some = _wait(dsl.label_some)
    reference.score = _wait(reference.score)
    compute = Store._compute

    def compute_and_tell(self: Store, stage: Stage, inputs: Mapping[str, Path], report: Report) -> None:
        Path(AT).write_text(stage.name)
        compute(self, stage, inputs, report)
        Path(AT).write_text("between stages")

    Store._compute = compute_and_tell  # type: ignore[method-assign]


def _wait(work: Callable[..., Any]) -> Callable[..., Any]:
    def wait_and_work(*given: Any, **named: Any) -> Any:
        time.sleep(SECONDS / 2)
        result = work(*given, **named)
        time.sleep(SECONDS / 2)
        return result

    return wait_and_work


def delay_steps() -> None:
    """Wait before each step of a training, and record the next step."""
    from dnpo.optimise.steps import Steps

    delay_in = Store._compute
    step = Steps.step
    present = {"stage": ""}

    def compute_and_tell(self: Store, stage: Stage, inputs: Mapping[str, Path], report: Report) -> None:
        present["stage"] = stage.name
        delay_in(self, stage, inputs, report)

    def wait_and_step(self: Any, number: int, size: int) -> Any:
        if present["stage"] == "optimise":
            aside = Path(f"{AT}.aside")
            aside.write_text(f"optimise step {number}")
            aside.replace(AT)
            time.sleep(STEP)
        return step(self, number, size)

    Store._compute = compute_and_tell  # type: ignore[method-assign]
    Steps.step = wait_and_step  # type: ignore[method-assign]
