"""Weights as safetensors: stable names, exact values, other structures, and files that do not fit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from jaxpipe.errors import CheckpointError
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


def test_any_program_can_read_them(tmp_path):
    file = tmp_path / "weights.safetensors"
    layers = [{"a": {"w": np.ones((2, 3), np.float32)}}, {}, ([jnp.full(4, 2, jnp.bfloat16)], np.array(5, np.int32))]
    jaxpipe.save_weights(file, layers)
    raw = safetensors.load_file(file)
    assert {name: (str(a.dtype), a.shape) for name, a in raw.items()} == {
        "layers.0.a.w": ("float32", (2, 3)),
        "layers.2.0.0": ("bfloat16", (4,)),
        "layers.2.1": ("int32", ()),
    }
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), layers)
    assert_close(jaxpipe.load_weights(file, like=shapes), layers, 0)

    def refuse(message, like=None, path=file):
        with pytest.raises(CheckpointError, match=message):
            jaxpipe.load_weights(path, like)

    refuse(r"expected the arrays of 2 layers, found those of 3", layers[:2])
    refuse(r"only one of both has \['layers.0.a.w', 'layers.0.b.w'\]", [{"b": layers[0]["a"]}, *layers[1:]])
    wrong = [{"a": {"w": np.ones((3, 2), np.float32)}}, *layers[1:]]
    refuse(r"layers.0.a.w: expected float32\[3,2\], found float32\[2,3\]", wrong)
    refuse("expected a safetensors file, found: .*No such file", path=tmp_path / "none.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    refuse(re.escape(f"{file}: expected a safetensors file, found: "))
    safetensors.save_file({"h.0.weight": np.ones(3)}, file)
    refuse(r"expected weights that jaxpipe.save_weights wrote, found names such as \['h.0.weight'\]")
    with pytest.raises(CheckpointError, match="could not be written: .*No such file"):
        jaxpipe.save_weights(tmp_path / "nowhere" / "x.safetensors", layers)


def test_the_model_gives_the_structure(tmp_path):
    """Without any weights in memory: shapes from the module."""
    module, file = mixed(), tmp_path / "weights.safetensors"
    example = make_batch(1)[0][0]
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=4))
    params = pipe.init(jax.random.key(0), example)
    jaxpipe.save_weights(file, pipe.to_layers(params))
    like = [layer.params for layer in module.shapes(example)]
    assert_close(pipe.from_layers(jaxpipe.load_weights(file, like)), jax.device_get(params), 0)
