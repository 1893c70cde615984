"""Show a run on the screen: its progress, and its table at the end."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from dnpo.catalogue import Metric, metric
from dnpo.escape import fold, for_terminal
from dnpo.screen import ScreenTable
from dnpo.wording import duration, estimate, fixed, per_second, plural, visible

if TYPE_CHECKING:
    from dnpo.stats.intervals import Estimate  # brings numpy, which the first line does not wait for

NARROW = 79  # characters: the width of the table that a run ends with
COMPACT = (  # metrics of that table, the most important ones first; those that do not fit are left out
    *("eval/score", "second/score", "leaderboard/average", "eval/accuracy", "eval/win", "eval/lose", "pairs/flips"),
    *("drift/kl", "eval/loss", "stagnation/ks", "loss/policy", "seconds"),
)
# Columns of the wide table; a column that no row has is left out.
FAMILIES = "eval/accuracy/<family>"
COLUMNS = (
    *("eval/score", "second/score", "leaderboard/average", FAMILIES, "eval/accuracy", "eval/win", "eval/tie"),
    *("eval/lose", "pairs/flips", "logps/chosen", "logps/rejected", "logps/new", "stagnation/ks", "eval/loss"),
    *("drift/kl", "drift/initial", "loss/policy", "loss/noise", "seconds"),
)
BEST = "▸"
WIDE = 28  # letters of a stage's title
LABEL = 12  # letters of the labels of paths and links at a run's end
ROOMY = 100  # characters of a terminal that has room for a long bar
HEARTBEAT = 60  # seconds without news after which a stage says so; also between its lines without a terminal
LEAST_REST = 0.05  # seconds of a stage's other work from which its end line shows them
GAP = 2  # characters between the columns of a table

StepSink = Callable[[list[dict[str, float]], int], None]


def silence_libraries() -> None:
    """Silence the tips, progress bars and warnings of libraries, so that only this module prints."""
    import warnings

    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    # importing pytorch_lightning resets the level of its topmost logger, not of these
    lightning = ("pytorch_lightning.trainer", "pytorch_lightning.utilities", "lightning.pytorch", "lightning_utilities")
    for name in (*lightning, "transformers", "httpx2", "mlflow", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    silence: Any = transformers_logging.disable_progress_bar  # ships without annotations
    silence()
    disable_progress_bars()
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


class _Parts:
    """Texts of a line, the most important ones first; those that do not fit are left out."""

    def __init__(self, texts: Sequence[Text]) -> None:
        self.texts = texts

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        line = Text()
        for text in self.texts:
            longer = Text(", ").join([line, text]) if line else text
            if longer.cell_len <= options.max_width:
                line = longer
        yield line


class _News(ProgressColumn):
    """Shows how far a stage is, what time is left, and what else fits the terminal."""

    def __init__(self, further: str) -> None:
        super().__init__(Column(ratio=1))
        self.further = further

    def render(self, task: Task) -> _Parts:
        report: StageReport = task.fields["report"]
        unit, speed, left = report.unit, task.finished_speed or task.speed, task.time_remaining
        parts = (
            f"{task.completed:,.0f}/{task.total:,.0f} {unit}" if unit else "",
            Text(report.silence(), style="yellow"),
            f"{estimate(left)} left" if left else "",
            report.loss,
            for_terminal(report.words),
            per_second(speed) if speed else "",
            self.further,
        )
        return _Parts([Text(part) if isinstance(part, str) else part for part in parts if part])


class Console:
    """Prints to the standard output: a progress bar on a terminal, otherwise one line per stage."""

    def __init__(self, width: int | None = None) -> None:
        self.rich = RichConsole(width=width, highlight=False, soft_wrap=True, emoji=False)
        self._kinds: Sequence[str] = ()
        self._place = 0
        self._announced = 0  # number of the first stages that one line says are stored
        self._took: dict[str, float] = {}

    def begin(self, kinds: Sequence[str], there: Collection[int]) -> None:
        """Number the stages of a run from now on, and forecast the time that is left.

        If the first stages are stored already, one line says so for all of them.

        Args:
            kinds: the kind of each stage, such as ``generate``, in the order in which they are computed.
            there: numbers of the stages that are stored already, which take no time.
        """
        self._kinds, self._place = ["" if number in there else kind for number, kind in enumerate(kinds)], 0
        first = next((number for number in range(len(kinds)) if number not in there), len(kinds))
        self._announced = first if first > 1 else 0
        if self._announced:
            which = f"all {first}" if first == len(kinds) else f"the first {first} of {len(kinds)}"
            self.tell(f"  {which} stages are stored already")

    def _number(self) -> str:
        """The number of the current stage in the run; empty outside a run."""
        wide = len(str(len(self._kinds)))
        return f"{self._place:>{wide}}/{len(self._kinds)} " if self._kinds else ""

    def left(self) -> str:
        """How long the stages after the current one take; empty until each kind has been computed once."""
        kinds = [kind for kind in self._kinds[self._place :] if kind]
        if not kinds or not all(kind in self._took for kind in kinds):
            return ""
        return f"further stages: about {estimate(sum(self._took[kind] for kind in kinds))}"

    def table(self, table: ScreenTable, split: bool = False, fold: bool = False) -> None:
        """Print a table at its full width, even beyond the terminal's, so that no number is cut.

        Args:
            table: the table.
            split: whether to print it in parts as wide as the terminal; each part begins with the first column.
            fold: whether long cells are wrapped, so that the table fits the terminal's width.
        """
        parts = _split(table, self.rich.width) if split and self.rich.is_terminal else [table]
        for number, part in enumerate(parts):
            if number:
                self.say("")
            if part.title is not None:  # by Rich, it would be as narrow as the table, with paths broken
                self._print_title(str(part.title))
                part.title = None
            width = self.rich.width if fold and self.rich.is_terminal else max(self.rich.width, _measure(part))
            for line in _draw(part, width):
                self.rich.print(line)

    def _print_title(self, title: str) -> None:
        text = fold(title, self.rich.width) if self.rich.is_terminal else title
        self.rich.print(Text(text, style="table.title"), soft_wrap=True)

    def table_cut(self, table: ScreenTable) -> None:
        """Print a table; on a terminal, lines are cut at its width, and … marks where."""
        if not self.rich.is_terminal:
            self.table(table)
            return
        lines = _draw(table, _measure(table))
        cut = [line for line in lines if line.cell_len > self.rich.width]
        for line in lines:
            line.truncate(self.rich.width, overflow="ellipsis")
            self.rich.print(line)
        if cut:
            self.tell("… marks what does not fit the terminal; append | cat to see it.")

    def say(self, text: str) -> None:
        """Print one line; a path or a command in it can be copied even if the terminal breaks the line."""
        self.rich.print(for_terminal(text), markup=False)

    def tell(self, text: str, hang: int = 0) -> None:
        """Print sentences; on a terminal, lines end between words, and further lines begin after ``hang`` spaces."""
        if self.rich.is_terminal:
            text = fold(text, self.rich.width, hang)
        self.say(text)

    def place(self, line: str) -> None:
        """Print a label of ``LABEL`` letters and a path, link or command, whole if it can be on a narrow terminal."""
        label, text = line[:LABEL].rstrip(), line[LABEL:]
        room = self.rich.width - 1 - len(text)
        if not self.rich.is_terminal or room >= LABEL:
            self.say(line)
            return
        if label:
            self.say(label)
        self.say(" " * max(0, min(4, room)) + text)

    @contextmanager
    def stage(self, title: str, steps: StepSink) -> Iterator["StageReport"]:
        """Show the progress of a stage while it is computed, and a summary when it is done.

        Args:
            title: title of the stage.
            steps: receives the metrics of training steps, and how many steps there are in all.
        """
        self._place += 1
        began = time.monotonic()
        with Progress(
            SpinnerColumn(),
            TextColumn(f"{self._number()}{{task.description}}", markup=False),
            BarColumn(bar_width=24 if self.rich.width >= ROOMY else 8),
            _News(self.left()),
            expand=True,
            console=self.rich,
            transient=True,
            disable=not self.rich.is_terminal,
        ) as progress:
            report = StageReport(self, progress, title, steps)
            with report.beating():
                yield report
        if self._kinds:
            self._took[self._kinds[self._place - 1]] = time.monotonic() - began
        self._finish(title, report.summary())

    def report_reuse(self, title: str, key: str) -> None:
        """Print that a stage was found in the store, unless the line for the first stages has said it."""
        self._place += 1
        if self._place > self._announced:
            self._finish(title, f"stored already ({key})")

    def _finish(self, title: str, text: str) -> None:
        head = f"  {self._number()}{title:<{WIDE}} "
        self.tell(head + text, len(head))


class StageReport:
    """Shows the progress of one stage; implements :class:`dnpo.store.Report`."""

    def __init__(self, console: Console, progress: Progress, title: str, steps: StepSink) -> None:
        self.console, self.progress, self.sink = console, progress, steps
        self.total, self.done, self.before, self.unit, self.words, self.loss = 0, 0, 0, "", "", ""
        self.started = self.began = self.spoke = self.moved = time.monotonic()
        self.title = title
        self._speaking = threading.Lock()
        self.task = progress.add_task(for_terminal(title), total=None, report=self)

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Without a terminal, print a line every minute, also while the stage does not advance."""
        if self.console.rich.is_terminal:
            yield  # the bar shows it
            return
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(min(HEARTBEAT, 1)):
                self._speak()

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def begin(self, total: int, unit: str, done: int = 0) -> None:
        """Start the bar at ``done`` of ``total`` units."""
        self.total, self.unit, self.done, self.before, self.began = total, unit, done, done, time.monotonic()
        self.progress.update(self.task, total=total, completed=done)
        if done:
            self.note(f"continues: {done:,} of {total:,} {unit} are stored already")

    def advance(self, amount: int = 1) -> None:
        """Move the bar on; without a bar, print a line every minute."""
        self.done += amount
        self.moved = time.monotonic()
        self.progress.advance(self.task, amount)
        self._speak()

    def silence(self) -> str:
        """Return how long the stage has not advanced, if that is a minute or more; else an empty text."""
        seconds = time.monotonic() - self.moved
        return f"no news for {duration(seconds)}" if seconds >= HEARTBEAT else ""

    def _speak(self) -> None:
        """Without a terminal, print how far the stage is, unless a line was printed in the last minute."""
        with self._speaking:
            now = time.monotonic()
            if self.console.rich.is_terminal or now - self.spoke < HEARTBEAT:
                return
            self.spoke = now
        if not self.unit:
            self.note(f"computing for {duration(now - self.started)}")
            return
        done = self.done - self.before
        rate = done / (now - self.began) if now > self.began else 0.0
        left = f"{per_second(rate)}, about {estimate((self.total - self.done) / rate)} left" if rate else ""
        words = (left, self.silence(), self.loss, self.words, self.console.left())
        self.note(", ".join([f"{self.done:,}/{self.total:,} {self.unit}", *filter(None, words)]))

    def note(self, text: str) -> None:
        """Print a line about the stage."""
        self.console.tell(f"  {self.title}: {text}")

    def status(self, text: str) -> None:
        """Show a short text after the bar, and in later lines."""
        self.words = text

    def steps(self, rows: list[dict[str, float]]) -> None:
        """Show the loss of the last step, and pass the metrics of training steps on to be tracked."""
        loss = rows[-1].get("loss/policy") if rows else None
        if loss is not None:
            self.loss = f"loss {loss:.4g}"
        self.sink(rows, self.total)

    def summary(self) -> str:
        """Return the amount of work done, its time and its speed; also the stage's time if other work took some of it.

        Loading and what a stage does before it counts its last units are such other work.
        """
        now = time.monotonic()
        whole, done = f"{_seconds(now - self.started)} s", self.done - self.before
        if not self.unit:
            parts = [f"done in {whole}"]
        else:
            took = now - self.began
            parts = [f"{plural(done, self.unit.removesuffix('s'))} in {_seconds(took)} s"]
            parts += [per_second(done / took)] if done and took > 0 else []
            parts += [f"{whole} in all"] if self.began - self.started >= LEAST_REST else []
        return ", ".join([*parts, self.words] if self.words else parts)


def _seconds(seconds: float) -> str:
    """Format seconds so that a number of units divided by them is the speed."""
    return f"{seconds:,.1f}" if seconds >= 1 else f"{seconds:.2g}"


def _measure(table: ScreenTable) -> int:
    """Return the width of a table in characters if nothing is cut or wrapped."""
    wide = RichConsole(width=1000)
    return Measurement.get(wide, wide.options, table).maximum


def _draw(table: ScreenTable, width: int) -> list[Text]:
    """Return the lines of a table; without the blanks by which Rich makes them equally long."""
    console = RichConsole(width=width, highlight=False)
    with console.capture() as captured:
        console.print(table)
    lines = [Text.from_ansi(line) for line in captured.get().splitlines()]
    for line in lines:
        line.rstrip()
    return lines


def _split(table: ScreenTable, width: int) -> list[ScreenTable]:
    """Split a table into tables of at most this width; each begins with the first column."""
    first, *others = table.columns
    parts: list[ScreenTable] = []
    for column in others:
        if parts:
            parts[-1].columns.append(_moved(column, len(parts[-1].columns)))
            if _measure(parts[-1]) <= width:
                continue
            parts[-1].columns.pop()
        part = ScreenTable(None if parts or table.title is None else str(table.title))
        part.columns, part.rows = [first, _moved(column, 1)], table.rows
        parts.append(part)
    return parts or [table]


def _moved(column: Column, place: int) -> Column:
    """The column in another place of a table: Rich pads a column by the place that it knows."""
    return replace(column, _index=place)


def wide_table(
    rows: Sequence[dict[str, Any]], around: Mapping[str, "Sequence[Estimate | None]"], best: int | None
) -> ScreenTable:
    """Build a run's table with all columns, one row per iteration; missing values are shown as –.

    Args:
        around: by metric, each row's estimate, for its interval; None where there is none.
        best: number of the row to mark; None for none.
    """
    families = [name for name in rows[0] if name.startswith("eval/accuracy/")]
    names = [each for name in COLUMNS for each in (families if name == FAMILIES else [name])]
    return _build(rows, _measured(rows, names), around, best)


def compact_table(
    rows: Sequence[dict[str, Any]], around: Mapping[str, "Sequence[Estimate | None]"], best: int | None
) -> ScreenTable:
    """Build a run's table, one row per iteration, at most ``NARROW`` characters wide.

    Columns are chosen by the room that usual numbers take, not these, so that similar runs have the same columns.
    Longer numbers only move the columns closer together; if even that is not enough, the last ones are left out.

    Args:
        around: by metric, each row's estimate, for its interval; None where there is none.
        best: number of the row to mark; None for none.
    """
    shown = _measured(rows, COMPACT)
    while len(shown) > 1 and _nominal_width(shown, around) > NARROW:
        shown.pop()
    for count in range(len(shown), 1, -1):
        table = _build(rows, shown[:count], around, best)
        if _measure(table) > NARROW:
            table.padding = (0, 1, 0, 0)
        if _measure(table) <= NARROW:
            return table
    return _build(rows, shown[:1], around, best)


def _measured(rows: Sequence[Mapping[str, Any]], names: Iterable[str]) -> list[Metric]:
    return [metric(name) for name in names if any(row.get(name) is not None for row in rows)]


def _nominal_width(shown: Sequence[Metric], around: Container[str]) -> int:
    """The width of a table whose numbers have a digit before the decimal point, or two if they are shares or points."""
    widths = []
    for column in shown:
        usual = "99" if column.unit in ("%", "points of 100", "s") else "9"
        number = len(fixed(float(usual), column.digits))
        cell = 2 * number + len(" ±") - (len(usual) - 1) if column.name in around else number
        widths.append(GAP + max(cell, len(column.heading)))
    return len(f"{BEST} SFT") + sum(widths)


def _build(
    rows: Sequence[Mapping[str, Any]],
    shown: Sequence[Metric],
    around: Mapping[str, "Sequence[Estimate | None]"],
    best: int | None,
) -> ScreenTable:
    table = ScreenTable("Results by iteration")
    table.add_column("  it.", no_wrap=True)
    for column in shown:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        cells = [_with_interval(row.get(each.name), each, around.get(each.name), number) for each in shown]
        mark = BEST if number == best else " "
        table.add_row(f"{mark} {row['iteration']:>3}", *cells, style="bold" if number == best else None)
    return table


def _with_interval(value: float | None, column: Metric, found: "Sequence[Estimate | None] | None", number: int) -> str:
    if value is None:
        return "–"
    estimate = found[number] if found else None
    half = estimate.half if estimate else None
    if half is None:
        return column.format(value)
    finer = replace(column, digits=visible([column.scale * half], column.digits))
    return f"{finer.format(value)} ±{finer.format(half)}"
