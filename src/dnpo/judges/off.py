"""No judge: no response has a score."""

from collections.abc import Sequence

from dnpo.records import Prompt, Response, Verdict


class NoJudge:
    """The judge that is not there."""

    gives_scores = False

    def accepts(self, prompts: Sequence[Prompt]) -> str | None:
        """Nothing to object to."""
        return None

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Verdict]:
        """Verdicts without a score."""
        return [Verdict(r.id, r.source, None, "judge=off") for r in responses]
