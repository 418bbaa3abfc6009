"""Loss and gradients of one batch: the stage functions put under the loop, one reduction after it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxpipe.executor import loop, reduce
from jaxpipe.executor.batch import batch_specs, micro_batch_avals, pick
from jaxpipe.executor.stage_program import MicroBatch, StageProgram
from jaxpipe.executor.store import Store
from jaxpipe.executor.unit import split_inexact
from jaxpipe.executor.wire import Codec
from jaxpipe.lowering.channels import BACKWARD, FORWARD
from jaxpipe.lowering.program import Program
from jaxpipe.mesh import DATA, PIPE, data_size, manual_axes
from jaxpipe.model import keys
from jaxpipe.model.layout import Layout
from jaxpipe.model.loss import LossShapes, over, weight_from_labels
from jaxpipe.model.shapes import aval, sum_dtype
from jaxpipe.model.stages import Stage, make_stages
from jaxpipe.types import LossFn, Params, Tree

P = PartitionSpec


def value_and_grad(
    layout: Layout,
    mesh: Mesh,
    program: Program,
    remat: Any,
    params: Params,
    inputs: Tree,
    labels: Tree,
    key: jax.Array | None,
    *,
    poison: bool = False,
) -> tuple[jax.Array, Params]:
    """Loss (a scalar) and its gradient (structure of `params`); traceable.

    Args:
      inputs, labels: leaves [M, B, ...], B the rows of one micro-batch on all data ranks.
      key: of the step, for dropout; None switches dropout off.
    """
    key_aval = None if key is None else aval(key)
    shapes = layout.module.shapes(micro_batch_avals(inputs, mesh), layout.layer_params, key=key_aval, mesh=mesh)
    stages = make_stages(layout, shapes)
    outputs = shapes[-1].outputs
    terms = layout.module.loss_shapes(outputs, micro_batch_avals(labels, mesh), mesh)
    forward, backward = Codec([s.inputs for s in stages[1:]]), Codec([split_inexact(s.inputs)[0] for s in stages[1:]])
    starts = jnp.asarray(layout.boundaries[:-1], jnp.int32)

    def one_device(params: Params, rank: jax.Array, data_rank: jax.Array, inputs: Tree, labels: Tree, key: Any) -> Any:
        rank, data_rank = rank[0], data_rank[0]
        params = reduce.assemble(layout, params)
        first_layer = starts[rank]
        weight = _total_weight(layout.module.loss_fn, terms, outputs, inputs, labels, mesh)
        seed = over(jnp.ones_like(weight), weight)
        store = Store()
        programs, program_ids = _distinct(
            stages, lambda stage: StageProgram(stage, params, store, remat, layout.module.loss_fn, key_aval)
        )

        def micro_batch(now: loop.Now) -> MicroBatch:
            m = now.micro_batch
            at = None if key is None else keys.micro_batch_key(key, m, data_rank)
            return MicroBatch(at, pick(inputs, m), pick(labels, m), now.saved)

        def branch_of(kind: str, program_id: int) -> loop.Branch:
            stage_program = programs[program_id]
            stage = stage_program.stage

            def run_forward(state: Any, inbox: loop.Inbox, now: loop.Now) -> Any:
                mb = micro_batch(now)
                arrived = None if stage.is_first else loop.message(program, inbox, FORWARD, now)
                x = mb.inputs if arrived is None else forward.decode(arrived, stage.inputs)
                y, buffers = stage_program.forward(params, x, mb, first_layer, state["buffers"])
                sent = {} if stage.is_last else {FORWARD: forward.encode(y)}
                return {"buffers": buffers}, sent

            def run_backward(state: Any, inbox: loop.Inbox, now: loop.Now) -> Any:
                mb, buffers, grads, total = micro_batch(now), state["buffers"], state["grads"], state["total"]
                if stage.is_last:
                    found, dy, grads = stage_program.loss_and_grad(params, mb, first_layer, buffers, grads, seed)
                    total = total + found
                else:
                    like = split_inexact(stage.outputs)[0]
                    dy = backward.decode(loop.message(program, inbox, BACKWARD, now), like)
                dx, grads = stage_program.backward(params, dy, mb, first_layer, buffers, grads)
                changed = {"grads": grads, "total": total}
                if poison:
                    changed["buffers"] = {n: b.at[now.saved].set(_spoil(b[now.saved])) for n, b in buffers.items()}
                return changed, {} if stage.is_first else {BACKWARD: backward.encode(dx)}

            if kind == "F":
                return run_forward, ("buffers",)
            return run_backward, ("grads", "total", *(["buffers"] if poison else []))

        state = {
            "buffers": store.allocate(program.saved_slots, poison),
            "grads": jax.tree.map(_accumulator, params),
            "total": jnp.zeros((), terms.total.dtype),
        }
        wires = loop.Wires(forward.spec, backward.spec)
        state = loop.run(program, rank, branch_of, program_ids, state, wires, poison=poison)
        total = reduce.total(state["total"], mesh, PIPE, DATA)
        counted = None if terms.is_mean else weight != 0
        return over(total, weight), reduce.disassemble(layout, mesh, state["grads"], counted)

    specs = (layout.specs, P(PIPE), P(DATA) if DATA in mesh.axis_names else P())
    return jax.shard_map(
        one_device,
        mesh=mesh,
        in_specs=(*specs, batch_specs(inputs, mesh), batch_specs(labels, mesh), P()),
        out_specs=(P(), layout.specs),
        axis_names=manual_axes(mesh),
        # Unchecked, so that users' layers need not annotate what varies; gradients are then summed in `reduce`, once.
        check_vma=False,
    )(params, *_ranks(mesh), inputs, labels, key)


def _total_weight(
    loss_fn: LossFn | None, terms: LossShapes, outputs: Tree, inputs: Tree, labels: Tree, mesh: Mesh
) -> jax.Array:
    """The weight of all micro-batches on all data ranks, from the labels alone.

    It is known before the loop, so that the backward passes can start from its reciprocal: they need not be linear in
    their cotangents (one may clip or round them), and then dividing at the end would give other gradients.
    """
    num_micro_batches = jax.tree.leaves(inputs)[0].shape[0]
    if terms.is_mean:
        return jnp.full((), num_micro_batches * data_size(mesh), terms.weight.dtype)

    def add(m: jax.Array, weight: jax.Array) -> jax.Array:
        return weight + weight_from_labels(loss_fn, outputs, pick(labels, m))

    start = jnp.zeros((), terms.weight.dtype)
    return reduce.total(jax.lax.fori_loop(0, num_micro_batches, add, start), mesh, DATA)


def _ranks(mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Rank and data rank as sharded inputs: axis_index in one branch only has upset partitioners before."""
    return jnp.arange(mesh.shape[PIPE], dtype=jnp.int32), jnp.arange(mesh.shape.get(DATA, 1), dtype=jnp.int32)


def _distinct(stages: list[Stage], make: Callable[[Stage], StageProgram]) -> tuple[list[StageProgram], list[int]]:
    """The distinct stage programs, and which one each stage runs."""
    programs: dict[Any, tuple[int, StageProgram]] = {}
    ids = []
    for stage in stages:
        program_key = stage.program_key()
        if program_key not in programs:
            programs[program_key] = (len(programs), make(stage))
        ids.append(programs[program_key][0])
    return [program for _, program in programs.values()], ids


def _accumulator(param: jax.Array) -> jax.Array:
    return jnp.zeros(param.shape, sum_dtype(param.dtype))


def _spoil(leaf: jax.Array) -> jax.Array:
    return jnp.full_like(leaf, jnp.nan) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf
