"""Further measures of a policy, each a separate stage: drift, a second judge, texts, the leaderboard.

They read the files of the evaluation (``evaluate/``), write ``metrics.json``, and run only if configured.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnpo.evaluate import LEADERBOARD, Evaluated
from dnpo.judges import judge_responses, tally
from dnpo.records import Item, Pair, Response, Verdict
from dnpo.seeding import derive
from dnpo.settings import named_within, part_key
from dnpo.stages.files import open_split, read_split
from dnpo.stages.plan import BEFORE, Facts, Plan, Run, Task, Verb, verb
from dnpo.stages.verbs import sampling_of
from dnpo.store import Stage, write_json
from dnpo.tables import Rows, read, with_ids, write

if TYPE_CHECKING:
    from dnpo.evaluate import Measure
    from dnpo.generate import Sampling

METRICS = "metrics.json"
SECOND = {"judge": "second_judge"}  # errors of a judge name the setting judge=…, which is second_judge=… here


def measure(
    run: Run,
    plan: Plan | None,
    prompts: Stage,
    policy: Stage,
    evaluation: Stage,
    *,
    start: Stage | None = None,
    initial: Stage | None = None,
    pairs: Stage | None = None,
) -> tuple[Stage, ...]:
    """Lay out the stages that measure a policy in addition to its evaluation.

    Args:
        plan: the iteration that trained the policy; None for fine-tuning.
        start: the policy that its training started from; None for the base model.
        initial: the policy after fine-tuning.
        pairs: the pairs that it was trained on.
    """
    stages = []
    if plan is not None and _is_plain(sampling_of(run, plan)):
        stages.append(drift(run, plan, prompts=prompts, policy=start, evaluation=evaluation))
    if plan is not None and run.eval.initial and _is_plain(run.generate):
        stages.append(drift_from_initial(run, plan, prompts=prompts, policy=initial, evaluation=evaluation))
    if run.second_judge.gives_scores:
        stages.append(judge_again(run, plan, prompts=prompts, evaluation=evaluation))
    if run.eval.texts is not None:
        stages.append(compare_texts(run, plan, prompts=prompts, evaluation=evaluation, pairs=pairs))
    if run.eval.leaderboard is not None:
        stages.append(leaderboard(run, plan, prompts=prompts, policy=policy))
    for name, further in (run.eval.measures or {}).items():
        stages.append(_stage_of(name, further)(run, plan, prompts=prompts, evaluation=evaluation))
    return tuple(stages)


def _stage_of(name: str, measure: "Measure") -> Verb:
    """Make the verb of a measure configured by ``eval.measures``."""

    @verb("measure", 1, lambda run, plan: {"measure": part_key(measure)}, title=f"measure {name}")
    def measure_more(run: Run, plan: Plan | None, task: Task) -> Facts:
        rows = read_split(task.inputs["prompts"], run.eval.split)
        samples = read(task.inputs["evaluation"] / "samples.parquet", Response)
        first, last = len(rows.prompts), len(rows.prompts) * (1 + run.eval.samples)
        metrics = measure(Evaluated(rows, samples[:first], samples[first:last]))
        return _write_metrics(task.folder, {metric: float(value) for metric, value in metrics.items()})

    return measure_more


def _is_plain(sampling: "Sampling") -> bool:
    """Whether samples follow the policy's distribution: temperature 1, no truncation."""
    return (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 0, 1.0)


@verb("drift", 1, lambda run, plan: {})
def drift(run: Run, plan: Plan, task: Task) -> Facts:
    """Estimate KL(policy ‖ reference) from the policy's samples. Only the reference is loaded."""
    from dnpo.evaluate.distances import kl

    new = _read_new(task.inputs["evaluation"], run, task.inputs["prompts"])
    train = open_split(task.inputs["prompts"], "train").prompts
    ids = {p.id: p.token_ids for p in with_ids(train, {r.id for r in new})}
    reference = run.policy(task.inputs)
    logps = reference.score([ids[r.id] for r in new], [r.token_ids for r in new])
    divergence = kl([r.logprob for r in new], logps, [r.tokens for r in new])
    metrics = {
        "drift/kl": divergence.sequence,
        "drift/kl_error": divergence.sequence_error,
        "drift/kl_token": divergence.token,
        "drift/kl_token_error": divergence.token_error,
    }
    return _write_metrics(task.folder, {name: value for name, value in metrics.items() if value is not None})


@verb("initial", 1, lambda run, plan: {}, title="drift from the initial policy")
def drift_from_initial(run: Run, plan: Plan, task: Task) -> Facts:
    """Estimate KL(policy ‖ initial) from the policy's samples for held-out prompts, one for each prompt."""
    from dnpo.evaluate.distances import kl

    held = read_split(task.inputs["prompts"], run.eval.split).prompts
    samples = read(task.inputs["evaluation"] / "samples.parquet", Response)[len(held) : 2 * len(held)]
    logps = run.policy(task.inputs).score([p.token_ids for p in held], [r.token_ids for r in samples])
    divergence = kl([r.logprob for r in samples], logps, [r.tokens for r in samples])
    metrics = {"drift/initial": divergence.sequence, "drift/initial_error": divergence.sequence_error}
    return _write_metrics(task.folder, {name: value for name, value in metrics.items() if value is not None})


@verb("second", 1, lambda run, plan: {"judge": part_key(run.second_judge)}, title="second judge")
def judge_again(run: Run, plan: Plan | None, task: Task) -> Facts:
    """Score the same responses by the second judge."""
    from dnpo.evaluate.metrics import quality, repeat_prompts

    rows = read_split(task.inputs["prompts"], run.eval.split)
    several = repeat_prompts(rows, run.eval.samples)
    samples = read(task.inputs["evaluation"] / "samples.parquet", Response)
    responses = [*rows.human, *samples[: len(rows.prompts) + len(several)]]
    with named_within(SECOND):
        verdicts = judge_responses(run.second_judge, [*rows.prompts, *several], responses, run.ledger, task.report)
    write(task.folder / "verdicts.parquet", verdicts, Verdict)
    items = read(task.inputs["evaluation"] / "items.parquet", Item)
    both = [replace(item, second=verdict.score) for item, verdict in zip(items, verdicts, strict=True)]
    write(task.folder / "items.parquet", both, Item)
    metrics = {**quality(verdicts, len(rows.human)), **tally(verdicts)}
    return _write_metrics(task.folder, {f"second/{name}": value for name, value in metrics.items()})


def _texts_key(run: Run, plan: Plan | None) -> dict[str, Any]:
    return {"texts": part_key(run.eval.texts), "seed": run.seed, "iteration": BEFORE if plan is None else plan.k}


@verb("texts", 1, _texts_key)
def compare_texts(run: Run, plan: Plan | None, task: Task) -> Facts:
    """Compare new texts with the positive samples of their prompts: the chosen responses, or the human ones."""
    from dnpo.policy.model import device_of

    how = run.eval.texts
    assert how is not None
    new = _read_new(task.inputs["evaluation"], run, task.inputs["prompts"])[: how.rows]
    ids = {r.id for r in new}
    if "pairs" in task.inputs:
        positive = {p.id: p.chosen for p in with_ids(Rows.open([task.inputs["pairs"] / "pairs.parquet"], Pair), ids)}
    else:
        positive = {p.id: p.human for p in with_ids(open_split(task.inputs["prompts"], "train").prompts, ids)}
    texts, wanted = [r.text for r in new], [positive[r.id] for r in new]
    measured = how.measure(texts, wanted, device_of(run.device), derive(run.seed, task.k))
    _write_table(task.folder / "texts.parquet", {"id": [r.id for r in new], **measured.items})
    write_json(task.folder / "signatures.json", dict(measured.signatures))
    return _write_metrics(task.folder, {f"texts/{name}": value for name, value in measured.metrics.items()})


def _leaderboard_key(run: Run, plan: Plan | None) -> Any:
    with named_within(LEADERBOARD):
        return part_key(run.eval.leaderboard)


@verb("leaderboard", 1, _leaderboard_key)
def leaderboard(run: Run, plan: Plan | None, task: Task) -> Facts:
    """Run the leaderboard's benchmarks."""
    from dnpo.evaluate import leaderboard

    how = run.eval.leaderboard
    assert how is not None
    with named_within(LEADERBOARD):
        result = leaderboard.measure(run.policy(task.inputs), how, task.report)
    for note in result.notes():
        task.report.note(note)
    result.write(task.folder, {"notes": result.notes()})
    return _write_metrics(task.folder, result.metrics())


def _read_new(evaluation: Path, run: Run, prompts: Path) -> list[Response]:
    """Read the evaluation's samples for training prompts, which follow those for held-out prompts."""
    count = len(open_split(prompts, run.eval.split).prompts)
    return list(Rows.open([evaluation / "samples.parquet"], Response)[count * (1 + run.eval.samples) :])


def _write_metrics(folder: Path, metrics: dict[str, float]) -> dict[str, float]:
    write_json(folder / METRICS, metrics)
    return metrics


def _write_table(path: Path, columns: Mapping[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)
