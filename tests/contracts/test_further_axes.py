"""Models that are cut over a further axis of the mesh, 2 x 2 x 2, against the oracle on one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.errors import ShardingError
from jaxpipe.parallel import shard_map
from tests.axes_models import GPTBlock, experts, gpt, make_batch, sequences
from tests.compare import assert_close

M = 3
MODELS = {"gpt": (gpt, "model"), "experts": (experts, "expert"), "sequences": (sequences, "sequence")}
EXAMPLE = jax.tree.map(lambda a: a[0], make_batch())


def specs(tree):
    return jax.tree.map(lambda a: a.sharding.spec, tree)


def pipeline(module, axis="model", size=2, data=2, **options):
    return jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2, data=data, **{axis: size}), M, **options)


@pytest.fixture(scope="module")
def trained():
    """Per model: the pipeline, its params, and the loss and gradients of a batch."""
    options = {"gpt": {"remat": "none"}, "experts": {"schedule": "eager_1f1b"}, "sequences": {"schedule": "gpipe"}}
    found = {}

    def get(name):
        if name not in found:
            make, axis = MODELS[name]
            pipe = pipeline(make(), axis, **options[name])
            params = pipe.init(0, EXAMPLE[0])
            found[name] = pipe, params, *pipe.value_and_grad(params, make_batch())
        return found[name]

    return get


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_oracle(name, trained):
    pipe, params, loss, grads = trained(name)
    layers = pipe.to_layers(params)
    assert_close(
        (loss, pipe.to_layers(grads)), jaxpipe.reference.value_and_grad(pipe.module, layers, make_batch()), 1e-6
    )
    assert specs(grads) == specs(params)


def test_params_are_cut_as_annotations_and_rules_say(trained):
    held = {name: specs(trained(name)[1]) for name in MODELS}
    block = held["gpt"]["stacked"]["GPTBlock"]
    assert block["up"] == {"kernel": P("pipe", None, None, "model"), "bias": P("pipe", None, "model")}
    assert block["out"] == {"kernel": P("pipe", None, "model"), "bias": P("pipe")}
    assert held["gpt"]["shared"] == {
        "0_Embedding": {"table": P("model", "pipe")},
        "4_Head": {"kernel": P("pipe", "model")},
    }
    stack = held["experts"]["stacked"]["Experts"]
    assert stack["up"] == stack["down"] == P("pipe", None, "expert") and stack["router"]["kernel"] == P("pipe")
    assert held["experts"]["shared"]["0_LinenEmbed"]["table"] == P("pipe", "expert")
    # Layers 1 and 2 are alike, and so are 3 and 4; rules see them by their own names.
    assert {n: s["qkv"] for n, s in held["sequences"]["stacked"].items()} == {
        "gathered_attention": P("pipe"),
        "swapped_attention": P("pipe", None, "sequence"),
    }


def test_weights_do_not_depend_on_the_size_of_the_axis(trained):
    pipe, params, *_ = trained("gpt")
    wanted = pipe.to_layers(params)
    for mesh in (jaxpipe.make_mesh(pipe=2, model=4), jaxpipe.make_mesh(pipe=1, data=2, model=1)):
        other = jaxpipe.Pipeline(pipe.module, mesh, M)
        assert_close(other.to_layers(other.init(0, EXAMPLE[0])), wanted, 0)


def test_evaluation(trained):
    pipe, params, loss, _ = trained("experts")
    batch = make_batch()
    found, logits = pipe.evaluate(params, batch, return_logits=True)
    assert_close(found, loss, 1e-6)
    layers = jax.device_get(pipe.to_layers(params))
    wanted = [jaxpipe.reference.forward(pipe.module, layers, jnp.asarray(x)) for x in batch[0]]
    assert_close(jax.device_get(logits), np.stack(wanted), 1e-6)


def test_layers_go_in_and_out_in_their_own_shapes(trained):
    pipe, params, *_ = trained("gpt")
    layers = pipe.to_layers(params)
    assert [jax.tree.map(jnp.shape, layer) for layer in layers[:2]] == jax.tree.map(
        jnp.shape, [pipe.module.init_layer(i, jax.random.key(0), None) for i in range(2)]
    )
    again = pipe.from_layers(jax.device_get(layers))
    assert specs(again) == specs(params)
    assert_close(again, params, 0)


# ------------------------------------------------------------------------------------------------------ five steps of adam


def test_five_steps_of_an_engine_are_those_of_one_device(no_compiles):
    module = gpt()
    engine = jaxpipe.initialize(
        module,
        optax.adam(1e-2),
        mesh=jaxpipe.make_mesh(pipe=2, data=2, model=2),
        example=EXAMPLE,
        config={"num_micro_batches": M, "gradient_clipping": 0.5},
        key=1,
    )
    layers = jax.device_get(engine.to_layers())
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2))
    state = tx.init(layers)
    data = [make_batch(M, seed=step) for step in range(5)]
    stream = iter([pair for batch in data for pair in zip(*batch, strict=True)])
    losses = [engine.train_batch(stream)]
    with no_compiles():
        losses += [engine.train_batch(stream) for _ in range(4)]
    wanted = []
    for batch in data:
        loss, grads = jaxpipe.reference.value_and_grad(module, layers, batch)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, state = jax.jit(tx.update)(jax.device_get(grads), state, layers)
            layers = jax.device_get(optax.apply_updates(layers, updates))
        wanted.append(loss)
    assert_close(losses, wanted, 1e-5)
    assert_close(jax.device_get(engine.to_layers()), layers, 2e-4)


# ------------------------------------------------------------------------------------------------------ what is compiled


def test_a_device_holds_its_part_and_no_weight_is_gathered_in_the_loop():
    """Bytes per device against the same model without the axis, and the collectives of the compiled loop."""
    wide = 64

    def block_init(key, x):
        one, two = jax.random.split(key)
        return {
            "up": jax.random.normal(one, (wide, 8 * wide)) / 8,
            "down": jax.random.normal(two, (8 * wide, wide)) / 23,
        }

    block = jaxpipe.Layer(block_init, lambda p, x: x + jnp.tanh(x @ p["up"]) @ p["down"], "Block")
    other = jaxpipe.Layer(block_init, lambda p, x: x + jnp.sin(x @ p["up"]) @ p["down"], "Other")
    rules = [("up", P(None, "model")), ("down", P("model"))]
    layers = [*[block] * 4, other]
    module = jaxpipe.PipelineModule(layers, lambda y, t: (y**2).mean(), [0, 2, 5], sharding=rules)
    found = {}
    for size in (1, 2):
        pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2, data=2, model=size), M)
        x = jax.ShapeDtypeStruct((M, 4, wide), np.float32)
        params = jax.eval_shape(lambda p=pipe: p.init(0, jax.ShapeDtypeStruct((4, wide), np.float32)))
        found[size] = pipe.lower_train(params, (x, None)).compile()
    held = {size: made.memory_analysis() for size, made in found.items()}
    layer = 2 * wide * 8 * wide * 4  # bytes of its two arrays
    weights = 2 * layer + layer // 2  # two slots of the stack, and half of the layer that occurs once
    assert weights <= held[1].argument_size_in_bytes <= 1.05 * weights
    for kind in ("argument_size_in_bytes", "output_size_in_bytes"):
        assert getattr(held[2], kind) <= 0.55 * getattr(held[1], kind)
    # Accumulators of gradients are the bulk of what is temporary.
    assert held[1].temp_size_in_bytes >= 3 * layer and held[2].temp_size_in_bytes <= 0.6 * held[1].temp_size_in_bytes
    kinds = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all)(?:-start)?\(.*op_name=\"([^\"]*)\"")
    inside = [(kind, shape) for shape, kind, name in kinds.findall(found[2].as_text()) if "/while/" in name]
    # What the model itself needs: one sum of an activation behind `down` going forward, and behind `up` going back.
    assert inside and all(kind == "all-reduce" and re.fullmatch(r"f32\[2,64\]\S*", shape) for kind, shape in inside)
    assert not re.search(
        r"(all-reduce|all-gather)", "".join(n for _, _, n in kinds.findall(found[1].as_text()) if "while" in n)
    )


def test_annotations_add_nothing_to_a_program_without_further_axes():
    pipe = jaxpipe.Pipeline(gpt(sharding=None), jaxpipe.make_mesh(pipe=2, data=2), M)
    pipe.check(EXAMPLE)
    assert "sharding_constraint" not in pipe.lower_train(pipe.layout.shapes(), make_batch()).as_text()


# --------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"axis_rules": {"embed": None, "heads": "model"}},
            r"layer_001/down/kernel: .*'mlp', which has no entry in axis_rules",
        ),
        (
            {"axis_rules": {"embed": None, "heads": "modle", "mlp": None}},
            "'heads' stands for 'modle'.*Did you mean 'model'",
        ),
        ({"sharding": [("tabel", P("model"))]}, "'tabel' matches no param.*'layer_000/table'"),
        ({"sharding": [("up/bias", P("data"))]}, "zero_stage=1"),
    ],
)
def test_rules_are_checked_before_anything_is_made(options, message):
    with pytest.raises(ShardingError, match=message):
        pipeline(gpt(**options)).init(0, EXAMPLE[0])
    with pytest.raises(ShardingError, match=message):
        jaxpipe.initialize(
            gpt(**options), optax.sgd(1.0), mesh=jaxpipe.make_mesh(model=2), example=EXAMPLE, config={}, key=0
        )


def alone(apply):
    module = jaxpipe.PipelineModule([apply] * 2, lambda y, t: (y**2).mean())
    jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2, model=2), 1).check((np.ones((4, 6), np.float32), None))


def test_collectives_that_a_layer_may_not_use():
    with pytest.raises(NameError, match="unbound axis name: model") as caught:
        alone(lambda x: jax.lax.psum(x, "model"))
    assert "jaxpipe.parallel.shard_map" in "".join(caught.value.__notes__)

    def shifted(x):
        return jax.lax.ppermute(x, "model", [(0, 1)])

    with pytest.raises(jaxpipe.errors.LayerError, match="uses jax.lax.ppermute"):
        alone(shard_map(shifted, in_specs=P("model"), out_specs=P("model"), axis_names="model"))


def test_heads_that_do_not_divide():
    mesh = jaxpipe.make_mesh(pipe=2, model=3)
    with pytest.raises(
        ShardingError, match=r"layer_001/down/kernel is float32\[32,8\].*dim 0 over model=3: 32 is no multiple"
    ):
        jaxpipe.Pipeline(gpt(sharding=[]), mesh, M).init(0, EXAMPLE[0])


def test_a_layer_may_split_and_shift_what_is_cut():
    def apply(p, x):  # the parts of the projection do not begin where those of the devices do
        q, k, v = jnp.split(x @ p["qkv"], 3, -1)
        return x + jnp.roll(q, 1, -1) * k[..., ::-1] + jax.nn.glu(jnp.tanh(v) @ p["up"])

    def init(key, x):
        return {"qkv": jax.random.normal(key, (8, 24)) / 3, "up": jax.random.normal(key, (8, 16)) / 3}

    module = jaxpipe.PipelineModule(
        [jaxpipe.Layer(init, apply)] * 3,
        lambda y, t: ((y[..., 1:] - t[..., :-1]) ** 2).mean(),
        sharding=[("", P(None, "model"))],
    )
    batch = np.random.default_rng(0).normal(size=(2, M, 4, 8)).astype(np.float32)
    pipe = pipeline(module)
    params = pipe.init(0, batch[0, 0])
    loss, grads = pipe.value_and_grad(params, tuple(batch))
    wanted = jaxpipe.reference.value_and_grad(module, pipe.to_layers(params), tuple(batch))
    assert_close((loss, pipe.to_layers(grads)), wanted, 2e-6)
    assert_close(pipe.evaluate(params, tuple(batch)), loss, 1e-6)


def test_an_annotated_module_runs_on_a_mesh_without_the_axis():
    module = jaxpipe.PipelineModule([jaxpipe.LayerSpec(GPTBlock)] * 2, lambda y, t: (y**2).mean())
    x = np.ones((4, 6, 8), np.float32)
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2), 1)
    assert specs(pipe.init(0, x))["stacked"]["GPTBlock"]["up"] == {"kernel": P("pipe"), "bias": P("pipe")}


def test_linen_layers_are_asked_for_their_axes_first():
    with pytest.raises(jaxpipe.errors.LayerError, match=r"layer 0 \(LinenEmbed\): .*Call pipe.check"):
        pipeline(experts(), "expert").from_layers([{}] * 5)
