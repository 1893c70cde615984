"""Read and write the files that several stages have in common."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnpo.policy.base import describe_saved
from dnpo.records import Prompt, Response, mean_over_steps, read, read_all
from dnpo.stages.plan import Plan
from dnpo.store import manifest, write_json

if TYPE_CHECKING:
    from dnpo.evaluate import Held
    from dnpo.policy.model import Policy


def read_split(folder: Path, split: str) -> "Held":
    """Read the prompts of a split and the human responses to them."""
    from dnpo.evaluate import Held

    return Held(read(folder / f"{split}.parquet", Prompt), read(folder / f"{split}-human.parquet", Response))


def read_given(folder: Path, split: str) -> list[Response]:
    """Read the rejected responses of the data's own pairs in a split; none if the data have no pairs."""
    path = folder / f"{split}-given.parquet"
    return read(path, Response) if path.is_file() else []


def read_train(plan: Plan, folder: Path) -> "Held":
    """Read the training prompts that an iteration uses, and the human responses to them."""
    from dnpo.evaluate import Held

    train = read_split(folder, "train")
    used = {row.id for row in plan.prompts(train.prompts, plan.k)}
    rows = [both for both in zip(*train, strict=True) if both[0].id in used]
    return Held([prompt for prompt, _ in rows], [human for _, human in rows])


def read_candidates(plan: Plan, inputs: Mapping[str, Path]) -> list[Response]:
    """Read an iteration's responses: generated ones, or those that the data's own pairs reject."""
    if "responses" in inputs:
        return read_all(sorted(inputs["responses"].glob("shard-*.parquet")), Response)
    used = {row.id for row in read_train(plan, inputs["prompts"]).prompts}
    return [response for response in read_given(inputs["prompts"], "train") if response.id in used]


def count_labels(folder: Path) -> dict[str, Any]:
    """The counts of labelling, from the stage that labelled: a separate one, or a training that labels meanwhile."""
    facts = manifest(folder)["facts"]
    counts: dict[str, Any] = facts.get("labels", facts)
    return counts


def write_trained(
    policy: "Policy", history: list[dict[str, float]], folder: Path, earlier: Path | None
) -> dict[str, Any]:
    """Write a trained policy and its step metrics; if training made no step, write the policy that it started from.

    The checkpoint is removed last, so a stage that is killed while writing continues from it.
    """
    from dnpo.optimise.training import discard_checkpoint

    if history:
        policy.save(folder / "policy", earlier)
    elif earlier is not None:
        shutil.copytree(earlier, folder / "policy", dirs_exist_ok=True)
    else:
        (folder / "policy").mkdir(exist_ok=True)  # empty: the base model itself
    write_json(folder / "steps.json", history)
    discard_checkpoint(folder)
    facts = {"policy_steps": len(history), "policy": describe_saved(folder / "policy")}
    tenth = history[-max(len(history) // 10, 1) :]
    first = history[: max(len(history) // 10, 1)]
    means = {f"{name} (last tenth)": mean_over_steps(tenth, name) for name in history[-1]} if history else {}
    starts = {f"{name} (first tenth)": mean_over_steps(first, name) for name in history[0]} if history else {}
    return {**facts, **starts, **means}
