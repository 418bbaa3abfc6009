"""The training state: everything that changes from one training step to the next."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpipe.model.shapes import aval
from jaxpipe.model.values import raw, typed
from jaxpipe.optimizer.layerwise import Layerwise
from jaxpipe.optimizer.state import OptState
from jaxpipe.training.loss_scale import DynamicScale, ScaleState
from jaxpipe.types import Key, Params, Tree


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
      loss_scale: what a dynamic loss scale remembers; None without one.
      layer_state: what layers remember beside their params, as `Pipeline.init_state` makes it: stacks [S, slots, ...] and
        single layers; {} if no layer has state. `Engine.layer_state` gives it per layer.
    """

    step: jax.Array
    params: Params
    opt_state: OptState
    key: Key
    loss_scale: ScaleState | None = None
    layer_state: Tree = field(default_factory=dict)


def make_state(
    params: Params,
    optimizer: Layerwise,
    key: Key,
    mesh: Mesh,
    scaling: DynamicScale | None = None,
    layer_state: Tree = None,
) -> tuple[TrainState, TrainState]:
    """Makes the state at step 0.

    Args:
      params: on the mesh, as `Pipeline.init` makes them. If they are ShapeDtypeStruct with shardings, nothing is made: the
        leaves of the state are of that kind, too, and the mesh may be of devices that are not there.
      scaling: the rule of a dynamic loss scale; None without one.
      layer_state: on the mesh, as `Pipeline.init_state` makes it, or ShapeDtypeStruct with shardings; None: there is none.

    Returns:
      The state, and a state with the sharding of each leaf in its place.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))

    def made(function: Callable[..., Any], shardings: Any, *args: Any) -> Any:
        jitted = jax.jit(function, out_shardings=shardings)
        return jitted.eval_shape(*args) if abstract else jitted(*args)

    opt_shardings = optimizer.shardings()
    opt_state = made(optimizer.init, opt_shardings, params)
    layer_state = layer_state if jax.tree.leaves(layer_state) else {}
    param_shardings, layer_shardings = jax.tree.map(lambda a: a.sharding, (params, layer_state))
    # The key goes by way of the host, wherever it lies, and becomes a key again inside jit, which can put it onto devices
    # of several processes. So it is also a copy: the state is donated, and the caller's key must stay usable.
    like = aval(key)
    begin = jnp.zeros((), jnp.int32), None if scaling is None else scaling.start()
    words = jax.device_get((raw(key), begin))
    key, step, scale = made(lambda words, begin: (typed(words, like), *begin), everywhere, *words)
    scale_shardings = jax.tree.map(lambda _: everywhere, scale)
    shardings: Any = TrainState(
        everywhere,  # type: ignore
        param_shardings,
        opt_shardings,  # type: ignore
        everywhere,  # type: ignore
        scale_shardings,  # type: ignore
        layer_shardings,
    )
    return TrainState(step, params, opt_state, key, scale, layer_state), shardings
