"""Looks at the results of steps after they have finished, and reports those that changed nothing."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxpipe.errors import DataError, NonFiniteError
from jaxpipe.monitor.late import Late, is_ready

# How many steps may be running, with several processes, before the oldest one is looked at.
LATE = 2
# So many steps in a row that overflow at the smallest loss scale are an error: the scale is not what is wrong with them.
# One or two may be an odd batch, and a step that overflows above the floor may be right once the scale has come down.
PATIENCE = 20


class StepInfo(NamedTuple):
    """What a training step reports, as scalars [] on the device.

    Attributes:
      loss: the mean over the batch, float32 or wider.
      grad_norm: the norm of the whole gradient before clipping, over all ranks, with tied weights counted once.
      finite: bool, whether both are finite. If not, the state was kept as it was.
      loss_scale: by which the loss was multiplied on the way back, float32; None if it was not.
      at_floor: bool, whether that was the smallest one there may be. None unless the scale is dynamic.
      more: the extra losses of layers, their metrics and those of `loss_fn`, by name.
    """

    loss: jax.Array
    grad_norm: jax.Array
    finite: jax.Array
    loss_scale: jax.Array | None = None
    at_floor: jax.Array | None = None
    more: dict[str, jax.Array] = {}  # nobody writes to it

    def metrics(self) -> dict[str, jax.Array]:
        """What users are shown of a step, by name."""
        found = {"loss": self.loss, "grad_norm": self.grad_norm, **self.more}
        return found if self.loss_scale is None else {**found, "loss_scale": self.loss_scale}


class Dispatched(NamedTuple):
    """A training step that was dispatched.

    Attributes:
      call: which call of `train_batch` it was, from 1.
      info: what it reports.
      fault: says why it was skipped, or None if it was not; None in its place if it cannot be skipped.
    """

    call: int
    info: StepInfo
    fault: Callable[[], DataError | None] | None = None


class Watch:
    """Raises an error for a step that changed nothing, some calls after that step.

    Args:
      skipped: called with the number of steps that were skipped because processes did not agree about their data.
    """

    def __init__(self, skipped: Callable[[int], None] = lambda steps: None):
        self._unchecked: Late[Dispatched] = Late(lambda step: is_ready(step.info.finite))
        self._skipped = skipped
        self._error: DataError | None = None  # found, and not yet raised
        self._at_floor = 0  # steps in a row that overflowed at the smallest loss scale

    def add(self, call: int, info: StepInfo, fault: Callable[[], DataError | None] | None = None) -> None:
        """Adds a step that the `call`-th call of `train_batch` has dispatched."""
        self._unchecked.add(Dispatched(call, info, fault))

    def clear(self) -> None:
        """Forgets the steps that have not been looked at yet."""
        self._unchecked.clear()
        self._error, self._at_floor = None, 0

    def settle(self) -> None:
        """Waits for steps that may have been skipped, so that they are not counted; what was wrong is raised later."""
        waiting = list(self._unchecked.beyond(0))
        for step in waiting:
            fault = None if step.fault is None else step.fault()
            if fault is None:
                self._unchecked.add(step)
            else:
                self._skipped(1)
                self._error = self._error or fault

    def raise_late(self) -> None:
        """Looks at the steps that have finished.

        Several processes must look at the same steps, or one of them would raise and leave the others waiting for it. So
        with several processes each step is looked at two calls later, finished or not.

        Raises:
          DataError: a step was skipped, because the data of some process had ended or did not fit. Later steps that are
            still running have been looked at, too, and are not told again.
          NonFiniteError: a step had a loss or a gradient that was not finite. With a dynamic loss scale: many steps in a
            row had, although the scale was the smallest one.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        late = self._unchecked.beyond(LATE) if jax.process_count() > 1 else self._unchecked.finished()
        for step in late:
            if step.fault is not None and (error := step.fault()) is not None:
                self._skipped(1)
                self.settle()
                self._error = None
                raise error
            self._check_finite(step)

    def _check_finite(self, step: Dispatched) -> None:
        info = step.info
        if bool(info.finite):
            self._at_floor = 0
            return
        loss, norm = float(info.loss), float(info.grad_norm)
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm} (loss {loss})"
        if info.at_floor is not None:
            # An overflow is how a dynamic scale learns, and no error, as long as a smaller scale may help.
            self._at_floor = self._at_floor + 1 if bool(info.at_floor) else 0
            if self._at_floor < PATIENCE:
                return
            self._at_floor = 0
            scale = float(info.loss_scale) if info.loss_scale is not None else 0.0
            raise NonFiniteError(
                f"The {PATIENCE} steps up to step {step.call} were all skipped, at the smallest loss scale, {scale:g}; "
                f"step {step.call} had the {what}. A smaller scale would not help: look at the data and at the learning "
                'rate, compute in "bfloat16", or keep layers that overflow in float32 (float32_params). The state is '
                "that from before these steps; call train_batch again to go on."
            )
        raise NonFiniteError(
            f"Step {step.call} had the {what}. It did not change the state: params, optimizer state and step are those "
            "from before it. Look at the data of that step, lower the learning rate, or clip gradients; call "
            "train_batch again to go on with the next batch."
        )
