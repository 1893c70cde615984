"""Call a function on many items in threads that do not keep an interrupted process from ending.

Python waits for the threads of ``concurrent.futures`` before it ends, and a signal that arrives while they are started
or woken can make it wait forever. These threads are daemons, and the caller waits in C code, where a signal leaves
nothing half done.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_threads(work: Callable[[Item], Result], items: Sequence[Item], threads: int) -> Iterator[Result]:
    """Yield ``work(item)`` for each item, in order.

    If the caller stops early, no further calls begin; those that have begun end by themselves or with the process.

    Args:
        threads: number of calls at once; at least 1.

    Raises:
        BaseException: raised by a call; it is raised here when the call's turn comes.
    """
    waiting = deque(enumerate(items))
    finished: SimpleQueue[tuple[int, Callable[[], Result]]] = SimpleQueue()

    def call() -> None:
        while True:
            try:
                number, item = waiting.popleft()
            except IndexError:
                return
            finished.put((number, _outcome(work, item)))

    early: dict[int, Callable[[], Result]] = {}
    try:
        for _ in range(min(threads, len(items))):
            threading.Thread(target=call, daemon=True).start()
        for turn in range(len(items)):
            while turn not in early:
                number, outcome = finished.get()
                early[number] = outcome
            yield early.pop(turn)()
    finally:
        waiting.clear()


def _outcome(work: Callable[[Item], Result], item: Item) -> Callable[[], Result]:
    """A function that returns what ``work(item)`` returned, or raises what it raised."""
    try:
        result = work(item)
    except BaseException as error:
        raised = error

        def fail() -> Result:
            raise raised

        return fail
    return lambda: result
