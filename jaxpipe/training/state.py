"""The training state: everything that changes from one training step to the next."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.model.shapes import aval
from jaxpipe.model.values import raw, typed
from jaxpipe.optimizer.layerwise import Layerwise
from jaxpipe.optimizer.state import OptState
from jaxpipe.types import Key, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The state of a training run, a pytree.

    Attributes:
      step: the number of optimizer steps that were taken, int32 [].
      params: the weights, as `Pipeline.init` makes them: stacks [S, slots, ...] and single layers.
      opt_state: the state of the optimizer, stored like the params. `Layerwise.natural_state` gives it as optax would hold
        it.
      key: the PRNG key of the run, a typed key [] or an older key of words; step k uses `fold_in(key, k)`.
    """

    step: jax.Array
    params: Params
    opt_state: OptState
    key: Key


def make_state(params: Params, optimizer: Layerwise, key: Key, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """Makes the state at step 0.

    Args:
      params: on the mesh, as `Pipeline.init` makes them.

    Returns:
      The state, and a state with the sharding of each leaf in its place.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    opt_shardings = optimizer.shardings()
    opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(params)
    param_shardings = jax.tree.map(lambda a: a.sharding, params)
    shardings = TrainState(everywhere, param_shardings, opt_shardings, everywhere)  # type: ignore[arg-type]
    # The key goes by way of the host, wherever it lies, and becomes a key again inside jit, which can put it onto devices
    # of several processes. So it is also a copy: the state is donated, and the caller's key must stay usable.
    like = aval(key)
    start = jax.jit(lambda words: (jnp.zeros((), jnp.int32), typed(words, like)), out_shardings=everywhere)
    step, key = start(jax.device_get(raw(key)))
    return TrainState(step, params, opt_state, key), shardings
