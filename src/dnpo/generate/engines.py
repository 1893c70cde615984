"""Choose where a stage's responses are sampled: in this process, or by servers that run only while needed."""

import json
import shutil
from pathlib import Path
from typing import Self

from dnpo.generate import Sampling
from dnpo.generate.hf import Engine
from dnpo.generate.server import Server
from dnpo.generate.server.session import Differences, Session
from dnpo.policy.model import Policy
from dnpo.store import Report, write_json

WORK, RESULT = "engine", "engine.json"  # in a stage's folder: replies during its work, differences at its end


class Engines:
    """The engines of a stage, all with the same policy. Its ``with`` block ends the servers that it started.

    Args:
        policy: the policy that responds.
        folder: the stage's folder.
        saved: a folder with the policy's whole weights; without it, or without weights in it, they are written when
            needed.
        report: receives notes.
    """

    def __init__(self, policy: Policy, folder: Path, saved: Path | None, report: Report) -> None:
        self.policy, self.folder, self.report = policy, folder, report
        self.saved = saved if saved is not None and (saved / "config.json").is_file() else None
        self._sessions: list[tuple[Server, Session]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for _server, session in self._sessions:
            session.close()

    def of(self, sampling: Sampling) -> Engine | None:
        """The engine that samples in this way; None for this process."""
        server = sampling.engine
        if server is None:
            return None
        known = [session for each, session in self._sessions if each == server]
        if not known:
            folder = self.folder / f"{WORK}-{len(self._sessions)}"
            known = [Session(server, self.policy, self.saved, folder, self.report)]
            self._sessions.append((server, known[0]))
        return known[0]

    def finish(self) -> dict[str, float]:
        """Report the differences between servers and this process, and remove the replies; called when a stage is done.

        Returns:
            ``engine_mean`` and ``engine_max``, in nats a token; nothing if no server was asked.
        """
        path = self.folder / RESULT
        if not self._sessions:
            return {}
        if not path.is_file():
            found = sum((session.measured() for _, session in self._sessions), Differences())
            self.report.note(f"log-probabilities, engine against this process: they differ by {found}")
            write_json(path, {"engine_mean": found.mean, "engine_max": found.greatest})
        for _, session in self._sessions:
            shutil.rmtree(session.folder, ignore_errors=True)
        numbers: dict[str, float] = json.loads(path.read_text())
        return numbers
