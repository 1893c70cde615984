"""Calls in threads: their order, their errors, and an end at once wherever a signal arrives."""

import subprocess
import sys
import threading
import time

import pytest

from dnpo.threads import map_in_threads


def test_results_keep_the_order_of_the_items_and_calls_run_at_once() -> None:
    together = threading.Barrier(3, timeout=10)

    def slow_first(item: int) -> int:
        together.wait()  # breaks unless three calls run at once
        time.sleep(0.02 * (3 - item % 3))
        return item * item

    assert list(map_in_threads(slow_first, range(9), 3)) == [each * each for each in range(9)]
    assert list(map_in_threads(slow_first, [], 3)) == []


def test_an_error_is_raised_in_order_and_no_further_call_starts() -> None:
    begun = []

    def fail_at_two(item: int) -> int:
        begun.append(item)
        if item == 2:
            raise OSError("no such row")
        time.sleep(0.01)
        return item

    results = map_in_threads(fail_at_two, range(1000), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="no such row"):
        next(results)
    time.sleep(0.05)
    so_far = len(begun)
    assert so_far < 20
    time.sleep(0.05)
    assert len(begun) == so_far


def test_a_process_that_is_interrupted_at_any_line_ends() -> None:
    """With the standard library's executor the process would hang at dozens of lines."""
    lines = subprocess.run([sys.executable, "-m", "tests.interrupting"], capture_output=True, text=True, timeout=120)
    assert lines.returncode == 0, lines.stderr
    assert int(lines.stdout) > 80
