"""A store that machines share, in addition to their local ones: object storage, or a shared folder.

A stage exists if its manifest does. Its files are published first. Each has its SHA-256 as its name, so machines that
publish the same stage at the same time do not disturb each other. Then the manifest is published, which only the first
machine can create. Fetched files are compared with the manifest. A lease, renewed while its owner lives, shows that a
stage is being computed. It only saves work, since equal keys have equal results.
"""

import hashlib
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from dnpo import disk
from dnpo.errors import SettingsError, StoreError
from dnpo.store.files import to_json
from dnpo.store.manifests import MANIFEST, parse

LEASES = ".leases"
FETCHED = ".fetched"  # folder in a local store where a stage is put together
EXPECTED = "expected s3://BUCKET/FOLDER, or file:// and an absolute path"
TAKEN = {"PreconditionFailed", "ConditionalRequestConflict", "409", "412"}
LONGEST_REASON = 200
TIMEOUT = 20.0  # seconds without an answer before a server is asked again
Note = Callable[[str], None]


class Gone(Exception):
    """The remote store cannot be used; the message says why."""


class Remote:
    """Finished stages in object storage or in a folder, by ``STAGE/KEY``.

    After its first refusal or failure it is not used again; ``lost`` gives the reason.

    Args:
        address: ``s3://BUCKET/FOLDER``, or ``file://`` and an absolute path. Credentials and endpoints are read where
            the provider's tools read them, never from an address.
        expiry: seconds after which a lease that is not renewed expires.

    Raises:
        SettingsError: the address cannot be used.
    """

    def __init__(self, address: str, expiry: float = 60.0) -> None:
        parts = urlsplit(address)
        if parts.username or parts.password or "@" in parts.netloc or parts.query or parts.fragment:
            raise SettingsError(
                f"store.remote: an address holds no credentials or options, since it is written into files of a run; "
                f"{EXPECTED}"
            )
        self.address, self.expiry, self.lost = address.rstrip("/"), expiry, ""
        self.local = parts.scheme == "file"
        if not (parts.scheme == "s3" and parts.netloc) and not (self.local and not parts.netloc and parts.path):
            raise SettingsError(f"store.remote={address}: {EXPECTED}")
        self._root = parts.path.rstrip("/") if self.local else f"{parts.netloc}{parts.path}".rstrip("/")
        self._fs = _open(parts.scheme)
        self._me = f"{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(4)}"

    # --- stages

    def read_manifest(self, name: str) -> dict[str, Any] | None:
        """Return the manifest of a stage; None if the stage is not there.

        Raises:
            Gone: the store does not answer.
            StoreError: the manifest is damaged.
        """
        with self._asking():
            try:
                text = self._fs.cat_file(self._path(name, MANIFEST))
            except FileNotFoundError as error:
                if _code(error) == "NoSuchBucket":
                    raise
                return None
        try:
            content = parse(text.decode())
        except ValueError as problem:
            raise StoreError(f"{self.address}/{name}: is damaged: {problem}. {self._advise(name)}") from problem
        if f"{content['stage']}/{content['key']}" != name or "files" not in content:
            raise StoreError(
                f"{self.address}/{name}: is damaged: {MANIFEST} is of another stage, or lists no files. "
                f"{self._advise(name)}"
            )
        return content

    def fetch(self, name: str, content: Mapping[str, Any], folder: Path) -> None:
        """Download the files of a stage into a folder, and compare each with the manifest.

        Raises:
            Gone: the store does not answer.
            StoreError: files are missing or have other contents than were written.
        """
        damage = []
        for file, facts in content["files"].items():
            path = folder / file
            if not path.resolve().is_relative_to(folder.resolve()):
                raise StoreError(f"{self.address}/{name}: {MANIFEST} lists {file}, outside its folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._asking():
                try:
                    self._fs.get_file(self._path(name, facts["sha256"]), str(path))
                except FileNotFoundError as error:
                    if _code(error) == "NoSuchBucket":
                        raise
                    damage.append(f"{file} is missing")
                    continue
            disk.flush(path)
            with path.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != facts["sha256"]:
                    damage.append(f"{file} has other contents than were written (its SHA-256 differs)")
        if damage:
            raise StoreError(f"{self.address}/{name}: is damaged: {'; '.join(damage)}. {self._advise(name)}")
        (folder / MANIFEST).write_text(to_json(content), encoding="utf-8")
        disk.flush(folder / MANIFEST)

    def publish(self, name: str, content: Mapping[str, Any], folder: Path) -> bool:
        """Upload the files of a finished stage, then its manifest; return whether this was the first.

        Raises:
            Gone: the store does not answer.
        """
        with self._asking():
            sizes = self._sizes(name)
            if MANIFEST in sizes:
                return False
            for file, facts in content["files"].items():
                if sizes.get(facts["sha256"]) != facts["size"]:
                    self._put(folder / file, self._path(name, facts["sha256"]))
            return self._create(self._path(name, MANIFEST), (folder / MANIFEST).read_bytes())

    def names(self) -> list[str]:
        """Return the names of all stages, ``STAGE/KEY``.

        Raises:
            Gone: the store does not answer.
        """
        with self._asking():
            try:
                found = self._fs.find(self._root)
            except FileNotFoundError as error:
                if _code(error) == "NoSuchBucket":
                    raise
                return []
        inside = [PurePosixPath(path).relative_to(self._root).parts for path in map(str, found)]
        return sorted("/".join(p[:2]) for p in inside if len(p) == 3 and p[2] == MANIFEST and p[0] != LEASES)

    def find_damage(self, name: str, digests: bool) -> tuple[dict[str, Any], list[str]]:
        """Compare a stage with its manifest; return the manifest, empty if it cannot be read, and the differences.

        Args:
            digests: whether to read all files, or only compare sizes.

        Raises:
            Gone: the store does not answer.
        """
        try:
            content = self.read_manifest(name)
        except StoreError as error:
            return {}, [str(error)]
        if content is None:
            return {}, [f"{MANIFEST} is missing"]
        with self._asking():
            sizes = self._sizes(name)
        damage = []
        for file, facts in content["files"].items():
            if facts["sha256"] not in sizes:
                damage.append(f"{file} is missing")
            elif sizes[facts["sha256"]] != facts["size"]:
                damage.append(f"{file} has {sizes[facts['sha256']]:,} bytes instead of {facts['size']:,}")
            elif digests and self._digest(self._path(name, facts["sha256"])) != facts["sha256"]:
                damage.append(f"{file} has other contents than were written (its SHA-256 differs)")
        return content, damage

    def remove(self, name: str) -> None:
        """Remove a stage: its manifest first, so that files left by a killed removal belong to no stage.

        Raises:
            Gone: the store does not answer.
        """
        with self._asking():
            for file in sorted(self._sizes(name), key=lambda file: file != MANIFEST):
                self._fs.rm_file(self._path(name, file))
            if self.local:
                Path(self._root, name).rmdir()

    # --- leases

    @contextmanager
    def lease(self, name: str, note: Note) -> Iterator[None]:
        """Wait until a stage exists or no other machine computes it; then hold and renew a lease on it.

        If the remote store does not answer, the caller continues without a lease.
        """
        path = f"{self._root}/{LEASES}/{name.replace('/', '-')}"
        try:
            ours = self._acquire(path, name, note)
        except Gone:
            ours = False
        if not ours:
            yield
            return
        ended = threading.Event()
        renewing = threading.Thread(target=self._renew, args=(path, ended), name="lease", daemon=True)
        renewing.start()
        try:
            yield
        finally:
            ended.set()
            renewing.join(self.expiry)
            try:
                with self._asking():
                    if self._read(path).startswith(self._me):
                        self._fs.rm_file(path)
            except Gone:
                pass  # it expires

    def _acquire(self, path: str, name: str, note: Note) -> bool:
        """Take the lease; return False if the stage has been published in the meantime."""
        seen, since, told = "", time.monotonic(), False
        while True:
            with self._asking():
                if self._create(path, f"{self._me} 0".encode()):
                    return True
                found = self._read(path)
            if found != seen:
                seen, since = found, time.monotonic()
            if not told and found:
                note(f"another machine ({found.split(' ')[0]}) is computing {name}; waiting for it")
                told = True
            if time.monotonic() - since > self.expiry:
                with self._asking():
                    self._put_bytes(path, f"{self._me} 0".encode())
                return True
            time.sleep(min(2.0, self.expiry / 10))
            if self._is_there(name):
                return False

    def _is_there(self, name: str) -> bool:
        try:
            return self.read_manifest(name) is not None
        except StoreError:  # it is damaged there, and the other machine's result will not replace it
            return False

    def _renew(self, path: str, ended: threading.Event) -> None:
        count = 0
        while not ended.wait(self.expiry / 4):
            count += 1
            try:
                with self._asking():
                    self._put_bytes(path, f"{self._me} {count}".encode())
            except Gone:
                return

    # --- objects

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Turn every refusal and failure of the store into :class:`Gone`, and do not use the store afterwards."""
        if self.lost:
            raise Gone(self.lost)
        try:
            yield
        except (Gone, StoreError):
            raise
        except Exception as error:  # drivers of storage raise many types of errors
            self.lost = _reason(error)
            raise Gone(self.lost) from error

    def _path(self, name: str, file: str) -> str:
        return f"{self._root}/{name}/{file}"

    def _sizes(self, name: str) -> dict[str, int]:
        try:
            found = self._fs.find(f"{self._root}/{name}", detail=True)
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise
            return {}
        return {PurePosixPath(path).name: int(facts["size"]) for path, facts in found.items()}

    def _digest(self, path: str) -> str:
        digest = hashlib.sha256()
        with self._asking(), self._fs.open(path, "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
        return digest.hexdigest()

    def _read(self, path: str) -> str:
        try:
            return str(self._fs.cat_file(path).decode())
        except FileNotFoundError:
            return ""

    def _put(self, source: Path, path: str) -> None:
        if not self.local:
            self._fs.put_file(str(source), path)
            return
        aside = self._aside(path)
        shutil.copyfile(source, aside)
        disk.replace(aside, Path(path))

    def _put_bytes(self, path: str, content: bytes) -> None:
        if not self.local:
            self._fs.pipe_file(path, content)
            return
        aside = self._aside(path)
        aside.write_bytes(content)
        disk.replace(aside, Path(path))

    def _create(self, path: str, content: bytes) -> bool:
        """Create a complete object unless it exists; return whether it was created."""
        try:
            if not self.local:
                self._fs.pipe_file(path, content, mode="create")  # If-None-Match: *
                return True
            aside = self._aside(path)
            aside.write_bytes(content)
            disk.flush(aside)
            try:
                os.link(aside, path)
            finally:
                aside.unlink()
            disk.flush(Path(path).parent)
        except FileExistsError:
            return False
        except OSError as error:
            if _code(error) in TAKEN:
                return False
            raise
        return True

    def _aside(self, path: str) -> Path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return Path(path).with_name(f".{Path(path).name}.{self._me}.{threading.get_ident()}")

    def _advise(self, name: str) -> str:
        return f"dnpo store remove {name} remote={self.address} yes=true removes it"


def bring_into(folder: Path, root: Path, name: str, remote: Remote, content: Mapping[str, Any]) -> None:
    """Fetch a stage into a local store. Its folder appears there only when it is complete.

    Args:
        folder: the stage's folder in the store ``root``.
        content: its manifest.

    Raises:
        Gone: the remote store does not answer.
        StoreError: it is damaged there.
    """
    aside = root / FETCHED / f"{name.replace('/', '-')}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        remote.fetch(name, content, aside)
        for each in (*(path for path in aside.rglob("*") if path.is_dir()), aside):
            disk.flush(each)
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside.replace(folder)
        disk.flush(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _open(scheme: str) -> Any:
    import fsspec

    try:
        if scheme == "file":
            return fsspec.filesystem("file")
        times = {"connect_timeout": 5, "read_timeout": TIMEOUT, "retries": {"total_max_attempts": 2}}
        found = fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=times)
        found.retries = 2  # s3fs's own attempts; each makes the attempts above
        return found
    except ImportError as error:
        raise SettingsError("store.remote=s3://…: needs s3fs; pip install 'dnpo[remote]'") from error


def _code(error: BaseException) -> str:
    response = getattr(error.__cause__, "response", None)
    return str(response["Error"].get("Code", "")) if isinstance(response, dict) and "Error" in response else ""


def _reason(error: Exception) -> str:
    """Describe an error in one line, without names and passwords of addresses."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"://[^/@\s]+@", "://…@", f"{_code(error) or type(error).__name__}: {text}"[:LONGEST_REASON])
