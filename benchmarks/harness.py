"""Measure variants in turns, each in a separate process, and report the figures.

A worker is a Python process that answers a line of JSON on its standard input with a line of JSON on its standard
output; ``worker.py`` is the worker for training steps. Only the standard library and torch are needed.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import bare

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Facts = dict[str, Any]


# --- workers ----------------------------------------------------------------------------------------------------------


class Worker:
    """A variant in its own process.

    Args:
        module: what ``python -m`` runs.
        arguments: its arguments.
        threads: of torch.
    """

    def __init__(self, module: str, arguments: Sequence[str], threads: int = 1) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        path = [str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(path)}
        self._process = subprocess.Popen(
            [sys.executable, *modules(module), *arguments, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
        )
        self.facts = self._read()

    def ask(self, **request: Any) -> Facts:
        """Send a request, and return the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _read(self) -> Facts:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            log = self._log.read().decode(errors="replace")[-4000:]
            raise RuntimeError(f"a worker died ({' '.join(map(str, self._process.args))}):\n{log}")  # type: ignore
        answer: Facts = json.loads(line)
        return answer


def modules(module: str) -> list[str]:
    """The arguments of Python that run a module, with packages hidden if they are hidden here."""
    return ["-m", "benchmarks.bare", module] if bare.is_hidden() else ["-m", module]


def answer(handle: Callable[[Facts], Facts], facts: Facts) -> None:
    """Run a worker: send ``facts``, then answer every request until standard input ends.

    Call :func:`claim_output` before anything that may print. A request that does not fit into memory is
    answered with ``skip``.
    """
    say(facts)
    for line in sys.stdin:
        try:
            say(handle(json.loads(line)))
        except torch.OutOfMemoryError as error:
            say({"skip": f"out of memory: {str(error).splitlines()[0]}"})


_output = sys.stdout


def claim_output() -> None:
    """Reserve the standard output for answers; output of libraries goes to the standard error."""
    global _output
    _output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def say(facts: Facts) -> None:
    """Send a line of JSON from a worker."""
    _output.write(json.dumps(facts) + "\n")
    _output.flush()


def interleave(
    start: Mapping[str, Callable[[], Worker]],
    rounds: int,
    *,
    keep: bool = True,
) -> tuple[dict[str, list[Facts]], dict[str, str]]:
    """Run all variants in turns, A B C A B C …; in round i every worker is asked to run batch i.

    Args:
        start: starts each variant's worker; a worker that answers ``{"skip": reason}`` is left out.
        rounds: number of measured runs of each variant, after one that is not measured.
        keep: keep all workers alive between rounds. Otherwise each is started and warmed up for every run, in case only
            one model fits into memory.

    Returns:
        The measurements of each variant by round, and the reasons why variants are left out.
    """
    alive: dict[str, Worker] = {}
    skipped: dict[str, str] = {}
    runs: dict[str, list[Facts]] = {name: [] for name in start}

    def prepare(name: str) -> Worker | None:
        if name not in alive and name not in skipped:
            alive[name] = start[name]()
            if "skip" in alive[name].facts:
                leave_out(name, alive[name].facts["skip"])
            elif "skip" in (found := alive[name].ask(do="run", batch=0)):
                leave_out(name, found["skip"])
        return alive.get(name)

    def leave_out(name: str, reason: str) -> None:
        skipped[name] = reason
        alive.pop(name).stop()

    try:
        for name in start if keep else ():
            progress(f"warming up {name}")
            prepare(name)
        for i in range(rounds):
            for name in start:
                worker = prepare(name)
                if worker is None:
                    continue
                progress(f"round {i + 1} of {rounds}: {name}")
                found = worker.ask(do="run", batch=i)
                if "skip" in found:
                    leave_out(name, found["skip"])
                    continue
                runs[name].append(found)
                if not keep:
                    alive.pop(name).stop()
    finally:
        progress("")
        for worker in alive.values():
            worker.stop()
    return {name: found for name, found in runs.items() if name not in skipped}, skipped


def progress(text: str) -> None:
    """Show the progress, only on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


# --- figures ----------------------------------------------------------------------------------------------------------


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def summary(values: Sequence[float], pattern: str = "{:.3g}") -> str:
    """Format median and quartiles."""
    low, middle, high = (pattern.format(v) for v in quartiles(values))
    return f"{middle} ({low} to {high})"


def ratio(name: str, over: Sequence[float], under: Sequence[float], target: float | None = None) -> Facts:
    """The ratio of two variants' medians, with the quartiles of the rounds' ratios."""
    low, middle, high = quartiles([a / b for a, b in zip(over, under, strict=True)])
    found = statistics.median(over) / statistics.median(under)
    facts: Facts = {"name": name, "ratio": found, "by_round": {"lower": low, "median": middle, "upper": high}}
    return facts if target is None else {**facts, "target": target, "met": found <= target}


def ratio_row(facts: Facts) -> list[str]:
    """A row of a table of ratios."""
    by_round = "{median:.3f} ({lower:.3f} to {upper:.3f})".format(**facts["by_round"])
    wanted = f"≤ {facts['target']:g}: {'met' if facts['met'] else 'MISSED'}" if "target" in facts else ""
    return [facts["name"], f"{facts['ratio']:.3f}", by_round, wanted]


RATIO_HEADINGS = ("ratio", "of medians", "by round: median (quartiles)", "target")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format an aligned table, with the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    return "\n".join([line(headings), "  ".join("-" * width for width in widths), *map(line, rows)])


def common_arguments(name: str, description: str) -> argparse.ArgumentParser:
    """Make a parser with the options that most commands have."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="JSON file to write")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU (default: 1)")
    return parser


def save(path: Path, content: Facts) -> None:
    """Write results as JSON, with a description of the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, "machine": machine()}, indent=2, ensure_ascii=False) + "\n")
    print(f"\nwritten to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def machine() -> Facts:
    """Describe the machine and the versions of its software."""
    packages = ("torch", "transformers", "peft", "pytorch-lightning", "trl", "accelerate")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "versions": {name: found for name in packages if (found := _version(name)) is not None},
        "load_average": list(os.getloadavg()),
        "arguments": sys.argv[1:],
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# --- measuring, inside a worker ---------------------------------------------------------------------------------------


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_time(work: Callable[[], Any], device: torch.device) -> tuple[Facts, Any]:
    """Measure the wall clock and this process's CPU time while ``work`` runs; return both, and its result.

    ``seconds`` is the figure to compare. On a CPU it is CPU time, which other processes disturb less; on a GPU it is
    wall clock, with a synchronisation before and after.
    """
    synchronise(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    synchronise(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"seconds": wall if device.type == "cuda" else cpu, "wall": wall, "cpu": cpu}, result


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 8192, times: int = 20) -> float:
    """Measure the FLOP per second that the device reaches on large square products."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    facts, _ = measure_time(lambda: [a @ b for _ in range(times)], device)
    return float(2 * size**3 * times / facts["wall"])


def measure_added_memory(work: Callable[[], Any], device: torch.device) -> int:
    """Measure the peak of the bytes that ``work`` allocates, in addition to those allocated before.

    On a GPU the caching allocator counts them. On a CPU torch's profiler reports every allocation and release in order,
    and the peak is the maximum of their running sum. Both count only tensors: neither BLAS's scratch memory nor
    Python's objects.
    """
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    total = peak = 0
    for _, _, size in changes:
        total += size
        peak = max(peak, total)
    return peak
