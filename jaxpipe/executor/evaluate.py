"""Forward only: the same loop with one kind of op, nothing saved, no gradients anywhere in the program."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxpipe.errors import LossError
from jaxpipe.executor import loop, reduce, stage_fns
from jaxpipe.executor.batch import batch_specs, micro_batch_avals, pick
from jaxpipe.executor.wire import Codec
from jaxpipe.lowering.program import Program
from jaxpipe.lowering.routes import FORWARD
from jaxpipe.mesh import DATA, PIPE, manual_axes
from jaxpipe.model.loss import loss_terms
from jaxpipe.model.shapes import describe
from jaxpipe.model.stages import make_stages
from jaxpipe.model.storage import Storage

P = PartitionSpec
Params = Any
Tree = Any

REDUCTIONS = ("avg", "sum", None)


def evaluate(
    storage: Storage,
    mesh: Mesh,
    program: Program,
    params: Params,
    inputs: Tree,
    labels: Tree,
    *,
    outputs: bool,
    loss: bool,
    reduce_output: str | None,
    broadcast: bool,
) -> tuple[jax.Array | None, Tree]:
    """Loss and outputs of one batch in evaluation mode; traceable.

    Args:
      inputs, labels: leaves [M, B, ...].
      outputs, loss: which of the two to compute; the other is None.
      reduce_output: "avg", "sum", or None for one value per micro-batch.
      broadcast: the loss is on all ranks; otherwise it is there for the last rank only.

    Returns:
      The loss, a scalar or [M]; without `broadcast`, one such value per rank along dim 0, of which only the last counts.
      The outputs with leaves [S * M, B, ...], of which only the last M (those of the last rank) count.
    """
    shapes = storage.module.shapes(micro_batch_avals(inputs, mesh), storage.layer_params, train=False, key=None)
    stages = make_stages(storage, shapes)
    made = shapes[-1].outputs
    num_micro_batches = jax.tree.leaves(inputs)[0].shape[0]
    terms: Any = storage.module.loss_shapes(made, micro_batch_avals(labels, mesh)) if loss else None
    rows = jax.tree.leaves(micro_batch_avals(inputs, mesh))[0].shape[0]
    if outputs and not all(leaf.shape[:1] == (rows,) for leaf in jax.tree.leaves(made)):
        raise LossError(
            f"Outputs can be returned if their first dim is the rows of the micro-batch ({rows} on each data rank), but "
            f"the last layer returns {describe(made)}. Call without return_logits and with compute_loss."
        )
    codec = Codec([s.inputs for s in stages[1:]])
    known: dict[Any, int] = {}
    program_ids = [known.setdefault(stage.program_key(), len(known)) for stage in stages]

    def one_device(params: Params, rank: jax.Array, inputs: Tree, labels: Tree) -> Any:
        params = reduce.assemble(storage, params)

        def branch_of(kind: str, program_id: int) -> loop.Branch:
            assert kind == "F"
            stage = stages[program_ids.index(program_id)]

            def run_forward(state: Any, inbox: loop.Inbox, now: loop.Now) -> Any:
                m = now.micro_batch
                if stage.is_first:
                    x = pick(inputs, m)
                else:
                    x = codec.decode(loop.message(program, inbox, FORWARD, now), stage.inputs)
                y = stage_fns.evaluate(stage, params, x)
                if not stage.is_last:
                    return {}, {FORWARD: codec.encode(y)}
                if loss:
                    total, weight, _ = loss_terms(storage.module.loss_fn, y, pick(labels, m))
                    total, weight = state["total"].at[m].set(total), state["weight"].at[m].set(weight)
                    state = {**state, "total": total, "weight": weight}
                if outputs:
                    kept = jax.tree.map(lambda kept, new: kept.at[m].set(new), state["outputs"], y)
                    state = {**state, "outputs": kept}
                return state, {}

            return run_forward, tuple(state) if stage.is_last else ()

        state: dict[str, Any] = {}
        if loss:
            state["total"] = jnp.zeros((num_micro_batches,), terms[0].dtype)
            state["weight"] = jnp.zeros((num_micro_batches,), terms[1].dtype)
        if outputs:
            state["outputs"] = jax.tree.map(lambda a: jnp.zeros((num_micro_batches, *a.shape), a.dtype), made)
        state = loop.run(program, rank[0], branch_of, program_ids, state, loop.Wires(codec.spec, ()))
        value = None
        if loss:
            axes = (PIPE, DATA) if broadcast else (DATA,)
            total, weight = reduce.total((state["total"], state["weight"]), mesh, *axes)
            value = _reduce(total, weight, reduce_output)
            value = value if broadcast else value[None]
        return value, state.get("outputs")

    per_rank = P(PIPE, DATA) if DATA in mesh.axis_names else P(PIPE)
    return jax.shard_map(
        one_device,
        mesh=mesh,
        in_specs=(storage.specs, P(PIPE), batch_specs(inputs, mesh), batch_specs(labels, mesh)),
        out_specs=(P() if broadcast else P(PIPE), per_rank),
        axis_names=manual_axes(mesh),
        check_vma=False,  # as in training: users' layers need not annotate what varies
    )(params, jnp.arange(mesh.shape[PIPE], dtype=jnp.int32), inputs, labels)


def _reduce(total: jax.Array, weight: jax.Array, reduce_output: str | None) -> jax.Array:
    """Sums and weights per micro-batch -> the loss. A plain scalar loss has weight 1 on each data rank."""
    if reduce_output == "avg":
        return total.sum() / weight.sum()
    each = jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)  # nothing counted: no loss
    return each.sum() if reduce_output == "sum" else each
