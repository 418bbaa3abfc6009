"""Dims that equations take apart are whole, so that XLA permutes nothing along a further axis inside of an op."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.executor.whole_dims import _regrouped, with_whole_dims
from tests.compare import assert_close

# name: a function of an array [4, 8, 16] whose last dim is cut over 4 devices
FUNCTIONS = {
    "split": lambda x: jnp.concatenate([a * i for i, a in enumerate(jnp.split(x, [4, 9], -1), 2)], -1),
    "stride": lambda x: x[..., 1:14:3],
    "pad": lambda x: jnp.pad(x, ((0, 0), (0, 0), (1, 2))),
    "rev": lambda x: x[..., ::-1] + jnp.roll(x, 1, -1),
    "pool": lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 3), (1, 1, 1), "SAME"),
    "conv": lambda x: jax.lax.conv(x, jnp.arange(24.0).reshape(1, 8, 3), (1,), "SAME"),
    "fft": lambda x: jnp.fft.fft(x).real,
    "reshape": lambda x: x.reshape(4, 8, 2, 8)[:, :, :, ::2].sum(2) * 2,
    "scan": lambda x: jax.lax.scan(lambda c, a: (c, jax.checkpoint(lambda b: jnp.split(b, [5], -1)[0])(a)), 0.0, x)[1],
    "grad": jax.grad(
        lambda x: (x[..., 1:].cumsum(-1) * jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x[..., :-1])).sum()
    ),
}


def made_on(mesh, function):
    cut = P(None, None, "model")
    run = jax.shard_map(
        lambda x: function(jax.lax.with_sharding_constraint(x, cut)),
        mesh=mesh,
        in_specs=P(),
        out_specs=P(),
        axis_names={"pipe", "data"},
        check_vma=False,
    )
    return jax.jit(run)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_is_permuted(name):
    function = FUNCTIONS[name]
    x = np.random.default_rng(0).normal(size=(4, 8, 16)).astype(np.float32)
    run = made_on(jaxpipe.make_mesh(pipe=2, model=4), with_whole_dims(function))
    assert " collective-permute" not in (run.lower(x).compile().as_text() or "")
    assert_close(run(x), function(x), 1e-5)


def test_without_further_axes_the_function_is_run_as_it_is():
    mesh, x = jaxpipe.make_mesh(pipe=2, model=1), jnp.ones((4, 8, 16))
    plain, kept = (
        made_on(mesh, f).lower(x).as_text() for f in (FUNCTIONS["split"], with_whole_dims(FUNCTIONS["split"]))
    )
    assert kept == plain


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ((4, 8), (4, 2, 4), ({1}, {1, 2})),
        ((4, 16), (4, 4, 4), (set(), set())),
        ((3, 4, 5), (12, 5), ({0, 1}, {0})),
        ((1, 8), (8, 1), (set(), set())),
        ((), (1, 1), (set(), set())),
        ((0, 4), (4, 0), (set(), set())),
    ],
)
def test_dims_of_a_reshape(before, after, found):
    assert _regrouped(before, after, [4]) == found
