"""Everything that changes from one training step to the next."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.mesh import PIPE
from jaxpipe.model.shapes import is_inexact
from jaxpipe.model.storage import is_stack

Path = tuple[Any, ...]  # of a leaf in a tree


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
        opt_shardings = _opt_shardings(abstract, params, everywhere)
        opt_state = jax.jit(lambda p: optimizer.init(trainable(p)), out_shardings=opt_shardings)(params)
    param_shardings = jax.tree.map(lambda a: a.sharding, params)
    shardings = TrainState(everywhere, param_shardings, opt_shardings, everywhere)  # type: ignore[arg-type]
    # A copy of the key: the state is donated, and the caller's key must live on.
    step, key = jax.device_put((jnp.zeros((), jnp.int32), jnp.copy(key)), everywhere)
    return TrainState(step, params, opt_state, key), shardings


def mirrored(path: Path, params: Mapping[Path, Any]) -> tuple[Path, Path] | None:
    """Splits the path of a leaf of an optimizer state into (what keeps it, the path of the param it is about).

    It is about a param if the end of its path is that param's path: true of every optax transformation that keeps values
    per param, wrapped (masked, multi_transform, chain) or not. None for others, such as step counts.
    """
    return next(((path[:start], path[start:]) for start in range(len(path)) if path[start:] in params), None)


def _opt_shardings(opt_state: Any, params: Any, otherwise: NamedSharding) -> Any:
    """A sharding per leaf of an abstract optimizer state.

    What has the shape of its param lies as the param does. What is smaller but has one entry per layer of a stack, as
    factored moments have, is cut over the ranks too. Others are on all devices.
    """
    places = dict(jax.tree_util.tree_flatten_with_path(params)[0])

    def sharding(path: Path, leaf: Any) -> NamedSharding:
        if found := mirrored(path, places):
            param = places[found[1]]
            if param.shape == leaf.shape:
                return param.sharding
            if is_stack(found[1]) and leaf.shape[:2] == param.shape[:2]:
                return NamedSharding(otherwise.mesh, PartitionSpec(PIPE))
        return otherwise

    return jax.tree_util.tree_map_with_path(sharding, opt_state)
