"""A language model on this machine as judge. It is asked the same questions as a judge by API.

Nothing is sampled. The score is the expected value of the number that the model would write. The result of a comparison
is P(A) / (P(A) + P(B)). Both are computed from the exact probabilities of these replies (``replies.py``).
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from dnpo.errors import JudgeError, OutOfMemoryError, SettingsError
from dnpo.judges import Canary, too_many
from dnpo.judges.asked.ledger import Answer, Ledger, Question
from dnpo.judges.asked.questions import Prompted
from dnpo.policy.weights import Weights, context_of
from dnpo.records import Prompt
from dnpo.settings import Count, Dtype, Fraction, neutral, place
from dnpo.store import Report
from dnpo.wording import plural

if TYPE_CHECKING:
    from dnpo.judges.asked.replies import Replies

NUMBERS = [str(number) for number in range(101)]
WINNERS = ["A", "B", "TIE"]  # TIE counts only in the total probability
POLL = 0.5  # seconds between checks of questions that another run is asking


@dataclass(frozen=True, kw_only=True)
class HF(Prompted):
    """A causal language model of transformers as judge.

    The model is loaded when it is asked and released afterwards, so that it takes no memory from training.

    Args:
        path: a folder with ``config.json``, safetensors weights and a tokenizer.
        name: a name on the hub. Give either this or ``path``.
        revision: a branch, tag or commit of the model on the hub.
        mode: ``score``, or ``pairwise``: the generated against the human response, in both orders.
        template: a file with the question; null takes the shipped one for the mode.
        template_date: the current date for a chat template that reads the clock, such as ``2026-01-31``.
        min_mass: minimum total probability of the replies that the question asks for. With less, the model does not
            follow the instruction and its numbers mean little, so the question fails.
        dtype: type of the weights. bfloat16 takes half the memory, and scores depend slightly on the batch.
        device: ``auto`` is the GPU if there is one, as for the policy.
        batch_size: questions in a batch; changes only speed, memory and rounding. If numbers take several tokens, the
            keys and values of each question are kept in about a dozen copies.
        max_unscored: share of responses that may lack a score.

    Raises:
        ModelError: there is no such folder, or not exactly one of ``path`` and ``name`` is given.
        SettingsError: the template cannot be used.
    """

    path: str | None = place(None)
    name: str | None = None
    revision: str | None = None
    template_date: str | None = None
    min_mass: Fraction = 0.5
    dtype: Dtype = "float32"
    device: str = neutral("auto")
    batch_size: Count = neutral(8)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.weights  # a missing folder is refused at once

    @cached_property
    def weights(self) -> Weights:
        """Where the model is."""
        return Weights(self.path, self.name, self.revision)

    @property
    def kind(self) -> str:
        """``hf``, how the model is read, and the mode."""
        # min_mass decides which questions have an answer, so answers with another value cannot be used
        date = f" {self.template_date}" if self.template_date else ""
        return f"hf {self.dtype} m={self.min_mass:g} {self.mode} logprobs, plain content{date}"

    @cached_property
    def respondent(self) -> str:
        """The kind of model, and the beginning of its hash or commit."""
        return self.weights.label

    @cached_property
    def _device(self) -> str:
        from dnpo.policy.model import device_of

        return device_of(self.device)

    def accepts(self, prompts: Sequence[Prompt]) -> str | None:
        """Accept any prompt, if the device exists and the model's files are complete."""
        try:
            _ = self._device
        except SettingsError as error:
            return f"judge.{error}"
        return self._objection

    @cached_property
    def _objection(self) -> str | None:
        """Why the model's files cannot be used; None if they can."""
        from transformers import AutoModelForCausalLM

        return self.weights.object_to(AutoModelForCausalLM)

    def canary(self, ledger: Ledger) -> Canary:
        """Ask one question to see whether the model follows the instruction; the ledger keeps the answer."""
        prompt = Prompt("canary", [{"role": "user", "content": "Name the capital of France."}], "")
        texts = ("Paris.", "") if self.mode == "score" else ("Paris.", "Oslo.")
        question = self._question(prompt, *texts, order="" if self.mode == "score" else "ab")
        known = ledger.answers([question.key])
        reasons = {} if known else self.ask([question], ledger, None, 1)
        if question.key in reasons:
            return Canary(False, f"{self.respondent}: {reasons[question.key]}")
        value = ledger.answers([question.key])[question.key]
        return Canary(True, f"{self.respondent} on {self._device} scores a right answer with {value:.1f} points")

    def ask(self, questions: Sequence[Question], ledger: Ledger, report: Report | None, total: int) -> dict[str, str]:
        """Load the model, and read the questions in batches, the longest first.

        Raises:
            ModelError: the model cannot be loaded.
            OutOfMemoryError: a batch does not fit into memory.
            JudgeError: too many questions failed. The ledger has the answers so far.
        """
        reader = self._reader(questions[0])
        prompts = {q.key: reader.encode(q.messages) for q in questions}
        # the longest first, so that a lack of memory is seen at once and batches have little padding
        row = deque(sorted(questions, key=lambda q: -len(prompts[q.key])))
        elsewhere: deque[Question] = deque()  # another run is asking these now
        reasons: dict[str, str] = {}
        while row or elsewhere:
            if not row:
                time.sleep(POLL)
                row, elsewhere = elsewhere, row
            some = [row.popleft() for _ in range(min(self.batch_size, len(row)))]
            mine, answered, _ = ledger.claim([q.key for q in some])
            elsewhere += [q for q in some if q.key not in mine and q.key not in answered]
            if answered:
                ledger.hit(some[0], len(answered))
            try:
                batch = [q for q in some if q.key in mine]
                for question, answer in self._answers(reader, batch, [prompts[q.key] for q in batch]):
                    ledger.record(question, answer)
                    if answer.value is None:
                        reasons[question.key] = answer.reason
            finally:
                ledger.release(mine)
            if report is not None:
                report.advance(len(mine) + len(answered))
            if total > 1 and len(reasons) > self.max_unscored * total:
                raise JudgeError(too_many(len(reasons), total, self.max_unscored, [*reasons.values()], "questions"))
        return reasons

    def _reader(self, example: Question) -> "Replies":
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from dnpo.judges.asked.replies import Replies
        from dnpo.policy.complete import check_causal
        from dnpo.policy.template import put_in_force

        tokenizer = self.weights.load(AutoTokenizer)
        put_in_force(tokenizer, date=self.template_date, setting="judge")
        model = self.weights.load_model(AutoModelForCausalLM, dtype=getattr(torch, self.dtype)).to(self._device)
        check_causal(model.eval(), self.weights.description)
        replies, goes_on = (NUMBERS, "[0-9]") if self.mode == "score" else (WINNERS, "[A-Za-z]")
        return Replies(model, tokenizer, replies, goes_on, example.messages)

    def _answers(
        self, reader: "Replies", questions: Sequence[Question], prompts: Sequence[list[int]]
    ) -> Iterator[tuple[Question, Answer]]:
        import torch

        limit = context_of(reader.model, reader.tokenizer)
        fits = []
        for question, ids in zip(questions, prompts, strict=True):
            if limit is not None and len(ids) + reader.longest > limit:
                reason = f"the question is longer than the judge's context of {limit:,} tokens"
                yield question, Answer(None, tokens_in=len(ids), reason=reason)
            else:
                fits.append((question, ids))
        if not fits:
            return
        began = time.monotonic()
        try:
            rows = reader.probabilities([ids for _, ids in fits]).tolist()
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"judge.batch_size={self.batch_size}: {plural(len(fits), 'question')} of up to "
                f"{max(len(i) for _, i in fits):,} tokens do not fit into the memory of {self._device}; lower it"
            ) from error
        took = (time.monotonic() - began) / len(fits)
        for (question, ids), row in zip(fits, rows, strict=True):
            value, reply, reason = self._read(row)
            yield question, Answer(value, reply, tokens_in=len(ids), cost=0.0, latency=took, reason=reason)

    def _read(self, probabilities: Sequence[float]) -> tuple[float | None, str, str]:
        """The value, the reply for the ledger, and the reason if there is no value."""
        mass = sum(probabilities)
        if mass != mass:
            return None, "", "the model's probabilities are not finite"
        names = NUMBERS if self.mode == "score" else WINNERS
        likeliest = names[max(range(len(names)), key=lambda i: probabilities[i])]
        reply = f"mass {mass:.4g}, mode {likeliest}"
        what = "a number from 0 to 100" if self.mode == "score" else "A, B or TIE"
        low = f"the model gives {what} a probability of only {100 * mass:.0f} % (judge.min_mass={self.min_mass:g})"
        if self.mode == "pairwise":
            a, b, _ = probabilities
            if mass < self.min_mass or a + b <= 0:
                return None, reply, low
            return 100.0 * a / (a + b), reply, ""
        if mass < self.min_mass or mass <= 0:
            return None, reply, low
        return min(sum(n * p for n, p in enumerate(probabilities)) / mass, 100.0), reply, ""
