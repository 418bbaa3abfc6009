"""What an evaluation adds up over micro-batches: the loss, and the metrics beside it."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpipe.errors import LossError
from jaxpipe.executor import reduce
from jaxpipe.executor.options import Options
from jaxpipe.model.abstract import abstract
from jaxpipe.model.blame import Fault
from jaxpipe.model.loss import call, loss_terms, over
from jaxpipe.model.metrics import ROWS, Joined, as_metrics
from jaxpipe.types import Avals, LossFn, Tree

# What is added up of a loss or of a metric.
Terms: TypeAlias = tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """What has been added up.

    Attributes:
      loss: (total, weight), [M] each, or None if no loss is wanted.
      metrics: each metric, by name.
    """

    loss: Terms | None
    metrics: dict[str, Joined]


class Tally:
    """The sums of an evaluation, for one shape of micro-batch.

    Args:
      loss_fn: the module's.
      options: which of loss and metrics are wanted. With `raw` a plain mean loss weighs as many as its rows, so that its
        terms may be added to those of micro-batches of another size.
      outputs, labels: abstract values of one micro-batch on one data rank.
      rows: how many rows it has there.
      num_micro_batches: M.
      mesh: whose axes the functions may name.
    """

    def __init__(
        self,
        loss_fn: LossFn | None,
        options: Options,
        outputs: Avals,
        labels: Avals,
        *,
        rows: int,
        num_micro_batches: int,
        mesh: Mesh,
    ):
        self.loss_fn, self.options, self.rows, self.num_micro_batches = loss_fn, options, rows, num_micro_batches
        self.mesh = mesh
        try:
            found: tuple[Avals, dict[str, Joined]] = abstract(self._score, outputs, labels, mesh=mesh)
        except Fault as fault:
            raise LossError(f"loss_fn or metrics {fault}") from fault
        self._loss, self._metrics = found
        # Per metric, the rule by which its terms are joined.
        self.rules = {name: joined.rule for name, joined in self._metrics.items()}

    def _score(self, outputs: Tree, labels: Tree) -> tuple[Terms | None, dict[str, Joined]]:
        """(total, weight) or None, and {name: terms}, of one micro-batch on one data rank."""
        scored, found = None, {}
        if self.options.loss:
            terms = loss_terms(self.loss_fn, outputs, labels)
            scale = self.rows if self.options.raw and terms.is_mean else 1
            scored, found = (terms.total * scale, terms.weight * scale), terms.metrics
        if not self.options.metrics:
            return scored, {}
        made = as_metrics(found)
        if self.options.metrics_fn is not None:
            more = as_metrics(call("metrics", self.options.metrics_fn, outputs, labels))
            if twice := sorted(made.keys() & more.keys()):
                raise LossError(
                    f"The metrics {twice} come from both loss_fn and metrics=. Rename them in one of the two."
                )
            made |= more
        return scored, {name: Joined(metric.terms(self.rows), type(metric)) for name, metric in made.items()}

    @property
    def keeps_rows(self) -> bool:
        """Whether a metric keeps a value per row."""
        return any(rule.join == ROWS for rule in self.rules.values())

    def start(self) -> Sums:
        """The sums of nothing."""
        loss = None
        if self._loss is not None:
            loss = tuple(jnp.zeros((self.num_micro_batches,), a.dtype) for a in self._loss)
        return Sums(loss, {name: self._blank(joined) for name, joined in self._metrics.items()})

    def _blank(self, joined: Joined) -> Joined:
        return joined.blank(self.num_micro_batches) if joined.rule.join == ROWS else joined.blank()

    def add(self, sums: Sums, micro_batch: jax.Array, outputs: Tree, labels: Tree, real: jax.Array | None) -> Sums:
        """The sums with one more micro-batch; if `real` is false, its rows on this data rank do not count."""
        scored, metrics = self._score(outputs, labels)
        loss = sums.loss
        if loss is not None and scored is not None:
            each = [_where(real, value, jnp.zeros_like(value)) for value in scored]
            loss = tuple(old.at[micro_batch].set(new) for old, new in zip(loss, each, strict=True))
        joined = {name: self._joined(sums.metrics[name], new, micro_batch, real) for name, new in metrics.items()}
        return Sums(loss, joined)

    def _joined(self, old: Joined, new: Joined, micro_batch: jax.Array, real: jax.Array | None) -> Joined:
        if old.rule.join == ROWS:
            return jax.tree.map(lambda a, b: a.at[micro_batch].set(b), old, new)
        return jax.tree.map(lambda both, a: _where(real, both, a), old + new, old)

    def reduced(
        self, sums: Sums, others: dict[str, Joined], place: jax.Array, *axes: str
    ) -> tuple[Terms | None, dict[str, Joined]]:
        """Loss terms and metrics summed over mesh axes, in one reduction. Values per row stay where they are.

        Args:
          others: more metrics, by name.
          place: number of this device among those of the axes.
        """
        joinable = {name: joined for name, joined in sums.metrics.items() if joined.rule.join != ROWS}
        return reduce.metrics(sums.loss, joinable | others, place, self.mesh, *axes)

    def results(self, loss: Terms | None, metrics: dict[str, Joined]) -> tuple[Any, dict[str, Any]]:
        """Loss and metrics in the form that the options ask for, from what `reduced` gives."""
        if self.options.raw:
            return loss, metrics
        made = None if loss is None else loss_of(loss, self.options.reduce_output)
        return made, {name: joined.finish() for name, joined in metrics.items()}

    def kept_rows(self, sums: Sums) -> dict[str, jax.Array]:
        """Per metric that keeps a value per row: [M, rows, ...]."""
        return {n: jnp.asarray(joined.terms[0]) for n, joined in sums.metrics.items() if joined.rule.join == ROWS}


def loss_of(terms: Terms, reduce_output: str | None) -> jax.Array:
    """Totals and weights per micro-batch, summed over data ranks -> the loss, a scalar or [M]."""
    total, weight = terms
    if reduce_output == "avg":
        return over(total.sum(), weight.sum())
    each = over(total, weight)
    return each.sum() if reduce_output == "sum" else each


def _where(real: jax.Array | None, value: jax.Array, otherwise: jax.Array) -> jax.Array:
    return value if real is None else jnp.where(real, value, otherwise)
