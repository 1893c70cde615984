"""Train on responses that the policy gives during training: between steps they are judged and labelled.

The functions are the same as in the stages ``generate``, ``judge``, ``label`` and ``reference``, which otherwise
precede training. Each rollout is written to a file before a checkpoint can refer to it, and is read again after a kill.
At the end of training, these files are joined into one of responses and one of pairs.
"""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dnpo import dsl
from dnpo.errors import StoreError
from dnpo.generate import Live
from dnpo.judges import Judge, tally
from dnpo.optimise.live import Clock, require
from dnpo.records import HUMAN, Pair, Prompt, Rollout
from dnpo.stages.files import write_preferences
from dnpo.stages.plan import Facts, Plan, Run, Task
from dnpo.stages.rollouts import ROLLOUTS, Responder, as_response, as_verdict, gather, make_responder
from dnpo.store import write_json
from dnpo.tables import read, read_all, write
from dnpo.wording import plural

if TYPE_CHECKING:
    from dnpo.evaluate import Held
    from dnpo.optimise.batches import Scored
    from dnpo.optimise.ema import Average
    from dnpo.optimise.npo import NoiseModule
    from dnpo.policy.model import Policy

PAIRS = "pairs"  # folder of files by rollout, and name of the file into which they are joined
COUNTED = ("pairs", "flipped", "identical", "unscored", "repeated", "tied", "wrong", "segments", "redrawn", "dropped")


class PairSource:
    """Makes pairs from rollouts; implements :class:`dnpo.optimise.live.Source`.

    Args:
        responder: makes the rollouts.
        plan: decides how they are labelled.
        judge: compares the sides of a pair, if the strengths need it.
        frozen: the reference; None if none is read, or if its numbers are computed in the training step.
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

    def check(self, rollouts: int) -> None:
        """Check that the files of the first ``rollouts`` rollouts exist."""
        self.responder.check(rollouts)
        require([self._file(rollout) for rollout in range(rollouts)])

    def take(self, rollout: int, first: int, step: int) -> "list[Scored]":
        """The pairs of a rollout, scored under the reference."""
        from dnpo.optimise.batches import Scored
        from dnpo.optimise.reference import score_now

        path = self._file(rollout)
        known = path.is_file() and self.responder.has(rollout)
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
            self.judged += 0 if path.is_file() else int(judged.get("verdicts", 0))
            write(path, pairs, Pair)
        return rows

    def _label(self, rollout: int, rows: Sequence[Rollout], step: int) -> tuple[list[Pair], dict[str, float]]:
        plan, prompts = self.plan, self.responder.prompts(rollout)
        generated = [as_response(row) for row in rows if row.source != HUMAN]
        verdicts = [as_verdict(row) for row in rows]
        pairs, counts = dsl.label(plan.dsl, prompts.prompts, prompts.human, generated, verdicts, plan.k)
        if not isinstance(plan.strength, dsl.HardLabels):
            compare = self.judge.compare_pairs if self.judge is not None and plan.strength.asks else None  # type: ignore[attr-defined]  # words.py has checked that it can
            by_id: Mapping[str, Prompt] = {row.id: row for row in prompts.prompts}
            pairs = dsl.with_strengths(pairs, plan.strength(by_id, pairs, compare))
        return [replace(pair, step=step) for pair in pairs], {**counts, **self.responder.count(rollout)}

    def measure(self, rollout: int) -> Mapping[str, float]:
        """Reward, divergence from the reference, entropy and flips of a rollout."""
        if rollout not in self.measured:
            self.measured = {rollout: _read_facts(self._facts(rollout))["measured"]}
        return self.measured[rollout]

    def describe(self, rollout: int) -> str:
        """The number of responses judged so far, and the most there can be in the whole training."""
        return f"{self.judged:,} of at most {self.most:,} responses judged" if self.judged else ""

    def explain(self) -> str:
        """Why no rollout of the last pass has a pair."""
        return dsl.explain(self.count(), self.plan.dsl)

    def count(self, kind: Literal["counts", "judged"] = "counts") -> dict[str, float]:
        """Counts of labels, or of verdicts, over all rollouts so far."""
        total: Counter[str] = Counter()
        for path in sorted(self.folder.glob("*.parquet")):
            found = _read_facts(path.with_suffix(".json"))[kind]
            total.update({name: found[name] for name in (*COUNTED, "verdicts") if name in found})
        return dict(total)

    def _file(self, rollout: int) -> Path:
        return self.folder / f"{rollout:06d}.parquet"

    def _facts(self, rollout: int) -> Path:
        return self.folder / f"{rollout:06d}.json"


def _read_facts(path: Path) -> Any:
    """Read the facts of a rollout.

    Raises:
        StoreError: the file is damaged or missing.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        beside = f"{path.stem}.parquet"
        raise StoreError(f"{path}: is damaged ({error}); remove it and {beside}, and run the command again") from error


def describe(responses: Sequence[Rollout], rows: "Sequence[Scored]") -> dict[str, float]:
    """Describe the policy by a rollout: mean score, entropy by token, and divergence from the reference.

    The entropy is the mean of −log p over generated tokens; the divergence is the mean of log p − log p_r over the
    generated sides of the pairs. Both are estimates for samples at temperature 1; for other samples they only show
    trends.
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
    """Train the policy in place on pairs made from its rollouts, and write these pairs.

    Args:
        train: the iteration's prompts, with the human responses.
        policy: the policy; with LoRA it already has a new adapter.
        judge: scores responses, or compares pairs, if the plan asks for either.
        frozen: the reference; None if none is read, or if it is the average.
        average: the moving average of the policy's weights, if it is read.
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
        task.report.note(f"{plural(responder.total, 'rollout')}; at most {plural(source.most, 'response')} to judge")
    with closing(responder):
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


def clear(folder: Path) -> None:
    """Remove the files by rollout, after the trained policy is written and no checkpoint names them.

    The pairs are removed first, since they can be made again from the rollouts. Each folder is removed in one step, so
    that a training that is killed meanwhile begins again with consistent files.
    """
    for name in (PAIRS, ROLLOUTS):
        gone = folder / f"{name}.gone"
        shutil.rmtree(gone, ignore_errors=True)  # left by a kill
        if (folder / name).is_dir():
            (folder / name).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


class ResponseSource:
    """Makes scored responses for trainings without pairs; implements :class:`dnpo.optimise.live.Source`.

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

    def check(self, rollouts: int) -> None:
        """Check that the first ``rollouts`` rollouts exist."""
        self.responder.check(rollouts)

    def take(self, rollout: int, first: int, step: int) -> list[Rollout]:
        """The responses of a rollout, with their scores."""
        return self.responder.take(rollout, step)

    def measure(self, rollout: int) -> Mapping[str, float]:
        """Mean score and entropy of a rollout that has been taken."""
        return describe(self.responder.take(rollout, 0), [])

    def describe(self, rollout: int) -> str:
        """The number of responses judged so far, and that of the whole training."""
        return f"{self.responder.count_until(rollout + 1):,} of {self.responder.most:,} responses judged"

    def explain(self) -> str:
        """Why there is nothing to train on."""
        return "no response has a score"


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
    """Train the policy in place on scored responses, with the objective's own method ``train``.

    Args:
        train, policy, judge, seed: as in :func:`train_on_pairs`.
        frozen: the reference; None if none is read.
    """
    how = plan.rollout
    assert isinstance(how, Live), "a live rollout"
    learn: Any = plan.objective
    responder = make_responder(run, plan, task, train, policy, judge)
    total = responder.total
    task.report.note(f"{plural(total, 'rollout')}; {plural(responder.most, 'response')} to judge")
    with closing(responder):
        history, tokens = learn.train(
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
    judged = tally([as_verdict(row) for row in read(task.folder / "rollouts.parquet", Rollout)])
    return history, {"generated": generated, "judged": judged, "tokens": tokens, "rollouts": total}
