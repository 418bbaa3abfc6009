"""1F1B and evaluation as lists of commands for each stage, in the form of DeepSpeed's pipeline engine.

They are for code that was written for `deepspeed.runtime.pipe.schedule`, and show which stage sends what when. The class
names, the order inside a step, the buffer ids and the number of steps are those of the original. There are three
differences: arguments are checked, instructions compare by value, and a buffer instruction also has its micro-batch.

Each step is atomic: with a barrier after every step nothing deadlocks, because a send and its receive are in the same
step of the two stages. So a stage sends a result one step after it has computed it.

Source: https://github.com/deepspeedai/DeepSpeed, deepspeed/runtime/pipe/schedule.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TypeAlias

from jaxpipe.checks import as_integer, show
from jaxpipe.errors import ScheduleError
from jaxpipe.schedules.check import check_positive


@dataclass(frozen=True)
class PipeInstruction:
    """One command of a stage. Two are equal if they are the same command on the same buffer."""

    @property
    def name(self) -> str:
        """The name of the class."""
        return type(self).__name__

    @property
    def kwargs(self) -> dict[str, int]:
        """The arguments by name, without `micro_batch`, which the original does not have."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.compare}


@dataclass(frozen=True)
class BufferOpInstruction(PipeInstruction):
    """A command on one buffer.

    Attributes:
      buffer_id: the number of the buffer.
      micro_batch: the micro-batch whose data the buffer holds. It plays no part when two commands are compared.
    """

    buffer_id: int
    micro_batch: int | None = field(default=None, repr=False, compare=False)


class OptimizerStep(PipeInstruction):
    """Update the weights, after all gradients are reduced."""


class ReduceGrads(PipeInstruction):
    """Reduce the gradients of this stage over the data ranks."""


class ReduceTiedGrads(PipeInstruction):
    """Sum the gradients of tied weights over the stages that share them."""


class LoadMicroBatch(BufferOpInstruction):
    """Put the next micro-batch in the buffer: its inputs on the first stage, its labels on the last."""


class ForwardPass(BufferOpInstruction):
    """Run the stage forward."""


class BackwardPass(BufferOpInstruction):
    """Run the stage backward and add to its gradients."""


class SendActivation(BufferOpInstruction):
    """Send the outputs in the buffer to the next stage, which does `RecvActivation` in the same step."""


class RecvActivation(BufferOpInstruction):
    """Receive inputs from the previous stage."""


class SendGrad(BufferOpInstruction):
    """Send the gradient of the inputs to the previous stage, which does `RecvGrad` in the same step."""


class RecvGrad(BufferOpInstruction):
    """Receive the gradient of the outputs from the next stage."""


Step: TypeAlias = list[PipeInstruction]


class PipeSchedule(ABC):
    """The commands of one stage.

    Iterating yields the steps, as `steps()` does, any number of times.

    Args:
      micro_batches: M.
      stages: S.
      stage_id: the number of the stage, from 0.

    Raises:
      ScheduleError: a count is not positive, or the stage does not exist.
    """

    def __init__(self, micro_batches: int, stages: int, stage_id: int):
        self.micro_batches, self.stages = check_positive(micro_batches=micro_batches, stages=stages)
        number = as_integer(stage_id)
        if number is None or number not in range(self.stages):
            raise ScheduleError(
                f"stage_id={show(stage_id)} does not exist: with stages={self.stages} it is 0..{self.stages - 1}."
            )
        self.stage_id = number

    @abstractmethod
    def steps(self) -> Iterator[Step]:
        """Yields the steps in order. Each is a list of instructions, which is empty for an idle step."""

    @abstractmethod
    def num_pipe_buffers(self) -> int:
        """The number of buffers that the buffer ids of this stage refer to."""

    def __iter__(self) -> Iterator[Step]:
        return self.steps()

    @property
    def stage(self) -> int:
        """The number of the stage, from 0."""
        return self.stage_id

    @property
    def num_stages(self) -> int:
        """S."""
        return self.stages

    @property
    def num_micro_batches(self) -> int:
        """M."""
        return self.micro_batches

    @property
    def is_first_stage(self) -> bool:
        """Whether this stage takes the inputs of the model."""
        return self.stage_id == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this stage computes the loss."""
        return self.stage_id == self.stages - 1

    @property
    def prev_stage(self) -> int:
        """The stage before; -1 on the first."""
        return self.stage_id - 1

    @property
    def next_stage(self) -> int:
        """The stage after; `num_stages` on the last."""
        return self.stage_id + 1

    def _exists(self, micro_batch: int) -> bool:
        return 0 <= micro_batch < self.micro_batches


class TrainSchedule(PipeSchedule):
    """1F1B with a common clock. It has 2(M + S - 1) steps, and a stage computes in 2M of them."""

    def num_pipe_buffers(self) -> int:
        """The number of micro-batches in flight, which is the smaller one of S - stage and M, but at least two.

        With one buffer a stage would receive into the buffer that it is sending from.
        """
        return max(2, min(self.stages - self.stage_id, self.micro_batches))

    def steps(self) -> Iterator[Step]:
        num_steps = 2 * (self.micro_batches + self.stages - 1)
        for step in range(num_steps):
            # The forwards of this stage are in steps of its own parity (`one_f_one_b.py` has the formulas), so the previous
            # step was of the other kind. What that step computed is sent now, whatever is computed now.
            if self._is_forward(step):
                commands = self._forward_step(self._micro_batch(step), self._micro_batch(step - 1))
            else:
                commands = self._backward_step(self._micro_batch(step), self._micro_batch(step - 1))
            if step == num_steps - 1:
                commands += [ReduceTiedGrads(), ReduceGrads(), OptimizerStep()]
            yield commands

    def _is_forward(self, step: int) -> bool:
        return (step - self.stage_id) % 2 == 0

    def _micro_batch(self, step: int) -> int:
        """The micro-batch that the stage computes in `step`; the stage is idle if that is outside of 0..M-1."""
        if self._is_forward(step):
            return (step - self.stage_id) // 2
        return (step - 2 * self.stages + 1 + self.stage_id) // 2

    def _forward_step(self, current: int, previous: int) -> Step:
        commands: Step = []
        if not self.is_first_stage:
            if self._exists(previous):
                commands.append(SendGrad(*self._buffer(previous)))
            if self._exists(current):
                commands.append(RecvActivation(*self._buffer(current)))
        if self._exists(current):
            if self.is_first_stage or self.is_last_stage:
                commands.append(LoadMicroBatch(*self._buffer(current)))
            commands.append(ForwardPass(*self._buffer(current)))
        return commands

    def _backward_step(self, current: int, previous: int) -> Step:
        commands: Step = []
        if not self.is_last_stage:
            if self._exists(current):
                commands.append(RecvGrad(*self._buffer(current)))
            if self._exists(previous):
                commands.append(SendActivation(*self._buffer(previous)))
        if self._exists(current):
            commands.append(BackwardPass(*self._buffer(current)))
        return commands

    def _buffer(self, micro_batch: int) -> tuple[int, int]:
        return micro_batch % self.num_pipe_buffers(), micro_batch


class InferenceSchedule(PipeSchedule):
    """Forward only. It has M + S - 1 steps and two buffers: one is computed from while the other is sent and refilled."""

    def num_pipe_buffers(self) -> int:
        return 2

    def steps(self) -> Iterator[Step]:
        for step in range(self.micro_batches + self.stages - 1):
            current, previous = step - self.stage_id, step - self.stage_id - 1
            # The two buffers swap roles in every step. Counted from the start of the stage, that is the parity of the
            # micro-batch on every stage: a micro-batch arrives, is computed and leaves in buffer `micro_batch % 2`.
            yield self._step(current, previous)

    def _step(self, current: int, previous: int) -> Step:
        load: Step = []
        receive: Step = []
        send: Step = []
        compute: Step = []
        if self._exists(current):
            buffer = current % 2, current
            if self.is_first_stage or self.is_last_stage:
                load.append(LoadMicroBatch(*buffer))
            if not self.is_first_stage:
                receive.append(RecvActivation(*buffer))
            compute.append(ForwardPass(*buffer))
        if self._exists(previous) and not self.is_last_stage:
            send.append(SendActivation(previous % 2, previous))
        # Even stages send first and odd stages receive first, so that blocking transfers pair up along the pipeline.
        transfers = send + receive if self.stage_id % 2 == 0 else receive + send
        return load + transfers + compute
