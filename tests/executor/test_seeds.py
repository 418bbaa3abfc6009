"""What backward passes start from."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.executor import seeds
from jaxpipe.executor.seeds import Seeds
from jaxpipe.model.context import Aux

F32, F64 = (jax.ShapeDtypeStruct((), np.dtype(name)) for name in ("float32", "float64"))


def test_divisors_and_scale():
    found = Seeds.of(jnp.float32(8), 6, F32, None)
    assert found.total == 0.125 and found.extra == jnp.float32(1 / 6)
    found = Seeds.of(jnp.float32(8), 6, None, jnp.float32(4))
    assert found.total == 0.5 and found.extra is None
    found = Seeds.of(jnp.float32(0), 2, F32, jnp.float32(4))
    assert found.total == 0 and found.extra == 2, "extra losses count where nothing else does"


def test_the_seed_is_as_wide_as_the_widest_loss():
    assert seeds.aval_of([Aux(), Aux({"s": F64})]) is None
    assert seeds.aval_of([Aux(losses={"a": F32}), Aux(losses={"b": F64})]) == F64
    with jax.enable_x64(True):
        assert Seeds.of(jnp.float64(1), 3, F64, None).extra == 1 / 3


def test_each_loss_of_each_layer_gets_it():
    losses = [{}, {"a": jnp.zeros((3,))}, {"a": jnp.zeros(()), "b": jnp.zeros(())}]
    found = seeds.of_losses(jnp.float32(0.5), losses)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, losses)
    assert all((leaf == 0.5).all() for leaf in jax.tree.leaves(found))
    assert seeds.of_losses(None, losses[:1]) == [{}]


def test_where_nothing_counts_no_gradient_gets_through():
    def loss(y, seed):
        through = seeds.unless_zero({"y": y, "n": jnp.int32(3)}, seed)
        return seed * jnp.sqrt(through["y"]).sum() * through["n"].astype(y.dtype)

    for seed, wanted in ((0.0, [0, 0]), (1.0, [np.inf, 0.75])):
        assert jax.grad(loss)(jnp.asarray([0.0, 4.0]), jnp.float32(seed)).tolist() == wanted
