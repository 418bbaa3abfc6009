"""Gathers and scatters along one axis: their values, and that nothing is made whole along the other axes for them."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

import jaxpipe
from jaxpipe.executor import along
from jaxpipe.layout.placement import Placement
from jaxpipe.mesh import manual_axes

MESH = jaxpipe.make_mesh(pipe=2, data=2, model=2)
X = np.arange(8 * 12, dtype=np.float32).reshape(8, 12)

CASES = {  # and the shape of the part of a device while they are gathered
    "apart": (Placement((("pipe", 0), ("model", 1))), (8, 6)),
    "not cut": (Placement((("pipe", 0),)), (8, 12)),
    "same dim": (Placement((("pipe", 0), ("model", 0))), (8, 12)),
}


def compiled(function, placement, out):
    mapped = jax.shard_map(
        function,
        mesh=MESH,
        in_specs=placement.manual_spec,
        out_specs=out.manual_spec,
        axis_names=manual_axes(MESH),
        check_vma=False,
    )
    placed = jax.device_put(X, NamedSharding(MESH, placement.spec))
    made = jax.jit(mapped, out_shardings=NamedSharding(MESH, out.spec)).lower(placed).compile()
    return np.asarray(made(placed)), made.as_text()


@pytest.mark.parametrize("name", CASES)
def test_values(name):
    """What was gathered is the array; a sum over ranks that hold the same is so many times the array."""
    placement, part = CASES[name]
    whole = Placement(tuple(cut for cut in placement.cuts if cut[0] != "pipe"))
    found, text = compiled(lambda a: along.gathered(a, "pipe", placement), placement, whole)
    np.testing.assert_array_equal(found, X)
    shape = ",".join(map(str, part))
    gathers = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", text)
    assert shape in gathers and (name == "same dim" or gathers == [shape])
    found, text = compiled(lambda a: along.scattered(a, "pipe", placement), whole, placement)
    np.testing.assert_array_equal(found, 2 * X)
    assert name == "same dim" or "all-gather" not in text
