"""Metrics that a `loss_fn` returns beside the loss. Each has a rule that joins it over micro-batches and data ranks.

    def loss_fn(logits, labels):
        hit = logits.argmax(-1) == labels
        return loss, {
            "accuracy": hit.mean(),                              # a plain value is a Mean
            "token_accuracy": ((hit * mask).sum(), mask.sum()),  # a pair, or a jaxpipe.Weighted, is a WeightedMean
            "worst": jaxpipe.metrics.Max(each.max()),
            "prediction": jaxpipe.metrics.Concat(logits.argmax(-1)),
        }

A rule has two halves. `terms` makes arrays that can be joined out of the value of one micro-batch on one data rank. They
are joined by adding them, by taking the larger or the smaller one, or by putting their rows behind each other. `finish`
makes the result out of the joined arrays. Nothing in between knows what a metric means.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxpipe.errors import LossError
from jaxpipe.model.loss import Weighted, over
from jaxpipe.model.shapes import describe, sum_dtype
from jaxpipe.types import AnyArray

__all__ = ["Concat", "Joined", "Max", "Mean", "Metric", "Min", "Sum", "WeightedMean", "as_metrics"]

Terms = tuple[AnyArray, ...]

ADD, LARGER, SMALLER, ROWS = "add", "larger", "smaller", "rows"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metric:
    """The base of the rules.

    Attributes:
      value: what the user returned for one micro-batch on one data rank: an array of any shape, or a number.
      join: how terms are joined, one of `ADD`, `LARGER`, `SMALLER` and `ROWS`.
    """

    value: ArrayLike
    join: ClassVar[str] = ADD

    def terms(self, rows: int) -> Terms:
        """The arrays that are joined.

        Args:
          rows: the number of rows of this micro-batch on this data rank, which is the weight of a plain mean.
        """
        raise NotImplementedError

    @staticmethod
    def finish(terms: Terms) -> AnyArray:
        """The result, made of the joined terms: an array of the same library."""
        return terms[0]


@jax.tree_util.register_dataclass
class Mean(Metric):
    """The mean over all rows. The value is the mean over the rows of its micro-batch; `Concat` takes a value per row."""

    def terms(self, rows: int) -> Terms:
        value = _floating(self.value)
        return value * rows, jnp.full((), rows, value.dtype)

    @staticmethod
    def finish(terms: Terms) -> AnyArray:
        return over(*terms)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WeightedMean(Metric):
    """(sum of values) / (sum of weights), exact for all weights, however uneven; 0 if the weights add up to 0.

    Attributes:
      weight: an array that broadcasts with `value`, or a number.
    """

    weight: ArrayLike

    def terms(self, rows: int) -> Terms:
        del rows
        value = _floating(self.value)
        return value, _array(self.weight).astype(value.dtype)

    @staticmethod
    def finish(terms: Terms) -> AnyArray:
        return over(*terms)


@jax.tree_util.register_dataclass
class Sum(Metric):
    """The sum over everything. Integers stay integers, of at least 32 bits."""

    def terms(self, rows: int) -> Terms:
        del rows
        return (_summable(self.value),)


@jax.tree_util.register_dataclass
class Max(Metric):
    """The largest value."""

    join = LARGER

    def terms(self, rows: int) -> Terms:
        del rows
        return (_summable(self.value),)


@jax.tree_util.register_dataclass
class Min(Metric):
    """The smallest value."""

    join = SMALLER

    def terms(self, rows: int) -> Terms:
        del rows
        return (_summable(self.value),)


@jax.tree_util.register_dataclass
class Concat(Metric):
    """All rows, in order. The value is [B, ...], with the rows of the micro-batch as its first dim."""

    join = ROWS

    def terms(self, rows: int) -> Terms:
        """The rows themselves.

        Raises:
          LossError: the first dim of the value is not the rows of the micro-batch.
        """
        value = _array(self.value)
        if value.shape[:1] != (rows,):
            raise LossError(
                f"metrics.Concat holds {describe(value)}, but its leading dim must be the rows of the micro-batch ({rows} "
                "on each data rank)."
            )
        return (value,)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Joined:
    """Terms of a metric that were joined over some micro-batches.

    Attributes:
      terms: the joined arrays.
      rule: the class of the metric.
    """

    terms: Terms
    rule: type[Metric] = field(metadata={"static": True})

    def __add__(self, other: "Joined") -> "Joined":
        """Joins the terms of two sets of micro-batches, on the device or (as NumPy arrays) on the host."""
        xp: Any = jnp if isinstance(self.terms[0], jax.Array) else np
        join = {ADD: xp.add, LARGER: xp.maximum, SMALLER: xp.minimum}[self.rule.join]
        return Joined(tuple(join(a, b) for a, b in zip(self.terms, other.terms, strict=True)), self.rule)

    def blank(self, *lead: int) -> "Joined":
        """Terms of the same shapes that change nothing when they are joined with others; `self` may be abstract.

        Args:
          lead: dims in front of those of the terms.
        """
        made = [jnp.full((*lead, *a.shape), _nothing(self.rule.join, a.dtype), a.dtype) for a in self.terms]
        return Joined(tuple(made), self.rule)

    def over_first_dim(self) -> "Joined":
        """The terms joined over their first dim, on the device."""
        join = {ADD: jnp.sum, LARGER: jnp.max, SMALLER: jnp.min}[self.rule.join]
        return Joined(tuple(join(a, axis=0).astype(a.dtype) for a in self.terms), self.rule)

    def finish(self) -> AnyArray:
        """The result of the metric, an array of the same library as the terms."""
        return self.rule.finish(self.terms)


def joinable(found: Any, rows: int) -> dict[str, Joined]:
    """The terms of the metrics that the user returned, but for those that keep a value per row.

    Args:
      rows: as for `Metric.terms`.

    Raises:
      LossError: as `as_metrics`.
    """
    made = {name: metric for name, metric in as_metrics(found).items() if metric.join != ROWS}
    return {name: Joined(metric.terms(rows), type(metric)) for name, metric in made.items()}


def _nothing(join: str, dtype: Any) -> float | int:
    """What changes nothing when it is joined."""
    if join not in (LARGER, SMALLER):
        return 0
    if jnp.issubdtype(dtype, jnp.floating):
        return -np.inf if join == LARGER else np.inf
    return jnp.iinfo(dtype).min if join == LARGER else jnp.iinfo(dtype).max


def as_metrics(found: Any) -> dict[str, Metric]:
    """Makes a dict of metrics of what the user returned. A plain value is a `Mean`, and a pair is a `WeightedMean`.

    Raises:
      LossError: it is no dict with strings as keys, a value is none of these, or a metric is named "loss".
    """
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise LossError(f"Metrics are a dict of names and values, got {found!r:.200}.")
    if "loss" in found:
        raise LossError('A metric cannot be named "loss": that is the name of the loss itself.')
    return {name: as_metric(name, value) for name, value in found.items()}


def as_metric(name: str, value: Any) -> Metric:
    """Makes one metric of what the user returned; raises LossError if it is none."""
    if isinstance(value, (tuple, list)) and len(value) == 2:
        value = WeightedMean(*value)
    elif isinstance(value, Weighted):
        value = WeightedMean(value.total, value.weight)
    elif not isinstance(value, Metric):
        value = Mean(value)  # pyright: ignore[reportArgumentType]  # judged below
    for part in (value.value, value.weight) if isinstance(value, WeightedMean) else (value.value,):
        if not isinstance(part, (jax.Array, np.ndarray, np.generic, int, float)):
            raise LossError(
                f"The metric {name!r} is a {type(part).__name__}. A metric is an array (its mean is taken), a pair "
                "(sum, weight), or one of jaxpipe.metrics.Sum, Max, Min, Concat."
            )
    return value


def _array(value: ArrayLike) -> jax.Array:
    value = jnp.asarray(value)
    return jax.lax.convert_element_type(value, value.dtype)  # not weakly typed


def _summable(value: ArrayLike) -> jax.Array:
    value = _array(value)
    if jnp.issubdtype(value.dtype, jnp.integer):
        short = jnp.iinfo(value.dtype).bits < 32  # a sum of such values would overflow soon
        wide = jnp.uint32 if jnp.issubdtype(value.dtype, jnp.unsignedinteger) else jnp.int32
        return value.astype(wide) if short else value
    return value.astype(jnp.int32 if value.dtype == bool else sum_dtype(value.dtype))


def _floating(value: ArrayLike) -> jax.Array:
    value = _summable(value)
    return value if jnp.issubdtype(value.dtype, jnp.inexact) else value.astype(jnp.zeros(()).dtype)
