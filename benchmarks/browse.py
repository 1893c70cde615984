"""Time of ``dnpo browse`` on 20,000 prompts with three policies: its start, its pages, and pauses in a browser.

    python -m benchmarks.browse
    python -m benchmarks.browse --run outputs/DATE/TIME     # the start and the pages of a run of yours

It prints the seconds from the command to the first byte, those of a page of a warm server, and, if playwright and
chromium are installed, those of the first page and of each action in a headless browser. CPU seconds are also right on
a busy machine; those of an action are of the page's thread, so that no pause is longer on an idle machine.
"""

import argparse
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from tests.browsing import make_large_run

ROUNDS = 5


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description="Time of dnpo browse.", allow_abbrev=False)
    parser.add_argument("--run", type=Path, help="the folder of a finished run (default: one with 20,000 prompts)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = given.run or make_large_run(Path(folder))
        measured = [start(run) for _ in range(ROUNDS)]
        for name, values in zip(
            ("first byte", "rows", "warm page", "warm rows"), zip(*measured, strict=True), strict=True
        ):
            wall, cpu = (statistics.median(each) for each in zip(*values, strict=True))
            print(f"{name:16} {wall:7.3f} s  {cpu:7.3f} CPU s")
        if given.run is None:
            in_browser(run)


def start(run: Path) -> list[tuple[float, float]]:
    """Start the command; return seconds and CPU seconds to the first byte and the first rows, and of both when warm."""
    command = [sys.executable, "-m", "dnpo", "browse", str(run), "port=0", "open=false"]
    clock = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = re.search(r"http://\S+", process.stdout.readline())
            assert address, "the command shows no address"
            found = []
            for path in ("", "rows"):
                urllib.request.urlopen(address[0] + path).read()
                found.append((time.monotonic() - clock, _cpu(process.pid)))
            for path in ("", "rows"):
                clock, before, times = time.monotonic(), _cpu(process.pid), 20
                for _ in range(times):
                    urllib.request.urlopen(address[0] + path).read()
                found.append(((time.monotonic() - clock) / times, (_cpu(process.pid) - before) / times))
            return found
        finally:
            process.send_signal(signal.SIGINT)


def _cpu(pid: int) -> float:
    """The CPU seconds of a process so far, on Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def in_browser(run: Path) -> None:
    """Print the CPU seconds of the first page and of every action."""
    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        print("in a browser: not measured, because playwright or chromium is not installed")
        return
    from tests.browsing import found, served, tab, time_actions

    from dnpo.browse.server import make_app

    with sync_playwright() as playwright, served(make_app(found(run))) as address:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with tab(browser) as (page, _):
            first, pauses = time_actions(page, address)
        browser.close()
    for name, seconds in {"first page": first, **pauses}.items():
        print(f"{name:16} {seconds:19.3f} CPU s")


if __name__ == "__main__":
    main()
