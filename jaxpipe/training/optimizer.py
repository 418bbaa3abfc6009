"""One optimizer step on sharded params: it clips, updates, and keeps the old state if something is not finite."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxpipe.executor.train import StepResult
from jaxpipe.model.keys import as_key
from jaxpipe.model.shapes import is_inexact
from jaxpipe.monitor.watch import StepInfo
from jaxpipe.optimizer.arguments import plain_numpy_rules
from jaxpipe.optimizer.layerwise import Layerwise
from jaxpipe.training.norm import clipped, global_norm
from jaxpipe.training.state import TrainState
from jaxpipe.types import Key, Params, Tree


def make_step(
    value_and_grad: Callable[[Params, Tree, Tree, Key], StepResult],
    optimizer: Layerwise,
    gradient_clipping: float | None,
) -> Callable[[TrainState, Tree, Tree], tuple[TrainState, StepInfo]]:
    """Makes the function of one training step.

    Args:
      value_and_grad: (params, inputs, labels, key) -> the loss [] and its gradient, in the shapes of the params.
      gradient_clipping: the largest norm of the whole gradient; None does not clip.

    Returns:
      `step(state, inputs, labels) -> (state, info)`, traceable; inputs and labels have leaves [M, B, ...].
    """

    def step(state: TrainState, inputs: Tree, labels: Tree) -> tuple[TrainState, StepInfo]:
        key = as_key(jax.random.fold_in(state.key, state.step))
        result = value_and_grad(state.params, inputs, labels, key)
        loss, grads = result.loss, result.grads
        with plain_numpy_rules():
            norm = global_norm(grads)
            used = grads if gradient_clipping is None else clipped(grads, norm, gradient_clipping)
            updates, opt_state = optimizer.update(used, state.opt_state, state.params, value=loss, grad=grads)
            moved = optax.apply_updates(_trainable(state.params), _trainable(updates))
        params = jax.tree.map(lambda old, new: old if new is None else new, state.params, moved)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = TrainState(state.step + 1, params, opt_state, state.key)
        # A select per leaf fuses into the update, while a `cond` would hold both versions of the state.
        kept = jax.tree.map(lambda n, o: o if n is o else jnp.where(finite, n, o), new, state)
        return kept, StepInfo(loss, norm, finite)

    return step


def _trainable(tree: Params) -> Params:
    """The tree with None in the place of leaves without derivatives, which no step changes."""
    return jax.tree.map(lambda a: a if is_inexact(a) else None, tree)
