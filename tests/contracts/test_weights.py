"""Weights as safetensors, out of one pipeline and into another."""

import jax
import optax
import pytest

import jaxpipe
from tests.compare import assert_close
from tests.engines import engine_for
from tests.models import make_batch, mixed, tied, untied

safetensors = pytest.importorskip("safetensors.numpy")


@pytest.mark.parametrize("make", [tied, untied])
def test_out_and_in_again_at_another_cut(make, tmp_path):
    file, first = tmp_path / "weights.safetensors", engine_for(make(), 3, 2)
    layers = jax.device_get(first.to_layers())
    jaxpipe.save_weights(file, first.to_layers())
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]
    found = jaxpipe.load_weights(file)
    assert_close(found, layers, 0)
    assert_close(jaxpipe.load_weights(str(file), like=first.to_layers()), layers, 0)
    example = tuple(a[0] for a in make_batch(1))
    second = jaxpipe.initialize(
        make([0, 2, 9]), optax.sgd(0.1), mesh=jaxpipe.make_mesh(pipe=2), example=example, layers=found
    )
    assert_close(second.to_layers(), layers, 0)


def test_the_model_gives_the_structure(tmp_path):
    """Without any weights in memory: shapes from the module."""
    module, file = mixed(), tmp_path / "weights.safetensors"
    example = make_batch(1)[0][0]
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=4))
    params = pipe.init(jax.random.key(0), example)
    jaxpipe.save_weights(file, pipe.to_layers(params))
    like = [layer.params for layer in module.shapes(example)]
    assert_close(pipe.from_layers(jaxpipe.load_weights(file, like)), jax.device_get(params), 0)
