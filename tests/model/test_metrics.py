"""Every rule joins parts of any size to what the whole would give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe import Weighted
from jaxpipe.errors import LossError
from jaxpipe.model.metrics import Concat, Joined, Max, Mean, Metric, Min, Sum, WeightedMean, as_metrics

rng = np.random.default_rng(0)
VALUES = rng.normal(size=20).astype(np.float32)
PARTS = np.split(VALUES, [3, 4, 12])  # uneven on purpose


def joined(rule, value):
    """The rule on every part, joined in order."""
    found = [Joined(rule(value(part)).terms(len(part)), rule) for part in PARTS]
    total = found[0]
    for other in found[1:]:
        total = total + other
    return total.finish()


@pytest.mark.parametrize(
    ("rule", "value", "wanted"),
    [
        (Mean, lambda part: part.mean(), VALUES.mean()),
        (Sum, lambda part: part.sum(), VALUES.sum()),
        (Max, lambda part: part.max(), VALUES.max()),
        (Min, lambda part: part.min(), VALUES.min()),
        (Mean, lambda part: jnp.stack([part.mean(), 2 * part.mean()]), np.stack([VALUES.mean(), 2 * VALUES.mean()])),
    ],
    ids=["mean", "sum", "max", "min", "mean of arrays"],
)
def test_parts_give_the_whole(rule, value, wanted):
    np.testing.assert_allclose(joined(rule, value), wanted, rtol=1e-5)


def test_weighted_means_are_exact_and_zero_where_nothing_counts():
    rule = WeightedMean
    terms = [rule(part[part > 0].sum(), (part > 0).sum()).terms(len(part)) for part in PARTS]
    found = sum((Joined(t, rule) for t in terms[1:]), Joined(terms[0], rule)).finish()
    np.testing.assert_allclose(found, VALUES[VALUES > 0].mean(), rtol=1e-5)
    assert Joined(rule(0.0, 0).terms(1), rule).finish() == 0


def test_on_the_host_as_on_the_device():
    one, two = (Joined(Mean(part.mean()).terms(len(part)), Mean) for part in PARTS[:2])
    host = jax.device_get(one) + jax.device_get(two)
    assert isinstance(host.terms[0], np.ndarray | np.generic)
    np.testing.assert_allclose(host.finish(), (one + two).finish(), rtol=1e-6)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (np.int8(100), "int32"),
        (np.uint8(200), "uint32"),
        (True, "int32"),
        (np.float16(1), "float32"),
        (jnp.bfloat16(1), "float32"),
        (3, "int32"),
        (np.complex64(1), "complex64"),
    ],
)
def test_sums_have_room(value, dtype):
    assert Sum(value).terms(1)[0].dtype == dtype
    assert jnp.issubdtype(Mean(value).terms(1)[0].dtype, jnp.inexact)


def test_rows_behind_each_other():
    (rows,) = Concat(VALUES).terms(20)
    np.testing.assert_array_equal(rows, VALUES)
    for value in (VALUES, np.float32(3)):
        with pytest.raises(LossError, match=r"Concat holds float32\[.*must be the rows of the micro-batch \(7 on each"):
            Concat(value).terms(7)


def test_what_users_write_becomes_a_rule():
    made = as_metrics({"a": 0.5, "b": (3.0, 4), "c": Weighted(3.0, 4), "d": Max(1), "e": [jnp.ones(()), jnp.ones(())]})
    assert {name: type(metric) for name, metric in made.items()} == {
        "a": Mean,
        "b": WeightedMean,
        "c": WeightedMean,
        "d": Max,
        "e": WeightedMean,
    }
    assert (made["b"].value, made["b"].weight) == (made["c"].value, made["c"].weight) == (3.0, 4)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([0.5], r"Metrics are a dict of names and values, got \[0.5\]"),
        ({1: 0.5}, "Metrics are a dict of names and values"),
        ({"loss": 0.5}, 'cannot be named "loss"'),
        ({"a": "0.5"}, "The metric 'a' is a str. A metric is an array"),
        ({"a": None}, "The metric 'a' is a NoneType"),
        ({"a": (1.0, "2")}, "The metric 'a' is a str"),
        ({"a": (1.0, 2.0, 3.0)}, "The metric 'a' is a tuple"),
    ],
)
def test_what_is_no_metric(found, message):
    with pytest.raises(LossError, match=message):
        as_metrics(found)


def test_rules_are_trees_of_their_values():
    metric = jax.tree.map(lambda a: a * 2, WeightedMean(1.0, 2.0))
    assert (metric.value, metric.weight) == (2.0, 4.0)
    with pytest.raises(NotImplementedError):
        Metric(1.0).terms(1)
