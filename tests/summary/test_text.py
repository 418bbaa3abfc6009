"""The summary of an engine, against numbers that were counted by hand."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxpipe
from jaxpipe.layout import piles
from tests.engines import batches, engine_for, stream
from tests.models import tied


def dense(size_in, size_out, name, bias=False):
    def init(key, x):
        params = {"w": jax.random.normal(key, (size_in, size_out))}
        return {**params, "b": jnp.zeros(size_out)} if bias else params

    def apply(params, x):
        y = x @ params["w"]
        return y + jnp.broadcast_to(params["b"], y.shape) if bias else y

    return jaxpipe.Layer(init, apply, name)


def test_numbers_counted_by_hand(no_compiles):
    layers = [dense(3, 4, "lift"), *[dense(4, 4, "mid")] * 3, jnp.negative, dense(4, 5, "head", bias=True)]
    module = jaxpipe.PipelineModule(layers, lambda y, t: ((y - t) ** 2).mean(), partition_method=[0, 2, 6])
    engine = jaxpipe.initialize(
        module,
        optax.adam(1e-3),
        mesh=jaxpipe.make_mesh(pipe=2, data=2),
        example=(jax.ShapeDtypeStruct((8, 3), jnp.float32), jax.ShapeDtypeStruct((8, 5), jnp.float32)),
        config={"num_micro_batches": 4, "remat": "stage"},
    )
    with no_compiles():
        lines = engine.summary().splitlines()
    saved, messages = (engine.pipe.plan(_batch(), jax.random.key(0)).bytes_per_rank()[n] for n in ("saved", "messages"))
    # A product of [8, i] and [i, o] is 2 * 8 * i * o operations: 192, 256, 320, and 40 for the bias, 32 for the signs.
    # On a device: half of lift (24 bytes) and of the head's w (40), its b (20), two slots of mid (128) = 212; adam
    # keeps two such and a count. Gradients are those of head (100), which is more than lift, and of the two slots.
    assert lines == [
        "model  6 layers in 2 stages, 85 parameters (float32)",
        "step   4 micro-batches of 8 rows (4 on each data rank), schedule 1f1b, remat stage",
        "mesh   pipe 2 x data 2: 4 cpu devices in 1 process",
        "",
        "stage  layers  kinds                    parameters         FLOPs",
        "0      0-1     lift, mid                        28  33 %     448  33 %",
        "1      2-5     2 x mid, negative, head          57  67 %     904  67 %",
        "total  6                                        85        1.35 k",
        "",
        "layers  kind      stage  parameters  FLOPs  where its weights live                       why",
        "0       lift      0              12    192  own rank                                     "
        "no other rank uses it; stored cut over the ranks",
        "1       mid       0              16    256  stacked, 2 slots on each rank, 1 of 4 empty  "
        "3 alike, each rank has its own",
        "2-3     mid       1              32    512  stacked, 2 slots on each rank, 1 of 4 empty  "
        "3 alike, each rank has its own",
        "4       negative  1               0     32  none",
        "5       head      1              25    360  own rank                                     "
        "no other rank uses it; stored cut over the ranks, b whole on each rank, as no dim is a multiple of 2",
        "FLOPs: of the forward of one micro-batch on all data ranks, as XLA counts them before it optimizes.",
        "own rank: stored in equal pieces on all ranks, and brought to the one that uses it for the time of a step.",
        "",
        "bytes on each device                always  during a step",
        "weights                              212 B",
        "optimizer state                      428 B",
        "gradients                                           228 B",
        "weights of its own, from all ranks                  100 B",
        f"saved for the backward pass                         {saved} B",
        f"messages between stages                             {messages} B",
        f"total                                640 B        {(968 + saved + messages) / 1000:.2f} kB",
    ]


def _batch():
    return tuple(jax.ShapeDtypeStruct((4, 8, size), jnp.float32) for size in (3, 5))


@pytest.mark.parametrize("stages", [1, 2])
def test_tied_layers_and_a_state_that_was_donated(stages):
    engine = engine_for(tied(num_blocks=2), stages)
    before = engine.summary()
    engine.train_batch(stream(batches(1)))
    assert engine.summary() == before
    assert "Embedding (tied)" in before
    assert ("there is one rank" in before) == (stages == 1) != ("everywhere" in before)
    assert ("tied: ranks 0 1 use it; stored cut over the ranks" in before) == (stages == 2)


def test_precision_is_told():
    layers = [dense(3, 4, "lift"), *[dense(4, 4, "mid")] * 2, dense(4, 5, "head", bias=True)]
    module = jaxpipe.PipelineModule(layers, lambda y, t: ((y - t) ** 2).mean())

    def lines(**config):
        example = (jax.ShapeDtypeStruct((8, 3), jnp.float32), jax.ShapeDtypeStruct((8, 5), jnp.float32))
        mesh = jaxpipe.make_mesh(pipe=2)
        with jax.numpy_dtype_promotion("standard"):  # short products meet a long bias
            return jaxpipe.initialize(module, optax.sgd(1e-3), mesh=mesh, example=example, config=config).summary()

    found = lines(compute_dtype="bfloat16", float32_params="b$", loss_scale=8)
    assert "dtype  computes in bfloat16, adds up gradients in float32; 5 parameters of 69 not cast (b$); " in found
    assert "loss scale 8\n" in found and "85 parameters" not in found
    # In two bytes each: of its own a rank has the head's w (its b is in four) or lift; the one slot of mid is only cast.
    assert re.search(r"weights of its own, from all ranks +60 B", found)
    assert re.search(r"weights cast to bfloat16 +32 B", found)
    assert "no loss scale: gradients below 6e-8 vanish" in lines(compute_dtype="float16")
    assert "dtype  loss scale dynamic (initial 65536" in lines(loss_scale="dynamic")


def test_an_example_without_labels():
    layer = dense(3, 3, "layer")
    module = jaxpipe.PipelineModule([layer] * 2, lambda y, t: ((y - t) ** 2).mean())
    example = jax.ShapeDtypeStruct((4, 3), jnp.float32), None
    engine = jaxpipe.initialize(module, optax.sgd(0.1), mesh=jaxpipe.make_mesh(pipe=2), example=example)
    last = engine.summary().splitlines()[-1]
    assert last.split() == ["total", "36", "B"], "what a step takes cannot be said"


def test_like_layers_of_a_few_ranks(monkeypatch):
    monkeypatch.setattr(piles, "SMALL", 0)
    layers = [*[dense(4, 4, "first")] * 2, dense(4, 6, "between"), *[dense(6, 6, "second")] * 2]
    module = jaxpipe.PipelineModule(layers, lambda y, t: ((y - t) ** 2).mean(), partition_method=[0, 2, 5])
    example = tuple(jax.ShapeDtypeStruct((8, size), jnp.float32) for size in (4, 6))
    engine = jaxpipe.initialize(module, optax.sgd(0.1), mesh=jaxpipe.make_mesh(pipe=2), example=example)
    text = engine.summary()
    assert "own rank, stacked there" in text
    assert "2 alike, on 1 rank of 2: a stack would be mostly empty; stored cut over the ranks" in text
