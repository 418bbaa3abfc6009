"""The state of a layer from one micro-batch to the next: its form, and which parts of it a layer changes.

State is what a layer remembers beside its params, such as running means. It keeps the structure, the shapes and the dtypes
that `init` gave it, because it is carried through a compiled loop, and stored next to that of other layers.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from jaxpipe.model.blame import Fault
from jaxpipe.model.forwarded import origin
from jaxpipe.model.paths import path_text
from jaxpipe.model.shapes import describe, is_key
from jaxpipe.types import Avals, KeyPath, Tree

NO_STATE = "has state, and was given none. Pass layer_state, as pipe.init_state or engine.layer_state makes it."


def settled(old: Tree, new: Tree) -> Tree:
    """What a layer has returned as its new state, in the form of the old one: floats in the dtype that they had.

    Raises:
      Fault: it has another structure, or an array of another shape or kind.
    """
    before, after = (jax.tree_util.tree_flatten_with_path(tree) for tree in (old, new))
    if before[1] != after[1]:
        raise Fault(
            f"changes the structure of its state from {describe(old)} to {describe(new)}. What a layer returns as its "
            "state has the structure, the shapes and the dtypes of what its init made: make every entry in init."
        )
    pairs = zip(before[0], after[0], strict=True)
    return jax.tree.unflatten(after[1], [_settled(path, a, b) for (path, a), (_, b) in pairs])


def _settled(path: KeyPath, old: jax.Array, new: jax.Array) -> jax.Array:
    floats = jnp.issubdtype(old.dtype, jnp.floating) and jnp.issubdtype(new.dtype, jnp.floating)
    if old.shape != new.shape or (old.dtype != new.dtype and not floats):
        raise Fault(
            f"changes its state {path_text(path)!r} from {describe(old)} to {describe(new)}. State keeps the shape and the "
            "dtype that init gave it: return it so."
        )
    # State is stored long whatever a step computes in, so what comes of short activations is cast back.
    return new if old.dtype == new.dtype else new.astype(old.dtype)


def check_state(state: Avals) -> None:
    """Raises Fault if a layer has state that cannot be carried, which are PRNG keys."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        if is_key(leaf):
            raise Fault(
                f"has the PRNG key {path_text(path)!r} in its state. The keys of a layer are made of that of the step: let "
                "apply take the keyword `key`, or draw from nnx.Rngs."
            )


def changes(traced: ClosedJaxpr, first_result: int, first_argument: int, count: int) -> tuple[bool, ...]:
    """For each leaf of the state of a layer, whether the layer changes it.

    Args:
      traced: the layer, as `jax.make_jaxpr` returns it.
      first_result, first_argument: where the leaves of its state begin, among the results and among the arguments.
      count: how many there are.
    """
    return tuple(origin(traced, first_result + n) != first_argument + n for n in range(count))


def paths_of(state: Avals, chosen: Sequence[bool]) -> list[str]:
    """The paths of those leaves of a state that are chosen, for messages."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return [path_text(path) or "it" for (path, _), wanted in zip(leaves, chosen, strict=True) if wanted]
