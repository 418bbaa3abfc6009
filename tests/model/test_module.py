"""`PipelineModule`: its list, owners of weights, shapes, and how it is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.errors import DataError, LayerError, LossError, PartitionError
from jaxpipe.model.module import PipelineModule
from tests.compare import assert_close

X = np.ones((4, 3), np.float32)


def dense(wide, narrow):
    def init(key, x):
        return {"w": jax.random.normal(key, (wide, narrow))}

    return jaxpipe.Layer(init, lambda params, x: x @ params["w"], f"Dense{narrow}")


def tied():
    return PipelineModule(
        [
            jaxpipe.TiedLayerSpec("t", dense, 3, 5),
            jnp.tanh,
            jaxpipe.TiedLayerSpec("t", dense, 3, 5, forward_fn=lambda params, x: x @ params["w"].T),
        ]
    )


@pytest.mark.parametrize(
    "layers", [3, None, "ab", {"a": jnp.tanh}, {jnp.tanh}, jnp.tanh, dense(3, 3), jaxpipe.LayerSpec(dense, 3, 3)]
)
def test_what_is_no_list_of_layers(layers):
    with pytest.raises(
        LayerError, match=r"PipelineModule\(.*: the first argument is a .*, but it is the list of layers"
    ):
        PipelineModule(layers)


def test_other_arguments_are_looked_at_at_once():
    with pytest.raises(LossError, match=r"loss_fn=3\): it is a function loss_fn\(outputs, labels\), or None"):
        PipelineModule([jnp.tanh], 3)
    with pytest.raises(PartitionError):
        PipelineModule([jnp.tanh], None, 3.5)
    assert PipelineModule(layer for layer in [jnp.tanh, jnp.sin]).num_layers == 2


def test_names():
    module = tied()
    assert repr(module) == "PipelineModule(Dense5, tanh, Dense5)" and module.label(1) == "layer 1 (tanh)"


def test_the_first_use_of_a_tie_owns_the_weights():
    module = tied()
    assert module.owners == (0, 1, 0)
    key = jax.random.key(3)
    assert_close(module.init_layer(0, key, X), dense(3, 5).init(jax.random.fold_in(key, 0), X), 0)
    assert module.init_layer(2, key, X) == {}


def test_shapes():
    found = tied().shapes(X)
    assert [shape.outputs.shape for shape in found] == [(4, 5), (4, 5), (4, 3)]
    assert [shape.inputs.shape for shape in found] == [(4, 3), (4, 5), (4, 5)]
    assert found[0].params["w"].shape == (3, 5) and found[1].params == found[2].params == {}
    given = tied().shapes(
        jax.ShapeDtypeStruct((4, 3), np.float16), params=[{"w": jnp.ones((3, 5), jnp.float16)}, {}, {}]
    )
    assert given[2].outputs.dtype == np.float16


def test_partition_by_parameters_cost_and_hand():
    layers = [dense(3, 3), dense(3, 3), dense(3, 300), dense(300, 3)]
    assert PipelineModule(layers).partition(2, X) == (0, 3, 4)
    assert PipelineModule(layers, partition_method="cost").partition(2, X) == (0, 3, 4)
    assert PipelineModule(layers, partition_method="uniform").partition(2, X) == (0, 2, 4)
    assert PipelineModule(layers, partition_method=[0, 1, 4]).partition(2, X) == (0, 1, 4)
    with pytest.raises(DataError, match="The example {} holds no array"):
        PipelineModule(layers).partition(2, {})


def test_shapes_are_made_only_for_a_method_that_needs_them():
    def shapes():
        raise AssertionError("not needed")

    assert PipelineModule([jnp.tanh] * 4, partition_method="uniform").partition_from(2, shapes) == (0, 2, 4)


def test_flops_are_those_of_the_matrix_products_and_counted_once(monkeypatch):
    module = PipelineModule([dense(3, 8), dense(8, 3), dense(3, 8)])
    shapes = module.shapes(X)
    flops = module.costs.forward(shapes)
    assert flops == [2 * 4 * 3 * 8] * 3
    monkeypatch.setattr(jax, "jit", None)
    assert module.costs.forward(shapes) == flops


def test_a_tied_layer_counts_with_the_weights_of_its_owner():
    module = tied()
    flops = module.costs.forward(module.shapes(X))
    assert flops[0] == flops[2] == 2 * 4 * 3 * 5
