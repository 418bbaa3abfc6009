"""Which values between layers have weights behind them."""

import jax
import jax.numpy as jnp
import pytest

import jaxpipe
from jaxpipe.model.dependence import behind_weights, sources


def traced(function, *args):
    return [set(each) for each in sources(jax.make_jaxpr(function)(*args))]


@pytest.mark.parametrize(
    "around",
    [lambda f: f, jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))],
    ids=["plain", "jit", "checkpoint", "both"],
)
def test_sources(around):
    def function(a, b, n):
        return a * 2, b, (a > 0).astype(jnp.float32) * 3, a + jnp.sin(b), n.astype(jnp.float32)

    one = jnp.ones(2)
    assert traced(around(function), one, one, jnp.arange(2)) == [{0}, {1}, set(), {0, 1}, set()]


def test_what_is_not_known_depends_on_everything():
    @jax.custom_vjp
    def odd(a, b):
        return a, b

    odd.defvjp(lambda a, b: ((a, b), None), lambda _, g: (g[1], g[0]))
    assert traced(odd, 1.0, 2.0) == [{0, 1}, {0, 1}]
    assert (
        traced(lambda a, b: jax.lax.scan(lambda c, _: (c[::-1], None), (a, b), length=2)[0], 1.0, 2.0) == [{0, 1}] * 2
    )


def test_a_surrogate_gradient_leads_through_a_body_that_has_none():
    @jax.custom_jvp
    def step(x):
        return (x > 0).astype(x.dtype)

    step.defjvp(lambda primals, tangents: (step(*primals), tangents[0] / (1 + primals[0] ** 2)))
    for around in (lambda f: f, jax.jit, jax.checkpoint):
        assert traced(around(lambda a, b: (step(a), step(b) + a)), 1.0, 2.0) == [{0}, {0, 1}]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_mask_of_the_inputs_has_no_gradient(frozen):
    start = jaxpipe.Layer(
        lambda key, x: {"w": jnp.ones((7, 3))},
        lambda p, ids: {"h": p["w"][ids], "ids": ids, "mask": (ids > 2).astype(jnp.float32)},
    )
    block = jaxpipe.Layer(
        lambda key, x: {"w": jnp.ones((3, 3)), "n": jnp.int32(1)},
        lambda p, x: {**x, "h": x["h"] @ p["w"] * x["mask"][..., None]},
    )
    module = jaxpipe.PipelineModule([start, block, block, lambda x: x["h"] * x["mask"][..., None]], jnp.mean)
    mesh = jaxpipe.make_mesh()
    shapes = module.shapes(jax.ShapeDtypeStruct((4, 5), jnp.int32), mesh=mesh)
    found = behind_weights(shapes, module.owners, lambda layer: {0} if frozen and layer == 0 else ())
    assert found == [(), (not frozen, False), (True, False), (True, False), (True,)]
