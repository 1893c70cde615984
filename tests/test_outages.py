"""A tracking server that no longer answers: the run continues, and its metrics are kept and sent later."""

import importlib
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from werkzeug.serving import BaseWSGIServer, make_server

from dnpo.tracking.alive import ALIVE, NOTE
from dnpo.tracking.outbox import FILE
from dnpo.tracking.writing import MLflowTracking
from tests.commands import SMOKE, train

ANSWERS_AGAIN, NOT_TRACKED = "MLflow answers again", "not tracked yet"


class Server:
    """MLflow's server over a SQLite database, in this process; it can stop and start again on the same port."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self._app, self._server, self._port, self._left = app, None, 0, -1
        self.come_back()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.uri)

    @property
    def is_dead(self) -> bool:
        return self._server is None

    def die(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        self._server = None

    def die_after(self, requests: int) -> None:
        self._left = requests

    def come_back(self) -> None:
        self._left = -1
        self._server: BaseWSGIServer | None = make_server("127.0.0.1", self._port, self._answer, threaded=True)
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def _answer(self, environ: dict[str, Any], start: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            threading.Thread(target=self.die).start()
        return self._app(environ, start)


@pytest.fixture(scope="module")
def app(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(migrated, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{folder / 'mlflow.db'}")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", str(folder / "artifacts"))
        patch.setenv("_MLFLOW_SERVER_SERVE_ARTIFACTS", "false")
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        yield importlib.import_module("mlflow.server").app


@pytest.fixture
def server(app: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the folder of the locks of active runs
    server = Server(app)
    yield server
    server.die_after(-1)
    if server.is_dead:
        server.come_back()
    for run in server.client.search_runs(["1"]):
        server.client.delete_run(run.info.run_id)
    server.die()


def lose(server: Server, tmp_path: Path) -> MLflowTracking:
    """Begin a run that sends one metric before the server stops, and data of every kind after it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.txt").write_text("artefact")
    run = MLflowTracking(uri=server.uri)
    run.start("a run", {}, {"dnpo.kind": "run"}, None, tmp_path / "run")
    run.metrics({"loss/policy": 1.0}, 0)
    assert run.flush()
    server.die()
    run.metrics({"loss/policy": 2.0}, 1)
    assert not run.flush()
    model = run.model("iteration-0", 0, {"stage": "optimise/abc"}, "a policy")
    run.metrics({"eval/score": 50.0}, 0, model)
    run.artifact(tmp_path / "run" / "a.txt", "kept")
    run.note("what it is")
    assert not run.has("0" * 32), "it cannot be looked up"
    return run


def is_whole(run: MLflowTracking, server: Server, folder: Path) -> None:
    """Check that the server has all the run's data, once."""
    found = server.client.get_run(run.id)
    assert found.data.metrics == {"loss/policy": 2.0, "eval/score": 50.0}
    assert [point.value for point in server.client.get_metric_history(run.id, "loss/policy")] == [1.0, 2.0]
    assert found.data.tags[NOTE] == "what it is"
    assert ALIVE not in found.data.tags
    (made,) = found.outputs.model_outputs
    assert server.client.get_logged_model(made.model_id).metrics[0].key == "eval/score"
    assert [each.path for each in server.client.list_artifacts(run.id, "kept")] == ["kept/a.txt"]
    assert not (folder / FILE).exists()


def test_kept_data_is_sent_once_the_server_answers_again(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = lose(server, tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert "MLflow no longer answers (Connection refused). The run continues" in said[0]
    assert str(tmp_path / "run" / FILE) in said[0]
    server.come_back()
    assert run.finish("FINISHED") == ""
    assert ANSWERS_AGAIN in capsys.readouterr().err
    is_whole(run, server, tmp_path / "run")
    assert server.client.get_run(run.id).info.status == "FINISHED"


@pytest.mark.parametrize("status", ["FINISHED", "FAILED"])
def test_the_next_run_sends_what_a_run_could_not(
    status: Any, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = lose(server, tmp_path)
    assert run.finish(status) == "2 metrics, 1 file, 1 model, 1 tag, how it ended"
    (said,) = [line for line in capsys.readouterr().err.splitlines() if NOT_TRACKED in line]
    assert str(tmp_path / "run" / FILE) in said
    ended = (tmp_path / "run" / FILE).stat().st_mtime * 1000
    server.come_back()
    assert server.client.get_run(run.id).info.status == "RUNNING"
    following = MLflowTracking(uri=server.uri)
    following.start("next", {}, {"dnpo.kind": "run"}, None)
    following.finish("FINISHED")
    is_whole(run, server, tmp_path / "run")
    found = server.client.get_run(run.id).info
    assert found.status == status
    assert found.end_time == pytest.approx(ended, abs=2000), "it ended when it ended"


@pytest.mark.parametrize("requests", [16, 20])
def test_a_run_ends_without_its_server(requests: int, server: Server, finished: Path) -> None:
    server.die_after(requests)
    done = train(finished, SMOKE[0], MLFLOW_TRACKING_URI=server.uri)
    assert done.returncode == 0, done.stderr
    assert "Results by iteration" in done.stdout
    said = done.stderr.splitlines()
    assert len(said) == 2, done.stderr  # and no log lines of libraries about their attempts
    assert "no longer answers" in said[0]
    assert NOT_TRACKED in said[1]


def test_a_run_that_fails_without_its_server_shows_its_own_error(server: Server, finished: Path) -> None:
    server.die_after(16)
    settings = ("trainer.optimizer.lr=1e30", "iterations=1")
    done = train(finished, SMOKE[0], *settings, MLFLOW_TRACKING_URI=server.uri)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr
    assert "the loss is" in done.stderr
    server.come_back()
    following = MLflowTracking(uri=server.uri)
    following.start("next", {}, {"dnpo.kind": "run"}, None)
    following.finish("FINISHED")
    runs = server.client.search_runs(["1"])
    assert [run.info.status for run in runs if "lr=1e30" in run.info.run_name] == ["FAILED"]
