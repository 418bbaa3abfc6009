"""Rules that say what is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.errors import ConfigError
from jaxpipe.model.trainable import Trainable

LAYERS = {
    "layer_000": {"table": np.ones((3, 2), np.float32)},
    "layer_001": {"up": {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.bfloat16)}, "count": np.arange(3)},
    "layer_002": {},
}


def frozen(rule):
    return Trainable.of(rule).frozen(LAYERS)


def test_rules():
    nothing = [{"table": False}, {"up": {"kernel": False}, "count": False}, {}]
    assert frozen(None) == nothing
    assert frozen(r"layer_\d+") == nothing
    assert frozen(r"up/kernel$") == [{"table": True}, *nothing[1:]]
    seen = []
    assert frozen(lambda path: seen.append(path) or np.bool_("table" in path)) == [
        {"table": False},
        {"up": {"kernel": True}, "count": False},  # integers are not trained anyway
        {},
    ]
    assert seen == ["layer_000/table", "layer_001/up/kernel"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            "count",
            "trainable='count' is found in the path of no param.*paths are layer_000/table, layer_001/up/kernel;",
        ),
        (lambda path: False, "says False for every param"),
        (lambda path: "yes", "returned 'yes' for the path 'layer_000/table'"),
        ("(", "trainable='\\('"),
        (3, "trainable=3 is a int"),
    ],
    ids=range(5),
)
def test_rules_that_make_no_sense(rule, message):
    with pytest.raises(ConfigError, match=message):
        frozen(rule)
