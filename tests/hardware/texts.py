"""Small modules as XLA prints them, cut down to what reports read. 2 pipeline ranks x 2 data ranks.

`TPU` has one loop of 5 iterations over ticks, with a branch F0 (a loop of 2 layers inside), a branch B0 with a tail, and a
permute behind each. In `GPU`, loops say how often they run, and a start says whether it is asynchronous at all.
"""

from pathlib import Path
from types import SimpleNamespace

MESH = SimpleNamespace(shape={"pipe": 2, "data": 2}, size=4, axis_names=("pipe", "data"))
TPU, GPU = ((Path(__file__).parent / name).read_text() for name in ("step_tpu.hlo", "step_gpu.hlo"))
