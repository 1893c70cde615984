"""The ledger: the questions that judges were asked and their answers, so that no question is paid for twice.

It is a SQLite file next to the store, in write-ahead mode (WAL), shared by all runs that name it. The key of a question
is a hash of the judge, its address and settings, the template, the order and the content. An answer is written as soon
as it arrives. A failure is recorded too, because of its cost, but is never used as an answer. A run that asks a
question holds a claim on it, so that concurrent runs wait for each other's answers. When a process is killed, its
claims expire at once.

``python -m dnpo.ledger [FILE]`` shows calls, hits and spend by judge, run and month.
"""

import hashlib
import json
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dnpo.errors import LedgerError

SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    key TEXT PRIMARY KEY, judge TEXT NOT NULL, model TEXT NOT NULL, template TEXT NOT NULL, "order" TEXT NOT NULL,
    content TEXT NOT NULL, value REAL NOT NULL, reply TEXT NOT NULL, tokens_in INTEGER NOT NULL,
    tokens_out INTEGER NOT NULL, cost REAL, latency REAL NOT NULL, attempts INTEGER NOT NULL, at TEXT NOT NULL,
    run TEXT NOT NULL, setting TEXT NOT NULL DEFAULT '', served TEXT NOT NULL DEFAULT ''
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failures (
    key TEXT NOT NULL, judge TEXT NOT NULL, model TEXT NOT NULL, reason TEXT NOT NULL, reply TEXT NOT NULL,
    tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL, cost REAL, at TEXT NOT NULL, run TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS hits (
    run TEXT NOT NULL, judge TEXT NOT NULL, model TEXT NOT NULL, month TEXT NOT NULL, hits INTEGER NOT NULL,
    PRIMARY KEY (run, judge, model, month)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS claims (key TEXT PRIMARY KEY, owner TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batches (
    id TEXT NOT NULL, endpoint TEXT NOT NULL, questions TEXT NOT NULL, at TEXT NOT NULL, PRIMARY KEY (endpoint, id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pace (endpoint TEXT PRIMARY KEY, requests REAL NOT NULL, tokens REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS settings (
    judge TEXT NOT NULL, model TEXT NOT NULL, id TEXT NOT NULL, content TEXT NOT NULL, PRIMARY KEY (judge, model, id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS served (
    judge TEXT NOT NULL, model TEXT NOT NULL, setting TEXT NOT NULL, served TEXT NOT NULL, at TEXT NOT NULL,
    PRIMARY KEY (judge, model, setting, served)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spent (run TEXT PRIMARY KEY, cost REAL NOT NULL) WITHOUT ROWID;
"""
# Convert format 1, whose keys did not include the judge's address, and which had no table of sums of costs.
FROM_1 = """
DROP INDEX IF EXISTS failures_by_run;
DROP INDEX IF EXISTS calls_by_run;
ALTER TABLE calls ADD COLUMN setting TEXT NOT NULL DEFAULT '';
ALTER TABLE calls ADD COLUMN served TEXT NOT NULL DEFAULT '';
INSERT INTO spent SELECT run, TOTAL(cost) FROM (
    SELECT run, cost FROM calls UNION ALL SELECT run, cost FROM failures
) GROUP BY run;
"""
VERSION = 2
COUNTED = ("calls", "failed", "hits", "tokens_in", "tokens_out", "cost", "unpriced")


@dataclass(frozen=True)
class Question:
    """A question to a judge.

    Attributes:
        judge: the kind of judge, with the settings that can change an answer.
        model: the model that is asked.
        template: name and hash of the template of the text.
        order: ``ab`` or ``ba`` if two responses are compared, otherwise "".
        content: SHA-256 of the messages.
        setting: the address and everything else that is sent, as JSON; "" for nothing. So an answer of one endpoint
            does not count for another one.
        messages: the messages to send; empty if only the answer is needed.
    """

    judge: str
    model: str
    template: str
    order: str
    content: str
    setting: str = ""
    messages: list[dict[str, str]] = field(default_factory=list, compare=False)

    @classmethod
    def make(
        cls, judge: str, model: str, template: str, order: str, messages: list[dict[str, str]], setting: str = ""
    ) -> "Question":
        """The question with these messages."""
        return cls(judge, model, template, order, _digest(messages), setting, messages)

    @cached_property
    def key(self) -> str:
        """SHA-256 of the whole question: the same question has the same key in every run."""
        if not self.setting:
            return self.old_key
        return _digest([self.judge, self.model, self.template, self.order, self.content, self.setting])

    @cached_property
    def old_key(self) -> str:
        """The key in format 1, which included neither addresses nor settings."""
        return _digest([self.judge, self.model, self.template, self.order, self.content])

    @cached_property
    def setting_id(self) -> str:
        """The beginning of the setting's hash, under which the ledger keeps the setting's text; "" for no setting."""
        return _digest(self.setting)[:16] if self.setting else ""


@dataclass(frozen=True)
class Answer:
    """The reply to a question.

    Attributes:
        value: a score from 0 to 100, or 100 × the probability that the first of two responses is better; None if the
            call failed.
        reply: the raw text.
        tokens_in, tokens_out: number of tokens by the server's count.
        cost: in US dollars; None if the price is not known.
        latency: seconds of the attempt that brought the reply.
        attempts: how often it was sent.
        reason: why there is no value.
        served: the model that answered, by the server's report (``model``, ``system_fingerprint``); "" without a
            report.
    """

    value: float | None
    reply: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = 0.0
    latency: float = 0.0
    attempts: int = 1
    reason: str = ""
    served: str = ""


class Ledger:
    """The calls of all runs in one file. It is opened at first use, and used by one thread of one process.

    Args:
        path: the file; created if it does not exist.
        run: the run, or the sweep, under which new calls and hits are recorded.
    """

    def __init__(self, path: Path, run: str = "") -> None:
        self.path, self.run = path.resolve(), run  # resolved, because claims and locks are next to the file itself
        self.owner = uuid.uuid4().hex
        self._alive: FileLock | None = None

    @cached_property
    def _db(self) -> sqlite3.Connection:
        db = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(f"{self.path.name}.lock")):
                db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
                self._prepare(db)
        except (sqlite3.Error, OSError) as error:
            if db is not None:
                db.close()
            raise LedgerError(
                f"ledger={self.path}: cannot be opened ({error}); expected a SQLite file, or a place to write one on a "
                "local disk"
            ) from error
        except LedgerError:
            if db is not None:
                db.close()
            raise
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, 1, VERSION):
            raise LedgerError(
                f"ledger={self.path}: has format {version}, this version of dnpo reads {VERSION}; give another file, "
                "or use the version that wrote it"
            )
        if version == 0:
            if db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
                raise LedgerError(f"ledger={self.path}: is a database of another program; give another file")
            db.execute("PRAGMA journal_mode=WAL")
        if version != VERSION:
            # in one transaction: a file with half of the tables would look like another program's
            change = FROM_1 if version == 1 else ""
            db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} {change} PRAGMA user_version={VERSION}; COMMIT;")
        # answers survive kill -9; only a power cut can lose the last ones
        db.execute("PRAGMA synchronous=NORMAL")

    def close(self) -> None:
        """Release the claims of this run, and close the file; a later use opens it again."""
        if "_db" not in self.__dict__:
            return
        if self._alive is not None:
            with suppress(LedgerError):  # claims that are not released expire when the process ends
                self._write("DELETE FROM claims WHERE owner = ?", (self.owner,))
            self._alive.release()
            self._sign(self.owner).unlink(missing_ok=True)
            self._alive = None
        self._db.close()
        del self._db

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- questions and answers

    def answers(self, keys: Sequence[str]) -> dict[str, float]:
        """The values of the questions that have been answered."""
        found: dict[str, float] = {}
        if "_db" not in self.__dict__ and not self.path.exists():
            return found  # looking up creates no file
        for some in _chunks(keys):
            marks = ",".join("?" * len(some))
            found |= dict(self._read(f"SELECT key, value FROM calls WHERE key IN ({marks})", some))
        return found

    def claim(self, keys: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
        """Split questions into three lists: this run must ask them, they are answered, another run is asking them."""
        self._show_alive()
        with self._transaction():
            answered = self.answers(keys)
            open_ = [key for key in keys if key not in answered]
            mine, alive = [], {self.owner: True}
            for key in open_:
                row = self._db.execute("SELECT owner FROM claims WHERE key = ?", (key,)).fetchone()
                holder = self.owner if row is None else row[0]
                # checked under the write lock; every owner locks its lock file before its first claim
                if holder not in alive:
                    alive[holder] = self._is_alive(holder)
                if holder == self.owner or not alive[holder]:
                    self._db.execute("INSERT OR REPLACE INTO claims VALUES (?, ?)", (key, self.owner))
                    mine.append(key)
        taken = set(mine)
        return mine, [key for key in keys if key in answered], [key for key in open_ if key not in taken]

    def record(self, question: Question, answer: Answer) -> None:
        """Record an answer, or the cost of a failure, and release the claim on the question."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with self._transaction():
            if answer.value is not None:
                written = self._db.execute(
                    "INSERT INTO calls VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (key) DO NOTHING",
                    (
                        *(question.key, question.judge, question.model, question.template, question.order),
                        *(question.content, answer.value, _drop_surrogates(answer.reply)),
                        *(answer.tokens_in, answer.tokens_out),
                        *(answer.cost, answer.latency, answer.attempts, now, self.run),
                        *(question.setting_id, _drop_surrogates(answer.served)),
                    ),
                )
                if written.rowcount:
                    self._spend(answer.cost)
                self._know(question, answer, now)
            else:
                self._failure(question, answer, now)
            self._db.execute("DELETE FROM claims WHERE key = ? AND owner = ?", (question.key, self.owner))

    def note_cost(self, question: Question, answer: Answer) -> None:
        """Record the cost of an attempt without a usable reply, while the question is asked again."""
        with self._transaction():
            self._failure(question, answer, datetime.now(UTC).isoformat(timespec="seconds"))

    def _failure(self, question: Question, answer: Answer, now: str) -> None:
        self._db.execute(
            "INSERT INTO failures VALUES (?,?,?,?,?,?,?,?,?,?)",
            (
                *(question.key, question.judge, question.model),
                *(_drop_surrogates(answer.reason), _drop_surrogates(answer.reply)),
                *(answer.tokens_in, answer.tokens_out, answer.cost, now, self.run),
            ),
        )
        self._spend(answer.cost)

    def _spend(self, cost: float | None) -> None:
        """Add to the run's sum of costs, in the transaction that records the call."""
        if cost:
            self._db.execute(
                "INSERT INTO spent VALUES (?,?) ON CONFLICT (run) DO UPDATE SET cost = cost + excluded.cost",
                (self.run, cost),
            )

    def _know(self, question: Question, answer: Answer, now: str) -> None:
        """Record the text of the setting, and the model that answered."""
        asked = (question.judge, question.model, question.setting_id)
        if question.setting:
            self._db.execute("INSERT OR IGNORE INTO settings VALUES (?,?,?,?)", (*asked, question.setting))
        if answer.served:
            served = (*asked, _drop_surrogates(answer.served), now)
            self._db.execute("INSERT OR IGNORE INTO served VALUES (?,?,?,?,?)", served)

    def served(self, question: Question) -> list[str]:
        """The models that have answered this judge's questions so far, the first one first."""
        rows = self._read(
            "SELECT served FROM served WHERE judge = ? AND model = ? AND setting = ? ORDER BY at",
            (question.judge, question.model, question.setting_id),
        )
        return [row[0] for row in rows]

    def settings(self, question: Question) -> list[str]:
        """The settings with which this judge and model have answered so far, including this question's."""
        rows = self._read(
            "SELECT content FROM settings WHERE judge = ? AND model = ?", (question.judge, question.model)
        )
        return [row[0] for row in rows]

    def endpoints(self) -> list[dict[str, str]]:
        """The endpoints that have answered: model, address, version, reported model, and time of its first answer."""
        rows = self._read(
            "SELECT s.model, json_extract(s.content, '$.address'), json_extract(s.content, '$.version'), w.served, w.at"
            " FROM settings s LEFT JOIN served w ON w.judge = s.judge AND w.model = s.model AND w.setting = s.id"
            " ORDER BY 1, 2, 5"
        )
        names = ("model", "address", "version", "calls itself", "since")
        found = [dict(zip(names, (str(value or "") for value in row), strict=True)) for row in rows]
        return [each for i, each in enumerate(found) if each not in found[:i]]

    def reply(self, key: str) -> str:
        """The last reply to a question, even if it is not an answer; "" if there is none."""
        rows = self._read(
            "SELECT reply, at FROM calls WHERE key = ? UNION ALL SELECT reply, at FROM failures WHERE key = ? "
            "ORDER BY at DESC",
            (key, key),
        )
        return next((row[0] for row in rows if row[0]), "")

    def release(self, keys: Iterable[str]) -> None:
        """Release claims without an answer."""
        with self._transaction():
            for key in keys:
                self._db.execute("DELETE FROM claims WHERE key = ? AND owner = ?", (key, self.owner))

    def hit(self, question: Question, count: int) -> None:
        """Count questions that the ledger answered, under the judge and model of ``question`` and the present month."""
        month = datetime.now(UTC).strftime("%Y-%m")
        self._write(
            "INSERT INTO hits VALUES (?,?,?,?,?) ON CONFLICT DO UPDATE SET hits = hits + excluded.hits",
            (self.run, question.judge, question.model, month, count),
        )

    def sum_costs(self) -> float:
        """The US dollars that this run has spent, including failures; calls without a known price count as 0."""
        rows = self._read("SELECT cost FROM spent WHERE run = ?", (self.run,))
        return float(rows[0][0]) if rows else 0.0

    def cost_of(self, key: str) -> float:
        """The cost of an answer in US dollars; 0 if there is no answer or its price is not known."""
        return float(self._read("SELECT TOTAL(cost) FROM calls WHERE key = ?", (key,))[0][0])

    # --- batches at a provider

    def batches(self, endpoint: str) -> dict[str, list[Question]]:
        """The submitted batches that are not collected, by id, with their questions (without messages)."""
        rows = self._read("SELECT id, questions FROM batches WHERE endpoint = ? AND questions != ''", (endpoint,))
        return {row[0]: [Question(*fields) for fields in json.loads(row[1])] for row in rows}

    def remember_batch(self, endpoint: str, batch: str, questions: Sequence[Question]) -> None:
        """Remember a batch until it is collected."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        fields = [(q.judge, q.model, q.template, q.order, q.content, q.setting) for q in questions]
        self._write("INSERT OR REPLACE INTO batches VALUES (?,?,?,?)", (batch, endpoint, json.dumps(fields), now))

    def forget_batch(self, endpoint: str, batch: str) -> None:
        """Forget a batch's questions, but remember that it was collected."""
        self._write("UPDATE batches SET questions = '' WHERE endpoint = ? AND id = ?", (endpoint, batch))

    def was_collected(self, endpoint: str, batch: str) -> bool:
        """Whether all results of this batch have been recorded."""
        query = "SELECT 1 FROM batches WHERE endpoint = ? AND id = ? AND questions = ''"
        return bool(self._read(query, (endpoint, batch)))

    # --- ceilings

    def slot(self, endpoint: str, request_seconds: float, token_seconds: float) -> float:
        """Reserve the next slot in an endpoint's schedule, which all runs on this ledger share.

        Args:
            request_seconds: 60 divided by the number of requests allowed in a minute.
            token_seconds: 60 × the tokens of this call, divided by the number of tokens allowed in a minute.

        Returns:
            Seconds to wait before sending.
        """
        now = time.time()
        with self._transaction():
            row = self._db.execute("SELECT requests, tokens FROM pace WHERE endpoint = ?", (endpoint,)).fetchone()
            start = max(now, *(row or (now, now)))
            self._db.execute(
                "INSERT OR REPLACE INTO pace VALUES (?,?,?)", (endpoint, start + request_seconds, start + token_seconds)
            )
        return start - now

    # --- reading

    def rows(self) -> list[dict[str, Any]]:
        """Calls, hits, failures, tokens and spend by judge, model, run and month; the latest month last."""
        parts = [
            "SELECT judge, model, run, substr(at, 1, 7) AS month, COUNT(*) AS calls, 0 AS failed, 0 AS hits,"
            " SUM(tokens_in) AS tokens_in, SUM(tokens_out) AS tokens_out, SUM(cost) AS cost, SUM(cost IS NULL) AS free"
            " FROM calls GROUP BY 1, 2, 3, 4",
            "SELECT judge, model, run, substr(at, 1, 7), 0, COUNT(*), 0, SUM(tokens_in), SUM(tokens_out), SUM(cost),"
            " SUM(cost IS NULL) FROM failures GROUP BY 1, 2, 3, 4",
            "SELECT judge, model, run, month, 0, 0, hits, 0, 0, 0.0, 0 FROM hits",
        ]
        query = (
            "SELECT judge, model, run, month, SUM(calls) AS calls, SUM(failed) AS failed, SUM(hits) AS hits,"
            " SUM(tokens_in) AS tokens_in, SUM(tokens_out) AS tokens_out, TOTAL(cost) AS cost, SUM(free) AS unpriced"
            f" FROM ({' UNION ALL '.join(parts)}) GROUP BY 1, 2, 3, 4 ORDER BY month, run, judge, model"
        )
        names = ("judge", "model", "run", "month", *COUNTED)
        return [dict(zip(names, row, strict=True)) for row in self._read(query)]

    # --- the file

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # an error such as a full disk may have ended it already
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise  # not an error that users can fix
        except sqlite3.DatabaseError as error:
            raise LedgerError(
                f"ledger={self.path}: {error}; every answer that was written is kept. Check that the disk has room and "
                "is local, and that no other program holds the file; then run the same command again"
            ) from error

    def _read(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._errors():
            return self._db.execute(query, values).fetchall()

    def _write(self, statement: str, values: tuple[Any, ...]) -> None:
        with self._transaction():
            self._db.execute(statement, values)

    def _sign(self, owner: str) -> Path:
        return self.path.with_name(f"{self.path.name}.claims") / f"{owner}.lock"

    def _show_alive(self) -> None:
        """Hold a lock while this process lives; the system releases it when the process ends."""
        if self._alive is not None:
            return
        _ = self._db  # creates the folder, or raises
        sign = self._sign(self.owner)
        try:
            sign.parent.mkdir(exist_ok=True)
            # locked under another name first, so that other processes never find the file unlocked
            lock = FileLock(sign.with_suffix(".new"))
            lock.acquire()
            sign.with_suffix(".new").replace(sign)
        except OSError as error:
            raise LedgerError(f"ledger={self.path}: {sign.parent} cannot be written ({error.strerror})") from error
        self._alive = lock

    def _is_alive(self, owner: str) -> bool:
        sign = self._sign(owner)
        if not sign.is_file():
            return False
        lock = FileLock(sign)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        sign.unlink(missing_ok=True)
        return False


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def _drop_surrogates(text: str) -> str:
    """Drop halves of surrogate pairs. JSON can contain them; UTF-8, and therefore SQLite, cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _chunks(keys: Sequence[str], size: int = 500) -> Iterator[list[str]]:
    for start in range(0, len(keys), size):
        yield list(keys[start : start + size])


def sum_by(rows: Sequence[Mapping[str, Any]], *names: str) -> list[dict[str, Any]]:
    """Rows of :meth:`Ledger.rows` added up by some of their columns."""
    sums: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        group = tuple(row[name] for name in names)
        total = sums.setdefault(group, {**dict(zip(names, group, strict=True)), **dict.fromkeys(COUNTED, 0)})
        for name in COUNTED:
            total[name] += row[name]
    return list(sums.values())
