"""What an evaluation computes, from the keywords of a call to the form of its answer."""

from dataclasses import dataclass
from typing import Any

import jax

from jaxpipe.errors import ConfigError
from jaxpipe.types import MetricsFn, Tree

REDUCTIONS = ("avg", "sum", None)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an evaluation computes. Each distinct value is a program of its own.

    Attributes:
      outputs, loss, metrics: what is wanted. Without `loss` the metrics are those of the layers, `loss_fn` is not called.
      metrics_fn: more metrics than those of `loss_fn`.
      reduce_output: "avg", "sum", or None for one loss per micro-batch.
      broadcast: sums are on all ranks; otherwise on the last one only.
      raw: give the sums themselves, to be joined with those of other calls.
      spread: all ranks share the work of the tail and the loss; None decides.
    """

    outputs: bool = False
    loss: bool = True
    metrics: bool = False
    metrics_fn: MetricsFn | None = None
    reduce_output: str | None = "avg"
    broadcast: bool = True
    raw: bool = False
    spread: bool | None = None

    @classmethod
    def of(
        cls,
        *,
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        return_metrics: bool = False,
        spread_loss: bool | None = None,
    ) -> "Options":
        """The options from the keywords of `Pipeline.evaluate` and `Engine.eval_batch`.

        Raises:
          ConfigError: an unknown reduction, or keywords that contradict each other.
        """
        flags = {"return_logits": return_logits, "compute_loss": compute_loss, "bcast_loss": bcast_loss}
        for name, value in {**flags, "return_metrics": return_metrics}.items():
            if not isinstance(value, bool):
                raise ConfigError(f"{name}={value!r}: it is True or False.")
        if reduce_output not in REDUCTIONS:
            raise ConfigError(
                f'reduce_output={reduce_output!r}: it is "avg", "sum" or None (one value per micro-batch).'
            )
        if not isinstance(spread_loss, bool | None):
            raise ConfigError(f"spread_loss={spread_loss!r}: it is True, False, or None to let jaxpipe decide.")
        if spread_loss and (return_logits or not compute_loss or not bcast_loss):
            raise ConfigError(
                "spread_loss=True shares the work of the last layers and the loss among all ranks: that needs "
                "bcast_loss=True and no outputs (return_logits=False, compute_loss=True)."
            )
        return cls(
            outputs=return_logits or not compute_loss,
            loss=compute_loss,
            metrics=return_metrics,
            reduce_output=reduce_output if compute_loss else None,
            broadcast=bcast_loss or not compute_loss,
            spread=spread_loss,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Found:
    """What an evaluation has found.

    Attributes:
      loss: a scalar, or [M]; with `raw` the pair (total, weight), [M] each. None if no loss is wanted.
      metrics: results by name; with `raw` what they were joined to. Without `broadcast` loss and metrics are None in a
        process that holds no device of the last rank.
      outputs: leaves [M, B, ...], or None.
      rows: per metric that keeps a value per row, [M, B, ...] from a program and [all rows, ...] for the user.
    """

    loss: Any
    metrics: dict[str, Any] | None
    outputs: Tree
    rows: dict[str, jax.Array]

    def answer(self, options: Options) -> Any:
        """What a call returns: `loss`, `(loss, outputs)` or `outputs`, and behind it the metrics if they were asked for."""
        parts = [self.loss] if options.loss else []
        parts += [self.outputs] if options.outputs else []
        if options.metrics:
            parts.append(None if self.metrics is None else {**self.metrics, **self.rows})
        return parts[0] if len(parts) == 1 else tuple(parts)
