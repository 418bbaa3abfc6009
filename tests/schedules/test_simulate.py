"""The simulator against longest paths of a graph, and against figures known from the literature."""

import functools
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules import Op, Schedule, eager_one_f_one_b, gpipe, one_f_one_b, simulate
from tests.schedules.tables import edges, examples, longest_paths, tables

COST = st.fractions(Fraction(1, 10), 5, max_denominator=10)


@examples
@given(tables(), COST, COST, COST, st.fractions(0, 3, max_denominator=4))
def test_without_sync_every_start_is_a_longest_path(table, forward, backward_input, backward_weight, comm):
    schedule = Schedule(*table)
    cost = {"F": forward, "B": backward_input + backward_weight, "I": backward_input, "W": backward_weight}

    def duration(op):
        return cost[op.kind] / schedule.num_chunks

    def delay(source, op):
        return comm if schedule.placement[source.stage] != schedule.placement[op.stage] else 0

    timeline = simulate(schedule, forward, backward_input, backward_weight, comm)
    assert timeline.starts == longest_paths(schedule.rows, duration, delay)
    assert all(timeline.ends[op] == start + duration(op) for op, start in timeline.starts.items())
    assert timeline.makespan == max(timeline.ends.values())
    work = forward if schedule.forward_only else forward + backward_input + backward_weight
    assert timeline.bubble == timeline.makespan - schedule.num_micro_batches * work
    # An order of waiting: a barrier can only delay.
    near = simulate(schedule, forward, backward_input, backward_weight, comm, sync="neighbour")
    far = simulate(schedule, forward, backward_input, backward_weight, comm, sync="global")
    assert all(start <= near.starts[op] <= far.starts[op] for op, start in timeline.starts.items())


@examples
@given(tables(forward_only=False), COST, COST, COST)
def test_peak_live_counts_what_is_held_at_one_moment(table, forward, backward_input, backward_weight):
    schedule = Schedule(*table)
    timeline = simulate(schedule, forward, backward_input, backward_weight)
    taken = {(op.stage, op.micro_batch): start for op, start in timeline.starts.items() if op.kind == "F"}
    given_back = {(op.stage, op.micro_batch): end for op, end in timeline.ends.items() if op.kind in "BW"}
    for rank in range(schedule.num_ranks):
        mine = [key for key in taken if schedule.placement[key[0]] == rank]
        held = max(sum(taken[key] <= taken[now] < given_back[key] for key in mine) for now in mine)
        assert timeline.peak_live[rank] == Fraction(held, schedule.num_chunks)


@examples
@given(tables(), st.data())
def test_every_stage_and_every_edge_has_its_own_cost(table, data):
    schedule = Schedule(*table)
    stages, ranks = schedule.num_stages, range(schedule.num_ranks)
    per_stage = {kind: data.draw(st.lists(COST, min_size=stages, max_size=stages)) for kind in "FIW"}
    per_stage["B"] = [i + w for i, w in zip(per_stage["I"], per_stage["W"], strict=True)]
    comm = {(a, b): data.draw(st.integers(0, 3)) for a in ranks for b in ranks}

    def duration(op):
        return per_stage[op.kind][op.stage]

    def delay(source, op):
        ends = schedule.placement[source.stage], schedule.placement[op.stage]
        return comm[ends] if ends[0] != ends[1] else 0

    costs = per_stage["F"], per_stage["I"], per_stage["W"]
    timeline = simulate(schedule, *costs, comm=comm)
    assert timeline.starts == longest_paths(schedule.rows, duration, delay)
    busy = [sum(duration(op) for op in row if op) for row in schedule.rows]
    assert timeline.bubble == timeline.makespan - max(busy)
    for sync in ("neighbour", "global"):
        assert simulate(schedule, *costs, comm=comm, sync=sync).makespan >= timeline.makespan


@examples
@given(tables(forward_only=False), st.data())
def test_peak_bytes_count_what_is_kept_at_one_moment(table, data):
    """At the start of each op: what is between F and B or I, and what is between I and W."""
    schedule = Schedule(*table)
    sizes = st.lists(st.integers(0, 9), min_size=schedule.num_stages, max_size=schedule.num_stages)
    memory, pending = data.draw(sizes), data.draw(sizes)
    timeline = simulate(schedule, memory=memory, pending=pending)
    at = {(op.kind, op.stage, op.micro_batch): time for op, time in timeline.starts.items()}
    until = {(op.kind, op.stage, op.micro_batch): time for op, time in timeline.ends.items()}
    for rank in range(schedule.num_ranks):
        moments = [start for op, start in timeline.starts.items() if schedule.placement[op.stage] == rank]
        held = waiting = 0
        for now in moments:
            total = number = 0
            for kind, stage, m in at:
                if schedule.placement[stage] != rank or at[kind, stage, m] > now:
                    continue
                if kind == "F":
                    total += memory[stage] * (now < until["B" if ("B", stage, m) in at else "I", stage, m])
                if kind == "I":
                    total += pending[stage] * (now < until["W", stage, m])
                    number += now < until["W", stage, m]
            held, waiting = max(held, total), max(waiting, number)
        assert timeline.peak_bytes[rank] == held
        assert timeline.peak_pending[rank] == Fraction(waiting, schedule.num_chunks)
        assert max(amount for _, amount in timeline.held[rank]) == held
        assert timeline.held[rank][-1][1] == 0, "all is given back"


@examples
@given(tables())
def test_memory_of_one_kind_says_the_same_as_peak_live(table):
    schedule = Schedule(*table)
    ones = [1] * schedule.num_stages
    timeline = simulate(schedule, memory=ones)
    assert timeline.peak_bytes == tuple(peak * schedule.num_chunks for peak in timeline.peak_live)
    assert simulate(schedule).peak_bytes is None
    assert simulate(schedule, pending=ones).peak_bytes == tuple(n * schedule.num_chunks for n in timeline.peak_pending)
    plain = simulate(schedule)
    assert [max(amount for _, amount in held) for held in plain.held] == list(plain.peak_live)


@examples
@given(tables(), COST, COST)
def test_global_sync_costs_the_slowest_op_of_each_tick(table, forward, backward):
    schedule = Schedule(*table)
    v = schedule.num_chunks
    cost = {"F": forward / v, "B": 2 * backward / v, "I": backward / v, "W": backward / v}
    ticks = [max((cost[op.kind] for op in column if op), default=0) for column in zip(*schedule.ticks, strict=True)]
    assert simulate(schedule, forward, backward, backward, sync="global").makespan == sum(ticks)


@examples
@given(tables(), COST, COST)
def test_neighbour_sync_waits_for_ranks_that_share_a_data_edge(table, forward, backward):
    schedule = Schedule(*table)
    v, ticks, rank_of = schedule.num_chunks, schedule.ticks, schedule.placement
    cost = {"F": forward / v, "B": 2 * backward / v, "I": backward / v, "W": backward / v}
    _, data = edges(schedule.rows)
    pairs = {(rank_of[op.stage], rank_of[source.stage]) for op, sources in data.items() for source in sources}

    @functools.cache
    def begin(rank, tick):
        partners = {rank} | {b for a, b in pairs if a == rank} | {a for a, b in pairs if b == rank}
        return max(end(other, tick - 1) for other in partners) if tick else 0

    def end(rank, tick):
        op = ticks[rank][tick]
        return begin(rank, tick) + (cost[op.kind] if op else 0)

    # Without latency the waits cover every data edge, so there is nothing else to wait for.
    expected = {op: begin(rank, tick) for rank, row in enumerate(ticks) for tick, op in enumerate(row) if op}
    timeline = simulate(schedule, forward, backward, backward, sync="neighbour")
    assert timeline.starts == expected


@pytest.mark.parametrize(
    ("make", "p", "m", "costs", "none", "barrier"),
    [
        (one_f_one_b, 4, 8, ("1", "1", "1"), "33", "40"),
        (one_f_one_b, 8, 16, ("1", "1", "1"), "69", "84"),
        (one_f_one_b, 4, 8, ("1", "1.1", "0.8"), "31.9", "38.2"),
        (one_f_one_b, 8, 16, ("1", "1.1", "0.8"), "66.7", "80.2"),
        (gpipe, 4, 8, ("1", "1", "1"), "33", "33"),
        (gpipe, 4, 8, ("1", "1.1", "0.8"), "31.9", "31.9"),
        (eager_one_f_one_b, 4, 8, ("1", "1", "1"), "33", "33"),
        (eager_one_f_one_b, 8, 16, ("1", "1.1", "0.8"), "66.7", "66.7"),
    ],
)
def test_price_of_a_global_barrier(make, p, m, costs, none, barrier):
    costs = [Fraction(cost) for cost in costs]
    assert simulate(make(p, m), *costs).makespan == Fraction(none)
    assert simulate(make(p, m), *costs, sync="global").makespan == Fraction(barrier)


def test_neighbour_sync_lies_between():
    """1F1B on four ranks, worked by hand: in tick 4 rank 3 runs the first B, which rank 0 feels two ticks later."""
    first, table = Op("F", 0, 3), one_f_one_b(4, 8)
    starts = {sync: simulate(table, sync=sync).starts[first] for sync in ("none", "neighbour", "global")}
    # Neighbour: tick 4 ends at 5, 5, 5, 6 on ranks 0..3; tick 5 at 5, 6, 8, 7; so rank 0 begins tick 6 at 6.
    # Global: ticks 0..3 last 1 each, ticks 4 and 5 last 2.
    assert starts == {"none": 3, "neighbour": 6, "global": 8}
    # With one neighbour on each side and no idle ranks in between there is nothing left to tell them apart.
    assert simulate(one_f_one_b(2, 3), sync="neighbour").makespan == simulate(one_f_one_b(2, 3), sync="global").makespan


def test_wrap_around_makes_neighbours():
    """Five stages on four ranks in a loop: rank 3 trades with rank 0, which holds stages 0 and 4, so rank 0 waits."""
    first = {"F": (0, 1, 2, 3, 4), "B": (10, 9, 7, 6, 5)}
    second = {"F": (7, 8, 9, 10, 11), "B": (16, 15, 14, 13, 12)}
    tick_of = {
        Op(kind, stage, micro_batch): tick
        for micro_batch, ticks in enumerate((first, second))
        for kind, row in ticks.items()
        for stage, tick in enumerate(row)
    }
    loop = Schedule.from_ticks(tick_of, placement=(0, 1, 2, 3, 0))
    # 4B0 ends at 5/2 + 1, and rank 0 is free; 3B0 on rank 3 takes tick 6 up to 9/2.
    assert simulate(loop).starts[Op("F", 0, 1)] == Fraction(7, 2)
    assert simulate(loop, sync="neighbour").starts[Op("F", 0, 1)] == Fraction(9, 2)


def test_latency_hides_behind_eager_1f1b_but_not_behind_1f1b():
    bound = {"forward": 1, "backward_input": 1, "backward_weight": 1, "comm": 1}
    many = {make: simulate(make(4, 64), **bound) for make in (one_f_one_b, eager_one_f_one_b)}
    few = {make: simulate(make(4, 32), **bound) for make in (one_f_one_b, eager_one_f_one_b)}
    per_micro_batch = {make: Fraction(many[make].makespan - few[make].makespan, 32) for make in many}
    assert per_micro_batch[eager_one_f_one_b] == 3, "F + B, nothing of the latency left"
    assert per_micro_batch[one_f_one_b] > 3


def test_numbers_stay_exact():
    timeline = simulate(one_f_one_b(3, 4), Fraction(1, 3), Fraction(1, 7), 1)
    assert isinstance(timeline.makespan, Fraction)
    assert timeline.makespan == 6 * (Fraction(1, 3) + Fraction(1, 7) + 1)
    assert isinstance(simulate(one_f_one_b(3, 4)).makespan, int)
    assert simulate(one_f_one_b(4, 8)).bubble_fraction == pytest.approx(3 / 11)
    free = simulate(one_f_one_b(2, 2), 0, 0, 0)
    assert free.makespan == 0 and free.bubble_fraction == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forward": -1}, "forward=-1: a cost must be"),
        ({"comm": float("nan")}, "comm=nan"),
        ({"backward_weight": float("inf")}, "backward_weight=inf"),
        ({"forward": [1, 2, 3]}, "forward has 3 entries, but the schedule has 2 stages"),
        ({"memory": [1]}, "memory has 1 entries, but the schedule has 2 stages"),
        ({"memory": 5}, "memory=5: expected one number for each of the 2 stages"),
        ({"pending": [1, -1]}, r"pending\[1\]=-1"),
        ({"comm": {(0, 1): 1}}, r"comm has no time for \(1, 0\)"),
        ({"sync": "barrier"}, "sync='barrier' is not known; use one of 'none', 'neighbour', 'global'"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ScheduleError, match=message):
        simulate(one_f_one_b(2, 2), **arguments)


def test_what_is_no_cost():
    for cost in ("1", None, True, 10**400, 10**5000, 1j):
        with pytest.raises(ScheduleError, match="comm=.*a cost must be a finite number"):
            simulate(gpipe(2, 2), comm=cost)


@pytest.mark.parametrize("value", [None, "1f1b", 5])
def test_what_is_no_schedule(value):
    with pytest.raises(ScheduleError, match="expected a Schedule"):
        simulate(value)


def test_numbers_of_other_libraries():
    table = one_f_one_b(np.int64(2), np.int8(3))
    assert table == one_f_one_b(2, 3) and type(table.num_micro_batches) is int
    assert simulate(table, np.float32(2), np.int64(1), jnp.float32(1), np.int8(0)).makespan == (3 + 1) * 4
