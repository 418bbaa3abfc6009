"""What one of several processes does in tests/contracts/test_processes_state.py; prints one line of JSON."""

import json
import sys

import jaxpipe

if __name__ == "__main__":
    jaxpipe.start(heartbeat_timeout=60)

import jax
import numpy as np
import optax

from tests.stateful_models import UNEVEN, make_batch, module


def engine_on(pipe, data, inside="data", **more):
    x, t = make_batch(1)
    return jaxpipe.initialize(
        module(UNEVEN[pipe]),
        optax.sgd(1e-2),
        mesh=jaxpipe.make_mesh(pipe=pipe, data=data, inside=inside),
        example=(x[0], t[0]),
        config={"num_micro_batches": 3},
        key=3,
        **more,
    )


def numbers(tree):
    return [np.asarray(leaf, np.float64).ravel().tolist() for leaf in jax.tree.leaves(jaxpipe.fetch(tree))]


def main(directory, inside="data"):
    """Trains, saves, trains, loads again, and starts another engine from the state of each layer."""
    engine = engine_on(2, 2, inside)
    found = {"loss": float(engine.train_batch(zip(*make_batch(3), strict=True)))}
    found["state"] = numbers(engine.layer_state())
    engine.save_checkpoint(directory, "one")
    found["evaluated"] = float(engine.eval_batch(zip(*make_batch(3, seed=1), strict=True)))
    engine.train_batch(zip(*make_batch(3, seed=1), strict=True))
    found["later"] = numbers(engine.layer_state())
    other = engine_on(2, 2, inside, layers=engine.to_layers(), layer_state=engine.layer_state())
    found["taken over"] = numbers(other.layer_state()) == found["later"]
    engine.load_checkpoint(directory, "one")
    found["loaded"] = numbers(engine.layer_state()) == found["state"]
    return found


if __name__ == "__main__":
    print("found " + json.dumps(main(*sys.argv[1:])), flush=True)
