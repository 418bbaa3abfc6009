"""Which dims are cut over which axes."""

from jax.sharding import PartitionSpec as P

from jaxpipe.model.placement import Placement


def test_specs_end_with_the_last_cut_dim():
    assert Placement().spec == P()
    assert Placement((("pipe", 0),)).spec == P("pipe")
    assert Placement((("pipe", 2),)).spec == P(None, None, "pipe")
    assert Placement((("data", 2), ("pipe", 0))).spec == P("pipe", None, "data")


def test_dims_by_axis():
    placement = Placement((("data", 2), ("pipe", 0)))
    assert (placement.dim("pipe"), placement.dim("data"), placement.dim("model")) == (0, 2, None)
    assert Placement().dim("pipe") is None
