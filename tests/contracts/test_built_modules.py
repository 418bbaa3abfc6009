"""Models that are built first: the model's own `__call__`, on one device, says what is right."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpipe
from jaxpipe.errors import LayerError
from tests.compare import assert_close
from tests.engines import M, engine_for, stream
from tests.models import VOCAB, WIDTH, Block, Embedding, cross_entropy, make_batch

ROOT = Path(__file__).parents[2]


class Model(nnx.Module):
    """As people write them: a loop in `__call__`, and weights that are used twice."""

    def __init__(self, *, rngs):
        self.embed = Embedding(rngs=rngs)
        self.blocks = nnx.List([Block(WIDTH, rngs=rngs) for _ in range(6)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x) * 2
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))

    def layers(self):
        return [self.embed, lambda x: x * 2, *self.blocks, self.norm, self.embed.attend]

    def put(self, parts):
        self.embed, self.blocks, self.norm = parts[0], nnx.List(parts[2:-2]), parts[-2]


def weights(model):
    return jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


BOUNDARIES = {1: [0, 10], 2: [0, 7, 10], 4: [0, 1, 5, 6, 10]}


@pytest.mark.parametrize("stages, data, remat", [(1, 2, "none"), (2, 2, "layer"), (4, 1, "none")])
def test_five_steps_and_back(stages, data, remat):
    """Loss, every gradient and five steps are those of the model itself, which stays as it was."""
    dry, tx = Model(rngs=nnx.Rngs(3)), optax.adamw(1e-2)
    for block in dry.blocks:
        block.drop.rate = 0.0  # other keys would be drawn outside
    before = weights(dry)
    engine = engine_for(
        jaxpipe.PipelineModule(dry.layers(), cross_entropy, BOUNDARIES[stages]), stages, data, tx, remat=remat
    )
    batch = make_batch(M)

    @jax.jit
    def alone(state):
        def loss(state):
            model = nnx.merge(graph, state, rest)
            return sum(cross_entropy(model(x), y) for x, y in zip(*batch, strict=True)) / M

        return jax.value_and_grad(loss)(state)

    graph, state, rest = nnx.split(dry, nnx.Param, ...)
    _, grads = engine.pipe.value_and_grad(engine.state.params, batch)
    wanted = nnx.to_pure_dict(alone(state)[1])
    found = engine.pipe.to_layers(grads)
    assert_close(found[0], wanted["embed"], 2e-6, "embed")
    assert_close(found[2:8], [wanted["blocks"][n] for n in range(6)], 2e-6, "blocks")
    assert_close(found[8], wanted["norm"], 2e-6, "norm")
    opt_state = tx.init(state)
    for _ in range(5):
        loss, grad = alone(state)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(grad, opt_state, state)
            state = optax.apply_updates(state, updates)
        assert_close(engine.train_batch(stream([batch])), loss, 2e-5)
    parts, others = engine.modules(), engine.modules()
    assert_close(weights(dry), before, 0, "the model is what it was: ")
    assert parts[2].up.kernel is not others[2].up.kernel, "of each call its own"
    assert parts[0] is parts[-1] and type(parts[2]) is Block and parts[2] is not dry.blocks[0]
    dry.put(parts)
    assert_close(weights(dry), jax.device_get(nnx.to_pure_dict(state)), 2e-4)
    logits = engine.eval_batch(stream([batch]), return_logits=True)[1]
    dry.eval()
    assert_close(np.asarray(logits), np.stack([dry(x) for x in batch[0]]), 1e-5)


def test_dropout_is_that_of_specs_and_the_oracle():
    model, batch = Model(rngs=nnx.Rngs(3)), make_batch(M)
    module = jaxpipe.PipelineModule(model.layers(), cross_entropy, BOUNDARIES[4])
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=4, data=2), M, poison=True)
    params = pipe.init(0, batch[0][0])
    assert list(pipe.layout.stacks) == ["Block"], "built modules are stacked"
    loss, grads = pipe.value_and_grad(params, batch, 5)
    layers = pipe.to_layers(params)
    wanted = jaxpipe.reference.value_and_grad(module, layers, batch, 5, num_data_ranks=2)
    assert_close((loss, pipe.to_layers(grads)), wanted, 1e-6)
    assert abs(loss - pipe.value_and_grad(params, batch)[0]) > 1e-4
    specs = [
        jaxpipe.TiedLayerSpec("e", Embedding),
        lambda x: x * 2,
        *[jaxpipe.LayerSpec(Block, WIDTH)] * 6,
        jaxpipe.LayerSpec(nnx.LayerNorm, WIDTH),
        jaxpipe.TiedLayerSpec("e", Embedding, forward_fn=Embedding.attend),
    ]
    module = jaxpipe.PipelineModule(specs, cross_entropy, BOUNDARIES[4])
    found = jaxpipe.reference.value_and_grad(module, layers, batch, 5, num_data_ranks=2)[0]
    assert_close(loss, found, 1e-6, "specs")


class Scanned(nnx.Module):
    """Several blocks in one module, which `nnx.vmap` has made and `nnx.scan` runs."""

    def __init__(self, *, rngs):
        make = nnx.vmap(lambda rngs: Block(WIDTH, 0.3, rngs=rngs))
        self.blocks = nnx.split_rngs(splits=3)(make)(rngs)

    def __call__(self, x):
        return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


class Recomputed(Scanned):
    """The same with recomputation in the loop, the way to scan a deep model."""

    def __call__(self, x):
        step = nnx.scan(nnx.remat(lambda x, block: block(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return step(x, self.blocks)


class Listed(nnx.Module):
    def __init__(self, *, rngs):
        self.blocks = nnx.List([Block(WIDTH, 0.3, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("built", [False, True], ids=["spec", "built"])
def test_modules_that_hold_several_layers(built):
    """As one layer each, alike ones stacked, with dropout."""
    rngs = nnx.Rngs(1)
    kinds = [Scanned, Scanned, Listed, Recomputed]
    layers = [kind(rngs=rngs) if built else jaxpipe.LayerSpec(kind) for kind in kinds]
    module, rng = jaxpipe.PipelineModule(layers, lambda y, t: ((y - t) ** 2).mean()), np.random.default_rng(0)
    batch = tuple(rng.normal(size=(2, 4, WIDTH)).astype(np.float32) for _ in range(2))
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2, data=2), 2, remat="none")
    params = pipe.init(0, batch[0][0])
    assert list(pipe.layout.stacks) == ["Scanned"]
    wanted = jaxpipe.reference.value_and_grad(module, pipe.to_layers(params), batch, 5, num_data_ranks=2)
    loss, grads = pipe.value_and_grad(params, batch, 5)
    assert_close((loss, pipe.to_layers(grads)), wanted, 2e-6)
    assert abs(loss - pipe.value_and_grad(params, batch)[0]) > 1e-3, "there is dropout"


def test_other_weights_compiled_from_shapes_and_checkpoints(tmp_path):
    model, other = Model(rngs=nnx.Rngs(3)), Model(rngs=nnx.Rngs(4))
    example = tuple(a[0] for a in make_batch(1))
    module = jaxpipe.PipelineModule(model.layers(), cross_entropy, BOUNDARIES[2])
    settings = {"example": example, "config": {"num_micro_batches": M, "zero_stage": 1}}
    mesh = jaxpipe.make_mesh(pipe=2, data=2)
    abstract = nnx.eval_shape(lambda: Model(rngs=nnx.Rngs(0)))
    shapes = jaxpipe.PipelineModule(abstract.layers(), cross_entropy, BOUNDARIES[2])
    assert jaxpipe.compile(shapes, optax.sgd(0.1), mesh=mesh, **settings).bytes_per_device["weights"] > 0
    given = engine_for(jaxpipe.PipelineModule(other.layers(), cross_entropy), 1).to_layers()
    engine = jaxpipe.initialize(shapes, optax.sgd(0.1), mesh=mesh, layers=given, **settings)
    assert_close(engine.to_layers(), given, 0)
    engine.save_checkpoint(tmp_path)
    back = jaxpipe.initialize(module, optax.sgd(0.1), mesh=mesh, **settings)
    assert_close(back.to_layers()[0]["table"], model.embed.table[...], 0)
    back.load_checkpoint(tmp_path)
    assert_close(back.to_layers(), given, 0)


def test_a_model_that_is_no_list_of_parts():
    model = Model(rngs=nnx.Rngs(3))
    with pytest.raises(
        LayerError, match=r"'table' of layer 0 \(Embedding\) is also 'embed.table' of layer 1 \(Model\)"
    ):
        jaxpipe.PipelineModule([model.embed, model], cross_entropy)
    assert VOCAB == 11 and jnp.isfinite(model.embed.table[...]).all()
