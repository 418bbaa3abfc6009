"""The exceptions that jaxpipe raises, with one class for each recurrent mistake.

Every class is a `ValueError`: what the user passed was wrong. The message says what was passed, the rule, and the way out.
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "HardwareError",
    "JaxpipeError",
    "LayerError",
    "LossError",
    "MeshError",
    "NonFiniteError",
    "PartitionError",
    "ScheduleError",
    "ShardingError",
]


class JaxpipeError(ValueError):
    """The base of all exceptions that jaxpipe raises on purpose."""


class ScheduleError(JaxpipeError):
    """A schedule table is wrong or deadlocks, or the name of a schedule is not known.

    Wrong: `Schedule(rows=[[F0, F0]], ...)`. Right: every op occurs exactly once, after the ops that it needs.
    """


class PartitionError(JaxpipeError):
    """The layers cannot be cut into stages in the way that was asked for.

    Wrong: `PipelineModule(layers, partition_method=[0, 9])` for eight layers. Right: `[0, 4, 8]`.
    """


class MeshError(JaxpipeError):
    """The device mesh cannot be made, or lacks the axis `"pipe"`.

    Wrong: `make_mesh(pipe=4)` on one device. Right: simulate devices first, as the message explains.
    """


class ShardingError(JaxpipeError):
    """A rule or an annotation that cuts params over further mesh axes does not fit the mesh or the params.

    Wrong: `PipelineModule(..., sharding=[("kernel", P(None, "modle"))])`. Right: an axis of the mesh, and a dim
    that its size divides.
    """


class LayerError(JaxpipeError):
    """A layer cannot be built, or does not accept what the layer before it returns."""


class LossError(JaxpipeError):
    """`loss_fn` is missing where it is needed, or does not return what the rules allow."""


class DataError(JaxpipeError):
    """A batch or iterator does not fit the number of micro-batches, the data ranks, or the model."""


class ConfigError(JaxpipeError):
    """A configuration key is unknown or its value is out of range."""


class CheckpointError(JaxpipeError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class HardwareError(JaxpipeError):
    """A topology is not known, or its compiler is not installed.

    Wrong: `topology("v5e")`. Right: `topology("v5e:2x4")`, in an environment with `pip install jaxpipe[tpu]`.
    """


class NonFiniteError(JaxpipeError):
    """The loss or the gradient norm of a step was not finite. That step did not change the state."""
