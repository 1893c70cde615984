"""Lay out the answers of a run's policies as a table that MLflow's pages compare between runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from dnpo.stages.plan import Iteration
from dnpo.store import Store

SHOWN = 50  # held-out prompts in the table


def sample_table(iterations: Sequence[Iteration], store: Store, split: str) -> dict[str, Any]:
    """Return a table, in MLflow's form, of the greedy answers of all policies to the first held-out prompts.

    A row is a prompt, so that the tables of several runs have the same rows. A policy has a column of
    answers, and one of the judge's scores if there are scores. MLflow's view for comparing runs groups rows
    by the first column, and at first shows the second one of each run: the prompt, and the last policy's answer.

    Args:
        split: the split of the held-out prompts.
    """
    import pyarrow.parquet as pq

    file = pq.ParquetFile(store.folder(iterations[0].prompts) / f"{split}.parquet")
    prompts = next(file.iter_batches(SHOWN, columns=["id", "messages", "human"])).to_pylist()
    ids = [prompt["id"] for prompt in prompts]
    columns: dict[str, list[Any]] = {"prompt": tell_apart(prompts)}
    for iteration in reversed(iterations):
        name = "SFT" if iteration.k < 0 else f"iteration {iteration.k}"
        evaluation = store.folder(iteration.evaluation)
        # the greedy answers to all prompts are before the sampled ones
        answers = next(pq.ParquetFile(evaluation / "samples.parquet").iter_batches(SHOWN, columns=["id", "text"]))
        items = pq.read_table(evaluation / "items.parquet", columns=["id", "kind", "score"])
        scores = {row["id"]: row["score"] for row in items.to_pylist() if row["kind"] == "greedy"}
        texts = dict(zip(answers["id"].to_pylist(), answers["text"].to_pylist(), strict=True))
        columns[name] = [texts.get(key) for key in ids]
        if any(score is not None for score in scores.values()):
            columns[f"{name}, score"] = [None if (score := scores.get(key)) is None else round(score, 2) for key in ids]
    columns |= {"human": [prompt["human"] for prompt in prompts], "id": ids}
    return {"columns": list(columns), "data": [list(row) for row in zip(*columns.values(), strict=True)]}


def tell_apart(prompts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the prompts' last messages; one that is empty or repeats an earlier one is followed by its id.

    MLflow's view shows only the first of several rows with the same text, and none without text.
    """
    shown: dict[str, None] = {}
    for prompt in prompts:
        text = prompt["messages"][-1]["content"]
        shown[text if text and text not in shown else f"{text} ({prompt['id']})".lstrip()] = None
    return list(shown)
