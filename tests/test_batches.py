"""The order of training: known beforehand, drawn from the seed, and continued where a checkpoint was made."""

import json
from collections.abc import Sequence
from itertools import islice

import pytest

from dnpo.data.batches import Batches, Slice, schedule


def groups(slices: Sequence[Slice]) -> list[list[Slice]]:
    """The micro-batches of each policy step, told apart by what they say of themselves."""
    found: list[list[Slice]] = []
    for piece in slices:
        if piece.first:
            found.append([])
        found[-1].append(piece)
    return found


def rows_of(group: Sequence[Slice]) -> list[int]:
    """The rows of a policy step, in order."""
    return [row for piece in group for row in piece.rows]


SHAPES = [(10, 4, 2), (10, 4, 3), (10, 4, 4), (12, 4, 1), (7, 16, 3), (1, 1, 1), (5, 1, 1), (9, 4, 100), (100, 32, 5)]


@pytest.mark.parametrize(("rows", "batch", "micro"), SHAPES)
def test_every_epoch_is_a_permutation(rows: int, batch: int, micro: int) -> None:
    """In every epoch every row is seen once; only the last step of an epoch may be smaller, and none spans two."""
    steps = groups(schedule(rows, batch, micro, epochs=3, seed=0, steps=None))
    per_epoch = -(-rows // batch)
    assert len(steps) == 3 * per_epoch
    for epoch in range(3):
        own = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(row for group in own for row in rows_of(group)) == list(range(rows))
        assert [len(rows_of(group)) for group in own[:-1]] == [batch] * (per_epoch - 1)
        assert len(rows_of(own[-1])) == rows - batch * (per_epoch - 1)


@pytest.mark.parametrize(("rows", "batch", "micro"), SHAPES)
def test_micro_batches_partition_a_step(rows: int, batch: int, micro: int) -> None:
    """The micro-batches of a step fit in memory, have its rows in its order, and are marked at both ends."""
    whole = groups(schedule(rows, batch, batch, epochs=2, seed=3, steps=None))
    parts = groups(schedule(rows, batch, micro, epochs=2, seed=3, steps=None))
    # How a step is cut to fit in memory decides nothing about which rows it has, nor their order.
    assert [rows_of(group) for group in parts] == [rows_of(group) for group in whole]
    for group in parts:
        assert all(1 <= len(piece.rows) <= micro for piece in group)
        assert [piece.first for piece in group] == [True] + [False] * (len(group) - 1)
        assert [piece.last for piece in group] == [False] * (len(group) - 1) + [True]
        assert {piece.group for piece in group} == {tuple(rows_of(group))}


@pytest.mark.parametrize(("rows", "batch", "micro"), SHAPES)
def test_shares_weigh_every_row_the_same(rows: int, batch: int, micro: int) -> None:
    """The sum of micro-batch means, weighted by share, is the mean over the step: shares add up to 1, by rows."""
    for group in groups(schedule(rows, batch, micro, epochs=2, seed=0, steps=None)):
        size = len(rows_of(group))
        assert sum(piece.share for piece in group) == pytest.approx(1, abs=1e-12)
        for piece in group:
            assert piece.share == pytest.approx(len(piece.rows) / size, abs=1e-12)


def test_worked_example() -> None:
    """Ten rows in steps of four, in micro-batches of three: 3+1, 3+1, and a smaller last step of 2."""
    found = schedule(10, 4, 3, epochs=1, seed=0, steps=None)
    assert [len(piece.rows) for piece in found] == [3, 1, 3, 1, 2]
    assert [piece.share for piece in found] == [0.75, 0.25, 0.75, 0.25, 1.0]
    assert [piece.first for piece in found] == [True, False, True, False, True]
    assert [piece.last for piece in found] == [False, True, False, True, True]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 12])
@pytest.mark.parametrize("epochs", [1, 2, 50])
def test_steps_override_epochs(steps: int, epochs: int) -> None:
    """Exactly so many policy steps, the beginning of what more epochs would do, whatever ``epochs`` says."""
    found = schedule(10, 4, 3, epochs=epochs, seed=5, steps=steps)
    assert len(groups(found)) == steps
    assert found[-1].last
    assert found == schedule(10, 4, 3, epochs=6, seed=5, steps=None)[: len(found)]


def test_orders_differ_between_epochs_and_seeds_and_are_repeatable() -> None:
    """Every epoch has an order of its own, drawn from the seed alone; none is the order of the file."""

    def orders(seed: int) -> list[tuple[int, ...]]:
        found = schedule(50, 50, 50, epochs=4, seed=seed, steps=None)
        return [piece.rows for piece in found]

    assert orders(0) == orders(0)
    assert len({*orders(0), *orders(1), tuple(range(50))}) == 9


def test_order_golden() -> None:
    """A run that was killed before an update of the code goes on in the order it began with."""
    assert [piece.rows for piece in schedule(8, 8, 8, epochs=2, seed=0, steps=None)] == [
        (2, 6, 0, 1, 5, 3, 4, 7),
        (3, 2, 1, 7, 6, 5, 4, 0),
    ]


def test_nothing_to_do() -> None:
    """No rows or no epochs: no micro-batches, and no endless search for the rows of a number of steps."""
    assert schedule(0, 4, 2, epochs=3, seed=0, steps=None) == []
    assert schedule(0, 4, 2, epochs=3, seed=0, steps=3) == []
    assert schedule(10, 4, 2, epochs=0, seed=0, steps=None) == []


# --- the iterable -----------------------------------------------------------------------------------------------------

ROWS = "abcdefghij"


def batches() -> Batches[str, tuple[str, Slice]]:
    """Ten rows, three times, in 15 micro-batches."""

    def collate(rows: Sequence[str], piece: Slice) -> tuple[str, Slice]:
        return "".join(rows), piece

    return Batches(ROWS, schedule(len(ROWS), 4, 2, epochs=3, seed=1, steps=None), collate)


def test_batches_hold_the_rows_of_their_slices() -> None:
    """Each batch is made of the rows its slice names, in that order, and comes with that slice."""
    found = list(batches())
    assert len(found) == len(batches()) == 15
    assert [piece for _, piece in found] == batches().slices
    for text, piece in found:
        assert text == "".join(ROWS[i] for i in piece.rows)


@pytest.mark.parametrize("done", range(16))
def test_resumed_batches_are_exactly_those_that_remain(done: int) -> None:
    """From a checkpoint after any micro-batch, through JSON too: nothing is trained on twice and nothing left out."""
    whole = list(batches())
    killed = batches()
    before = list(islice(killed, done))
    state = json.loads(json.dumps(killed.state_dict()))
    resumed = batches()
    resumed.load_state_dict(state)
    assert before + list(resumed) == whole
    assert len(resumed) == len(whole)  # the length is that of the training, not of what remains


def test_state_counts_what_was_handed_out() -> None:
    """A checkpoint that is made while a batch is worked on counts that batch as done."""
    running = batches()
    assert running.state_dict() == {"next": 0}
    for position, _ in enumerate(running, start=1):
        assert running.state_dict() == {"next": position}


def test_position_belongs_to_the_training_and_not_to_the_iterator() -> None:
    """A second iterator goes on where the first stopped, and after the end nothing is trained on once more."""
    whole, running = list(batches()), batches()
    assert list(islice(running, 4)) == whole[:4]
    assert list(running) == whole[4:]
    assert list(running) == []


def test_rewound_batches_begin_again() -> None:
    """From the state of the beginning the same batches come again."""
    running = batches()
    beginning = running.state_dict()
    first = list(running)
    running.load_state_dict(beginning)
    assert list(running) == first
