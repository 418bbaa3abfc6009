"""Names of layers and params."""

import jax

from jaxpipe.model.paths import layer_name, param_path


def test_names_and_paths():
    assert layer_name(3) == "layer_003" and layer_name(1234) == "layer_1234"
    params = {"attn": [{"kernel": 1}, (2,)], "b": 3}
    found = [param_path(layer_name(3), path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    assert found == ["layer_003/attn/0/kernel", "layer_003/attn/1/0", "layer_003/b"]
    assert param_path("layer_000", ()) == "layer_000", "a layer whose params are one array"
