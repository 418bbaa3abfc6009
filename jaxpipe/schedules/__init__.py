"""Pipeline schedules as data: tables of ops, checked when made, timed on paper; public. Pure Python, no JAX below here."""

from jaxpipe.schedules.draw import draw
from jaxpipe.schedules.eager_one_f_one_b import eager_one_f_one_b
from jaxpipe.schedules.forward_only import forward_only
from jaxpipe.schedules.gpipe import gpipe
from jaxpipe.schedules.instructions import (
    BackwardPass,
    BufferOpInstruction,
    ForwardPass,
    InferenceSchedule,
    LoadMicroBatch,
    OptimizerStep,
    PipeInstruction,
    PipeSchedule,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    ReduceTiedGrads,
    SendActivation,
    SendGrad,
    TrainSchedule,
)
from jaxpipe.schedules.interleaved import interleaved
from jaxpipe.schedules.interleaved_zero_bubble import interleaved_zero_bubble
from jaxpipe.schedules.looped_bfs import looped_bfs
from jaxpipe.schedules.one_f_one_b import one_f_one_b
from jaxpipe.schedules.op import Op
from jaxpipe.schedules.registry import get
from jaxpipe.schedules.render import render
from jaxpipe.schedules.simulate import Timeline, simulate
from jaxpipe.schedules.table import Schedule
from jaxpipe.schedules.zbv import zbv
from jaxpipe.schedules.zero_bubble import zero_bubble

__all__ = [
    "BackwardPass",
    "BufferOpInstruction",
    "ForwardPass",
    "InferenceSchedule",
    "LoadMicroBatch",
    "Op",
    "OptimizerStep",
    "PipeInstruction",
    "PipeSchedule",
    "RecvActivation",
    "RecvGrad",
    "ReduceGrads",
    "ReduceTiedGrads",
    "Schedule",
    "SendActivation",
    "SendGrad",
    "Timeline",
    "TrainSchedule",
    "draw",
    "eager_one_f_one_b",
    "forward_only",
    "get",
    "gpipe",
    "interleaved",
    "interleaved_zero_bubble",
    "looped_bfs",
    "one_f_one_b",
    "render",
    "simulate",
    "zbv",
    "zero_bubble",
]
