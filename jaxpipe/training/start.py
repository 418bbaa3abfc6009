"""The start of a training run: its first state and its jitted step, made of arrays, or of shapes alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxpipe.data.check import check_batch
from jaxpipe.data.place import batch_avals
from jaxpipe.executor.permutes import Checked
from jaxpipe.executor.train import StepResult
from jaxpipe.optimizer.layerwise import Layerwise
from jaxpipe.training.config import Config
from jaxpipe.training.loss_scale import dynamic
from jaxpipe.training.optimizer import make_step
from jaxpipe.training.state import TrainState, make_state
from jaxpipe.types import Batch, Key, Params, Tree


class Start(NamedTuple):
    """What training begins with.

    Attributes:
      state: at step 0; of ShapeDtypeStruct if it was made of shapes.
      shardings: the sharding of each of its leaves.
      step: `step(state, inputs, labels, answer) -> (state, info)`, jitted; it donates the state. See `make_step`.
    """

    state: TrainState
    shardings: TrainState
    step: Any


def make_start(
    value_and_grad: Callable[[Params, Tree, Tree, Key, jax.Array | None, Tree], StepResult],
    params: Params,
    optimizer: Layerwise,
    key: Key,
    mesh: Mesh,
    config: Config,
    layer_state: Tree = None,
) -> Start:
    """Makes it.

    Args:
      value_and_grad: as for `make_step`.
      params, layer_state: as for `make_state`; ShapeDtypeStruct with shardings will do.
      key: the PRNG key of the run.
    """
    state, shardings = make_state(params, optimizer, key, mesh, dynamic(config.loss_scale), layer_state)
    step = jax.jit(
        make_step(value_and_grad, optimizer, config.gradient_clipping, config.loss_scale),
        donate_argnums=0,
        out_shardings=(shardings, shardings.step),
    )
    return Start(state, shardings, Checked(step, mesh))


def trace_step(step: Any, state: TrainState, batch: Batch, num_micro_batches: int, mesh: Mesh) -> jax.stages.Traced:
    """The step of a `Start`, traced for a batch; nothing runs.

    Args:
      state: arrays, or ShapeDtypeStruct with shardings.
      batch: (inputs, labels), arrays or ShapeDtypeStruct, leaves [M, B, ...].

    Raises:
      DataError: the batch does not fit M or the data ranks.
    """
    inputs, labels, _ = check_batch(batch, num_micro_batches, mesh)
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    return step.trace(placed, batch_avals(inputs, mesh), batch_avals(labels, mesh))
