"""Looks at the results of steps after they have finished, and tells of those that were not finite."""

import math
from typing import NamedTuple

import jax

from jaxpipe.errors import NonFiniteError
from jaxpipe.monitor.late import Late, is_ready


class StepInfo(NamedTuple):
    """What a training step reports, all scalars on the device.

    Attributes:
      loss: mean over the batch.
      grad_norm: norm of the whole gradient before clipping, over all ranks, tied weights counted once.
      finite: whether both are finite; if not, the state was kept as it was.
    """

    loss: jax.Array
    grad_norm: jax.Array
    finite: jax.Array


class Watch:
    """Raises `NonFiniteError` for a step with a loss or gradient that is not finite, some calls later."""

    def __init__(self):
        self._unchecked: Late[tuple[int, StepInfo]] = Late(lambda result: is_ready(result[1].finite))

    def add(self, call: int, info: StepInfo) -> None:
        """One more step was dispatched, by the `call`-th call of `train_batch`."""
        self._unchecked.add((call, info))

    def clear(self) -> None:
        """Forgets the steps that were not looked at yet."""
        self._unchecked.clear()

    def raise_if_not_finite(self) -> None:
        """Looks at the steps that have finished.

        Several processes must look at the same steps, or one would raise and leave the others waiting for it. They look
        at every step two calls later instead.
        """
        for call, info in self._unchecked.beyond(2) if jax.process_count() > 1 else self._unchecked.finished():
            if not bool(info.finite):
                loss, norm = float(info.loss), float(info.grad_norm)
                what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm} (loss {loss})"
                raise NonFiniteError(
                    f"Step {call} had the {what}. It did not change the state: params, optimizer state and step are those "
                    "from before it. Look at the data of that step, lower the learning rate, or clip gradients; call "
                    "train_batch again to go on with the next batch."
                )
