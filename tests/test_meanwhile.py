"""A judge that works in another process while this one trains."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from dnpo.errors import JudgeError, SettingsError
from dnpo.interrupts import ENDING
from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.asked.openai import OpenAI
from dnpo.judges.meanwhile import Meanwhile
from dnpo.records import Prompt, Response
from tests.conftest import Report
from tests.judge_server import judge_server
from tests.judging import Obedient, Stuck, rows

ROOT = Path(__file__).resolve().parent.parent


def told(text: str) -> tuple[list[Prompt], list[Response]]:
    prompts, responses = rows(2)
    return prompts, [Response(each.id, each.source, text, [], 0, "eos") for each in responses]


@pytest.fixture(scope="module")
def report() -> Report:
    return Report()


@pytest.fixture(scope="module")
def judge(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Meanwhile]:
    folder = tmp_path_factory.mktemp("judge")
    with closing(Meanwhile(Obedient(), Ledger(folder / "ledger.sqlite"), report)) as meanwhile:
        yield meanwhile


def test_rounds_are_judged_in_turn_in_one_other_process(judge: Meanwhile, report: Report) -> None:
    rounds = [judge.ask(*told(text)) for text in ("one", "note", "three")]
    verdicts = [each.result(60) for each in rounds]
    assert [v.reason for each in verdicts for v in each] == ["one", "one", "note", "note", "three", "three"]
    (process,) = {v.score for each in verdicts for v in each}
    assert process != os.getpid()
    assert report.notes == ["a note"]


def test_errors_arrive_where_the_verdicts_are_taken_and_the_next_round_is_judged(judge: Meanwhile) -> None:
    with pytest.raises(JudgeError, match="it will not"):
        judge.ask(*told("refuse")).result(60)
    with pytest.raises(ZeroDivisionError, match="a fault of the judge"):
        judge.ask(*told("fail")).result(60)
    assert judge.ask(*told("again")).result(60)[0].reason == "again"


def test_signals_that_a_scheduler_sends_to_all_processes_are_left_to_the_training(judge: Meanwhile) -> None:
    judge.ask(*told("one")).result(60)
    for number in (signal.SIGINT, *ENDING):
        os.kill(judge._process.pid or 0, number)
    assert judge.ask(*told("again")).result(60)[0].reason == "again"


def test_a_process_that_is_killed_is_an_error_of_the_judge(tmp_path: Path, report: Report) -> None:
    with closing(Meanwhile(Obedient(), Ledger(tmp_path / "ledger.sqlite"), report)) as judge:
        for _ in range(2):  # the second call finds no process
            with pytest.raises(JudgeError, match="exit code -9; run the same command again"):
                judge.ask(*told("die")).result(60)


def test_closing_ends_a_judge_at_work(tmp_path: Path, report: Report) -> None:
    judge = Meanwhile(Obedient(), Ledger(tmp_path / "ledger.sqlite"), report)
    judge.ask(*told("sleep"))
    started = time.monotonic()
    judge.close()
    assert time.monotonic() - started < 30
    assert judge._process.exitcode is not None


def test_a_judge_that_cannot_be_sent_is_refused_by_the_setting(tmp_path: Path, report: Report) -> None:
    with pytest.raises(SettingsError, match=r"rollout\.ahead_by: Stuck \(judge\) cannot be sent to another process"):
        Meanwhile(Stuck(), Ledger(tmp_path / "ledger.sqlite"), report)


def test_a_judge_by_api_keeps_its_template_and_the_parameters_that_the_server_refused(tmp_path: Path) -> None:
    """So parameters that the check before the run found to be refused are not sent again."""
    template, report = tmp_path / "own.yaml", Report()
    shipped = ROOT / "src" / "dnpo" / "judges" / "asked" / "templates" / "score.yaml"
    template.write_text(shipped.read_text())
    with judge_server(reject="response_format") as server, Ledger(tmp_path / "ledger.sqlite") as ledger:
        api = OpenAI(model="judge", base_url=server.base_url, template=str(template))
        expected = api(*rows(3), ledger, report)
        refused = server.stats()["refused"]
        assert refused
        template.unlink()  # it was read once
        with closing(Meanwhile(api, Ledger(tmp_path / "other.sqlite"), report)) as meanwhile:
            assert meanwhile.ask(*rows(3)).result(60) == expected
        assert server.stats()["refused"] == refused
        assert server.stats()["delivered"] == 6


def test_the_judge_ends_when_the_training_is_killed(tmp_path: Path) -> None:
    script = (
        "from tests.judging import *; from dnpo.judges.meanwhile import Meanwhile\n"
        "if __name__ == '__main__':\n"
        f"    judge = Meanwhile(Obedient(), Ledger(Path({str(tmp_path)!r}) / 'ledger.sqlite'), Silence())\n"
        "    print(judge._process.pid, flush=True)\n"
        "    prompts, responses = rows(1, 'sleep')\n"
        "    judge.ask(prompts, [Response('0', 'policy@0', 'sleep', [], 0, 'eos')]).result()\n"
    )
    path = tmp_path / "training.py"
    path.write_text(script)
    with subprocess.Popen(
        [sys.executable, path],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
    ) as training:
        assert training.stdout is not None
        process = int(training.stdout.readline())
        assert _lives(process)
        training.kill()
    until = time.monotonic() + 30
    while _lives(process) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _lives(process)


def _lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
