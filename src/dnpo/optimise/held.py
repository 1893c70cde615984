"""Hold rows out of a training, keep the weights with the lowest loss on them, and end training early.

Which rows are held out depends on their ids alone. A checkpoint names the step of the best weights. Their file stays
until a checkpoint names another step, so a training that continues after a kill ends with the same weights.
"""

import hashlib
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnpo import disk, ranks
from dnpo.errors import SettingsError
from dnpo.optimise.parts import Optimisation
from dnpo.store import Report

FOLDER = "held"
METRIC = "heldout/loss"


def divide(
    read_ids: Callable[[], Sequence[str]], used: Sequence[int], how: Optimisation, setting: str
) -> tuple[Sequence[int], Sequence[int]]:
    """Divide the rows of a training into those to train on and those held out; all rows of a prompt stay together.

    Args:
        read_ids: returns the ids of the prompts of all rows; called only if rows are held out.
        used: the numbers of the rows that training reads.
        setting: the name of ``how`` in messages, such as ``trainer``.

    Raises:
        SettingsError: one of the two parts has no rows.
    """
    if not how.measures:
        return used, []
    ids = read_ids()
    apart = [number for number in used if _place(ids[number]) < how.holdout]
    held = set(apart)
    left = [number for number in used if number not in held]
    if not apart or not left:
        raise SettingsError(
            f"{setting}.holdout={how.holdout:g}: holds out {len(apart):,} of {len(used):,} rows; expected at least "
            "one, and one to train on"
        )
    return left, apart


def _place(id: str) -> float:
    """A number from 0 to 1 that depends only on an id, and not on the number by which data are split."""
    return int.from_bytes(hashlib.sha256(f"held/{id}".encode()).digest()[:8]) / 2**64


class HeldOut:
    """Measures the loss on held-out rows in training.

    Attributes:
        best: the lowest loss so far.
        at: the policy step after which it was measured; 0: before training.
        misses: measurements since then.

    Args:
        measure: computes the loss.
        rows: number of held-out rows.
        how: when to measure, what to keep and when to end.
        setting: the name of ``how`` in messages, such as ``trainer``.
        folder: the training's folder.
        report: receives a note at an early end.
    """

    def __init__(
        self, measure: Callable[[], float], rows: int, how: Optimisation, setting: str, folder: Path, report: Report
    ) -> None:
        self.measure, self.rows, self.how, self.setting = measure, rows, how, setting
        self.folder, self.report = folder / FOLDER, report
        self.best, self.at, self.misses = math.inf, 0, 0
        self._named: int | None = None  # the step of the best weights in the last checkpoint

    @property
    def over(self) -> bool:
        """Whether training should end."""
        return 0 < self.how.patience <= self.misses

    def look(self, step: int, total: int, module: nn.Module) -> dict[str, float]:
        """Measure after a policy step, if a measurement is due; return it as a metric of the step.

        Args:
            step: number of policy steps made.
            total: number of policy steps of the whole training.
            module: the policy's module.
        """
        if step % self.how.measure_every and step != total:
            return {}
        loss = ranks.gather(lambda: self.measure() if ranks.leads() else 0.0)[0]
        if loss < self.best:
            self.best, self.at, self.misses = loss, step, 0
            if self.how.keep == "best" and ranks.leads():
                self._save(module)
        else:
            self.misses += 1
        if self.over and step < total and ranks.leads():
            self.report.note(
                f"{self.setting}.patience={self.how.patience}: ends after {step:,} of {total:,} steps; the held-out "
                f"loss ({self.best:.4g} after step {self.at:,}) has not fallen since"
            )
        return {METRIC: loss}

    def finish(self, module: nn.Module) -> None:
        """Put the best weights into the policy, if they are kept."""
        if self.how.keep != "best":
            return
        ranks.wait()
        state = torch.load(self._path, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, weight in _trained(module).items():
                weight.copy_(state[name])
        if ranks.leads():
            self.report.note(
                f"{self.setting}.keep=best: keeps the weights after step {self.at:,} (held-out loss {self.best:.4g})"
            )

    def facts(self, steps: int, total: int) -> dict[str, Any]:
        """The facts for the stage's manifest.

        Args:
            steps: number of policy steps made.
            total: number of planned steps.
        """
        return {"loss": self.best, "step": self.at, "steps": steps, "planned": total, "rows": self.rows}

    def tidy(self) -> None:
        """Remove weights that are no longer the best; called once a checkpoint names the best."""
        self._named = self.at
        self._remove_others()

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"best": self.best, "at": self.at, "misses": self.misses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.best, self.at, self.misses = state["best"], state["at"], state["misses"]
        self._named = self.at

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.at}.pt"

    def _remove_others(self) -> None:
        """Remove all weights but the best, and those that the last checkpoint names."""
        for path in self.folder.glob("*.pt") if self.folder.is_dir() else ():
            if path.stem not in (str(self.at), str(self._named)):
                path.unlink()

    def _save(self, module: nn.Module) -> None:
        self.folder.mkdir(exist_ok=True)
        aside = disk.name_aside(self._path)
        torch.save({name: weight.detach().cpu() for name, weight in _trained(module).items()}, aside)
        disk.replace(aside, self._path)
        self._remove_others()


def _trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def discard(folder: Path) -> None:
    """Remove the weights that a training kept, once the policy is written."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
