"""What one of several processes does in tests/contracts/test_processes_checkpoints.py; prints one line of JSON."""

import json
import os
import signal
import sys
import threading
import warnings
from pathlib import Path

import jaxpipe

if __name__ == "__main__":
    jaxpipe.start(heartbeat_timeout=60)

import jax
import jax.numpy as jnp
import optax

from jaxpipe.checkpoint import items
from tests import models
from tests.engines import M, stream

ROWS = 4


def batches(step):
    return [models.make_batch(M, rows=ROWS, seed=step)]


def engine_on(pipe, data, order=None, zero_stage=0):
    """Two kinds of layers that are stored once, tied and not, between stacked ones; stages of different sizes; Adam."""
    devices = None if order is None else [jax.devices()[at] for at in order]
    return jaxpipe.initialize(
        models.tied(),
        optax.adam(1e-2),
        mesh=jaxpipe.make_mesh(pipe=pipe, data=data, devices=devices),
        example=tuple(a[0] for a in batches(0)[0]),
        config={"num_micro_batches": M, "gradient_clipping": 1.0, "zero_stage": zero_stage},
        key=jax.random.key(5),
    )


def steps(engine, count):
    """The losses of the next steps, each on data of its own."""
    return [float(engine.train_batch(stream(batches(engine.train_calls)))) for _ in range(count)]


def error_of(call):
    try:
        call()
    except jaxpipe.errors.CheckpointError as error:
        return str(error)
    return None


class Reader:
    """A data iterator that knows where it stands."""

    def __init__(self, at):
        self.at = at

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def full(*_):
    raise OSError(28, "No space left on device")


def two(directory):
    """Two processes with two devices each: load what one has saved, save, train, fail, and go on."""
    me, found = jax.process_index(), {}
    write = items.write
    engine = engine_on(2, 2)
    engine.load_checkpoint(directory, "one")
    engine.save_checkpoint(directory, "again", data_iter=Reader(7), client_state={"from": me})
    steps(engine, 1)
    engine.save_checkpoint(directory, "two", data_iter=Reader(me))
    engine.save_checkpoint(directory, "background", blocking=False)
    found["losses"] = steps(engine, 2)
    engine.wait_for_checkpoint()
    # Data ranks on both processes, with a part of each weight on each, and the processes the other way round.
    crossed = engine_on(2, 2, order=[2, 0, 3, 1], zero_stage=1)
    reader = Reader(None)
    found["client_state"] = crossed.load_checkpoint(directory, "again", data_iter=reader)[1]
    crossed.load_checkpoint(directory, "background")
    found["reader"] = reader.at
    crossed.save_checkpoint(directory, "crossed", save_latest=False)
    found["crossed"] = steps(crossed, 2)
    found["steps"] = crossed.global_steps, crossed.train_calls, crossed.micro_batches_seen
    found["resumed"] = resumed(engine, directory)
    # One of them has no more room.
    if me == 1:
        items.write = full
    found["full"] = error_of(lambda: engine.save_checkpoint(directory, "full"))
    engine.save_checkpoint(directory, "full", blocking=False)
    steps(engine, 1)
    found["full later"] = error_of(engine.wait_for_checkpoint)
    items.write = write
    found["missing"] = error_of(lambda: engine.load_checkpoint(directory, "missing"))
    found["different"] = error_of(lambda: engine.save_checkpoint(f"{directory}/{me}"))
    found["in the way"] = error_of(lambda: engine.save_checkpoint(Path(directory) / "latest"))
    with warnings.catch_warnings(record=True) as caught:
        nothing = engine.load_checkpoint(Path(directory) / "nowhere")
    found["nowhere"] = nothing, len(caught)
    found["after"] = steps(engine, 1)
    return found


def resumed(engine, directory):
    """The losses once more, from the checkpoint that was written in the background."""
    reader = Reader(None)
    engine.load_checkpoint(directory, "two", data_iter=reader)
    assert reader.at == jax.process_index()
    return steps(engine, 2)


def four(directory):
    """Four processes with one device each, one stage on each."""
    engine, found = engine_on(4, 1), {}
    engine.load_checkpoint(directory, "background")
    engine.save_checkpoint(directory, "four")
    found["losses"] = steps(engine, 2)
    found["data"] = error_of(lambda: engine.load_checkpoint(directory, "two", data_iter=Reader(0)))
    return found


def killed(directory, last, kills):
    """Trains to step `last`, saving after every step; a process is killed at its n-th use of files there, per attempt."""
    me, engine = jax.process_index(), engine_on(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing to load in the first attempt
        engine.load_checkpoint(directory)
    begun = engine.train_calls
    attempt = len(list(Path(directory).glob(f"attempt.*.{me}")))
    (Path(directory) / f"attempt.{attempt}.{me}").touch()
    if attempt < len(kills) and kills[attempt][0] == me:
        count_down(kills[attempt][1], directory)
    losses = []
    while engine.train_calls < last:
        losses += steps(engine, 1)
        engine.save_checkpoint(directory, keep=2, blocking=engine.train_calls % 2 == 0)
    engine.wait_for_checkpoint()
    return {"begun": begun, "losses": losses, "uninterrupted": steps(engine_on(2, 2), last)}


def count_down(left, directory):
    """Kills this process when Python has done so many things to files of a directory."""

    def count(event, arguments):
        nonlocal left
        used = event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
        if used and str(arguments[0]).startswith(str(directory)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def memory(directory):
    """The most memory that a save and a load take on top of what was there, in layers; and the own state, in layers."""
    width, count = 1024, 8

    def layer(sign):
        def init(key, x):
            return {name: jax.random.normal(key, (width, width)) for name in "ab"}

        return jaxpipe.Layer(init, lambda params, x: x @ params["a"] + sign * (x @ params["b"]), f"Layer{sign}")

    example = jax.ShapeDtypeStruct((4, width), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)
    # The first and the last one are stored once, cut over the ranks.
    layers = [layer(1), *[layer(2)] * count, layer(3)]
    module = jaxpipe.PipelineModule(layers, lambda y, t: y.mean())
    engine = jaxpipe.initialize(module, optax.adam(1e-3), mesh=jaxpipe.make_mesh(pipe=4), example=example)
    small = engine_on(2, 2)
    small.save_checkpoint(directory, "small")  # imports, threads and buffers of fixed size
    small.load_checkpoint(directory)
    leaves = jax.tree.leaves((engine.state.params, engine.state.opt_state))
    own = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    work = {"save": lambda: engine.save_checkpoint(directory), "load": lambda: engine.load_checkpoint(directory)}
    sizes = {name: _most(call) for name, call in work.items()} | {"own": own}
    return {name: size / (6 * width * width * 4) for name, size in sizes.items()}


def _most(call):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def watch():
        while not done.wait(0.0005):
            seen.append(resident())

    done, seen, start = threading.Event(), [], resident()
    thread = threading.Thread(target=watch)
    thread.start()
    call()
    done.set()
    thread.join()
    return max(seen) - start


if __name__ == "__main__":
    work = {"two": two, "four": four, "killed": killed, "memory": memory}[sys.argv[1]]
    print("found " + json.dumps(work(sys.argv[2], *map(json.loads, sys.argv[3:]))), flush=True)
