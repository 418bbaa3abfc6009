"""The one `shard_map` under training and evaluation."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxpipe.executor import scopes
from jaxpipe.executor.batch import batch_specs
from jaxpipe.executor.weights import Weights
from jaxpipe.mesh import DATA, PIPE, data_size, manual_axes, pipe_size
from jaxpipe.types import Batch, Params, Tree

P = PartitionSpec


class Device(NamedTuple):
    """Where in the mesh a device is: its rank and its data rank, int32 [].

    They are inputs of the `shard_map`: `axis_index` in one branch only has upset partitioners.
    """

    rank: jax.Array
    data_rank: jax.Array


def on_every_device(
    work: Callable[..., Tree],
    weights: Weights,
    params: Params,
    batch: Batch,
    *others: Tree,
    specs: tuple[Tree, ...],
    out_specs: Tree,
) -> Tree:
    """Runs `work(device, held, inputs, labels, *others)` on every device of the mesh.

    Args:
      weights: makes what a rank holds of `params`.
      batch: leaves [M, B, ...]; a device gets the rows of its data rank.
      specs: partition specs of the others.
      out_specs: those of the results.
    """
    mesh = weights.mesh

    def one_device(params: Params, rank: jax.Array, data_rank: jax.Array, *more: Tree) -> Tree:
        with jax.named_scope(scopes.WEIGHTS):
            held = weights.enter(params, rank[0])
        return work(Device(rank[0], data_rank[0]), held, *more)

    ranks = jnp.arange(pipe_size(mesh), dtype=jnp.int32), jnp.arange(data_size(mesh), dtype=jnp.int32)
    return jax.shard_map(
        one_device,
        mesh=mesh,
        in_specs=(weights.layout.specs, P(PIPE), rows_of(mesh), *(batch_specs(tree, mesh) for tree in batch), *specs),
        out_specs=out_specs,
        axis_names=manual_axes(mesh),
        # Unchecked, so that users' layers need not annotate what varies; gradients are then summed by us, once.
        check_vma=False,
    )(params, *ranks, *batch, *others)


def rows_of(mesh: Mesh) -> PartitionSpec:
    """The spec of an array with one entry per data rank."""
    return P(DATA) if DATA in mesh.axis_names else P()
