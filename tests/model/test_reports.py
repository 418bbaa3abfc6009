"""The names of what a step reports."""

import jax
import jax.numpy as jnp
import pytest

import jaxpipe
from jaxpipe import metrics
from jaxpipe.errors import LossError
from jaxpipe.model.context import Aux
from jaxpipe.model.metrics import Joined, joinable
from jaxpipe.model.reports import check_names, training_metrics

ONE = jax.ShapeDtypeStruct((2, 3), jnp.float32)


def test_metrics_of_a_step_keep_no_rows():
    def loss_fn(y, t):
        return y.mean(), {"mean": t.mean(), "rows": metrics.Concat(y), "most": metrics.Max(y.max())}

    found = training_metrics(loss_fn, ONE, ONE, jaxpipe.make_mesh())
    assert {name: joined.rule for name, joined in found.items()} == {"mean": metrics.Mean, "most": metrics.Max}
    assert all(term.shape == () for joined in found.values() for term in joined.terms)
    assert training_metrics(None, ONE, None, jaxpipe.make_mesh()) == {}
    assert training_metrics(lambda y, t: y.mean(), ONE, ONE, jaxpipe.make_mesh()) == {}


@pytest.mark.parametrize("name", ["loss", "grad_norm", "loss_scale"])
def test_names_of_the_engine_are_refused(name):
    with pytest.raises(LossError, match=f"named \"{name}\"|the name '{name}'"):
        training_metrics(lambda y, t: (y.mean(), {name: 1.0}), ONE, ONE, jaxpipe.make_mesh())
    for aux in (Aux(losses={name: 1.0}), Aux(metrics={name: joined(a=metrics.Sum(1))["a"]})):
        with pytest.raises(LossError, match=f"layer 0 .* the name '{name}'"):
            check_names([("layer 0", aux)], [])


def joined(**found: metrics.Metric) -> dict[str, Joined]:
    return joinable(found, 2)


def test_one_name_in_several_layers():
    mean, other = joined(a=metrics.Mean(1.0)), joined(a=metrics.Sum(1.0))
    check_names(
        [("layer 0", Aux(losses={"b": 1.0}, metrics=mean)), ("layer 1", Aux(losses={"b": 2.0}, metrics=mean))], ["c"]
    )
    for second, of_loss_fn, message in (
        (Aux(losses={"a": 1.0}), [], r"'a' stands for a metric by the rule Mean of float32\[\] \(layer 0\)"),
        (Aux(metrics=other), [], r"and for a metric by the rule Sum of float32\[\] \(layer 1\)"),
        (Aux(), ["a"], r"'a' stands for a metric of loss_fn"),
    ):
        with pytest.raises(LossError, match=message):
            check_names([("layer 0", Aux(metrics=mean)), ("layer 1", second)], of_loss_fn)
