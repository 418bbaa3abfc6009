"""What is cast to what, and which params a rule finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.errors import ConfigError
from jaxpipe.model.precision import Precision, as_compute_dtype

BF16, F16 = Precision("bfloat16"), Precision("float16")
KEY = jax.random.key(0)
TREE = {
    "long": np.ones(2, np.float32),
    "bfloat16": jnp.ones(2, jnp.bfloat16),
    "float16": jnp.ones(2, jnp.float16),
    "float8": jnp.ones(2, jnp.float8_e4m3fn),
    "complex": jnp.ones(2, jnp.complex64),
    "int": np.ones(2, np.int32),
    "bool": np.ones(2, bool),
    "key": KEY,
    "none": None,
}


def dtypes(tree):
    return {name: str(leaf.dtype) for name, leaf in tree.items() if leaf is not None}


def changed(tree):
    before = dtypes(TREE)
    return {name: dtype for name, dtype in dtypes(tree).items() if dtype != before[name]}


@pytest.mark.parametrize(
    ("precision", "inputs", "handed_on"),
    [
        (Precision(), {}, {}),
        (BF16, {"long": "bfloat16", "float16": "bfloat16"}, {"long": "bfloat16"}),
        (F16, {"long": "float16", "bfloat16": "float16"}, {"long": "float16"}),
    ],
    ids=["none", "bfloat16", "float16"],
)
def test_only_floats_are_cast(precision, inputs, handed_on):
    outputs = {} if precision == Precision() else dict.fromkeys(("bfloat16", "float16", "float8"), "float32")
    avals = jax.eval_shape(lambda: {name: leaf for name, leaf in TREE.items()})
    for tree in (TREE, avals):
        assert changed(precision.inputs(tree)) == inputs
        assert changed(precision.handed_on(tree)) == handed_on
        assert changed(precision.outputs(tree)) == outputs


def test_doubles_are_cast_too():
    with jax.enable_x64(True):
        wide = {"a": jnp.ones(2), "w": jax.ShapeDtypeStruct((2,), jnp.float64)}
        assert set(dtypes(BF16.inputs(wide)).values()) == set(dtypes(BF16.handed_on(wide)).values()) == {"bfloat16"}
        assert set(dtypes(BF16.outputs(wide)).values()) == {"float64"}


LAYERS = {
    "layer_000": {"table": np.ones((3, 2), np.float32)},
    "layer_001": {"norm": {"scale": np.ones(2, np.float32)}, "w": [np.ones(2, np.float32), np.int32(1)]},
    "layer_002": {},
    "layer_003": (jnp.ones(2, jnp.bfloat16), np.ones(2, np.float32)),
}


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (None, []),
        ("norm", ["layer_001/norm/scale"]),
        ("^norm", None),
        (r"layer_001/.*", ["layer_001/norm/scale", "layer_001/w/0"]),
        (r"table$|/w/0", ["layer_000/table", "layer_001/w/0"]),
        ("layer_003/1", ["layer_003/1"]),
        ("", ["layer_000/table", "layer_001/norm/scale", "layer_001/w/0", "layer_003/1"]),
        ("layer_001/w/1", None),
        ("nothing", None),
    ],
)
def test_rules_are_searched_for_in_paths(rule, kept):
    precision = Precision("bfloat16", rule)
    if kept is None:
        with pytest.raises(
            ConfigError, match=r"is found in the path of no param that is a float. The paths are layer_000"
        ):
            precision.of_layers(LAYERS)
        return
    found = jax.tree_util.tree_flatten_with_path(precision.of_layers(LAYERS))[0]
    paths = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}
    assert [path for path, leaf in paths.items() if leaf.dtype == jnp.float32] == kept
    assert paths["layer_001/w/1"].dtype == jnp.int32 and paths["layer_003/0"].dtype == jnp.bfloat16
    assert paths["layer_000/table"].shape == (3, 2)


def test_without_a_compute_dtype_nothing_is_cast_and_rules_are_looked_at_all_the_same():
    assert dtypes(Precision(None, "w").of_layers(LAYERS)["layer_000"]) == {"table": "float32"}
    with pytest.raises(ConfigError, match="float32_params='nothing'"):
        Precision(None, "nothing").of_layers(LAYERS)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (None, None),
        ("float32", None),
        (jnp.float32, None),
        ("bfloat16", "bfloat16"),
        (jnp.bfloat16, "bfloat16"),
        (jnp.dtype("bfloat16"), "bfloat16"),
        ("float16", "float16"),
        (np.float16, "float16"),
        (np.dtype("float16"), "float16"),
    ],
    ids=repr,
)
def test_names_and_dtypes(value, name):
    assert as_compute_dtype(value) == name and Precision.of(value, None) == Precision(name)


@pytest.mark.parametrize(
    "value", ["bf16", "fp16", "half", "", 16, 0, True, False, float, np.float64, np.int8, [], "auto"]
)
def test_what_is_no_compute_dtype(value):
    with pytest.raises(ConfigError, match=r"compute_dtype=.* must be 'bfloat16', 'float16', or None"):
        as_compute_dtype(value)


def test_what_is_nearly_one():
    with pytest.raises(ConfigError, match="Did you mean 'bfloat16'"):
        as_compute_dtype("bfloat")


@pytest.mark.parametrize(("rule", "why"), [("norm(", "unterminated|missing"), (["norm"], "is a list"), (3, "is a int")])
def test_what_is_no_rule(rule, why):
    with pytest.raises(ConfigError, match=rf"float32_params=.*({why}).*regular expression"):
        Precision.of("bfloat16", rule)
