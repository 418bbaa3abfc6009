"""Programs for thousands of schedules: the replay accepts them, the buffers are as small as the simulator says."""

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpipe import schedules
from jaxpipe.errors import ScheduleError
from jaxpipe.lowering.lower import lower
from jaxpipe.lowering.program import IDLE, Cell
from jaxpipe.lowering.slots import colour
from jaxpipe.lowering.verify import verify
from jaxpipe.schedules import Op, Schedule

NAMES = ("1f1b", "eager_1f1b", "gpipe")
sizes = st.tuples(st.integers(1, 9), st.integers(1, 12))


@given(st.sampled_from(NAMES), sizes)
def test_slots_are_what_the_simulator_counts(name, size):
    schedule = schedules.get(name, *size)
    program = lower(schedule)  # replays itself
    assert program.saved_per_rank == tuple(schedules.simulate(schedule).peak_live)
    assert program.pools == {"saved": max(program.saved_per_rank)}


@given(sizes)
def test_one_f_one_b_needs_no_arrival_buffers_and_permutes_edges_that_carry_data(size):
    stages, micro_batches = size
    program = lower(schedules.one_f_one_b(stages, micro_batches))
    assert program.num_ticks == 2 * (micro_batches + stages - 1)
    assert program.direct == program.inboxes.keys()
    assert program.saved_per_rank == tuple(min(stages - rank, micro_batches) for rank in range(stages))
    assert len(program.loops) == (1 if micro_batches > 1 else 2)
    for loop, phase in [(each, phase) for each in program.loops for phase in range(each.period)]:
        channels = {channel.value: number for number, channel in enumerate(program.channels)}
        forward, backward = (
            program.phase_edges(loop, phase, channels[value]) if value in channels else () for value in ("y", "dx")
        )
        if stages > 2 and micro_batches > 1:
            assert {a for a, _ in forward}.isdisjoint(b for _, b in forward), "ranks only wait for true dependencies"
        assert all(b == a + 1 for a, b in forward) and all(b == a - 1 for a, b in backward)


@given(sizes)
def test_forward_only_is_one_tick_per_micro_batch(size):
    stages, micro_batches = size
    program = lower(schedules.forward_only(stages, micro_batches))
    assert program.num_ticks == micro_batches + stages - 1
    assert [loop.period for loop in program.loops] == [1]
    assert not program.pools and program.inboxes.keys() <= {"y"}


@st.composite
def random_schedules(draw):
    """A random topological order of the ops, dealt to the ranks in that order: any table that does not deadlock."""
    stages, micro_batches = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rng = random.Random(draw(st.integers(0, 2**32)))
    todo = {Op(k, s, m) for k in "FB" for s in range(stages) for m in range(micro_batches)}
    rows = [[] for _ in range(stages)]
    done = set()
    while todo:
        ready = sorted(op for op in todo if _needs(op, stages) <= done)
        op = rng.choice(ready)
        rows[op.stage].append(op)
        todo.remove(op)
        done.add(op)
    return Schedule(rows=tuple(map(tuple, rows)), placement=tuple(range(stages)))


def _needs(op, stages):
    if op.kind == "F":
        return {Op("F", op.stage - 1, op.micro_batch)} if op.stage else set()
    after = {Op("B", op.stage + 1, op.micro_batch)} if op.stage + 1 < stages else set()
    return after | {Op("F", op.stage, op.micro_batch)}


@given(random_schedules())
def test_any_table_can_be_lowered(schedule):
    program = lower(schedule)
    assert program.saved_per_rank == tuple(max(_live(row)) for row in schedule.rows), (
        "in order on each rank, whatever the clock"
    )


def _live(row):
    live = 0
    for op in row:
        if op is not None:
            live += 1 if op.kind == "F" else -1
            yield live


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


@given(st.dictionaries(st.integers(), st.tuples(st.integers(0, 20), st.integers(0, 8)), max_size=30))
def test_colouring_is_valid_and_optimal(raw):
    intervals = {key: (start, start + length) for key, (start, length) in raw.items()}
    slots, used = colour(intervals)
    for a, (first, last) in intervals.items():
        for b, (other_first, other_last) in intervals.items():
            if a != b and slots[a] == slots[b]:
                assert last < other_first or other_last < first
    busiest = max((sum(a <= t <= b for a, b in intervals.values()) for t in range(30)), default=0)
    assert used == busiest


def test_what_cannot_run_yet_is_said():
    swapped = Schedule(rows=((Op("F", 1, 0), Op("B", 1, 0)), (Op("F", 0, 0), Op("B", 0, 0))), placement=(1, 0))
    with pytest.raises(ScheduleError, match="one stage per rank, stage s on rank s"):
        lower(swapped)
    split = Schedule(rows=((Op("F", 0, 0), Op("I", 0, 0), Op("W", 0, 0)),), placement=(0,))
    with pytest.raises(ScheduleError, match="splits the backward pass"):
        lower(split)


def test_a_program_shows_itself():
    text = str(lower(schedules.one_f_one_b(4, 3)))
    assert "phase 0: ops B F; permutes forward 0>1 2>3, backward 1>0 3>2" in text
    assert "rank 3 | .    .    .    F0/0 B0/0 F1/0 B1/0 F2/0 B2/0" in text
