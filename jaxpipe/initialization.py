"""`initialize`: makes an engine of layers, optimizer, mesh and settings, after everything was checked on shapes."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxpipe.engine import Engine
from jaxpipe.model.keys import as_key
from jaxpipe.model.module import PipelineModule
from jaxpipe.optimizer.arguments import Optimizer, checked, explaining
from jaxpipe.optimizer.layerwise import Layerwise
from jaxpipe.pipeline import Pipeline
from jaxpipe.training.config import Config
from jaxpipe.types import Batch, Key, Params


def initialize(
    module: PipelineModule,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    example: Batch,
    config: Config | Mapping[str, Any] | None = None,
    key: Key | int | None = None,
    layers: Sequence[Params] | None = None,
) -> Engine:
    """Makes an engine.

    Args:
      module: the layers and their loss.
      optimizer: any optax gradient transformation. It sees `{"layer_000": {...}, "layer_001": {...}, ...}`, with one entry
        per layer that owns weights and each array in the shape that its layer made. Its results are those on that tree, for
        any number of stages. If its `update` has parameters `value` and `grad`, it is given the loss, and the gradient
        before clipping.
      mesh: as `make_mesh` makes it.
      example: one micro-batch (inputs, labels), arrays or ShapeDtypeStruct [B, ...]; labels may be None if nothing needs
        them.
      config: a `Config`, or a dict of its fields.
      key: the PRNG key of weights and dropout, or an integer seed; `jax.random.key(0)` by default.
      layers: the params to start from, for each layer in the shapes that it made, instead of fresh ones.

    Raises:
      JaxpipeError: something does not fit. The message says what, the rule, and the way out.
    """
    transformation = checked(optimizer)
    config = Config.make(config)
    pipe = Pipeline(module, mesh, config.num_micro_batches, config.schedule, config.remat)
    root = as_key(0 if key is None else key)
    layerwise = _layerwise(transformation, pipe, pipe.check(example))
    params = pipe.init(root, example[0]) if layers is None else pipe.from_layers(layers)
    # An older key of words stays one in the state, because checkpoints record the kind of the key.
    of_words = getattr(key, "shape", ()) != ()
    return Engine(pipe, layerwise, config, params, jax.random.key_data(root) if of_words else root)


def _layerwise(optimizer: Optimizer, pipe: Pipeline, loss: jax.ShapeDtypeStruct) -> Layerwise:
    """The optimizer on the params of `pipe`. It is tried on shapes first; `loss` is the shape of the loss."""
    shapes = pipe.layout.shapes()
    with explaining():
        return Layerwise(optimizer, pipe.layout, pipe.mesh, shapes, {"value": loss, "grad": shapes})
