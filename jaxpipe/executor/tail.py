"""The tail: the trailing single layers of the last stage, and the loss.

In training it runs in the backward op alone, forward and backward at once: the forward op stops before it and keeps its
input. So logits are never kept, and the output projection is never computed twice, whatever the rematerialisation. On the
last rank B follows F at once in 1F1B, so waiting for B costs nothing. An evaluation may share it out over the ranks.

Where the backward comes in two, all of the tail runs in I. For its weights to wait, the gradient of the logits would have
to, which may be the largest value of all; and the rank of the tail has it on top of its layers, and no idle time to fill.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.executor import flow, seeds
from jaxpipe.executor.seeds import Seeds
from jaxpipe.executor.trained import split_trained
from jaxpipe.executor.unit import run_parts
from jaxpipe.layout.stages import Part, Stage
from jaxpipe.model.capture import capture
from jaxpipe.model.context import Aux, Context
from jaxpipe.model.loss import loss_terms
from jaxpipe.model.metrics import Joined, joinable
from jaxpipe.model.precision import NO_CASTS, Precision
from jaxpipe.model.shapes import aval
from jaxpipe.model.values import split_inexact
from jaxpipe.types import Avals, Leaves, LossFn, Params, Tree

# (total of the loss, the metrics of `loss_fn`, what each part gives beside, gradients of the trained leaves of the params,
# those of the inexact leaves of the input)
LossAndGradient = tuple[jax.Array, dict[str, Joined], list[Aux], Leaves, Leaves]


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
      params, inputs, contexts, labels: abstract values; params and contexts per part.
      precision: in which the loss gets the outputs.
      extra: abstract value of the seed of the extra losses of the whole model, or None if it has none.
      takes: of which inexact leaves of the input gradients are needed; see `flow`.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        loss_fn: LossFn | None,
        params: Avals,
        inputs: Avals,
        contexts: Sequence[Context],
        labels: Avals,
        precision: Precision = NO_CASTS,
        extra: Avals = None,
        takes: Sequence[bool] = (),
    ):
        self.parts, self.params, self.inputs = tuple(parts), params, inputs

        def losses(params: Params, x: Tree, contexts: Tree, labels: Tree, start: Seeds) -> Any:
            y, beside = run_parts(self.parts, params, x, contexts)
            y = precision.outputs(y)
            if start.extra is not None:
                y = seeds.unless_zero(y, start.total)
            terms = loss_terms(loss_fn, y, labels)
            return (terms.total, seeds.losses_of(beside)), (joinable(terms.metrics, 1), beside)

        def gradient(params: Params, x: Tree, contexts: Tree, labels: Tree, start: Seeds) -> LossAndGradient:
            param_leaves, with_params = split_trained(self.parts, params)
            x_leaves, with_x = split_inexact(x)

            def of_leaves(param_leaves: Leaves, needed: Leaves) -> Any:
                x = with_x(flow.replaced(x_leaves, needed, takes))
                return losses(with_params(param_leaves), x, contexts, labels, start)

            some = flow.leaves(flow.needed(x_leaves, takes))
            (total, others), pullback, (metrics, beside) = jax.vjp(of_leaves, param_leaves, some, has_aux=True)
            dparams, dx = pullback((start.total, seeds.of_losses(start.extra, others)))
            return total, metrics, beside, dparams, flow.spread(dx, takes)

        def total(params: Params, x: Tree, contexts: Tree, labels: Tree) -> jax.Array:
            return losses(params, x, contexts, labels, Seeds(jnp.zeros(())))[0][0]

        start: Any = Seeds(aval(jax.eval_shape(total, params, inputs, contexts, labels)), extra)  # type: ignore[arg-type]
        self._gradient = capture(gradient, params, inputs, contexts, labels, start)

    def loss_and_gradient(self, params: Params, x: Tree, contexts: Tree, labels: Tree, start: Seeds) -> LossAndGradient:
        """The losses of one micro-batch on one data rank, and the gradients.

        Args:
          x: the tail's input, of one micro-batch on one data rank.
          start: what the backward pass starts from.
        """
        return self._gradient(params, x, contexts, labels, start)
