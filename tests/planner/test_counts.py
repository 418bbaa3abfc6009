"""Operations and bytes of traced functions, against numbers that are found by hand."""

import jax
import jax.numpy as jnp
import pytest

from jaxpipe.planner.counts import count


def _total(function, *shapes, wanted=None):
    jaxpr = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    terms, _ = count(jaxpr, wanted=wanted)
    return sum(term.flops for term in terms), sum(term.bytes for term in terms)


def test_a_product_reads_its_operands_and_writes_its_result():
    assert _total(lambda x, w: x @ w, (2, 3), (3, 5)) == (2 * 2 * 3 * 5, 4 * (6 + 15 + 10))


def test_what_is_elementwise_is_fused():
    assert _total(lambda x, w: jnp.tanh(x * 2.0) @ w, (2, 3), (3, 5)) == _total(lambda x, w: x @ w, (2, 3), (3, 5))


def test_a_reduction_reads():
    assert _total(lambda x: x.sum(), (4, 5)) == (0, 4 * 20)


def test_loops_count_as_often_as_they_run_and_conditionals_as_their_dearest_branch():
    one = _total(lambda x, w: x @ w, (2, 3), (3, 3))
    looped = _total(lambda x, w: jax.lax.fori_loop(0, 7, lambda i, x: x @ w, x), (2, 3), (3, 3))
    assert looped == (7 * one[0], 7 * one[1])
    chosen = _total(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x), (2, 3), (3, 3))
    assert chosen[0] == one[0]


@pytest.mark.parametrize(("wanted", "products"), [([True, False], 1), ([False, True], 1), ([True, True], 2)])
def test_only_what_is_wanted_counts(wanted, products):
    flops, _ = _total(lambda x, w: (x @ w, w @ x), (3, 3), (3, 3), wanted=wanted)
    assert flops == products * 2 * 27
