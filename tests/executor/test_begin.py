"""Slots of a stage, as those of its rank."""

import jax
import jax.numpy as jnp

from jaxpipe.executor.begin import AT_ZERO, Begin, begins
from jaxpipe.layout.layout import Address
from jaxpipe.layout.stages import Part, Stage, StatePlace

BLOCK, NORM = Address("stacked", "Block"), Address("stacked", "Norm")


def stage(block, norm, state, inputs=None):
    parts = (Part(None, 0, 2, BLOCK, 1), Part(None, 2, 1, NORM, 0, state=StatePlace(BLOCK, 3, (True,))), Part(None, 3))  # type: ignore[arg-type]
    return Stage(parts, False, False, inputs, None, slots={BLOCK: block, NORM: norm}, state_slots={BLOCK: state})


def test_what_all_stages_of_a_program_agree_about_is_a_number():
    found = Begin.of([stage(0, 5, 1), stage(7, 5, 2), stage(4, 5, 3)], [0, 2])
    assert found.params == {BLOCK: (0, 0, 4), NORM: 5} and found.states == {BLOCK: (1, 0, 3)}
    with jax.ensure_compile_time_eval():
        scan, single, none = found.placed(stage(0, 0, 0).parts, jnp.int32(2))
    assert (int(scan.slot), single.slot, none.slot) == (1 + 4, 0 + 5, 0)
    assert int(single.state.slot) == 3 + 3 and scan.state is None


def test_a_traced_stage_is_looked_up():
    found = Begin.of([stage(0, 0, 0), stage(7, 0, 2)], [0, 1])

    def slots(number):
        first, second, _ = found.placed(stage(0, 0, 0).parts, number)
        assert second.slot == 0 and isinstance(second.slot, int), "a slot that is known makes no code"
        return first.slot, second.state.slot

    assert [tuple(map(int, jax.jit(slots)(jnp.int32(n)))) for n in (0, 1)] == [(1, 3), (8, 5)]


def test_each_program_has_its_own():
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    stages = [stage(0, 0, 0), stage(1, 0, 0, shape), stage(2, 0, 0), stage(9, 0, 0, shape)]
    found = begins(stages)
    assert found[stages[0].program_key()].params[BLOCK] == (0, 0, 2, 0)
    assert found[stages[1].program_key()].params[BLOCK] == (0, 1, 0, 9)
    assert list(AT_ZERO.placed(stages[0].parts, jnp.int32(0))) == list(stages[0].parts)
