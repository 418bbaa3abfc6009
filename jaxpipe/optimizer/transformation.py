"""`Pipeline.optimizer`: a gradient transformation over the params trees of a pipeline."""

import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import optax
from jax.sharding import Mesh

from jaxpipe.errors import ConfigError
from jaxpipe.layout.layout import Layout
from jaxpipe.optimizer.arguments import checked, explaining
from jaxpipe.optimizer.layerwise import Layerwise
from jaxpipe.optimizer.state import OptState
from jaxpipe.types import Params, Structure, Tree


class LayerwiseTransformation(optax.GradientTransformationExtraArgs):
    """A `GradientTransformation` over the params tree of a pipeline; `init` and `update` work inside and outside of `jit`.

    `init` takes a params tree, or a tree that holds several, as `optax.LookaheadParams(fast, slow)` does. `update` takes
    gradients and params of the same structure and shapes, and further arguments such as `value=` or `grad=`, which may be
    params trees too. Further arguments that are functions of the params (`value_fn=`) are refused.

    Attributes:
      natural_state: translates a state to the structure and the shapes in which optax would hold it, one entry per layer.
    """

    natural_state: Callable[[OptState], Tree]

    @classmethod
    def of(cls, tx: Any, layout: Callable[[], Layout], mesh: Mesh) -> Self:
        """Makes one of an optax transformation.

        Args:
          tx: what the user passed; anything but a gradient transformation is refused.
          layout: returns the layout of the params. It is called when `init` or `update` is called for the first time.
          mesh: where the params lie.

        Raises:
          ConfigError: `tx` is no gradient transformation.
        """
        made: dict[Structure, Layerwise] = {}
        optimizer = checked(tx)

        def layerwise(params: Params, extra: dict[str, Tree]) -> Layerwise:
            shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
            # One per structure of the params that `init` was given; `update` is given the same structure.
            like = jax.tree.structure(shapes)
            if like not in made:
                with explaining():
                    made[like] = Layerwise(optimizer, layout(), mesh, shapes, extra)
            return made[like]

        def default_extra() -> dict[str, Tree]:
            return {"value": jax.ShapeDtypeStruct((), jax.numpy.float32), "grad": layout().shapes()}

        def init(params: Params) -> OptState:
            on = layerwise(params, default_extra())
            return jax.jit(on.init, out_shardings=on.shardings())(params)

        @jax.jit
        def run(grads: Params, state: OptState, params: Params, extra: dict[str, Tree]) -> tuple[Params, OptState]:
            made = layerwise(grads if params is None else params, extra)
            updates, after = made.update(grads, state, params, **extra)
            return jax.tree.map(functools.partial(_whole, made), updates, is_leaf=made.tree.is_params), after

        def update(updates: Params, state: Any, params: Params = None, **extra: Any) -> tuple[Params, Any]:
            for name, value in extra.items():
                if callable(value):
                    raise ConfigError(
                        f"{name}= is a function of the params, which this optimizer cannot be given: it works on one entry "
                        "per layer. Use a transformation without a line search."
                    )
            return run(updates, state, params, extra)

        def natural_state(state: OptState) -> Tree:
            if not made:
                raise ConfigError("natural_state: this optimizer has no state yet. Call init(params) first.")
            return next(iter(made.values())).natural_state(state)

        transformation = cls(init, update)
        transformation.natural_state = natural_state
        return transformation


def _whole(on: Layerwise, updates: Params) -> Params:
    """Updates in the structure of the params. What is frozen gets minus zeros: added to a number, they never change it."""
    if not on.tree.is_params(updates):
        return updates
    shapes = on.layout.shapes()
    shardings = on.layout.shardings(on.mesh)

    def whole(like: jax.ShapeDtypeStruct, sharding: Any, update: jax.Array | None) -> jax.Array:
        if update is not None:
            return update
        return jax.lax.with_sharding_constraint(jax.numpy.full(like.shape, -0.0, like.dtype), sharding)

    return jax.tree.map(whole, shapes, shardings, updates)
