"""Everything that changes from one training step to the next."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.model.shapes import is_inexact


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The state of a training run, a pytree.

    Attributes:
      step: optimizer steps taken, int32 [].
      params: as `Pipeline.init` gives.
      opt_state: of the optax optimizer; what mirrors the params is sharded like them.
      key: PRNG key of the run; step k uses `fold_in(key, k)`.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


def trainable(tree: Any) -> Any:
    """The tree with None for leaves without derivatives (integers, booleans), which no optimizer should see."""
    return jax.tree.map(lambda a: a if is_inexact(a) else None, tree)


def make_state(
    params: Any, optimizer: optax.GradientTransformation, key: jax.Array, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """The state at step 0 around `params`, and the sharding of each of its leaves."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes on purpose
        abstract = jax.eval_shape(lambda p: optimizer.init(trainable(p)), params)
        opt_shardings = _mirrored(abstract, params, everywhere)
        opt_state = jax.jit(lambda p: optimizer.init(trainable(p)), out_shardings=opt_shardings)(params)
    param_shardings = jax.tree.map(lambda a: a.sharding, params)
    shardings = TrainState(everywhere, param_shardings, opt_shardings, everywhere)  # type: ignore[arg-type]
    # A copy of the key: the state is donated, and the caller's key must live on.
    step, key = jax.device_put((jnp.zeros((), jnp.int32), jnp.copy(key)), everywhere)
    return TrainState(step, params, opt_state, key), shardings


def _mirrored(opt_state: Any, params: Any, otherwise: NamedSharding) -> Any:
    """A sharding per leaf of an abstract optimizer state.

    A leaf mirrors a param if the end of its path is that param's path and the shapes agree: true of every optax
    transformation that keeps one value per param, wrapped (masked, multi_transform, chain) or not. Others, such as step
    counts and factored moments, are on all devices.
    """
    places = {path: leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            param = places.get(path[start:])
            if param is not None and param.shape == leaf.shape:
                return param.sharding
        return otherwise

    return jax.tree_util.tree_map_with_path(sharding, opt_state)
