"""The responses that a policy gives during its training: one rollout after another, each judged at once.

Every rollout is one file in the training's folder, written before a checkpoint can name it and read again after a kill.
"""

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnpo.errors import JudgeError
from dnpo.generate import Live
from dnpo.judges import Judge, ask, make_verdict, too_many
from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.meanwhile import Meanwhile
from dnpo.optimise.live import require
from dnpo.records import HUMAN, Response, Rollout, Verdict, policy_source
from dnpo.seeding import derive
from dnpo.stages.plan import Facts, Plan, Run, Task
from dnpo.store import Report, write_json
from dnpo.tables import read, read_all, write

if TYPE_CHECKING:
    from dnpo.evaluate import Held
    from dnpo.policy.model import Policy

ROLLOUTS = "rollouts"  # folder of files by rollout, and name of the file into which they are joined


@dataclass(frozen=True)
class Chunks:
    """The prompts of each rollout: successive parts of passes over all prompts, each pass in a new order.

    Args:
        prompts: number of prompts.
        size: number of prompts of a rollout; 0: all.
        seed: seed of the orders.
    """

    prompts: int
    size: int
    seed: int

    @property
    def per_pass(self) -> int:
        """Number of rollouts in a pass."""
        return len(self._groups(0))

    def of(self, rollout: int) -> list[int]:
        """The numbers of a rollout's prompts, in the order of the data."""
        passed, index = divmod(rollout, self.per_pass)
        return sorted(self._groups(passed)[index])

    @cache  # noqa: B019  # one small object for each training
    def _groups(self, passed: int) -> list[tuple[int, ...]]:
        from dnpo.optimise.steps import schedule

        return schedule(self.prompts, self.size or self.prompts, 1, derive(self.seed, "pass", passed), None)


class Responder:
    """Lets a policy respond to the prompts of one rollout after another, and a judge score the responses.

    Args:
        how: how the policy responds, and when.
        train: the iteration's prompts, with the human responses.
        writer: the policy that responds, with its weights at that moment.
        judge: scores the responses; None if they need no scores.
        admits_human: whether the human responses are judged too.
        total: number of rollouts in the whole training.
        ledger: stores the judge's replies.
        source: ``source`` of the responses.
        limit: maximum number of completion tokens.
        seed: seed of the samples.
        folder: the training's folder.
        report: receives notes.
    """

    def __init__(
        self,
        how: Live,
        train: "Held",
        writer: "Policy",
        judge: Judge | None,
        *,
        admits_human: bool,
        total: int,
        ledger: Ledger,
        source: str,
        limit: int,
        seed: int,
        folder: Path,
        report: Report,
    ) -> None:
        self.how, self.train, self.writer, self.judge, self.admits_human = how, train, writer, judge, admits_human
        self.ledger, self.source, self.limit, self.seed = ledger, source, limit, seed
        self.folder, self.report = folder / ROLLOUTS, Within(report)
        self.chunks = Chunks(len(train.prompts), how.prompts, seed)
        self.total = total
        self.waiting: dict[int, Future[list[Verdict]]] = {}
        self.meanwhile: Meanwhile | None = None
        self.folder.mkdir(exist_ok=True)
        done = read_all(sorted(self.folder.glob("*.parquet")), Rollout)  # made by a training that was killed
        self.unscored = [row.reason for row in done if row.score is None]

    @property
    def most(self) -> int:
        """The maximum number of responses that are judged in the whole training."""
        return self.count_until(self.total)

    def count_until(self, rollouts: int) -> int:
        """The maximum number of responses that are judged in the first ``rollouts`` rollouts."""
        passes, rest = divmod(rollouts, self.chunks.per_pass)
        prompts = passes * self.chunks.prompts + sum(len(self.chunks.of(rollout)) for rollout in range(rest))
        return prompts * (self.how.samples + self.admits_human)

    def prompts(self, rollout: int) -> "Held":
        """The prompts of a rollout, with the human responses."""
        from dnpo.evaluate import Held

        numbers = self.chunks.of(rollout)
        return Held([self.train.prompts[i] for i in numbers], [self.train.human[i] for i in numbers])

    def ask(self, rollout: int) -> None:
        """Let the policy respond, and start the judge if it works in the background."""
        if self.has(rollout):
            return
        responses = self._respond(rollout)
        if self.how.ahead_by and self.judge is not None:
            self._judge_meanwhile(rollout, responses)

    def take(self, rollout: int, step: int) -> list[Rollout]:
        """The scored responses of a rollout: human ones if they are judged, then the policy's.

        Args:
            step: the policy step that came next when the policy responded.
        """
        path = self._file(rollout)
        if path.is_file():
            return read(path, Rollout)
        responses = self._respond(rollout)
        waiting = self.waiting.pop(rollout, None)
        verdicts = self._judge(rollout, responses) if waiting is None else waiting.result()
        self._count_unscored(verdicts)
        prompts = {prompt.id: prompt.token_ids for prompt in self.prompts(rollout).prompts}
        rows = [
            Rollout(
                id=r.id,
                source=r.source,
                text=r.text,
                prompt_ids=prompts[r.id],
                token_ids=r.token_ids,
                tokens=r.tokens,
                finish=r.finish,
                logprob=r.logprob,
                sample=r.sample,
                score=verdict.score,
                reason=verdict.reason,
                rollout=rollout,
                step=step,
                disagreement=verdict.disagreement,
            )
            for r, verdict in zip(self._candidates(rollout, responses), verdicts, strict=True)
        ]
        write(path, rows, Rollout)
        shutil.rmtree(self._responses(rollout), ignore_errors=True)
        return rows

    def has(self, rollout: int) -> bool:
        """Whether a rollout is on the disk."""
        return self._file(rollout).is_file()

    def check(self, rollouts: int) -> None:
        """Check that the first ``rollouts`` rollouts are on the disk; see :class:`dnpo.optimise.live.Source`."""
        require([self._file(rollout) for rollout in range(rollouts)])

    def _respond(self, rollout: int) -> list[Response]:
        """The policy's responses; responses on the disk are not made again."""
        from dnpo.generate import hf

        some, folder = self.prompts(rollout), self._responses(rollout)
        folder.mkdir(exist_ok=True)
        seed = derive(self.seed, "rollout", rollout) if rollout else self.seed  # the first: as for responses made ahead
        told: dict[str, Any] = {"source": self.source, "limit": self.limit, "seed": seed, "report": self.report}
        if not self.how.segment:
            return list(hf.generate(self.writer, some.prompts, self.how, **told, folder=folder))
        path = folder / "segments.parquet"
        if not path.is_file():
            from dnpo.generate.segment import regenerate

            how = self.how
            responses, counts = regenerate(self.writer, some.prompts, some.human, how, length=how.segment, **told)
            write_json(self._counts(rollout), counts)
            write(path, responses, Response)
        return read(path, Response)

    def count(self, rollout: int) -> dict[str, int]:
        """The numbers of a rollout's segments, of repeated draws and of dropped segments."""
        path = self._counts(rollout)
        counts: dict[str, int] = json.loads(path.read_text()) if path.is_file() else {}
        return counts

    def _candidates(self, rollout: int, responses: Sequence[Response]) -> list[Response]:
        return [*(self.prompts(rollout).human if self.admits_human else ()), *responses]

    def _judge(self, rollout: int, responses: Sequence[Response]) -> list[Verdict]:
        candidates = self._candidates(rollout, responses)
        if self.judge is None:
            return [make_verdict(response, None, "there is no judge") for response in candidates]
        return ask(self.judge, self.prompts(rollout).prompts, candidates, self.ledger, self.report)

    def _judge_meanwhile(self, rollout: int, responses: Sequence[Response]) -> None:
        if self.meanwhile is None:
            assert self.judge is not None, "a judge that works in the background"
            self.meanwhile = Meanwhile(self.judge, self.ledger, self.report)
        candidates = self._candidates(rollout, responses)
        self.waiting[rollout] = self.meanwhile.ask(self.prompts(rollout).prompts, candidates)

    def close(self) -> None:
        """End the judge's process in the background."""
        if self.meanwhile is not None:
            self.meanwhile.close()

    def _count_unscored(self, verdicts: Sequence[Verdict]) -> None:
        """Stop once more verdicts lack a score than the judge's ``max_unscored`` allows in the whole training.

        Raises:
            JudgeError: too many verdicts lack a score.
        """
        judge = self.judge
        if judge is None or not judge.gives_scores:
            return
        self.unscored += [verdict.reason for verdict in verdicts if verdict.score is None]
        if len(self.unscored) > judge.max_unscored * self.most:
            what = "responses of the whole training"
            raise JudgeError(too_many(len(self.unscored), self.most, judge.max_unscored, self.unscored, what))

    def _file(self, rollout: int) -> Path:
        return self.folder / f"{rollout:06d}.parquet"

    def _counts(self, rollout: int) -> Path:
        return self.folder / f"{rollout:06d}.json"

    def _responses(self, rollout: int) -> Path:
        return self.folder / f"{rollout:06d}"


def make_responder(run: Run, plan: Plan, task: Task, train: "Held", writer: "Policy", judge: Judge | None) -> Responder:
    """Make the responder of a training."""
    how, trainer = plan.rollout, plan.trainer
    assert isinstance(how, Live), "a live rollout"
    return Responder(
        how,
        train,
        writer,
        judge,
        admits_human=plan.makes_pairs and plan.dsl.needs_scores and plan.dsl.admits_human,
        total=count_rollouts(how, len(train.prompts), trainer.epochs, trainer.steps),
        ledger=run.ledger,
        source=policy_source(plan.k),
        limit=run.limit,
        seed=derive(run.seed, "generate", plan.k),
        folder=task.folder,
        report=task.report,
    )


def count_rollouts(how: Live, prompts: int, epochs: int, steps: int) -> int:
    """The number of rollouts of a whole training."""
    if not how.every:
        return 1
    per_pass = Chunks(prompts, how.prompts, 0).per_pass
    return -(-steps // how.every) if steps else epochs * per_pass


def gather(folder: Path) -> Facts:
    """Put the rollouts of a training into one file, and count them."""
    rows = read_all(sorted((folder / ROLLOUTS).glob("*.parquet")), Rollout)
    write(folder / "rollouts.parquet", rows, Rollout)
    own = [row for row in rows if row.source != HUMAN]
    cut = sum(row.finish == "length" for row in own)
    return {"responses": len(own), "cut": cut, "tokens": sum(row.tokens for row in own)}


def as_response(row: Rollout) -> Response:
    """The response of a rollout, without its score."""
    return Response(row.id, row.source, row.text, row.token_ids, row.tokens, row.finish, row.logprob, row.sample)


def as_verdict(row: Rollout) -> Verdict:
    """The verdict on a rollout's response."""
    return Verdict(row.id, row.source, row.score, row.reason, row.disagreement, row.sample)


class Within:
    """Reports work that is repeated within a stage: each note is passed on once, progress is not."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.told: set[str] = set()

    def begin(self, total: int, unit: str, done: int = 0) -> None:
        """Do nothing."""

    def advance(self, amount: int = 1) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Pass on a note that has not been passed on yet."""
        if text not in self.told:
            self.told.add(text)
            self.report.note(text)

    def status(self, text: str) -> None:
        """Do nothing."""

    def steps(self, rows: list[dict[str, float]]) -> None:
        """Do nothing."""
