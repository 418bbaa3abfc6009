"""`initialize`: makes an engine of layers, optimizer, mesh and settings, after everything was checked on shapes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxpipe.engine import Engine
from jaxpipe.errors import ConfigError, DataError, LayerError, LossError, MeshError, PartitionError, ShardingError
from jaxpipe.layout.on_mesh import in_words
from jaxpipe.mesh import pipe_size
from jaxpipe.model import identity
from jaxpipe.model.keys import as_key
from jaxpipe.model.module import PipelineModule
from jaxpipe.model.shapes import describe
from jaxpipe.model.trainable import TrainableOption
from jaxpipe.optimizer.arguments import Optimizer, checked, explaining
from jaxpipe.optimizer.layerwise import Layerwise
from jaxpipe.pipeline import Pipeline
from jaxpipe.processes.compare import Field, check_alike
from jaxpipe.processes.group import Group
from jaxpipe.training.config import Config
from jaxpipe.types import Batch, Key, Params, Tree


def initialize(
    module: PipelineModule,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    example: Batch,
    config: Config | Mapping[str, Any] | None = None,
    key: Key | int | None = None,
    layers: Sequence[Params] | None = None,
    layer_state: Sequence[Tree] | None = None,
    trainable: TrainableOption = None,
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
      layers: the params to start from, for each layer in the shapes that it made, instead of fresh ones, and of those of
        modules that are built.
      layer_state: the state of the layers to start from, such as running means, for each layer as `Engine.layer_state`
        gives it, instead of fresh state, and of that of modules that are built.
      trainable: which params are trained: a regular expression that is searched for in paths such as
        `layer_003/attn/qkv/kernel`, or a function that is given such a path and returns a bool. The others are frozen: they
        have no gradient, no optimizer state and no weight decay, norms and clipping do not count them, and the optimizer
        sees None in their place. Checkpoints hold them all the same. None: everything is trained.

    Raises:
      JaxpipeError: something does not fit. The message says what, the rule, and the way out.
    """
    pipe_size(mesh)  # what follows asks the processes of the mesh
    group = Group.of(mesh)
    # Old keys of words stay words in the state, because checkpoints record the kind of the key.
    of_words = getattr(key, "shape", ()) != ()
    first = 0 if key is None else key
    made = group.together(lambda: prepared(module, optimizer, mesh, example, config, first, trainable))
    pipe, layerwise, settings, root = made
    if group.several:
        check_alike(group, _fields(pipe, layerwise, settings, root, example, layers, layer_state))
    params = pipe.init(root, example[0]) if layers is None else pipe.from_layers(layers)
    if layer_state is not None:
        state = pipe.states.brought(list(layer_state))
    else:  # most models have none, and need not be traced once more for it
        state = {} if pipe.states.layout.is_empty else pipe.init_state(root, example[0])
    return Engine(pipe, layerwise, settings, params, jax.random.key_data(root) if of_words else root, state)


def prepared(
    module: PipelineModule,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    example: Batch,
    config: Config | Mapping[str, Any] | None,
    key: Key | int,
    trainable: TrainableOption = None,
) -> tuple[Pipeline, Layerwise, Config, Key]:
    """What an engine is made of, checked on shapes."""
    transformation = checked(optimizer)
    settings = Config.make(config)
    pipe = Pipeline(
        module,
        mesh,
        settings.num_micro_batches,
        settings.schedule,
        settings.remat,
        compute_dtype=settings.compute_dtype,
        float32_params=settings.float32_params,
        loss_scale=settings.loss_scale,
        zero_stage=settings.zero_stage,
        trainable=trainable,
        num_chunks=settings.num_chunks,
    )
    root = as_key(key)
    return pipe, _layerwise(transformation, pipe, pipe.check(example)), settings, root


def _fields(
    pipe: Pipeline,
    layerwise: Layerwise,
    config: Config,
    key: Key,
    example: Batch,
    layers: Sequence[Params] | None,
    layer_state: Sequence[Tree] | None,
) -> list[Field]:
    """What all processes must have alike, or they would compute parts of different models."""
    mesh, module = pipe.mesh, pipe.module
    shapes = module.shapes(example[0], mesh=mesh, precision=pipe.precision)
    settings = {each.name: _text(getattr(config, each.name)) for each in dataclasses.fields(config)}
    traces = [identity.of_trace(trace) for trace in layerwise.traces]
    hashes = identity.of_layers(module, shapes, mesh, pipe.precision)
    homes = [*pipe.layout.stacks.values(), *pipe.layout.shared.values()]
    cuts = {home.name: "; ".join(in_words(home.placements)) for home in homes}
    given = {module.label(index): layer for index, layer in enumerate(layers or ())}
    states = dict(enumerate(layer_state or ()))
    return [
        Field("mesh", f"{dict(mesh.shape)} on {[device.id for device in mesh.devices.flat]}", MeshError, True),
        Field("config", settings, ConfigError, True),
        Field("the schedule", pipe.schedule.to_csv(), ConfigError),
        Field("example", f"{describe(example[0])}, {describe(example[1])}", DataError, True),
        Field("the model", {module.label(index): found for index, found in enumerate(hashes)}, LayerError),
        Field("partition", str(pipe.partition), PartitionError, True),
        Field("sharding", cuts, ShardingError, True),
        Field(
            "trainable",
            {module.label(i): str(sorted(pipe.layout.frozen.of(i))) for i in set(module.owners)},
            ConfigError,
        ),
        Field(
            "loss_fn", identity.of_loss(module, pipe.precision.outputs(shapes[-1].outputs), example[1], mesh), LossError
        ),
        Field("the optimizer", traces, ConfigError),
        Field("key", str(jax.random.key_data(key)), ConfigError, True),
        Field("the shapes of layers", {name: describe(layer) for name, layer in given.items()}, LayerError),
        # An array may lie on the devices of one process alone, as those of `Engine.to_layers` do.
        Field("layers", {name: identity.of_numbers(layer) for name, layer in given.items()}, LayerError),
        Field("layer_state", {f"layer {n}": identity.of_numbers(state) for n, state in states.items()}, LayerError),
    ]


def _text(value: object) -> str:
    return getattr(value, "__qualname__", None) or repr(value)


def _layerwise(optimizer: Optimizer, pipe: Pipeline, loss: jax.ShapeDtypeStruct) -> Layerwise:
    """The optimizer on the params of `pipe`. It is tried on shapes first; `loss` is the shape of the loss."""
    shapes = pipe.layout.shapes()
    with explaining():
        return Layerwise(optimizer, pipe.layout, pipe.mesh, shapes, {"value": loss, "grad": shapes})
