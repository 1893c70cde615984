"""Measure a policy: ``metrics.py`` has the metrics of every run, ``stages/measures.py`` the optional ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from dnpo.evaluate.leaderboard import Leaderboard
from dnpo.evaluate.texts import Texts
from dnpo.judges import Judge
from dnpo.records import Prompt, Response
from dnpo.settings import Count, neutral

Split = Literal["validation", "test"]
OWN_JUDGE = {"judge": "eval.judge"}  # errors of a judge name the setting judge=…, which is eval.judge=… here
LEADERBOARD = {field.name: f"eval.leaderboard.{field.name}" for field in fields(Leaderboard)}  # settings, in a run


class Held(NamedTuple):
    """Held-out prompts, with the human responses in the same order."""

    prompts: Sequence[Prompt]
    human: Sequence[Response]


class Evaluated(NamedTuple):
    """The results of an evaluation that further measures read.

    Attributes:
        held: the held-out prompts, with the human responses.
        greedy: the policy's greedy response to each prompt, in the same order.
        samples: its samples, in the same order of prompts: sample 0 for all prompts, then sample 1 for all prompts, …
    """

    held: Held
    greedy: Sequence[Response]
    samples: Sequence[Response]


@runtime_checkable
class Measure(Protocol):
    """A measure of a policy's responses, configured by ``eval.measures.NAME``."""

    def __call__(self, evaluated: Evaluated) -> Mapping[str, float]:
        """Return metrics by name, such as ``own/words``; the catalogue must have them, see ``dnpo.catalogue.add``."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The measurements of every policy, configured by ``eval=…``.

    Args:
        split: ``validation`` for choosing settings, ``test`` for reporting.
        samples: number of fresh samples for each held-out prompt.
        sequences: number of the iteration's pairs whose log-probabilities are kept; each of their prompts gets one
            fresh sample. The Kolmogorov-Smirnov distance compares the pairs whose fresh sample differs from the human
            response; with few pairs a small distance cannot be told from chance: with 1,200 it must exceed 0.055.
        texts: what compares new texts with the chosen responses to the same prompts, in a separate stage; None:
            nothing does.
        leaderboard: benchmarks by lm-eval for every policy, in a separate stage; None: no benchmarks.
        measures: further measures by name, each in a separate stage.
        judge: the judge that gives the scores; None: the judge that labels pairs, if its scores measure quality.
        initial: whether to estimate the KL divergence from the initial policy, in a separate stage.
    """

    split: Split = "test"
    samples: Count = 4
    sequences: Count = 1536
    texts: Texts | None = neutral(None)
    leaderboard: Leaderboard | None = neutral(None)
    measures: Mapping[str, Measure] | None = neutral(None)
    judge: Judge | None = neutral(None)
    initial: bool = neutral(False)
