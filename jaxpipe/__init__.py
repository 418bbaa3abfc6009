"""Pipeline parallelism for JAX: 1F1B as one jitted program whose memory does not grow with the number of micro-batches."""

from jaxpipe.mesh import make_mesh as make_mesh
from jaxpipe.model.layers import Layer as Layer
from jaxpipe.model.layers import LayerSpec as LayerSpec
from jaxpipe.model.layers import TiedLayerSpec as TiedLayerSpec
from jaxpipe.model.module import PipelineModule as PipelineModule
from jaxpipe.pipeline import Pipeline as Pipeline
from jaxpipe.executor import reference as reference
