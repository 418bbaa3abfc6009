"""Several stages per rank, wherever they lie: it computes what one device does, and weights stay where they are."""

import re

import jax
import numpy as np
import pytest

import jaxpipe
from jaxpipe import schedules
from jaxpipe.errors import ConfigError, PartitionError, ScheduleError
from jaxpipe.executor.options import Options
from tests import generation, stateful_models
from tests.checkpoint.on_disk import arrays_of, assert_identical
from tests.compare import assert_close
from tests.contracts.test_compiled import is_acyclic, permutes
from tests.engines import M, batches, engine_for, stream
from tests.lowering.programs import in_random_order, loop_of, v_of
from tests.models import MODELS, WIDTH, LinenHead, cross_entropy, make_batch, tied
from tests.models import Block as BlockModule
from tests.models import Embedding as EmbeddingModule

# placement, data, micro-batches, remat, dropout, model, boundaries
GRADIENTS = {
    "a V": (v_of(3), 1, 4, 2, True, "tied", [0, 2, 3, 4, 6, 8, 9]),
    "a V of unlike layers": (v_of(2), 2, 2, "dots", False, "mixed", [0, 2, 5, 6, 9]),
    "one rank": (loop_of(1, 3), 1, 3, "layer", True, "mixed", [0, 3, 6, 9]),
    "anywhere": ((2, 0, 1, 1, 0, 2, 0), 1, 3, "stage", True, "untied", [0, 2, 3, 4, 5, 7, 8, 9]),
    "one stage here and three there": ((1, 0, 1, 1), 2, 5, "layer", False, "tied", [0, 3, 5, 8, 9]),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_and_evaluation_equal_the_oracle(name):
    """All run poisoned: what nothing was written to, and what has been read, holds NaN."""
    placement, data, num_micro_batches, remat, dropout, model, partition = GRADIENTS[name]
    module = MODELS[model](partition)
    table = in_random_order(placement, num_micro_batches, seed=len(name))
    mesh = jaxpipe.make_mesh(pipe=1 + max(placement), data=data)
    pipe = jaxpipe.Pipeline(module, mesh, num_micro_batches, table, remat, poison=True)
    batch = make_batch(num_micro_batches)
    params = pipe.init(jax.random.key(1), batch[0][0])
    key = jax.random.key(2) if dropout else None
    loss, grads = pipe.value_and_grad(params, batch, key)
    layers = pipe.to_layers(params)
    wanted = jaxpipe.reference.value_and_grad(module, layers, batch, key, num_data_ranks=data)
    assert_close(loss, wanted[0], 1e-6, "loss")
    assert_close(pipe.to_layers(grads), wanted[1], 1e-6, "layers")
    # Two micro-batches more, in one program, on the same placement.
    batch = make_batch(num_micro_batches + 2, seed=5)
    found, logits = pipe.evaluate(params, batch, return_logits=True, reduce_output=None)
    outputs = np.stack([jaxpipe.reference.forward(module, layers, inputs) for inputs in batch[0]])
    assert_close(jax.device_get(logits), outputs, 1e-5, "logits")
    terms = [module.loss_fn(y, t) for y, t in zip(outputs, batch[1], strict=True)]
    each = [float(t.total / t.weight if isinstance(t, jaxpipe.Weighted) else t) for t in terms]
    assert_close(jax.device_get(found), np.asarray(each, np.float32), 1e-6, "losses")


def test_state_of_layers():
    model = stateful_models.module(stateful_models.UNEVEN[4])
    table = in_random_order(v_of(2), 3, 1, in_order=True)
    pipe = jaxpipe.Pipeline(model, jaxpipe.make_mesh(pipe=2, data=2), 3, table, poison=True)
    batch = stateful_models.make_batch(3)
    params, _, after = stateful_models.check_with_oracle(pipe, batch, 2)
    loss = pipe.evaluate(params, batch, layer_state=after)
    one = jaxpipe.Pipeline(model, jaxpipe.make_mesh(pipe=4), 3)
    assert_close(
        loss, one.evaluate(one.from_layers(pipe.to_layers(params)), batch, layer_state=after), 1e-6, "evaluation"
    )


def test_state_wants_the_micro_batches_in_order():
    model = stateful_models.module(stateful_models.UNEVEN[4])
    pipe = jaxpipe.Pipeline(model, jaxpipe.make_mesh(pipe=2), 3, in_random_order(loop_of(2, 2), 3, 1))
    with pytest.raises(ScheduleError, match="have to come in the order 0, 1, 2"):
        pipe.init(1, stateful_models.make_batch(3)[0][0])


def test_checkpoints_load_on_another_placement(tmp_path):
    """Three chunks on two ranks, then 1F1B at S = 3 and zero_stage 1, then a V: bit by bit, and then the same step."""
    writer = engine_for(tied(), stages=2, schedule=in_random_order(loop_of(2, 3), M, 4))
    for batch in batches(2):
        writer.train_batch(stream([batch]))
    writer.save_checkpoint(tmp_path, "a")
    for tag, stages, data, options in (
        ("b", 3, 2, {"zero_stage": 1}),
        ("c", 2, 1, {"schedule": in_random_order(v_of(2), M, 4)}),
    ):
        reader = engine_for(tied(), stages, data, key=jax.random.key(77), **options)
        reader.load_checkpoint(tmp_path)
        reader.save_checkpoint(tmp_path, tag)
        assert_identical(arrays_of(tmp_path / tag), arrays_of(tmp_path / "a"), tag)
    for engine in (writer, reader):
        engine.train_batch(stream(batches(1, first=2)))
    assert_close(jax.device_get(reader.to_layers()), jax.device_get(writer.to_layers()), 2e-6, "the next step")


def test_initial_weights_and_steps_do_not_depend_on_the_placement():
    """Adam with zero_stage 1, clipping and a frozen layer: as with one stage per rank."""
    options = {"gradient_clipping": 0.1, "zero_stage": 1, "remat": 2}
    trainable = r"layer_00[1-8]"
    chunks = engine_for(tied(), 2, 2, trainable=trainable, schedule=in_random_order((1, 0, 0, 1, 0), M, 3), **options)
    plain = engine_for(tied(), 1, 2, trainable=trainable, **options)
    assert_close(jax.device_get(chunks.to_layers()), jax.device_get(plain.to_layers()), 0, "initial weights")
    for batch in batches(3):
        losses = [engine.train_batch(stream([batch])) for engine in (chunks, plain)]
        assert_close(losses[0], losses[1], 1e-5, "loss")
    assert_close(jax.device_get(chunks.to_layers()), jax.device_get(plain.to_layers()), 1e-4, "weights")
    text = chunks.summary()
    assert "9 layers in 5 stages on 2 ranks" in text and re.search(r"^stage +rank +layers", text, re.M)
    assert chunks.partition == chunks.pipe.partition and len(chunks.partition) == 6


# ------------------------------------------------------------------------------------------- what the compiler makes


def blocks(num_layers):
    return jaxpipe.PipelineModule(
        [
            jaxpipe.LayerSpec(EmbeddingModule),
            *[jaxpipe.LayerSpec(BlockModule, WIDTH) for _ in range(num_layers - 2)],
            jaxpipe.LayerSpec(LinenHead),
        ],
        cross_entropy,
        partition_method="uniform",
    )


def compiled(module, ranks, num_micro_batches, schedule):
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=ranks), num_micro_batches, schedule)
    inputs, labels = make_batch(num_micro_batches)
    params = pipe.init(0, inputs[0])
    return pipe.lower_train(params, (inputs, labels)).compile()


def collectives(text):
    """Kinds and shapes of all collectives but permutes."""
    return sorted(re.findall(r"= (\(?\w+\[[^=]*?) (all-\w+|reduce-scatter)(?:-start)?\(", text))


def test_chunks_share_code_and_no_weights_move():
    """Sixteen layers on four ranks: as one stage of each, and as four."""
    one = compiled(blocks(16), 4, 8, "1f1b").as_text()
    four = compiled(blocks(16), 4, 8, schedules.interleaved(16, 8, 4)).as_text()
    sizes = [text.count(" = ") for text in (one, four)]
    assert sizes[1] <= 1.3 * sizes[0]
    assert collectives(four) == collectives(one), "embedding and head come to their ranks; blocks are where they are"
    found = permutes(four)
    assert all(map(is_acyclic, found))
    assert sorted(sorted(pairs) for pairs in found) == sorted(
        [[(0, 1), (1, 2), (2, 3)], [(3, 0)], [(1, 0), (2, 1), (3, 2)], [(0, 3)]]
    )


def test_a_tie_within_one_rank_is_held_there():
    """The embedding is the head of a V: both on rank 0, which no other rank needs to know."""
    module = tied([0, 3, 5, 7, 9])
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2), 2, in_random_order(v_of(2), 2, 0))
    batch = make_batch(2)
    pipe.init(0, batch[0][0])
    plan = pipe.plan(batch)
    assert not plan.weights.everywhere and pipe.layout.users(0) == {0}


def test_memory_does_not_grow_with_micro_batches():
    small, large = (compiled(blocks(8), 2, m, schedules.interleaved(4, m, 2)) for m in (4, 16))
    temp = [each.memory_analysis().temp_size_in_bytes for each in (small, large)]
    assert abs(temp[1] - temp[0]) <= 0.01 * temp[0]


# -------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("count", [1, 4, 5])
def test_the_tail_of_chunks_is_shared_where_it_comes_in_turns(count):
    """Forced, with three chunks on two ranks: M < S, M a multiple of S, and M that is none."""
    pipe = jaxpipe.Pipeline(tied(), jaxpipe.make_mesh(pipe=2), 3, "interleaved", num_chunks=3)
    params = pipe.init(0, make_batch(1)[0][0])
    batch = make_batch(count, seed=8)
    plan = pipe.evaluator.plan(batch, Options(spread=True))
    assert (plan.tail is not None) == (count != 5)
    alone, shared = (pipe.evaluate(params, batch, reduce_output=None, spread_loss=spread) for spread in (False, True))
    assert_close(shared, alone, 1e-6, "losses")


def test_evaluations_of_chunks():
    """M < S, ragged rows, metrics, the loss on its own rank, and a tail that cannot be shared."""

    def loss_fn(y, t):
        return cross_entropy(y, t), {"right": jaxpipe.metrics.Mean((y.argmax(-1) == t).mean())}

    module = tied(loss=loss_fn)
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2, data=2), 3, in_random_order(v_of(2), 3, 0))
    one = jaxpipe.Pipeline(module, jaxpipe.make_mesh(), 3)
    params = pipe.init(0, make_batch(1)[0][0])
    same = one.from_layers(pipe.to_layers(params))
    for rows, count, options in (
        (4, 1, {"return_metrics": True}),
        (5, 3, {"return_logits": True, "return_metrics": True}),
    ):
        batch = make_batch(count, rows=rows, seed=rows)
        found, wanted = (
            jax.device_get(each.evaluate(p, batch, **options)) for each, p in ((pipe, params), (one, same))
        )
        assert_close(found, wanted, 1e-5, str(options))
    alone = pipe.evaluate(params, make_batch(2), bcast_loss=False)
    assert alone.devices() <= set(pipe.mesh.devices[0].flat), "the last stage is on rank 0"


# placement, data, boundaries of the seven layers, rows, new tokens, stop
GENERATIONS = {
    "a loop": (loop_of(2, 2), 2, [0, 2, 3, 5, 7], 5, 6, None),  # two stages of unlike numbers of caches on rank 0
    "a V": (v_of(2), 1, [0, 1, 2, 6, 7], 3, 6, 9),  # both stages with caches are on one rank; the last one on rank 0
    "anywhere": ((1, 0, 0, 2, 1), 1, [0, 1, 2, 3, 5, 7], 2, 5, 9),  # fewer rows than ranks
}


@pytest.mark.parametrize("name", GENERATIONS)
def test_generated_tokens_are_those_of_one_device(name):
    placement, data, partition, rows, new, stop = GENERATIONS[name]
    module = generation.causal(partition)
    mesh = jaxpipe.make_mesh(pipe=1 + max(placement), data=data)
    pipe = jaxpipe.Pipeline(module, mesh, 2, in_random_order(placement, 2, 0), poison=True)
    ids = generation.prompts(rows)
    params = pipe.init(3, ids)
    wanted = generation.by_hand(module, pipe.to_layers(params), ids, new, stop=stop)
    np.testing.assert_array_equal(pipe.generate(params, ids, new, stop=stop), wanted)


def test_generation_without_caches_takes_the_outputs_of_the_rank_that_has_them():
    def running_mean(x):
        return jax.numpy.cumsum(x, axis=1) / jax.numpy.arange(1, 1 + x.shape[1], dtype=x.dtype)[None, :, None]

    layers = [generation.EMBED, running_mean, generation.SCALE, generation.HEAD]
    module = jaxpipe.PipelineModule(layers, partition_method="uniform")
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=2), 2, in_random_order(v_of(2), 2, 0))
    ids = generation.prompts(2)
    params = pipe.init(3, ids)
    wanted = generation.by_hand(module, pipe.to_layers(params), ids, 3)
    with pytest.warns(UserWarning, match="has no cache"):
        np.testing.assert_array_equal(pipe.generate(params, ids, 3), wanted)


# ------------------------------------------------------------------------------------------------- what is refused


def test_counts():
    table = in_random_order(loop_of(2, 3), 2, 0)
    mesh = jaxpipe.make_mesh(pipe=2)
    with pytest.raises(PartitionError, match="5 layers cannot fill 6 stages"):
        jaxpipe.Pipeline(blocks(5), mesh, 2, table).init(0, make_batch(1)[0][0])
    module = tied([0, 4, 9])
    with pytest.raises(PartitionError, match="9 layers in 6 stages need 7 boundaries"):
        jaxpipe.Pipeline(module, mesh, 2, table).init(0, make_batch(1)[0][0])
    with pytest.raises(ConfigError, match="num_chunks=2 with schedule='gpipe'"):
        jaxpipe.Pipeline(module, mesh, 2, "gpipe", num_chunks=2)
    with pytest.raises(ConfigError, match="a table brings its own number of chunks, 3"):
        jaxpipe.Config(schedule=table, num_chunks=2)
    with pytest.raises(ScheduleError, match="a table of 2 ranks and 6 stages, but the mesh has 3 ranks"):
        jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=3), 2, table)
    pipe = jaxpipe.Pipeline(tied(), mesh, 2, table, num_chunks=3)
    assert pipe.num_stages == 6 and "2 ranks x 3 chunks x 2 micro-batches" in str(pipe.program)
    assert re.search(r"rank 1 \| .*\d[FB]\d/\d", str(pipe.program)), "cells name their stage"
