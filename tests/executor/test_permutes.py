"""A program that would permute something inside of an op is refused before it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.errors import ShardingError
from jaxpipe.executor.permutes import refuse_permutes

LINE = '  %p = f32[4]{{0}} collective-permute{}(%a), metadata={{op_name="jit(f)/shard_map/while/body/{}"}}'


@pytest.mark.parametrize("start", ["", "-start"])
def test_permutes_inside_of_ops(start):
    refuse_permutes(LINE.format(start, "ppermute"))
    with pytest.raises(ShardingError, match="'add'.*permute between the devices of one rank"):
        refuse_permutes(LINE.format(start, "while/body/jaxpipe.B1/while/body/add"))


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="not refused yet with this jax: the step would never end")
def test_a_dim_that_goes_from_one_axis_to_another_one():
    layer = jaxpipe.Layer(lambda key, x: {"w": jnp.eye(8), "b": jnp.ones(8)}, lambda p, x: x @ p["w"] + p["b"][None])
    rules = [("w", P("a", "b")), ("b", P("b"))]
    module = jaxpipe.PipelineModule([layer] * 2, lambda y, t: ((y - t) ** 2).mean(), sharding=rules)
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2, a=2, b=2), 2)
    batch = np.ones((2, 2, 4, 8), np.float32)
    params = pipe.init(0, batch[0, 0])
    alone = jaxpipe.Pipeline(module, jaxpipe.make_mesh(a=2, b=2), 2)  # all devices run the same op at one time
    assert alone.value_and_grad(alone.init(0, batch[0, 0]), tuple(batch))[0] > 0
    for run in (pipe.value_and_grad, pipe.evaluate):
        with pytest.raises(ShardingError, match="all devices of the mesh take part in a permute"):
            run(params, tuple(batch))


def test_what_is_looked_at_is_compiled_once(no_compiles):
    layer = jaxpipe.Layer(lambda key, x: {"w": jnp.eye(8)}, lambda p, x: x @ p["w"])
    module = jaxpipe.PipelineModule([layer] * 2, lambda y, t: ((y - t) ** 2).mean(), sharding=[("w", P("model"))])
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2, model=2), 2)
    batch = np.ones((2, 2, 4, 8), np.float32)
    params = pipe.init(0, batch[0, 0])
    args = (params, *batch, None)
    pipe._train.lower(*args).compile()
    with no_compiles():
        pipe._train.jitted(*args)
    loss, _ = pipe.value_and_grad(params, tuple(batch))
    assert jax.jit(lambda params: pipe.value_and_grad(params, tuple(batch))[0])(params) == loss
