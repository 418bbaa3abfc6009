"""What one rank computes: the rows of its layers, whatever lies in the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxpipe.optimizer.rows import Rows
from jaxpipe.optimizer.trace import Trace, Value
from tests.optimizer.layouts import layout, mesh

P = PartitionSpec
(STACK,) = layout().stacks.values()  # rank 0: layer 2 in slot 0; rank 1: layers 3, 4, 5
AVAL = jax.ShapeDtypeStruct((2,), jnp.float32)
GARBAGE = 1e9


def stored(values):
    """[S, slots, 2]: the number of each layer, and garbage in the padding."""
    made = np.full((2, STACK.slots, 2), GARBAGE, np.float32)
    for layer, place in STACK.places.items():
        made[place] = values[layer]
    return made


def on_ranks(body, batches, loose=None):
    """`body(rows)` on every rank; its results by rank."""
    loose = loose or {}
    slots = {key: list(range(STACK.slots)) for key in batches}

    def one(rank, arrays, values):
        mine = {key: a[0] for key, a in arrays.items()}
        known = dict(zip(loose, values, strict=True))
        return body(Rows(rank[0], 2, {STACK.name: STACK}, mine, dict(slots), known))[None]

    mapped = jax.shard_map(one, mesh=mesh(), in_specs=(P("pipe"), P("pipe"), P()), out_specs=P("pipe"), check_vma=False)
    return np.asarray(mapped(jnp.arange(2), batches, list(loose.values())))


def home(layer, batch="x"):
    return Value(AVAL, (STACK.name, layer), held_in=batch)


def rows_of(values):
    return {STACK.places[layer]: value for layer, value in values.items()}


LAYERS = {layer: float(layer) for layer in STACK.places}


def test_a_row_as_it_is_stored_has_zeros_elsewhere():
    found = on_ranks(lambda rows: rows.stored(STACK, rows_of({n: home(n) for n in LAYERS})), {"x": stored(LAYERS)})
    np.testing.assert_array_equal(found, np.where(stored(LAYERS) == GARBAGE, 0, stored(LAYERS)))
    some = on_ranks(lambda rows: rows.stored(STACK, rows_of({n: home(n) for n in (2, 4)})), {"x": stored(LAYERS)})
    assert (some[STACK.places[4]] == 4).all() and (some[STACK.places[3]] == 0).all()


def test_operands_from_several_places():
    """Layer 2 and 3 read one array, layer 4 another, layer 5 a number that all know."""
    known, constant = Value(AVAL), Value(AVAL, constant=np.full(2, 7, np.float32))
    values = {2: home(2), 3: home(3, "y"), 4: known, 5: constant}
    batches = {"x": stored(LAYERS), "y": stored({layer: 10 * layer for layer in LAYERS})}
    found = on_ranks(lambda rows: rows.stored(STACK, rows_of(values)), batches, {known: jnp.full(2, 5.0)})
    wanted = {2: 2, 3: 30, 4: 5, 5: 7}
    np.testing.assert_array_equal([found[STACK.places[n]][0] for n in LAYERS], [wanted[n] for n in LAYERS])


def test_one_value_for_all_has_no_rows():
    known = Value(AVAL)

    def body(rows):
        array, by_row = rows.fetch({place: known for place in STACK.places.values()}, [0, 1, 2])
        assert not by_row
        return array

    assert (on_ranks(body, {}, {known: jnp.full(2, 5.0)}) == 5).all()


def group_of(function, layers, avals=(AVAL,)):
    """The like equations that a function makes of each layer, which all read the batch "x"."""
    groups = []
    for layer in layers:
        closed = jax.make_jaxpr(function)(*avals)
        trace = Trace(closed, [(STACK.name, layer)], ["x"], [(STACK.name, layer)])
        for number, equation in enumerate(trace.equations):
            groups.append([]) if number == len(groups) else None
            for place, v in enumerate(equation.outputs):
                v.held_in = "made", number, place
            groups[number].append(equation)
    return groups


@pytest.mark.parametrize("layers", [(2, 3, 4, 5), (3, 5), (4,)])
def test_like_equations_of_some_layers(layers):
    groups = group_of(lambda x: jnp.sin(x) * 2, layers)

    def body(rows):
        for group in groups:
            rows.compute(group)
        assert rows.slots[groups[-1][0].outputs[0].held_in] == sorted({STACK.places[n][1] for n in layers})
        return rows.stored(STACK, rows_of({e.home[1]: e.outputs[0] for e in groups[-1]}))

    found = on_ranks(body, {"x": stored(LAYERS)})
    for layer, place in STACK.places.items():
        np.testing.assert_allclose(found[place], 2 * np.sin(layer) if layer in layers else 0, rtol=1e-6)


def test_a_loop_does_not_run_on_padding():
    """On what lies in the padding it would never end."""
    groups = group_of(lambda x: jax.lax.while_loop(lambda x: x[0] < 10, lambda x: x + 1, x), (2, 3, 4, 5))
    bad = np.where(stored(LAYERS) == GARBAGE, -np.inf, stored(LAYERS)).astype(np.float32)

    def body(rows):
        for group in groups:
            rows.compute(group)
        return rows.stored(STACK, rows_of({e.home[1]: e.outputs[0] for e in groups[-1]}))

    found = on_ranks(body, {"x": bad})
    assert all((found[place] == 10).all() for place in STACK.places.values())
