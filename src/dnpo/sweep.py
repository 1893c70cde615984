"""What a multirun says as a whole: what its jobs share, which of them failed, and their table side by side."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

if TYPE_CHECKING:
    from dnpo.store import Stage

ERROR, PLAN = "error.txt", "plan.json"


def record_failure(folder: Path, message: str) -> None:
    """Say that a job failed, and remember it for the sweep's report."""
    print(f"error: {message}", file=sys.stderr)
    (folder / ERROR).write_text(message + "\n")


def planned_before(sweep: Path | None, folder: Path, stages: "Sequence[Stage]") -> dict[str, str]:
    """Which stages an earlier job of the same sweep computes anyway; this job's are noted for those after it."""
    if sweep is None:
        return {}
    shared: dict[str, str] = {}
    for plan in sorted(sweep.glob(f"*/{PLAN}")):
        for key in json.loads(plan.read_text()):
            shared.setdefault(key, f"shared with job {plan.parent.name}")
    (folder / PLAN).write_text(json.dumps([stage.key for stage in stages]))
    return shared


class SweepReport(Callback):
    """At the end of a multirun: its table, its failures, and exit status 1 if there are any."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Gather what the jobs left in the sweep's folder."""
        sweep = Path(config.hydra.sweep.dir)
        jobs = sorted((p for p in sweep.iterdir() if p.is_dir()), key=lambda p: (len(p.name), p.name))
        failed = {job.name: (job / ERROR).read_text().strip() for job in jobs if (job / ERROR).is_file()}
        rows = [
            (_overrides(job), json.loads((job / "summary.json").read_text()))
            for job in jobs
            if (job / "summary.json").is_file()
        ]
        if rows:
            self._table(sweep, rows)
        for job, message in failed.items():
            print(f"job {job} failed ({' '.join(_overrides(sweep / job))}): {message}", file=sys.stderr)
        if failed:
            raise SystemExit(1)

    def _table(self, sweep: Path, jobs: Sequence[tuple[list[str], dict[str, Any]]]) -> None:
        from rich.console import Console
        from rich.table import Table

        groups: dict[str, list[list[dict[str, Any]]]] = {}
        for overrides, summary in jobs:
            name = " ".join(o for o in overrides if not o.startswith("seed=")) or "defaults"
            groups.setdefault(name, []).append(summary["table"])
        alike = set.intersection(*(set(name.split(" ")) for name in groups)) if len(groups) > 1 else set()
        laps = [row["iteration"] for row in max((t for tables in groups.values() for t in tables), key=len)]
        found: list[dict[str, Any]] = []
        console = Console(width=180, highlight=False)
        if alike:
            console.print(f"\nall jobs: {' '.join(o for o in next(iter(groups)).split(' ') if o in alike)}")
        for metric, title, scale in (
            ("eval/score", "Judge score of sampled answers", 1.0),
            ("eval/accuracy", "Accuracy of greedy answers, %", 100.0),
            ("eval/loss", "Held-out loss of human responses", 1.0),
        ):
            if not any(metric in row for tables in groups.values() for table in tables for row in table):
                continue
            view = Table(title=f"{title}: mean ± standard deviation over seeds", title_justify="left", box=None)
            view.add_column("settings", max_width=100, overflow="fold")
            view.add_column("runs", justify="right")
            for lap in laps:
                view.add_column(str(lap), justify="right", no_wrap=True)
            for name, tables in groups.items():
                cells = []
                for lap in laps:
                    values = [
                        row[metric] * scale
                        for table in tables
                        for row in table
                        if row["iteration"] == lap and metric in row
                    ]
                    mean, spread = _mean_and_spread(values)
                    cells.append(
                        "–" if mean is None else f"{mean:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")
                    )
                    found.append({"settings": name, "iteration": lap, "metric": metric, "values": values})
                different = " ".join(o for o in name.split(" ") if o not in alike)
                view.add_row(different, str(len(tables)), *cells)
            console.print()
            console.print(view)
        (sweep / "sweep.json").write_text(json.dumps(found, indent=1))
        console.print(f"\nnumbers of every run: {sweep / 'sweep.json'}")


def _overrides(folder: Path) -> list[str]:
    from omegaconf import OmegaConf

    path = folder / ".hydra" / "overrides.yaml"
    return [str(o) for o in OmegaConf.load(path)] if path.is_file() else []


def _mean_and_spread(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few values."""
    import statistics

    found = list(values)
    if not found:
        return None, None
    return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None
