"""One item: written, described and read by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.checkpoint import items
from jaxpipe.checkpoint.manifest import ArraySpec

ARRAYS = {
    "params/up/kernel": jnp.arange(6.0).reshape(2, 3),
    "params/b": np.ones(2, np.float16),
    "opt_state/0:mu": jnp.ones(3, jnp.bfloat16),
    "step": np.asarray(3, np.int32),
    "empty": np.zeros((0, 4), np.float32),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("run [a]") / "layer_000"
    items.write(path, ARRAYS)
    return path


def test_what_was_written_is_described_without_empty_arrays(written):
    assert items.described(written) == {
        "params/up/kernel": ArraySpec("float32", (2, 3)),
        "params/b": ArraySpec("float16", (2,)),
        "opt_state/0:mu": ArraySpec("bfloat16", (3,)),
        "step": ArraySpec("int32", ()),
    }


def test_what_is_wanted_is_read(written):
    found = items.read(written, lambda name: name.startswith("params"))
    assert found.keys() == {"params/up/kernel", "params/b"}
    for name, array in found.items():
        assert type(array) is np.ndarray and array.dtype == ARRAYS[name].dtype
        np.testing.assert_array_equal(array, ARRAYS[name])
    assert items.read(written, lambda name: False) == {}


def test_an_item_of_nothing(tmp_path):
    items.write(tmp_path / "layer_001", {"empty": ARRAYS["empty"]})
    assert (tmp_path / "layer_001").is_dir(), "it was not forgotten"
    assert items.described(tmp_path / "layer_001") == {} == items.read(tmp_path / "layer_001", lambda name: True)


def test_names_of_leaves_are_unlike():
    tree = {"a": {"b": 1}, "a.b": 2, "a/b": 3, "c:d%": [4]}
    names = [items.joined(path, "/") for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    assert names == ["a/b", "a%2Eb", "a%2Fb", "c%3Ad%25/0"]
    assert [items.unescaped(part) for part in ("a%2Eb", "c%3Ad%25")] == ["a.b", "c:d%"]


def test_nested():
    assert items.nest({"a/b": 1, "a/c": 2, "d": 3}) == {"a": {"b": 1, "c": 2}, "d": 3}
    assert items.nest({"a.b%2Ec": 1}, ".", items.unescaped) == {"a": {"b.c": 1}}
