"""Some arrays of layers replaced, in stacks and alone; all others stay the arrays that they were."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxpipe
from jaxpipe.layout.replace import replaced
from tests.compare import assert_close


def dense(key, x):
    return {"b": jnp.ones(x.shape[-1]), "w": jax.random.normal(key, (x.shape[-1], 4))}


def test_replaced():
    layer = jaxpipe.Layer(dense, lambda params, x: x @ params["w"])
    module = jaxpipe.PipelineModule([layer] * 4, partition_method=[0, 1, 4])  # 3 -> 4, then like ones
    mesh = jaxpipe.make_mesh(pipe=2, data=2)
    pipe = jaxpipe.Pipeline(module, mesh, zero_stage=1)
    params = pipe.init(0, jnp.ones((4, 3)))
    wanted = jax.device_get(pipe.to_layers(params))
    arrays = {(0, 1): np.full((3, 4), 7.0, np.float32), (2, 1): np.full((4, 4), 8.0, np.float32)}
    found = replaced(pipe.layout, mesh, params, arrays)
    wanted[0]["w"], wanted[2]["w"] = arrays[0, 1], arrays[2, 1]
    assert_close(pipe.to_layers(found), wanted, 0)
    old, new = (
        {jax.tree_util.keystr(p): a for p, a in jax.tree_util.tree_leaves_with_path(t)} for t in (params, found)
    )
    assert {path for path in old if old[path] is not new[path]} == {path for path in old if path.endswith("['w']")}
    assert all(old[path].sharding == new[path].sharding for path in old)
