"""What is said of single leaves, and of two micro-batches that differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.data.leaves import appearance, check_pair, check_rows, check_types, difference, named, paths
from jaxpipe.errors import DataError, LayerError
from tests.data.micro_batches import BAD, item

PAIRS = [name for name in BAD if name not in ("a pair of three", "a dict")]
OF_TYPES = [name for name in PAIRS if "rows" not in BAD[name][1]]


def test_names_of_leaves():
    assert [name for name, _ in paths({"a": [1, 2]})] == ["['a'][0]", "['a'][1]"]
    assert [name for name, _ in named(1, {"mask": 2})] == ["inputs", "labels['mask']"]
    assert [name for name, _ in named({"h": 1}, None)] == ["inputs['h']"]
    with pytest.raises(DataError, match="The inputs of the batch hold no array: {}"):
        named({}, 1)
    with pytest.raises(DataError, match="keys of a dict cannot be sorted, as JAX does: .* Use strings throughout"):
        paths({1: 2, "a": 3})


@pytest.mark.parametrize("pair", [(1, None), [1, 2]])
def test_pairs(pair):
    assert check_pair(pair, "It is") == tuple(pair)


@pytest.mark.parametrize(("value", "kind"), [((1,), "tuple of 1"), ([1, 2, 3], "list of 3"), ({}, "dict"), (5, "int")])
def test_what_is_no_pair(value, kind):
    with pytest.raises(DataError, match=f"^It is a {kind}. Here is the rule. Labels may be None"):
        check_pair(value, "It is", " Here is the rule.")


@pytest.mark.parametrize("name", OF_TYPES)
def test_leaves_that_jax_cannot_take(name):
    bad, message = BAD[name]
    with pytest.raises(DataError, match=message):
        check_types(named(*bad))


def test_leaves_that_are_as_good_as_arrays():
    good = [np.ones(2), np.float32(1), jnp.ones(2), np.ones(2, bool), memoryview(np.ones(2)), jnp.bfloat16(1)]
    check_types([("x", leaf) for leaf in [*good, jax.ShapeDtypeStruct((2,), np.float32), jax.random.key(0)]])
    jax.eval_shape(lambda x: check_types([("x", x)]) or x, np.ones(2))  # while it is being traced


def test_the_kind_of_error_is_that_of_the_caller():
    with pytest.raises(LayerError, match="w is 'x', a single str"):
        check_types([("w", "x")], LayerError)


def test_deleted_arrays():
    array = jnp.ones(3)
    array.delete()
    with pytest.raises(DataError, match=r"x is an array that was deleted or donated. Pass a copy of it"):
        check_types([("x", array)])


def test_rows_are_counted_in_the_dim_that_is_asked_for():
    leaves = [("a", np.ones((2, 4))), ("b", np.ones((3, 4, 1)))]
    check_rows(leaves, 1, 2)
    with pytest.raises(DataError, match=r"^b is float32\[3,4,1\] and has 3 rows, but a is float32\[2,4\] and has 2"):
        check_rows(leaves, 0, 1)
    with pytest.raises(DataError, match=r"^Here: a is float32\[2,4\]: its 4 rows per micro-batch .* over 3 data ranks"):
        check_rows(leaves, 1, 3, "Here: ")
    with pytest.raises(DataError, match=r"^a is float32\[2,4\], which has no rows"):
        check_rows(leaves, 2, 1)


def test_what_looks_alike():
    """Only where every check would say the same: kinds of arrays, dtypes and structure count, numbers do not."""
    inputs, labels = item()
    assert appearance(item()) == appearance(item(seed=1)) is not None
    for other in (item(3), (inputs, None), ({"g": inputs["h"]}, labels), (jax.tree.map(jnp.asarray, inputs), labels)):
        assert appearance(other) != appearance(item())
    assert appearance((inputs, {"t": labels["t"].astype(">f4")})) != appearance(item())
    assert appearance((inputs, [1.0])) is None, "a number may be anything"
    assert appearance(({1: inputs, "a": inputs}, labels)) is None, "keys that cannot be sorted"


@pytest.mark.parametrize(
    ("one", "rows_too", "wanted"),
    [
        (lambda x, y: (x, y), True, None),
        (lambda x, y: ({"h": x["h"][:2]}, {"t": y["t"][:2]}), False, None),
        (lambda x, y: ({"h": x["h"][:2]}, {"t": y["t"][:2]}), True, "float32[2,3] at inputs['h']|float32[4,3] there"),
        (lambda x, y: (x, None), False, "without labels['t']; it has inputs['h']|float32[4,3] there"),
        (lambda x, y: (x, {**y, "u": y["t"]}), False, "float32[4,3] at labels['u']|without labels['u']; it has inputs"),
        (lambda x, y: (x, {"t": y["t"] > 0}), False, "bool[4,3] at labels['t']|float32[4,3] there"),
        (lambda x, y: (x, {"t": y["t"][..., 0]}), False, "float32[4] at labels['t']|float32[4,3] there"),
        (lambda x, y: ({**x, "n": ()}, y), False, "({'h': float32[4,3], 'n': ()}|({'h': float32[4,3]}"),
    ],
    ids=["same", "rows", "rows count", "missing", "more", "dtype", "dims", "structure"],
)
def test_what_differs(one, rows_too, wanted):
    found = difference(one(*item(seed=1)), item(), rows_too)
    if wanted is None:
        assert found is None
    else:
        assert [text.startswith(begin) for text, begin in zip(found, wanted.split("|"), strict=True)] == [True, True], (
            found
        )
