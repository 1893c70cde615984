"""Let a policy of a finished run respond to prompts that are typed or read from a file.

Responses are sampled as in a run: the same prompt, seed and settings give the same response.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnpo.errors import DataError, DnpoError, SettingsError
from dnpo.generate import Ahead
from dnpo.records import Message, Prompt, Response
from dnpo.running.card import SavedPolicy
from dnpo.running.export import find_policy, load_policy, read_summary
from dnpo.settings import build, check

if TYPE_CHECKING:
    from dnpo.judges import Judge
    from dnpo.policy.model import Policy

AHEAD = "dnpo.generate.Ahead"
SAMPLING = ("temperature", "top_k", "top_p")
ROLES = ("system", "user", "assistant")


class Unreported:
    """Ignores the progress of work that is too short to show it."""

    def begin(self, total: int, unit: str, done: int = 0) -> None:
        """Ignore it."""

    def advance(self, amount: int = 1) -> None:
        """Ignore it."""

    def note(self, text: str) -> None:
        """Ignore it."""

    def status(self, text: str) -> None:
        """Ignore it."""

    def steps(self, rows: list[dict[str, float]]) -> None:
        """Ignore them."""


@dataclass(frozen=True)
class Speaker:
    """A loaded policy that responds.

    Attributes:
        name: ``sft`` or ``iteration-K``.
        sampling: temperature, truncation and number of samples.
        limit: maximum number of tokens of a response.
        room: maximum number of tokens of a rendered prompt.
    """

    name: str
    policy: "Policy"
    sampling: Ahead
    limit: int
    room: int

    def respond(self, conversations: Sequence[list[Message]], seed: int) -> list[list[Response]]:
        """Sample responses to conversations that end with a user's turn; return a list for each conversation.

        Raises:
            DataError: a conversation is longer than the model's context allows.
            ModelError: the chat template cannot render a conversation.
        """
        from dnpo.generate.hf import sample
        from dnpo.policy.tokenizer import encode

        prompts = []
        for number, messages in enumerate(conversations):
            ids, _ = encode(self.policy.tokenizer, messages, "", self.policy.stop_ids)
            if len(ids) > self.room:
                raise DataError(
                    f"prompt {number + 1} has {len(ids)} tokens; the model has room for {self.room} and a response of "
                    f"{self.limit} (max_tokens)"
                )
            prompts.append(Prompt(f"{number}-{_hash(messages)}", messages, "", token_ids=ids))
        several = [prompt for prompt in prompts for _ in range(self.sampling.samples)]
        found = sample(self.policy, several, self.sampling, self.name, self.limit, seed, Unreported())
        count = self.sampling.samples
        return [found[first : first + count] for first in range(0, len(found), count)]


def open_speaker(
    run: Path,
    iteration: str | None,
    store: Path | None,
    *,
    device: str = "cpu",
    samples: int = 1,
    max_tokens: int = 0,
    **sampling: float | int | None,
) -> Speaker:
    """Load a policy of a finished run, to sample as the run does unless other values are given.

    Args:
        run: the run's folder.
        iteration: ``sft`` or a number; None for the policy that the run keeps.
        store: the store's folder, if it has moved.
        max_tokens: maximum number of tokens of a response; 0 takes the run's.
        sampling: ``temperature``, ``top_k``, ``top_p``; None takes the run's.

    Raises:
        SettingsError: there is no such run, iteration or stage, or a value is out of range.
        ModelError: the base model no longer exists or has changed.
    """
    saved = find_policy(read_summary(run), iteration, store)
    rollout = choose_sampling(saved, samples, **sampling)
    limit = max_tokens or int(saved.setting("data", "max_response_tokens"))
    policy = load_policy(saved, device)
    context = getattr(policy.causal_lm.config, "max_position_embeddings", None) or 1 << 30
    if limit >= context:
        raise SettingsError(f"max_tokens={limit}: the model has a context of {context} tokens")
    return Speaker(saved.name, policy, rollout, limit, context - limit)


def choose_sampling(saved: SavedPolicy, samples: int, **sampling: float | int | None) -> Ahead:
    """Return how a policy of a run samples: as the run does, unless other values are given.

    Raises:
        SettingsError: a value is out of range, or values contradict each other.
    """
    values: dict[str, Any] = {name: saved.setting("generate", name) for name in SAMPLING}
    values |= {name: value for name, value in sampling.items() if value is not None}
    values = {name: value for name, value in values.items() if value is not None}
    try:
        rollout: Ahead = build("sampling", check("sampling", {"_target_": AHEAD, "samples": samples, **values}))
    except SettingsError as error:  # the commands take the settings by their bare names
        raise SettingsError(str(error).removeprefix("sampling.")) from error
    return rollout


def open_judge(saved: SavedPolicy) -> "Judge | str":
    """Build the judge of a run's evaluations, for texts without a known answer; or say why it cannot judge them."""
    settings = saved.summary["settings"]
    own = (settings.get("eval") or {}).get("judge") or settings["judge"]
    if isinstance(own, list):
        own = own[-1]
    name = str(own["_target_"]).rpartition(".")[2]
    try:
        plain = {key: value for key, value in own.items() if key != "contents"}
        judge: Judge = build("judge", check("judge", plain))
    except DnpoError as error:
        return str(error)
    if not judge.gives_scores or not judge.measures_texts or judge.reads_policies:
        return f"the run's judge ({name}) does not score texts"
    refused = judge.accepts([Prompt("0", [{"role": "user", "content": "?"}], "")])
    return judge if refused is None else f"the run's judge ({name}) needs rows with a known answer"


def opinions(
    judge: "Judge", conversations: Sequence[list[Message]], responses: Sequence[Response], ledger: Path
) -> list[str]:
    """Let the judge score responses, each to its conversation; a response without a score has a reason instead."""
    from dnpo.judges.asked.ledger import Ledger

    prompts = [Prompt(str(n), messages, "") for n, messages in enumerate(conversations)]
    rows = [replace(response, id=str(n), sample=0) for n, response in enumerate(responses)]
    with Ledger(ledger, "chat") as known:
        verdicts = judge(prompts, rows, known, Unreported())
    return [f"no score ({each.reason})" if each.score is None else f"{each.score:.1f}" for each in verdicts]


def read_conversations(path: Path) -> list[list[Message]]:
    """Read prompts: lines of text, or JSON lines with ``prompt`` (a text or turns) or ``messages``.

    If ``messages`` ends with a turn of the assistant, that turn is left out: the policy is to write it.

    Raises:
        DataError: the file cannot be read, or a line has no prompt; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    rows = [(f"{path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    found = [_turns(json_row(at, line), at) if path.suffix == ".jsonl" else [user(line)] for at, line in rows]
    if not found:
        raise DataError(f"{path}: has no prompt")
    return found


def user(text: str) -> Message:
    """A user's turn."""
    return {"role": "user", "content": text}


def json_row(at: str, line: str) -> Any:
    """Parse a line of JSON.

    Raises:
        DataError: it is not JSON.
    """
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{at}: is not JSON ({error})") from error


def _turns(row: Any, at: str) -> list[Message]:
    given = row.get("messages", row.get("prompt")) if isinstance(row, dict) else row
    if isinstance(given, str) and given.strip():
        return [user(given)]
    turns = list(_valid_turns(given)) if isinstance(given, list) else []
    complete = isinstance(given, list) and len(turns) == len(given)
    if turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or not complete:
        raise DataError(f"{at}: expected prompt (a text, or turns with role and content) or messages")
    return turns


def _valid_turns(given: Sequence[Any]) -> Iterator[Message]:
    for turn in given:
        if isinstance(turn, dict) and turn.get("role") in ROLES and isinstance(turn.get("content"), str):
            yield {"role": turn["role"], "content": turn["content"]}


def _hash(messages: list[Message]) -> str:
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:12]
