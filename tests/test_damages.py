"""Damaged, unreadable and full stores: a changed file is named and never used, and its stage can be computed again."""

import io
import json
import re
import resource
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from dnpo import __version__
from dnpo.errors import DiskError, SettingsError, StoreError
from dnpo.optimise.training import CHECKPOINT, _find_checkpoint
from dnpo.policy.base import describe_saved, read_saved
from dnpo.records import Verdict
from dnpo.store import Report, Stage, Store, find_damage, fingerprint, inventory, manifest, provenance
from dnpo.store.manifests import MANIFEST, seal
from dnpo.tables import read, write
from tests import damages
from tests.commands import SMOKE, numbers, run_command, succeed, summary, train
from tests.conftest import Report as Quiet

FILES = {"rows.bin": b"0123456789", "policy/config.json": b"{}", "policy/adapter-00/weights": b"abc"}


def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return {"rows": 1, "text": "ünï"}


def stage(**given: Any) -> Stage:
    return Stage("generate", "iteration 0 · generate", 1, given, {}, work, device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a finished stage."""
    return Store(tmp_path).get(stage(), Quiet())


def swap(folder: Path) -> None:
    """The two files of equal length change places."""
    (folder / "rows.bin").write_bytes(b"9876543210")


def copy_from_other(folder: Path) -> None:
    """Another stage under this one's name."""
    other = Store(folder.parent.parent).get(stage(seed=1), Quiet())
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


def edit(folder: Path) -> None:
    """A number of the manifest is changed by hand."""
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"rows": 1', '"rows": 2'))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "file removed": (lambda f: (f / "rows.bin").unlink(), "rows.bin is missing"),
    "folder removed": (lambda f: shutil.rmtree(f / "policy"), "policy/adapter-00/weights is missing"),
    "file emptied": (lambda f: (f / "rows.bin").write_bytes(b""), "rows.bin has 0 bytes instead of 10"),
    "file cut": (lambda f: (f / "policy/config.json").write_bytes(b"{"), "policy/config.json has 1 bytes instead of 2"),
    "contents": (swap, "rows.bin has other contents"),
    "one more": (lambda f: (f / "policy/adapter-01").write_bytes(b""), "policy/adapter-01 was not written by it"),
    "dead link": (lambda f: (f / "shard").symlink_to("nowhere"), "shard was not written by it"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "manifest.json is missing"),
    "empty manifest": (lambda f: (f / MANIFEST).write_text(""), "manifest.json cannot be read"),
    "manifest of bytes": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), "manifest.json cannot be read"),
    "no object": (lambda f: (f / MANIFEST).write_text("3"), "manifest.json is not a manifest"),
    "manifest edited": (edit, "manifest.json has other contents"),
    "other stage": (copy_from_other, "manifest.json is that of generate/"),
    "nothing left": (lambda f: (shutil.rmtree(f), f.mkdir()), "manifest.json is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_stage_is_named_and_never_used(name: str, folder: Path, tmp_path: Path) -> None:
    """The stage alone, as another stage's input, and before a run begins; after its removal it is computed again."""
    damage, words = DAMAGES[name]
    damage(folder)
    used: list[str] = []

    def use(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        used.append("used")
        return {}

    store = Store(tmp_path)
    later = Stage("judge", "judge", 1, {}, {"responses": stage()}, use)
    for attempt in (
        lambda: store.get(stage(), Quiet()),
        lambda: store.get(later, Quiet()),
        lambda: store.check([stage()], print),
    ):
        with pytest.raises(StoreError) as error:
            attempt()
        assert words in str(error.value)
        assert f"dnpo store remove generate/{folder.name} store={tmp_path} yes=true" in str(error.value)
    assert used == []
    done = run_command(tmp_path, "dnpo.store.__main__", "verify", "--store", str(tmp_path))
    assert done.returncode == 1
    assert f"generate/{folder.name}: " in done.stdout
    assert words in done.stdout
    done = run_command(tmp_path, "dnpo.store.__main__", "remove", f"generate/{folder.name}", "--store", ".", "--yes")
    assert done.returncode == 0, done.stderr
    store.get(later, Quiet())
    assert used == ["used"]
    assert find_damage(folder, digests=True) == []


@pytest.mark.parametrize("place", range(0, 1200, 37))
def test_every_bit_of_a_manifest_counts(place: int, folder: Path) -> None:
    content = bytearray((folder / MANIFEST).read_bytes())
    content[place % len(content)] ^= 1
    (folder / MANIFEST).write_bytes(content)
    assert find_damage(folder, digests=False)


def test_verifying_sizes_reads_no_file(folder: Path, tmp_path: Path) -> None:
    """``verify=sizes`` misses only damage that can be found by reading alone."""
    swap(folder)
    assert Store(tmp_path, "sizes").get(stage(), Quiet()) == folder
    (folder / "rows.bin").write_bytes(b"0")
    with pytest.raises(StoreError, match=r"rows\.bin has 1 bytes"):
        Store(tmp_path, "sizes").get(stage(), Quiet())


def test_hidden_files_are_not_damage(folder: Path, tmp_path: Path) -> None:
    """Files of a file browser are no damage; hidden files of a killed process are removed."""
    (folder / ".DS_Store").write_text("x")
    assert Store(tmp_path).get(stage(), Quiet()) == folder
    other = stage(seed=2)
    Store(tmp_path).partial(other).mkdir()
    (Store(tmp_path).partial(other) / ".rows.bin.4711").write_text("half")
    made = Store(tmp_path).get(other, Quiet())
    assert not list(made.glob(".*"))
    assert set(manifest(made)["files"]) == set(FILES)


def test_stages_of_an_earlier_version_are_used_and_named(folder: Path, tmp_path: Path) -> None:
    """They have no digests, so damage to them cannot be detected; one line names them."""
    known = manifest(folder)
    earlier = {name: known[name] for name in known if name not in ("made_by", "files", "checksum")}
    (folder / MANIFEST).write_text(json.dumps(earlier))
    notes: list[str] = []
    store = Store(tmp_path)
    store.check([stage()], notes.append)
    assert len(notes) == 1
    assert f"generate/{folder.name}" in notes[0]
    assert "unverified" in notes[0]
    assert store.get(stage(), Quiet()) == folder
    done = run_command(tmp_path, "dnpo.store.__main__", "verify", "--store", ".")
    assert (done.returncode, "unverified  generate/" in done.stdout) == (0, True)


# --- what made it


def test_a_manifest_records_what_made_it(folder: Path) -> None:
    made = manifest(folder)["made_by"]
    assert made["torch"] == torch.__version__
    assert made["python"] == sys.version.split()[0]
    assert made["threads"] == str(torch.get_num_threads())
    assert made["device"].startswith("cpu")
    assert {"transformers", "numpy", "dnpo", "commit"} <= set(made)


def test_differences_between_versions_are_reported() -> None:
    """Each difference, with the stages of the rarer values; an entry that only some stages have is no difference."""
    same = {"torch": "2.13", "numpy": "2"}
    makers = {"a": same, "b": same, "c": {**same, "torch": "2.14", "device": "cpu"}, "d": {}}
    found = provenance.differences(makers)
    assert found == {"torch": {"2.13": ["a", "b"], "2.14": ["c"]}}
    assert provenance.warn(found) == ["torch 2.13 (2 stages), but 2.14 (c)"]


# --- what a policy is


@pytest.mark.parametrize("gone", ["policy", "policy/adapter-01", "policy/adapter-00"])
def test_a_changed_policy_is_never_taken_for_the_base_model(gone: str, tmp_path: Path) -> None:
    """Even if its manifest no longer lists its files."""
    folder = tmp_path / "optimise" / "0123"
    for number in range(2):
        (folder / f"policy/adapter-{number:02d}").mkdir(parents=True)
        (folder / f"policy/adapter-{number:02d}/adapter_config.json").write_text(str(number))
    facts = {"policy": describe_saved(folder / "policy")}
    assert facts["policy"] == {"kind": "adapters", "adapters": 2, "fingerprint": fingerprint(folder / "policy")}
    shutil.rmtree(folder / gone)
    seal(folder, {"stage": "optimise", "key": "0123", "facts": facts})
    with pytest.raises(StoreError, match=r"expected adapters \(2 adapters\), found"):
        read_saved(folder / "policy")


# --- what the disk refuses


def to_full_disk(path: Path) -> Path:
    """A file on a full disk: Linux has one for tests."""
    path.symlink_to("/dev/full")
    return path


def write_beyond_limit(path: Path) -> None:
    """A file of more bytes than the system allows; safetensors follows no link."""
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, allowed[1]))
    try:
        save_file({"a": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: to_full_disk(path).write_text("x" * 100_000),
    "table": lambda path: pq.write_table(pa.table({"a": list(range(100_000))}), to_full_disk(path)),
    "weights": write_beyond_limit,
    "checkpoint": lambda path: torch.save({"a": torch.zeros(100_000)}, to_full_disk(path)),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_gives_a_message_that_names_the_stage(kind: str, tmp_path: Path) -> None:
    def fill(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        WRITERS[kind](folder / "file")
        return {}

    store, full = Store(tmp_path), Stage("sft", "supervised fine-tuning", 1, {}, {}, fill)
    with pytest.raises(DiskError, match=r"(No space left on device|File too large); make room there") as error:
        store.get(full, Quiet())
    assert f"supervised fine-tuning ({store.partial(full)})" in str(error.value)
    (store.partial(full) / "file").unlink(missing_ok=True)
    again = Stage("sft", "supervised fine-tuning", 1, {}, {}, work)
    assert store.get(again, Quiet()).is_dir()


def test_an_error_of_the_computation_is_raised_unchanged(tmp_path: Path) -> None:
    """Only errors of the disk become messages."""

    def fail(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        (tmp_path.parent / "no-such-folder" / "file").read_text()
        return {}

    with pytest.raises(FileNotFoundError):
        Store(tmp_path).get(Stage("sft", "sft", 1, {}, {}, fail), Quiet())


def test_a_store_that_cannot_be_written_is_refused_before_work_begins(tmp_path: Path) -> None:
    """A file in place of the folder, and a read-only file system; finished stages can still be read."""
    (tmp_path / "generate").write_text("no folder")
    with pytest.raises(DiskError, match="expected a folder to write to"):
        Store(tmp_path).get(stage(), Quiet())
    closed = Store(Path("/proc/self"))
    assert not closed.folder(stage()).exists()
    if not closed.writable:
        with pytest.raises(SettingsError, match=r"store=/proc/self: cannot be written to"):
            closed.check([stage()], print)


def test_a_damaged_file_of_an_unfinished_stage_is_named(tmp_path: Path) -> None:
    """Tables and checkpoints with other contents, cut ones and empty ones are not continued from."""
    rows = [Verdict(f"p{number}", "human", float(number)) for number in range(50)]
    path = tmp_path / "verdicts.parquet"
    write(path, rows, Verdict)
    whole = path.read_bytes()
    for damaged in (b"", whole[:-40], bytes([*whole[:60], whole[60] ^ 1, *whole[61:]])):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=rf"{path}: is damaged .*remove it"):
            read(path, Verdict)
    checkpoint = tmp_path / CHECKPOINT
    assert _find_checkpoint(tmp_path) is None
    torch.save({"a": torch.arange(1000)}, checkpoint)
    assert _find_checkpoint(tmp_path) == checkpoint
    whole = checkpoint.read_bytes()
    middle = len(whole) // 2
    for damaged in (b"", whole[:-40], bytes([*whole[:middle], whole[middle] ^ 1, *whole[middle + 1 :]])):
        checkpoint.write_bytes(damaged)
        with pytest.raises(StoreError, match=rf"{checkpoint}: is damaged .*remove it"):
            _find_checkpoint(tmp_path)


# --- the command


def test_needed_stages_include_what_a_stage_was_made_from(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, lone = stage(), stage(seed=9)
    last = Stage("judge", "judge", 1, {}, {"responses": first}, work)
    for each in (last, lone):
        store.get(each, Quiet())
    found = inventory.find_needs(inventory.read_store(tmp_path), {"run": {last.key}})
    assert found == {f"judge/{last.key}": ["run"], f"generate/{first.key}": ["run"], f"generate/{lone.key}": []}


def test_a_stage_that_is_being_computed_is_not_removed(tmp_path: Path) -> None:
    """A run holds its lock."""
    store = Store(tmp_path)

    def remove_it(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        (entry,) = inventory.read_store(tmp_path)
        assert (entry.finished, entry.damage) == (False, ())
        with pytest.raises(StoreError, match="a run is computing it"):
            inventory.remove(entry)
        return {}

    assert store.get(Stage("sft", "sft", 1, {}, {}, remove_it), Quiet()).is_dir()


@pytest.mark.long
def test_remove_takes_what_no_tracked_run_needs_and_asks_first(
    smoke: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(*arguments: str, everywhere: bool = True) -> tuple[int, str]:
        places = ("--uri", "sqlite:///mlflow.db", "--uri", f"sqlite:///{smoke}/mlflow.db") if everywhere else ()
        done = run_command(finished, "dnpo.store.__main__", *arguments, *places)
        return done.returncode, done.stdout + done.stderr

    kept = {path.name for path in (finished / "store").glob("[!.]*/*")}
    succeed(finished, *SMOKE, "method=spin", "iterations=1", "seed=3")
    more = {path.name for path in (finished / "store").glob("[!.]*/*")} - kept
    status, text = command("list", "wide=true")
    assert status == 0
    assert all(text.count(key) == 1 for key in kept | more)
    assert text.count("no run") == len(more)
    assert text.count(f"torch {torch.__version__}") == len(kept | more)
    status, text = command("list")
    lines = {line.split()[0].partition("/")[2]: line for line in text.splitlines() if "/" in line.split(" ")[0]}
    assert lines.keys() == kept | more
    assert {key for key, line in lines.items() if re.search(r" 0  \d+ ", line)} == more
    assert max(map(len, lines.values())) <= 80, "nothing is cut on a narrow terminal"
    assert f"\nby 1: dnpo {__version__}, " in text
    for answer in (("remove",), ("remove", "--apply")):  # the first only shows; the second asks, and nobody answers
        monkeypatch.setattr("sys.stdin", io.StringIO())
        status, text = command(*answer)
        assert f"{len(more)} stages, " in text
        assert {path.name for path in (finished / "store").glob("[!.]*/*")} == kept | more
    status, text = command("remove", "--yes", everywhere=False)  # the copied stages were tracked by another place too
    assert (status, f"also tracked in sqlite:///{smoke}/mlflow.db" in text) == (1, True)
    assert command("remove", "--yes")[0] == 0
    assert {path.name for path in (finished / "store").glob("[!.]*/*")} == kept
    assert "every stage is needed" in command("remove")[1]
    (policy,) = list((finished / "store" / "sft").iterdir())
    status, text = command("remove", f"sft/{policy.name}", "--yes")
    assert (status, policy.is_dir()) == (1, True)
    assert "scale=smoke (" in text
    for wrong, name in ((("remove", "sft/0"), "sft/0"), (("list", "--store", "nowhere"), "nowhere")):
        status, text = command(*wrong)
        assert (status, name in text) == (1, True)
    (finished / "mlflow.db").rename(finished / "elsewhere.db")
    status, text = command("remove", "--yes")
    assert (status, "mlflow.db: there is no such database" in text) == (1, True)


# --- whole runs


@pytest.fixture(scope="session")
def undamaged(smoke: Path, adapted: Path) -> dict[str, Path]:
    """The runs of ``damages.RUNS``, whose stores are damaged in copies."""
    return {"whole": smoke, "adapters": adapted}


@pytest.mark.long
@pytest.mark.parametrize("damage", list(damages.list_damages())[::22], ids=str)
def test_a_run_names_damaged_stages(damage: damages.Damage, undamaged: dict[str, Path], tmp_path: Path) -> None:
    """A few of ``python -m tests.damages``."""
    assert damages.try_damage(damage, undamaged[damage.run], tmp_path / "copy", later=True) == ""


@pytest.mark.long
def test_a_chain_of_other_versions_is_warned_of(undamaged: dict[str, Path], tmp_path: Path) -> None:
    """The stages of an upgrade of torch, as the summary and the screen have them."""
    here = shutil.copytree(undamaged["whole"], tmp_path / "here", symlinks=True)
    before = numbers(summary(here))
    (folder,) = (here / "store" / "sft").iterdir()
    known = {name: value for name, value in manifest(folder).items() if name != "checksum"}
    seal(folder, {**known, "made_by": {**known["made_by"], "torch": "1.0", "device": "another"}})
    out = succeed(here, *damages.RUNS["whole"])
    assert f"torch {torch.__version__} (15 stages), but 1.0 (supervised fine-tuning)" in out
    assert "but another (supervised fine-tuning)" in out
    makers = summary(here)["made_by"]
    assert sorted(len(maker["stages"]) for maker in makers) == [1, 15]
    assert numbers(summary(here)) == before


@pytest.mark.long
def test_a_chain_of_one_version_is_not_warned_of(finished: Path) -> None:
    assert "warning: the stages" not in succeed(finished, *damages.RUNS["whole"])


@pytest.mark.long
def test_the_plan_of_a_damaged_store_reports_the_damage(undamaged: dict[str, Path], tmp_path: Path) -> None:
    here = shutil.copytree(undamaged["whole"], tmp_path / "here", symlinks=True)
    (folder,) = (here / "store" / "sft").iterdir()
    shutil.rmtree(folder / "policy")
    done = train(here, *damages.RUNS["whole"], "plan=true")
    assert done.returncode == 1
    assert f"sft/{folder.name} (supervised fine-tuning) is damaged" in done.stderr
