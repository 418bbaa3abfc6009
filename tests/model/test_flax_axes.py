"""Boxes of linen, and rules for logical names."""

import jax
import numpy as np
from flax import linen
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.model import flax_axes
from jaxpipe.model.axes import Annotation, AxisRules


def test_boxes_come_off_and_what_they_said_is_kept():
    boxes = {
        "dense": {"kernel": linen.LogicallyPartitioned(np.ones((2, 3)), ("embed", "mlp"), rules=(("mlp", "model"),))},
        "table": linen.Partitioned(linen.Partitioned(np.ones(4), ("model",)), ("expert",)),
        "plain": np.ones(2),
        "silent": linen.Partitioned(np.ones(2), (None,)),
    }
    plain, found = flax_axes.take_off(boxes)
    assert jax.tree.map(np.shape, plain) == {"dense": {"kernel": (2, 3)}, "table": (4,), "plain": (2,), "silent": (2,)}
    assert found == {
        "dense/kernel": Annotation((("embed",), ("mlp",)), {"mlp": ("model",)}),
        "table": Annotation((("expert",),)),
    }
    one, named = flax_axes.take_off(linen.Partitioned(np.ones(2), ("model",)))  # a layer whose params are one array
    assert isinstance(one, np.ndarray) and named == {"": Annotation((("model",),))}


def test_rules_are_in_effect_inside():
    mesh = jaxpipe.make_mesh(model=2)
    with linen.logical_axis_rules([("rows", "data"), ("heads", "model")]):
        with flax_axes.in_effect(AxisRules(), mesh):
            assert linen.logical_to_mesh_axes(("rows", "heads")) == P(None, "model")
        with flax_axes.in_effect(AxisRules.of(None, {"heads": None}), mesh):
            assert linen.logical_to_mesh_axes(("rows", "heads")) == P(None, None)
        assert linen.logical_to_mesh_axes(("rows", "heads")) == P("data", "model")
