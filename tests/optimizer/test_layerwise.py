"""`init` and `update` on stacks: as on the natural tree, step after step; and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpipe.errors import ConfigError
from jaxpipe.optimizer.arguments import checked
from jaxpipe.optimizer.layerwise import Layerwise
from tests.compare import assert_close
from tests.optimizer.layouts import layout, mesh, random_params, tree

TREE = tree()


def layerwise(tx):
    shapes = layout().shapes()
    return Layerwise(
        checked(tx), layout(), mesh(), shapes, {"value": jax.ShapeDtypeStruct((), jnp.float32), "grad": shapes}
    )


def padding(params):
    (stack,) = TREE.layout.stacks.values()
    free = np.ones((2, stack.slots), bool)
    for place in stack.places.values():
        free[place] = False
    return [np.asarray(leaf)[free] for leaf in jax.tree.leaves(params["stacked"])]


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, 0.9)),
        optax.adamw(0.1, mask=lambda tree: jax.tree.map(lambda a: a.ndim > 1, tree)),
    ],
    ids=["clipped", "masked"],
)
def test_as_on_the_natural_tree(tx):
    on, params = layerwise(tx), random_params()
    natural = TREE.read(params)
    with jax.numpy_dtype_promotion("standard"):
        wanted_state = tx.init(natural)
    state = jax.jit(on.init)(params)
    assert_close(on.natural_state(state), wanted_state, 0)
    update = jax.jit(on.update)
    for step in range(2):
        grads = random_params(step + 1)
        updates, state = update(grads, state, params)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            wanted, wanted_state = tx.update(TREE.read(grads), wanted_state, natural)
        assert_close(TREE.read(updates), wanted, 2e-6)
        assert_close(on.natural_state(state), wanted_state, 2e-6)
    assert all((rows == 0).all() for rows in padding(updates))
    assert all((rows == 0).all() for stack in state.stacked.values() for rows in padding({"stacked": stack}))


def test_shardings_are_those_of_what_it_gives():
    on = layerwise(optax.adam(0.1))
    state = jax.jit(on.init, out_shardings=on.shardings())(random_params())
    jax.tree.map(
        lambda a, sharding: a.sharding.is_equivalent_to(sharding, a.ndim) or pytest.fail(), state, on.shardings()
    )


def test_extra_arguments_reach_the_update():
    def update(updates, state, params, *, value, grad):
        return jax.tree.map(lambda u, g: value * u + g, updates, grad), state

    on = layerwise(optax.GradientTransformationExtraArgs(lambda params: (), update))
    grads, params = random_params(1), random_params(0)
    run = jax.jit(lambda g, s, p: on.update(g, s, p, value=jnp.float32(3), grad=g))
    updates, _ = run(grads, jax.jit(on.init)(params), params)
    assert_close(TREE.read(updates), jax.tree.map(lambda g: 4 * g, TREE.read(grads)), 1e-6)


@pytest.mark.parametrize(
    ("init", "update", "message"),
    [
        (lambda p: (), lambda g, s, p=None: g, r"expected a pair \(updates, new state\)"),
        (lambda p: (), lambda g, s, p=None: ({}, s), r"returns the updates \{\}, which do not fit the params"),
        (lambda p: (), lambda g, s, p=None: (g, 1.0), "a state of another structure than its init"),
        (lambda p: jnp.zeros(1), lambda g, s, p=None: (g, jnp.zeros(2)), r"from float32\[1\] to float32\[2\]"),
    ],
)
def test_updates_that_cannot_be_compiled_once(init, update, message):
    with pytest.raises(ConfigError, match=message):
        layerwise(optax.GradientTransformation(init, update))


def test_what_is_no_params_tree():
    with pytest.raises(ConfigError, match="which is no params tree of this pipeline"):
        Layerwise(checked(optax.sgd(0.1)), layout(), mesh(), {"w": jnp.ones(3)}, {})
    on = layerwise(optax.sgd(0.1))
    with pytest.raises(ConfigError, match="which are no params tree of this pipeline"):
        on.update({"w": jnp.ones(3)}, on.init(random_params()), random_params())


def test_one_number_for_an_array_is_added_to_all_of_it():
    on, grads = layerwise(optax.stateless(lambda grads, _: jax.tree.map(jnp.mean, grads))), random_params(1)
    updates, _ = jax.jit(on.update)(grads, jax.jit(on.init)(random_params()), random_params())
    natural = TREE.read(grads)
    assert_close(TREE.read(updates), jax.tree.map(lambda g: jnp.full(g.shape, g.mean()), natural), 1e-6)


def rotated(tree):
    """Every array moves to the next layer that has one of its path and shape."""
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    like = {}
    for n, (path, leaf) in enumerate(flat):
        like.setdefault((jax.tree_util.keystr(path[1:]), leaf.shape), []).append(n)
    to = {n: members[(i + 1) % len(members)] for members in like.values() for i, n in enumerate(members)}
    return jax.tree.unflatten(structure, [flat[to[n]][1] for n in range(len(flat))])


@pytest.mark.parametrize("first", [lambda a: a, lambda a: 2 * a + 1], ids=["as they are", "computed"])
def test_what_belongs_to_one_layer_may_be_given_to_another(first):
    def update(grads, state, params=None):
        return jax.tree.map(first, rotated(jax.tree.map(jnp.sin, grads))), rotated(state)

    on = layerwise(optax.GradientTransformation(lambda params: params, update))
    grads, params = random_params(1), random_params(0)
    updates, state = jax.jit(on.update)(grads, jax.jit(on.init)(params), params)
    assert_close(TREE.read(updates), jax.tree.map(first, rotated(jax.tree.map(jnp.sin, TREE.read(grads)))), 1e-6)
    assert_close(on.natural_state(state), rotated(TREE.read(params)), 1e-6)


def test_keys_of_layers_that_are_joined():
    def update(grads, keys, params=None):
        first, *_ = jax.tree.leaves(keys)
        noise = jax.tree.map(
            lambda g, k: g + jax.random.normal(jax.random.fold_in(first, 1)) + jax.random.uniform(k), grads, keys
        )
        return noise, keys

    def init(params):
        root = iter(jax.random.split(jax.random.key(5), len(jax.tree.leaves(params))))
        return jax.tree.map(lambda _: next(root), params)

    on = layerwise(optax.GradientTransformation(init, update))
    grads, params = random_params(1), random_params(0)
    updates, _ = jax.jit(on.update)(grads, jax.jit(on.init)(params), params)
    assert_close(TREE.read(updates), update(TREE.read(grads), init(TREE.read(params)))[0], 1e-6)
