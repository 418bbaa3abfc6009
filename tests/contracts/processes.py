"""What one of several processes does in tests/contracts/test_processes.py; prints one line of JSON."""

import json
import sys

import jaxpipe

if __name__ == "__main__":
    jaxpipe.start(heartbeat_timeout=60)

import numpy as np
import optax

from tests import models


def train(model, pipe, data):
    """Five steps with dropout and clipping, then evaluations; all scalars as exact numbers."""

    def batches(step):
        return models.make_batch(4, rows=8, seed=step)

    engine = jaxpipe.initialize(
        models.MODELS[model](),
        optax.adam(1e-2),
        mesh=jaxpipe.make_mesh(pipe=pipe, data=data),
        example=tuple(a[0] for a in batches(0)),
        config={"num_micro_batches": 4, "gradient_clipping": 1.0},
        key=3,
    )
    found = {"losses": [float(engine.train_batch(zip(*batches(step), strict=True))) for step in range(5)]}
    found["norm"] = float(engine.grad_norm)
    found["mean"] = float(engine.eval_batch(zip(*batches(9), strict=True)))
    found["each"] = np.asarray(engine.eval_batch(zip(*batches(9), strict=True), reduce_output=None)).tolist()
    # Micro-batches that the data ranks do not divide.
    odd = [tuple(a[0, :rows] for a in batches(8)) for rows in (5, 7)]
    found["odd"] = float(engine.eval_batch(iter(odd), num_micro_batches=2))
    found["steps"] = engine.global_steps
    return found


if __name__ == "__main__":
    pipe, data = map(int, sys.argv[1:3])
    made = {model: train(model, pipe, data) for model in sys.argv[3:]}
    print("found " + json.dumps(made), flush=True)
