"""Weights as safetensors: names that any program can read, and files that do not fit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.checkpoint import weights
from jaxpipe.errors import CheckpointError
from tests.compare import assert_close

safetensors = pytest.importorskip("safetensors.numpy")


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


def test_without_a_structure_keys_come_back_as_they_were(tmp_path):
    file = tmp_path / "weights.safetensors"
    layers = [{"a.b": np.ones(2), "a": {"b": np.zeros(3)}, "50%": np.ones(1)}, {}, {"w": np.ones((1, 2), order="F")}]
    jaxpipe.save_weights(file, layers)
    assert set(safetensors.load_file(file)) == {"layers.0.a%2Eb", "layers.0.a.b", "layers.0.50%25", "layers.2.w"}
    assert_close(jaxpipe.load_weights(file), layers, 0)


def test_what_is_no_list_of_layers(tmp_path):
    with pytest.raises(CheckpointError, match="layers is a dict: expected a list with the params of each layer"):
        jaxpipe.save_weights(tmp_path / "x", {"w": np.ones(2)})


def test_what_was_not_written_whole_is_not_reported(tmp_path, monkeypatch):
    file = tmp_path / "weights.safetensors"
    jaxpipe.save_weights(file, [{"w": np.ones(2)}])
    before = file.read_bytes()

    class Forgetful(weights.Writer):
        def __init__(self, path, arrays, metadata):
            super().__init__(path, {}, metadata)

        def write(self, name, array):
            pass

    monkeypatch.setattr(weights, "Writer", Forgetful)
    with pytest.raises(CheckpointError, match=r"were not saved: layers.0.w: expected the shape \(2,\), found None"):
        jaxpipe.save_weights(file, [{"w": np.zeros(2)}])
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
