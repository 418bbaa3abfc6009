"""A part of the weights, saved alone and merged again."""

import jax
import numpy as np
import pytest

import jaxpipe
from jaxpipe.errors import CheckpointError, ConfigError
from tests.compare import assert_close

safetensors = pytest.importorskip("safetensors.numpy")

LAYERS = [
    {"a": {"w": np.ones((2, 3), np.float32), "lora": np.full((2, 1), 2, np.float32)}},
    {},
    {"lora": np.full(4, 3, np.float32), "w": np.ones(4, np.float32)},
]


@pytest.fixture
def part(tmp_path):
    file = tmp_path / "part.safetensors"
    jaxpipe.save_weights(file, LAYERS, only="lora$")
    return file


def test_a_part_is_saved(part):
    assert set(safetensors.load_file(part)) == {"layers.0.a.lora", "layers.2.lora"}
    assert_close(
        jaxpipe.load_weights(part), [{"a": {"lora": LAYERS[0]["a"]["lora"]}}, {}, {"lora": LAYERS[2]["lora"]}], 0
    )


def test_a_part_is_merged(part):
    others = jax.tree.map(lambda a: 0 * a, LAYERS)
    merged = jaxpipe.load_weights(part, others)
    others[0]["a"]["lora"], others[2]["lora"] = LAYERS[0]["a"]["lora"], LAYERS[2]["lora"]
    assert_close(merged, others, 0)


def test_what_does_not_fit(part, tmp_path):
    def refuse(message, like):
        with pytest.raises(CheckpointError, match=message):
            jaxpipe.load_weights(part, like)

    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), LAYERS)
    refuse("a part of the weights only, and not layers.0.a.w, of which `like` has the shape alone", shapes)
    refuse(r"only the file has \['layers.2.lora'\]", [*LAYERS[:2], {"w": LAYERS[2]["w"]}])
    refuse("expected the arrays of 2 layers, found those of 3", LAYERS[:2])
    wrong = [*LAYERS[:2], {**LAYERS[2], "lora": np.ones(5, np.float32)}]
    refuse(r"layers.2.lora: expected float32\[5\], found float32\[4\]", wrong)
    refuse("like is a dict: expected a list", {"w": 1})
    paths = "layer_000/a/lora, layer_000/a/w, layer_002/lora, layer_002/w"
    with pytest.raises(CheckpointError, match=f"only='bias' is found in the path of no param. The paths are {paths}"):
        jaxpipe.save_weights(tmp_path / "none", LAYERS, only="bias")
    with pytest.raises(ConfigError, match="only='\\('"):
        jaxpipe.save_weights(tmp_path / "none", LAYERS, only="(")


def test_a_whole_file_must_have_everything(tmp_path):
    file = tmp_path / "whole.safetensors"
    jaxpipe.save_weights(file, [{"w": np.ones(2)}])
    with pytest.raises(CheckpointError, match=r"only one of both has \['layers.0.b'\]"):
        jaxpipe.load_weights(file, [{"w": np.ones(2), "b": np.ones(2)}])
