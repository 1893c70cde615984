"""The metrics of a training's steps next to its checkpoint: complete after any kill, and never partly read."""

from pathlib import Path

import pytest
from torch import Tensor

from dnpo.errors import StoreError
from dnpo.optimise.history import History
from dnpo.optimise.training import CHECKPOINT, HISTORY, discard_checkpoint
from tests.conftest import Report, World

from .test_optimise import MakePolicy, Stop, Stopping, fine_tune, how, same, timeless, weights

ROWS = [{"step": float(step), "loss/policy": 0.1 * step} for step in range(7)]


def test_rows_are_appended_and_read_up_to_a_checkpoint(tmp_path: Path) -> None:
    """Rows are equal in every digit. Lines that a kill left after the checkpoint are removed only with ``cut=True``."""
    path = tmp_path / HISTORY
    history = History(path)
    history.save(ROWS[:2])
    history.save(ROWS[:5])
    kept = path.read_bytes()
    other = History(path)
    other.checksum = history.checksum
    path.write_bytes(kept + b'{"step": 5.0}\n{"st')
    assert other.load(5, cut=False) == ROWS[:5]
    assert path.read_bytes() != kept
    assert other.load(5, cut=True) == ROWS[:5]
    assert path.read_bytes() == kept
    other.save(ROWS)
    assert other.load(7, cut=True) == ROWS
    assert History(path).load(0, cut=True) == [], "without a checkpoint a training begins again"
    assert path.read_bytes() == b""


def test_rows_that_a_checkpoint_refers_to_are_read_completely_or_refused(tmp_path: Path) -> None:
    path = tmp_path / HISTORY
    history = History(path)
    history.save(ROWS)
    whole = path.read_bytes()
    for damaged in (b"", whole[:-5], whole.replace(b"0.2", b"0.3", 1)):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=rf"{path}: does not have the 7 steps .*remove the checkpoint"):
            history.load(7, cut=True)
    path.unlink()
    with pytest.raises(StoreError, match="does not have the 7 steps"):
        history.load(7, cut=True)


def test_a_training_killed_between_history_and_checkpoint_continues(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """Killed twice, since leftover lines would be in the way of the next checkpoint; and checkpoints do not grow."""
    rows = [(p.id, p.token_ids, r.token_ids) for p, r in zip(world.prompts, world.human, strict=True)]
    sizes = []

    def run(folder: Path, report: Report) -> tuple[list[Tensor], list[dict[str, float]]]:
        policy = make_policy()
        history = fine_tune(policy, rows, how(steps=20), seed=1, folder=folder, report=report)
        return weights(policy), timeless(history)

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    undisturbed = run(tmp_path / "a", Report())
    for after in (3, 17):
        with pytest.raises(Stop):
            run(tmp_path / "b", Stopping(after))
        sizes.append((tmp_path / "b" / CHECKPOINT).stat().st_size)
        with (tmp_path / "b" / HISTORY).open("a") as stream:
            stream.write('{"step": 16.0, "rows": 4.0}\n{"step": ')
    report = Report()
    continued = run(tmp_path / "b", report)
    assert [row["step"] for row in report.rows] == list(range(20))
    assert continued[1] == undisturbed[1]
    assert same(undisturbed[0], continued[0])
    assert sizes[1] < 1.01 * sizes[0]
    discard_checkpoint(tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []
