"""Names of settings in earlier layouts, so that users' YAML files and saved runs still work."""

from collections.abc import Mapping
from typing import Any

from dnpo.errors import SettingsError

MOVED: dict[str, str] = {
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
    "dnpo.model.Lora": "dnpo.policy.lora.Lora",
    "dnpo.model.Pretrained": "dnpo.policy.base.Pretrained",
    "dnpo.model.Scratch": "dnpo.policy.base.Scratch",
    "dnpo.npo.FixedNoise": "dnpo.optimise.parts.FixedNoise",
    "dnpo.npo.MatchedOffset": "dnpo.optimise.parts.MatchedOffset",
    "dnpo.npo.NoNoise": "dnpo.optimise.parts.NoNoise",
    "dnpo.npo.Offset": "dnpo.optimise.parts.Offset",
    "dnpo.npo.TrainableNoise": "dnpo.optimise.parts.TrainableNoise",
    "dnpo.objective.logistic": "dnpo.optimise.parts.Logistic",
    "dnpo.texts.Texts": "dnpo.evaluate.texts.Texts",
    "dnpo.tracking.Tracking": "dnpo.tracking.NoTracking",
    "dnpo.training.Optimisation": "dnpo.optimise.parts.Optimisation",
}
"""Earlier import paths of dnpo's own parts, with the present ones."""

MOVED_AT: dict[tuple[str, str], str] = {
    ("trainer", "dnpo.training.Optimisation"): "dnpo.optimise.parts.PairOptimisation",
}
"""Earlier import paths whose present path depends on the part's folder in ``conf/``."""

REMOVED: dict[str, tuple[str, ...]] = {
    "dnpo.optimise.parts.Optimisation": ("share_prompt",),
    "dnpo.optimise.parts.NoNoise": ("start",),
    "dnpo.dsl.HumanChosen": ("start",),
}
"""Settings that a part no longer has, by its present import path. They are accepted and ignored."""

PARTIAL = "_partial_"  # dnpo's own parts are dataclasses now and need none


def up_to_date(settings: Mapping[str, Any], name: str = "") -> tuple[dict[str, Any], list[str]]:
    """Bring settings that were written for an earlier layout up to date.

    Args:
        settings: a tree of plain values, in which parts have a ``_target_``.
        name: dotted name of the tree, such as ``npo``.

    Returns:
        The tree with present import paths and without removed settings, and the dotted names of the removed ones.

    Raises:
        SettingsError: a ``_partial_`` is neither true nor false.
    """
    tree, ignored = dict(settings), []
    target = tree.get("_target_")
    if isinstance(target, str):
        tree["_target_"] = MOVED_AT.get((name, target), MOVED.get(target, target))
    gone = REMOVED.get(str(tree.get("_target_")), ())
    partial = tree.pop(PARTIAL, True)
    if not isinstance(partial, bool):
        setting = f"{name}.{PARTIAL}" if name else PARTIAL
        raise SettingsError(f"{setting}={partial!r}: expected true or false; no part needs it now")
    for key, value in settings.items():
        if key == PARTIAL:
            continue
        dotted = f"{name}.{key}" if name else key
        if key in gone:
            del tree[key]
            ignored.append(dotted)
        elif isinstance(value, Mapping):
            tree[key], inner = up_to_date(value, dotted)
            ignored += inner
    return tree, ignored
