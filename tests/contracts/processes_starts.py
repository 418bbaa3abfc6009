"""Engines that differ in one thing on process 1; see tests/contracts/test_processes_starts.py."""

import json

import jaxpipe

if __name__ == "__main__":
    jaxpipe.start(heartbeat_timeout=60)

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpipe.errors import JaxpipeError
from tests import models

ME = jax.process_index()
EXAMPLE = tuple(a[0] for a in models.make_batch(4, rows=8, seed=0))


def other(value, instead):
    return value if ME == 0 else instead


def block(width, scale=1.0):
    return jaxpipe.Layer(
        lambda key, x: {"w": scale * jax.random.normal(key, (x.shape[-1], x.shape[-1]))},
        lambda params, x: x + width * jnp.tanh(x @ params["w"]),
        name="block",
    )


def loss(scale):
    return lambda y, labels: scale * jnp.mean((y - labels) ** 2)


def engine(**more):
    arguments = {"module": None, "optimizer": optax.adam(1e-2), "mesh": jaxpipe.make_mesh(pipe=2, data=2), "key": 3}
    arguments |= {"example": (np.ones((8, 4), np.float32),) * 2, "config": {"num_micro_batches": 2}} | more
    module, optimizer = arguments.pop("module"), arguments.pop("optimizer")
    return jaxpipe.initialize(module or jaxpipe.PipelineModule([block(1.0)] * 4, loss(1.0)), optimizer, **arguments)


def devices_turned():
    return jaxpipe.make_mesh(pipe=2, data=2, devices=other(jax.devices(), jax.devices()[::-1]))


MODULE = jaxpipe.PipelineModule
CASES = {
    "nothing": dict,
    "key": lambda: {"key": other(3, 4)},
    "config": lambda: {"config": {"num_micro_batches": 2, "gradient_clipping": other(1.0, 2.0)}},
    "precision": lambda: {"config": {"num_micro_batches": 2, "compute_dtype": other(None, "bfloat16")}},
    "loss scale": lambda: {"config": {"num_micro_batches": 2, "loss_scale": jaxpipe.DynamicScale(window=other(5, 6))}},
    "schedule": lambda: {"config": {"num_micro_batches": 2, "schedule": other("1f1b", "gpipe")}},
    "one layer more": lambda: {"module": MODULE([block(1.0)] * other(4, 5), loss(1.0))},
    "a layer": lambda: {"module": MODULE([*[block(1.0)] * 2, block(other(1.0, 1.5)), block(1.0)], loss(1.0))},
    "init": lambda: {"module": MODULE([*[block(1.0)] * 3, block(1.0, other(1.0, 0.5))], loss(1.0))},
    "loss": lambda: {"module": MODULE([block(1.0)] * 4, loss(other(1.0, 2.0)))},
    "optimizer": lambda: {"optimizer": optax.adam(other(1e-2, 1e-3))},
    "example": lambda: {"example": (np.ones((other(8, 4), 4), np.float32),) * 2},
    "mesh": lambda: {"mesh": devices_turned()},
    "layers": lambda: {
        "layers": [{"w": np.full((4, 4), other(1.0, 1.5 if n == 2 else 1.0), np.float32)} for n in range(4)]
    },
    "wrong": lambda: {"config": {"num_micro_batches": other(2, 0)}},
}


def check():
    found = {}
    for name, make in CASES.items():
        try:
            engine(**make())
            found[name] = None
        except JaxpipeError as error:
            found[name] = [type(error).__name__, str(error)]
    return found


if __name__ == "__main__":
    print("found " + json.dumps(check()), flush=True)
