"""Values of layers on all ranks: the right ones, small ones together."""

import jax
import numpy as np
from jax.sharding import PartitionSpec

import jaxpipe
from jaxpipe.optimizer.collect import everywhere

P = PartitionSpec
# Of each of two ranks: small floats of two shapes, a small integer, and an array that is not small.
ARRAYS = [
    np.arange(4.0, dtype=np.float32).reshape(2, 2),
    np.arange(20.0, dtype=np.float32).reshape(2, 2, 5),
    np.arange(2, dtype=np.int32).reshape(2, 1),
    np.arange(400.0, dtype=np.float32).reshape(2, 2, 100),
]


def gather(mesh):
    def on_rank(arrays):
        return everywhere([a[0] for a in arrays], mesh)

    return jax.shard_map(on_rank, mesh=mesh, in_specs=P("pipe"), out_specs=P(), check_vma=False)


def test_every_rank_has_all_rows():
    for found, wanted in zip(jax.jit(gather(jaxpipe.make_mesh(pipe=2)))(ARRAYS), ARRAYS, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_small_ones_of_a_dtype_travel_together():
    assert str(jax.make_jaxpr(gather(jaxpipe.make_mesh(pipe=2)))(ARRAYS)).count("all_gather[") == 3


def test_one_rank_has_all():
    arrays = [a[:1] for a in ARRAYS]
    traced = jax.make_jaxpr(gather(jaxpipe.make_mesh(pipe=1)))(arrays)
    assert "all_gather" not in str(traced)
    assert [v.aval.shape for v in traced.jaxpr.outvars] == [a.shape for a in arrays]
