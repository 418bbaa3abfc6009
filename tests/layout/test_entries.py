"""What a slot of a stack holds, and how the whole stack is cut."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxpipe.layout.entries import Shared, Stack, in_stack
from jaxpipe.layout.placement import Placement

PARAMS = {"w": jax.ShapeDtypeStruct((7, 5), jnp.float32), "n": jax.ShapeDtypeStruct((), jnp.int32)}
PLACEMENTS = {"w": Placement((("data", 0),), ((0, 8),)), "n": Placement()}


def test_what_is_stored_is_longer_where_it_is_padded():
    wanted = {"w": jax.ShapeDtypeStruct((8, 5), jnp.float32), "n": PARAMS["n"]}
    assert Stack("block", 3, {}, PARAMS, PLACEMENTS).stored == wanted
    assert Shared("0_Block", 0, PARAMS, PLACEMENTS).stored == wanted


def test_stacks_are_cut_over_the_ranks_besides():
    placement = in_stack(PLACEMENTS["w"])
    assert placement.spec == P("pipe", None, "data") and placement.stored((2, 3, 7, 5)) == (2, 3, 8, 5)
    assert in_stack(Placement()).spec == P("pipe")
