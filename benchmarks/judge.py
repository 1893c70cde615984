"""Judging by API under faults: are verdicts right, is no question paid for twice, are slots full, is memory constant?

    python -m benchmarks.judge                                  # 10,000 calls, a mix of faults
    python -m benchmarks.judge --faults none --concurrency 64

The tests' server runs in another process. Throughput is attempts per second, divided by the maximum with full slots:
the concurrency divided by the mean seconds of an attempt, which the server measures.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import openai  # noqa: F401  (imported here so that the import is not measured)
from tests.judge_server import expected, is_hopeless, judge_server

from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.asked.openai import OpenAI
from dnpo.records import Prompt, Response


class Watch:
    """A report that records the resident memory."""

    def __init__(self, total: int) -> None:
        self.done, self.total = 0, total
        self.megabytes: dict[int, float] = {}

    def begin(self, total: int, unit: str, done: int = 0) -> None: ...

    def note(self, text: str) -> None: ...

    def status(self, text: str) -> None: ...

    def steps(self, rows: list[dict[str, float]]) -> None: ...

    def advance(self, amount: int = 1) -> None:
        self.done += amount
        percent = 100 * self.done // self.total
        if percent in (10, 50, 100) and percent not in self.megabytes:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.megabytes[percent] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--latency", type=float, default=0.3, help="mean seconds of a proper reply")
    parser.add_argument("--faults", default="mix")
    parser.add_argument("--hopeless", type=float, default=0.02, help="share of questions never answered properly")
    parser.add_argument("--timeout", type=float, default=5.0)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()

    prompts = [Prompt(str(i), [{"role": "user", "content": f"Question {i}?"}], "") for i in range(given.calls)]
    responses = [Response(p.id, "policy@0", f"Answer {p.id}. Score: 100", [], 0, "eos") for p in prompts]
    hopeless = given.hopeless if given.faults != "none" else 0.0
    flags = {"latency": given.latency, "faults": given.faults, "hopeless": hopeless, "slow": 4, "flood": 2}
    with judge_server(**flags) as server, tempfile.TemporaryDirectory() as folder:
        judge = OpenAI(
            model="judge", base_url=server.base_url, concurrency=given.concurrency, timeout=given.timeout,
            max_replies=4, max_unscored=1.0,
        )  # fmt: skip
        rows = zip(prompts, responses, strict=True)
        asked = [judge.wording.messages(p.messages, r.text)[-1]["content"] for p, r in rows]
        truth = [None if is_hopeless(text, hopeless) else float(expected(text)) for text in asked]
        with Ledger(Path(folder) / "ledger.sqlite") as ledger:
            watch, cpu, started = Watch(given.calls), time.process_time(), time.monotonic()
            verdicts = judge(prompts, responses, ledger, watch)
            wall, cpu = time.monotonic() - started, time.process_time() - cpu
        stats = server.stats()
    pairs = list(zip(verdicts, truth, strict=True))
    proper = sum(t is not None for t in truth)
    mean = stats["busy"] / stats["attempts"]
    found = {
        "calls": given.calls,
        "answered properly": proper,
        "verdicts right": sum(v.score == t for v, t in pairs if t is not None),
        "invented": sum(v.score is not None for v, t in pairs if t is None),
        "paid twice": stats["paid_twice"],
        "attempts": stats["attempts"],
        "mean seconds of an attempt": round(mean, 4),
        "wall seconds": round(wall, 1),
        "throughput / (concurrency / latency)": round(stats["attempts"] / wall / (given.concurrency / mean), 3),
        "client CPU ms an attempt": round(1000 * cpu / stats["attempts"], 2),
        "resident MB at 10, 50, 100 %": [round(watch.megabytes[p], 1) for p in (10, 50, 100)],
    }
    for name, value in found.items():
        print(f"{name:<42}{value}")
    given.results.mkdir(exist_ok=True)
    written = json.dumps(found | {"options": vars(given)}, indent=1, default=str)
    (given.results / "judge.json").write_text(written + "\n")


if __name__ == "__main__":
    main()
