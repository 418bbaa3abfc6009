"""The norm of a gradient, against float64 on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from jaxpipe.training.norm import clipped, global_norm

rng = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (1.0, "float32"),
        (1e20, "float32"),
        (1e-25, "float32"),
        (3e38, "float32"),
        (1000.0, "float16"),
        (1e-4, "float16"),
        (1.0, "bfloat16"),
        (1e30, "bfloat16"),
        (1e-30, "bfloat16"),
        (1.0, "complex64"),
        (1e25, "complex64"),
    ],
)
def test_is_that_of_the_entries_as_they_are(scale, dtype):
    entries = rng.uniform(-1, 1, 5000)
    if dtype == "complex64":
        entries = entries + 1j * rng.uniform(-1, 1, 5000)
    array = jnp.asarray(entries * scale, dtype)
    wide = np.asarray(array).astype(np.complex128 if dtype == "complex64" else np.float64)
    tree = {"a": array[:4000], "b": [array[4000:], jnp.ones(3, jnp.int32), jnp.zeros((0, 2))]}
    found = jax.jit(global_norm)(tree)
    wanted = np.sqrt((np.abs(wide) ** 2).sum())
    if wanted > np.finfo(np.float32).max:  # the norm itself has no float32
        assert np.isinf(found)
    else:
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, wanted, rtol=2e-6)


def test_of_nothing_and_of_what_is_not_finite():
    assert global_norm({"a": jnp.zeros(4)}) == 0
    assert global_norm({"a": jnp.ones(4, jnp.int32)}) == 0
    assert np.isinf(global_norm([jnp.asarray([1.0, -np.inf])]))
    assert np.isnan(global_norm([jnp.asarray([1.0, np.nan])]))
    assert np.isnan(global_norm([jnp.asarray([1.0, np.inf]), jnp.asarray([np.nan])]))


def test_a_nan_on_all_devices_is_not_lost():
    """XLA's maximum over CPU devices is -inf then."""
    mesh = jaxpipe.make_mesh(pipe=2)
    rows = jax.NamedSharding(mesh, jax.P("pipe"))
    for rank in (0, 1, slice(None)):
        entries = np.ones((2, 3), np.float32)
        entries[rank] = np.nan
        assert np.isnan(jax.jit(global_norm)(jax.device_put(entries, rows)))


def test_clipping_in_half_precision():
    """The scale, 1e-7, is no float16."""
    grads = {"w": jnp.full((4,), 60000.0, jnp.float16), "n": jnp.ones(2, jnp.int32)}
    norm = global_norm(grads)
    with jax.numpy_dtype_promotion("standard"):
        found = clipped(grads, norm, 0.01)
    np.testing.assert_allclose(found["w"], np.full(4, 0.005), rtol=1e-3)
    assert found["n"].dtype == jnp.int32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_step_with_large_gradients_is_taken(dtype):
    """Finite gradients whose squares overflow are no reason to refuse a step; clipping then uses the right norm."""
    size = 1e20 if dtype == "float32" else 300.0
    layer = jaxpipe.Layer(
        lambda key, x: {"w": jnp.linspace(1, 2, 8, dtype=dtype)}, lambda p, x: x * p["w"][None], "Scale"
    )
    module = jaxpipe.PipelineModule([layer, layer], lambda y, t: (y * t).astype(jnp.float32).sum(), "uniform")
    example = (np.ones((2, 8), dtype), np.full((2, 8), size, dtype))
    engine = jaxpipe.initialize(
        module,
        optax.sgd(1.0),
        mesh=jaxpipe.make_mesh(pipe=2),
        example=example,
        config={"num_micro_batches": 1, "gradient_clipping": 0.5},
    )
    w = np.linspace(1, 2, 8).astype(dtype).astype(np.float64)
    grads = np.stack([2 * size * w, 2 * size * w])
    norm = np.sqrt((grads**2).sum())
    engine.train_batch(iter([example]))
    assert engine.global_steps == 1
    tolerance = {"float16": 3e-3, "bfloat16": 1e-2, "float32": 1e-5}[dtype]
    np.testing.assert_allclose(engine.grad_norm, norm, rtol=tolerance)
    moved = w - np.asarray(engine.to_layers()[0]["w"]).astype(np.float64)
    np.testing.assert_allclose(moved, grads[0] * 0.5 / norm, atol=1e-2 if dtype == "bfloat16" else 2e-3)
