"""Run a function on several ranks; each is a process forked from a server with all imports."""

import copy
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dnpo import ranks
from dnpo.policy.packing import register
from tests.commands import _FORKS

LONGEST = 120.0  # seconds


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return the function's result or error on each rank; None for a killed rank.

    Args:
        function: a function of a module; it is called with the arguments.
    """
    with tempfile.TemporaryDirectory() as folder:
        rest = (count, Path(folder), function, arguments)
        processes = [_FORKS.Process(target=_be, args=(rank, *rest), daemon=True) for rank in range(count)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(LONGEST)
            process.kill()
            process.join()
        files = [Path(folder) / str(rank) for rank in range(count)]
        return [pickle.loads(file.read_bytes()) if file.is_file() else None for file in files]


def succeed(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return the function's result on each rank."""
    found = on_ranks(count, function, *arguments)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    assert None not in found, "a rank has ended before its time"
    return found


def _be(rank: int, count: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    register()  # not done yet in this process if the policy comes from another one
    os.environ["LOCAL_RANK"] = str(rank)  # as torchrun sets it
    ranks.join(rank, count, count, init_method=f"file://{folder / 'meeting'}")
    try:
        result = function(*copy.deepcopy(arguments))  # otherwise ranks would share the memory of the tensors
    except BaseException as error:  # including pytest's exceptions
        error.add_note(traceback.format_exc())
        result = error
    (folder / f"{rank}.part").write_bytes(pickle.dumps(result))
    (folder / f"{rank}.part").rename(folder / str(rank))
    os._exit(0)
