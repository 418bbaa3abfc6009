"""`initialize`: from layers, optimizer, mesh and settings to an engine, with everything checked on shapes first."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxpipe.engine import Engine
from jaxpipe.errors import DataError
from jaxpipe.mesh import data_size
from jaxpipe.model.keys import as_key
from jaxpipe.model.module import PipelineModule
from jaxpipe.model.shapes import aval, describe
from jaxpipe.pipeline import Batch, Pipeline
from jaxpipe.training.config import Config


def initialize(
    module: PipelineModule,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    example: Batch,
    config: Config | Mapping[str, Any] | None = None,
    key: jax.Array | int | None = None,
    layers: Sequence[Any] | None = None,
) -> Engine:
    """Makes an engine.

    Args:
      module: the layers and their loss.
      optimizer: any optax gradient transformation. It sees the params tree of `Pipeline.init`, in which layers of one
        kind are stacked: rules that look at single values (adam, sgd, weight decay, the global norm) act as they would
        layer by layer; rules that look at the rank or the norm of each array (masks by ndim, lamb, adafactor) act on
        stacks.
      mesh: see `make_mesh`.
      example: one micro-batch (inputs, labels), arrays or ShapeDtypeStruct; labels may be None if nothing needs them.
      config: a `Config`, or a dict of its fields.
      key: PRNG key of weights and dropout, or an integer seed; `jax.random.key(0)` by default.
      layers: per-layer params to start from, instead of fresh ones.

    Raises:
      JaxpipeError: something does not fit; the message says what, the rule, and the way out.
    """
    config = Config.make(config)
    pipe = Pipeline(module, mesh, config.num_micro_batches, config.schedule, config.remat)
    if not isinstance(example, (tuple, list)) or len(example) != 2:
        raise DataError("example is one micro-batch: a pair (inputs, labels) of arrays or jax.ShapeDtypeStruct.")
    for leaf in jax.tree.leaves(example):
        shape = aval(leaf).shape
        if not shape or shape[0] % data_size(mesh):
            raise DataError(
                f"The example has a leaf {describe(leaf)}, whose rows cannot be split evenly over {data_size(mesh)} data "
                "ranks. The leading dim of an example is the rows of one micro-batch on all data ranks."
            )
    root = as_key(0 if key is None else key)
    pipe.check(example)
    params = pipe.init(root, example[0]) if layers is None else pipe.from_layers(layers)
    return Engine(pipe, optimizer, config, params, root)
