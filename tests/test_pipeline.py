"""`Pipeline` before anything is compiled: refusals, shapes and plans."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.errors import ConfigError, DataError, LayerError
from tests.compare import assert_close
from tests.executor.small import LAYERS, MODULE, ROWS, WIDTH, loss, make_batch

M = 2


def pipeline(stages=2, module=MODULE, **options):
    return jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=stages), M, **options)


@pytest.fixture(scope="module")
def layers():
    """Per layer, params as NumPy arrays."""
    rng = np.random.default_rng(0)
    return [{"w": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32), "n": np.int32(n)} for n in range(6)]


def test_what_is_no_pipeline_is_refused_at_once():
    with pytest.raises(LayerError, match="expected a jaxpipe.PipelineModule"):
        jaxpipe.Pipeline(LAYERS, jaxpipe.make_mesh())
    with pytest.raises(ConfigError, match="num_micro_batches"):
        jaxpipe.Pipeline(MODULE, jaxpipe.make_mesh(), 0)
    with pytest.raises(ConfigError, match="remat="):
        pipeline(remat="all")


def test_params_come_first(layers):
    pipe = pipeline()
    for use in (
        lambda: pipe.partition,
        lambda: pipe.value_and_grad({}, make_batch(M)),
        lambda: pipe.plan(make_batch(M)),
    ):
        with pytest.raises(LayerError, match="has no params yet"):
            use()
    with pytest.raises(LayerError, match="expected a list with the params of each layer"):
        pipe.from_layers(dict(enumerate(layers)))
    with pytest.raises(LayerError, match="5 per-layer params were given; the module has 6 layers"):
        pipe.from_layers(layers[:5])
    by_cost = pipeline(module=jaxpipe.PipelineModule(LAYERS, loss, "cost"))
    with pytest.raises(LayerError, match="needs the shapes of the data: call pipe.check first"):
        by_cost.from_layers(layers)


def test_layers_come_over_to_another_number_of_stages(layers):
    two, three = pipeline(2), pipeline(3)
    params = two.from_layers(layers)
    assert_close(jax.device_get(two.to_layers(params)), layers, 0)
    over = three.from_layers(two.to_layers(params))
    assert_close(jax.device_get(three.to_layers(over)), layers, 0)
    with pytest.raises(LayerError, match="those of this pipeline are"):
        two.to_layers(over)
    with pytest.raises(LayerError, match=r"layer 1 .*: expected params"):
        two.from_layers([layers[0], {"w": layers[1]["w"]}, *layers[2:]])


def test_batches_and_options_are_looked_at_before_anything_runs(layers, no_compiles):
    pipe = pipeline()
    params = pipe.from_layers(layers)
    with no_compiles():
        with pytest.raises(DataError, match=r"its first dim is 3, but there are 2 micro-batches"):
            pipe.value_and_grad(params, make_batch(3))
        with pytest.raises(ConfigError, match=r"lower_eval got the options \['return_logit'\]"):
            pipe.lower_eval(params, make_batch(M), return_logit=True)
        with pytest.raises(ConfigError, match="key"):
            pipe.value_and_grad(params, make_batch(M), key="seed")


def test_shapes_are_enough_for_a_check_and_for_a_plan(layers, no_compiles):
    pipe = pipeline(3)
    with no_compiles():
        example = tuple(jax.ShapeDtypeStruct((ROWS, *a.shape[2:]), a.dtype) for a in make_batch(M))
        assert pipe.check(example) == jax.ShapeDtypeStruct((), jnp.float32)
        assert pipe.partition == (0, 2, 4, 6)
        batch = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in make_batch(M))
        plan = pipe.plan(batch, jax.eval_shape(lambda: jax.random.key(0)))
        assert "3 stages, 3 distinct programs" in str(plan) and plan.num_micro_batches == M
        assert jax.tree.map(jnp.shape, pipe.layout.shapes()) == jax.tree.map(jnp.shape, plan.layout.shapes())
