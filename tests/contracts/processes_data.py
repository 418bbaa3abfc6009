"""What one of two processes does in tests/contracts/test_processes_data.py; prints one line of JSON."""

import json
import sys

import jaxpipe

if __name__ == "__main__":
    jaxpipe.start(heartbeat_timeout=60)

import jax
import numpy as np
import optax

from jaxpipe.errors import DataError
from tests import models

ME = jax.process_index()
M, ROWS = 4, 8


def micro_batches(step, rows=ROWS, count=M):
    return list(zip(*models.make_batch(count, rows=rows, seed=step), strict=True))


def loud(logits, labels):
    """So large that the first gradients are more than float32 holds, times a large loss scale."""
    loss = models.masked_cross_entropy(logits, labels)
    return jaxpipe.Weighted(2.0**5 * loss.total, loss.weight)


def make_engine(pipe, data, loss=models.masked_cross_entropy, **config):
    return jaxpipe.initialize(
        models.untied(loss=loss),
        optax.adam(1e-2),
        mesh=jaxpipe.make_mesh(pipe=pipe, data=data),
        example=micro_batches(0)[0],
        config={"num_micro_batches": M, **config},
        key=3,
    )


def weights(engine):
    return [float(abs(np.asarray(leaf.addressable_data(0))).sum()) for leaf in jax.tree.leaves(engine.state.params)]


def told(call, *, most=4):
    """The number of the call that raises DataError, its message, and what the calls before it returned."""
    losses = []
    for number in range(most):
        try:
            losses.append(float(call()))
        except DataError as error:
            return {"call": number, "message": str(error), "losses": losses}
    return {"call": None, "losses": losses}


def short(items):
    """What process 1 has: the first half of the items."""
    return items if ME == 0 else items[: len(items) // 2]


def narrow(items):
    """What process 1 has: half of the rows."""
    return items if ME == 0 else [(x[: ROWS // 2], y[: ROWS // 2]) for x, y in items]


def other(items):
    """What process 1 has: the same shapes with one other number in the labels of the last micro-batch."""
    x, y = items[-1]
    return items if ME == 0 else [*items[:-1], (x, y + (np.arange(len(y)) == 5)[:, None].astype(y.dtype))]


def text(items):
    """What process 1 has: labels that no device knows."""
    return items if ME == 0 else [(x, "no label") for x, _ in items]


def raising(items):
    """What process 1 has: an iterator that breaks."""
    yield from items[:2]
    if ME == 1:
        raise KeyError("shard 7")
    yield from items[2:]


def spread(items):
    """What process 1 has: arrays that lie on devices of both processes."""
    everywhere = jax.sharding.NamedSharding(jaxpipe.make_mesh(pipe=2, data=2), jax.sharding.PartitionSpec())

    def put(leaf):
        return jax.make_array_from_callback(leaf.shape, everywhere, lambda index: leaf[index])

    return items if ME == 0 else [jax.tree.map(put, item) for item in items]


FAULTS = {"spread": spread, "short": short, "narrow": narrow, "other": other, "text": text, "raising": raising}


def scaled_engine(pipe, data):
    return make_engine(pipe, data, loud, loss_scale=jaxpipe.DynamicScale(initial=2.0**127, window=4))


def scaling(engine):
    """The loss scale, and the steps that it has skipped."""
    return [float(engine.state.loss_scale.scale), engine.skipped_steps]


def training(pipe, data):
    """Steps that one process cannot take part in are skipped everywhere, and told everywhere in the same call.

    They are no overflows; those are skipped everywhere, too, and not told.
    """
    engine, found, step = scaled_engine(pipe, data), {}, 0

    def good():
        nonlocal step
        step += 1
        return float(engine.train_batch(iter(micro_batches(step))))

    found["first"] = told(lambda: engine.train_batch(iter(other(micro_batches(99)))))
    losses = [good(), good()]
    for name, fault in FAULTS.items():
        before, counted, seen = engine.global_steps, weights(engine), engine.micro_batches_seen
        # The same bad data again and again: nothing else can be done until it is told.
        found[name] = told(lambda fault=fault: engine.train_batch(iter(fault(micro_batches(99)))))
        same = engine.global_steps == before and weights(engine) == counted and engine.micro_batches_seen == seen
        found[name]["as before"] = same
        losses.append(good())
    # A bad step between good ones: these count.
    steps = [told(lambda: engine.train_batch(iter(other(micro_batches(99)))), most=1)]
    losses += [good(), good()]
    found["between"] = told(lambda: engine.train_batch(iter(micro_batches(step + 1))), most=1) | {"losses": steps}
    found["counted"] = [engine.global_steps + engine.skipped_steps, engine.train_calls, engine.micro_batches_seen]
    losses.append(good())
    # Another shape, and the end, on all of them: as with one process.
    losses.append(float(engine.train_batch(iter(micro_batches(50, rows=4)))))
    found["end"] = told(lambda: engine.train_batch(iter(micro_batches(50, count=2))))
    return {"found": found, "losses": losses, "steps": engine.global_steps, "scaling": scaling(engine)}


def alone(pipe, data):
    """The losses of one process that sees the good steps only, and what has become of the loss scale."""
    engine = scaled_engine(pipe, data)
    losses = [float(engine.train_batch(iter(micro_batches(step)))) for step in range(1, 12)]
    return [*losses, float(engine.train_batch(iter(micro_batches(50, rows=4))))], scaling(engine)


def evaluating(pipe, data):
    """Evaluations in which one process cannot take part raise everywhere, before anything is computed."""
    engine, found, data_set = make_engine(pipe, data), {}, [*micro_batches(5), *micro_batches(6)]
    for name, fault in FAULTS.items():
        found[name] = told(lambda fault=fault: engine.eval_batch(iter(fault(micro_batches(7)))), most=1)
        made = told(lambda fault=fault: engine.evaluate(fault(data_set), progress=False)["loss"], most=1)
        found[f"{name} in a data set"] = made
    good = float(engine.eval_batch(iter(micro_batches(7))))
    return {"found": found, "good": good}


def own_rows(pipe, data):
    """`local_rows`: the same numbers, from the rows of this process only; also at the odd end of a data set."""
    whole, local = make_engine(pipe, data), make_engine(pipe, data, local_rows=True)
    share = local._feed.share

    def cut(items):
        def mine(leaf):
            ranks, rows = share.mine, len(leaf)
            return leaf[ranks[0] * rows // data : (ranks[-1] + 1) * rows // data]

        return [jax.tree.map(mine, item) for item in items]

    pairs = [
        (float(whole.train_batch(iter(micro_batches(k)))), float(local.train_batch(iter(cut(micro_batches(k))))))
        for k in range(2)
    ]
    data_set = [*micro_batches(5), *micro_batches(6, count=2), *micro_batches(8, rows=5, count=1)]
    pairs.append(
        (whole.evaluate(data_set, progress=False)["loss"], local.evaluate(cut(data_set), progress=False)["loss"])
    )
    pairs.append((float(whole.eval_batch(iter(data_set))), float(local.eval_batch(iter(cut(data_set))))))
    # The rows of one process end before those of the other: nothing but the rows that are there counts.
    odd = [*cut(micro_batches(5)), *(cut(micro_batches(6, count=1)) if ME == 0 or share.mine == share.of(0) else [])]
    parts = [share.of(0)] if share.of(0) == share.of(1) else [share.of(0), share.of(1)]
    rows = ROWS * len(parts[0]) // data
    last = [tuple(leaf[:rows] for leaf in item) for item in micro_batches(6, count=1)]
    expected = whole.evaluate([*micro_batches(5), *last], progress=False)["loss"]
    pairs.append((expected, local.evaluate(odd, progress=False)["loss"]))
    wrong = told(lambda: local.train_batch(iter(other(cut(micro_batches(3))))), most=1)
    return {"pairs": pairs, "ranks": share.mine, "other": wrong}


CHECKS = {"training": training, "evaluating": evaluating, "own rows": own_rows}

if __name__ == "__main__":
    pipe, data = map(int, sys.argv[1:3])
    print("found " + json.dumps({name: CHECKS[name](pipe, data) for name in sys.argv[3:]}), flush=True)
