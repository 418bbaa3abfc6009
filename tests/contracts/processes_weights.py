"""What one of several processes does in tests/contracts/test_processes_weights.py; prints one line of JSON."""

import json
import sys
from pathlib import Path

import jaxpipe

if __name__ == "__main__":
    jaxpipe.start(heartbeat_timeout=60)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.compare import assert_close

M, ROWS, WIDTH, CLASSES = 3, 4, 8, 5


def _dense_init(key, x):
    return {"w": jax.random.normal(key, (WIDTH, WIDTH)) / 3, "flags": jnp.asarray([True, False])}


def _head_init(key, x):
    return {
        "w": jax.random.normal(key, (WIDTH, CLASSES)).astype(jnp.bfloat16),
        "short": jnp.arange(-3, 4, dtype=jnp.int8),
        "nothing": jnp.zeros((0, 4)),
    }


def _noisy(params, x, *, key, train):
    return jnp.tanh(x @ params["w"]) * (1 if key is None else 1 + 0.1 * jax.random.normal(key, x.shape))


DENSE = jaxpipe.Layer(_dense_init, _noisy)
HEAD = jaxpipe.Layer(_head_init, lambda params, x: x @ params["w"].astype(x.dtype))


def loss_fn(logits, labels):
    """A weighted loss, and metrics of every rule: values per row as floats, some of them -0.0, as integers and booleans."""
    each = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], -1)[:, 0]
    counts = (labels > 0).astype(each.dtype)
    first = logits[:, 0]
    return jaxpipe.Weighted((each * counts).sum(), counts.sum()), {
        "mean": first.mean(),
        "pair": (first.sum(), 3.0),
        "top": jaxpipe.metrics.Max(logits.max()),
        "guess": jaxpipe.metrics.Concat(logits.argmax(-1)),
        "first": jaxpipe.metrics.Concat(jnp.where(first > 0, first, -0.0)),
        "right": jaxpipe.metrics.Concat(logits.argmax(-1) == labels),
    }


def more(logits, labels):
    return {"more": jaxpipe.metrics.Concat(logits.sum(-1)), "odd": (labels % 2).sum() / labels.size}


def mesh_of(pipe, data, turned=False):
    """Data ranks in a process and ranks in several, or turned round."""
    devices = np.asarray(jax.devices()[: pipe * data])
    return jaxpipe.make_mesh(pipe=pipe, data=data, devices=devices.reshape(data, pipe).T.flat if turned else devices)


def batch(seed=0, rows=ROWS, count=M):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(count, rows, WIDTH)).astype(np.float32)
    return inputs, rng.integers(0, CLASSES, (count, rows))


def items(*rows):
    return [tuple(a[0] for a in batch(seed, count, 1)) for seed, count in enumerate(rows)]


def make_pipe(pipe, data, turned=False):
    module = jaxpipe.PipelineModule([DENSE, DENSE, jnp.sin, DENSE, HEAD], loss_fn)
    return jaxpipe.Pipeline(module, mesh_of(pipe, data, turned), M)


def make_engine(pipe, data, turned=False, layers=None):
    return jaxpipe.initialize(
        make_pipe(pipe, data, turned).module,
        optax.adam(1e-2),
        mesh=mesh_of(pipe, data, turned),
        example=tuple(a[0] for a in batch()),
        config={"num_micro_batches": M},
        key=3,
        layers=layers,
    )


def listed(tree):
    """Plain lists in the place of arrays; what another process holds is brought here."""
    return jax.tree.map(lambda a: np.asarray(a).tolist(), jaxpipe.fetch(tree))


def own(tree):
    """The same for what this process can read, or None."""
    return jax.tree.map(lambda a: np.asarray(a).tolist(), tree)


def evaluations(engine):
    """Every option of each way to evaluate; first what all processes know, then what holders of the last rank do."""
    found, some = {}, {}
    params, pipe = engine.state.params, engine.pipe
    # Few shapes, because each one is compiled: with two data ranks those of 2 rows and of the 1 row that is left of 3.
    streams = {"even": lambda: zip(*batch(9), strict=True), "ragged": lambda: iter(items(2, 3, 2))}
    for name, data in streams.items():
        loss, logits, metrics = engine.eval_batch(data(), True, reduce_output=None, return_metrics=True)
        assert bool(logits.addressable_shards) == engine.holds_outputs
        first = np.asarray(metrics["first"])
        assert name == "ragged" or np.signbit(first[first == 0]).all(), "gathered, and not added to zeros"
        found[name] = own((loss, metrics)), listed(logits)
        loss, logits, metrics = engine.eval_batch(
            data(), True, reduce_output="sum", bcast_loss=False, return_metrics=True
        )
        some[name] = own((loss, metrics))
        found[f"logits beside, {name}"] = listed(logits)
    found["only logits"] = listed(engine.eval_batch(((x, None) for x, _ in streams["ragged"]()), compute_loss=False))
    found["avg"] = own(engine.eval_batch(streams["ragged"](), num_micro_batches=2))
    found["data set"] = own(engine.evaluate(items(2, 3, 2, 3), metrics=more))
    found["first batch"] = own(engine.evaluate(items(2, 3, 2, 3), num_batches=1, metrics=more))
    found["predictions"] = [listed(out) for out in engine.predict(items(2, 3, 2, 3))]
    found["one device"] = own(pipe.evaluate(params, jax.tree.map(jnp.asarray, batch(4))))
    found["numpy, odd rows"] = own(pipe.evaluate(params, batch(5, 3)))
    return found, some


def same(found, wanted, what):
    """Exactly the same bits, NaN and -0.0 included."""
    found, wanted = jax.tree.map(np.asarray, (found, wanted))
    assert jax.tree.structure(found) == jax.tree.structure(wanted), what
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), what


def fetched():
    """`jaxpipe.fetch` of what processes hold in common, of what each has by itself, and of what is no array of JAX."""
    mesh = mesh_of(jax.device_count(), 1)
    last = jax.sharding.Mesh(mesh.devices[-1:], ("pipe", "data"))
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8, jnp.bool_, jnp.uint16, jnp.complex64, jnp.float8_e4m3fn):
        value = np.asarray([[0, -0.0, 1, 2]] * 4 * mesh.size).astype(dtype)
        for place, spec in ((mesh, P("pipe")), (last, P()), (mesh, P())):
            values = [value, value[:0], value[0, 0]] if spec == P() else [value, value[:0]]
            where = NamedSharding(place, spec)
            made = [
                jax.make_array_from_callback(v.shape, where, lambda index, v=v: v[index], dtype=v.dtype) for v in values
            ]
            same(jaxpipe.fetch(made), values, str(dtype))
    keys = jax.random.split(jax.random.key(0), mesh.size)
    on_all = jax.jit(
        lambda: jax.random.split(jax.random.key(0), mesh.size), out_shardings=NamedSharding(mesh, P("pipe"))
    )()
    mine = jax.device_put(keys, jax.local_devices()[-1])
    parts = [mine] if jax.process_index() == last.devices[0, 0].process_index else []
    on_last = jax.make_array_from_single_device_arrays(keys.shape, NamedSharding(last, P()), parts, dtype=keys.dtype)
    for found in jaxpipe.fetch([on_all, on_last, keys]):
        assert found.dtype == keys.dtype and (jax.random.bits(found[1]) == jax.random.bits(keys[1])).all()
    me = jax.process_index()
    found = jaxpipe.fetch({"none": None, "number": me, "own": jnp.full(3, me), "numpy": np.ones(me + 1), "flag": True})
    assert found["none"] is None and found["number"] == me and found["flag"] is True
    assert found["own"].tolist() == [me] * 3 and found["numpy"].shape == (me + 1,)


def weights(engine, folder):
    """Weights out of the engine and into others; what is on the disk is compared by the test."""
    layers = engine.to_layers()
    for index, layer in enumerate(layers):
        if index in engine.pipe.layout.stacks["_noisy"].places:
            rank = engine.pipe.layout.stage_of(index)
            mesh = engine.pipe.mesh.devices
            where = mesh[rank] if jax.process_count() > 1 else mesh  # one process: layers can be computed with together
            assert layer["w"].sharding.device_set == set(where.flat)
    wanted = jaxpipe.fetch(layers)
    stages, ranks = engine.pipe.num_stages, engine.pipe.mesh.shape["data"]
    # The same cut, and another one, on the devices in another order.
    others = [(stages, ranks), (stages // 2, ranks * 2) if stages > 1 else (2, ranks // 2)]
    for pipe, data in others:
        other = make_pipe(pipe, data, turned=True)
        local = jax.device_put(wanted, jax.local_devices()[-1])
        for given in (layers, wanted, local):
            same(jaxpipe.fetch(other.to_layers(other.from_layers(given))), wanted, f"{pipe} x {data}")
    path = Path(folder) / "weights.safetensors"
    jaxpipe.save_weights(path, engine)
    jaxpipe.save_weights(path.with_name("list.safetensors"), layers)
    read = jaxpipe.load_weights(path)
    same(read, wanted, "read")
    for given in (read, layers):
        same(jaxpipe.fetch(make_engine(*others[-1], layers=given).to_layers()), wanted, "given")
    try:
        jaxpipe.save_weights(Path(folder) / "nowhere" / "x.safetensors", engine)
    except jaxpipe.errors.CheckpointError as error:
        assert "nowhere/x.safetensors: the weights could not be written" in str(error)
    else:
        raise AssertionError("no error")
    return [path.name for path in sorted(Path(folder).iterdir())]


def by_hand(pipe, data, turned):
    """A hand-written loop with batches of the host and keys of one device; the oracle on one device."""
    pipe, found = make_pipe(pipe, data, turned), {}
    key = jax.device_put(jax.random.key(1), jax.local_devices()[-1])
    params = pipe.init(key, batch()[0][0])
    tx = pipe.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)))
    state = tx.init(params)
    found["losses"] = []
    for step in range(2):
        loss, grads = pipe.value_and_grad(params, batch(step), jax.random.fold_in(key, step))
        layers = pipe.to_layers(params)
        wanted, gradients = jaxpipe.reference.value_and_grad(
            pipe.module, layers, batch(step), jax.random.fold_in(key, step), num_data_ranks=data
        )
        np.testing.assert_allclose(float(loss), float(wanted), rtol=1e-6)
        assert_close(jaxpipe.fetch(pipe.to_layers(grads)), jaxpipe.fetch(gradients), 2e-6, "gradients")
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        found["losses"].append(own(loss))
    layers = jaxpipe.fetch(pipe.to_layers(params))
    alone = jaxpipe.reference.value_and_grad(pipe.module, layers, batch(2))[0] if jax.process_index() == 0 else None
    loss, _ = pipe.value_and_grad(params, batch(2))
    assert alone is None or abs(float(alone) - float(loss)) < 1e-6
    found["weights"] = own(layers)
    found["evaluation"] = own(pipe.evaluate(params, batch(3)))
    return found


def main(pipe, data, turned, folder, *what):
    """The numbers that all processes have, and those that only some have."""
    engine = make_engine(pipe, data, turned)
    found, some = {}, {}
    if "evaluations" in what:
        found, some = evaluations(engine)
    if "weights" in what:
        fetched()
        found["files"] = weights(engine, folder)
    if "by hand" in what:
        found["by hand"] = by_hand(pipe, data, turned)
    return {"found": found, "some": some, "holds": engine.holds_outputs}


if __name__ == "__main__":
    _, stages, ranks, order, *rest = sys.argv
    print("found " + json.dumps(main(int(stages), int(ranks), order == "turned", *rest)), flush=True)
