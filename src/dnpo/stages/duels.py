"""Let a judge compare a model's samples with another model's, or with human responses, on the same prompts.

The other side's response takes the place of the human one. A judge that compares two responses is asked in both orders
and gives the other side 50 points; a judge that scores single responses gives each its score. The higher score wins.
Questions that the evaluations have already asked are answered from the ledger.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dnpo.errors import DataError
from dnpo.evaluate import Held
from dnpo.judges import Judge, judge_responses
from dnpo.judges.asked.ledger import Ledger
from dnpo.records import HUMAN, Prompt, Response
from dnpo.settings import part_key
from dnpo.stages.files import read_split
from dnpo.stages.plan import Facts, Run, Task, verb
from dnpo.stats.length import LengthControlled, control_length
from dnpo.stats.wins import Wins, preferences, wins
from dnpo.store import Report
from dnpo.tables import read, schema

DUELS = "duels.parquet"


@dataclass(frozen=True, slots=True)
class Duel:
    """One sample of ours against one response of theirs; a row of ``duels.parquet``.

    Attributes:
        id: the prompt's id.
        sample: number of the sample.
        ours, theirs: the texts.
        ours_score, theirs_score: points; theirs has 50 if the judge compares. None if a score is missing.
        preference: 1 if ours wins, ½ for a tie, 0 if it loses; None if a score is missing.
        disagreement: between both orders, or between members of an ensemble, in points.
        difference: length of ours minus length of theirs, in characters.
        reason: why a score is missing.
    """

    id: str
    sample: int
    ours: str
    theirs: str
    ours_score: float | None
    theirs_score: float | None
    preference: float | None
    disagreement: float | None
    difference: int
    reason: str


Responses = Mapping[tuple[str, int], Response]  # by prompt and number


@verb("duels", 1, lambda run, plan: {"judge": part_key(run.judge)})
def fight_duels(run: Run, plan: None, task: Task) -> Facts:
    """Compare each sample for a held-out prompt with the other side's sample of that number, or the human response.

    The inputs are ``prompts`` and ``evaluation`` of the model, and ``their_prompts`` and ``their_evaluation`` of the
    other one; without these, the model is compared with the human responses.
    """
    inputs, split, samples = task.inputs, run.eval.split, run.eval.samples
    rows = read_split(inputs["prompts"], split)
    first = _read_samples(rows, inputs["evaluation"], samples)
    if "their_evaluation" in inputs:
        second = _read_samples(read_split(inputs["their_prompts"], split), inputs["their_evaluation"], samples)
    else:
        second = _human(rows, samples)
    duels = judge_duels(run.judge, rows.prompts, first, second, run.ledger, task.report)
    write_duels(task.folder / DUELS, duels)
    alone = len(first) - len(duels)
    if alone:
        task.report.note(f"{alone:,} of {len(first):,} samples are to prompts that the other side does not have")
    return {"duels": len(duels), "alone": alone}


def _read_samples(rows: Held, evaluation: Path, samples: int) -> Responses:
    """Read the samples of an evaluation, by prompt and number. In the file they are after the greedy responses."""
    count = len(rows.prompts)
    fresh = read(evaluation / "samples.parquet", Response)[count : count * (1 + samples)]
    return {(rows.prompts[i % count].id, i // count): response for i, response in enumerate(fresh)}


def _human(rows: Held, samples: int) -> Responses:
    """The human response to each prompt, once for each sample."""
    pairs = list(zip(rows.prompts, rows.human, strict=True))
    return {(prompt.id, n): response for n in range(samples) for prompt, response in pairs}


def judge_duels(
    judge: Judge, prompts: Sequence[Prompt], ours: Responses, theirs: Responses, ledger: Ledger, report: Report
) -> list[Duel]:
    """Judge both texts, for every prompt and sample number that both sides have.

    Raises:
        DataError: the sides share no prompt.
        JudgeError: too many responses lack a score.
    """
    prompt_of = {prompt.id: prompt for prompt in prompts}
    both = [key for key in ours if key in theirs]
    if not both:
        raise DataError("the two sides share no prompt, so there is nothing to compare; take data that fit both models")
    names = [f"{id_}#{number}" for id_, number in both]
    asked = [replace(prompt_of[key[0]], id=name, human=theirs[key].text) for key, name in zip(both, names, strict=True)]
    against = [replace(theirs[key], id=name, source=HUMAN) for key, name in zip(both, names, strict=True)]
    samples = [replace(ours[key], id=name) for key, name in zip(both, names, strict=True)]
    verdicts = judge_responses(judge, asked, [*against, *samples], ledger, report)
    old, new = verdicts[: len(both)], verdicts[len(both) :]
    won = preferences([v.score for v in new], [v.score for v in old])
    return [
        Duel(
            id=key[0],
            sample=key[1],
            ours=ours[key].text,
            theirs=theirs[key].text,
            ours_score=a.score,
            theirs_score=b.score,
            preference=value,
            disagreement=a.disagreement,
            difference=len(ours[key].text) - len(theirs[key].text),
            reason=a.reason or b.reason,
        )
        for key, a, b, value in zip(both, new, old, won, strict=True)
    ]


def write_duels(path: Path, rows: Sequence[Duel]) -> None:
    """Write duels to a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {f.name: [getattr(row, f.name) for row in rows] for f in dataclasses.fields(Duel)}
    pq.write_table(pa.table(columns, schema=schema(Duel)), path)


def read_duels(path: Path) -> list[Duel]:
    """Read duels from a file of :func:`write_duels`."""
    import pyarrow.parquet as pq

    return [Duel(**row) for row in pq.read_table(path).to_pylist()]


@dataclass(frozen=True)
class DuelOutcome:
    """The result of all duels: wins, and the win rate at the same length if it was requested.

    Attributes:
        controlled: the win rate at the same length; None if it was not requested or cannot be computed.
        why: why ``controlled`` cannot be computed.
        apart: mean disagreement between both orders, or between members of an ensemble; None if there is neither.
    """

    wins: Wins
    controlled: LengthControlled | None
    why: str
    apart: float | None

    def metrics(self) -> dict[str, float]:
        """The metrics by name, as shares."""
        metrics = {f"duels/{name}": getattr(self.wins, name).value for name in ("win", "tie", "lose", "rate")}
        metrics |= {"duels/duels": self.wins.duels, "duels/unscored": self.wins.unscored, "duels/p": self.wins.p}
        if self.controlled is not None:
            metrics |= {"duels/rate_same_length": self.controlled.rate.value, "duels/length": self.controlled.effect}
        return metrics | ({} if self.apart is None else {"duels/disagreement": self.apart})


def outcome(rows: Sequence[Duel], same_length: bool, seed: int) -> DuelOutcome:
    """Count duels; the bootstrap resamples prompts.

    Args:
        same_length: also compute the win rate at the same length, in characters.
        seed: of the bootstrap.

    Raises:
        DataError: no duel has a score on both sides.
    """
    ids = [row.id for row in rows]
    won = wins([row.ours_score for row in rows], [row.theirs_score for row in rows], ids, seed=seed)
    apart = [row.disagreement for row in rows if row.disagreement is not None]
    controlled, why = None, ""
    if same_length:
        try:
            controlled = control_length([r.preference for r in rows], [r.difference for r in rows], ids, seed=seed)
        except DataError as error:
            why = str(error)
    return DuelOutcome(won, controlled, why, sum(apart) / len(apart) if apart else None)
