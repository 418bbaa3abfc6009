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
) -> tuple[TrainState, TrainState, list[int | None]]:
    """The state at step 0 around `params`, the sharding of each of its leaves, and the `stack_axes` of the optimizer."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes on purpose
        abstract = jax.eval_shape(lambda p: optimizer.init(trainable(p)), params)
        axes = stack_axes(abstract, params, optimizer)
        opt_shardings = _opt_shardings(abstract, params, axes, everywhere)
        opt_state = jax.jit(lambda p: optimizer.init(trainable(p)), out_shardings=opt_shardings)(params)
    param_shardings = jax.tree.map(lambda a: a.sharding, params)
    shardings = TrainState(everywhere, param_shardings, opt_shardings, everywhere)  # type: ignore[arg-type]
    # A copy of the key: the state is donated, and the caller's key must live on.
    step, key = jax.device_put((jnp.zeros((), jnp.int32), jnp.copy(key)), everywhere)
    return TrainState(step, params, opt_state, key), shardings, axes


def mirrored(path: Path, params: Mapping[Path, Any]) -> tuple[Path, Path] | None:
    """Splits the path of a leaf of an optimizer state into (what keeps it, the path of the param it is about).

    It is about a param if the end of its path is that param's path: true of every optax transformation that keeps values
    per param, wrapped (masked, multi_transform, chain) or not. None for others, such as step counts.
    """
    return next(((path[:start], path[start:]) for start in range(len(path)) if path[start:] in params), None)


def stack_axes(opt_state: Any, params: Any, optimizer: optax.GradientTransformation) -> list[int | None]:
    """Per leaf of an abstract optimizer state, which of its dims is the rank, with the slot behind it; None without these.

    What has the shape of its param is clear. Of the rest it is found by asking the optimizer for the state of a model of
    more ranks and slots: sizes alone could be equal by chance.
    """
    places = dict(jax.tree_util.tree_flatten_with_path(params)[0])

    def larger(path: Path, leaf: Any) -> jax.ShapeDtypeStruct:
        more = (leaf.shape[0] + 1, leaf.shape[1] + 2, *leaf.shape[2:]) if is_stack(path) else leaf.shape
        return jax.ShapeDtypeStruct(more, leaf.dtype)

    other = jax.eval_shape(lambda p: optimizer.init(trainable(p)), jax.tree_util.tree_map_with_path(larger, params))

    def axis(path: Path, one: Any, two: Any) -> int | None:
        found = mirrored(path, places)
        if found and is_stack(found[1]) and places[found[1]].shape == one.shape:
            return 0
        grown = [two - one for one, two in zip(one.shape, two.shape, strict=True)] if one.ndim == two.ndim else []
        at = grown.index(1) if 1 in grown else None
        alone = at is not None and grown[at : at + 2] == [1, 2] and sum(map(bool, grown)) == 2
        return at if alone else None

    leaves = jax.tree_util.tree_flatten_with_path(opt_state)[0]
    return [axis(*leaf, more) for leaf, more in zip(leaves, jax.tree.leaves(other), strict=True)]


def _opt_shardings(opt_state: Any, params: Any, axes: list[int | None], otherwise: NamedSharding) -> Any:
    """A sharding per leaf of an abstract optimizer state.

    What has the shape of its param lies as the param does. What has another one but one entry per layer of a stack, as
    factored moments have, is cut over the ranks too. Others are on all devices.
    """
    places = dict(jax.tree_util.tree_flatten_with_path(params)[0])

    def sharding(path: Path, leaf: Any, axis: int | None) -> NamedSharding:
        if found := mirrored(path, places):
            if places[found[1]].shape == leaf.shape:
                return places[found[1]].sharding
            if is_stack(found[1]) and axis is not None:
                return NamedSharding(otherwise.mesh, PartitionSpec(*[None] * axis, PIPE))
        return otherwise

    leaves, structure = jax.tree_util.tree_flatten_with_path(opt_state)
    return jax.tree.unflatten(structure, [sharding(*leaf, axis) for leaf, axis in zip(leaves, axes, strict=True)])
