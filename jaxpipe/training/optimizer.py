"""One optimizer step on sharded params: it clips, updates, and keeps the old state if something is not finite.

A dynamic loss scale is the one part of the state that such a step changes.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax

from jaxpipe.executor import scopes
from jaxpipe.executor.train import StepResult
from jaxpipe.model.keys import as_key
from jaxpipe.model.shapes import is_inexact
from jaxpipe.monitor.watch import StepInfo
from jaxpipe.optimizer.arguments import plain_numpy_rules
from jaxpipe.optimizer.layerwise import Layerwise
from jaxpipe.processes.rounds import Answer, refused
from jaxpipe.training.loss_scale import LossScale, dynamic, first_scale
from jaxpipe.training.norm import clipped, global_norm
from jaxpipe.training.state import TrainState
from jaxpipe.types import Key, Params, Tree


def make_step(
    value_and_grad: Callable[[Params, Tree, Tree, Key, jax.Array | None, Tree], StepResult],
    optimizer: Layerwise,
    gradient_clipping: float | None,
    loss_scale: LossScale = None,
) -> Callable[..., tuple[TrainState, StepInfo]]:
    """Makes the function of one training step.

    Args:
      value_and_grad: (params, inputs, labels, key, loss scale, layer state) -> the loss [] and its gradient, in the shapes
        of the params, neither of them scaled any more; and the new state of the layers.
      gradient_clipping: the largest norm of the whole gradient; None does not clip.
      loss_scale: how the loss is scaled; None: it is not.

    Returns:
      `step(state, inputs, labels, answer) -> (state, info)`, traceable; inputs and labels have leaves [M, B, ...]. The
      answer is that of several processes about their data, or None; if they do not agree, the state is kept, and the loss,
      which is that of some zeros, becomes NaN.
    """

    rule, first = dynamic(loss_scale), first_scale(loss_scale)

    def step(
        state: TrainState, inputs: Tree, labels: Tree, answer: Answer | None = None
    ) -> tuple[TrainState, StepInfo]:
        key = as_key(jax.random.fold_in(state.key, state.step))
        scale = None if first is None else jnp.float32(first)
        if state.loss_scale is not None:
            scale = state.loss_scale.scale
        remembers = bool(jax.tree.leaves(state.layer_state))
        result = value_and_grad(state.params, inputs, labels, key, scale, state.layer_state if remembers else None)
        loss, grads, more = result.loss, result.grads, result.metrics
        with plain_numpy_rules(), jax.named_scope(scopes.OPTIMIZER):
            norm = global_norm(grads)
            used = grads if gradient_clipping is None else clipped(grads, norm, gradient_clipping)
            updates, opt_state = optimizer.update(used, state.opt_state, state.params, value=loss, grad=grads)
            moved = optax.apply_updates(_inexact(optimizer.layout.trained(state.params)), _inexact(updates))
        params = jax.tree.map(lambda old, new: old if new is None else new, state.params, moved)
        scaling, at_floor = state.loss_scale, None
        if rule is not None and scaling is not None:
            at_floor = scaling.scale <= rule.minimum
            scaling = rule.after(scaling, jnp.isfinite(loss) & jnp.isfinite(norm))
        if answer is not None:
            loss = refused(loss, answer)
            more = {name: refused(a, answer) if is_inexact(a) else a for name, a in more.items()}
            # A step that was refused is no overflow.
            scaling = jax.tree.map(lambda n, o: jnp.where(answer.agreed, n, o), scaling, state.loss_scale)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        remembered = result.layer_state if remembers else state.layer_state
        new = TrainState(state.step + 1, params, opt_state, state.key, state.loss_scale, remembered)
        # A select per leaf fuses into the update, while a `cond` would hold both versions of the state.
        kept = jax.tree.map(lambda n, o: o if n is o else jnp.where(finite, n, o), new, state)
        return replace(kept, loss_scale=scaling), StepInfo(loss, norm, finite, scale, at_floor, more)

    return step


def _inexact(tree: Params) -> Params:
    """The tree with None in the place of leaves without derivatives, which no step changes."""
    return jax.tree.map(lambda a: a if is_inexact(a) else None, tree)
