"""How much memory a save takes on top of the state: less than two layers, however many there are."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, threading, tempfile
from pathlib import Path
sys.path.insert(0, {root!r})
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp, optax
import jaxpipe

def engine(width, count):
    def init(key, x):
        return {{name: jax.random.normal(key, (width, width)) for name in "ab"}}
    layers = [jaxpipe.Layer(init, lambda p, x: x @ p["a"] @ p["b"], "Layer")] * count
    example = jax.ShapeDtypeStruct((4, width), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)
    module = jaxpipe.PipelineModule(layers, lambda y, t: y.mean())
    return jaxpipe.initialize(module, optax.adam(1e-3), mesh=jaxpipe.make_mesh(pipe=4), example=example)

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

large, small = engine(1536, 8), engine(8, 4)
with tempfile.TemporaryDirectory() as folder:
    small.save_checkpoint(folder)  # imports, threads and buffers of fixed size
    start = most = resident()
    done = threading.Event()
    def watch():
        global most
        while not done.wait(0.0005):
            most = max(most, resident())
    thread = threading.Thread(target=watch)
    thread.start()
    large.save_checkpoint(folder, "large")
    done.set()
    thread.join()
print((most - start) / (6 * 1536 * 1536 * 4))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_save_takes_less_than_two_layers():
    root = str(Path(__file__).parents[2])
    run = subprocess.run([sys.executable, "-c", SCRIPT.format(root=root)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 0.1 < float(run.stdout) < 2, f"{run.stdout} layers on top of 8"
