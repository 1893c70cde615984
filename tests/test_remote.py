"""A store shared by machines: which one computes and publishes, and what happens if the store is unavailable."""

import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from dnpo.errors import SettingsError, StoreError
from dnpo.store import MANIFEST, Remote, Report, Stage, Store, manifest
from tests.commands import SMOKE, TINY, Process, numbers, run_command, succeed, summary, train
from tests.conftest import Report as Quiet
from tests.test_interrupts import wait_for
from tests.test_store import stage
from tests.test_train import first

SECRET = "never-to-be-seen"
Work = Callable[[Path, Mapping[str, Path], Report], dict[str, Any]]


def use_server(endpoint: str, patch: pytest.MonkeyPatch) -> None:
    """Set the address of S3 as users do: by the environment."""
    for name, value in (
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", "somebody"),
        ("AWS_SECRET_ACCESS_KEY", SECRET),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        patch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadedMotoServer]:
    """A server that speaks S3, with an empty bucket."""
    running = ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    use_server(f"http://{host}:{port}", monkeypatch)
    s3fs.S3FileSystem().mkdir("lab")
    yield running
    s3fs.S3FileSystem().rm("lab", recursive=True)
    running.stop()


@pytest.fixture(params=["file", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A remote store: a folder, or object storage behind HTTP."""
    if request.param == "file":
        return f"file://{tmp_path / 'remote'}"
    request.getfixturevalue("server")
    return "s3://lab/dnpo"


@pytest.fixture
def behind_http(server: ThreadedMotoServer) -> str:
    """Object storage behind HTTP."""
    return "s3://lab/dnpo"


def counting(done: list[str], text: str = "some rows", wait: float = 0.0) -> Work:
    """Work that writes two files and records its call."""

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        time.sleep(wait)
        done.append(text)
        (folder / "model").mkdir(exist_ok=True)
        (folder / "rows.txt").write_text(text)
        (folder / "model" / "weights").write_text(2 * text)
        return {"rows": 1}

    return work


def machine(folder: Path, address: str, expiry: float = 60.0) -> Store:
    """The store of another machine."""
    store = Store(folder, remote=Remote(address, expiry))
    store.open(lambda text: None)
    return store


def objects(address: str) -> list[Path]:
    """The files of a remote folder."""
    return sorted(path for path in Path(address.removeprefix("file://")).rglob("*") if path.is_file())


# --- what is there is not computed again ------------------------------------------------------------------------------


def test_stages_of_one_machine_are_fetched_by_the_next(address: str, tmp_path: Path) -> None:
    done: list[str] = []
    data = stage(name="prepare", work=counting(done, "prompts"))
    made = stage(work=counting(done), inputs={"data": data})
    one, other = machine(tmp_path / "one", address), machine(tmp_path / "other", address)
    one.get(made, Quiet())
    assert done == ["prompts", "some rows"]
    folder = other.get(made, Quiet())
    assert done == ["prompts", "some rows"]
    assert other.computed == set()
    assert (folder / "model" / "weights").read_text() == "some rowssome rows"
    assert (folder / MANIFEST).read_bytes() == (one.folder(made) / MANIFEST).read_bytes()
    assert not other.folder(data).exists(), "nothing here needs it"
    assert not [path for path in (tmp_path / "other" / ".fetched").rglob("*") if path.is_file()]


def test_existing_stages_are_published_and_missing_ones_are_fetched(address: str, tmp_path: Path) -> None:
    """As after a run without a remote store or with an unreachable one."""
    done: list[str] = []
    a, b = stage(name="sft", work=counting(done)), stage(name="judge", work=counting(done))
    Store(tmp_path / "one").get(a, Quiet())
    machine(tmp_path / "other", address).get(b, Quiet())
    said: list[str] = []
    one = machine(tmp_path / "one", address)
    one.exchange([a, b, a], said.append)
    assert said == [f"store.remote={address}: fetched 1, published 1 finished stages"]
    assert one.folder(b).exists()
    assert Remote(address).names() == sorted([f"sft/{a.key}", f"judge/{b.key}"])
    assert len(done) == 2
    one.exchange([a, b], said.append)
    assert len(said) == 1


def test_exactly_one_of_eight_writers_wins(address: str, tmp_path: Path) -> None:
    """Their files differ, as may happen between machines; the fetched files are all from one machine."""
    made = stage()
    stores = []
    for number in range(8):
        stores.append(Store(tmp_path / f"{number}"))
        stores[-1].get(stage(work=counting([], f"rows of {number}")), Quiet())
    won: list[int] = []
    together = threading.Barrier(8)

    def publish(number: int) -> None:
        remote = Remote(address)
        folder = stores[number].folder(made)
        together.wait()
        if remote.publish(f"generate/{made.key}", manifest(folder), folder):
            won.append(number)

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(won) == 1
    fetched = machine(tmp_path / "reader", address).get(stage(work=pytest.fail), Quiet())
    assert (fetched / "rows.txt").read_text() == f"rows of {won[0]}"
    assert (fetched / "model" / "weights").read_text() == 2 * f"rows of {won[0]}"
    assert Remote(address).find_damage(f"generate/{made.key}", digests=True)[1] == []


def test_a_machine_waits_for_the_one_that_computes(address: str, tmp_path: Path) -> None:
    """That machine renews its lease: the work takes longer than a lease lasts."""
    done: list[str] = []
    slow = stage(work=counting(done, wait=2.5))
    reports = [Quiet(), Quiet()]
    threads = [
        threading.Thread(target=machine(tmp_path / f"{n}", address, expiry=1.0).get, args=(slow, reports[n]))
        for n in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 1
    assert sum("another machine" in text for report in reports for text in report.notes) == 1
    assert all((tmp_path / f"{n}" / "generate" / slow.key / MANIFEST).is_file() for n in (0, 1))
    remote = Remote(address)
    assert remote.names() == [f"generate/{slow.key}"]
    assert remote._read(f"{remote._root}/.leases/generate-{slow.key}") == "", "it is given back"


def test_a_lease_of_a_machine_that_was_killed_expires(address: str, tmp_path: Path) -> None:
    done: list[str] = []
    made = stage(work=counting(done))
    dead = Remote(address)
    assert dead._acquire(f"{dead._root}/.leases/generate-{made.key}", f"generate/{made.key}", pytest.fail)
    report, clock = Quiet(), time.monotonic()
    machine(tmp_path / "one", address, expiry=1.0).get(made, report)
    assert 1.0 <= time.monotonic() - clock < 10.0
    assert len(done) == 1
    assert len(report.notes) == 1


# --- kills, damage, and a store that goes away ------------------------------------------------------------------------


DIE = """
import os, signal, sys
from pathlib import Path
from dnpo.store import Remote, manifest

def die_at_the_second(self, source, path):
    if source.name == "rows.txt":
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, source, path)

put, Remote._put = Remote._put, die_at_the_second
address, folder, name = sys.argv[1:]
Remote(address).publish(name, manifest(Path(folder)), Path(folder))
"""


def test_kill_9_while_publishing_leaves_no_incomplete_stage(address: str, tmp_path: Path) -> None:
    made = stage(work=counting([]))
    one = Store(tmp_path / "one")
    folder, name = one.get(made, Quiet()), f"generate/{made.key}"
    died = subprocess.run([sys.executable, "-c", DIE, address, str(folder), name], timeout=60)
    assert died.returncode == -signal.SIGKILL
    remote = Remote(address)
    assert remote.read_manifest(name) is None
    assert len(remote._sizes(name)) == 1
    machine(tmp_path / "one", address).exchange([made], lambda text: None)
    fetched = machine(tmp_path / "other", address).get(stage(work=pytest.fail), Quiet())
    assert (fetched / "rows.txt").read_text() == "some rows"


@pytest.mark.parametrize("damage", ["bytes", "missing", "manifest"])
def test_damaged_stages_are_named_and_computed_again(damage: str, tmp_path: Path) -> None:
    done: list[str] = []
    address = f"file://{tmp_path / 'remote'}"
    made = stage(work=counting(done))
    machine(tmp_path / "one", address).get(made, Quiet())
    facts = manifest(tmp_path / "one" / "generate" / made.key)["files"]["rows.txt"]
    folder = tmp_path / "remote" / "generate" / made.key
    if damage == "bytes":
        (folder / facts["sha256"]).write_text("other row")
    elif damage == "missing":
        (folder / facts["sha256"]).unlink()
    else:
        (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"rows": 1', '"rows": 2'))
    report, other = Quiet(), machine(tmp_path / "other", address)
    said: list[str] = []
    other.exchange([made], said.append)
    other.get(made, report)
    assert len(done) == 2
    (note,) = [*said, *report.notes]
    assert f"{address}/generate/{made.key}: is damaged: " in note
    assert ("manifest.json" if damage == "manifest" else "rows.txt") in note
    assert f"dnpo store remove generate/{made.key} remote={address} yes=true" in note
    verified = run_command(tmp_path, "dnpo.commands.store", "verify", "--remote", address)
    assert verified.returncode == 1
    assert f"damaged     generate/{made.key}" in verified.stdout
    assert (
        run_command(
            tmp_path, "dnpo.commands.store", "remove", f"generate/{made.key}", "--remote", address, "--yes"
        ).returncode
        == 0
    )
    assert Remote(address).names() == []
    published = run_command(tmp_path, "dnpo.commands.store", "publish", "--store", "other", "--remote", address)
    assert "1 published, 0 damaged" in published.stdout
    assert run_command(tmp_path, "dnpo.commands.store", "verify", "--remote", address).returncode == 0


class Failing(BaseHTTPRequestHandler):
    """Answers that the service is unavailable; with ``silent`` it never answers."""

    silent = False
    asked = 0

    def do_GET(self) -> None:
        """Answer."""
        type(self).asked += 1
        if self.silent:
            time.sleep(1)
            return
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_PUT = do_HEAD = do_GET

    def log_message(self, format: str, *given: Any) -> None:
        """Print nothing."""


@pytest.fixture
def failing() -> Iterator[str]:
    """The address of a server that fails."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Failing.asked = 0
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("how", ["refused", "no bucket", "no credentials", "errors", "silent"])
def test_a_remote_store_that_becomes_unreachable_gives_one_warning(
    how: str,
    behind_http: str,
    server: ThreadedMotoServer,
    failing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run continues with its local store and reports the unpublished stages; they can be published later."""
    done: list[str] = []
    stages = [stage(name=name, work=counting(done, name)) for name in ("prepare", "sft", "generate")]
    store, report = machine(tmp_path / "one", behind_http), Quiet()
    store.get(stages[0], report)
    assert Remote(behind_http).names() == [f"prepare/{stages[0].key}"]
    address = behind_http.replace("lab", "other") if how == "no bucket" else behind_http
    with monkeypatch.context() as patch:
        patch.setattr("dnpo.store.remote.TIMEOUT", 0.2)
        patch.setattr(Failing, "silent", how == "silent")
        if how == "no credentials":
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                patch.delenv(name)
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        elif how != "no bucket":
            patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9" if how == "refused" else failing)
        s3fs.S3FileSystem.clear_instance_cache()
        store.remote = Remote(address)
        for each in stages:
            store.get(each, report)
        store.close(report.note)
    s3fs.S3FileSystem.clear_instance_cache()
    assert done == ["prepare", "sft", "generate"]
    warning, end = report.notes
    assert f"store.remote={address} cannot be used" in warning
    assert f"not published: sft/{stages[1].key}, generate/{stages[2].key}" in end
    assert SECRET not in warning + end
    assert Failing.asked <= 4, "nothing more is asked of it"
    command = re.search(r"dnpo store (publish .*)$", end)
    assert command is not None
    arguments = command[1].replace(address, behind_http).split()
    published = run_command(tmp_path, "dnpo.commands.store", *arguments)
    assert published.stdout.count("published   ") == 2, published
    assert len(Remote(behind_http).names()) == 3


@pytest.mark.parametrize(
    "address",
    [
        *("s3://", "s3:/lab", "lab/dnpo", "/tmp/remote", "file://relative/path", "gs://lab/dnpo", "https://lab/dnpo"),
        *(f"s3://somebody:{SECRET}@lab/dnpo", f"s3://lab/dnpo?key={SECRET}", f"s3://{SECRET}@lab"),
    ],
)
def test_an_unusable_address_is_refused_by_the_settings_name(address: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"store\.remote") as error:
        Remote(address)
    assert SECRET not in str(error.value)
    done = train(tmp_path, *SMOKE, f"store.remote='{address}'")
    assert done.returncode == 1
    assert SECRET not in done.stdout + done.stderr
    assert not (tmp_path / "store").exists()


def test_a_manifest_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    remote = Remote(f"file://{tmp_path / 'remote'}")
    content = {"files": {"../../escaped": {"sha256": "0", "size": 1}}}
    with pytest.raises(StoreError, match="outside its folder"):
        remote.fetch("generate/0", content, tmp_path / "a")


def test_the_store_commands_work_with_a_remote_store(address: str, tmp_path: Path) -> None:
    made = stage(work=counting([]))
    machine(tmp_path / "store", address).get(made, Quiet())
    listed = run_command(tmp_path, "dnpo.commands.store", "list", "--remote", address)
    assert f"generate/{made.key}" in listed.stdout
    assert "Generate" in listed.stdout
    assert "1 stage" in listed.stdout
    verified = run_command(tmp_path, "dnpo.commands.store", "verify", "--remote", address)
    assert "0 damaged" in verified.stdout
    refused = run_command(tmp_path, "dnpo.commands.store", "remove", "--remote", address, "--yes")
    assert refused.returncode == 1
    assert "remote: name the stages" in refused.stderr
    assert (
        run_command(tmp_path, "dnpo.commands.store", "remove", "--remote", address, f"generate/{made.key}").returncode
        == 0
    )
    assert Remote(address).names() == [f"generate/{made.key}"], "not without --yes"
    unknown = run_command(tmp_path, "dnpo.commands.store", "verify", "--remote", address, "generate/0000")
    assert "generate/0000" in unknown.stderr


def test_store_path_is_short_for_store_root(tmp_path: Path) -> None:
    done = train(tmp_path, *SMOKE, "plan=true", "store=here", f"store.remote=file://{tmp_path / 'remote'}")
    assert done.returncode == 0, done.stderr
    assert train(tmp_path, *SMOKE, "plan=true", f"store.remote=file://{tmp_path}", "store.root=3").returncode == 1
    unknown = train(tmp_path, *SMOKE, "plan=true", "store.remotes=x")
    assert "store.remote" in unknown.stderr


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_run_on_another_machine_computes_nothing(
    address: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first machine computed all stages before it had a remote store; the second has an empty store."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    shutil.copytree(tiny / "store", tmp_path / "one" / "store")
    computed: list[str] = []
    compute = Store._compute

    def count(self: Store, made: Stage, inputs: Mapping[str, Path], report: Report) -> None:
        computed.append(made.title)
        compute(self, made, inputs, report)

    monkeypatch.setattr(Store, "_compute", count)
    given = (*SMOKE, *TINY, f"store.remote={address}")
    assert "published 1" in succeed(tmp_path / "one", *given)
    planned = succeed(tmp_path / "other", *given, "plan=true")
    assert "in store.remote" in planned
    assert "to do" not in planned
    printed = succeed(tmp_path / "other", *given)
    assert re.search(r"fetched 1\d, published 0 finished stages", printed)
    assert computed == []
    assert numbers(summary(tmp_path / "other")) == numbers(first(tiny))
    assert SECRET not in "".join(path.read_text() for path in (tmp_path / "other").rglob("*.json"))


@pytest.mark.long
def test_simultaneous_runs_on_two_machines_compute_each_stage_once(tmp_path: Path) -> None:
    """A stage that was fetched has the manifest of the machine that computed it."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    given = (*SMOKE, *TINY, f"store.remote=file://{tmp_path / 'remote'}")
    runs = [Process(tmp_path / name, *given) for name in ("one", "other")]
    for run in runs:
        out, err = run.communicate(300)
        assert run.returncode == 0, out + err
    stores = [
        {path.parent.name: path.read_bytes() for path in (tmp_path / name / "store").glob(f"*/*/{MANIFEST}")}
        for name in ("one", "other")
    ]
    assert len(stores[0]) > 10
    assert stores[0] == stores[1]
    assert numbers(summary(tmp_path / "one")) == numbers(summary(tmp_path / "other"))


@pytest.mark.long
def test_a_run_continues_when_its_remote_store_becomes_unreachable(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "moto.server", "-p", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        assert server.stderr is not None
        endpoint = next(found[0] for line in server.stderr if (found := re.search(r"http://127\S+:\d+", line)))
        use_server(endpoint, monkeypatch)
        s3fs.S3FileSystem().mkdir("lab")
        (tmp_path / "run").mkdir()
        for name in ("prompts", "sft"):
            shutil.copytree(tiny / "store" / name, tmp_path / "run" / "store" / name)
        given = (*SMOKE, *TINY, "store.remote=s3://lab/dnpo")
        process = Process(tmp_path / "run", *given, before="tests.delays.delay")
        wait_for(tmp_path / "run" / "at.txt", "judge", process)
    finally:
        server.kill()
        server.wait()
    out, err = process.communicate(300)
    assert process.returncode == 0, out + err
    printed = re.sub(r"\s+", " ", out)
    assert printed.count("store.remote=s3://lab/dnpo cannot be used") == 1
    assert "published 2 finished stages" in printed
    assert "not published: judge/" in printed
    assert SECRET not in out + err
    assert numbers(summary(tmp_path / "run")) == numbers(first(tiny))
