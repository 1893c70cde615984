"""Write files so that what has its final name is whole, also after a power cut; and explain what a disk refuses."""

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = FULL | {errno.EROFS, errno.EIO}
ROOM = "make room there"
# safetensors and tokenizers, torch, sqlite: they raise errors of their own, or none that says why
OF_LIBRARIES = re.compile(r"\(os error (?P<number>\d+)\)|PytorchStreamWriter failed|database or disk is full")


def name_aside(path: Path) -> Path:
    """Return where this process writes a file before it is whole: a hidden name in the same folder."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def replace(aside: Path, path: Path) -> None:
    """Give a written file its final name, once its contents are on the disk."""
    flush(aside)
    aside.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems flush no folders
            raise
    finally:
        os.close(handle)


def explain(error: BaseException, root: Path | None = None) -> str | None:
    """Return what the system refused to write or read, with the file and what to do; None for any other error.

    Args:
        root: a folder; every error of the system on a file in it counts, else those of a full or broken disk.
    """
    for each in _causes(error):
        if isinstance(each, OSError) and each.errno is not None:
            names = [os.fsdecode(name) for name in (each.filename2, each.filename) if isinstance(name, str | bytes)]
            inside = each is error and root is not None and any(Path(n).absolute().is_relative_to(root) for n in names)
            if inside or each.errno in REFUSED:
                where = f"{names[0]}: " if names else ""
                return f"{where}{each.strerror}" + (f"; {ROOM}" if each.errno in FULL else "")
        found = OF_LIBRARIES.search(str(each))
        if found and (found["number"] is None or int(found["number"]) in REFUSED):
            number = int(found["number"] or errno.ENOSPC)
            return os.strerror(number) + (f"; {ROOM}" if number in FULL else "")
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
