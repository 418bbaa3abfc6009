"""Everything that changes from one training step to the next."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.optimizer.layerwise import Layerwise
from jaxpipe.optimizer.state import OptState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The state of a training run, a pytree.

    Attributes:
      step: optimizer steps taken, int32 [].
      params: as `Pipeline.init` gives.
      opt_state: of the optimizer, stored as the params are; `Layerwise.natural_state` gives it as optax would hold it.
      key: PRNG key of the run; step k uses `fold_in(key, k)`.
    """

    step: jax.Array
    params: Any
    opt_state: OptState
    key: jax.Array


def make_state(params: Any, optimizer: Layerwise, key: jax.Array, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """The state at step 0 around `params`, and the sharding of each of its leaves."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    opt_shardings = optimizer.shardings()
    opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(params)
    param_shardings = jax.tree.map(lambda a: a.sharding, params)
    shardings = TrainState(everywhere, param_shardings, opt_shardings, everywhere)  # type: ignore[arg-type]
    # A copy of the key: the state is donated, and the caller's key must live on.
    step, key = jax.device_put((jnp.zeros((), jnp.int32), jnp.copy(key)), everywhere)
    return TrainState(step, params, opt_state, key), shardings
