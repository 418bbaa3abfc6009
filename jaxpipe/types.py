"""The names of the types that run through jaxpipe, in one place.

Python has no type for "a pytree of arrays", so a type checker takes the trees below for `Any`. To a reader each name is a
promise about what the tree holds. Letters in shapes: M micro-batches, B rows, S stages, K slots.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np

# Any pytree of arrays: what users' layers take and return, and what loss functions get.
Tree: TypeAlias = Any
# A pytree of `jax.ShapeDtypeStruct`: the shapes and dtypes of a `Tree`, without its numbers.
Avals: TypeAlias = Any
# A pytree of arrays that are weights, or of their gradients: of one layer, or the params tree of a pipeline.
Params: TypeAlias = Any
# (inputs, labels) of a micro-batch, leaves [B, ...], or of a batch, leaves [M, B, ...].
Batch: TypeAlias = tuple[Tree, Tree]
# An array of JAX on a device, or of NumPy on the host.
AnyArray: TypeAlias = jax.Array | np.ndarray
# The arrays of a tree, or some of them, in the order of `jax.tree.leaves`.
Leaves: TypeAlias = list[Any]
# The path of a leaf in a tree, as `jax.tree_util.tree_flatten_with_path` gives it: entries such as `DictKey("w")`.
KeyPath: TypeAlias = tuple[Any, ...]
# The structure of a tree: a `jax.tree_util.PyTreeDef`, which type checkers cannot see.
Structure: TypeAlias = Any
# A typed PRNG key without dims, as `jax.random.key` makes it.
Key: TypeAlias = jax.Array
# The dims of an array.
Shape: TypeAlias = tuple[int, ...]
# `loss_fn(outputs, labels)`: a scalar mean, a `Weighted`, or either with metrics; see `PipelineModule`.
LossFn: TypeAlias = Callable[[Tree, Tree], Any]
# `metrics(outputs, labels) -> {name: metric}`; see `jaxpipe.metrics`.
MetricsFn: TypeAlias = Callable[[Tree, Tree], dict[str, Any]]
