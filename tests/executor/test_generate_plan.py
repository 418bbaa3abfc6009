"""Plans of generations, from shapes alone."""

import jax
import jax.numpy as jnp
import pytest

import jaxpipe
from jaxpipe.errors import ConfigError, LayerError
from jaxpipe.executor.generate_plan import GeneratePlan, Request, check_logits
from jaxpipe.executor.sampling import Sampling
from tests.generation import EMBED, HEAD, VOCAB, WIDTH, causal, prompts

SAMPLING = Sampling(False, 4, 2)


def plan(module, stages, rows=3, prompt=4, new=3):
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=stages))
    pipe.init(0, prompts(2))
    return GeneratePlan(pipe.layout, pipe.mesh, Request(rows * stages, prompt, new, SAMPLING), rows)


def test_like_stages_are_one_program_and_share_the_room_for_caches():
    # Embed, Attention x 2, Scale, Attention, Placed, Head: two caches in the first stage, one in the second.
    made = plan(causal([0, 3, 7]), 2)
    assert made.mixing is None and made.vocabulary == VOCAB and made.program_ids == [0, 1]
    keys, values = made.store.avals().values()  # not in one buffer, which would be copied
    assert keys.shape == values.shape == (2 * 2, 3, 7, WIDTH), "groups and layers, rows, length, width"
    prompt, token = made.codecs
    assert [leaf.shape for leaf in prompt.spec] == [(3, 4, WIDTH)] and [leaf.shape for leaf in token.spec] == [
        (3, 1, WIDTH)
    ]


def test_behind_the_last_cache_only_the_last_position_is_run():
    made = plan(causal([0, 3, 7]), 2)
    first, last = made.programs
    assert first._trim is None and last._trim == 2, "Scale, Attention, then Placed and Head"


def test_a_model_that_mixes_is_planned_no_further():
    def mean(x):
        return x - x.mean(1, keepdims=True)

    made = plan(jaxpipe.PipelineModule([EMBED, mean, HEAD], partition_method="uniform"), 2)
    assert made.mixing == (1, "reduce_sum over the positions") and not hasattr(made, "programs")


def test_logits():
    request = Request(2, 4, 3, SAMPLING)
    good = jax.ShapeDtypeStruct((1, 7, 5), jnp.float32)
    assert check_logits("layer 1", good, request) == 5
    for bad in (
        {"logits": good},
        jax.ShapeDtypeStruct((1, 7), jnp.float32),
        jax.ShapeDtypeStruct((1, 7, 5), jnp.int32),
    ):
        with pytest.raises(LayerError, match="generate needs logits.*layer 1 returns"):
            check_logits("layer 1", bad, request)
    few = jax.ShapeDtypeStruct((1, 7, 3), jnp.float32)
    with pytest.raises(ConfigError, match="top_k=4: the model knows 3 tokens"):
        check_logits("layer 1", few, request)
    with pytest.raises(ConfigError, match="stop=5 is no token: the model knows those from 0 to 4"):
        check_logits("layer 1", good, Request(2, 4, 3, Sampling(stop=5)))
