"""What one of several processes does in tests/contracts/test_processes_faults.py: something goes wrong in one of them."""

import os
import signal
import sys
import time

import jaxpipe

if __name__ == "__main__":
    jaxpipe.start(heartbeat_timeout=10 if sys.argv[1] == "stopped" else 60, step_timeout=8)

import jax
import optax

from jaxpipe.errors import ConfigError, DataError
from tests import models

STEP_TIMEOUT = 8


def killed(number):
    if jax.process_index() == number:
        os.kill(os.getpid(), signal.SIGKILL)


def stopped():
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def raises():
    jaxpipe.start(heartbeat_timeout=60, step_timeout=STEP_TIMEOUT)  # twice is no mistake
    try:
        jaxpipe.start(heartbeat_timeout=61, step_timeout=STEP_TIMEOUT)
    except ConfigError as error:
        assert "called before with other arguments" in str(error)
        if jax.process_index() == 1:
            raise DataError("the file is empty") from None


def batches(stuck=False):
    for number, batch in enumerate(zip(*models.make_batch(2, rows=4, seed=0), strict=True)):
        if stuck and number == 1:
            time.sleep(10_000)
        yield batch


def engine():
    return jaxpipe.initialize(
        models.untied(),
        optax.sgd(1e-2),
        mesh=jaxpipe.make_mesh(pipe=len(jax.devices())),
        example=next(batches()),
        config={"num_micro_batches": 2},
    )


def preempted_and_stuck():
    """Slow data everywhere do no harm. SIGTERM for one process; all notice at the same call. Then one is stuck."""
    made = engine()
    for step in range(10_000):
        made.train_batch(batches())
        if step == 1:
            time.sleep(STEP_TIMEOUT + 3)
        if step == 2 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if made.preempted():
            break
        time.sleep(0.05)
    print(f"preempted after step {step}", flush=True)
    assert made.preempted()
    made.train_batch(batches(stuck=jax.process_index() == 1))
    print(float(made.train_batch(batches())), flush=True)


if __name__ == "__main__":
    match sys.argv[1]:
        case "killed":
            killed(int(sys.argv[2]))
        case "stopped":
            stopped()
        case "raises":
            raises()
        case "stuck":
            preempted_and_stuck()
        case "ends early":
            if jax.process_index() == 1:
                sys.exit(3)
            jaxpipe.fetch(1)
    time.sleep(10_000)
