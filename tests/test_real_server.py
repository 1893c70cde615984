"""A real server with a real model answers the judge by API, as at a user's local endpoint."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.asked.openai import OpenAI
from dnpo.records import Prompt, Response
from tests.conftest import Report
from tests.judge_model import make
from tests.test_train import succeed, summary

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address and model name of ``transformers serve`` with the tiny judge; stopped at the end."""
    pytest.importorskip("fastapi", reason="transformers serve needs fastapi and uvicorn")
    pytest.importorskip("uvicorn", reason="transformers serve needs fastapi and uvicorn")
    folder = tmp_path_factory.mktemp("server")
    make(folder / "judge")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder / "judge")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except urllib.error.HTTPError:
                break  # it answers
            except OSError:
                assert process.poll() is None, (folder / "log.txt").read_text()
                assert time.monotonic() < until, (folder / "log.txt").read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", str(folder / "judge")
    finally:
        process.terminate()
        process.wait(30)


def test_a_model_behind_transformers_serve_judges(server: tuple[str, str], tmp_path: Path) -> None:
    """It ignores response_format and log-probabilities; its plain numbers are read by the strict rules."""
    base_url, model = server
    judge = OpenAI(model=model, base_url=base_url, concurrency=4, timeout=60.0)
    prompts = [Prompt(str(i), [{"role": "user", "content": f"Add {i} and 1."}], "") for i in range(12)]
    responses = [Response(p.id, "policy@0", f"The sum is {p.id}.", [], 0, "eos") for p in prompts]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert judge.canary(ledger).text
        verdicts = judge(prompts, responses, ledger, Report())
        assert all(v.score is not None and 0 <= v.score <= 100 for v in verdicts), verdicts
        row = next(row for row in ledger.rows())
        assert row["tokens_in"] > 12 * 100
        # the second time, answers come from the ledger
        assert judge(prompts, responses, ledger, Report()) == verdicts
        assert sum(row["hits"] for row in ledger.rows()) == 12


def test_a_whole_run_labels_by_it(server: tuple[str, str], tmp_path: Path) -> None:
    base_url, model = server
    out = succeed(
        tmp_path, "scale=smoke", "tracking=off", "judge=openai", f"judge.model={model}", f"judge.base_url={base_url}",
        "judge.concurrency=4", "iterations=2", "data.train=48", "data.validation=12", "data.test=12", "eval.samples=1",
    )  # fmt: skip
    table = summary(tmp_path)["table"]
    assert "iteration 1 · judge" in out
    assert table[-1]["pairs/unscored"] == 0
    assert table[-1]["pairs/pairs"] > 0
    assert 0 <= table[-1]["eval/score"] <= 100
