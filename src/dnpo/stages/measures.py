"""What else is measured of a policy, each a stage of its own: drift, a second judge, texts, the leaderboard.

They read what the evaluation left (``evaluate/``), write ``metrics.json``, and are absent where nobody asks for them.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dnpo.evaluate.distances import kl
from dnpo.evaluate.leaderboard import measure
from dnpo.evaluate.metrics import copied, quality
from dnpo.generate.hf import Sampling
from dnpo.judges import judged, tally
from dnpo.records import Item, Pair, Prompt, Response, Verdict, read, write
from dnpo.seeding import derive
from dnpo.stages.verbs import Run, held
from dnpo.store import Report, Stage, write_json

METRICS = "metrics.json"


def measures(
    run: Run, k: int, prompts: Stage, policy: Stage, evaluation: Stage, start: Stage | None, pairs: Stage | None
) -> tuple[Stage, ...]:
    """The stages that measure a policy beside its evaluation.

    Args:
        k: its iteration; −1 for the one before the first.
        start: the policy that it was trained from, its reference; None before the first iteration.
        pairs: what it was trained on.
    """
    name = f"iteration {k} · " if k >= 0 else ""
    found = []
    if start is not None and _plain(run.generate.value):
        found.append(drift(run, f"{name}drift", prompts, start, evaluation))
    if run.second_judge.value.gives_scores:
        found.append(second(run, f"{name}second judge", prompts, evaluation))
    if run.eval.value.texts is not None:
        found.append(texts(run, f"{name}texts", k, prompts, evaluation, pairs))
    if run.eval.value.leaderboard is not None:
        found.append(leaderboard(run, f"{name}leaderboard", prompts, policy))
    return tuple(found)


def _plain(sampling: Sampling) -> bool:
    """Whether samples are the policy's own: at temperature 1 and with no token left out."""
    return (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 0, 1.0)


def drift(run: Run, title: str, prompts: Stage, start: Stage, evaluation: Stage) -> Stage:
    """KL(policy ‖ reference) by the policy's own samples. The reference is loaded alone, not beside the policy."""

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        train = held(inputs["prompts"], "train").prompts
        new = _new(inputs["evaluation"], run, inputs["prompts"])
        ids = {p.id: p.token_ids for p in train}
        reference = run.policy(inputs)
        logps = reference.score([ids[r.id] for r in new], [r.token_ids for r in new])
        found = kl([r.logprob for r in new], logps, [r.tokens for r in new])
        metrics = {
            "drift/kl": found.sequence,
            "drift/kl_error": found.sequence_error,
            "drift/kl_token": found.token,
            "drift/kl_token_error": found.token_error,
        }
        return _written(folder, {name: value for name, value in metrics.items() if value is not None})

    inputs = {"prompts": prompts, "policy": start, "evaluation": evaluation}
    return Stage("drift", title, 1, {}, inputs, work)


def second(run: Run, title: str, prompts: Stage, evaluation: Stage) -> Stage:
    """What another judge says of the responses that were judged."""

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        part = run.eval.value
        rows = held(inputs["prompts"], part.split)
        several = copied(rows, part.samples)
        samples = read(inputs["evaluation"] / "samples.parquet", Response)
        responses = [*rows.human, *samples[: len(rows.prompts) + len(several)]]
        verdicts = judged(run.second_judge.value, [*rows.prompts, *several], responses, run.ledger, report)
        write(folder / "verdicts.parquet", verdicts, Verdict)
        items = read(inputs["evaluation"] / "items.parquet", Item)
        both = [replace(item, second=verdict.score) for item, verdict in zip(items, verdicts, strict=True)]
        write(folder / "items.parquet", both, Item)
        found = {**quality(verdicts, len(rows.human)), **tally(verdicts)}
        return _written(folder, {f"second/{name}": value for name, value in found.items()})

    inputs = {"prompts": prompts, "evaluation": evaluation}
    return Stage("second", title, 1, {"judge": run.second_judge.key}, inputs, work)


def texts(run: Run, title: str, k: int, prompts: Stage, evaluation: Stage, pairs: Stage | None) -> Stage:
    """Newly generated texts beside the positive samples of their prompts: the chosen responses, or the human ones."""
    how = run.eval.value.texts
    assert how is not None

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        new = _new(inputs["evaluation"], run, inputs["prompts"])[: how.rows]
        if "pairs" in inputs:
            positive = {p.id: p.chosen for p in read(inputs["pairs"] / "pairs.parquet", Pair)}
        else:
            positive = {p.id: p.human for p in held(inputs["prompts"], "train").prompts}
        measured = how.measure([r.text for r in new], [positive[r.id] for r in new], run.device, derive(run.seed, k))
        _write_table(folder / "texts.parquet", {"id": [r.id for r in new], **measured.items})
        write_json(folder / "signatures.json", dict(measured.signatures))
        return _written(folder, {f"texts/{name}": value for name, value in measured.metrics.items()})

    inputs = {"prompts": prompts, "evaluation": evaluation} | ({"pairs": pairs} if pairs else {})
    return Stage("texts", title, 1, {"texts": how.identity(), "seed": run.seed, "iteration": k}, inputs, work)


def leaderboard(run: Run, title: str, prompts: Stage, policy: Stage) -> Stage:
    """The leaderboard's benchmarks."""
    how = run.eval.value.leaderboard
    assert how is not None

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        result = measure(run.policy(inputs), how, report)
        for note in result.notes():
            report.note(note)
        result.write(folder, {"notes": result.notes()})
        return _written(folder, result.metrics())

    return Stage("leaderboard", title, 1, how.identity(), {"prompts": prompts, "policy": policy}, work)


def _new(evaluation: Path, run: Run, prompts: Path) -> list[Response]:
    """The evaluation's samples for training prompts, which stand behind those for held-out ones."""
    count = len(read(prompts / f"{run.eval.value.split}.parquet", Prompt))
    return read(evaluation / "samples.parquet", Response)[count * (1 + run.eval.value.samples) :]


def _written(folder: Path, metrics: dict[str, float]) -> dict[str, float]:
    write_json(folder / METRICS, metrics)
    return metrics


def _write_table(path: Path, columns: Mapping[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)
