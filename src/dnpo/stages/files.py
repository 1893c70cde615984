"""Read and write the files that several stages have in common."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnpo import ranks
from dnpo.data.prompts import All
from dnpo.policy.base import describe_saved
from dnpo.records import Pair, Prompt, Response, mean_over_steps, read
from dnpo.stages.plan import Plan
from dnpo.stages.shards import SIZE
from dnpo.store import manifest, write_json
from dnpo.tables import Made, Rows, column, take

if TYPE_CHECKING:
    from dnpo.evaluate import Held
    from dnpo.policy.model import Policy

# What training reads of a pair; an objective that reads more has to add it.
TRAINED_ON = ("id", "prompt_ids", "chosen_ids", "rejected_ids", "strength", "weight", "shift")


def read_split(folder: Path, split: str) -> "Held":
    """Read the prompts of a split and the human responses to them."""
    from dnpo.evaluate import Held

    return Held(read(folder / f"{split}.parquet", Prompt), read(folder / f"{split}-human.parquet", Response))


def open_split(folder: Path, split: str) -> "Held":
    """The same as :func:`read_split`, read when it is used: for training prompts, which may be many."""
    from dnpo.evaluate import Held

    prompts, human = folder / f"{split}.parquet", folder / f"{split}-human.parquet"
    return Held(Rows.open([prompts], Prompt), Rows.open([human], Response))


def open_given(folder: Path, split: str) -> Rows[Response]:
    """The rejected responses of the data's own pairs in a split; none if the data have no pairs."""
    path = folder / f"{split}-given.parquet"
    return Rows.open([path] if path.is_file() else [], Response)


def open_train(plan: Plan, folder: Path) -> "Held":
    """The training prompts that an iteration uses, and the human responses to them."""
    from dnpo.evaluate import Held

    train = open_split(folder, "train")
    if isinstance(plan.prompts, All):
        return train
    used = set(column(plan.prompts(train.prompts, plan.k), "id"))
    numbers = [i for i, id in enumerate(column(train.prompts, "id")) if id in used]
    return Held(take(train.prompts, numbers), take(train.human, numbers))


def open_candidates(plan: Plan, inputs: Mapping[str, Path]) -> Sequence[Response]:
    """An iteration's responses, in the order of its prompts: generated ones, or those that the data's pairs reject."""
    if "responses" in inputs:
        return Rows.open(sorted(inputs["responses"].glob("shard-*.parquet")), Response)
    used = set(column(open_train(plan, inputs["prompts"]).prompts, "id"))
    given = open_given(inputs["prompts"], "train")
    return given.take([i for i, id in enumerate(given.column("id")) if id in used])


def load_pairs(folder: Path) -> Sequence[Pair]:
    """The pairs of a stage in memory: if they are many, without texts, as training reads only token ids and weights."""
    pairs = Rows.open([folder / "pairs.parquet"], Pair)
    return list(pairs) if len(pairs) <= SIZE else pairs.load(TRAINED_ON)


def load_sequences(folder: Path, split: str) -> Sequence[tuple[str, list[int], list[int]]]:
    """The ids of a split's prompts, with the token ids of prompts and human responses."""
    prompts, human = open_split(folder, split)
    if len(prompts) > SIZE and isinstance(prompts, Rows) and isinstance(human, Rows):
        prompts, human = prompts.load(["id", "token_ids"]), human.load(["token_ids"])

        def make(number: int) -> tuple[str, list[int], list[int]]:
            prompt = prompts[number]
            return prompt.id, prompt.token_ids, human[number].token_ids

        return Made(len(prompts), make)
    return [(prompt.id, prompt.token_ids, response.token_ids) for prompt, response in zip(prompts, human, strict=True)]


def count_labels(folder: Path) -> dict[str, Any]:
    """The counts of labelling, from the stage that labelled: a separate one, or a training that labels meanwhile."""
    facts = manifest(folder)["facts"]
    counts: dict[str, Any] = facts.get("labels", facts)
    return counts


def write_trained(
    policy: "Policy", history: list[dict[str, float]], folder: Path, earlier: Path | None
) -> dict[str, Any]:
    """Write a trained policy and its step metrics; if training made no step, write the policy that it started from.

    Where several processes have trained it, one of them writes it, and the facts of the others are empty. The
    checkpoint is removed last, so a stage that is killed while writing continues from it.
    """
    from dnpo.optimise.training import discard_checkpoint

    if history:
        policy.save(folder / "policy", earlier)
    if not ranks.leads():
        return {}
    if not history and earlier is not None:
        shutil.copytree(earlier, folder / "policy", dirs_exist_ok=True)
    elif not history:
        (folder / "policy").mkdir(exist_ok=True)  # empty: the base model itself
    write_json(folder / "steps.json", history)
    discard_checkpoint(folder)
    facts = {"policy_steps": len(history), "policy": describe_saved(folder / "policy")}
    tenth = history[-max(len(history) // 10, 1) :]
    first = history[: max(len(history) // 10, 1)]
    means = {f"{name} (last tenth)": mean_over_steps(tenth, name) for name in history[-1]} if history else {}
    starts = {f"{name} (first tenth)": mean_over_steps(first, name) for name in history[0]} if history else {}
    return {**facts, **starts, **means}
