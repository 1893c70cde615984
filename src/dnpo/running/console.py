"""What a run says while it runs, and its table at the end."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dnpo.catalogue import Metric, metric

# Of the table of a run; what no row has is left out.
FAMILIES = "eval/accuracy/<family>"
COLUMNS = (
    *("eval/score", "second/score", "leaderboard/average", FAMILIES, "eval/accuracy", "eval/win", "eval/tie"),
    *("eval/lose", "pairs/flips", "logps/chosen", "logps/rejected", "logps/new", "stagnation/ks", "eval/loss"),
    *("loss/policy", "loss/noise", "seconds"),
)
LONGEST_FAMILY = 6  # letters of a family's name

StepSink = Callable[[list[dict[str, float]]], None]


def silence_libraries() -> None:
    """Leave the screen to this file: libraries keep their tips, progress bars and warnings about themselves."""
    import warnings

    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_utilities", "transformers", "httpx2", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    silence: Any = transformers_logging.disable_progress_bar  # ships without annotations
    silence()
    disable_progress_bars()
    warnings.filterwarnings("ignore", module="pytorch_lightning")


class _Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "")
        return Text(f"{speed:,.1f} {unit}/s" if speed else "", style="cyan")


class Console:
    """Prints to standard output; on a terminal with a live bar, elsewhere one line a stage."""

    def __init__(self, width: int | None = None) -> None:
        self.rich = RichConsole(width=width, highlight=False, soft_wrap=True)

    def table(self, table: Table) -> None:
        """A table at its full width, whatever the terminal's: a cut number is no number."""
        wide = RichConsole(width=1000)
        needed = Measurement.get(wide, wide.options, table).maximum
        RichConsole(width=max(self.rich.width, needed), highlight=False).print(table)

    def say(self, text: str) -> None:
        """One line."""
        self.rich.print(text, markup=False)

    @contextmanager
    def stage(self, title: str, steps: StepSink) -> Iterator["StageReport"]:
        """Report on one stage that is being computed."""
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.rich,
            transient=True,
            disable=not self.rich.is_terminal,
        ) as progress:
            report = StageReport(self, progress, title, steps)
            yield report
        self.say(f"  {title:<28}{report.summary()}")

    def report_reuse(self, title: str, key: str) -> None:
        """Report on a stage that was there already."""
        self.say(f"  {title:<28}there already ({key})")


class StageReport:
    """See :class:`dnpo.store.Report`."""

    def __init__(self, console: Console, progress: Progress, title: str, steps: StepSink) -> None:
        self.console, self.progress, self.sink = console, progress, steps
        self.task = progress.add_task(title, total=1, unit="", status="")
        self.total, self.done, self.before, self.unit, self.words = 0, 0, 0, "", ""
        self.started = self.began = self.spoke = time.monotonic()
        self.title = title

    def begin(self, total: int, unit: str, done: int = 0) -> None:
        """See :class:`dnpo.store.Report`."""
        self.total, self.unit, self.done, self.before, self.began = total, unit, done, done, time.monotonic()
        self.progress.update(self.task, total=total, completed=done, unit=unit)
        if done:
            self.note(f"continues: {done:,} of {total:,} {unit} are there already")

    def advance(self, amount: int = 1) -> None:
        """See :class:`dnpo.store.Report`. Where there is no bar, long stages say something every half minute."""
        self.done += amount
        self.progress.advance(self.task, amount)
        now = time.monotonic()
        if not self.console.rich.is_terminal and now - self.spoke > 30:
            self.spoke = now
            rate = (self.done - self.before) / (now - self.began)
            left = (self.total - self.done) / rate if rate else math.nan
            words = f", {self.words}" if self.words else ""
            self.note(f"{self.done:,}/{self.total:,} {self.unit}, {rate:,.1f}/s, about {left:,.0f} s left{words}")

    def note(self, text: str) -> None:
        """See :class:`dnpo.store.Report`."""
        self.console.say(f"  {self.title}: {text}")

    def status(self, text: str) -> None:
        """See :class:`dnpo.store.Report`."""
        self.words = text
        self.progress.update(self.task, status=text)

    def steps(self, rows: list[dict[str, float]]) -> None:
        """See :class:`dnpo.store.Report`."""
        self.sink(rows)

    def summary(self) -> str:
        """What was done, and how fast."""
        now = time.monotonic()
        seconds, done = now - self.started, self.done - self.before
        rate = f", {done / (now - self.began):,.0f}/s" if done and now > self.began else ""
        what = f"{done:,} {self.unit}" if self.unit else "done"
        return f"{what} in {seconds:,.1f} s{rate}" + (f", {self.words}" if self.words else "")


def iteration_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The table of a run: a row an iteration; what was not measured shows as –."""
    table = Table(title="Results by iteration", title_justify="left", header_style="bold", pad_edge=False, box=None)
    families = [name for name in rows[0] if name.startswith("eval/accuracy/")]
    names = [each for name in COLUMNS for each in (families if name == FAMILIES else [name])]
    shown = [metric(name) for name in names if any(row.get(name) is not None for row in rows)]
    table.add_column("it.", justify="right", no_wrap=True)
    for column in shown:
        heading = column.label[:LONGEST_FAMILY] if column.name in families else column.label
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(str(row["iteration"]), *(_cell(row.get(column.name), column) for column in shown))
    return table


def _cell(value: float | None, column: Metric) -> str:
    if value is None:
        return "–"
    return column.format(value) + "%" * (column.unit == "%")
