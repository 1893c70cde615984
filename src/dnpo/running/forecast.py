"""Estimate the number and the cost of a run's calls of judges, before anything is sent.

A response that is not generated yet counts as new; its length is taken to be that of the human response to its prompt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from dnpo.generate import Live
from dnpo.judges import Forecast, Judge
from dnpo.records import HUMAN, Prompt, Response, policy_source
from dnpo.stages.plan import Iteration, Plan, Run
from dnpo.stages.rollouts import Chunks, count_rollouts
from dnpo.store import Stage, Store
from dnpo.tables import read, read_all


def forecast(run: Run, iterations: Sequence[Iteration], store: Store) -> dict[str, Forecast]:
    """Return a forecast for each stage that is still to be computed and asks a judge, by title.

    If several stages ask the same question, it counts for the first of them.
    """
    seen: set[str] = set()
    forecasts: dict[str, Forecast] = {}
    rows = _Rows(run, iterations[0].prompts, store)
    for iteration in iterations:
        if iteration.verdicts is not None and not store.has(iteration.verdicts) and iteration.responses is not None:
            plan = run.plans[iteration.k]
            prompts, human = rows.used(plan)
            generated = _read_generated(store, iteration.responses) or [
                replace(response, text=f"{number} {response.text}" if number else response.text, sample=number)
                for response in _stand_in(prompts, human, policy_source(iteration.k))
                for number in range(plan.rollout.samples)
            ]
            asked = [*(human if plan.dsl.admits_human else ()), *generated]
            forecasts[iteration.verdicts.title] = plan.judge.forecast(prompts, asked, run.ledger, seen)
        how = run.plans[iteration.k] if iteration.k >= 0 else None
        if how is not None and isinstance(how.rollout, Live) and how.judges and not store.has(iteration.policy):
            prompts, human = rows.used(how)
            asked = _live_responses(how, how.rollout, prompts, human)
            forecasts[iteration.policy.title] = how.judge.forecast(prompts, asked, run.ledger, seen)
        for stage, judge in _find_evaluations(run, iteration, store):
            prompts, human = rows.split(run.eval.split)
            source = policy_source(iteration.k + 1)
            greedy = _stand_in(prompts, human, f"{source} greedy")
            several = [
                (replace(p, id=f"{p.id}#{n}"), replace(r, id=f"{r.id}#{n}"))
                for n in range(run.eval.samples)
                for p, r in zip(prompts, human, strict=True)
            ]
            fresh = _stand_in([p for p, _ in several], [r for _, r in several], source)
            questions = [*prompts, *(p for p, _ in several)]
            forecasts[stage.title] = judge.forecast(questions, [*human, *greedy, *fresh], run.ledger, seen)
    return forecasts


def _live_responses(plan: Plan, how: Live, prompts: Sequence[Prompt], human: Sequence[Response]) -> list[Response]:
    """Make placeholders for all responses of a live training; add the human responses if they are judged."""
    chunks = Chunks(len(prompts), how.prompts, 0)
    stand_in = _stand_in(prompts, human, policy_source(plan.k))
    made: list[Response] = []
    for rollout in range(count_rollouts(how, len(prompts), plan.trainer.epochs, plan.trainer.steps)):
        for i, number in product(chunks.of(rollout), range(how.samples)):
            text, sample = f"{rollout} {number} {stand_in[i].text}", rollout * how.samples + number
            made.append(replace(stand_in[i], text=text, sample=sample))
    return [*(human if plan.makes_pairs and plan.dsl.admits_human else ()), *made]


def _find_evaluations(run: Run, iteration: Iteration, store: Store) -> Iterator[tuple[Stage, Judge]]:
    """Yield the uncomputed stages that judge held-out responses, each with its judge."""
    second = [stage for stage in iteration.measures if stage.name == "second"]
    for stage, judge in (
        (iteration.evaluation, run.judge),
        *((stage, run.second_judge) for stage in second),
    ):
        if judge.gives_scores and not store.has(stage):
            yield stage, judge


class _Rows:
    """Prompts and human responses: from the prompts stage if it is computed, otherwise from the data."""

    def __init__(self, run: Run, prompts: Stage, store: Store) -> None:
        self.folder = store.folder(prompts) if store.has(prompts) else None
        self.raw = {} if self.folder else run.data.read()[0]

    def used(self, plan: Plan) -> tuple[Sequence[Prompt], Sequence[Response]]:
        """The training prompts that an iteration uses, and the human responses to them."""
        prompts, human = self.split("train")
        used = {prompt.id for prompt in plan.prompts(prompts, plan.k)}
        return [p for p in prompts if p.id in used], [r for r in human if r.id in used]

    def split(self, name: str) -> tuple[Sequence[Prompt], Sequence[Response]]:
        if self.folder is not None:
            prompts = read(self.folder / f"{name}.parquet", Prompt)
            return prompts, read(self.folder / f"{name}-human.parquet", Response)
        return self.raw[name], [Response(p.id, HUMAN, p.human, [], 0, "eos") for p in self.raw[name]]


def _read_generated(store: Store, responses: Stage) -> list[Response]:
    if not store.has(responses):
        return []
    return read_all(sorted(store.folder(responses).glob("shard-*.parquet")), Response)


def _stand_in(prompts: Sequence[Prompt], human: Sequence[Response], source: str) -> list[Response]:
    """Make placeholders for responses not generated yet: all different, and as long as the human responses."""
    return [
        Response(p.id, source, f"{source} {p.id} {r.text}"[: max(len(r.text), 1) + 24], [], 0, "eos")
        for p, r in zip(prompts, human, strict=True)
    ]
