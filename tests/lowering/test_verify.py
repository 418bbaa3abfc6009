"""The replay notices whatever is wrong with a program."""

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpipe import schedules
from jaxpipe.lowering.lower import lower
from jaxpipe.lowering.program import IDLE, Cell
from jaxpipe.lowering.verify import verify
from tests.lowering.programs import NAMES


def _mutants(program, rng):
    """Programs with one cell wrong: another slot, another micro-batch, or an op missing."""
    busy = [(t, r) for t, row in enumerate(program.cells) for r, cell in enumerate(row) if cell.kind != IDLE]
    for _ in range(20):
        tick, rank = rng.choice(busy)
        cell = program.cells[tick][rank]
        wrong = rng.choice(
            [
                Cell(arrive=cell.arrive),
                cell._replace(micro_batch=(cell.micro_batch + 1) % program.schedule.num_micro_batches),
                cell._replace(slots=tuple(slot + 1 for slot in cell.slots)),
            ]
        )
        rows = [list(row) for row in program.cells]
        rows[tick][rank] = wrong
        yield (tick, rank, wrong), dataclasses.replace(program, cells=tuple(map(tuple, rows)))


@given(st.sampled_from(NAMES), st.integers(2, 4), st.integers(2, 6), st.integers(0, 2**16))
def test_the_replay_rejects_every_mutant(name, stages, micro_batches, seed):
    program = lower(schedules.get(name, stages, micro_batches))
    for what, mutant in _mutants(program, random.Random(seed)):
        with pytest.raises(AssertionError):
            verify(mutant)
            print("survived:", what)


def test_the_replay_notices_a_permute_between_arrival_and_use():
    """Messages used as they arrive (no slot) are lost when another permute runs in between."""
    program = lower(schedules.eager_one_f_one_b(3, 4))
    (loop,) = program.loops
    everywhere = tuple(traffic | {(0, (0, 1))} for traffic in program.traffic)
    with pytest.raises(AssertionError, match="reads None"):
        verify(dataclasses.replace(program, traffic=everywhere))
    assert loop.period == 2


def test_the_replay_notices_every_message_that_is_not_stored():
    program = dataclasses.replace(lower(schedules.eager_one_f_one_b(3, 4)), direct=frozenset())
    verify(program)  # without direct messages all of them go through their slots
    tried = 0
    for tick, row in enumerate(program.cells):
        for rank, cell in enumerate(row):
            for number, slot in enumerate(cell.arrive):
                if slot >= 0:
                    rows = [list(each) for each in program.cells]
                    lost = tuple(-1 if n == number else s for n, s in enumerate(cell.arrive))
                    rows[tick][rank] = cell._replace(arrive=lost)
                    with pytest.raises(AssertionError, match="reads"):
                        verify(dataclasses.replace(program, cells=tuple(map(tuple, rows))))
                    tried += 1
    assert tried == 4 * 2 * 2


def test_the_replay_notices_a_slot_that_is_in_use():
    program = lower(schedules.gpipe(1, 3))
    rows = [[cell._replace(slots=(0,)) for cell in row] for row in program.cells]
    with pytest.raises(AssertionError, match="tick 1, rank 0, F1: slot 0 is still in use"):
        verify(dataclasses.replace(program, cells=tuple(map(tuple, rows))))


def test_the_replay_counts_slots_and_ops():
    program = lower(schedules.one_f_one_b(3, 4))
    with pytest.raises(AssertionError, match="slots"):
        verify(dataclasses.replace(program, saved_per_rank=(4, 2, 1)))
    longer = lower(schedules.one_f_one_b(3, 5)).schedule
    with pytest.raises(AssertionError, match="of 30 ops ran"):
        verify(dataclasses.replace(program, schedule=longer))
