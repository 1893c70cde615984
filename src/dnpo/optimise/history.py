"""The metrics of a training's steps, in a file next to the checkpoint, so that the checkpoint does not grow."""

import json
import os
import zlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from dnpo.errors import StoreError


class History:
    """A file with one line of JSON per policy step. Every checkpoint appends the steps since the previous one.

    If a training is killed before its checkpoint is complete, the file has lines without a checkpoint. They are removed
    when the training continues.

    Attributes:
        checksum: CRC-32 of the lines up to the checkpoint; the checkpoint contains it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.checksum = path, 0
        self._steps = 0  # number of steps in the file

    def save(self, rows: Sequence[dict[str, float]]) -> None:
        """Append the rows that the file lacks, and wait until they are on the disk."""
        lines = "".join(f"{json.dumps(row)}\n" for row in rows[self._steps :]).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as stream:
            stream.write(lines)
            stream.flush()
            os.fsync(stream.fileno())
        self.checksum, self._steps = zlib.crc32(lines, self.checksum), len(rows)

    def load(self, steps: int, *, cut: bool) -> list[dict[str, float]]:
        """Return the rows of the steps before a checkpoint.

        Args:
            steps: their number.
            cut: whether to remove later rows from the file; only one process does.

        Raises:
            StoreError: the file lacks rows, or is damaged.
        """
        lines: list[bytes] = []
        if self.path.is_file():
            with self.path.open("rb") as stream:
                lines = list(islice(stream, steps))
            if cut:
                os.truncate(self.path, sum(map(len, lines)))
        if len(lines) < steps or zlib.crc32(b"".join(lines)) != self.checksum:
            raise StoreError(
                f"{self.path}: does not have the {steps:,} steps that the checkpoint next to it refers to; remove the "
                "checkpoint, and the training begins again"
            )
        self._steps = steps
        return [json.loads(line) for line in lines]

    def discard(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)
