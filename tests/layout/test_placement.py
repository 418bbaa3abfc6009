"""Which dims are cut over which axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxpipe.layout.placement import Placement, fit


def test_specs_end_with_the_last_cut_dim():
    assert Placement().spec == P()
    assert Placement((("pipe", 0),)).spec == P("pipe")
    assert Placement((("pipe", 2),)).spec == P(None, None, "pipe")
    assert Placement((("data", 2), ("pipe", 0))).spec == P("pipe", None, "data")


def test_dims_by_axis():
    placement = Placement((("data", 2), ("pipe", 0)))
    assert (placement.dim("pipe"), placement.dim("data"), placement.dim("model")) == (0, 2, None)
    assert Placement().dim("pipe") is None


def test_several_axes_may_cut_one_dim():
    """Those that the loop handles come first, in the order of the mesh."""
    placement = Placement((("model", 0), ("data", 0), ("pipe", 0), ("expert", 1)))
    assert placement.spec == P(("pipe", "data", "model"), "expert")
    assert placement.manual_spec == P(("pipe", "data"))
    assert Placement((("model", 1),)).manual_spec == P()
    assert placement.axes(0) == ("pipe", "data", "model")


def test_more_dims_in_front():
    placement = Placement((("data", 1),), ((1, 8),)).behind(2, ("pipe", 0))
    assert placement == Placement((("pipe", 0), ("data", 3)), ((3, 8),))
    assert placement.stored((4, 1, 5, 7)) == (4, 1, 5, 8)


@pytest.mark.parametrize(
    ("shape", "count", "before", "cut", "stored"),
    [
        ((4, 6), 2, (), 1, (4, 6)),  # the largest that divides
        ((4, 7), 2, (), 0, (4, 7)),  # rather a smaller one that divides
        ((5, 7), 2, (), 1, (5, 8)),  # 4 / 7 of it is less than 3 / 5
        ((5, 7), 4, (), 1, (5, 8)),
        ((9, 7), 8, (), 1, (9, 8)),
        ((3,), 2, (), 0, (4,)),
        ((3,), 8, (), 0, (8,)),  # some ranks have padding only
        ((), 2, (), None, ()),
        ((1, 1), 2, (), None, (1, 1)),
        ((0, 4), 2, (), 1, (0, 4)),
        ((8, 4), 2, (("pipe", 0),), 1, (8, 4)),  # rather a dim that is not cut yet
        ((8, 5), 2, (("pipe", 0),), 0, (8, 5)),
        ((6, 5), 2, (("pipe", 0),), 1, (6, 6)),  # 3 / 5 is less than 2 / 3
        ((6, 1), 2, (("pipe", 0),), 0, (8, 1)),
        ((6, 4), 1, (), None, (6, 4)),
    ],
)
def test_any_array_is_cut_where_that_leaves_the_least(shape, count, before, cut, stored):
    placement = Placement(before).cut_any(shape, "data", {"pipe": 2, "data": count})
    assert (placement.dim("data"), placement.stored(shape)) == (cut, stored)
    pieces = [placement.stored(shape)[dim] / {"pipe": 2, "data": count}[axis] for axis, dim in placement.cuts]
    assert all(piece == int(piece) for piece in pieces)


def test_even_cuts_need_no_padding():
    sizes = {"pipe": 3, "model": 2}
    assert Placement().cut_even((5, 12, 24), "pipe", sizes) == Placement((("pipe", 2),))
    assert Placement().cut_even((5, 7), "pipe", sizes) == Placement()
    assert Placement((("model", 1),)).cut_even((6, 12), "pipe", sizes).dim("pipe") == 0
    assert Placement((("model", 0),)).cut_even((6, 2), "pipe", sizes).dim("pipe") == 0
    assert Placement((("model", 0),)).cut_even((3, 2), "pipe", sizes).dim("pipe") is None


def test_fit_cuts_off_and_fills_up():
    array = np.arange(1, 7).reshape(2, 3)
    assert fit(array, (2, 3)) is array
    for kind in (np.asarray, jnp.asarray):
        found = fit(kind(array), (3, 2))
        assert type(found) is type(kind(array)) and found.tolist() == [[1, 2], [4, 5], [0, 0]]
    assert fit(jax.ShapeDtypeStruct((2, 3), jnp.int8), (4, 4)) == jax.ShapeDtypeStruct((4, 4), jnp.int8)
