"""An engine behind a server that generates, such as vLLM: its settings, configured by ``generate=server``.

Requests and replies of ``/v1/completions`` have token ids, so training reads exactly the sampled tokens. ``session.py``
asks it for the responses of a stage, ``reading.py`` reads its replies, ``launching.py`` starts it.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from dnpo.connection import check_address, find_bad_key
from dnpo.errors import SettingsError
from dnpo.settings import Count, Positive, neutral

PLACES = ("{policy}", "{port}")  # placeholders in a command, for the policy's folder and a free port
EXAMPLE = "http://127.0.0.1:8000/v1"
PART = "generate.engine"  # the name of these settings, for messages


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that generates with the policy's weights.

    Args:
        launch: the command that starts it, with ``{policy}`` for a folder with the policy's weights and ``{port}`` for
            a free port. A stage starts the server when it first needs one, and ends it.
        base_url: the address of a running server, including ``/v1``. It must have the policy that responds, so a run
            with several responding policies needs ``launch``. Give either this or ``launch``.
        model: name of the model at the server; None: its only model.
        version: any text. Change it when the engine changes, so that responses of the old engine are not reused.
        key_from: environment variable with the key; vLLM reads the same one. A server may need none.
        headers: further headers, each with the environment variable that holds its value.
        concurrency: maximum number of requests in flight, each of them for all responses to a prompt.
        timeout: seconds of one attempt.
        deadline: seconds from the first attempt at a request to the last.
        start_timeout: seconds until a launched server answers.
        max_mean_difference: maximum mean difference of log-probabilities between engine and this process, in nats per
            token; above it a stage stops.
        max_difference: maximum difference of a single token; None: no limit.

    Raises:
        SettingsError: settings that contradict each other, an address with a secret in it, or a command without the two
            placeholders.
    """

    launch: str | None = neutral(None)
    base_url: str | None = neutral(None)
    model: str | None = neutral(None)
    version: str | None = None
    key_from: str = neutral("VLLM_API_KEY")
    headers: Mapping[str, str] | None = neutral(None)
    concurrency: Count = neutral(64)
    timeout: Positive = neutral(600.0)
    deadline: Positive = neutral(1800.0)
    start_timeout: Positive = neutral(900.0)
    max_mean_difference: Positive = neutral(0.05)
    max_difference: Positive | None = neutral(None)

    def __post_init__(self) -> None:
        if (self.launch is None) == (self.base_url is None):
            raise SettingsError(
                "launch: give either the command that starts a server, such as launch='vllm serve {policy} --port "
                f"{{port}}', or the address of one that is running, such as base_url={EXAMPLE}"
            )
        if self.base_url is not None:
            check_address("base_url", self.base_url, PART, EXAMPLE)
        if self.launch is not None:
            self._check_command(self.launch)

    def _check_command(self, launch: str) -> None:
        try:
            words = shlex.split(launch)
        except ValueError as error:
            raise SettingsError(f"launch={launch}: cannot be read as a command ({error})") from None
        lacking = [place for place in PLACES if place not in launch]
        if lacking:
            raise SettingsError(
                f"launch={launch}: has no {' and no '.join(lacking)}; expected a command such as 'vllm serve "
                "{policy} --port {port}'"
            )
        if any(word.partition("=")[0] == "--api-key" for word in words):
            raise SettingsError(
                f"launch: has --api-key; settings are saved in a run's files, so export the key in {self.key_from} "
                f"({PART}.key_from), which vLLM reads too if it is VLLM_API_KEY"
            )

    def command(self, policy: str, port: int) -> list[str]:
        """The words of the command that starts a server with a policy."""
        words = shlex.split(self.launch or "")
        return [word.replace("{policy}", policy).replace("{port}", str(port)) for word in words]

    @property
    def key_problem(self) -> str | None:
        """Why the keys in the environment cannot be sent; None if they can."""
        return find_bad_key(PART, "generate=server", self.key_from, self.headers or {})
