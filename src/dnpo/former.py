"""What settings were called in earlier layouts, so that users' yaml and saved runs go on working."""

from collections.abc import Mapping
from typing import Any

MOVED: dict[str, str] = {
    "dnpo.evaluate.Evaluation": "dnpo.evaluate.metrics.Evaluation",
    "dnpo.generate.Sampling": "dnpo.generate.hf.Sampling",
    "dnpo.judges.answers.Choice": "dnpo.judges.exact.answers.Choice",
    "dnpo.judges.answers.Exact": "dnpo.judges.exact.answers.Exact",
    "dnpo.judges.answers.Numeric": "dnpo.judges.exact.answers.Numeric",
    "dnpo.judges.code.UnitTests": "dnpo.judges.exact.code.UnitTests",
    "dnpo.judges.hf.HF": "dnpo.judges.asked.hf.HF",
    "dnpo.judges.openai.OpenAI": "dnpo.judges.asked.openai.OpenAI",
    "dnpo.judges.reward.Reward": "dnpo.judges.reward.reward.Reward",
    "dnpo.judges.rules.Correct": "dnpo.judges.exact.rules.Correct",
    "dnpo.judges.rules.Rules": "dnpo.judges.exact.rules.Rules",
    "dnpo.leaderboard.Leaderboard": "dnpo.evaluate.leaderboard.Leaderboard",
    "dnpo.model.Lora": "dnpo.policy.model.Lora",
    "dnpo.model.Pretrained": "dnpo.policy.model.Pretrained",
    "dnpo.model.Scratch": "dnpo.policy.model.Scratch",
    "dnpo.npo.FixedNoise": "dnpo.optimise.npo.FixedNoise",
    "dnpo.npo.MatchedOffset": "dnpo.optimise.npo.MatchedOffset",
    "dnpo.npo.NoNoise": "dnpo.optimise.npo.NoNoise",
    "dnpo.npo.Offset": "dnpo.optimise.npo.Offset",
    "dnpo.npo.TrainableNoise": "dnpo.optimise.npo.TrainableNoise",
    "dnpo.objective.logistic": "dnpo.optimise.objective.logistic",
    "dnpo.texts.Texts": "dnpo.evaluate.texts.Texts",
    "dnpo.tracking.MLflow": "dnpo.tracking.writing.MLflow",
    "dnpo.tracking.Tracking": "dnpo.tracking.writing.Tracking",
    "dnpo.training.Optimisation": "dnpo.optimise.training.Optimisation",
}
"""Import paths of dnpo's own parts as they were once, and as they are."""

REMOVED: dict[str, tuple[str, ...]] = {}
"""Settings that a part once had, by its import path of today. They are accepted there, and ignored."""


def up_to_date(settings: Mapping[str, Any], name: str = "") -> tuple[dict[str, Any], list[str]]:
    """Bring settings that were written for an earlier layout up to date.

    Args:
        settings: a tree of plain values, in which parts have a ``_target_``.
        name: where the tree stands, such as ``npo``.

    Returns:
        The tree with the import paths of today and without settings that are gone, and the dotted names of these.
    """
    tree, ignored = dict(settings), []
    if isinstance(tree.get("_target_"), str):
        tree["_target_"] = MOVED.get(tree["_target_"], tree["_target_"])
    gone = REMOVED.get(str(tree.get("_target_")), ())
    for key, value in settings.items():
        dotted = f"{name}.{key}" if name else key
        if key in gone:
            del tree[key]
            ignored.append(dotted)
        elif isinstance(value, Mapping):
            tree[key], inner = up_to_date(value, dotted)
            ignored += inner
    return tree, ignored
