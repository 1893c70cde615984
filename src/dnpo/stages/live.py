"""Training on what the policy generates while it is trained: rollouts, their judging and labelling, between steps.

The functions are those of the stages that come before a training otherwise: ``generate``, ``judge``, ``label`` and
``reference``. Everything that is made is written before a checkpoint can name it, one file for each rollout, and read
again after a kill; when training is over, the files become one of responses and one of pairs.
"""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal

from dnpo import dsl
from dnpo.errors import JudgeError, SettingsError
from dnpo.generate import Ahead, Live
from dnpo.judges import Judge, ask, make_verdict, tally, too_many
from dnpo.judges.asked.ledger import Ledger
from dnpo.optimise.live import Clock
from dnpo.records import (
    HUMAN,
    Pair,
    Prompt,
    Response,
    Rollout,
    Verdict,
    policy_source,
    read,
    read_all,
    write,
    write_preferences,
)
from dnpo.seeding import derive
from dnpo.stages.plan import Facts, Plan, Run, Task
from dnpo.store import Report, write_json

if TYPE_CHECKING:
    from dnpo.evaluate import Held
    from dnpo.optimise.ema import Average
    from dnpo.optimise.npo import NoiseModule
    from dnpo.optimise.pairs import Scored
    from dnpo.policy.model import Policy

ROLLOUTS, PAIRS = "rollouts", "pairs"  # folders of files by rollout, and the names of the files that they become
COUNTED = ("pairs", "flipped", "identical", "unscored", "repeated", "tied", "wrong", "segments", "redrawn", "dropped")


@dataclass(frozen=True)
class Chunks:
    """Which prompts each rollout responds to: passes over all prompts, each in a new order.

    Args:
        prompts: number of prompts.
        size: prompts at a time; 0: all.
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
        from dnpo.optimise.batches import schedule

        return schedule(self.prompts, self.size or self.prompts, 1, derive(self.seed, "pass", passed), None)


class Responder:
    """Lets a policy respond to the prompts of one rollout after another, and a judge score the responses.

    Args:
        how: how the policy responds, and when.
        train: the iteration's prompts, with the human responses.
        writer: the policy that responds, as it is at that moment.
        judge: scores the responses; None: nobody does.
        admits_human: whether the human responses are judged too.
        total: number of rollouts of the whole training.
        ledger: stores the judge's replies.
        source: ``source`` of the responses.
        limit: maximum number of completion tokens.
        seed: seed of the samples.
        folder: the training's folder.
        report: hears of notes.
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
        self.unscored: list[str] = []  # the reasons
        self.folder.mkdir(exist_ok=True)

    @property
    def most(self) -> int:
        """The greatest number of responses that are judged in the whole training."""
        return self.count_until(self.total)

    def count_until(self, rollouts: int) -> int:
        """The greatest number of responses that are judged in the first so many rollouts."""
        passes, rest = divmod(rollouts, self.chunks.per_pass)
        prompts = passes * self.chunks.prompts + sum(len(self.chunks.of(rollout)) for rollout in range(rest))
        return prompts * (self.how.samples + self.admits_human)

    def prompts(self, rollout: int) -> "Held":
        """The prompts of a rollout, with the human responses."""
        from dnpo.evaluate import Held

        numbers = self.chunks.of(rollout)
        return Held([self.train.prompts[i] for i in numbers], [self.train.human[i] for i in numbers])

    def ask(self, rollout: int) -> None:
        """Let the policy respond, and the judge begin if it works in the background."""
        if self._file(rollout).is_file():
            return
        responses = self._respond(rollout)
        if self.how.ahead_by and self.judge is not None:
            self._judge_meanwhile(rollout, responses)

    def take(self, rollout: int, step: int) -> list[Rollout]:
        """The scored responses of a rollout: human ones if they are judged, then the policy's.

        Args:
            step: the policy step before which they are used first.
        """
        path = self._file(rollout)
        if path.is_file():
            return read(path, Rollout)
        responses = self._respond(rollout)
        if rollout in self.waiting:
            verdicts = self.waiting.pop(rollout).result()
        else:
            verdicts = self._judge(rollout, responses, self.ledger)
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

    def _respond(self, rollout: int) -> list[Response]:
        """The policy's responses; those that are on the disk are not made again."""
        from dnpo.generate import hf

        some, folder = self.prompts(rollout), self._responses(rollout)
        folder.mkdir(exist_ok=True)
        seed = derive(self.seed, "rollout", rollout) if rollout else self.seed  # the first as if made ahead
        told: dict[str, Any] = {"source": self.source, "limit": self.limit, "seed": seed, "report": self.report}
        if not self.how.segment:
            return hf.generate(self.writer, some.prompts, self.how, **told, folder=folder)
        path = folder / "segments.parquet"
        if not path.is_file():
            from dnpo.generate.segment import regenerate

            how = self.how
            responses, counts = regenerate(self.writer, some.prompts, some.human, how, length=how.segment, **told)
            write_json(self._counts(rollout), counts)
            write(path, responses, Response)
        return read(path, Response)

    def count(self, rollout: int) -> dict[str, int]:
        """How many segments a rollout has, and how many were drawn again or dropped."""
        path = self._counts(rollout)
        counts: dict[str, int] = json.loads(path.read_text()) if path.is_file() else {}
        return counts

    def _candidates(self, rollout: int, responses: Sequence[Response]) -> list[Response]:
        return [*(self.prompts(rollout).human if self.admits_human else ()), *responses]

    def _judge(self, rollout: int, responses: Sequence[Response], ledger: Ledger) -> list[Verdict]:
        candidates = self._candidates(rollout, responses)
        if self.judge is None:
            return [make_verdict(response, None, "there is no judge") for response in candidates]
        return ask(self.judge, self.prompts(rollout).prompts, candidates, ledger, self.report)

    def _judge_meanwhile(self, rollout: int, responses: Sequence[Response]) -> None:
        """Judge in a thread, after the rollouts before; it ends with the process, as a kill would end it."""
        before = list(self.waiting.values())
        done: Future[list[Verdict]] = Future()
        self.waiting[rollout] = done

        def work() -> None:
            try:
                for each in before:
                    each.exception()
                with Ledger(self.ledger.path, self.ledger.run) as ledger:  # a ledger serves one thread
                    done.set_result(self._judge(rollout, responses, ledger))
            except BaseException as error:  # raised again where the verdicts are taken
                done.set_exception(error)

        Thread(target=work, name=f"judge of rollout {rollout}", daemon=True).start()

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


class PairSource:
    """Makes pairs of rollouts; implements :class:`dnpo.optimise.live.Source`.

    Args:
        responder: makes the rollouts.
        plan: says how they are labelled.
        judge: compares the sides of a pair, where strengths are asked for.
        frozen: the reference; None if none is read, or if it is computed at use.
        folder: the training's folder.
    """

    def __init__(
        self, responder: Responder, plan: Plan, judge: Judge | None, frozen: "Policy | None", folder: Path
    ) -> None:
        self.responder, self.plan, self.judge, self.frozen = responder, plan, judge, frozen
        self.most = responder.most
        self.measured: dict[int, dict[str, float]] = {}
        self.folder = folder / PAIRS
        self.folder.mkdir(exist_ok=True)
        self.judged = int(self.count("judged").get("verdicts", 0))

    @property
    def per_pass(self) -> int:
        """Number of rollouts in a pass over the prompts."""
        return self.responder.chunks.per_pass

    def ask(self, rollout: int) -> None:
        """Let the policy respond."""
        self.responder.ask(rollout)

    def take(self, rollout: int, first: int, step: int) -> "list[Scored]":
        """The pairs of a rollout, scored under the reference."""
        from dnpo.optimise.pairs import Scored
        from dnpo.optimise.reference import score_now

        path = self.folder / f"{rollout:06d}.parquet"
        known = path.is_file()
        responses: list[Rollout] = []
        if known:
            pairs = read(path, Pair)
        else:
            responses = self.responder.take(rollout, step)
            pairs, counts = self._label(rollout, responses, step)
            judged = tally([as_verdict(row) for row in responses]) if self.responder.judge is not None else {}
        logps = score_now(self.frozen, pairs, autocast=self.plan.trainer.autocast) if self.frozen else None
        rows = [
            Scored(number, pair, None if logps is None else logps[i], step)
            for i, (number, pair) in enumerate(enumerate(pairs, first))
        ]
        if not known:
            self.measured = {rollout: describe(responses, rows)}
            facts = {"counts": counts, "judged": judged, "measured": self.measured[rollout]}
            write_json(self._facts(rollout), facts)
            self.judged += int(judged.get("verdicts", 0))
            write(path, pairs, Pair)
        return rows

    def _label(self, rollout: int, rows: Sequence[Rollout], step: int) -> tuple[list[Pair], dict[str, float]]:
        plan, prompts = self.plan, self.responder.prompts(rollout)
        generated = [as_response(row) for row in rows if row.source != HUMAN]
        verdicts = [as_verdict(row) for row in rows]
        pairs, counts = dsl.label(plan.dsl, prompts.prompts, prompts.human, generated, verdicts, plan.k)
        if not isinstance(plan.strength, dsl.HardLabels):
            compare = self.judge.compare_pairs if self.judge is not None and plan.strength.asks else None  # type: ignore[attr-defined]  # words.py has seen that it can
            by_id: Mapping[str, Prompt] = {row.id: row for row in prompts.prompts}
            pairs = dsl.with_strengths(pairs, plan.strength(by_id, pairs, compare))
        return [replace(pair, step=step) for pair in pairs], {**counts, **self.responder.count(rollout)}

    def measure(self, rollout: int) -> Mapping[str, float]:
        """Reward, divergence from the reference, entropy and flips of a rollout."""
        if rollout not in self.measured:
            self.measured = {rollout: json.loads(self._facts(rollout).read_text())["measured"]}
        return self.measured[rollout]

    def describe(self, rollout: int) -> str:
        """How many responses were judged, and how many will be at most."""
        return f"{self.judged:,} of at most {self.most:,} responses judged" if self.judged else ""

    def explain(self) -> str:
        """Why no rollout of the last pass has a pair."""
        return dsl.explain(self.count())

    def count(self, kind: Literal["counts", "judged"] = "counts") -> dict[str, float]:
        """Counts of labels, or of verdicts, over all rollouts so far."""
        total: Counter[str] = Counter()
        for path in sorted(self.folder.glob("*.json")):
            found = json.loads(path.read_text())[kind]
            total.update({name: found[name] for name in (*COUNTED, "verdicts") if name in found})
        return dict(total)

    def _facts(self, rollout: int) -> Path:
        return self.folder / f"{rollout:06d}.json"


def as_response(row: Rollout) -> Response:
    """The response of a rollout, without its score."""
    return Response(row.id, row.source, row.text, row.token_ids, row.tokens, row.finish, row.logprob, row.sample)


def as_verdict(row: Rollout) -> Verdict:
    """The verdict on a rollout's response."""
    return Verdict(row.id, row.source, row.score, row.reason, row.disagreement, row.sample)


def describe(responses: Sequence[Rollout], rows: "Sequence[Scored]") -> dict[str, float]:
    """What a rollout says of its policy: mean score, entropy by token, and divergence from the reference.

    The entropy is the mean of −log p over generated tokens, the divergence the mean of log p − log p_r over the
    generated sides of the pairs; both are estimates for samples at temperature 1, and show trends otherwise.
    """
    own = [row for row in responses if row.source != HUMAN and row.logprob is not None]
    scores = [row.score for row in own if row.score is not None]
    measured: dict[str, float] = {}
    if scores:
        measured["rollout/reward"] = sum(scores) / len(scores)
    if tokens := sum(row.tokens for row in own):
        measured["rollout/entropy"] = -sum(row.logprob or 0.0 for row in own) / tokens
    if rows:
        measured["rollout/flips"] = sum(row.pair.flipped for row in rows) / len(rows)
    written = {(row.id, row.source, row.sample): row.logprob for row in own}
    gaps = []
    for row in rows:
        pair, reference = row.pair, row.reference
        if reference is None:
            continue
        for source, sample, logp in (
            (pair.chosen_source, pair.chosen_sample, reference.chosen),
            (pair.rejected_source, pair.rejected_sample, reference.rejected),
        ):
            found = written.get((pair.id, source, sample))
            if found is not None:
                gaps.append(found - logp)
    if gaps:
        measured["rollout/kl"] = sum(gaps) / len(gaps)
    return measured


class Within:
    """Passes on notes, each once, of work that is done many times within a stage; its progress is the stage's own."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.told: set[str] = set()

    def begin(self, total: int, unit: str, done: int = 0) -> None:
        """Say nothing."""

    def advance(self, amount: int = 1) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Pass on what has not been said yet."""
        if text not in self.told:
            self.told.add(text)
            self.report.note(text)

    def status(self, text: str) -> None:
        """Say nothing."""

    def steps(self, rows: list[dict[str, float]]) -> None:
        """Say nothing."""


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


def train_on_pairs(
    run: Run,
    plan: Plan,
    task: Task,
    train: "Held",
    policy: "Policy",
    *,
    judge: Judge,
    frozen: "Policy | None",
    average: "Average | None",
    noise: "NoiseModule",
    seed: int,
) -> tuple[list[dict[str, float]], Facts]:
    """Train the policy in place on pairs of its own rollouts, and write these pairs.

    Args:
        train: the iteration's prompts, with the human responses.
        policy: the policy; with LoRA it has its fresh adapter.
        judge: scores responses, or compares pairs, if the plan asks for either.
        frozen: the reference; None if none is read, or if it is the average.
        average: the moving average of the policy, if it is read.
        noise: noise on the reference.
        seed: seed of the draws and of the noise.

    Returns:
        A row of metrics for each policy step, and counts.
    """
    from dnpo.optimise import preference

    how, trainer = plan.rollout, plan.trainer
    assert isinstance(how, Live), "a live rollout"
    writer = average.policy if average is not None and how.by == "ema" else policy
    responder = make_responder(run, plan, task, train, writer, judge if plan.dsl.needs_scores else None)
    source = PairSource(responder, plan, judge, frozen, task.folder)
    if plan.dsl.needs_scores:
        task.report.note(f"{responder.total:,} rollouts; at most {source.most:,} responses are judged")
    trained = preference.optimise_live(
        policy,
        source,
        Clock(how.every, how.capacity, how.ahead_by),
        trainer,
        noise=noise,
        objective=plan.objective,
        beta=float(plan.objective.beta),
        seed=seed,
        folder=task.folder,
        report=task.report,
        frozen=frozen,
        average=average,
        reads_average=plan.reads_reference and plan.reference == "ema",
    )
    pairs = read_all(sorted((task.folder / PAIRS).glob("*.parquet")), Pair)
    pairs = [replace(pair, draws=draws) for pair, draws in zip(pairs, trained.draws, strict=True)]
    write(task.folder / "pairs.parquet", pairs, Pair)
    write_preferences(task.folder / "pairs.jsonl", pairs)
    counts = source.count()
    labels = {**{name: counts.get(name, 0) for name in COUNTED[:4]}, **counts}
    if not isinstance(plan.strength, dsl.HardLabels) and pairs:
        labels["strength"] = sum(pair.strength for pair in pairs) / len(pairs)
    tokens = sum(pair.draws * count_tokens(pair) for pair in pairs)
    facts = {"labels": labels, "generated": gather(task.folder), "tokens": tokens, "rollouts": len(trained.rollouts)}
    judged = source.count("judged")
    return trained.history, {**facts, **({"judged": judged} if judged else {})}


def count_tokens(pair: Pair) -> int:
    """The number of tokens of a pair that go through the policy in training."""
    return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def gather(folder: Path) -> Facts:
    """Put the rollouts of a training into one file, and count them."""
    rows = read_all(sorted((folder / ROLLOUTS).glob("*.parquet")), Rollout)
    write(folder / "rollouts.parquet", rows, Rollout)
    own = [row for row in rows if row.source != HUMAN]
    cut = sum(row.finish == "length" for row in own)
    return {"responses": len(own), "cut": cut, "tokens": sum(row.tokens for row in own)}


def clear(folder: Path) -> None:
    """Remove the files by rollout, once the trained policy is written and no checkpoint names them any more."""
    for name in (ROLLOUTS, PAIRS):
        shutil.rmtree(folder / name, ignore_errors=True)


def count_rollouts(how: Live, prompts: int, epochs: int, steps: int) -> int:
    """The number of rollouts of a whole training."""
    if not how.every:
        return 1
    per_pass = Chunks(prompts, how.prompts, 0).per_pass
    return -(-steps // how.every) if steps else epochs * per_pass


class ResponseSource:
    """Makes scored responses for trainings that make no pairs of them; implements :class:`dnpo.optimise.live.Source`.

    Args:
        responder: makes the rollouts.
    """

    def __init__(self, responder: Responder) -> None:
        self.responder = responder

    @property
    def per_pass(self) -> int:
        """Number of rollouts in a pass over the prompts."""
        return self.responder.chunks.per_pass

    def ask(self, rollout: int) -> None:
        """Let the policy respond."""
        self.responder.ask(rollout)

    def take(self, rollout: int, first: int, step: int) -> list[Rollout]:
        """The responses of a rollout, with their scores."""
        return self.responder.take(rollout, step)

    def measure(self, rollout: int) -> Mapping[str, float]:
        """Mean score and entropy of a rollout, which is on the disk."""
        return describe(self.responder.take(rollout, 0), [])

    def describe(self, rollout: int) -> str:
        """How many responses were judged, and how many will be."""
        return f"{self.responder.count_until(rollout + 1):,} of {self.responder.most:,} responses judged"

    def explain(self) -> str:
        """Why there is nothing to train on."""
        return "no response has a score"


def expect_live(rollout: Ahead) -> Live:
    """The live rollout of a plan.

    Raises:
        SettingsError: it generates ahead of training.
    """
    if not isinstance(rollout, Live):
        raise SettingsError("rollout: the objective trains on its own responses; take rollout=live")
    return rollout


def train_on_responses(
    run: Run,
    plan: Plan,
    task: Task,
    train: "Held",
    policy: "Policy",
    *,
    judge: Judge,
    frozen: "Policy | None",
    seed: int,
) -> tuple[list[dict[str, float]], Facts]:
    """Train the policy in place on scored responses, by the training that the objective brings.

    Args:
        train, policy, judge, seed: as in :func:`train_on_pairs`.
        frozen: the reference; None if none is read.
    """
    how = expect_live(plan.rollout)  # type: ignore[arg-type]
    learn: Any = plan.objective
    responder = make_responder(run, plan, task, train, policy, judge)
    total = responder.total
    task.report.note(f"{total:,} rollouts; {responder.most:,} responses are judged")
    history = learn.train(
        policy,
        source=ResponseSource(responder),
        clock=Clock(how.every, how.capacity, how.ahead_by),
        reference=frozen,
        optimisation=plan.trainer,
        seed=seed,
        folder=task.folder,
        report=task.report,
    )
    generated = gather(task.folder)
    return history, {"generated": generated, "judged": {"verdicts": generated["responses"]}, "rollouts": total}
