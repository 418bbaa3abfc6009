"""What one of several processes does in tests/contracts/test_processes_axes.py; prints one line of JSON."""

import json
import sys

import jaxpipe

if __name__ == "__main__":
    jaxpipe.start(heartbeat_timeout=60)

import jax
import numpy as np

from tests.compare import assert_close
from tests.contracts.test_further_axes_state import STEPS, WIDTH, engine_for, stream


def main(folder):
    """Trains with the axis "model", and takes weights and state out of one engine and into another one."""
    engine = engine_for("adamw", model=2)
    data = stream(STEPS + 1)
    losses = [float(engine.train_batch(data)) for _ in range(STEPS)]
    engine.save_checkpoint(folder)
    layers = jaxpipe.fetch(engine.to_layers())
    assert layers[1]["up"].shape == (WIDTH, 2 * WIDTH)
    other = engine_for("adamw", key=4, layers=layers, model=2)
    assert_close(jaxpipe.fetch(other.to_layers()), layers, 0)
    other.load_checkpoint(folder)
    assert_close(jaxpipe.fetch(other.to_layers()), layers, 0)
    losses.append(float(other.train_batch(data)))
    return {
        "rows": jaxpipe.local_rows(engine.pipe.mesh, 4).stop,
        "losses": losses,
        "evaluation": float(engine.eval_batch(stream(1))),
        "sums": [float(np.abs(leaf).sum(dtype=np.float64)) for leaf in jax.tree.leaves(layers)],
    }


if __name__ == "__main__":
    print("found " + json.dumps(main(sys.argv[1])), flush=True)
