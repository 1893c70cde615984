"""Choose the best policy of a run by a metric of its evaluations, and end a run that no longer improves.

Decisions depend only on the table of results, so a run that continues after a kill makes the same ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dnpo.catalogue import is_added, metric
from dnpo.errors import DnpoError, SettingsError
from dnpo.tables import column

if TYPE_CHECKING:
    from dnpo.stages.plan import Run

Keep = Literal["last", "best"]
Row = Mapping[str, Any]
OF_POLICIES = ("eval/", "second/", "leaderboard/", "texts/", "heldout/loss", "loss/policy")  # of the fine-tuned one too
SCORED = ("score", "score_greedy", "win", "lose", "unscored")  # metrics of eval/ that need a judge's scores


@dataclass(frozen=True)
class KeptPolicy:
    """Which policy a run keeps, and when it ends.

    Attributes:
        keep: the ``last`` policy or the ``best``.
        patience: iterations in a row without a better policy after which the run ends; 0: it does all iterations.
        best_by: the metric; None: the judge's score, or the held-out loss if nothing is scored.
    """

    keep: Keep = "last"
    patience: int = 0
    best_by: str | None = None

    @property
    def reads(self) -> bool:
        """Whether anything depends on the metric."""
        return self.keep == "best" or self.patience > 0

    def check(self, run: "Run") -> None:
        """Refuse a metric that cannot choose a policy, before anything is computed.

        Raises:
            SettingsError: nothing reads the metric, it is unknown, neither of its directions is better, or the run does
                not measure it for every policy.
        """
        if self.best_by is None:
            return
        if not self.reads:
            raise SettingsError(f"best_by={self.best_by}: has an effect only with keep=best or patience=…")
        try:
            found = metric(self.best_by)
        except DnpoError as error:
            raise SettingsError(f"best_by={error}") from None
        if not found.better:
            raise SettingsError(
                f"best_by={self.best_by}: neither direction of this metric is better; expected one like eval/score, "
                "eval/accuracy or eval/loss"
            )
        if not (self.best_by.startswith(OF_POLICIES) or is_added(self.best_by)):
            raise SettingsError(
                f"best_by={self.best_by}: is not measured for the fine-tuned policy; expected one like eval/score, "
                "eval/accuracy or eval/loss"
            )
        lack = _find_lack(self.best_by, found.needs, run)
        if lack:
            raise SettingsError(f"best_by={self.best_by}: this run does not measure it; it needs {lack}")

    def metric_of(self, rows: Sequence[Row]) -> str:
        """The name of the metric that chooses among these policies.

        Raises:
            SettingsError: the last policy lacks it.
        """
        name = self.best_by or default_metric(rows)
        if not has(rows[-1], name):
            raise SettingsError(
                f"best_by={name}: the policy after {_place(rows[-1])} has no such number; choose one that every "
                "policy has: the table in the summary.json of a run without keep=best and patience lists them. "
                "Finished stages are kept"
            )
        return name

    def is_over(self, rows: Sequence[Row]) -> bool:
        """Whether the run ends after these policies, the fine-tuned one first."""
        if not self.reads:
            return False
        best = find_best(rows, self.metric_of(rows))
        return 0 < self.patience <= len(rows) - 1 - best

    def describe(self, rows: Sequence[Row], planned: int) -> dict[str, Any]:
        """What a run's summary records about the choice; empty if no setting asks for one.

        Args:
            rows: the policies, the fine-tuned one first.
            planned: number of planned iterations.
        """
        if not self.reads:
            return {}
        name = self.metric_of(rows)
        best = find_best(rows, name)
        found: dict[str, Any] = {"best": {"iteration": rows[best]["iteration"], "by": name, "value": rows[best][name]}}
        found["kept"] = best if self.keep == "best" else len(rows) - 1
        if len(rows) - 1 < planned:
            found["ended"] = {"iterations": len(rows) - 1, "planned": planned, "patience": self.patience}
        return {"choice": found}


def _find_lack(name: str, needs: str, run: "Run") -> str:
    """What a run lacks to measure a metric for every policy, the fine-tuned one too; empty if nothing.

    Args:
        needs: what the catalogue says that the metric needs.
    """
    place, _, what = name.partition("/")
    if place == "second":
        return "" if run.second_judge.gives_scores else needs
    if place == "leaderboard":
        return _find_lack_of_benchmarks(what, needs, run)
    if name in ("heldout/loss", "loss/policy"):
        wanted = "keep=best" if place == "heldout" else "epochs or steps"
        for setting, training in run.trainings():
            there = training.measures if place == "heldout" else training.epochs or training.steps
            if setting in ("sft", "trainer") and not there:
                return f"{setting}.{wanted}"
        return ""
    return _find_lack_of_evaluation(what, needs, run) if place == "eval" else ""


def _find_lack_of_benchmarks(what: str, needs: str, run: "Run") -> str:
    if run.eval.leaderboard is None:
        return needs
    from dnpo.evaluate.leaderboard import SIX

    wanted = SIX if what == "average" else [what]
    missing = [name for name in wanted if name not in run.eval.leaderboard.names]
    return f"{', '.join(missing)} in eval.leaderboard.benchmarks" if missing else ""


def _find_lack_of_evaluation(what: str, needs: str, run: "Run") -> str:
    if what in SCORED:
        return "" if run.judge.gives_scores else "a judge that gives scores"
    if what.startswith("engine_"):
        return "" if getattr(run.generate, "engine", None) is not None else needs
    kind, _, family = what.partition("/")
    if kind not in ("accuracy", "majority") and not kind.startswith("pass_at_"):
        return ""
    count = kind.removeprefix("pass_at_")
    if count != kind and count not in ("1", str(run.eval.samples)):
        return f"eval.samples={count}"
    rows = run.data.read()[0][run.eval.split]
    if None in column(rows, "answer"):
        return f"an answer in every row of the split {run.eval.split}"
    return f"rows of the family {family}" if family and family not in column(rows, "family") else ""


ALWAYS_LAST = KeptPolicy()


def default_metric(rows: Sequence[Row]) -> str:
    """The judge's score, or the held-out loss if nothing is scored."""
    return "eval/score" if any(row.get("eval/score") is not None for row in rows) else "eval/loss"


def find_best(rows: Sequence[Row], name: str) -> int:
    """The number of the row with the best value; of equal ones the first."""
    sign = 1 if metric(name).better == "higher" else -1
    values = [(sign * row[name], -number) for number, row in enumerate(rows) if has(row, name)]
    return -max(values)[1]


def kept(summary: Mapping[str, Any]) -> int:
    """The index of the policy that a run keeps among its policies."""
    last = len(summary["table"]) - 1
    return int(summary["choice"]["kept"]) if "choice" in summary else last


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """Sentences on the best policy and on an early end; none for a run that did not ask for them."""
    if "choice" not in summary:
        return []
    choice, settings = summary["choice"], summary["settings"]
    best, ended = choice["best"], choice.get("ended")
    column = metric(best["by"])
    said = []
    if ended:
        said.append(
            f"patience={ended['patience']}: ended after {ended['iterations']} of {ended['planned']} iterations, since "
            f"the last {ended['patience']} did not improve {best['by']}."
        )
    value = f"{best['by']} {column.format_with_unit(best['value'])}, on the split {settings['eval']['split']}"
    words = "is exported by default" if settings["keep"] == "best" else "is not the one exported by default (keep=last)"
    last = summary["table"][-1]["iteration"] == best["iteration"]
    words = "is the last, and exported by default" if last else words
    said.append(f"keep={settings['keep']}: the best policy is that after {_place(best)} ({value}); it {words}.")
    return said


def has(row: Row, name: str) -> bool:
    """Whether a policy has a finite value of this metric."""
    value = row.get(name)
    return isinstance(value, int | float) and math.isfinite(value)


def _place(row: Row) -> str:
    return "fine-tuning" if row["iteration"] == "SFT" else f"iteration {row['iteration']}"
