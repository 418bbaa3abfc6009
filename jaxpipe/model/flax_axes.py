"""What flax says about axes: boxes of linen around params, and the rules that stand for logical names of activations."""

import contextlib
from typing import Any

import jax
from flax import linen

from jaxpipe.model.axes import Annotation, AxisRules
from jaxpipe.model.paths import path_text
from jaxpipe.types import Params


def take_off(params: Params) -> tuple[Params, dict[str, Annotation]]:
    """The params as plain arrays, and what their boxes said, by path within the layer.

    `linen.with_partitioning` and `linen.with_logical_partitioning` put a param into a box that has names for its dims.
    """
    found: dict[str, Annotation] = {}

    def one(path: Any, leaf: Any) -> Any:
        while isinstance(leaf, linen.meta.AxisMetadata):
            annotation = Annotation.of(getattr(leaf, "names", None), getattr(leaf, "rules", None))
            if annotation is not None:
                found.setdefault(path_text(path), annotation)
            # A box would constrain the layout of what it holds, wherever a mesh is around.
            leaf = leaf.unbox(apply_constraint=False) if isinstance(leaf, linen.Partitioned) else leaf.unbox()
        return leaf

    plain = jax.tree_util.tree_map_with_path(
        one, params, is_leaf=lambda leaf: isinstance(leaf, linen.meta.AxisMetadata)
    )
    return plain, found


def in_effect(rules: AxisRules, mesh: Any) -> contextlib.AbstractContextManager[None]:
    """While layers are traced inside, `linen.with_logical_constraint` in them follows these rules.

    The user's own, set by `linen.logical_axis_rules` around the call, hold where the module has none; but a rule for rows,
    which stands for "data", would fail where each device has the rows of its data rank already.
    """
    return linen.logical_axis_rules(rules.for_activations(mesh, linen.get_logical_axis_rules()))
