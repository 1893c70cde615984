"""A judge that is a reward model, and the command that fits one to preferences.

    python -m dnpo.judges.reward fit data.path=preferences.jsonl base=FOLDER out=FOLDER

A reward r has no bounds; its score is 100 · σ((r − center) / scale), which rises strictly with r (until floating point
gives out, beyond 36 scales from the center), so that who is better by reward is better by score.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch

from dnpo.errors import OutOfMemoryError
from dnpo.judges import Canary, Judge
from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.reward.models import SEEN, Rewards, facts_of, load
from dnpo.policy.model import device_of
from dnpo.policy.weights import Weights
from dnpo.records import HUMAN, Prompt, Response, Verdict
from dnpo.settings import Count, Dtype, Finite, Fraction, Positive, check_values
from dnpo.store import Report


class Reward(Judge):
    """A sequence classifier of transformers with one output, or what ``fit`` wrote.

    The model is loaded when it judges and let go afterwards, so that it takes no memory from the training. A response
    that does not fit into its context with its conversation stays without a score; nothing is cut.

    Args:
        path: a folder with ``config.json``, safetensors weights and a tokenizer, or one of ``fit``; or
        name: a name on the hub, with ``revision``. Exactly one of the two.
        center: the reward that is worth 50 points; null takes what ``fit`` found, else 0.
        scale: how much more reward makes 73 points of 50; null takes what ``fit`` found, else 1.
        max_tokens: of a row; null takes what the model can read.
        dtype: of the weights.
        device: ``auto`` is the GPU if there is one, as for the policy.
        batch_size: rows read at once; it changes nothing but speed, memory and rounding.
        max_unscored: share of responses that may stay without a score.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        name: str | None = None,
        revision: str | None = None,
        center: Finite | None = None,
        scale: Positive | None = None,
        max_tokens: Count | None = None,
        dtype: Dtype = "float32",
        device: str = "auto",
        batch_size: Count = 16,
        max_unscored: Fraction = 0.02,
    ) -> None:
        fitted = path is not None and name is None
        marker = "reward.json" if fitted and Weights.has(cast(str, path), "reward.json") else "config.json"
        self.weights = Weights(path, name, revision, marker=marker)
        facts = facts_of(self.weights)
        self.center = facts.get("center", 0.0) if center is None else center
        self.scale = facts.get("scale", 1.0) if scale is None else scale
        self.max_tokens, self.dtype, self.device, self.batch_size = max_tokens, dtype, device_of(device), batch_size
        self.max_unscored = max_unscored

    def identity(self) -> Mapping[str, Any]:
        """What decides the verdicts: never where the model lies or how fast it is read."""
        return {
            "judge": "reward",
            "model": self.weights.identity,
            "center": self.center,
            "scale": self.scale,
            "dtype": self.dtype,
            "max_tokens": self.max_tokens,
        }

    @cached_property
    def prompts_seen(self) -> frozenset[str]:
        """Hashes (``data/seen.py``) of the conversations it was fitted on; none where it comes from elsewhere."""
        if self.weights.folder is None or not (self.weights.folder / SEEN).is_file():
            return frozenset()
        return frozenset((self.weights.folder / SEEN).read_text(encoding="utf-8").split())

    def canary(self, ledger: Ledger) -> Canary:
        """See :class:`~dnpo.judges.Judge`: whether the model can be loaded and gives a score."""
        prompt = Prompt("canary", [{"role": "user", "content": "Name the capital of France."}], "")
        (verdict,) = self._verdicts([prompt], [Response("canary", HUMAN, "Paris.", [], 0, "eos")], None)
        if verdict.score is None:
            return Canary(False, f"{self.weights.shown}: {verdict.reason}")
        return Canary(True, f"the reward model gives {verdict.score:.1f} to a right answer on {self.device}")

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Report
    ) -> list[Verdict]:
        """See :class:`~dnpo.judges.Judge`.

        Raises:
            ModelError: the reward model cannot be used.
            OutOfMemoryError: a batch does not fit into memory.
        """
        report.begin(len(responses), "verdicts")
        return self._verdicts(prompts, responses, report)

    def _verdicts(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], report: Report | None
    ) -> list[Verdict]:
        by_id = {p.id: p for p in prompts}
        model = load(self.weights, self.dtype, self.device, self.max_tokens)
        rows = [model.encode(by_id[r.id].messages, r.text) for r in responses]
        verdicts: dict[int, Verdict] = {}

        def settle(i: int, score: float | None, reason: str) -> None:
            verdicts[i] = Verdict(responses[i].id, responses[i].source, score, reason)
            if report is not None:
                report.advance()

        for i in (i for i, row in enumerate(rows) if model.too_long(row)):
            settle(i, None, f"longer than the {model.limit:,} tokens that the reward model reads (judge.max_tokens)")
        # the longest first: what does not fit into memory shows at once, and batches have little padding
        row = sorted(set(range(len(rows))) - set(verdicts), key=lambda i: -sum(map(len, rows[i])))
        size = self.batch_size if model.batches else 1
        for some in (row[start : start + size] for start in range(0, len(row), size)):
            for i, reward in zip(some, self._rewards(model, [rows[i] for i in some]), strict=True):
                score = points(reward, self.center, self.scale) if math.isfinite(reward) else None
                settle(i, score, "" if score is not None else "the reward is not a finite number")
        return [verdicts[i] for i in range(len(responses))]

    @torch.no_grad()
    def _rewards(self, model: Rewards, rows: Sequence[Any]) -> list[float]:
        try:
            return cast(list[float], model(rows).tolist())
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"judge.batch_size={self.batch_size}: {len(rows)} rows do not fit into the memory of {self.device}; "
                "lower it"
            ) from error


def points(reward: float, center: float, scale: float) -> float:
    """100 · σ((reward − center) / scale)."""
    x = (reward - center) / scale
    return 100.0 / (1.0 + math.exp(-x)) if x >= 0 else 100.0 * math.exp(x) / (1.0 + math.exp(x))


# --- the command ------------------------------------------------------------------------------------------------------

USAGE = (
    "usage: python -m dnpo.judges.reward fit data.path=FILE base=FOLDER out=FOLDER [key=value …]; conf/reward.yaml has "
    "all settings"
)


def main() -> None:
    """``python -m dnpo.judges.reward fit``."""
    from dnpo.commands import common as command

    if sys.argv[1:2] != ["fit"]:
        print(USAGE, file=sys.stderr)
        sys.exit(2)
    sys.argv = [sys.argv[0], *sys.argv[2:]]
    command.run("reward", _fit, "Nothing is written.")


def _fit(cfg: Any, job: Any) -> None:
    from dnpo.commands import common as command
    from dnpo.judges.reward.fitting import fit
    from dnpo.judges.reward.preferences import Preferences

    tree = command.plain(cfg)
    data = Preferences(**check_values("data", Preferences, tree.pop("data")))
    fit(data, **check_values("", fit, tree))


if __name__ == "__main__":
    main()
