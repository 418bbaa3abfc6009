"""Whether params are those of a layout, or of a module."""

from collections.abc import Sequence

import jax

from jaxpipe.errors import LayerError
from jaxpipe.layout.layout import Layout
from jaxpipe.model.module import PipelineModule
from jaxpipe.model.shapes import describe, signature
from jaxpipe.types import Params


def check_params(layout: Layout, params: Params, or_gradients: bool = False) -> None:
    """Raises LayerError unless `params` has the structure and the shapes of the params tree of `layout`.

    Two cuts of like layers may have the same shapes; then nothing shows that params belong to the other one.

    Args:
      or_gradients: gradients will do, too, which have None in the place of what is frozen.
    """
    wanted = layout.shapes()
    if or_gradients and jax.tree.structure(params) == jax.tree.structure(layout.trained(wanted)):
        wanted = layout.trained(wanted)
    if jax.tree.structure(params) == jax.tree.structure(wanted):
        shapes = [getattr(leaf, "shape", None) for leaf in jax.tree.leaves(params)]
        if shapes == [leaf.shape for leaf in jax.tree.leaves(wanted)]:
            return
    try:
        found = describe(params)
    except Exception:  # leaves that are no arrays
        found = repr(params)
    raise LayerError(
        f"params is {found[:500]}, but those of this pipeline are {describe(wanted)[:500]}. Pass what its init or "
        "from_layers returned; params of another number of stages come over by pipe.from_layers(other.to_layers(params))."
    )


def check_layers(module: PipelineModule, layers: Sequence[Params], expected: Sequence[Params]) -> None:
    """Raises LayerError unless `layers` has, per layer, the structure, shapes and dtypes of `expected`."""
    for index, (given, wanted) in enumerate(zip(layers, expected, strict=True)):
        if signature(given) != signature(wanted):
            raise LayerError(f"{module.label(index)}: expected params {describe(wanted)}, got {describe(given)}.")
