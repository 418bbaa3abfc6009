"""What an evaluation adds up over micro-batches: the loss, and the metrics beside it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpipe.errors import LossError
from jaxpipe.executor import reduce
from jaxpipe.model.abstract import abstract
from jaxpipe.model.blame import Fault
from jaxpipe.model.loss import call, loss_terms, over
from jaxpipe.model.metrics import ADD, LARGER, ROWS, SMALLER, Joined, Metric, as_metrics
from jaxpipe.types import LossFn, MetricsFn, Tree

State = dict[str, Any]
Terms = dict[str, Any]  # {"loss": (total [M], weight [M]) if wanted, "metrics": {name: Joined}}


class Tally:
    """The sums of an evaluation, for one shape of micro-batch.

    Args:
      loss_fn, loss: the loss, and whether to compute it.
      metrics_fn: more metrics, `metrics_fn(outputs, labels) -> dict`, or None.
      metrics: whether metrics are wanted.
      outputs, labels: abstract values of one micro-batch on one data rank; `rows` of it.
      by_rows: a plain mean loss weighs as many as its rows, so that its terms may be added to those of micro-batches of
        another size.
      mesh: whose axes the functions may name.
    """

    def __init__(
        self,
        loss_fn: LossFn | None,
        outputs: Tree,
        labels: Tree,
        *,
        rows: int,
        num_micro_batches: int,
        loss: bool,
        metrics: bool,
        metrics_fn: MetricsFn | None,
        by_rows: bool,
        mesh: Mesh,
    ):
        self.loss_fn, self.rows, self.num_micro_batches = loss_fn, rows, num_micro_batches
        self.loss, self.metrics, self.metrics_fn, self.by_rows = loss, metrics, metrics_fn, by_rows
        self.rules: dict[str, type[Metric]] = {}
        try:
            self._avals: Any = abstract(self._score, outputs, labels, mesh=mesh)
        except Fault as fault:
            raise LossError(f"loss_fn or metrics {fault}") from fault

    def _score(self, outputs: Tree, labels: Tree) -> tuple[Any, dict[str, Any]]:
        """(total, weight) or None, and {name: terms}, of one micro-batch on one data rank."""
        scored, found = None, {}
        if self.loss:
            terms = loss_terms(self.loss_fn, outputs, labels)
            scale = self.rows if self.by_rows and terms.is_mean else 1
            scored, found = (terms.total * scale, terms.weight * scale), terms.metrics
        if not self.metrics:
            return scored, {}
        made = as_metrics(found)
        if self.metrics_fn is not None:
            more = as_metrics(call("metrics", self.metrics_fn, outputs, labels))
            if twice := sorted(made.keys() & more.keys()):
                raise LossError(
                    f"The metrics {twice} come from both loss_fn and metrics=. Rename them in one of the two."
                )
            made |= more
        self.rules = {name: type(metric) for name, metric in made.items()}
        return scored, {name: metric.terms(self.rows) for name, metric in made.items()}

    @property
    def keeps_rows(self) -> bool:
        """Whether a metric keeps a value per row."""
        return any(rule.join == ROWS for rule in self.rules.values())

    def start(self) -> State:
        """The sums of nothing."""
        scored, metrics = self._avals
        state: State = {}
        if scored is not None:
            state["loss"] = tuple(jnp.zeros((self.num_micro_batches,), a.dtype) for a in scored)
        if metrics:
            state["metrics"] = {name: self._blank(name, terms) for name, terms in metrics.items()}
        return state

    def _blank(self, name: str, terms: Any) -> Any:
        lead = (self.num_micro_batches,) if self.rules[name].join == ROWS else ()
        join = self.rules[name].join
        return tuple(jnp.full((*lead, *a.shape), _nothing(join, a.dtype), a.dtype) for a in terms)

    def add(self, state: State, micro_batch: jax.Array, outputs: Tree, labels: Tree, real: jax.Array | None) -> State:
        """The sums with one more micro-batch; if `real` is false, its rows on this data rank do not count."""
        scored, metrics = self._score(outputs, labels)
        state = dict(state)
        if scored is not None:
            each = [_where(real, value, jnp.zeros_like(value)) for value in scored]
            state["loss"] = tuple(old.at[micro_batch].set(new) for old, new in zip(state["loss"], each, strict=True))
        if metrics:
            joined = {}
            for name, terms in metrics.items():
                joined[name] = self._joined(name, state["metrics"][name], terms, micro_batch, real)
            state["metrics"] = joined
        return state

    def _joined(self, name: str, old: Any, new: Any, micro_batch: jax.Array, real: jax.Array | None) -> Any:
        join = self.rules[name].join
        if join == ROWS:
            return tuple(a.at[micro_batch].set(b) for a, b in zip(old, new, strict=True))
        function = {ADD: jnp.add, LARGER: jnp.maximum, SMALLER: jnp.minimum}[join]
        return tuple(_where(real, function(a, b), a) for a, b in zip(old, new, strict=True))

    def reduced(self, state: State, place: jax.Array, mesh: Any, *axes: str) -> Terms:
        """Sums over mesh axes, in one reduction; values per row stay where they are.

        Args:
          place: number of this device among those of the axes.
        """
        metrics = state.get("metrics", {})
        sums = {name: terms for name, terms in metrics.items() if self.rules[name].join == ADD}
        extremes = {name: terms for name, terms in metrics.items() if self.rules[name].join in (LARGER, SMALLER)}
        loss, sums, each = reduce.joined((state.get("loss"), sums), extremes, place, mesh, *axes)
        for name, terms in each.items():
            extreme = jnp.max if self.rules[name].join == LARGER else jnp.min
            sums[name] = tuple(extreme(a, axis=0) for a in terms)
        found: Terms = {} if loss is None else {"loss": loss}
        found["metrics"] = {name: Joined(terms, self.rules[name]) for name, terms in sums.items()}
        return found

    def kept_rows(self, state: State) -> dict[str, jax.Array]:
        """Per metric that keeps a value per row: [M, rows, ...]."""
        metrics = state.get("metrics", {})
        return {name: terms[0] for name, terms in metrics.items() if self.rules[name].join == ROWS}


def loss_of(terms: tuple[Any, Any], reduce_output: str | None) -> Any:
    """Totals and weights per micro-batch, summed over data ranks -> the loss, a scalar or [M]."""
    total, weight = terms
    if reduce_output == "avg":
        return over(total.sum(), weight.sum())
    each = over(total, weight)
    return each.sum() if reduce_output == "sum" else each


def _nothing(join: str, dtype: Any) -> Any:
    """What changes nothing when it is joined."""
    if join not in (LARGER, SMALLER):
        return 0
    if jnp.issubdtype(dtype, jnp.floating):
        return -np.inf if join == LARGER else np.inf
    return jnp.iinfo(dtype).min if join == LARGER else jnp.iinfo(dtype).max


def _where(real: jax.Array | None, value: jax.Array, otherwise: jax.Array) -> jax.Array:
    return value if real is None else jnp.where(real, value, otherwise)
