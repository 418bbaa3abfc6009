"""What one of two processes does in tests/contracts/test_processes_trainer.py; prints one line of JSON."""

import json
import sys
from pathlib import Path

import jaxpipe

if __name__ == "__main__":
    jaxpipe.start(heartbeat_timeout=60)

import jax
import optax

from jaxpipe.callbacks import Callback
from tests import models

M, ROWS, STEPS = 2, 8, 6


def data(count):
    return list(zip(*models.make_batch(count * M, rows=ROWS), strict=True))


def make_engine():
    layers = [
        jaxpipe.LayerSpec(models.Embedding),
        jaxpipe.LayerSpec(models.Block, models.WIDTH),
        jaxpipe.LayerSpec(models.LinenHead),
    ]
    return jaxpipe.initialize(
        jaxpipe.PipelineModule(layers, models.masked_cross_entropy),
        optax.adam(1e-2),
        mesh=jaxpipe.make_mesh(pipe=2, data=2),
        example=data(1)[0],
        config={"num_micro_batches": M},
        key=3,
    )


class Lines(jaxpipe.callbacks.JsonLines):
    """Says whether it was opened."""

    opened = False

    def open(self, run):
        super().open(run)
        self.opened = True


class Asks(Callback):
    """Asks to stop in one process only, as a callback that looks at its clock may."""

    def __init__(self, asks):
        self.asks = asks

    def on_step(self, run, step, metrics):
        if self.asks:
            run.stop("process 1 has had enough")


def told(result, history):
    return {
        "ended": result.ended,
        "reason": result.reason,
        "step": result.step,
        "evaluation": result.evaluation,
        "losses": history.curve("loss"),
    }


def main(folder):
    me, found = jax.process_index(), {}
    # Process 1 has a step less than process 0, and the one that it misses is in no checkpoint and in no log.
    for name, count in (("data", STEPS - me), ("again", STEPS)):
        history, lines = jaxpipe.callbacks.History(), Lines(folder / "log.jsonl")
        engine = make_engine()
        result = jaxpipe.Trainer(
            engine,
            data(STEPS)[: count * M],
            eval_data=data(1),
            eval_every=3,
            checkpoint_dir=folder / "run",
            checkpoint_every=2,
            callbacks=[history, lines],
        ).run()
        found[name] = told(result, history) | {"opened": lines.opened}
    history = jaxpipe.callbacks.History()
    asked = jaxpipe.Trainer(
        engine, data(STEPS), eval_data=data(1), eval_every=4, callbacks=[history, Asks(me == 1)]
    ).run()
    found["asked"] = told(asked, history)
    print("found", json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
