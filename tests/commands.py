"""Run commands without the seconds of importing torch and MLflow: in the test's process, or in a forked one.

A test that kills a command, interrupts it, or runs it beside another one needs a process: :class:`Process`.
"""

import atexit
import importlib
import io
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, chdir, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from tests.forking import forking

SMOKE = ("scale=smoke", "tracking=off")
TINY = (
    *("data.train=48", "data.validation=12", "data.test=12", "sft.steps=20", "eval.samples=1", "eval.sequences=24"),
    *("generate.shard_size=16", "trainer.batch_size=16"),
)
"""Settings of a run in a third of the smoke scale's time, with the same numbers of stages, shards and checkpoints."""

Done = subprocess.CompletedProcess[str]


# The process from which others are forked: it has imported everything that a run imports.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        *("dnpo.commands.train", "dnpo.loop", "dnpo.policy.model", "dnpo.optimise.training", "dnpo.running.execute"),
        *("dnpo.data.tinyworld", "dnpo.running.sweep", "dnpo.evaluate.metrics", "mlflow", "matplotlib.figure"),
        *("mlflow.store.tracking.sqlalchemy_store", "tests.lighter", "torch.distributed.run", "submitit"),
    ]
)


class Process:
    """``python -m dnpo.train`` in a separate process and process group; behaves like :class:`subprocess.Popen`.

    Environment variables that a library reads at its import have no effect here.

    Args:
        before: import path of a function that is called in the process first.
        afresh: whether jobs of a launcher are started by a new Python, as those of users are, and not forked.
    """

    def __init__(self, cwd: Path, *overrides: str, before: str = "", afresh: bool = False, **env: str) -> None:
        self._printed = Path(tempfile.mkdtemp(dir=cwd.parent))
        for name in ("out", "err"):  # the files exist even if the process is killed before it prints anything
            (self._printed / name).touch()
        self._process = _FORKS.Process(
            target=_begin, args=(cwd, self._printed, overrides, before, afresh, {**os.environ, **env})
        )
        self._process.start()
        atexit.register(self._process.kill)  # should a test fail and leave it running; a daemon could start no process
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, negative after a signal; None while it runs."""
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end; return its output and its errors."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("dnpo.train", timeout)
        out, err = ((self._printed / name).read_text() for name in ("out", "err"))
        return out, err

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to it and to all processes that it has started."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # it has just begun and has no group yet
            os.kill(self.pid, number)


def _begin(
    cwd: Path, printed: Path, overrides: tuple[str, ...], before: str, afresh: bool, env: dict[str, str]
) -> None:
    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(printed / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path.insert(0, str(cwd))
    sys.argv = ["python -m dnpo.train", *overrides]
    importlib.import_module("tests.lighter")
    if before:
        module, _, function = before.rpartition(".")
        getattr(importlib.import_module(module), function)()
    try:
        with nullcontext() if afresh else forking():
            importlib.import_module("dnpo.train").main()
    finally:
        threading._shutdown()  # as at the end of Python, which lets joblib end its workers


def run_afresh(cwd: Path, *overrides: str, **env: str) -> Done:
    """Run the main job in a new Python, as users do: needed for variables that a library reads at its import."""
    command = [sys.executable, "-m", "dnpo.train", *overrides]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=600)


def run_command(cwd: Path, module: str, *arguments: str, **env: str) -> Done:
    """Run ``python -m MODULE ARGUMENTS`` in this process, as if in a separate one.

    Args:
        cwd: the working directory; its modules can be imported, as with ``python -m``.
        env: variables of the environment, on top of those that are set.
    """
    importlib.import_module("tests.lighter")
    main = importlib.import_module(module).main
    out, err = io.StringIO(), io.StringIO()
    with ExitStack() as stack:
        for isolated in (_environment(env), chdir(cwd), _imports(cwd), logging_restored(), _randomness(), _hydra()):
            stack.enter_context(isolated)
        stack.enter_context(mpl.rc_context())
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        sys.argv = [f"python -m {module}", *arguments]
        try:
            status = main()
        except SystemExit as stopped:
            status = stopped.code
        except Exception:
            traceback.print_exc()
            status = 1
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    return subprocess.CompletedProcess([module, *arguments], int(status or 0), out.getvalue(), err.getvalue())


def train(cwd: Path, *overrides: str, **env: str) -> Done:
    """Run the main job to its end."""
    return run_command(cwd, "dnpo.train", *overrides, **env)


def succeed(cwd: Path, *overrides: str, **env: str) -> str:
    """Run the main job, which must succeed; return its output."""
    done = train(cwd, *overrides, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def summary(cwd: Path, pattern: str = "outputs/*/*/summary.json") -> dict[str, Any]:
    """The newest summary."""
    found: dict[str, Any] = json.loads(max(cwd.glob(pattern), key=lambda p: p.stat().st_mtime_ns).read_text())
    return found


def numbers(content: dict[str, Any]) -> list[dict[str, Any]]:
    """A summary's table without what depends on the clock."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in content["table"]]


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _imports(cwd: Path) -> Iterator[None]:
    """Let modules in a folder be imported, and forget them afterwards; also put the arguments back."""
    path, arguments, known = list(sys.path), sys.argv, set(sys.modules)
    sys.path.insert(0, str(cwd))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:], sys.argv = path, arguments
        for name in set(sys.modules) - known:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(cwd):
                del sys.modules[name]


@contextmanager
def logging_restored() -> Iterator[None]:
    """Restore every logger's handlers and level; close the files that a command opened."""
    named = logging.root.manager.loggerDict.values()
    known = [logging.root, *(each for each in named if isinstance(each, logging.Logger))]
    before = [(logger, logger.level, list(logger.handlers)) for logger in known]
    try:
        yield
    finally:
        for logger, level, handlers in before:
            for handler in set(logger.handlers) - set(handlers):
                handler.close()
            if logger.level != level:  # setting it empties the cache of every logger
                logger.setLevel(level)
            logger.handlers[:] = handlers


@contextmanager
def _randomness() -> Iterator[None]:
    """Restore the global random generators and the number of torch's threads."""
    states, threads = (random.getstate(), np.random.get_state(), torch.get_rng_state()), torch.get_num_threads()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.set_num_threads(threads)


@contextmanager
def _hydra() -> Iterator[None]:
    """Clear the two singletons in which Hydra keeps the present run."""
    try:
        yield
    finally:
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
