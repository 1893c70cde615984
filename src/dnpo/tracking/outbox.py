"""Send a run's data to MLflow, and keep them in a file in the run's folder while MLflow does not answer."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dnpo.escape import for_database, for_mlflow, say

KEPT = "dnpo.kept"  # tag with the name of the file of unsent data
FILE = "untracked.jsonl"
LATER = "later:"  # placeholder for the id of a model that does not exist yet
PATIENCE = 30  # minimum seconds between two attempts

Kind = Literal["metrics", "tags", "params", "artifact", "inputs", "model", "end"]


@dataclass(frozen=True)
class Message:
    """One thing to send, as plain values."""

    kind: Kind
    content: Any

    @property
    def way(self) -> str:
        """The store that takes the message: ``runs`` or ``artefacts``. One may answer while the other does not."""
        return "artefacts" if self.kind == "artifact" else "runs"


class Refused(Exception):
    """MLflow answers, but will never accept this message."""


def send(client: Any, experiment: str, run: str, message: Message, models: dict[str, str]) -> str:
    """Send one message, and return the id of what it created.

    Args:
        models: ids of models, by their placeholders in messages; a new one is added.

    Raises:
        Refused: MLflow will never accept it.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, ErrorCode

    content = message.content
    try:
        if message.kind == "metrics":
            client.log_batch(run, metrics=[_metric(each, models) for each in content])
        elif message.kind == "tags":
            _send_tags(client, run, content)
        elif message.kind == "params":
            _send_params(client, run, content)
        elif message.kind == "artifact":
            if not Path(content["path"]).is_file():
                raise Refused(f"{content['path']} is gone")
            client.log_artifact(run, content["path"], content["folder"] or None)
        elif message.kind == "inputs":
            _send_inputs(client, run, content)
        elif message.kind == "model":
            models[LATER + content["name"]] = made = _make_model(client, experiment, run, content)
            return made
        else:
            client.set_terminated(run, content["status"], content["time"])
            for name in content["remove"]:
                client.delete_tag(run, name)
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(INVALID_PARAMETER_VALUE):
            raise Refused(str(error).splitlines()[0]) from error
        raise
    return ""


def send_kept(client: Any, experiment: str, run: str, messages: Iterable[Message]) -> None:
    """Send the data that an ended run kept. Data that MLflow will never accept are skipped with a warning."""
    models: dict[str, str] = {}
    for message in messages:
        try:
            send(client, experiment, run, message, models)
        except Refused as refused:
            what = f"a kept message of kind {message.kind} ({refused})"
            warn(f"run {run}: MLflow refuses {what}; see the run's folder for it")


def warn(text: str) -> None:
    """Print a warning, on one line."""
    say(f"warning: {text}", error=True)


def read_kept(path: Path) -> list[Message]:
    """Read the data that a run kept; an incomplete last line, left by a kill, is ignored."""
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [Message(**json.loads(line)) for line in whole]


@dataclass
class Outbox:
    """Unsent data, in order. They are also in a file in the run's folder.

    Attributes:
        folder: folder of the file; None: messages are kept in memory only.
        down: those of the two stores (see :attr:`Message.way`) that did not accept the last message.
    """

    folder: Path | None = None
    messages: list[Message] = field(default_factory=list)
    down: set[str] = field(default_factory=set)
    next_attempt: float = 0.0

    @property
    def path(self) -> Path | None:
        """The file."""
        return None if self.folder is None else (self.folder / FILE).absolute()

    def keep(self, message: Message) -> None:
        """Keep a message for later."""
        self.messages.append(message)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(message))

    def fail(self, way: str, took: float) -> bool:
        """Note that one of the two stores does not answer; return whether both answered before."""
        first = not self.down
        self.down.add(way)
        self.next_attempt = time.monotonic() + max(PATIENCE, 5 * took)
        return first

    def empty(self, send: Callable[[Message], bool]) -> None:
        """Try to send everything. A message that cannot be sent is kept, like all later ones to the same store."""
        self.down.clear()
        left = []
        for message in self.messages:
            if message.way in self.down or not send(message):
                left.append(message)
        self.messages[:] = left
        if self.path is not None and left:
            aside = self.path.with_suffix(".new")
            aside.write_text("".join(map(_line, left)), encoding="utf-8")
            aside.replace(self.path)
        elif self.path is not None:
            self.path.unlink(missing_ok=True)

    def describe(self) -> str:
        """Describe what has not been sent."""
        counts = {
            "metrics": sum(len(each.content) for each in self.messages if each.kind == "metrics"),
            "files": sum(each.kind == "artifact" for each in self.messages),
            "models": sum(each.kind == "model" for each in self.messages),
            "tags": len({name for each in self.messages if each.kind == "tags" for name in each.content}),
        }
        found = [f"{count:,} {what if count > 1 else what[:-1]}" for what, count in counts.items() if count]
        ended = any(each.kind == "end" for each in self.messages)
        return ", ".join([*found, *(["how it ended"] if ended else [])])


def _line(message: Message) -> str:
    return json.dumps({"kind": message.kind, "content": message.content}) + "\n"


def _metric(each: Sequence[Any], models: Mapping[str, str]) -> Any:
    from mlflow.entities import Metric

    name, value, milliseconds, step, about = each
    model = about.get("model_id", "")
    if model.startswith(LATER):
        about = {**about, "model_id": models[model]} if model in models else {}
    return Metric(for_mlflow(name), value, milliseconds, step, **about)


def _send_tags(client: Any, run: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run, tags=[RunTag(for_mlflow(name), for_database(value)) for name, value in tags.items()])


def _send_params(client: Any, run: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    client.log_batch(run, params=[Param(for_mlflow(name), for_database(value)) for name, value in params.items()])


def _send_inputs(client: Any, run: str, datasets: Sequence[Mapping[str, Any]]) -> None:
    """Log the data sets as inputs of the run; try again if a concurrent run adds the same one."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    given = [
        DatasetInput(
            Dataset(**{name: each[name] for name in each if name != "context"}),
            [InputTag("mlflow.data.context", each["context"])],
        )
        for each in datasets
    ]
    for last in (False, False, True):
        try:
            client.log_inputs(run, given)
            return
        except MlflowException as error:
            # A concurrent run may add the same data set between MLflow's query and its insert.
            if last or ("UNIQUE constraint" not in str(error) and "IntegrityError" not in str(error)):
                raise


def _make_model(client: Any, experiment: str, run: str, content: Mapping[str, Any]) -> str:
    """Create a logged model without weights, as an output of the run."""
    from mlflow.entities import LoggedModelOutput

    tags, params = content["tags"], content["params"]
    made = client.create_logged_model(experiment, content["name"], run, tags=tags, params=params)
    client.finalize_logged_model(made.model_id, "READY")
    client.log_outputs(run, [LoggedModelOutput(made.model_id, content["step"])])
    return str(made.model_id)
