"""The tail: the trailing single layers of the last stage, and the loss.

In training it runs in the backward op alone, forward and backward at once: the forward op stops before it and keeps its
input. So logits are never kept, and the output projection is never computed twice, whatever the rematerialisation. On the
last rank B follows F at once in 1F1B, so waiting for B costs nothing. An evaluation may share it out over the ranks.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.executor import flow, passing, seeds
from jaxpipe.executor.halves import Halves
from jaxpipe.executor.seeds import Seeds
from jaxpipe.executor.trained import split_trained
from jaxpipe.executor.unit import run_parts
from jaxpipe.layout.stages import Part, Stage
from jaxpipe.model.capture import Captured, capture
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
        self._known = contexts, labels, start

    @property
    def captured(self) -> Captured:
        """`loss_and_gradient`, captured."""
        return self._gradient

    @property
    def known(self) -> tuple[Avals, Avals, Avals]:
        """Abstract values of contexts, labels and seeds."""
        return self._known

    def loss_and_gradient(self, params: Params, x: Tree, contexts: Tree, labels: Tree, start: Seeds) -> LossAndGradient:
        """The losses of one micro-batch on one data rank, and the gradients.

        Args:
          x: the tail's input, of one micro-batch on one data rank.
          start: what the backward pass starts from.
        """
        return self._gradient(params, x, contexts, labels, start)


class TailHalves:
    """A tail whose weights get their gradients in another op: I runs the tail and gives the gradient of its input.

    W has params, keys, labels and seeds again, and the input of the tail if that is in the batch. State that the layers of
    the tail change has gone on by then, so that what W needs of it crosses, like all else.

    Attributes:
      pending: abstract values of what crosses.
      early: of each gradient of the weights, whether I gives it.
    """

    def __init__(self, tail: Tail, inputs_again: bool):
        self._tail = tail
        whole, (contexts, labels, start) = tail.captured, tail.known
        total, metrics, beside, dparams, dx = whole.outputs
        self._structure = jax.tree.structure((total, metrics, beside, dx))
        before = len(jax.tree.leaves((total, metrics, beside)))
        again = jax.tree.map(lambda _: True, (tail.params, labels, start))
        x = jax.tree.map(lambda _: inputs_again, tail.inputs)
        changed = passing.numbers(tail.parts, contexts)
        keys = jax.tree.unflatten(
            jax.tree.structure(contexts), [n not in changed for n in range(len(jax.tree.leaves(contexts)))]
        )
        given = jax.tree.leaves((again[0], x, keys, *again[1:]))
        self._halves = Halves(whole, range(before, before + len(jax.tree.leaves(dparams))), given)
        self.pending, self.early = self._halves.pending, self._halves.early

    def first(
        self, params: Params, x: Tree, contexts: Tree, labels: Tree, start: Seeds
    ) -> tuple[tuple[jax.Array, dict[str, Joined], list[Aux], Leaves], list[jax.Array | None], Leaves]:
        """Arguments as for `Tail.loss_and_gradient`.

        Returns:
          What that returns without the gradients of the weights, those of these that are early (None for the others), and
          what is pending.
        """
        results, early, pending = self._halves.first(jax.tree.leaves((params, x, contexts, labels, start)))
        return jax.tree.unflatten(self._structure, results), early, pending

    def second(
        self, params: Params, x: Tree, contexts: Tree, labels: Tree, start: Seeds, pending: Leaves
    ) -> list[jax.Array | None]:
        """The gradients of the weights that are not early, None for the others. `x` may be abstract if W has not got it."""
        return self._halves.second(jax.tree.leaves((params, x, contexts, labels, start)), pending)
