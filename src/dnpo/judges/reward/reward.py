"""A judge that is a reward model; ``fitting.py`` fits one to preferences.

A reward r is unbounded; its score is 100 · σ((r − center) / scale). The score increases strictly with r (within about
36 scales of the center, the limit of floating point), so scores order responses as rewards do.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from dnpo.errors import OutOfMemoryError, SettingsError
from dnpo.judges import Canary, Judge, make_verdict
from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.reward.facts import FACTS, SEEN, read_facts
from dnpo.policy.weights import Weights
from dnpo.records import HUMAN, Prompt, Response, Verdict
from dnpo.settings import Count, Dtype, Finite, Fraction, Positive, neutral, place
from dnpo.store import Report

if TYPE_CHECKING:
    from dnpo.judges.reward.models import Rewards


@dataclass(frozen=True)
class Reward(Judge):
    """A sequence classifier of transformers with one output, or a model that ``fit`` wrote.

    The model is loaded when it judges and released afterwards, so that it takes no memory from training. A response
    that does not fit into its context, together with the conversation, gets no score; nothing is cut.

    Args:
        path: a folder with ``config.json``, safetensors weights and a tokenizer, or a folder that ``fit`` wrote.
        name: a name on the hub. Give either this or ``path``.
        revision: a branch, tag or commit of the model on the hub.
        center: the reward worth 50 points; null takes the value of ``fit``, or else 0.
        scale: by how much the reward of 73 points exceeds that of 50; null takes the value of ``fit``, or else 1.
        template_date: the current date for a chat template that reads the clock, such as ``2026-01-31``.
        max_tokens: maximum number of tokens of a row; null: the maximum that the model can read.
        dtype: type of the weights.
        device: ``auto`` is the GPU if there is one, as for the policy.
        batch_size: rows in a batch; changes only speed, memory and rounding.
        max_unscored: share of responses that may lack a score.

    Raises:
        ModelError: there is no such folder, the facts that ``fit`` wrote there cannot be read, or not exactly one of
            ``path`` and ``name`` is given.
    """

    path: str | None = place(None)
    name: str | None = None
    revision: str | None = None
    center: Finite | None = None
    scale: Positive | None = None
    template_date: str | None = None
    max_tokens: Count | None = None
    dtype: Dtype = "float32"
    device: str = neutral("auto")
    batch_size: Count = neutral(16)
    max_unscored: Fraction = neutral(0.02)

    def __post_init__(self) -> None:
        _ = self.curve  # a folder that cannot be used is refused at once

    @cached_property
    def weights(self) -> Weights:
        """Where the model is."""
        fitted = self.path is not None and self.name is None and Weights.has(self.path, FACTS)
        return Weights(self.path, self.name, self.revision, marker=FACTS if fitted else "config.json")

    @cached_property
    def curve(self) -> tuple[float, float]:
        """The center and scale that map rewards to scores: the settings, else the values of ``fit``, else 0 and 1."""
        facts = read_facts(self.weights)
        center = facts.get("center", 0.0) if self.center is None else self.center
        return center, facts.get("scale", 1.0) if self.scale is None else self.scale

    @cached_property
    def _device(self) -> str:
        from dnpo.policy.model import device_of

        return device_of(self.device)

    def identity(self) -> Mapping[str, Any]:
        """The values that decide the verdicts, without paths and settings of speed."""
        center, scale = self.curve
        return {
            "judge": "reward",
            "model": self.weights.identity,
            "center": center,
            "scale": scale,
            "dtype": self.dtype,
            "max_tokens": self.max_tokens,
            **({"template_date": self.template_date} if self.template_date else {}),
        }

    @cached_property
    def prompts_seen(self) -> frozenset[str]:
        """Hashes (``data/seen.py``) of the conversations it was fitted on; none if ``fit`` did not write it."""
        if self.weights.folder is None or not (self.weights.folder / SEEN).is_file():
            return frozenset()
        return frozenset((self.weights.folder / SEEN).read_text(encoding="utf-8").split())

    def accepts(self, prompts: Sequence[Prompt]) -> str | None:
        """Accept prompts that the chat template can render, if the device exists and the model's files are complete."""
        from dnpo.judges.reward.models import object_to_rows

        try:
            _ = self._device
        except SettingsError as error:
            return f"judge.{error}"
        return self._objection or object_to_rows(self.weights, self.template_date, prompts)

    @cached_property
    def _objection(self) -> str | None:
        """Why the model's files cannot be used; None if they can."""
        from dnpo.judges.reward.models import object_to

        return object_to(self.weights)

    def canary(self, ledger: Ledger) -> Canary:
        """Judge one response, to check that the model can be loaded and gives a score."""
        prompt = Prompt("canary", [{"role": "user", "content": "Name the capital of France."}], "")
        (verdict,) = self._verdicts([prompt], [Response("canary", HUMAN, "Paris.", [], 0, "eos")], None)
        if verdict.score is None:
            return Canary(False, f"{self.weights.description}: {verdict.reason}")
        text = f"the reward model on {self._device} scores a right answer with {verdict.score:.1f} points"
        return Canary(True, text)

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Report
    ) -> list[Verdict]:
        """Return a verdict on each response; the longest are read first.

        Raises:
            ModelError: the reward model cannot be used.
            OutOfMemoryError: a batch does not fit into memory.
        """
        report.begin(len(responses), "verdicts")
        return self._verdicts(prompts, responses, report)

    def _verdicts(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], report: Report | None
    ) -> list[Verdict]:
        from dnpo.judges.reward.models import load

        by_id = {p.id: p for p in prompts}
        model = load(self.weights, self.dtype, self._device, self.max_tokens, self.template_date)
        rows = [model.encode(by_id[r.id].messages, r.text) for r in responses]
        verdicts: dict[int, Verdict] = {}

        def settle(i: int, score: float | None, reason: str) -> None:
            verdicts[i] = make_verdict(responses[i], score, reason)
            if report is not None:
                report.advance()

        for i in (i for i, row in enumerate(rows) if model.too_long(row)):
            settle(i, None, f"longer than the {model.limit:,} tokens that the reward model reads (judge.max_tokens)")
        # the longest first, so that a lack of memory is seen at once and batches have little padding
        row = sorted(set(range(len(rows))) - set(verdicts), key=lambda i: -sum(map(len, rows[i])))
        size = self.batch_size if model.batches else 1
        for some in (row[start : start + size] for start in range(0, len(row), size)):
            for i, reward in zip(some, self._rewards(model, [rows[i] for i in some]), strict=True):
                score = points(reward, *self.curve) if math.isfinite(reward) else None
                settle(i, score, "" if score is not None else "the reward is not a finite number")
        return [verdicts[i] for i in range(len(responses))]

    def _rewards(self, model: "Rewards", rows: Sequence[Any]) -> list[float]:
        import torch

        try:
            with torch.no_grad():
                return cast(list[float], model(rows).tolist())
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"judge.batch_size={self.batch_size}: {len(rows)} rows do not fit into the memory of {self._device}; "
                "lower it"
            ) from error


def points(reward: float, center: float, scale: float) -> float:
    """100 · σ((reward − center) / scale)."""
    x = (reward - center) / scale
    return 100.0 / (1.0 + math.exp(-x)) if x >= 0 else 100.0 * math.exp(x) / (1.0 + math.exp(x))
