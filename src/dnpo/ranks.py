"""The processes that share the work of a stage, each with its rank; a process alone has rank 0 of 1.

All ranks execute the same code, each on its share of the rows. Rank 0 alone writes and reports what all have in common.
"""

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from dnpo.errors import DnpoError

if TYPE_CHECKING:
    from torch import Tensor

Row = TypeVar("Row")
Result = TypeVar("Result")

PATIENCE = timedelta(days=7)  # the launcher ends all ranks as soon as one fails, so no rank waits in vain
BUCKET = 2**28  # bytes that are summed over ranks at once
_place = (0, 1, 1)


class FailedElsewhere(Exception):
    """Another rank failed, and reports why."""


def join(rank: int, world: int, here: int, **how: Any) -> None:
    """Become one of several ranks.

    Args:
        here: the number of ranks on this machine.
        how: passed to ``torch.distributed.init_process_group``; by default the launcher's variables are read.
    """
    global _place
    import torch
    from torch import distributed

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, rank=rank, world_size=world, timeout=PATIENCE, **how)
    _place = (rank, world, here)


def rank() -> int:
    """The number of this process among those that share the work, from 0."""
    return _place[0]


def world() -> int:
    """The number of processes that share the work."""
    return _place[1]


def here() -> int:
    """How many of these processes run on this machine."""
    return _place[2]


def leads() -> bool:
    """Whether this process writes and reports what all ranks have in common."""
    return rank() == 0


def share(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows that this rank works on: row ``rank()``, and every ``world()``-th row after it."""
    return rows if world() == 1 else rows[rank() :: world()]


def gather(compute: Callable[[], Result]) -> list[Result]:
    """Compute a small value on every rank, and return the values of all ranks, in the order of the ranks.

    Raises:
        DnpoError, RuntimeError: ``compute`` raised it on some rank; now every rank raises it.
        FailedElsewhere: ``compute`` raised an error of another type on another rank.
    """
    if world() == 1:
        return [compute()]
    from torch import distributed

    value, failure, error = None, None, None
    try:
        value = compute()
    except Exception as raised:
        kind = type(raised) if isinstance(raised, DnpoError | RuntimeError) else FailedElsewhere
        error, failure = raised, (kind, str(raised))
    everything: list[Any] = [None] * world()
    distributed.all_gather_object(everything, (value, failure))
    if error is not None:
        raise error
    for number, (_, failed) in enumerate(everything):
        if failed is not None:
            raise failed[0](failed[1]) from FailedElsewhere(f"rank {number}")
    return [value for value, _ in everything]


def join_shares(values: Sequence[Result]) -> list[Result]:
    """Return the values of all rows, in their order, from the values of each rank's share."""
    parts = gather(lambda: list(values))
    found: list[Any] = [None] * sum(map(len, parts))
    for number, part in enumerate(parts):
        found[number :: len(parts)] = part
    return found


def wait() -> None:
    """Wait until all ranks have reached this point."""
    gather(lambda: None)


def sum_(tensors: Iterable["Tensor"]) -> None:
    """Replace tensors by their sums over all ranks, many at once."""
    import torch
    from torch import distributed

    left = list(tensors)
    while left:
        some: list[Tensor] = []
        while left and left[0].dtype == (some or left)[0].dtype and sum(tensor.nbytes for tensor in some) < BUCKET:
            some.append(left.pop(0))
        flat = torch.cat([tensor.reshape(-1) for tensor in some])
        distributed.all_reduce(flat)
        totals = torch.split(flat, [tensor.numel() for tensor in some])
        for tensor, total in zip(some, totals, strict=True):
            tensor.copy_(total.view_as(tensor))
