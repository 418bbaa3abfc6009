"""The loop on programs whose ops only add integers, against a plain replay of the schedule."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe import schedules
from jaxpipe.executor import loop
from jaxpipe.executor.branch import Branch
from jaxpipe.executor.mail import Mail
from jaxpipe.lowering.channels import DX, Y, clock
from jaxpipe.lowering.lower import lower
from jaxpipe.lowering.program import SAVED
from tests.lowering.programs import in_random_order, loop_of, v_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Carry:
    """`log` depends on every value and on the order of the ops; `kept` is what F keeps for B; nothing changes `fixed`."""

    log: jax.Array
    kept: jax.Array
    fixed: jax.Array


WIRE = [jax.ShapeDtypeStruct((2,), jnp.int32)]
SPOILED = -(10**6)


def run(program, program_ids, pause=None):
    """The logs of all ranks."""
    log, fixed = jax.jit(mapped(program, program_ids, pause))(jnp.arange(program.num_ranks, dtype=jnp.int32))
    assert (fixed == 0).all(), "a branch changes only what it says"
    return log


def mapped(program, program_ids, pause=None):
    """The function of all ranks' numbers that gives their logs, and what nothing changes."""
    last = program.schedule.num_stages - 1
    mail = Mail(program, {Y: WIRE, DX: WIRE})
    slots = program.pools.get(SAVED, 1)

    def branch_of(kind, number):
        def forward(carry, inbox, now):
            x = jnp.stack([now.micro_batch + 7, now.micro_batch * 3])
            if number != 0:
                x = mail.read(inbox, Y, now)[0]
            slot = now.slots.get(SAVED, 0)
            y = x * (number + 2) + now.stage
            carry = replace(carry, log=carry.log * 31 + y, kept=carry.kept.at[slot].set(x), fixed=carry.fixed + 1)
            return carry, {} if number == program_ids[last] else {Y: [y]}

        def backward(carry, inbox, now):
            kept = carry.kept[now.slots[SAVED]]
            gradient = kept + 5 if number == program_ids[last] else mail.read(inbox, DX, now)[0]
            dx = gradient * 2 + kept * (number + 1)
            carry = replace(carry, log=carry.log * 37 + dx, kept=carry.kept.at[now.slots[SAVED]].set(SPOILED))
            return carry, {DX: [dx]} if number != 0 else {}

        before, behind = number != 0, number != program_ids[last]
        if kind == "F":
            return Branch(forward, ("log", "kept"), (Y,) * before, (Y,) * behind)
        return Branch(backward, ("log", "kept"), (DX,) * behind, (DX,) * before)

    def one_rank(rank):
        carry = Carry(jnp.zeros(2, jnp.int32), jnp.full((slots, 2), SPOILED, jnp.int32), jnp.zeros((), jnp.int32))
        carry = loop.run(mail, rank[0], branch_of, program_ids, carry, pause)
        return carry.log[None], carry.fixed[None]

    mesh = jaxpipe.make_mesh(pipe=program.num_ranks)
    return jax.shard_map(one_rank, mesh=mesh, in_specs=P("pipe"), out_specs=P("pipe"), check_vma=False)


def replay(schedule, program_ids, pause=None):
    """Op by op in the order of the clock; values by name, so that no slot, inbox or permute is involved."""
    stages, rank_of = schedule.num_stages, schedule.placement
    log = np.zeros((schedule.num_ranks, 2), np.int32)
    made = {}
    ticks = clock(schedule)
    total = 1 + max(ticks.values())
    with np.errstate(over="ignore"):
        for tick in range(total):
            for (kind, stage, m), when in ticks.items():
                if when != tick:
                    continue
                number = np.int32(program_ids[stage])
                x = np.asarray([m + 7, m * 3], np.int32) if stage == 0 else made["F", stage - 1, m]
                if kind == "F":
                    made[kind, stage, m] = x * (number + 2) + np.int32(stage)
                    log[rank_of[stage]] = log[rank_of[stage]] * 31 + made[kind, stage, m]
                else:
                    gradient = x + 5 if stage == stages - 1 else made["B", stage + 1, m]
                    made[kind, stage, m] = gradient * 2 + x * (number + 1)
                    log[rank_of[stage]] = log[rank_of[stage]] * 37 + made[kind, stage, m]
            if pause is not None:
                done = tick + 1
                first, every = pause
                if done == total or (done > first and (done - first) % every == 0):
                    turn = max(0, -(-(done - first) // every) - 1)
                    log = log * 41 + turn
    return log


CASES = [("1f1b", 1, 3), ("1f1b", 4, 6), ("1f1b", 4, 1), ("eager_1f1b", 3, 5), ("gpipe", 3, 2), ("gpipe", 1, 1)]


@pytest.mark.parametrize(("name", "stages", "micro_batches"), CASES, ids=["-".join(map(str, c)) for c in CASES])
def test_a_program_does_what_its_schedule_says(name, stages, micro_batches):
    """The ranks between run one stage program, so the branches of a phase are fewer than the ranks."""
    schedule = schedules.get(name, stages, micro_batches)
    program_ids = [0, *[1] * (stages - 2), 2] if stages > 1 else [0]
    found = run(lower(schedule), program_ids)
    np.testing.assert_array_equal(found, replay(schedule, program_ids))


PLACED = [loop_of(2, 3), v_of(3), loop_of(1, 3), (2, 0, 1, 1, 0, 2, 0), (3, 1, 0, 2, 1, 3)]


@pytest.mark.parametrize("placement", PLACED, ids=["-".join(map(str, each)) for each in PLACED])
def test_stages_may_lie_anywhere(placement):
    """Messages come over several channels into one inbox, or stay where they are; ops are in a random order."""
    schedule = in_random_order(placement, 3, seed=len(placement))
    program_ids = [0, *(1 + stage % 2 for stage in range(len(placement) - 2)), 3]
    np.testing.assert_array_equal(run(lower(schedule), program_ids), replay(schedule, program_ids))


@pytest.mark.parametrize(
    ("stages", "micro_batches", "first", "every"), [(3, 5, 2, 3), (3, 1, 2, 3), (1, 4, 0, 1), (2, 4, 1, 2)]
)
def test_pauses(stages, micro_batches, first, every):
    """After `first` + `every` ticks, then after every `every`, and after the last one."""
    schedule = schedules.forward_only(stages, micro_batches)
    program_ids = list(range(stages))

    def pause(turn, carry):
        return replace(carry, log=carry.log * 41 + turn)

    found = run(lower(schedule), program_ids, loop.Pause(first, every, pause))
    np.testing.assert_array_equal(found, replay(schedule, program_ids, (first, every)))


def test_an_arrival_waits_for_the_ops_beside_its_permute():
    """In eager 1F1B ops run beside every permute. Only a dependency says so to a compiler that orders by these alone."""
    program = lower(schedules.eager_one_f_one_b(4, 8))
    jaxpr = jax.make_jaxpr(mapped(program, [0, 1, 1, 2]))(jnp.arange(4, dtype=jnp.int32))
    (sharded,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "shard_map"]
    (ticks,) = [eqn for eqn in sharded.params["jaxpr"].eqns if eqn.primitive.name == "while"]
    body = ticks.params["body_jaxpr"].jaxpr.eqns
    made = {id(var): eqn for eqn in body for var in eqn.outvars}

    def ops_before(eqn):
        """The branches that an equation waits for."""
        found = {id(eqn)} if eqn.primitive.name == "while" else set()
        return found.union(*(ops_before(made[id(var)]) for var in eqn.invars if id(var) in made))

    permutes = [eqn for eqn in body if eqn.primitive.name == "ppermute"]
    assert len(permutes) == 2
    for permute in permutes:
        arrivals = [eqn for eqn in body if any(var is permute.outvars[0] for var in eqn.invars)]
        assert arrivals, "what has arrived goes into the next iteration as it is"
        assert all(ops_before(arrival) > ops_before(permute) for arrival in arrivals)
