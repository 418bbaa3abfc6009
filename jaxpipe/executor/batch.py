"""Batches with leaves [M, B, ...] inside a compiled step: shapes of one micro-batch on one data rank, partition specs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxpipe.mesh import DATA, data_size
from jaxpipe.model.shapes import aval
from jaxpipe.types import Tree

P = PartitionSpec


def micro_batch_avals(tree: Tree, mesh: Mesh) -> Tree:
    """Abstract values of one micro-batch on one data rank, from leaves [M, B, ...]."""

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        leaf = aval(leaf)
        return jax.ShapeDtypeStruct((leaf.shape[1] // data_size(mesh), *leaf.shape[2:]), leaf.dtype)

    return jax.tree.map(one, tree)


def batch_specs(tree: Tree, mesh: Mesh) -> Tree:
    """Rows over the data ranks; every pipeline rank has all micro-batches."""
    return jax.tree.map(lambda _: P(None, DATA) if DATA in mesh.axis_names else P(), tree)


def pick(tree: Tree, micro_batch: jax.Array) -> Tree:
    """One micro-batch of leaves [M, ...]."""
    at = micro_batch.astype(jnp.uint32)  # unsigned: no code for negative indices, which would have M in it
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, at, keepdims=False), tree)
