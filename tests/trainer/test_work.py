import jax
import numpy as np
import optax
import pytest

import jaxpipe
from jaxpipe.errors import ConfigError
from jaxpipe.trainer.work import chip_for, work_of

M, ROWS, WIDTH = 3, 4, 8


def dense(width):
    return jaxpipe.Layer(lambda key, x: {"w": np.ones((width, width), np.float32)}, lambda params, x: x @ params["w"])


def pipe_for(layers, example, **options):
    module = jaxpipe.PipelineModule(layers, lambda y, labels: optax.squared_error(y, labels).mean())
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2), num_micro_batches=M, **options)
    pipe.check((example, jax.ShapeDtypeStruct(example.shape, np.float32)))
    pipe.init(0, example)
    return pipe


@pytest.mark.parametrize("remat", ["layer", "none"])
def test_seconds_at_the_peak_are_those_of_the_model_alone(remat):
    """Four products, each three times (its value, and its two gradients), but for the gradient of the first input."""
    pipe = pipe_for([dense(WIDTH)] * 4, jax.ShapeDtypeStruct((ROWS, WIDTH), np.float32), remat=remat)
    chip = {"peak_flops": 1e3, "memory": 1.0, "bandwidth": 1.0, "link": 1.0}
    work = work_of(pipe, chip_for(chip))
    flops = M * 2 * ROWS * WIDTH * WIDTH * (4 * 3 - 1)
    assert work.seconds_at_peak == pytest.approx(flops / (2 * 1e3), rel=0.02)
    assert (work.items, work.name) == (M * ROWS, "rows")


def test_tokens_are_counted_where_inputs_are_ids_and_an_unknown_chip_has_no_peak():
    embed = jaxpipe.Layer(lambda key, x: {"t": np.ones((5,), np.float32)}, lambda params, x: params["t"][x])
    pipe = pipe_for([embed, lambda x: x], jax.ShapeDtypeStruct((ROWS, 6), np.int32))
    assert work_of(pipe, chip_for(None)) == (M * ROWS * 6, "tokens", None)
    with pytest.raises(ConfigError, match="chip='v5x' is not known"):
        chip_for("v5x")
