"""Pipeline parallelism for JAX: 1F1B as one jitted program whose memory does not grow with the number of micro-batches.

What is public: the names in `__all__` here, and in `jaxpipe.callbacks`, `jaxpipe.errors`, `jaxpipe.metrics`,
`jaxpipe.parallel`, `jaxpipe.reference` and `jaxpipe.schedules` those that their own documentation names. Everything else,
that is every other module and package below `jaxpipe`, is private, however it is spelt: it may change from one version to
the next.
"""

from importlib.metadata import PackageNotFoundError as _NotFound
from importlib.metadata import version as _version

from jaxpipe import callbacks, errors, parallel, schedules
from jaxpipe.checkpoint.load import load_layer
from jaxpipe.checkpoint.weights import load_weights, save_weights
from jaxpipe.data.pad import pad_micro_batches
from jaxpipe.engine import Engine
from jaxpipe.executor import reference
from jaxpipe.hardware.compile import compile
from jaxpipe.hardware.topology import topology
from jaxpipe.initialization import initialize
from jaxpipe.mesh import make_mesh
from jaxpipe.model import metrics
from jaxpipe.model.layer_out import LayerOut
from jaxpipe.model.loss import Weighted
from jaxpipe.model.module import PipelineModule
from jaxpipe.model.specs import Layer, LayerSpec, TiedLayerSpec
from jaxpipe.monitor.progress import Progress
from jaxpipe.pipeline import Pipeline
from jaxpipe.planner.plan import plan
from jaxpipe.processes.group import fetch
from jaxpipe.processes.rows import local_rows
from jaxpipe.processes.start import start
from jaxpipe.schedules import Schedule
from jaxpipe.trainer.trainer import Trainer
from jaxpipe.training.config import Config
from jaxpipe.training.loss_scale import DynamicScale
from jaxpipe.training.state import TrainState

__all__ = [
    "Config",
    "DynamicScale",
    "Engine",
    "Layer",
    "LayerOut",
    "LayerSpec",
    "Pipeline",
    "PipelineModule",
    "Progress",
    "Schedule",
    "TiedLayerSpec",
    "TrainState",
    "Trainer",
    "Weighted",
    "callbacks",
    "compile",
    "errors",
    "fetch",
    "initialize",
    "load_layer",
    "load_weights",
    "local_rows",
    "make_mesh",
    "metrics",
    "pad_micro_batches",
    "parallel",
    "plan",
    "reference",
    "save_weights",
    "schedules",
    "start",
    "topology",
]

try:
    __version__ = _version("jaxpipe")
except _NotFound:  # a source tree that is not installed
    __version__ = "0+unknown"
