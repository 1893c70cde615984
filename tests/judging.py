"""Questions for the judge by API, and a process that asks them, which imports neither torch nor pytest.

python -m tests.judging BASE_URL FOLDER COUNT      prints scored N; the ledger lies in the folder
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnpo import interrupts
from dnpo.errors import JudgeError
from dnpo.judges import Judge, make_verdict
from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.asked.openai import OpenAI
from dnpo.records import Prompt, Response, Verdict


class Silence:
    """A report that is not read."""

    def begin(self, total: int, unit: str, done: int = 0) -> None:
        pass

    def advance(self, amount: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def status(self, text: str) -> None:
        pass

    def steps(self, rows: list[dict[str, float]]) -> None:
        pass


def rows(count: int, text: str = "Paris, of course. Score: 100") -> tuple[list[Prompt], list[Response]]:
    """Prompts with one response each, all different; the responses ask for a score."""
    prompts = [Prompt(str(i), [{"role": "user", "content": f"Question {i}?"}], f"human {i}") for i in range(count)]
    return prompts, [Response(p.id, "policy@0", f"{text} ({p.id})", [], 0, "eos") for p in prompts]


@dataclass(frozen=True)
class Obedient(Judge):
    """Scores by the id of its process, and obeys a command in the first response."""

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Any
    ) -> list[Verdict]:
        asked = responses[0].text
        if asked == "note":
            report.note("a note")
        if asked == "refuse":
            raise JudgeError("judge: it will not")
        if asked == "fail":
            raise ZeroDivisionError("a fault of the judge")
        if asked == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if asked == "sleep":
            time.sleep(60)
        return [make_verdict(response, float(os.getpid()), asked) for response in responses]


@dataclass(frozen=True)
class Stuck(Judge):
    """Has an attribute that cannot be sent to another process."""

    how: Callable[[], int] = lambda: 1

    def __call__(self, *_: Any) -> list[Verdict]:
        return []


@contextmanager
def _status_of_signals() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interrupt:
        sys.exit(interrupts.exit_status(interrupt))


def main() -> None:
    """Ask, and print how many responses have a score; signals are handled as in a run."""
    base_url, folder, count = sys.argv[1:]
    judge = OpenAI(model="judge", base_url=base_url, concurrency=8, max_unscored=1.0)
    with _status_of_signals(), interrupts.raised(), Ledger(Path(folder) / "ledger.sqlite", "run") as ledger:
        print("scored", sum(v.score is not None for v in judge(*rows(int(count)), ledger, Silence())))


if __name__ == "__main__":
    main()
