"""Places of what is kept: they never overlap within a stage program, and programs share the buffers."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpipe.executor import store
from jaxpipe.executor.store import Store

F32, I32 = (jax.ShapeDtypeStruct((2,), dtype) for dtype in (jnp.float32, jnp.int32))
WIDE = jax.ShapeDtypeStruct((2, 3), jnp.float32)
KEY = jax.eval_shape(lambda: jax.random.key(0))
KINDS = [F32, I32, WIDE, KEY]
segments = st.lists(st.tuples(st.lists(st.sampled_from(range(4)), max_size=4), st.integers(1, 4)), max_size=4)


def settled(programs, slots, together=()):
    """A store of some programs, each a list of (kinds of values, repeats), and the entries of each."""
    plan, entries = Store(), []
    for program in programs:
        kept = plan.program()
        entries.append([(kept.take([KINDS[kind] for kind in kinds], repeats), repeats) for kinds, repeats in program])
    plan.settle(slots, together)
    return plan, entries


@settings(max_examples=60)
@given(st.lists(st.tuples(segments, st.integers(1, 3)), min_size=1, max_size=3))
def test_values_of_a_program_never_overlap_and_fit_the_buffers(programs):
    slots = [count for _, count in programs]
    plan, entries = settled([program for program, _ in programs], slots)
    found = plan.avals()
    for segments, count in zip(entries, slots, strict=True):
        used = []
        for slot in range(count):
            for taken, repeats in segments:
                for entry in taken:
                    for repeat in range(repeats):
                        at, length = entry.program.place(entry, slot, repeat)
                        assert at + length <= found[entry.buffer].shape[0]
                        used += [(entry.buffer, at + i) for i in range(length)]
        assert len(set(used)) == len(used)
    # No more than the program of most needs, of each dtype, but for what rooms may take.
    for dtype in {aval.dtype for aval in found.values()}:
        most = 0
        for segments, count in zip(entries, slots, strict=True):
            kinds = [plan.kinds[entry.kind] for taken, repeats in segments for entry in taken for _ in range(repeats)]
            most = max(most, count * sum(math.prod(aval.shape) for aval in kinds if aval.dtype == dtype))
        assert sum(math.prod(aval.shape) for aval in found.values() if aval.dtype == dtype) <= 1.01 * most


@settings(max_examples=60)
@given(st.lists(segments, min_size=2, max_size=4), st.integers(1, 3), st.booleans())
def test_programs_of_one_rank_number_their_slots_together(programs, count, all_together):
    """Whichever of them has a slot, it meets nothing that another one has in another slot."""
    together = [range(len(programs))] if all_together else [{0, 1}, {1, len(programs) - 1}]
    plan, entries = settled(programs, [count] * len(programs), together)
    group = range(len(programs)) if all_together else sorted({0, 1, len(programs) - 1})
    found = plan.avals()
    owners = {}
    for number in group:
        for slot in range(count):
            for taken, repeats in entries[number]:
                for entry, repeat in itertools.product(taken, range(repeats)):
                    at, length = entry.program.place(entry, slot, repeat)
                    assert at + length <= found[entry.buffer].shape[0]
                    for i in range(length):
                        assert owners.setdefault((entry.buffer, at + i), slot) == slot


def test_values_that_are_kept_apart_share_no_buffer():
    plan = Store()
    kept, other = plan.program(), plan.program()
    first, second = (kept.take([F32, F32, I32], 2, apart=True) for _ in range(2))
    other.take([WIDE], 9, apart=True)
    plan.settle([5, 1])
    assert len({entry.buffer for entry in first}) == 3, "within one op"
    assert [a.buffer for a in first] == [b.buffer for b in second] and [b.start for b in second] == [2, 2, 2]
    assert {plan.avals()[entry.buffer].shape[0] for entry in first} == {5 * 4}


@pytest.mark.parametrize("alike", [True, False])
def test_what_was_written_is_read(alike):
    plan = Store()
    avals = [F32, KEY, WIDE, I32]
    kept = plan.program()
    first, second = kept.take(avals, 3), kept.take([F32], 1)
    if not alike:  # another stage keeps no such thing
        plan.program().take([jax.ShapeDtypeStruct((7,), jnp.float32), jax.ShapeDtypeStruct((99,), jnp.int32)], 9)
    plan.settle([2] if alike else [2, 1])
    assert (first[0].buffer == "float32[2]") == alike
    buffers = plan.allocate(poison=True)
    key = jax.random.key(3)

    def values(slot, repeat):
        number = 10.0 * slot + repeat
        return [
            jnp.full(2, number),
            jax.random.fold_in(key, slot * 3 + repeat),
            jnp.full((2, 3), -number),
            jnp.full(2, slot * 3 + repeat),
        ]

    for slot in range(2):
        for repeat in range(3):
            buffers = store.write(buffers, jnp.int32(slot), first, repeat, values(slot, repeat))
        buffers = store.write(buffers, jnp.int32(slot), second, 0, [jnp.full(2, 77.0 + slot)])
    for slot in range(2):
        for repeat in range(3):
            for found, wanted in zip(
                store.read(buffers, jnp.int32(slot), first, repeat, avals), values(slot, repeat), strict=True
            ):
                assert found.dtype == wanted.dtype and (found == wanted).all()
        assert (store.read(buffers, jnp.int32(slot), second, 0, [F32])[0] == 77.0 + slot).all()
    spoiled = kept.spoil(buffers, jnp.int32(0))
    for slot in range(2):
        for repeat in range(3):
            found = store.read(spoiled, jnp.int32(slot), first, repeat, avals)
            assert np.isnan(found[0]).all() == np.isnan(found[2]).all() == (slot == 0)


def test_writing_leaves_the_callers_buffers_as_they_are():
    plan = Store()
    entries = plan.program().take([F32], 1)
    plan.settle([1])
    buffers = plan.allocate(poison=False)
    store.write(buffers, jnp.int32(0), entries, 0, [jnp.ones(2)])
    assert (buffers[entries[0].buffer] == 0).all()


def test_poison_is_for_numbers_that_can_show_it():
    assert np.isnan(store.blank((2,), jnp.bfloat16, True).astype(jnp.float32)).all()
    assert (np.asarray(store.blank((2,), jnp.uint32, True)) == 2**32 - 1).all(), "NaN, if they are the words of floats"
    assert (store.blank((2,), jnp.int32, True) == 0).all() and (store.blank((2,), jnp.float32, False) == 0).all()


def test_values_in_the_order_of_their_dims():
    """On any platform the values are the same; the compiler is told about arrays that have an order at all."""
    plan = Store()
    entries = plan.program().take([WIDE, F32], 2, in_order=True)
    plan.settle([2])
    wide, flat = jnp.arange(6.0).reshape(2, 3), jnp.arange(2.0)

    def there_and_back(wide, flat):
        buffers = store.write(plan.allocate(poison=True), jnp.int32(1), entries, 1, [wide, flat])
        return store.read(buffers, jnp.int32(1), entries, 1, [WIDE, F32])

    found = jax.jit(there_and_back)(wide, flat)
    np.testing.assert_array_equal(found[0], wide)
    np.testing.assert_array_equal(found[1], flat)
    assert str(jax.make_jaxpr(there_and_back)(wide, flat)).count("layout_constraint") == 2
