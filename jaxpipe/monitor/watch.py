"""Looks at the results of steps after they have finished, so that the host never waits for one."""

import math
from collections import deque
from typing import Any

import jax

from jaxpipe.errors import NonFiniteError
from jaxpipe.training.optimizer import StepInfo


class Watch:
    """Raises `NonFiniteError` for a step with a loss or gradient that is not finite, some calls later."""

    def __init__(self):
        self._unchecked: deque[tuple[int, StepInfo]] = deque()

    def add(self, call: int, info: StepInfo) -> None:
        """One more step was dispatched, by the `call`-th call of `train_batch`."""
        self._unchecked.append((call, info))

    def clear(self) -> None:
        """Forgets the steps that were not looked at yet."""
        self._unchecked.clear()

    def raise_if_not_finite(self) -> None:
        """Looks at the steps that have finished."""
        while self._unchecked and self._may_look():
            call, info = self._unchecked.popleft()
            if not bool(info.finite):
                loss, norm = float(info.loss), float(info.grad_norm)
                what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm} (loss {loss})"
                raise NonFiniteError(
                    f"Step {call} had the {what}. It did not change the state: params, optimizer state and step are those "
                    "from before it. Look at the data of that step, lower the learning rate, or clip gradients; call "
                    "train_batch again to go on with the next batch."
                )

    def _may_look(self) -> bool:
        """Whether to look at the oldest unchecked step: when it has finished, so that the host never waits.

        Several processes must look at the same steps, or one would raise and leave the others waiting for it. They look
        at every step two calls later instead.
        """
        if jax.process_count() > 1:
            return len(self._unchecked) > 2
        finite: Any = self._unchecked[0][1].finite
        return finite.is_ready()
