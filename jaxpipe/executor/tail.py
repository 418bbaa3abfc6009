"""The tail: the trailing single layers of the last stage, and the loss.

In training it runs in the backward op alone, forward and backward at once: the forward op stops before it and keeps its
input. So logits are never kept, and the output projection is never computed twice, whatever the rematerialisation. On the
last rank B follows F at once in 1F1B, so waiting for B costs nothing. An evaluation may share it out over the ranks.
"""

from collections.abc import Sequence

import jax

from jaxpipe.executor.unit import run_parts, split_inexact
from jaxpipe.model.capture import capture
from jaxpipe.model.loss import loss_terms
from jaxpipe.model.shapes import aval
from jaxpipe.model.stages import Part, Stage
from jaxpipe.types import Avals, Key, Leaves, LossFn, Params, Tree

# (total of the loss, gradients of the inexact leaves of the params, those of the inexact leaves of the input)
LossAndGradient = tuple[jax.Array, Leaves, Leaves]


def split_tail(stage: Stage) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The parts of a stage up to its tail, and those of the tail: none unless it is the last stage."""
    parts, start = stage.parts, len(stage.parts)
    while stage.is_last and start and parts[start - 1].is_single:
        start -= 1
    return parts[:start], parts[start:]


class Tail:
    """Loss and gradient of a tail, captured.

    Args:
      parts: its layers, which may be none.
      loss_fn: see `PipelineModule`.
      params, inputs, layer_keys, labels: abstract values; params and keys per part.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        loss_fn: LossFn | None,
        params: Avals,
        inputs: Avals,
        layer_keys: Sequence[Key | None],
        labels: Avals,
    ):
        self.parts, self.params, self.inputs = tuple(parts), params, inputs

        def loss(params: Params, x: Tree, layer_keys: Tree, labels: Tree) -> jax.Array:
            y = run_parts(self.parts, params, x, layer_keys)
            return loss_terms(loss_fn, y, labels).total

        def gradient(params: Params, x: Tree, layer_keys: Tree, labels: Tree, seed: jax.Array) -> LossAndGradient:
            param_leaves, with_params = split_inexact(params)
            x_leaves, with_x = split_inexact(x)

            def of_leaves(param_leaves: Leaves, x_leaves: Leaves) -> jax.Array:
                return loss(with_params(param_leaves), with_x(x_leaves), layer_keys, labels)

            total, pullback = jax.vjp(of_leaves, param_leaves, x_leaves)
            return total, *pullback(seed)

        total = aval(jax.eval_shape(loss, params, inputs, layer_keys, labels))
        self._gradient = capture(gradient, params, inputs, layer_keys, labels, total)

    def loss_and_gradient(
        self, params: Params, x: Tree, layer_keys: Tree, labels: Tree, seed: jax.Array
    ) -> LossAndGradient:
        """The total of the loss of one micro-batch on one data rank, and its gradients.

        Args:
          x: the tail's input, of one micro-batch on one data rank.
          seed: the gradient of the mean loss by this total, which the backward pass starts from.
        """
        return self._gradient(params, x, layer_keys, labels, seed)
