"""Pipeline parallelism for JAX: 1F1B as one jitted program whose memory does not grow with the number of micro-batches."""

from importlib.metadata import PackageNotFoundError as _NotFound
from importlib.metadata import version as _version

from jaxpipe import errors as errors
from jaxpipe import schedules as schedules
from jaxpipe.checkpoint.load import load_layer as load_layer
from jaxpipe.checkpoint.weights import load_weights as load_weights
from jaxpipe.checkpoint.weights import save_weights as save_weights
from jaxpipe.engine import Engine as Engine
from jaxpipe.executor import reference as reference
from jaxpipe.initialization import initialize as initialize
from jaxpipe.mesh import make_mesh as make_mesh
from jaxpipe.model import metrics as metrics
from jaxpipe.model.layers import Layer as Layer
from jaxpipe.model.layers import LayerSpec as LayerSpec
from jaxpipe.model.layers import TiedLayerSpec as TiedLayerSpec
from jaxpipe.model.loss import Weighted as Weighted
from jaxpipe.model.module import PipelineModule as PipelineModule
from jaxpipe.pipeline import Pipeline as Pipeline
from jaxpipe.training.config import Config as Config
from jaxpipe.training.state import TrainState as TrainState

try:
    __version__ = _version("jaxpipe")
except _NotFound:  # a source tree that is not installed
    __version__ = "0+unknown"
