"""The metrics of a training's steps in a file next to its checkpoint, which therefore does not grow with the steps."""

import json
import os
import zlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from dnpo.errors import StoreError


class History:
    """A file with a line of JSON for each policy step, to which every checkpoint appends the steps since the last one.

    A training that is killed before its checkpoint is complete leaves lines that no checkpoint refers to; they are cut
    when it continues.

    Attributes:
        checksum: CRC-32 of the lines up to the checkpoint, which has this number.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.checksum = path, 0
        self._steps = 0  # in the file

    def save(self, rows: Sequence[dict[str, float]]) -> None:
        """Append those of all rows so far that the file lacks, and wait until they are on the disk."""
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
            cut: whether to remove later rows from the file; one of several processes does.

        Raises:
            StoreError: the file lacks some, or is damaged.
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
