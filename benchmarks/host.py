"""What `train_batch` costs the host beyond the call of the compiled step: pulling, checking, stacking, placing, counting.

    python benchmarks/host.py

The model is as empty as one can be, so that the devices are done before the host is. The time inside of the compiled step's
call is taken off, since every training loop in JAX pays for that.
"""

import itertools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpipe

STEPS = 200


def milliseconds(stages: int, micro_batches: int) -> list[float]:
    """The time of each of some calls of `train_batch`, less that of the compiled step."""
    scale = jaxpipe.Layer(lambda key, x: {"w": jnp.ones(())}, lambda params, x: x * params["w"], "scale")
    module = jaxpipe.PipelineModule([scale] * stages, lambda y, t: ((y - t) ** 2).mean())
    example = np.ones((4, 8), np.float32), np.zeros((4, 8), np.float32)
    mesh, config = jaxpipe.make_mesh(pipe=stages), {"num_micro_batches": micro_batches}
    engine = jaxpipe.initialize(module, optax.sgd(1e-3), mesh=mesh, example=example, config=config)
    compiled, inside = engine._step, 0.0  # pyright: ignore[reportPrivateUsage]

    def step(*args: Any) -> Any:
        nonlocal inside
        start = time.perf_counter()
        result = compiled(*args)
        inside = time.perf_counter() - start
        return result

    engine._step = step  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    data = itertools.cycle([example])
    engine.train_batch(data)
    found: list[float] = []
    for _ in range(STEPS):
        start = time.perf_counter()
        loss = engine.train_batch(data)
        found.append(1000 * (time.perf_counter() - start - inside))
        jax.block_until_ready(loss)
    return found


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 4)  # means something only on a machine without accelerators
    print("| S | M | milliseconds per call: median | tenth percentile |\n|--:|--:|--:|--:|")
    for stages, micro_batches in ((1, 1), (1, 8), (2, 8), (4, 8), (4, 32)):
        found = sorted(milliseconds(stages, micro_batches))
        print(f"| {stages} | {micro_batches} | {statistics.median(found):.2f} | {found[STEPS // 10]:.2f} |")


if __name__ == "__main__":
    main()
