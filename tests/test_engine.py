"""An engine behind a server: its requests, its replies, its faults, and what is kept of its replies."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dnpo import connection
from dnpo.errors import EngineError, SettingsError
from dnpo.generate import Ahead, Live, Sampling
from dnpo.generate.engines import RESULT, Engines
from dnpo.generate.hf import generate, sample
from dnpo.generate.server import Server
from dnpo.generate.server.session import PROBES, Session
from dnpo.policy.model import Policy
from dnpo.records import Response
from dnpo.settings import part_key
from tests.commands import TINY, Process, numbers, succeed, summary, train
from tests.conftest import Report, World
from tests.engine_server import serving
from tests.forking import forking

MakePolicy = Callable[..., Policy]
LIMIT = 12
FAST: dict[str, Any] = {"timeout": 20.0, "deadline": 20.0, "concurrency": 4}
SERVE = f"{sys.executable} {Path(__file__).with_name('engine_server.py')} {{policy}} --port {{port}}"


@pytest.fixture
def policy(make_policy: MakePolicy) -> Policy:
    """A policy with clear preferences, so that greedy decoding has no near ties, and with many stop tokens."""
    found = make_policy(initializer_range=0.5)
    found.causal_lm.generation_config.eos_token_id = list(range(0, len(found.tokenizer), 15))
    return found


@pytest.fixture
def saved(policy: Policy, tmp_path: Path) -> Path:
    policy.save(tmp_path / "saved")
    return tmp_path / "saved"


@contextmanager
def session(policy: Policy, folder: Path, report: Report | None = None, **server: Any) -> Iterator[Session]:
    found = Session(Server(**{**FAST, **server}), policy, None, folder, report or Report())
    try:
        yield found
    finally:
        found.close()


def draw(
    policy: Policy, world: World, engine: Session | None, sampling: Sampling, count: int = 8, seed: int = 3
) -> list[Response]:
    return sample(policy, world.prompts[:count], sampling, "policy@0", LIMIT, seed, Report(), engine)


def requests(log: Path) -> list[dict[str, Any]]:
    """The requests that a server has answered, without the checks at the start."""
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return [row for row in rows if not row["probe"]]


# --- what is asked, and what comes back


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}], ids=str)
def test_responses_equal_those_of_this_process(
    how: dict[str, Any], policy: Policy, saved: Path, world: World, tmp_path: Path
) -> None:
    """Token by token, greedy and sampled: the test server draws from the streams that it is given as seeds."""
    sampling = Sampling(**how)
    with serving(saved) as url, session(policy, tmp_path / "work", base_url=url) as engine:
        found, ours = draw(policy, world, engine, sampling), draw(policy, world, None, sampling)
        assert [each.token_ids for each in found] == [each.token_ids for each in ours]
        for one, other in zip(found, ours, strict=True):
            assert replace(one, logprob=None) == replace(other, logprob=None)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert {each.finish for each in found} == {"eos", "length"}
        differences = engine.measured()
    assert differences.tokens == sum(each.tokens for each in found)
    assert 0 < differences.greatest < 1e-3
    assert differences.mean <= differences.greatest


def test_several_samples_are_one_request(policy: Policy, saved: Path, world: World, tmp_path: Path) -> None:
    """Each sample has a random stream; the first samples are the same for every number of samples."""
    found = {}
    for samples in (1, 3):
        log, folder = tmp_path / f"log-{samples}", tmp_path / f"shards-{samples}"
        folder.mkdir()
        how: dict[str, Any] = {"source": "policy@0", "limit": LIMIT, "seed": 3, "report": Report(), "folder": folder}
        with serving(saved, log=log) as url, session(policy, tmp_path / f"w{samples}", base_url=url) as engine:
            sampling = Ahead(samples=samples, shard_size=3)
            found[samples] = generate(policy, world.prompts[:7], sampling, **how, engine=engine)
        assert [row["n"] for row in requests(log)] == [samples] * 7
        assert {row["temperature"] for row in requests(log)} == {1.0}
    assert [each.sample for each in found[3]] == [0, 1, 2] * 7
    assert [each.id for each in found[3][::3]] == [each.id for each in found[1]]
    assert [each.token_ids for each in found[3][::3]] == [each.token_ids for each in found[1]]
    assert len({tuple(each.token_ids) for each in found[3][:3]}) == 3


def test_an_appended_token_is_not_compared(policy: Policy, saved: Path, world: World, tmp_path: Path) -> None:
    """It replaces the last token at the limit; the server reports no log-probability for it."""
    with serving(saved) as url, session(policy, tmp_path / "work", base_url=url) as engine:
        found = draw(policy, world, engine, Ahead(append_eos=True))
        plain = draw(policy, world, None, Ahead())
        replaced = sum(each.finish == "length" for each in plain)
        assert replaced
        assert engine.measured().tokens == sum(each.tokens for each in plain) - replaced
    assert all(each.token_ids[-1] in policy.stop_ids for each in found)


# --- what goes wrong

PASSING = ("503", "429", "error_200", "broken", "abort")
FAULTS: dict[str, tuple[str, ...]] = {
    "hang": ("generate.engine.deadline=0.8", "generate.engine.timeout=0.3 s"),
    "no_ids": ("token_ids", "return_token_ids"),
    "unknown_token": ("token 1000000 is not in the policy's vocabulary", "tokenizer"),
    "too_many": ("max_tokens=12",),
    "echo": ("must not echo",),
    "fewer": ("1 completions came back, but n=2",),
    "other_model": ("the model another",),
    "no_logprobs": ("no log-probabilities",),
    "bad_logprob": ("is 0.5; expected a number of at most 0",),
    "no_stop": ("without one of the stop tokens",),
    "goes_on": ("continues for 1 tokens after stop token",),
    "truncated": ("cut at 2 tokens", "--max-model-len"),
    "cut_prompt": ("read another prompt", "truncate_prompt_tokens"),
    "cut_prompt_silent": ("generate.engine.max_mean_difference=0.05", "are not used"),
    "401": ("VLLM_API_KEY", "[key]", "generate.engine.key_from"),
    "404": ("not found", "generate.engine.model"),
    "400": ("out of vocabulary", "another tokenizer"),
    "two_models": ("2 models", "adapter", "generate.engine.model"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_the_setting(
    fault: str, policy: Policy, saved: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that the faulty server returned is used."""
    monkeypatch.setenv("VLLM_API_KEY", "a-secret-key")
    monkeypatch.setattr(connection, "FIRST_PAUSE", 0.01)
    server: dict[str, Any] = {"timeout": 0.3, "deadline": 0.8} if fault == "hang" else {}
    sampling, folder = Ahead(samples=2), tmp_path / "shards"
    folder.mkdir()
    how: dict[str, Any] = {"source": "policy@0", "limit": LIMIT, "seed": 3, "report": Report(), "folder": folder}
    with (
        serving(saved, fault=fault, after=PROBES) as url,
        session(policy, tmp_path / "work", base_url=url, **server) as engine,
        pytest.raises(EngineError) as refused,
    ):
        generate(policy, world.prompts[:8], sampling, **how, engine=engine)
    assert all(words in str(refused.value) for words in FAULTS[fault]), str(refused.value)
    assert "generate.engine" in str(refused.value)
    assert "a-secret-key" not in str(refused.value)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("fault", PASSING)
def test_temporary_failures_are_waited_for(
    fault: str, policy: Policy, saved: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "FIRST_PAUSE", 0.01)
    with serving(saved, fault=fault, after=PROBES) as url, session(policy, tmp_path / "w", base_url=url) as engine:
        found = draw(policy, world, engine, Sampling())
    assert [each.token_ids for each in found] == [each.token_ids for each in draw(policy, world, None, Sampling())]


def test_a_server_with_another_model_is_refused_before_anything_is_asked(
    policy: Policy, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    make_policy(seed=1).save(tmp_path / "other")
    log = tmp_path / "log"
    with (
        serving(tmp_path / "other", log=log) as url,
        session(policy, tmp_path / "work", base_url=url) as engine,
        pytest.raises(EngineError, match=r"generate\.engine: .*may not have the policy"),
    ):
        draw(policy, world, engine, Sampling())
    assert not requests(log)


@pytest.mark.parametrize(
    ("fault", "found_by"), [("", "may not have the policy"), ("no_prompt_logprobs", "max_mean_difference=0.02: ")]
)
def test_an_earlier_policy_is_found(
    fault: str, found_by: str, policy: Policy, saved: Path, world: World, tmp_path: Path
) -> None:
    """It is detected by log-probabilities of prompts or of its samples, which the right policy then generates again."""
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(1.01)
    before = {"max_mean_difference": 0.02}
    with serving(saved, fault=fault) as url, session(policy, tmp_path / "work", base_url=url, **before) as engine:
        with pytest.raises(EngineError, match=f"{re.escape(found_by)}.*an earlier iteration's"):
            draw(policy, world, engine, Sampling(), count=24)
        assert not list((tmp_path / "work").glob("*.jsonl"))
    policy.save(tmp_path / "now")
    with serving(tmp_path / "now") as url, session(policy, tmp_path / "work", base_url=url) as engine:
        found = draw(policy, world, engine, Sampling(), count=24)
    assert [r.token_ids for r in found] == [r.token_ids for r in draw(policy, world, None, Sampling(), count=24)]


def test_the_greatest_difference_has_a_limit(policy: Policy, saved: Path, world: World, tmp_path: Path) -> None:
    limit = {"max_difference": 1e-9}
    with (
        serving(saved) as url,
        session(policy, tmp_path / "work", base_url=url, **limit) as engine,
        pytest.raises(EngineError, match=r"generate\.engine\.max_difference=1e-09"),
    ):
        draw(policy, world, engine, Sampling())


def test_equal_samples_are_reported(policy: Policy, saved: Path, world: World, tmp_path: Path) -> None:
    """With one seed for all completions of a request, a server returns K equal samples."""
    report = Report()
    rows = [(prompt, number) for prompt in world.prompts[:4] for number in range(2)]
    with (
        serving(saved, fault="equal_samples") as url,
        session(policy, tmp_path / "work", report, base_url=url) as engine,
    ):
        engine.complete(rows, Ahead(samples=2), LIMIT, 3, report)
    (note,) = (note for note in report.notes if "all samples of each of 4 prompts are equal" in note)
    assert "generate.engine=null" in note


# --- what is kept


def test_only_missing_responses_are_requested(policy: Policy, saved: Path, world: World, tmp_path: Path) -> None:
    """Within a shard too: after a failure only the missing requests are sent."""
    log, sampling = tmp_path / "log", Sampling(shard_size=3)
    with (
        serving(saved, fault="404", after=3 + 5, log=log) as url,
        session(policy, tmp_path / "work", base_url=url, concurrency=1) as engine,
        pytest.raises(EngineError),
    ):
        draw(policy, world, engine, sampling)
    assert len(requests(log)) == 5
    torn = max((tmp_path / "work").glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    torn.write_text(torn.read_text() + "[2, [[1, 2")  # the process was killed in the middle of a line
    with serving(saved, log=log) as url, session(policy, tmp_path / "work", base_url=url) as engine:
        report = Report()
        found = sample(policy, world.prompts[:8], sampling, "policy@0", LIMIT, 3, report, engine)
        assert report.done == 8
    asked = [(tuple(row["prompt"]), row["seed"]) for row in requests(log)]
    assert len(asked) == len(set(asked)) == 8
    assert [r.token_ids for r in found] == [r.token_ids for r in draw(policy, world, None, sampling)]


def test_differences_are_reported_once_and_replies_removed(
    policy: Policy, saved: Path, world: World, tmp_path: Path
) -> None:
    """Also if the stage is killed later: the numbers are written before the replies are removed."""
    report, folder = Report(), tmp_path / "stage"
    folder.mkdir()
    with serving(saved) as url:
        sampling = Sampling(engine=Server(base_url=url, **FAST))
        with Engines(policy, folder, None, report) as engines:
            assert engines.of(Sampling()) is None
            sample(policy, world.prompts[:4], sampling, "policy@0", LIMIT, 3, report, engines.of(sampling))
            assert engines.of(sampling.greedy()) is engines.of(sampling)
        found = engines.finish()
    assert 0 < found["engine_mean"] <= found["engine_max"] < 1e-3
    assert any("engine against this process" in note for note in report.notes)
    assert [path.name for path in folder.iterdir()] == [RESULT]
    with Engines(policy, folder, None, Report()) as engines:
        engines.of(sampling)
        assert engines.finish() == found


# --- settings


def test_only_what_changes_samples_is_in_the_key() -> None:
    plain, here = Server(base_url="http://a/v1"), Sampling()
    assert "engine" not in part_key(here)
    assert "engine" not in part_key(Ahead(samples=2))
    others = [
        Server(base_url="http://b/v1", concurrency=2, timeout=1.0, max_mean_difference=1.0),
        Server(launch="serve {policy} {port}"),
    ]
    for kind in (Sampling, Ahead):
        keys = [json.dumps(part_key(kind(engine=server)), sort_keys=True) for server in (plain, *others)]
        assert len(set(keys)) == 1
        assert part_key(kind(engine=plain)) != part_key(kind())
        assert part_key(kind(engine=replace(plain, version="2"))) != part_key(kind(engine=plain))
    assert Ahead.like(Sampling(engine=plain)).engine == plain


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "launch: give either"),
        ({"launch": "x {policy} {port}", "base_url": "http://a/v1"}, "launch: give either"),
        ({"launch": "vllm serve {policy}"}, "has no {port}"),
        ({"launch": "vllm serve '{policy} {port}"}, "cannot be read as a command"),
        ({"launch": "vllm serve {policy} --port {port} --api-key=abc"}, "VLLM_API_KEY"),
        ({"base_url": "http://me:secret@a/v1"}, "generate.engine.key_from"),
        ({"base_url": "a"}, "base_url=a: expected an address"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Server(**given)
    assert words in str(refused.value)
    assert "secret" not in str(refused.value)


def test_other_braces_in_a_command_are_kept() -> None:
    command = Server(launch="""vllm serve {policy} --port {port} --hf-overrides '{"a": 1}'""").command("/a b", 80)
    assert command == ["vllm", "serve", "/a b", "--port", "80", "--hf-overrides", '{"a": 1}']


def test_live_rollouts_refuse_a_server() -> None:
    with pytest.raises(SettingsError, match=r"engine: .*rollout\.engine=null"):
        Live(engine=Server(base_url="http://a/v1"))


REFUSED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "several policies": (
        ("generate.engine.base_url=http://127.0.0.1:9/v1",),
        ("generate.engine.base_url=", "3 respond", "generate.engine.launch="),
    ),
    "no program": (
        ("generate.engine.launch='no-such-program {policy} {port}'",),
        ("generate.engine.launch: there is no program no-such-program",),
    ),
    "live": (
        ("generate.engine.launch='true {policy} {port}'", "rollout=live", "judge=rules"),
        ("rollout.engine", "rollout=live"),
    ),
    "neither": ((), ("generate.engine.launch: give either",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_that_cannot_work_does_not_start(case: str, tmp_path: Path) -> None:
    overrides, words = REFUSED[case]
    done = train(tmp_path, "scale=smoke", "tracking=off", "method=spin", *TINY, "generate=server", *overrides)
    assert done.returncode == 1
    assert all(word in " ".join(done.stderr.split()) for word in words), done.stderr
    assert not list(tmp_path.glob("store/sft/*"))


def test_a_quantised_policy_is_refused_by_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its adapters are stacked, not merged, so the engine cannot get full weights."""
    from dnpo.policy.base import Scratch

    monkeypatch.setattr(Scratch, "quantization", "nf4")
    done = train(tmp_path, *RUN, "generate=server", "generate.engine.launch='true {policy} {port}'")
    assert done.returncode == 1
    assert "model.quantization=nf4" in done.stderr
    assert "generate.engine=null" in done.stderr


# --- a server that the run starts

PARENT = """
import sys, time
from pathlib import Path
from dnpo.connection import Connection
from dnpo.generate.server.launching import Launched
child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
folder = Path(sys.argv[1])
at = Connection("http://a/v1", "NONE", headers={}, timeout=1.0)
with_child = Launched([sys.executable, "-c", child, str(folder / "pid")], folder / "log", at)
while not (folder / "pid").is_file() or not (folder / "pid").read_text():
    time.sleep(0.01)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_launched_server_ends_with_the_run(number: signal.Signals, tmp_path: Path) -> None:
    """However the run ends, although the server is in another process group."""
    run = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert run.stdout is not None
    assert run.stdout.readline() == b"ready\n"
    server = int((tmp_path / "pid").read_text())
    os.kill(server, 0)
    run.send_signal(number)
    run.wait(10)
    wait_until_gone(server)


def wait_until_gone(pid: int) -> None:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} still runs")


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        (f"{sys.executable} -c 'print(12345); raise SystemExit(3)' {{policy}} {{port}}", ("status 3", "12345")),
        (f"{sys.executable} -c 'import time; time.sleep(60)' {{policy}} {{port}}", ("start_timeout=0.7",)),
    ],
    ids=["ends", "is silent"],
)
def test_a_server_that_does_not_start(
    launch: str, words: tuple[str, ...], policy: Policy, world: World, tmp_path: Path
) -> None:
    with (
        session(policy, tmp_path / "work", launch=launch, start_timeout=0.7) as engine,
        pytest.raises(EngineError) as refused,
    ):
        draw(policy, world, engine, Sampling())
    assert all(word in str(refused.value) for word in words), str(refused.value)


@pytest.mark.long
def test_a_server_that_dies_is_named_and_its_responses_are_kept(policy: Policy, world: World, tmp_path: Path) -> None:
    log = tmp_path / "log"
    launch = f"{SERVE} --log {log} --fault die --after {PROBES + 3}"
    with (
        forking(),
        session(policy, tmp_path / "work", launch=launch, concurrency=1) as engine,
        pytest.raises(EngineError, match=r"(?s)generate\.engine\.launch: the server ended with status 3.*log"),
    ):
        draw(policy, world, engine, Sampling())
    with forking(), session(policy, tmp_path / "work", launch=f"{SERVE} --log {log}") as engine:
        found = draw(policy, world, engine, Sampling())
    assert len(requests(log)) == 8
    assert [r.token_ids for r in found] == [r.token_ids for r in draw(policy, world, None, Sampling())]


# --- whole runs

RUN = (
    "scale=smoke",
    "tracking=off",
    "method=spin",
    *TINY,
    "iterations=1",
    "data.train=24",  # the server computes one row at a time
    "generate.shard_size=8",
    "generate.batch_size=32",
)


def served(log: Path, *more: str) -> tuple[str, ...]:
    return (*RUN, "generate=server", f"generate.engine.launch='{SERVE} --log {log}'", *more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with a server."""
    folder = tmp_path_factory.mktemp("served")
    with forking():
        (folder / "out.txt").write_text(succeed(folder, *served(folder / "log")))
    return folder


@pytest.mark.long
def test_a_whole_run_gives_the_same_policies_as_in_this_process(whole: Path, tmp_path: Path) -> None:
    """The greedy responses and the policies are the same; differences are on the screen and in the metrics."""
    from dnpo.store import manifest
    from dnpo.tables import read

    succeed(tmp_path, *RUN)
    policies, responses = [], []
    for folder in (whole, tmp_path):
        found = summary(folder)
        stages = [folder / "store" / stage for stage in found["policies"]]
        policies.append([manifest(stage)["facts"]["policy"]["fingerprint"] for stage in stages])
        evaluations = sorted(
            (folder / "store" / "evaluate").glob("*/samples.parquet"), key=lambda p: p.stat().st_mtime_ns
        )
        responses.append([[row.token_ids for row in read(path, Response)] for path in evaluations])
    assert responses[0] == responses[1]
    assert policies[0] == policies[1]
    table = summary(whole)["table"]
    assert [0 < row["eval/engine_mean"] <= row["eval/engine_max"] < 1e-3 for row in table] == [True, True]
    assert 0 < table[1]["generated/engine_max"] < 1e-3
    out = (whole / "out.txt").read_text()
    assert out.count("log-probabilities, engine against this process: they differ by") == 3
    left = [path.name for path in whole.rglob("*") if path.name.startswith("engine") and path.name != RESULT]
    assert not left


@pytest.mark.long
def test_a_killed_run_asks_nothing_twice(whole: Path, tmp_path: Path) -> None:
    """The run is killed within its samples: the server ends too, and the same command gives the same numbers."""
    log = tmp_path / "log"
    for stage in ("prompts", "sft", "evaluate"):
        shutil.copytree(whole / "store" / stage, tmp_path / "store" / stage)
    run = Process(tmp_path, *served(log, "generate.engine.concurrency=1"))
    store = tmp_path / "store" / "generate"
    while not any(path.read_text().count("\n") > 4 for path in store.glob("*/engine-0/*.jsonl")):
        assert run.returncode is None, run.communicate(1)
        time.sleep(0.02)
    run.signal_group(signal.SIGKILL)
    run.communicate(60)
    before = requests(log)
    wait_until_gone(before[-1]["pid"])
    time.sleep(0.2)
    before = requests(log)
    with forking():
        succeed(tmp_path, *served(log))
    asked = [(tuple(row["prompt"]), row["seed"]) for row in requests(log)]
    assert 4 < len(before) < len(asked)
    assert len(set(asked)) == 24, "training prompts; evaluations are in the store"
    assert len(asked) <= 25, "one request may have been under way"
    assert [without_engine(row) for row in numbers(summary(tmp_path))] == [
        without_engine(row) for row in numbers(summary(whole))
    ]


def without_engine(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if "engine" not in name}


# --- a real engine


def test_a_real_engine_keeps_the_contract(tmp_path: Path) -> None:
    """Needs DNPO_ENGINE_URL, a server's address (…/v1), and DNPO_ENGINE_MODEL, the folder of the weights it serves."""
    from dnpo.policy.loading import load
    from dnpo.policy.tokenizer import encode
    from dnpo.records import Prompt

    url, folder = os.environ.get("DNPO_ENGINE_URL"), os.environ.get("DNPO_ENGINE_MODEL")
    if not url or not folder:
        pytest.skip("no real engine here: DNPO_ENGINE_URL (its /v1) and DNPO_ENGINE_MODEL (its weights) are not set")
    policy = load(folder, None)
    questions = [[{"role": "user", "content": f"What is {n} plus {n}?"}] for n in range(8)]
    ids = [encode(policy.tokenizer, question, "It is 2.", policy.stop_ids)[0] for question in questions]
    rows = [Prompt(str(n), question, "", token_ids=ids[n]) for n, question in enumerate(questions)]
    with session(policy, tmp_path / "work", base_url=url, timeout=300.0, deadline=600.0) as engine:
        greedy = sample(policy, rows, Sampling(temperature=0.0), "policy@0", 32, 0, Report(), engine)
        several = [(row, number) for row in rows for number in range(4)]
        drawn = engine.complete(several, Ahead(samples=4), 32, 1, Report())
        print(f"engine against this process: {engine.measured()}")
    assert len({tuple(tokens) for tokens in drawn}) > len(rows)
    ours = sample(policy, rows, Sampling(temperature=0.0), "policy@0", 32, 0, Report())
    same = sum(one.token_ids == other.token_ids for one, other in zip(greedy, ours, strict=True))
    print(f"greedy responses equal to those of this process: {same} of {len(rows)}")
