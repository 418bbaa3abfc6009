"""Which values an axis cuts, against what is known of layers that are cut by columns and by rows."""

import jax
import jax.numpy as jnp

from jaxpipe.planner.counts import count
from jaxpipe.planner.cuts import WHOLE, is_cut, through


def _walk(function, cuts, *shapes):
    """The cuts of the results, and the bytes that are summed over an axis of four devices."""
    jaxpr = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    terms, results = count(jaxpr, cuts, 4)
    return results, sum(term.summed for term in terms)


def test_columns_then_rows_are_summed_once():
    x, up, down = (2, 8), (8, 16), (16, 8)

    def layer(x, up, down):
        return jnp.tanh(x @ up) @ down

    assert _walk(layer, [WHOLE, frozenset({1}), frozenset({0})], x, up, down) == ([WHOLE], 2 * 8 * 4)
    [cut], summed = _walk(layer, [WHOLE, frozenset({1}), WHOLE], x, up, down)
    assert not is_cut(cut) and summed == 2 * 8 * 4  # the first product cuts what the second one contracts


def test_heads_are_cut_through_reshapes_and_loops():
    def heads(x, kernel, out):
        y = (x @ kernel).reshape(2, 4, 2)
        y, _ = jax.lax.scan(lambda y, _: (y * 2.0, None), y, length=3)
        return y.transpose(0, 2, 1).reshape(2, 8) @ out

    results, summed = _walk(heads, [WHOLE, frozenset({1}), frozenset({0})], (2, 8), (8, 8), (8, 8))
    assert results == [WHOLE] and summed == 2 * 8 * 4


def test_dims_are_followed_where_they_are_known():
    def one(function, cut, *shape):
        [equation] = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, jnp.float32)).jaxpr.eqns
        return through(equation, [cut])[0]

    assert one(lambda x: x.transpose(2, 0, 1), frozenset({1}), 2, 3, 4) == [frozenset({2})]
    assert one(lambda x: x.sum(0), frozenset({1}), 2, 3) == [frozenset({0})]
    assert one(lambda x: x.sum(1), frozenset({1}), 2, 3) == [WHOLE]
    assert one(lambda x: -x, frozenset({1}), 2, 3) == [frozenset({1})]
    assert one(lambda x: x.reshape(6), frozenset({0}), 2, 3) == [frozenset({0})]
    assert one(lambda x: x.reshape(6), frozenset({1}), 2, 3) == [None]
    assert one(lambda x: x.reshape(2, 4, 3), frozenset({1}), 2, 12) == [frozenset({1})]
    assert one(lambda x: x[:1], frozenset({1}), 2, 3) == [frozenset({1})]
    assert one(lambda x: x[:1], frozenset({0}), 2, 3) == [None]
    assert one(lambda x: x.reshape(6), WHOLE, 2, 3) == [WHOLE]


def test_a_table_that_is_cut_by_rows_is_looked_up_everywhere_and_summed():
    def look(table, ids):
        return table[ids]

    jaxpr = jax.make_jaxpr(look)(jnp.zeros((8, 4)), jnp.zeros(3, jnp.int32))
    terms, [cut] = count(jaxpr, [frozenset({0}), WHOLE], 2)
    assert cut == WHOLE and sum(term.summed for term in terms) == 3 * 4 * 4
