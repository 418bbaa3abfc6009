"""Looks at the results of steps after they have finished, and reports those that were not finite."""

import math
from typing import NamedTuple

import jax

from jaxpipe.errors import NonFiniteError
from jaxpipe.monitor.late import Late, is_ready


class StepInfo(NamedTuple):
    """What a training step reports, as scalars [] on the device.

    Attributes:
      loss: the mean over the batch, float32 or wider.
      grad_norm: the norm of the whole gradient before clipping, over all ranks, with tied weights counted once.
      finite: bool, whether both are finite. If not, the state was kept as it was.
    """

    loss: jax.Array
    grad_norm: jax.Array
    finite: jax.Array


class Watch:
    """Raises `NonFiniteError` for a step whose loss or gradient is not finite, some calls after that step."""

    def __init__(self):
        self._unchecked: Late[tuple[int, StepInfo]] = Late(lambda result: is_ready(result[1].finite))

    def add(self, call: int, info: StepInfo) -> None:
        """Adds a step that the `call`-th call of `train_batch` has dispatched."""
        self._unchecked.add((call, info))

    def clear(self) -> None:
        """Forgets the steps that have not been looked at yet."""
        self._unchecked.clear()

    def raise_if_not_finite(self) -> None:
        """Looks at the steps that have finished.

        Several processes must look at the same steps, or one of them would raise and leave the others waiting for it. So
        with several processes each step is looked at two calls later, finished or not.

        Raises:
          NonFiniteError: a step had a loss or a gradient that was not finite.
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
