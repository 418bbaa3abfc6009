"""Everything that changes from one training step to the next."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


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


def make_state(
    params: Any, optimizer: optax.GradientTransformation, key: jax.Array, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """The state at step 0 around `params`, and the sharding of each of its leaves."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    param_shardings = jax.tree.map(lambda a: a.sharding, params)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes on purpose
        abstract = jax.eval_shape(optimizer.init, params)
        opt_shardings = optax.tree_map_params(
            optimizer, lambda _, s: s, abstract, param_shardings, transform_non_params=lambda _: everywhere
        )
        opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(params)
    shardings = TrainState(everywhere, param_shardings, opt_shardings, everywhere)  # type: ignore[arg-type]
    step, key = jax.device_put((jnp.zeros((), jnp.int32), key), everywhere)
    return TrainState(step, params, opt_state, key), shardings
