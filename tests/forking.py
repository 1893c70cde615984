"""Fork Python processes instead of starting them, because each of them would import torch and more for seconds.

They are real processes and children of the one that starts them, with their own signals, files, folder and environment.
Tests about the start of Python do not use this.
"""

import _posixsubprocess
import atexit
import gc
import logging
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import process, util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

FORKED = {
    *("torch.distributed.run", "dnpo.worker", "submitit.local._local", "submitit.core._submit"),
    *("warden.py", "engine_server.py"),
}
"""Modules and scripts that are forked."""

_start = _posixsubprocess.fork_exec
_left: list[Any] = []  # objects of the parent process whose collection would close files here


@contextmanager
def forking() -> Iterator[None]:
    """Fork the processes of ``FORKED`` that this process starts, and those that they start."""
    before = _posixsubprocess.fork_exec
    _replace(_fork)
    try:
        yield
    finally:
        _replace(before)


def _replace(function: Any) -> None:
    for library, name in ((_posixsubprocess, "fork_exec"), (subprocess, "_fork_exec")):
        setattr(library, name, function)


def _fork(command: Sequence[Any], executables: Any, *rest: Any) -> int:
    """Do what ``_posixsubprocess.fork_exec`` does, whose arguments these are."""
    python, *words = [os.fsdecode(word) for word in command]
    words = [word for word in words[:2] if word not in ("-u", "-m")] + words[2:]
    if python != sys.executable or not words or Path(words[0]).name not in FORKED:
        return int(_start(command, executables, *rest))
    close, kept, folder, environment, *pipes = rest[:12]
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        stream.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            gc.freeze()
            if rest[13]:
                os.setsid()
            if folder is not None:
                os.chdir(folder)
            if environment is not None:
                variables = dict(os.fsdecode(each).split("=", 1) for each in environment)
                os.environ.clear()
                os.environ.update(variables)
            _take_files(pipes, kept if close else None)
            _forget()
            status = _run(words)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    return child


def _take_files(pipes: Sequence[int], kept: Sequence[int] | None) -> None:
    """Make the given files the standard streams, and close all others except those to keep."""
    read, _, _, out, _, error, *failure = pipes
    for number, given in enumerate((read, out, error)):
        if given >= 0:
            os.dup2(given, number)
    for file in map(int, os.listdir("/proc/self/fd") if kept is not None else ()):
        if file > 2 and (file in failure or file not in (kept or ())):
            with suppress(OSError):
                os.close(file)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # which pytest replaces


def _forget() -> None:
    """Reset the state that a new Python does not have: handlers, threads, Hydra's singletons, random generators."""
    atexit._clear()
    threading._threading_atexits.clear()
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _left.extend(logging.root.handlers)
    logging.root.handlers.clear()
    process._children.clear()
    util._finalizer_registry.clear()
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    random.seed()
    np.random.seed()
    torch.seed()


def _run(words: list[str]) -> int:
    """Run a module or a script as Python does; return the exit status."""
    sys.argv = words
    status: Any = 0
    try:
        if words[0].endswith(".py"):
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
        else:
            sys.path.insert(0, os.getcwd())
            _left.append(sys.modules.pop(words[0], None))  # it is run, not imported
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as stopped:
        status = stopped.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return int(status or 0)


def fork_joblib() -> None:
    """Let joblib fork the processes of jobs, which warns because other programs may have started threads."""
    from joblib.externals.loky.backend.context import set_start_method

    set_start_method("fork")
