"""The store: the parts of a key, work that is done once, and incomplete work that is never a result."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from dnpo.errors import Declined, DnpoError, StoreError
from dnpo.store import Report, Stage, Store, Work, content_hash, manifest, write_json
from tests.conftest import Report as Quiet


def nothing(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
    """Work that does nothing."""
    return {}


def stage(
    name: str = "generate",
    title: str = "Generate",
    version: int = 1,
    settings: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Stage] | None = None,
    work: Work = nothing,
    caches: Mapping[str, Stage] | None = None,
) -> Stage:
    """A stage, with defaults for values that a test does not check."""
    return Stage(name, title, version, settings or {}, inputs or {}, work, caches or {})


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        stage(name="judge", settings={"a": 1}),
        stage(version=2, settings={"a": 1}),
        stage(settings={"a": 2}),
        stage(settings={"a": 1, "b": None}),
        stage(settings={"a": 1}, inputs={"data": stage(name="prepare")}),
    ],
    ids=["name", "version", "value", "further setting", "input"],
)
def test_key_depends_on_what_decides_the_result(other: Stage) -> None:
    """Two stages with different results must never share a folder."""
    assert other.key != stage(settings={"a": 1}).key


def test_key_depends_on_input_keys_and_their_roles() -> None:
    """A change far upstream changes every key downstream, and inputs that swap roles are another stage."""

    def chain(seed: int) -> Stage:
        first = stage(name="prepare", settings={"seed": seed})
        return stage(inputs={"pairs": stage(name="label", inputs={"rows": first})})

    assert chain(0).key == chain(0).key
    assert chain(0).key != chain(1).key
    one, two = stage(name="prepare", settings={"seed": 0}), stage(name="prepare", settings={"seed": 1})
    assert stage(inputs={"a": one, "b": two}).key != stage(inputs={"a": two, "b": one}).key


def test_key_ignores_title_work_and_order() -> None:
    """Wording and the order in which a file lists its settings must not cost a recomputation."""
    one, two = stage(name="prepare"), stage(name="label")

    def other(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        return {"other": True}

    a = stage(title="A", settings={"x": 1, "y": {"p": 1, "q": 2}}, inputs={"one": one, "two": two})
    b = stage(title="B", settings={"y": {"q": 2, "p": 1}, "x": 1}, inputs={"two": two, "one": one}, work=other)
    assert a.key == b.key


def test_key_golden() -> None:
    """A change of the key's definition would make every existing store useless; it must be intended."""
    data = stage(name="prepare", settings={"seed": 0})
    settings = {"temperature": 1.0, "top_p": None, "limits": [1, 2], "nested": {"a": True}}
    assert stage(version=3, settings=settings, inputs={"data": data}).key == "e9d3995a006de1c5"


def test_key_refuses_values_without_a_unique_spelling() -> None:
    """NaN is not equal to itself and objects have no stable text: neither may be in a key."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        _ = stage(settings={"alpha": math.nan}).key
    with pytest.raises(TypeError):
        _ = stage(settings={"folder": Path("x")}).key


# --- computing --------------------------------------------------------------------------------------------------------


def test_finished_stage_is_not_recomputed(tmp_path: Path) -> None:
    """Neither by the same run nor by a later one, even if its work would now fail; its inputs are not read either."""
    done: list[str] = []

    def count(name: str) -> Work:
        def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
            done.append(name)
            (folder / "rows").write_text(name)
            return {}

        return work

    def build(work: Callable[[str], Work]) -> Stage:
        return stage(inputs={"data": stage(name="prepare", work=work("prepare"))}, work=work("generate"))

    first = Store(tmp_path).get(build(count), Quiet())
    assert done == ["prepare", "generate"]

    def broken(name: str) -> Work:
        def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
            raise AssertionError(f"{name} was computed again")

        return work

    again = Store(tmp_path).get(build(broken), Quiet())
    assert again == first
    assert (again / "rows").read_text() == "generate"


def test_shared_input_is_computed_once_and_passed_by_name(tmp_path: Path) -> None:
    """Two stages with a common input share its work; each finds the input's files under its own name for it."""
    runs: list[Path] = []

    def prepare(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        runs.append(folder)
        (folder / "rows").write_text("human rows")
        return {}

    def use(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        (folder / "out").write_text("/".join(f"{name}={(inputs[name] / 'rows').read_text()}" for name in inputs))
        return {}

    data = stage(name="prepare", work=prepare)
    store = Store(tmp_path)
    for name in ("generate", "judge"):
        folder = store.get(stage(name=name, inputs={"data": data}, work=use), Quiet())
        assert (folder / "out").read_text() == "data=human rows"
    assert len(runs) == 1


def test_failed_stage_is_continued_in_its_folder(tmp_path: Path) -> None:
    """The next run finds the files of an interrupted run: hours of generated shards must not be lost."""
    seen: list[list[str]] = []

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        seen.append(sorted(p.name for p in folder.iterdir()))
        if not (folder / "shard-0").exists():
            (folder / "shard-0").write_text("kept")
            raise RuntimeError("out of memory")
        (folder / "shard-1").write_text("new")
        return {}

    store, unlucky = Store(tmp_path), stage(work=work)
    with pytest.raises(RuntimeError, match="out of memory"):
        store.get(unlucky, Quiet())
    assert not store.has(unlucky)
    assert not store.folder(unlucky).exists()
    assert (store.partial(unlucky) / "shard-0").read_text() == "kept"

    folder = store.get(unlucky, Quiet())
    assert seen == [[], ["shard-0"]]
    assert (folder / "shard-0").read_text() == "kept"
    assert (folder / "shard-1").read_text() == "new"
    assert not store.partial(unlucky).exists()


def test_a_result_appears_all_at_once(tmp_path: Path) -> None:
    """During the work there is no folder under the final name, and a folder without a manifest is not a result."""
    store = Store(tmp_path)

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        (folder / "rows").write_text("rows")
        assert folder == store.partial(slow)
        assert not store.folder(slow).exists()
        assert not store.has(slow)
        return {}

    slow = stage(work=work)
    folder = store.get(slow, Quiet())
    assert store.has(slow)
    assert folder == store.folder(slow)
    (folder / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"generate/.*manifest\.json is missing"):
        store.has(slow)


def test_facts_that_cannot_be_written_leave_no_result(tmp_path: Path) -> None:
    """A NaN among the facts is an error of the stage, not a result with an unreadable manifest."""

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        return {"loss": math.nan}

    store, bad = Store(tmp_path), stage(work=work)
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.get(bad, Quiet())
    assert not store.has(bad)
    assert not store.folder(bad).exists(), "the next run would find a folder that is no finished stage"
    assert store.partial(bad).is_dir()


def test_a_manifest_contains_what_its_key_is_computed_from(tmp_path: Path) -> None:
    """A folder of the store is complete: its key can be computed from its manifest alone."""

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        time.sleep(0.02)
        return {"rows": 7, "note": "ünï"}

    data = stage(name="prepare", settings={"seed": 0})
    made = stage(title="Generate @0", version=4, settings={"k": [1, None]}, inputs={"data": data}, work=work)
    before = datetime.now().astimezone()
    content = manifest(Store(tmp_path).get(made, Quiet()))
    kept = {"stage", "title", "key", "version", "settings", "inputs", "facts", "started", "seconds"}
    assert set(content) == kept | {"made_by", "files", "checksum"}
    assert content["stage"] == "generate"
    assert content["title"] == "Generate @0"
    assert content["key"] == made.key
    assert content["inputs"] == {"data": f"prepare/{data.key}"}
    assert content["facts"] == {"rows": 7, "note": "ünï"}
    assert abs((datetime.fromisoformat(content["started"]) - before).total_seconds()) < 10
    assert 0.02 <= content["seconds"] < 10
    recipe = {
        "name": content["stage"],
        "version": content["version"],
        "settings": content["settings"],
        "inputs": {name: where.split("/")[1] for name, where in content["inputs"].items()},
    }
    text = json.dumps(recipe, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == content["key"]


# --- caches -----------------------------------------------------------------------------------------------------------


def reading(seen: list[dict[str, str]]) -> Work:
    """Work that records its inputs."""

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        seen.append({name: (path / "rows").read_text() for name, path in inputs.items()})
        return {}

    return work


def writing(text: str, done: list[str] | None = None, error: Exception | None = None) -> Work:
    """Work that leaves a text, or fails."""

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        if done is not None:
            done.append(text)
        if error is not None:
            raise error
        (folder / "rows").write_text(text)
        return {}

    return work


def test_key_and_manifest_ignore_aids(tmp_path: Path) -> None:
    """They only save work: the result is the same with them, without them and with others."""
    data = stage(name="prepare", work=writing("data"))
    plain = stage(inputs={"data": data})
    helped = stage(inputs={"data": data}, caches={"cache": stage(name="hidden", work=writing("cache"))})
    assert plain.key == helped.key
    store = Store(tmp_path)
    folder = store.get(helped, Quiet())
    assert manifest(folder)["inputs"] == {"data": f"prepare/{data.key}"}
    assert store.get(plain, Quiet()) == folder
    assert helped.key not in Store(tmp_path).computed


def test_an_aid_is_computed_first_and_passed_with_the_inputs(tmp_path: Path) -> None:
    """It is computed once, under its name, with its own inputs, and not at all if the result exists already."""
    seen: list[dict[str, str]] = []
    done: list[str] = []
    data = stage(name="prepare", work=writing("data", done))
    cache = stage(name="hidden", inputs={"data": data}, work=writing("cache", done))
    made = stage(inputs={"data": data}, caches={"cache": cache}, work=reading(seen))
    store = Store(tmp_path)
    store.get(made, Quiet())
    assert seen == [{"data": "data", "cache": "cache"}]
    assert done == ["data", "cache"]
    assert store.computed == {data.key, cache.key, made.key}
    store.get(stage(version=2, inputs={"data": data}, caches={"cache": cache}, work=reading(seen)), Quiet())
    assert done == ["data", "cache"], "the cache was made once for both"
    unmade = stage(name="hidden", version=2, work=writing("never", done))
    store.get(stage(inputs={"data": data}, caches={"cache": unmade}, work=reading(seen)), Quiet())
    assert done == ["data", "cache"], "what is there needs no help"


@pytest.mark.parametrize(("why", "notes"), [("no room", ["no room"]), ("", [])])
def test_a_stage_runs_without_an_aid_that_declines(why: str, notes: list[str], tmp_path: Path) -> None:
    """A note says why, if there is a reason. The aid leaves no result, so a later run tries again."""
    seen: list[dict[str, str]] = []
    done: list[str] = []
    declined = stage(name="hidden", work=writing("cache", done, Declined(why)))
    other = stage(name="other", work=writing("other"))
    store, report = Store(tmp_path), Quiet()
    folder = store.get(stage(caches={"cache": declined, "other": other}, work=reading(seen)), report)
    assert (folder / "manifest.json").is_file()
    assert seen == [{"other": "other"}]
    assert report.notes == notes
    assert not store.has(declined)
    store.get(
        stage(version=2, caches={"cache": stage(name="hidden", work=writing("cache"))}, work=reading(seen)), report
    )
    assert seen[1] == {"cache": "cache"}
    assert done == ["cache"]


def test_an_aid_that_fails_is_an_error(tmp_path: Path) -> None:
    """Only declining is not an error: if a requested aid is impossible, a message says so, and the stage does not
    start."""
    seen: list[dict[str, str]] = []
    failing = stage(name="hidden", work=writing("cache", error=DnpoError("npo.cache_hidden=on: no room")))
    store, helped = Store(tmp_path), stage(caches={"cache": failing}, work=reading(seen))
    with pytest.raises(DnpoError, match="no room"):
        store.get(helped, Quiet())
    assert seen == []
    assert not store.partial(helped).exists()


# --- several processes ------------------------------------------------------------------------------------------------

# A separate process that needs one slow stage: argv is the store and a folder for signals.
RUN = """
import os, sys, time
from pathlib import Path
from dnpo.errors import Declined, DnpoError, StoreError
from dnpo.store import Stage, Store

root, signs = map(Path, sys.argv[1:])

class Signs:
    def begin(self, total, unit, done=0): pass
    def advance(self, amount=1): pass
    def steps(self, rows): pass
    def note(self, text):
        (signs / f"note-{os.getpid()}").write_text(text)

def work(folder, inputs, report):
    with (signs / "runs").open("a") as runs:
        runs.write(f"{os.getpid()} {sorted(p.name for p in folder.iterdir())}\\n")
    (folder / "half").write_text("half")
    while not (signs / "go").exists():
        time.sleep(0.01)
    (folder / "rows").write_text("rows")
    return {}

print(Store(root).get(Stage("generate", "Generate", 1, {}, {}, work), Signs()))
"""


def start(root: Path, signs: Path) -> "subprocess.Popen[str]":
    """Start a run in a separate process."""
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(root), str(signs)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(what: Callable[[], bool], *processes: "subprocess.Popen[str]") -> None:
    """Wait for a condition; fail if a process ends before, or after 20 seconds."""
    deadline = time.monotonic() + 20
    while not what():
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


@pytest.fixture
def signs(tmp_path: Path) -> Path:
    """The folder for signals of processes."""
    folder = tmp_path / "signs"
    folder.mkdir()
    return folder


def runs(signs: Path) -> list[str]:
    """The reports of all calls of the work on the contents of their folder."""
    file = signs / "runs"
    return [line.split(" ", 1)[1] for line in file.read_text().splitlines()] if file.exists() else []


def test_two_processes_compute_a_stage_once(tmp_path: Path, signs: Path) -> None:
    """Runs of one sweep share stages: the second waits for the first (and says so) and does not write to its folder.

    The work continues until the other process is known to wait, so the two are certain to overlap.
    """
    processes = [start(tmp_path / "store", signs) for _ in range(2)]
    try:
        # a file exists before it has its text
        wait_for(lambda: len(runs(signs)) == 1 and any(note.read_text() for note in signs.glob("note-*")), *processes)
        (note,) = signs.glob("note-*")
        assert "another run is computing Generate" in note.read_text()
        (signs / "go").touch()
        outputs = [process.communicate(timeout=20) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert runs(signs) == ["[]"]
    folders = {stdout.strip() for stdout, _ in outputs}
    assert len(folders) == 1
    assert (Path(folders.pop()) / "rows").read_text() == "rows"


def test_killed_process_frees_the_lock_and_is_continued(tmp_path: Path, signs: Path) -> None:
    """kill -9 allows no clean-up: the lock must be released, and the next run continues in the same folder."""
    root = tmp_path / "store"
    victim = start(root, signs)
    try:
        wait_for(lambda: len(list(root.glob("generate/*.partial/half"))) == 1, victim)
        os.kill(victim.pid, signal.SIGKILL)
        assert victim.wait(timeout=20) == -signal.SIGKILL
    finally:
        victim.kill()
        victim.communicate()
    assert not list(root.glob("generate/*/manifest.json"))

    (signs / "go").touch()
    heir = start(root, signs)
    try:
        stdout, stderr = heir.communicate(timeout=20)
    finally:
        heir.kill()
        heir.wait()
    assert heir.returncode == 0, stderr
    assert not list(signs.glob("note-*")), "the lock was still held"
    assert runs(signs) == ["[]", "['half']"]
    assert sorted(p.name for p in Path(stdout.strip()).iterdir()) == ["half", "manifest.json", "rows"]


# --- hashes and JSON --------------------------------------------------------------------------------------------------


def _folder(path: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def test_content_hash_depends_on_contents_and_not_on_the_path(tmp_path: Path) -> None:
    """A moved model is the same model; stages that use it must not be computed again."""
    files = {"config.json": "{}", "sub/weights": "123"}
    here = content_hash(_folder(tmp_path / "here", files))
    (tmp_path / "here").rename(tmp_path / "there")
    assert content_hash(tmp_path / "there") == here
    # The order in which the files were made does not count, nor do empty folders.
    copy = _folder(tmp_path / "copy", dict(reversed(files.items())))
    (copy / "empty").mkdir()
    assert content_hash(copy) == here


@pytest.mark.parametrize(
    "changed",
    [
        {"config.json": "{}", "sub/weights": "124"},
        {"config.json": "{}", "sub/weight": "123"},
        {"config.json": "{}", "weights": "123"},
        {"config.json": "123", "sub/weights": "{}"},
        {"config.json": "{}"},
        {"config.json": "{}", "sub/weights": "123", "more": ""},
    ],
    ids=["content", "renamed", "moved inside", "swapped", "missing", "further"],
)
def test_content_hash_differs_for_other_contents(tmp_path: Path, changed: Mapping[str, str]) -> None:
    """A model changed in place is another model; results of the old one must not be found."""
    one = _folder(tmp_path / "one", {"config.json": "{}", "sub/weights": "123"})
    assert content_hash(_folder(tmp_path / "two", changed)) != content_hash(one)


def test_content_hash_of_a_file(tmp_path: Path) -> None:
    """A data file counts by its contents, under any name."""
    for name, text in (("a.jsonl", "same"), ("b.jsonl", "same"), ("c.jsonl", "other")):
        (tmp_path / name).write_text(text)
    a, b, c = (content_hash(tmp_path / f"{name}.jsonl") for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("bad", [{"a": math.nan}, {"a": [math.inf]}, {"a": Path("x")}])
def test_write_json_refuses_and_leaves_the_old_file(tmp_path: Path, bad: dict[str, Any]) -> None:
    """A file of results is complete or missing: a value that JSON lacks must not destroy the earlier file."""
    path = tmp_path / "results.json"
    write_json(path, {"a": 1, "text": "y′ ≥ y"})
    with pytest.raises((ValueError, TypeError)):
        write_json(path, bad)
    assert json.loads(path.read_text()) == {"a": 1, "text": "y′ ≥ y"}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
