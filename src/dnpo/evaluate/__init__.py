"""What is measured of a policy: ``metrics.py`` always, ``stages/measures.py`` where it is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from dnpo.evaluate.leaderboard import Leaderboard
from dnpo.evaluate.texts import Texts
from dnpo.records import Prompt, Response
from dnpo.settings import Count, neutral

Split = Literal["validation", "test"]


class Held(NamedTuple):
    """Held-out prompts with the human responses to them, in the same order."""

    prompts: Sequence[Prompt]
    human: Sequence[Response]


class Evaluated(NamedTuple):
    """What an evaluation leaves for further measures.

    Attributes:
        held: the held-out prompts with the human responses to them.
        greedy: the policy's greedy response to each of them, in the same order.
        samples: its fresh samples, all with number 0 first, then all with number 1, …; each in the same order.
    """

    held: Held
    greedy: Sequence[Response]
    samples: Sequence[Response]


@runtime_checkable
class Measure(Protocol):
    """What ``eval.measures.NAME`` configures: a measure of what a policy wrote."""

    def __call__(self, evaluated: Evaluated) -> Mapping[str, float]:
        """Metrics by name, such as ``own/words``. Each has to be in ``catalogue.py``, or added to it."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What to measure: what ``eval=…`` configures.

    Args:
        split: ``validation`` for choosing settings, ``test`` for reporting.
        samples: fresh samples of each held-out prompt.
        sequences: pairs of the iteration, and fresh samples for the same prompts, whose log-probabilities are kept. Of
            these the Kolmogorov-Smirnov distance compares those whose fresh sample is not the human response itself;
            it needs 1,200 or more to stand out from chance.
        texts: compares newly generated texts with the positive samples, as a separate stage; None leaves it out.
        leaderboard: benchmarks through lm-eval, after every iteration, a stage too; None leaves them out.
        measures: further measures by a name, each a stage too.
    """

    split: Split = "test"
    samples: Count = 4
    sequences: Count = 1536
    texts: Texts | None = neutral(None)
    leaderboard: Leaderboard | None = neutral(None)
    measures: Mapping[str, Measure] | None = neutral(None)
