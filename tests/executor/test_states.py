"""The state of layers on the ranks: read and changed in place, and averaged over data ranks after a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.executor import states
from jaxpipe.layout.layout import Address, Layout
from jaxpipe.layout.stages import Part, StatePlace, make_stages
from jaxpipe.layout.state_layout import state_layout
from jaxpipe.mesh import manual_axes
from jaxpipe.model.kinds import Kind

KIND = Kind(lambda key, x: {}, lambda p, x, c, train: x)
HELD = {
    "stacked": {"A": {"m": jnp.arange(8.0).reshape(4, 2), "table": jnp.arange(4)}},
    "shared": {"7_B": {"m": jnp.ones(2)}},
}
FLAGS = (True, False)


@pytest.mark.parametrize("count", [1, 2])
def test_like_layers_read_and_change_their_own_slots(count):
    part = Part(KIND, 0, count, state=StatePlace(Address("stacked", "A"), 1, FLAGS))
    found = states.take(HELD, part, 1)
    at = slice(2, 3) if count == 1 else slice(3, 5)
    if count == 2:
        part = Part(KIND, 0, count, state=StatePlace(Address("stacked", "A"), 0, FLAGS))
        found, at = states.take(HELD, part, 1), slice(2, 4)
    wanted = np.arange(8.0).reshape(4, 2)
    assert (found["m"] == (wanted[at] if count > 1 else wanted[2])).all()
    after = states.put(HELD, part, 1, jax.tree.map(lambda a: a + 100, found))
    wanted[at] += 100
    assert (after["stacked"]["A"]["m"] == wanted).all()
    assert after["stacked"]["A"]["table"] is HELD["stacked"]["A"]["table"], "no layer changes it"
    assert after["shared"] is HELD["shared"]


def test_a_layer_on_its_own_and_layers_without():
    part = Part(KIND, 0, 1, state=StatePlace(Address("shared", "7_B"), 0, (True,)))
    assert states.take(HELD, part, 0) is HELD["shared"]["7_B"]
    after = states.put(HELD, part, 0, {"m": jnp.zeros(2)})
    assert (after["shared"]["7_B"]["m"] == 0).all() and (HELD["shared"]["7_B"]["m"] == 1).all()
    bare, constant = Part(KIND, 0), Part(KIND, 0, state=StatePlace(Address("shared", "7_B"), 0, (False,)))
    assert states.take(HELD, bare, 0) == {} and states.put(HELD, bare, 0, {}) is HELD
    assert states.put(HELD, constant, 0, {"m": jnp.zeros(2)}) is HELD


def layer(width, name):
    def init(key, x):
        made = {"w": jnp.ones(width)}
        return made, {"mean": jnp.zeros(3), "n": jnp.int32(5), "on": jnp.bool_(False), "table": jnp.full(3, 0.1)}

    def apply(p, s, x):
        return x * p["w"].sum(), {"mean": s["mean"] + 1, "n": s["n"] + 1, "on": ~s["on"], "table": s["table"]}

    return jaxpipe.Layer(init, apply, name, stateful=True)


def test_what_a_step_leaves():
    """Floats are averaged; the rest is that of data rank 0; of a layer on its own only its rank knows what it became."""
    mesh = jaxpipe.make_mesh(pipe=2, data=2)
    module = jaxpipe.PipelineModule([layer(1, "A"), layer(1, "A"), layer(2, "B")])
    shapes = module.shapes(jnp.ones((2, 3)), mesh=mesh)
    layout = Layout(module, (0, 1, 3), [each.params for each in shapes])
    kept = states.States(state_layout(layout, shapes), mesh, make_stages(layout, shapes))
    specs = kept.layout.specs
    assert jax.tree.map(lambda a: a.shape, kept.avals())["stacked"]["A"]["mean"] == (1, 3)

    def one(rank, data_rank, stored):
        held = kept.enter(stored)
        assert jax.tree.map(jnp.shape, held) == jax.tree.map(lambda a: a.shape, kept.avals())
        by = 10 * rank[0] + data_rank[0]  # 0, 1, 10, 11

        def changed(a):
            return ~a if a.dtype == bool else a + by.astype(a.dtype)

        def odd(a):  # what happened to B where it does not run
            return jnp.where(rank[0] == 1, changed(a), jnp.zeros_like(a) if a.dtype != jnp.float32 else a * jnp.nan)

        def each(change, tree):
            return {name: value if name == "table" else change(value) for name, value in tree.items()}

        stacked = {"A": each(changed, held["stacked"]["A"])}
        return kept.leave(
            {"stacked": stacked, "shared": {"2_B": each(odd, held["shared"]["2_B"])}}, rank[0], data_rank[0]
        )

    run = jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(P("pipe"), P("data"), specs),
        out_specs=specs,
        axis_names=manual_axes(mesh),
        check_vma=False,
    )
    start = kept.layout.from_layers(mesh, [module.init_state(n, jax.random.key(0), jnp.ones((2, 3))) for n in range(3)])
    found = kept.layout.to_layers(jax.jit(run)(jnp.arange(2), jnp.arange(2), start))
    for index, (mean, n) in enumerate([(0.5, 5), (10.5, 15), (10.5, 15)]):
        assert (found[index]["mean"] == mean).all() and found[index]["n"] == n and bool(found[index]["on"])
        assert (found[index]["table"] == np.float32(0.1)).all()
