"""What a run says while it runs, and its table at the end."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

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
        RichConsole(width=max(self.rich.width, 180), highlight=False).print(table)

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

    def reused(self, title: str, key: str) -> None:
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


def iteration_table(rows: Sequence[dict[str, Any]], families: Sequence[str]) -> Table:
    """The table of a run: a row an iteration; what was not measured shows as –."""
    table = Table(title="Results by iteration", title_justify="left", header_style="bold", pad_edge=False, box=None)
    columns: list[tuple[str, str, str]] = [("it.", "iteration", ""), ("score", "eval/score", ".1f")]
    columns += [("2nd", "second/score", ".1f"), ("board", "leaderboard/average", ".1%")]
    columns += [(family[:6], f"eval/accuracy/{family}", ".0%") for family in families]
    columns += [
        ("acc.", "eval/accuracy", ".1%"),
        ("win", "eval/win", ".0%"),
        ("tie", "eval/tie", ".0%"),
        ("lose", "eval/lose", ".0%"),
        ("flips", "pairs/flips", ".0%"),
        ("lp chosen", "logps/chosen", ".2f"),
        ("rejected", "logps/rejected", ".2f"),
        ("new", "logps/new", ".2f"),
        ("KS", "stagnation/ks", ".3f"),
        ("held loss", "eval/loss", ".3f"),
        ("policy loss", "loss/policy", ".4f"),
        ("noise loss", "loss/noise", ".4f"),
        ("s", "seconds", ".0f"),
    ]
    shown = [c for c in columns if c[1] == "iteration" or any(row.get(c[1]) is not None for row in rows)]
    for heading, _, _ in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(row.get(name), form) for _, name, form in shown))
    return table


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "–"
    return format(value, form) if form else str(value)
