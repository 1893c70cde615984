"""Preference augmentation: teach a policy to answer the A/B questions that ``judge=self`` asks it (OSP, section 3.3).

Pairs whose better response is known become questions in both orders; the answer is the letter of the better response. A
copy of the fine-tuned policy is trained on these questions, and is used only to judge. The policies of all iterations
start from the fine-tuned policy without this training.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from dnpo.data.verifiable import points
from dnpo.errors import DataError, SettingsError
from dnpo.optimise.parts import Optimisation
from dnpo.policy.question import LETTERS, TINY, ask, check_template
from dnpo.records import Message, Prompt
from dnpo.seeding import derive
from dnpo.settings import Natural, Positive
from dnpo.store import Report

if TYPE_CHECKING:
    from dnpo.policy.model import Policy

FEWEST = 4800  # a tiny model learned to judge from this many questions; of 160 it only memorised the answers


class Gold(NamedTuple):
    """Two responses to a conversation, of which ``better`` is known to be the better one."""

    id: str
    messages: list[Message]
    better: str
    worse: str


class JudgeRow(NamedTuple):
    """A question with its answer, as token ids.

    Attributes:
        id: of the pair, with the letter of the answer.
        prompt_ids: the question.
        ids: the letter's token, and the token that ends the reply.
        weights: the weight of each of these tokens in the loss.
    """

    id: str
    prompt_ids: list[int]
    ids: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Augmentation:
    """The training of a policy as a judge, configured by ``augment=…``.

    Args:
        rows: maximum number of questions, two for each pair; 0: nothing is taught.
        weight: weight of the letter in the loss; the end of the reply has weight 1.
        template: the question, as in ``judge.template``.
        labels: how the better response is known: ``rules`` scores all known responses to a conversation by its
            verifiable answer; ``given`` takes the pairs of the data.
        optimisation: how to train, on all questions.

    Raises:
        SettingsError: the template lacks a part, or questions would be held out of training.
    """

    optimisation: Optimisation
    rows: Natural = 0
    weight: Positive = 1.0
    template: str = TINY
    labels: Literal["rules", "given"] = "rules"

    def __post_init__(self) -> None:
        check_template(self.template, "template")
        if self.optimisation.measures:
            raise SettingsError(
                f"optimisation.{self.optimisation.asked}: no questions are held out of this training; only sft and "
                "trainer have this setting"
            )

    def make_pairs(self, prompts: Sequence[Prompt], seed: int) -> list[Gold]:
        """The pairs for the questions: at most half as many as ``rows``, drawn with the seed.

        Raises:
            DataError: there are none.
        """
        self.check(prompts)
        known = score_pairs(prompts, points) if self.labels == "rules" else given_pairs(prompts)
        if not known:
            raise self._refusal("no two responses to one conversation have different scores")
        order = random.Random(derive(seed, "augment")).sample(range(len(known)), min(len(known), self.rows // 2))
        return [known[i] for i in order]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse data that lack what ``labels`` reads.

        Raises:
            DataError: a prompt has no verifiable answer, or none has a rejected response.
        """
        if self.labels == "rules":
            without = [prompt.id for prompt in prompts if prompt.answer is None]
            if without:
                raise DataError(
                    f"augment.labels=rules: needs a verifiable answer for every prompt; {len(without):,} of "
                    f"{len(prompts):,} have none, the first is {without[0]}; augment.labels=given takes the data's own "
                    "pairs"
                )
        elif all(prompt.rejected is None for prompt in prompts):
            raise self._refusal("no row has a rejected response")

    def _refusal(self, lack: str) -> DataError:
        return DataError(
            f"augment.labels={self.labels}: {lack}, so there is nothing to teach a judge; take augment=off"
        )

    def make_rows(self, policy: "Policy", pairs: Sequence[Gold]) -> list[JudgeRow]:
        """Each pair in both orders, without questions that are longer than the policy's context."""
        from dnpo.policy.tokenizer import encode

        context = int(getattr(policy.causal_lm.config, "max_position_embeddings", 0) or 10**9)
        rows = []
        for pair in pairs:
            for letter in LETTERS:
                first, second = (pair.better, pair.worse) if letter == LETTERS[0] else (pair.worse, pair.better)
                asked = ask(self.template, pair.messages, first, second)
                prompt_ids, ids = encode(policy.tokenizer, asked, letter, policy.stop_ids)
                if len(prompt_ids) + len(ids) <= context:
                    weights = [self.weight, *[1.0] * (len(ids) - 1)]
                    rows.append(JudgeRow(f"{pair.id} {letter}", prompt_ids, ids, weights))
        return rows


def given_pairs(prompts: Sequence[Prompt]) -> list[Gold]:
    """The pairs of the data."""
    return [Gold(p.id, p.messages, p.human, p.rejected) for p in prompts if p.rejected is not None]


def score_pairs(prompts: Sequence[Prompt], points: Callable[[Prompt, str], float]) -> list[Gold]:
    """All pairs of different responses to one conversation that have different points.

    The responses are the human ones of all rows with this conversation, and the data's rejected ones. Each pair occurs
    once, under the id of the first row of its conversation.
    """
    responses: dict[str, tuple[Prompt, dict[str, float]]] = {}
    for prompt in prompts:
        name = "\0".join(text for turn in prompt.messages for text in (turn["role"], turn["content"]))
        first, known = responses.setdefault(name, (prompt, {}))
        for text in (prompt.human, prompt.rejected):
            if text is not None and text not in known:
                known[text] = points(first, text)
    return [
        Gold(f"{prompt.id}:{i}:{j}", prompt.messages, *((a, b) if known[a] > known[b] else (b, a)))
        for prompt, known in responses.values()
        for (i, a), (j, b) in combinations(enumerate(known), 2)
        if known[a] != known[b]
    ]


def augment(
    policy: "Policy", rows: Sequence[JudgeRow], optimisation: Optimisation, *, seed: int, folder: Path, report: Report
) -> list[dict[str, float]]:
    """Train the policy in place on questions and their answers.

    Args:
        policy: the policy; its module is changed.
        rows: the questions.
        optimisation: how to train.
        seed: seed of the order of the rows.
        folder: where the checkpoint is kept.
        report: receives the progress.

    Returns:
        A row of metrics for each policy step.
    """
    from dnpo.judges.lessons import teach

    if len(rows) < FEWEST:
        report.note(
            f"augment: {len(rows):,} questions; with fewer than about {FEWEST:,}, a small model memorises the answers "
            "instead of learning to judge (python -m benchmarks.self_judge). More pairs give more questions: "
            "data.gold_pairs=1 in the tiny world"
        )
    return teach(policy, rows, optimisation, seed=seed, folder=folder, report=report)
