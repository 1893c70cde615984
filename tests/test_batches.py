"""The order of training: fixed in advance, drawn from the seed, and continued from a checkpoint."""

import json
from itertools import islice

import pytest

from dnpo.optimise.steps import Batches, Slice, schedule

Step = list[tuple[str, Slice[int]]]
SHAPES = [
    (10, 4, 2),
    (10, 4, 3),
    (10, 4, 4),
    (12, 4, 1),
    (7, 16, 3),
    (1, 1, 1),
    (5, 1, 1),
    (9, 4, 100),
    (100, 32, 5),
    (4097, 64, 64),
]


def batches(
    micro: int = 2, *, rows: int = 10, batch: int = 4, epochs: int = 3, seed: int = 1
) -> Batches[int, tuple[str, Slice[int]]]:
    """Rows whose value is ten times their index, and micro-batches that show their content."""

    def collate(piece: Slice[int]) -> tuple[str, Slice[int]]:
        return " ".join(map(str, piece.rows)), piece

    numbers = [10 * i for i in range(rows)]
    return Batches(numbers, schedule(rows, batch, epochs=epochs, seed=seed, steps=None), micro, collate)


def rows_of(step: Step) -> list[int]:
    """The indices of the rows of a policy step, in order."""
    return [row // 10 for _, piece in step for row in piece.rows]


# --- the order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "batch", "micro"), SHAPES)
def test_every_epoch_is_a_permutation(rows: int, batch: int, micro: int) -> None:
    """In every epoch every row occurs once, in as few steps as possible, whose sizes differ by at most one row."""
    groups = schedule(rows, batch, epochs=3, seed=0, steps=None)
    per_epoch = -(-rows // batch)
    assert len(groups) == 3 * per_epoch
    for epoch in range(3):
        own = groups[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(row for group in own for row in group) == list(range(rows))
        sizes = {len(group) for group in own}
        assert max(sizes) <= batch
        assert max(sizes) - min(sizes) <= 1
    assert [tuple(rows_of(step)) for step in batches(micro, rows=rows, batch=batch, seed=0)] == groups


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 12])
@pytest.mark.parametrize("epochs", [0, 1, 2, 50])
def test_steps_override_epochs(steps: int, epochs: int) -> None:
    """Exactly this many policy steps, the first ones of a longer training, for any ``epochs``."""
    found = schedule(10, 4, epochs=epochs, seed=5, steps=steps)
    assert len(found) == steps
    assert found == schedule(10, 4, epochs=6, seed=5, steps=None)[:steps]


def test_orders_differ_between_epochs_and_seeds_and_are_repeatable() -> None:
    """Every epoch has a different order, drawn only from the seed; none is the order of the file."""

    def orders(seed: int) -> list[tuple[int, ...]]:
        return schedule(50, 50, epochs=4, seed=seed, steps=None)

    assert orders(0) == orders(0)
    assert len({*orders(0), *orders(1), tuple(range(50))}) == 9


def test_order_golden() -> None:
    """A run that was killed before an update of the code continues in the same order."""
    assert schedule(8, 8, epochs=2, seed=0, steps=None) == [(2, 6, 0, 1, 5, 3, 4, 7), (3, 2, 1, 7, 6, 5, 4, 0)]


def test_no_rows_or_no_epochs_give_no_steps() -> None:
    """There are no steps, and the search for enough rows to fill a number of steps ends."""
    assert schedule(0, 4, epochs=3, seed=0, steps=None) == []
    assert schedule(0, 4, epochs=3, seed=0, steps=3) == []
    assert schedule(10, 4, epochs=0, seed=0, steps=None) == []
    assert list(batches(epochs=0)) == []


# --- micro-batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "batch", "micro"), SHAPES)
def test_micro_batches_partition_a_step(rows: int, batch: int, micro: int) -> None:
    """The micro-batches of a step fit in memory, contain its rows in its order, and know the step and all its rows."""
    groups = schedule(rows, batch, epochs=3, seed=1, steps=None)
    for number, step in enumerate(batches(micro, rows=rows, batch=batch)):
        # The division of a step into micro-batches changes neither its rows nor their order.
        assert tuple(rows_of(step)) == groups[number]
        assert len(step) == -(-len(groups[number]) // micro)
        for text, piece in step:
            assert 1 <= len(piece.rows) <= micro
            assert (piece.step, piece.group) == (number, tuple(10 * i for i in groups[number]))
            assert text == " ".join(map(str, piece.rows))


@pytest.mark.parametrize(("rows", "batch", "micro"), SHAPES)
def test_shares_weigh_every_row_the_same(rows: int, batch: int, micro: int) -> None:
    """The sum of micro-batch means, weighted by share, is the mean over the step: shares add up to 1, by rows."""
    for step in batches(micro, rows=rows, batch=batch):
        size = len(rows_of(step))
        assert sum(piece.share for _, piece in step) == pytest.approx(1, abs=1e-12)
        for _, piece in step:
            assert piece.share == pytest.approx(len(piece.rows) / size, abs=1e-12)


def test_worked_example() -> None:
    """Ten rows in steps of at most four, which gives 3, 3 and 4, in micro-batches of three."""
    found = list(batches(3, epochs=1))
    assert [[len(piece.rows) for _, piece in step] for step in found] == [[3], [3], [3, 1]]
    assert [[piece.share for _, piece in step] for step in found] == [[1.0], [1.0], [0.75, 0.25]]
    assert [[piece.step for _, piece in step] for step in found] == [[0], [1], [2, 2]]


def test_a_step_can_be_divided_again() -> None:
    """This happens when a step does not fit into memory: the rows are the same, and the position does not change."""
    running = batches(4)
    whole = list(islice(running, 2))
    for micro in (1, 2, 3, 4):
        parts = running.step(1, micro)
        assert [len(piece.rows) for _, piece in parts[:-1]] == [micro] * (len(parts) - 1)
        assert rows_of(parts) == rows_of(whole[1])
    assert running.state_dict() == {"next": 2}


# --- the iterable -----------------------------------------------------------------------------------------------------


def test_the_length_is_the_number_of_policy_steps() -> None:
    """Nine steps, for any size of micro-batches and any number of steps done."""
    for micro in (1, 3, 4, 100):
        running = batches(micro)
        assert len(running) == 9
        assert len(list(islice(running, 4))) == 4
        assert len(running) == 9
        assert len(list(running)) == 5


@pytest.mark.parametrize("done", range(10))
def test_resumed_batches_are_exactly_the_remaining_ones(done: int) -> None:
    """From a checkpoint after any step, also through JSON: nothing is trained on twice, and nothing is left out."""
    whole = list(batches())
    killed = batches()
    before = list(islice(killed, done))
    state = json.loads(json.dumps(killed.state_dict()))
    resumed = batches()
    resumed.load_state_dict(state)
    assert before + list(resumed) == whole


@pytest.mark.parametrize("micro", [1, 3, 4, 100])
def test_another_micro_batch_size_continues_with_the_same_rows(micro: int) -> None:
    """A run that ran out of memory is continued with smaller micro-batches: a position counts steps."""
    whole = list(batches(2))
    killed = batches(2)
    list(islice(killed, 4))
    resumed = batches(micro)
    resumed.load_state_dict(killed.state_dict())
    assert [rows_of(step) for step in resumed] == [rows_of(step) for step in whole[4:]]


def test_state_counts_the_steps_handed_out() -> None:
    """A checkpoint that is made during a step counts that step as done."""
    running = batches()
    assert running.state_dict() == {"next": 0}
    for position, _ in enumerate(running, start=1):
        assert running.state_dict() == {"next": position}


def test_position_belongs_to_the_training_and_not_to_the_iterator() -> None:
    """A second iterator continues where the first stopped; after the end, nothing is trained on again."""
    whole, running = list(batches()), batches()
    assert list(islice(running, 4)) == whole[:4]
    assert list(running) == whole[4:]
    assert list(running) == []


def test_rewound_batches_start_again() -> None:
    """Loading the initial state gives the same steps again."""
    running = batches()
    beginning = running.state_dict()
    first = list(running)
    running.load_state_dict(beginning)
    assert list(running) == first


def test_micro_batches_are_made_when_their_step_comes() -> None:
    """Not all at the start, since collating may read from disk."""
    made: list[int] = []

    def collate(piece: Slice[int]) -> int:
        made.append(piece.step)
        return piece.step

    running = Batches(range(10), schedule(10, 4, epochs=1, seed=0, steps=None), 2, collate)
    next(iter(running))
    assert made == [0, 0]
