"""Write files under a hidden name until they are complete on the disk; explain disk errors.

So not even a power cut leaves an incomplete file under a final name.
"""

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = FULL | {errno.EROFS, errno.EIO}
CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
# safetensors, tokenizers, torch and sqlite raise errors that are not OSErrors; some give no reason
OF_LIBRARIES = re.compile(
    r"\(os error (?P<number>\d+)\)|PytorchStreamWriter failed|iostream error|\.cc:\d+\] \. unexpected pos|disk is full"
)


def name_aside(path: Path) -> Path:
    """Return the hidden name in the same folder under which this process writes a file until it is complete."""
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
    """Explain an error of writing or reading: the reason, the file and what to do; None for any other error.

    Args:
        root: in this folder, every OSError about a file is explained; elsewhere, only a full or broken disk.
    """
    for each in _causes(error):
        if isinstance(each, OSError) and each.errno is not None:
            names = [os.fsdecode(name) for name in (each.filename2, each.filename) if isinstance(name, str | bytes)]
            inside = each is error and root is not None and any(Path(n).absolute().is_relative_to(root) for n in names)
            if inside or each.errno in REFUSED:
                where = f"{names[0]}: " if names else ""
                return f"{where}{each.strerror}{_advise(each.errno)}"
        found = OF_LIBRARIES.search(str(each))
        if found and (found["number"] is None or int(found["number"]) in REFUSED):
            number = int(found["number"] or errno.ENOSPC)
            return f"{os.strerror(number)}{_advise(number)}"
    return None


def _advise(number: int) -> str:
    if number in FULL:
        return "; make room there, or write to another disk"
    return "; expected a folder to write to" if number in CLOSED else ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
