"""`compile`: a whole training step, from shapes alone, for devices that need not be there; and what its compiler says."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from jaxpipe.errors import HardwareError
from jaxpipe.evaluation.evaluator import with_places
from jaxpipe.executor.eval_plan import EvalPlan
from jaxpipe.executor.options import Options
from jaxpipe.executor.plan import TrainPlan
from jaxpipe.hardware import copies, flops, live
from jaxpipe.hardware.examine import LAYER_STATE, examine
from jaxpipe.hardware.report import Report
from jaxpipe.initialization import prepared
from jaxpipe.lowering.channels import VALUES
from jaxpipe.mesh import further_axes
from jaxpipe.model.keys import KEY
from jaxpipe.model.module import PipelineModule
from jaxpipe.model.trainable import TrainableOption
from jaxpipe.pipeline import Pipeline
from jaxpipe.training.config import Config
from jaxpipe.training.start import make_start, trace_step
from jaxpipe.types import Avals, Batch


class _Work(NamedTuple):
    """What is to be compiled: traced, planned, and what lies on a device before, by kind, as abstract values."""

    traced: jax.stages.Traced
    plan: TrainPlan | EvalPlan
    kept: dict[str, Avals]


def compile(
    module: PipelineModule,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    example: Batch,
    config: Config | Mapping[str, Any] | None = None,
    evaluation: bool = False,
    trainable: TrainableOption = None,
    compiler_options: Mapping[str, Any] | None = None,
) -> Report:
    """Compiles the whole training step, optimizer included, and reports what the compiler made of it.

    Everything is done on shapes: no weight is made, however large the model is, and no device of the mesh is asked for
    anything. So the devices may be those of `jaxpipe.topology`, and a process with one CPU device suffices. With devices
    that are there, simulated ones included, it says the same about them, except for cycles.

    Args:
      module: as for `initialize`, and so are `optimizer`, `mesh`, `config` and `trainable`.
      example: one micro-batch with the rows of all data ranks; jax.ShapeDtypeStruct will do.
      evaluation: compile the evaluation of M micro-batches (the loss, nothing else) instead; the optimizer is not used.
      compiler_options: options of XLA for this compilation, such as `{"xla_tpu_scoped_vmem_limit_kib": 65536}`.

    Returns:
      A `Report`; `print` shows it.

    Raises:
      HardwareError: the compiler refuses the step, because it does not fit into the memory, say.
      JaxpipeError: what `initialize` would raise.
    """
    pipe, layerwise, settings, root = prepared(module, optimizer, mesh, example, config, 0, trainable)
    layout = pipe.layout
    params = with_places(layout.shapes(), layout.shardings(mesh))
    states = pipe.states.avals()
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((pipe.num_micro_batches, *a.shape), a.dtype), pipe.example)
    if evaluation:
        work = _evaluation(pipe, params, states, batch)
    else:
        start = make_start(pipe.traceable_step, params, layerwise, root, mesh, settings, states)
        traced = trace_step(start.step, start.state, batch, pipe.num_micro_batches, mesh)
        kept = {"weights": start.state.params, "optimizer": start.state.opt_state}
        kept |= {LAYER_STATE: states} if jax.tree.leaves(states) else {}
        work = _Work(traced, pipe.plan(batch, KEY), kept)
    options = dict(compiler_options or {})
    if mesh.devices.flat[0].platform == "gpu":
        options = {"xla_gpu_autotune_level": "0"} | options  # tuning would run kernels on a GPU
    try:
        compiled = work.traced.lower().compile(options or None)
    except jax.errors.JaxRuntimeError as error:
        raise HardwareError(f"The compiler refuses the step: {_shortened(error)}") from error
    return examine(
        compiled,
        work.plan,
        kept={name: _bytes_on_a_device(tree) for name, tree in work.kept.items()},
        planned=_planned(work),
        known=_known(work.plan),
        counted=flops.count(work.traced.jaxpr),
        evaluation=evaluation,
    )


def _evaluation(pipe: Pipeline, params: Avals, states: Avals, batch: Batch) -> _Work:
    options = Options()
    traced = pipe.evaluator.trace(params, batch, options, states)
    kept = {"weights": params} | ({LAYER_STATE: states} if jax.tree.leaves(states) else {})
    return _Work(traced, pipe.evaluator.plan(batch, options), kept)


def _planned(work: _Work) -> dict[str, int]:
    """What the plan of a training step counts, and beside it the work of the op that makes most at once."""
    if not isinstance(work.plan, TrainPlan):
        return {}
    shared = math.prod(further_axes(work.plan.mesh).values())  # devices that share an op
    most = max(live.work(work.traced.jaxpr).values(), default=0)
    return work.plan.bytes_per_rank() | {"work": most // shared}


def _known(plan: TrainPlan | EvalPlan) -> copies.Known:
    """What the arrays of a step are, by their shapes."""
    held = plan.weights.avals()
    if isinstance(plan, EvalPlan):
        return copies.Known({copies.WEIGHTS: held, copies.MESSAGE: plan.codec.spec})
    return copies.Known(
        {
            copies.WEIGHTS: held,
            copies.GRADIENTS: jax.eval_shape(plan.weights.blank_gradients, held),
            copies.SAVED: plan.store.avals(),
            copies.MESSAGE: [plan.codecs[value].spec for value in VALUES],
        }
    )


def _bytes_on_a_device(tree: Avals) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _shortened(error: Exception) -> str:
    """The beginning of a message of XLA, which may have hundreds of lines about buffers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:4])[:1000]
