"""The names of types that run through jaxpipe, in one place.

Python has no type for "a pytree of arrays", so for a type checker the trees below are `Any`. For a reader each name is a
promise about what the tree holds. Letters in shapes: M micro-batches, B rows, S stages, K slots.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax

# Any pytree: what users' layers take and return, and what loss functions get.
Tree: TypeAlias = Any
# A pytree of `jax.ShapeDtypeStruct`: the shapes and dtypes of a `Tree`, without its numbers.
Avals: TypeAlias = Any
# A pytree of arrays that are weights, or of their gradients: of one layer, or the params tree of a pipeline.
Params: TypeAlias = Any
# (inputs, labels) of a micro-batch, leaves [B, ...], or of a batch, leaves [M, B, ...].
Batch: TypeAlias = tuple[Tree, Tree]
# The arrays of a tree in the order of `jax.tree.leaves`, or some of them.
Leaves: TypeAlias = list[Any]
# A typed PRNG key without dims, of `jax.random.key`.
Key: TypeAlias = jax.Array
# The dims of an array.
Shape: TypeAlias = tuple[int, ...]
# `loss_fn(outputs, labels)`: a scalar mean, a `Weighted`, or either with metrics; see `PipelineModule`.
LossFn: TypeAlias = Callable[[Tree, Tree], Any]
# `metrics(outputs, labels) -> {name: metric}`; see `jaxpipe.metrics`.
MetricsFn: TypeAlias = Callable[[Tree, Tree], dict[str, Any]]
