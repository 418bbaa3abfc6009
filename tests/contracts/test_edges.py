"""Models and settings off the beaten path; each of them once gave a wrong number, a crash or a second compile."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxpipe
from jaxpipe.errors import LayerError, MeshError
from jaxpipe.executor.reference import forward
from tests.compare import assert_close
from tests.models import SCALE, WIDTH, Block, Embedding, LinenHead, cross_entropy, make_batch, tied

M = 3


def masked_init(key, x):
    return {
        "w": jax.random.normal(key, (WIDTH, WIDTH)),
        "mask": jnp.arange(WIDTH) % 3 == 0,
        "ids": jnp.arange(4),
        "empty": {},
        "gain": 1.5,  # weakly typed
    }


def masked_apply(p, x):
    return x + jnp.where(jnp.broadcast_to(~p["mask"], x.shape), x @ p["w"] * p["gain"], 0.0)


MASKED = jaxpipe.Layer(masked_init, masked_apply, "Masked")


def engine_for(layers, optimizer, loss=cross_entropy, stages=2, data=1, **options):
    return jaxpipe.initialize(
        jaxpipe.PipelineModule(layers, loss, "uniform"),
        optimizer,
        mesh=jaxpipe.make_mesh(pipe=stages, data=data),
        example=tuple(a[0] for a in make_batch(1)),
        config={"num_micro_batches": M},
        **options,
    )


def micro_batches(num):
    return iter(list(zip(*make_batch(num), strict=True)))


def test_params_that_are_no_floats_are_kept_and_never_trained(no_compiles):
    """Booleans and integers, stacked and alone, under weight decay; Python scalars do not make step two compile."""
    alone = jaxpipe.Layer(masked_init, lambda p, x: masked_apply(p, x) * 0.5, "Alone")
    key = jax.random.key(7)
    layers = [jaxpipe.LayerSpec(Embedding), MASKED, MASKED, alone, jaxpipe.LayerSpec(LinenHead)]
    engine = engine_for(layers, optax.adamw(1e-2, weight_decay=0.5), key=key)
    before = jax.device_get(engine.to_layers())
    batch = make_batch(M)
    found = engine.pipe.value_and_grad(engine.state.params, batch)
    wanted = jaxpipe.reference.value_and_grad(engine.pipe.module, before, batch)
    assert_close((found[0], engine.pipe.to_layers(found[1])), jax.device_get(wanted), 1e-6)
    assert before[1]["mask"].dtype == bool and before[1]["mask"].sum() == 3
    data = micro_batches(3 * M)
    engine.train_batch(data)
    with no_compiles():
        engine.train_batch(data)
    after = jax.device_get(engine.to_layers())
    for layer in (1, 2, 3):
        assert_close([after[layer][k] for k in ("mask", "ids")], [before[layer][k] for k in ("mask", "ids")], 0)
        assert np.abs(after[layer]["w"] - before[layer]["w"]).max() > 0
    jax.random.normal(key)  # the caller's key was not donated


def labels_of(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "frozen" if "shared" in str(path[0]) else "trained", params)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.multi_transform({"trained": optax.adam(1e-2), "frozen": optax.set_to_zero()}, labels_of),
        optax.masked(optax.adam(1e-2), lambda params: jax.tree.map(lambda a: a.ndim > 3, params)),
        optax.chain(
            optax.clip_by_global_norm(1.0), optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9)
        ),
        optax.adafactor(1e-2, min_dim_size_to_factor=4),
    ],
    ids=["multi_transform", "masked", "chain", "adafactor"],
)
def test_optimizers(optimizer, no_compiles):
    engine = engine_for(
        [jaxpipe.LayerSpec(Embedding), *[jaxpipe.LayerSpec(Block, WIDTH)] * 2, jaxpipe.LayerSpec(LinenHead)], optimizer
    )
    shardings = {leaf.sharding.spec for leaf in jax.tree.leaves(engine.state.opt_state) if leaf.ndim > 3}
    assert all(spec[0] == "pipe" for spec in shardings), "moments of stacked params live with them"
    data = micro_batches(3 * M)
    losses = [engine.train_batch(data)]
    with no_compiles():
        losses += [engine.train_batch(data), engine.train_batch(data)]
    assert np.isfinite([float(loss) for loss in losses]).all()


def test_evaluation_has_its_own_shapes_and_dtypes():
    """A last layer that returns only the last position outside of training, through a stage of its own."""

    def last_apply(p, x, *, train):
        return x if train else x[:, -1:].astype(jnp.float16)

    last = jaxpipe.Layer(lambda key, x: {}, last_apply, "Last")
    module = jaxpipe.PipelineModule(
        [jaxpipe.LayerSpec(Embedding), SCALE, last, lambda x: x * 2], partition_method=[0, 2, 4]
    )
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2), M)
    batch = make_batch(M)
    params = pipe.init(jax.random.key(0), batch[0][0])
    outputs = pipe.evaluate(params, (batch[0], None), compute_loss=False)
    layers = jax.device_get(pipe.to_layers(params))
    assert outputs.shape == (M, 4, 1, WIDTH) and outputs.dtype == jnp.float16
    assert_close(outputs, np.stack([forward(module, layers, x) for x in batch[0]]), 1e-3)


def test_a_mesh_with_only_a_pipe_axis():
    module = tied()
    pipe = jaxpipe.Pipeline(module, jax.sharding.Mesh(np.asarray(jax.devices()[:3]), ("pipe",)), M)
    batch = make_batch(M)
    params = pipe.init(jax.random.key(0), batch[0][0])
    loss, logits = pipe.evaluate(params, batch, return_logits=True)
    assert logits.sharding.device_set == {jax.devices()[2]}
    assert float(pipe.evaluate(params, batch, bcast_loss=False)) == float(loss)
    explicit = jax.make_mesh((2,), ("pipe",), axis_types=(jax.sharding.AxisType.Explicit,))
    with pytest.raises(MeshError, match="Make the mesh with jaxpipe.make_mesh"):
        jaxpipe.Pipeline(module, explicit, M)


def test_a_further_axis_is_left_to_the_compiler():
    """Tensor parallelism by annotation: the weights of each block are cut over "model", and so are its activations."""
    mesh = jaxpipe.make_mesh(pipe=2, data=2, model=2)

    def apply(p, x):
        up = jax.lax.with_sharding_constraint(x @ p["up"], jax.NamedSharding(mesh, jax.P(None, None, "model")))
        return x + jnp.tanh(up) @ p["down"]

    def init(key, x):
        a, b = jax.random.split(key)
        return {"up": jax.random.normal(a, (WIDTH, 32)) / 3, "down": jax.random.normal(b, (32, WIDTH)) / 6}

    layers = [jaxpipe.LayerSpec(Embedding), *[jaxpipe.Layer(init, apply, "Block")] * 4, jaxpipe.LayerSpec(LinenHead)]
    module = jaxpipe.PipelineModule(layers, cross_entropy)
    pipe = jaxpipe.Pipeline(module, mesh, M)
    batch = make_batch(M)
    params = pipe.init(jax.random.key(0), batch[0][0])
    assert module.partition(2, batch[0][0]) == pipe.partition
    loss, grads = pipe.value_and_grad(params, batch)

    def plain(p, x):
        return x + jnp.tanh(x @ p["up"]) @ p["down"]

    layers[1:5] = [jaxpipe.Layer(init, plain, "Block")] * 4
    oracle = jaxpipe.PipelineModule(layers, cross_entropy)
    wanted = jaxpipe.reference.value_and_grad(oracle, pipe.to_layers(params), batch)
    assert_close((loss, pipe.to_layers(grads)), jax.device_get(wanted), 2e-6)
    _, logits = pipe.evaluate(params, batch, return_logits=True)
    assert logits.shape == (M, 4, 5, 11)


def test_like_layers_that_change_the_shape_are_not_scanned():
    def flatten(x):
        return x.reshape(x.shape[0], -1)

    def loss(y, t):
        return (y**2).mean()

    module = jaxpipe.PipelineModule([jaxpipe.LayerSpec(Embedding), flatten, flatten, flatten], loss, [0, 1, 4])
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2), M)
    batch = make_batch(M)
    params = pipe.init(jax.random.key(0), batch[0][0])
    loss_, grads = pipe.value_and_grad(params, batch)
    wanted = jaxpipe.reference.value_and_grad(module, pipe.to_layers(params), batch)
    assert_close((loss_, pipe.to_layers(grads)), jax.device_get(wanted), 1e-6)


def test_short_floats_are_summed_in_long_ones():
    """600 micro-batches: a bfloat16 counter stops at 256."""
    table = jaxpipe.Layer(lambda key, x: {"t": jnp.ones((11, 4), jnp.bfloat16)}, lambda p, ids: p["t"][ids], "Table")
    module = jaxpipe.PipelineModule([table, lambda x: x * 2], lambda y, t: y.mean())
    many = 600
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2), many)
    batch = (np.zeros((many, 2, 3), np.int32), None)
    params = pipe.init(jax.random.key(0), batch[0][0])
    loss, grads = pipe.value_and_grad(params, batch)
    assert float(loss) == float(pipe.evaluate(params, batch)) == 2.0
    grad = pipe.to_layers(grads)[0]["t"]
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(grad[0], np.float32), 0.5, rtol=1e-2)


class TrainOnly(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        return linen.Dropout(0.5, deterministic=not train)(linen.Dense(WIDTH)(x))


class Table(nnx.Module):
    """A constant as a plain attribute; `random` makes it one that should have been a param."""

    def __init__(self, random: bool, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(WIDTH))
        self.table = jax.random.normal(rngs.params(), (WIDTH,)) if random else jnp.arange(float(WIDTH))

    def __call__(self, x):
        return x * jnp.broadcast_to(self.scale[...] + self.table, x.shape)


def test_flax_modules():
    layers = [
        jaxpipe.LayerSpec(Embedding),
        jaxpipe.LayerSpec(TrainOnly),
        jaxpipe.LayerSpec(Table, False),
        jaxpipe.LayerSpec(LinenHead),
    ]
    module = jaxpipe.PipelineModule(layers, cross_entropy)
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2), M)
    batch = make_batch(M)
    params = pipe.init(jax.random.key(0), batch[0][0])
    plain, _ = pipe.value_and_grad(params, batch)  # without a key there is no dropout
    assert_close(plain, pipe.evaluate(params, batch), 1e-6)
    dropped, _ = pipe.value_and_grad(params, batch, jax.random.key(1))
    assert abs(float(plain) - float(dropped)) > 1e-3
    with pytest.raises(LayerError, match="the attribute 'table' is a random array but not an nnx.Param"):
        jaxpipe.PipelineModule([jaxpipe.LayerSpec(Table, True)], cross_entropy)
    with pytest.raises(LayerError, match="leave `rngs` out"):
        jaxpipe.PipelineModule([jaxpipe.LayerSpec(Table, False, rngs=nnx.Rngs(0))], cross_entropy)


def test_inside_a_hand_written_compiled_step():
    pipe = jaxpipe.Pipeline(tied(), jaxpipe.make_mesh(pipe=2, data=2), M)
    batch = make_batch(M)
    params = pipe.init(jax.random.key(0), batch[0][0])
    optimizer = optax.sgd(0.1)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch):
        loss, grads = pipe.value_and_grad(params, batch)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(3):
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    assert losses[2] < losses[1] < losses[0]
