"""Places of what is kept: they never overlap within a stage program, and programs share the buffers."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxpipe.executor import store
from jaxpipe.executor.store import Store

F32, I32 = (jax.ShapeDtypeStruct((2,), dtype) for dtype in (jnp.float32, jnp.int32))
WIDE = jax.ShapeDtypeStruct((2, 3), jnp.float32)
KEY = jax.eval_shape(lambda: jax.random.key(0))
KINDS = [F32, I32, WIDE, KEY]
segments = st.lists(st.tuples(st.lists(st.sampled_from(range(4)), max_size=4), st.integers(1, 4)), max_size=4)


def places(entries, repeats):
    return [(entry.buffer, entry.start + i * entry.stride) for entry in entries for i in range(repeats)]


@given(st.lists(segments, min_size=1, max_size=3))
def test_entries_of_a_program_never_overlap_and_fill_the_buffers(programs):
    plan = Store()
    most = {}
    for program in programs:
        cursor, used = plan.cursor(), []
        for kinds, repeats in program:
            used += places(cursor.take([KINDS[kind] for kind in kinds], repeats), repeats)
        assert len(set(used)) == len(used)
        for name in {name for name, _ in used}:
            ours = sorted(index for other, index in used if other == name)
            assert ours == list(range(len(ours))), "no entry is left out"
            most[name] = max(most.get(name, 0), len(ours))
    found = plan.avals(5)
    assert {name: aval.shape[:2] for name, aval in found.items()} == {name: (5, n) for name, n in most.items()}


def test_what_was_written_is_read():
    plan = Store()
    cursor = plan.cursor()
    avals = [F32, KEY, F32, I32]
    first, second = cursor.take(avals, 3), cursor.take([F32], 1)
    buffers = plan.allocate(2, poison=True)
    key = jax.random.key(3)

    def values(slot, repeat):
        number = 10.0 * slot + repeat
        return [
            jnp.full(2, number),
            jax.random.fold_in(key, slot * 3 + repeat),
            jnp.full(2, -number),
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
    assert not any(np.isnan(np.asarray(buffer)).any() for buffer in buffers.values()), "all entries were written"


def test_writing_leaves_the_callers_buffers_as_they_are():
    plan = Store()
    entries = plan.cursor().take([F32], 1)
    buffers = plan.allocate(1, poison=False)
    store.write(buffers, jnp.int32(0), entries, 0, [jnp.ones(2)])
    assert (buffers[entries[0].buffer] == 0).all()


def test_poison_is_for_numbers_that_can_show_it():
    assert np.isnan(store.blank((2,), jnp.bfloat16, True).astype(jnp.float32)).all()
    assert (store.blank((2,), jnp.int32, True) == 0).all() and (store.blank((2,), jnp.float32, False) == 0).all()
