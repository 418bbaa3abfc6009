"""Programs for thousands of schedules: the replay accepts them, the buffers are as small as the simulator says."""

from hypothesis import given
from hypothesis import strategies as st

from jaxpipe import schedules
from jaxpipe.lowering.lower import lower
from jaxpipe.lowering.program import SAVED
from tests.lowering.programs import NAMES, in_random_order, random_placements, random_schedules, shares, sizes


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


@given(random_schedules())
def test_any_table_can_be_lowered(schedule):
    program = lower(schedule)
    assert_slots(program)  # in order on each rank, whatever the clock


@given(random_placements(), st.integers(1, 3), st.integers(0, 2**32), shares)
def test_any_placement_can_be_lowered(placement, micro_batches, seed, split):
    """Stages of one rank number their slots together; a value that stays on its rank is not permuted."""
    program = lower(in_random_order(placement, micro_batches, seed, split))  # replays itself
    assert_slots(program)
    stays = {(a, b) for a, b in zip(placement, placement[1:], strict=False) if a == b}
    permuted = {edge for tick in program.traffic for channel, edge in tick if not program.channels[channel].is_local}
    assert all(a != b for a, b in permuted)
    assert bool(stays) == any(channel.is_local for channel in program.channels)


def assert_slots(program):
    """What a forward keeps is given back by B or I, what I keeps by W; no rank has a slot more than that takes."""
    rows = program.schedule.rows
    assert program.saved_per_rank == tuple(max(_live(row, "F", "BI")) for row in rows)
    assert program.pending_per_rank == tuple(max(_live(row, "I", "W")) for row in rows)
    needs = {"saved": max(program.saved_per_rank), "pending": max(program.pending_per_rank)}
    assert program.pools == {pool: count for pool, count in needs.items() if count}


def _live(row, begins, ends):
    live = 0
    for op in row:
        if op is not None:
            live += (op.kind in begins) - (op.kind in ends)
            yield live


@given(random_schedules())
def test_the_ops_of_a_micro_batch_share_slots_and_no_cell_has_one_without_an_op(schedule):
    program = lower(schedule)
    slots = {}
    for row in program.cells:
        for cell in row:
            if cell.kind == ".":
                assert cell.slots == () and cell.read == -1
            else:
                own = dict(zip(program.pools, cell.slots, strict=True))
                slots.setdefault((cell.stage, cell.micro_batch), {})[cell.kind] = own
    assert len(slots) == schedule.num_stages * schedule.num_micro_batches
    for ops in slots.values():
        assert ops.keys() in ({"F", "B"}, {"F", "I", "W"})
        first = ops.get("I") or ops["B"]
        assert ops["F"][SAVED] == first[SAVED] >= 0
        if "W" in ops:
            assert first["pending"] == ops["W"]["pending"] >= 0 and ops["W"][SAVED] == -1
        assert ops["F"].get("pending", -1) == ops.get("B", {}).get("pending", -1) == -1
