"""Read the facts that ``fit`` writes next to a reward model's weights, without heavy imports."""

import json
from typing import Any, Literal

from dnpo.errors import ModelError
from dnpo.policy.weights import Weights

Kind = Literal["model", "embedding"]
FACTS, SEEN = "reward.json", "prompts_seen.txt"


def read_facts(weights: Weights) -> dict[str, Any]:
    """Read the facts that ``fit`` wrote next to the weights; empty for other models.

    Raises:
        ModelError: they cannot be read.
    """
    if weights.folder is None or not (weights.folder / FACTS).is_file():
        return {}
    try:
        facts = json.loads((weights.folder / FACTS).read_text(encoding="utf-8"))
        if facts["kind"] not in ("model", "embedding") or not float(facts["scale"]) > 0:
            raise ValueError(f"kind {facts['kind']!r}, scale {facts['scale']!r}")
        return {**facts, "center": float(facts["center"]), "scale": float(facts["scale"])}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ModelError(
            f"{weights.description}: its {FACTS} cannot be used ({error}); expected kind, center and scale as "
            "`dnpo judge fit` writes them"
        ) from error
