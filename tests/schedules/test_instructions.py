"""The instruction streams against worked tables, and against each other."""

import re

import pytest

from jaxpipe.errors import ScheduleError
from jaxpipe.schedules import (
    BackwardPass,
    BufferOpInstruction,
    ForwardPass,
    InferenceSchedule,
    LoadMicroBatch,
    OptimizerStep,
    PipeInstruction,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    ReduceTiedGrads,
    SendActivation,
    SendGrad,
    TrainSchedule,
    one_f_one_b,
)

# One line per step, one column per stage. `x@b` is micro-batch x in buffer b; L load, F forward, B backward, SA / RA
# send / receive activation, SG / RG send / receive gradient, TAIL the three commands that end the batch.
TRAIN_M4_S3 = """
L0@0 F0@0            | -                    | -
SA0@0                | RA0@0 F0@0           | -
L1@1 F1@1            | SA0@0                | RA0@0 L0@0 F0@0
SA1@1                | RA1@1 F1@1           | B0@0
L2@2 F2@2            | RG0@0 SA1@1 B0@0     | SG0@0 RA1@1 L1@1 F1@1
RG0@0 SA2@2 B0@0     | SG0@0 RA2@0 F2@0     | B1@1
L3@0 F3@0            | RG1@1 SA2@0 B1@1     | SG1@1 RA2@0 L2@0 F2@0
RG1@1 SA3@0 B1@1     | SG1@1 RA3@1 F3@1     | B2@0
-                    | RG2@0 SA3@1 B2@0     | SG2@0 RA3@1 L3@1 F3@1
RG2@2 B2@2           | SG2@0                | B3@1
-                    | RG3@1 B3@1           | SG3@1
RG3@0 B3@0 TAIL      | SG3@1 TAIL           | TAIL
"""
TRAIN_M2_S3 = """
L0@0 F0@0            | -                    | -
SA0@0                | RA0@0 F0@0           | -
L1@1 F1@1            | SA0@0                | RA0@0 L0@0 F0@0
SA1@1                | RA1@1 F1@1           | B0@0
-                    | RG0@0 SA1@1 B0@0     | SG0@0 RA1@1 L1@1 F1@1
RG0@0 B0@0           | SG0@0                | B1@1
-                    | RG1@1 B1@1           | SG1@1
RG1@1 B1@1 TAIL      | SG1@1 TAIL           | TAIL
"""
TRAIN_M2_S1 = """
L0@0 F0@0
B0@0
L1@1 F1@1
B1@1 TAIL
"""
INFERENCE_M4_S3 = """
L0@0 F0@0            | -                    | -
L1@1 SA0@0 F1@1      | RA0@0 F0@0           | -
L2@0 SA1@1 F2@0      | RA1@1 SA0@0 F1@1     | L0@0 RA0@0 F0@0
L3@1 SA2@0 F3@1      | RA2@0 SA1@1 F2@0     | L1@1 RA1@1 F1@1
SA3@1                | RA3@1 SA2@0 F3@1     | L2@0 RA2@0 F2@0
-                    | SA3@1                | L3@1 RA3@1 F3@1
"""
CLASSES = {
    "L": LoadMicroBatch,
    "F": ForwardPass,
    "B": BackwardPass,
    "SA": SendActivation,
    "RA": RecvActivation,
    "SG": SendGrad,
    "RG": RecvGrad,
}
TAIL = [(ReduceTiedGrads(), None), (ReduceGrads(), None), (OptimizerStep(), None)]
GRID = [(m, s) for m in range(1, 9) for s in range(1, 6)]


def parse(cell):
    for word in cell.split():
        if word == "TAIL":
            yield from TAIL
        elif word != "-":
            name, micro_batch, buffer_id = re.fullmatch(r"([A-Z]+)(\d+)@(\d+)", word).groups()
            yield CLASSES[name](buffer_id=int(buffer_id)), int(micro_batch)


@pytest.mark.parametrize(
    ("kind", "m", "s", "text"),
    [
        (TrainSchedule, 4, 3, TRAIN_M4_S3),
        (TrainSchedule, 2, 3, TRAIN_M2_S3),
        (TrainSchedule, 2, 1, TRAIN_M2_S1),
        (InferenceSchedule, 4, 3, INFERENCE_M4_S3),
    ],
)
def test_worked_tables(kind, m, s, text):
    lines = [line.split("|") for line in text.strip().splitlines()]
    for stage in range(s):
        steps = [[(command, getattr(command, "micro_batch", None)) for command in step] for step in kind(m, s, stage)]
        assert steps == [list(parse(line[stage])) for line in lines], f"stage {stage}"


@pytest.mark.parametrize("kind", [TrainSchedule, InferenceSchedule])
@pytest.mark.parametrize(("m", "s"), GRID)
def test_every_send_meets_its_receive_in_the_same_step(kind, m, s):
    streams = [list(kind(m, s, stage).steps()) for stage in range(s)]
    for send, receive, offset in ((SendActivation, RecvActivation, 1), (SendGrad, RecvGrad, -1)):
        sent, received = [], []
        for stage, stream in enumerate(streams):
            for step, commands in enumerate(stream):
                sent += [(step, stage + offset, c.micro_batch) for c in commands if type(c) is send]
                received += [(step, stage, c.micro_batch) for c in commands if type(c) is receive]
        assert sorted(sent) == sorted(received)
        expected = 0 if kind is InferenceSchedule and send is SendGrad else m * (s - 1)
        assert len(sent) == len(set(sent)) == expected


@pytest.mark.parametrize("kind", [TrainSchedule, InferenceSchedule])
@pytest.mark.parametrize(("m", "s"), GRID)
def test_buffers_are_enough(kind, m, s):
    """Replays every stream: nothing is overwritten before its last use, and every use finds its own micro-batch."""
    for stage in range(s):
        schedule = kind(m, s, stage)
        in_flight, peak = set(), 0
        holds = {}
        steps = list(schedule.steps())
        for commands in steps:
            for command in commands:
                if not isinstance(command, BufferOpInstruction):
                    continue
                assert 0 <= command.buffer_id < schedule.num_pipe_buffers()
                if isinstance(command, (LoadMicroBatch, RecvActivation)):
                    assert holds.get(command.buffer_id) in {None, command.micro_batch} or (
                        holds[command.buffer_id] not in in_flight
                    ), "overwrites a micro-batch that is still needed"
                    holds[command.buffer_id] = command.micro_batch
                assert holds[command.buffer_id] == command.micro_batch or isinstance(command, SendGrad)
                if kind is TrainSchedule and isinstance(command, ForwardPass):
                    in_flight.add(command.micro_batch)
                if isinstance(command, BackwardPass):
                    in_flight.remove(command.micro_batch)
                peak = max(peak, len(in_flight))
        if kind is TrainSchedule:
            assert peak == min(s - stage, m)
            assert schedule.num_pipe_buffers() == max(2, min(s - stage, m))
            assert len(steps) == 2 * (m + s - 1)
            assert all(not isinstance(c, OptimizerStep) for step in steps[:-1] for c in step)
            assert steps[-1][-3:] == [ReduceTiedGrads(), ReduceGrads(), OptimizerStep()]
        else:
            assert schedule.num_pipe_buffers() == 2
            assert len(steps) == m + s - 1


@pytest.mark.parametrize(("m", "s"), GRID)
def test_train_schedule_is_the_table(m, s):
    for stage, row in enumerate(one_f_one_b(s, m).ticks):
        for op, commands in zip(row, TrainSchedule(m, s, stage), strict=True):
            computed = [(c.name[0], c.micro_batch) for c in commands if isinstance(c, (ForwardPass, BackwardPass))]
            assert computed == ([] if op is None else [(op.kind, op.micro_batch)])


def test_interface():
    schedule = TrainSchedule(micro_batches=4, stages=3, stage_id=1)
    assert (schedule.stage, schedule.num_stages, schedule.num_micro_batches) == (1, 3, 4)
    assert (schedule.prev_stage, schedule.next_stage) == (0, 2)
    assert not schedule.is_first_stage and not schedule.is_last_stage
    assert TrainSchedule(1, 1, 0).is_first_stage and TrainSchedule(1, 1, 0).is_last_stage
    assert list(schedule) == list(schedule), "iterating starts over"
    instruction = ForwardPass(buffer_id=0, micro_batch=2)
    assert (repr(instruction), instruction.name, instruction.kwargs) == (
        "ForwardPass(buffer_id=0)",
        "ForwardPass",
        {"buffer_id": 0},
    )
    assert repr(OptimizerStep()) == "OptimizerStep()" and OptimizerStep().kwargs == {}
    assert instruction == ForwardPass(0) and hash(instruction) == hash(ForwardPass(0))
    assert instruction != ForwardPass(1) and instruction != BackwardPass(0)
    assert isinstance(instruction, PipeInstruction)


@pytest.mark.parametrize("kind", [TrainSchedule, InferenceSchedule])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2, 0), "micro_batches=0"),
        ((4, 0, 0), "stages=0"),
        ((4, 2, 2), "stage_id=2 does not exist: with stages=2 it is 0..1"),
        ((4, 2, -1), "stage_id=-1"),
    ],
)
def test_arguments_are_checked(kind, arguments, message):
    with pytest.raises(ScheduleError, match=message):
        kind(*arguments)
