"""`Pipeline.optimizer`: a gradient transformation over params trees."""

from collections.abc import Callable
from typing import Any, Self

import jax
import optax
from jax.sharding import Mesh

from jaxpipe.errors import ConfigError
from jaxpipe.model.layout import Layout
from jaxpipe.optimizer.arguments import checked, explaining
from jaxpipe.optimizer.layerwise import Layerwise
from jaxpipe.optimizer.state import OptState
from jaxpipe.types import Tree


class LayerwiseTransformation(optax.GradientTransformationExtraArgs):
    """A `GradientTransformation` over the params tree of a pipeline; `init` and `update` work inside and outside of `jit`.

    `params` may hold several such trees, as `optax.LookaheadParams(fast, slow)` does, and so may the further arguments of
    `update` (`grad=`, say). Further arguments that are functions of the params (`value_fn=`) are refused.
    """

    natural_state: Callable[[OptState], Tree]  # the state as optax would hold it

    @classmethod
    def of(cls, tx: Any, layout: Callable[[], Layout], mesh: Mesh) -> Self:
        """`tx` over the params of `layout`, which is asked for when `init` or `update` is first called."""
        made: dict[Any, Layerwise] = {}
        optimizer = checked(tx)

        def layerwise(params: Tree, extra: dict[str, Any]) -> Layerwise:
            shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
            # What `init` was given decides, and `update` is given the same.
            like = jax.tree.structure(shapes)
            if like not in made:
                with explaining():
                    made[like] = Layerwise(optimizer, layout(), mesh, shapes, extra)
            return made[like]

        def default_extra() -> dict[str, Any]:
            return {"value": jax.ShapeDtypeStruct((), jax.numpy.float32), "grad": layout().shapes()}

        def init(params: Tree) -> OptState:
            on = layerwise(params, default_extra())
            return jax.jit(on.init, out_shardings=on.shardings())(params)

        @jax.jit
        def run(grads: Tree, state: OptState, params: Tree, extra: dict[str, Any]) -> tuple[Tree, OptState]:
            return layerwise(grads if params is None else params, extra).update(grads, state, params, **extra)

        def update(updates: Tree, state: Any, params: Tree = None, **extra: Any) -> tuple[Tree, Any]:
            for name, value in extra.items():
                if callable(value):
                    raise ConfigError(
                        f"{name}= is a function of the params, which this optimizer cannot be given: it works on one entry "
                        "per layer. Use a transformation without a line search."
                    )
            return run(updates, state, params, extra)

        transformation = cls(init, update)
        transformation.natural_state = lambda state: next(iter(made.values())).natural_state(state)
        return transformation
