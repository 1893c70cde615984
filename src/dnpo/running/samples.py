"""Lay out the answers of a run's policies as a table that MLflow's pages compare between runs."""

from collections.abc import Sequence
from typing import Any

from dnpo.stages.plan import Iteration
from dnpo.store import Store

SHOWN = 50  # held-out prompts in the table


def sample_table(iterations: Sequence[Iteration], store: Store, split: str) -> dict[str, Any]:
    """Return a table, in MLflow's form, of the greedy answers of all policies to the first held-out prompts.

    A row is a prompt, so that the tables of several runs have the same rows. A policy has a column of
    answers, and one of the judge's scores if there are scores.

    Args:
        split: the split of the held-out prompts.
    """
    import pyarrow.parquet as pq

    file = pq.ParquetFile(store.folder(iterations[0].prompts) / f"{split}.parquet")
    prompts = next(file.iter_batches(SHOWN, columns=["id", "messages", "human"])).to_pylist()
    columns = {
        "id": [prompt["id"] for prompt in prompts],
        "prompt": [prompt["messages"][-1]["content"] for prompt in prompts],
        "human": [prompt["human"] for prompt in prompts],
    }
    for iteration in iterations:
        name = "SFT" if iteration.k < 0 else f"iteration {iteration.k}"
        evaluation = store.folder(iteration.evaluation)
        # the greedy answers to all prompts are before the sampled ones
        answers = next(pq.ParquetFile(evaluation / "samples.parquet").iter_batches(SHOWN, columns=["id", "text"]))
        items = pq.read_table(evaluation / "items.parquet", columns=["id", "kind", "score"])
        scores = {row["id"]: row["score"] for row in items.to_pylist() if row["kind"] == "greedy"}
        texts = dict(zip(answers["id"].to_pylist(), answers["text"].to_pylist(), strict=True))
        columns[name] = [texts.get(key) for key in columns["id"]]
        if any(score is not None for score in scores.values()):
            columns[f"{name}, score"] = [scores.get(key) for key in columns["id"]]
    return {"columns": list(columns), "data": [list(row) for row in zip(*columns.values(), strict=True)]}
