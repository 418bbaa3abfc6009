"""What may be given for a PRNG key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.errors import ConfigError
from jaxpipe.model.keys import anywhere, as_key, init_key, layer_key, micro_batch_key
from tests.compare import assert_close


@pytest.mark.parametrize(
    "key",
    [
        3,
        np.int64(3),
        np.array(3),
        jnp.uint32(3),
        jax.random.key(3),
        jax.random.PRNGKey(3),
        np.asarray([0, 3], np.uint32),
    ],
    ids=["int", "numpy", "array", "jax", "typed", "words", "numpy words"],
)
def test_keys(key):
    assert as_key(key) == jax.random.key(3)


def test_each_layer_of_each_micro_batch_on_each_data_rank_draws_its_own():
    """The oracle calls the same functions, so that it would agree with keys that are alike."""
    root = jax.random.key(3)
    drawn = [
        *(
            layer_key(micro_batch_key(root, m, rank), layer)
            for m in range(3)
            for rank in range(3)
            for layer in range(3)
        ),
        *(init_key(root, layer) for layer in range(3)),
    ]
    assert len({jax.random.key_data(key).tobytes() for key in map(jax.device_get, drawn)}) == len(drawn) == 30


def test_kinds_of_keys():
    rbg = jax.random.key(3, impl="rbg")
    assert as_key(rbg) is rbg
    assert jax.eval_shape(as_key, jax.ShapeDtypeStruct((), np.int32)).dtype == jax.random.key(0).dtype
    assert as_key(jax.ShapeDtypeStruct((2,), np.uint32)).dtype == jax.random.key(0).dtype


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("3", "key='3' must be one PRNG key"),
        (3.0, "key=3.0 must be"),
        (True, "key=True must be"),
        (np.float32(3), "must be one PRNG key"),
        (2**70, "a seed has at most 64 bits"),
        (jax.random.split(jax.random.key(0)), r"key=key<fry>\[2\] must be one PRNG key"),
        (np.zeros((3,), np.uint32), r"key=uint32\[3\] must be"),
        (jax.random.key, "must be one PRNG key"),
    ],
    ids=["str", "float", "bool", "numpy", "huge", "two", "words", "function"],
)
def test_what_is_no_key(key, message):
    with pytest.raises(ConfigError, match=message):
        as_key(key)


def test_seeds_where_keys_are_taken():
    def init(key, x):
        return {"w": jax.random.normal(key, (3, 3))}

    def noisy(p, x, key):
        return x @ p["w"] + jax.random.normal(key, x.shape)

    module = jaxpipe.PipelineModule([jaxpipe.Layer(init, noisy)] * 2, lambda y, t: (y**2).mean())
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=1), 2)
    batch = np.ones((2, 4, 3), np.float32), None
    params = pipe.init(5, batch[0][0])
    assert_close(params, pipe.init(jax.random.key(5), batch[0][0]), 0)
    found = pipe.value_and_grad(params, batch, 7)
    assert_close(found, pipe.value_and_grad(params, batch, jax.random.PRNGKey(7)), 0)
    wanted, _ = jaxpipe.reference.value_and_grad(module, pipe.to_layers(params), batch, 7)
    assert_close(found[0], jax.device_get(wanted), 1e-6)
    with pytest.raises(ConfigError, match="must be one PRNG key"):
        pipe.value_and_grad(params, batch, "7")
    assert "main" in pipe.lower_train(params, batch, 7).as_text()


def test_a_key_may_lie_anywhere():
    module = jaxpipe.PipelineModule([jaxpipe.Layer(lambda key, x: {"w": jax.random.normal(key, (3,))}, lambda p, x: x)])
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=1, data=2))
    there, x = jax.device_put(jax.random.key(5), jax.devices()[3]), np.ones((2, 3), np.float32)
    assert_close(pipe.init(there, x), pipe.init(5, x), 0)
    on_mesh = jax.device_put(there, jax.NamedSharding(pipe.mesh, jax.P()))
    for key in (jax.random.key(5), on_mesh):
        assert anywhere(key, pipe.mesh) is key, "it need not be copied, which would wait for it"
    traced = jax.jit(lambda key: jax.random.key_data(anywhere(key, pipe.mesh)))(there)
    assert (traced == jax.random.key_data(there)).all()
