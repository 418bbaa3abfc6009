"""Batches, micro-batches and examples judged by types and shapes; `test_leaves` has what is said of single leaves."""

import jax
import numpy as np
import pytest

import jaxpipe
from jaxpipe.data.check import check_batch, check_example, check_layer_params, check_micro_batch
from jaxpipe.errors import DataError, LayerError
from tests.data.micro_batches import BAD, item

MESH = jaxpipe.make_mesh(pipe=2, data=2)
# Of these the micro-batch is no pair; that is looked at where it is pulled.
PAIRS = [name for name in BAD if name not in ("a pair of three", "a dict")]


def stacked(*items):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *items)


def shapes(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


@pytest.mark.parametrize("name", PAIRS)
def test_bad_micro_batches_and_examples(name):
    bad, message = BAD[name]
    for check, where in ((check_micro_batch, 2), (check_example, MESH)):
        with pytest.raises(DataError, match=message):
            check(bad, where)


def test_good_ones():
    check_micro_batch(item(), 2)
    check_micro_batch(item(3), 2, any_rows=True)
    check_micro_batch((item()[0], "no labels"), 2, needs_labels=False)
    check_example(item(), MESH)
    check_example(shapes(item()), MESH)
    inputs, labels, m = check_batch(stacked(item(), item(seed=1), item(seed=2)), None, MESH)
    assert m == 3 and inputs["h"].shape == labels["t"].shape == (3, 4, 3)
    assert check_batch(shapes(stacked(item(3))), 1, MESH, any_rows=True)[2] == 1


def test_rows_that_the_data_ranks_do_not_divide():
    rule = "its 3 rows per micro-batch cannot be split evenly over 2 data ranks. Use a multiple of 2"
    with pytest.raises(DataError, match=rf"^inputs\['h'\] is float32\[3,3\]: {rule}"):
        check_micro_batch(item(3), 2)
    with pytest.raises(DataError, match=rf"^The example: inputs\['h'\] is float32\[3,3\]: {rule}"):
        check_example(item(3), MESH)
    with pytest.raises(DataError, match=rf"^inputs\['h'\] is float32\[1,3,3\]: {rule}"):
        check_batch(stacked(item(3)), 1, MESH)


def test_what_iterators_yield_may_have_another_byte_order_and_must_have_numbers():
    inputs, labels = item()
    foreign = {"h": inputs["h"].astype(">f4")}, labels
    check_micro_batch(foreign, 2)
    with pytest.raises(DataError, match=r"inputs\['h'\] is an array of dtype >f4, in the byte order of other machines"):
        check_batch(({"h": foreign[0]["h"][None]}, {"t": labels["t"][None]}), 1, MESH)
    with pytest.raises(
        DataError, match="a shape without numbers. Only `example`, lower_train and lower_eval take those"
    ):
        check_micro_batch(shapes(item()), 2)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (lambda x, y: [x, y, x], "A batch is a pair .*, got a list of 3. Labels may be None"),
        (lambda x, y: ({"h": x["h"][0, 0]}, y), r"inputs\['h'\] is float32\[3\]. Leaves of a batch are \[M, B, ...\]"),
        (lambda x, y: (x, {"t": y["t"][:1]}), r"labels\['t'\] .* its first dim is 1, but there are 2 micro-batches"),
        (lambda x, y: ({"h": x["h"][:0]}, {"t": y["t"][:0]}), r"its first dim is 0, but there are (2|0) micro-batches"),
        (
            lambda x, y: (x, {"t": y["t"][:, :2]}),
            r"labels\['t'\] is float32\[2,2,3\] and has 2 rows, but inputs\['h'\]",
        ),
    ],
    ids=["triple", "no rows", "micro-batches", "none", "rows"],
)
@pytest.mark.parametrize("num_micro_batches", [2, None])
def test_bad_batches(batch, message, num_micro_batches):
    with pytest.raises(DataError, match=message):
        check_batch(batch(*stacked(item(), item())), num_micro_batches, MESH)


def test_labels_that_are_not_needed_are_not_looked_at():
    inputs, labels = stacked(item(), item())
    check_batch((inputs, {"t": labels["t"][:1, :1]}), 2, MESH, needs_labels=False)


def test_per_layer_params():
    check_layer_params([{"w": np.ones(2)}, {}, {"n": 3, "on": True}], 3)
    for layers, message in (
        ({"w": 1}, "layers is a dict: expected a list"),
        ([{}], "1 per-layer params were given; the module has 3 layers"),
        ([{}, {"w": "text"}, {}], r"layers\[1\]\['w'\] is "),
    ):
        with pytest.raises(LayerError, match=message):
            check_layer_params(layers, 3)
