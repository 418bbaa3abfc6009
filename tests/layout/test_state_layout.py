"""Where the state of layers lives, and what is said about state that does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.errors import LayerError
from jaxpipe.layout.init import init_state
from jaxpipe.layout.layout import Layout
from jaxpipe.layout.state_layout import StateLayout, state_layout
from jaxpipe.mesh import PIPE
from jaxpipe.model.precision import NO_CASTS
from tests.compare import assert_close

MESH = jaxpipe.make_mesh(pipe=2, data=2)


def counter(width, name):
    """Params and state that both depend on the key, the latter of the input's width."""

    def init(key, x):
        return {"w": jax.random.normal(key, (width,))}, {"mean": jax.random.normal(key, x.shape[1:]), "n": jnp.int32(3)}

    return jaxpipe.Layer(init, lambda p, s, x: (x * p["w"][None], {**s, "n": s["n"] + 1}), name, stateful=True)


LAYERS = [counter(4, "Alone"), jnp.tanh, *[counter(1, "Like")] * 3]
MODULE = jaxpipe.PipelineModule(LAYERS)
SHAPES = MODULE.shapes(np.ones((2, 4), np.float32), mesh=MESH)
OF = Layout(MODULE, (0, 3, 5), [each.params for each in SHAPES])
STATES = state_layout(OF, SHAPES)


def test_like_layers_are_stacked_and_others_are_whole_everywhere():
    shapes, shardings = STATES.shapes(), STATES.shardings(MESH)
    assert jax.tree.map(lambda a: a.shape, shapes) == {
        "stacked": {"Like": {"mean": (2, 2, 4), "n": (2, 2)}},
        "shared": {"0_Alone": {"mean": (4,), "n": ()}},
    }
    assert all(s.spec[0] == PIPE for s in jax.tree.leaves(shardings["stacked"]))
    assert all(s.is_fully_replicated for s in jax.tree.leaves(shardings["shared"])), "not cut, where 4 would divide"
    assert STATES.stacks["Like"].places == OF.stacks["Like"].places and not STATES.is_empty
    OF.states = None
    assert isinstance(state_layout(OF, SHAPES), StateLayout)


def test_fresh_state_is_that_of_the_init_of_each_layer():
    made = init_state(STATES, MESH, jax.random.key(7), SHAPES, NO_CASTS)
    x = jnp.zeros((2, 4))
    wanted = [MODULE.init_state(index, jax.random.key(7), x) for index in range(5)]
    assert_close(STATES.to_layers(made), wanted, 1e-6)
    assert wanted[2]["mean"][0] != wanted[3]["mean"][0] and wanted[1] == {}
    assert_close(STATES.to_layers(STATES.from_layers(MESH, jax.device_get(wanted))), wanted, 0)
    none = StateLayout(OF, [{}] * 5)
    assert none.is_empty and init_state(none, MESH, jax.random.key(0), SHAPES, NO_CASTS) == none.checked(None)


def layers(**changes):
    found = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), list(STATES.layer_params))
    found[3] = {**found[3], **changes}
    return found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"layer 0 \(Alone\) has state, such as running means, so layer_state=... is needed: what"),
        (layers()[:4], "layer_state has 4 entries, and the module has 5 layers"),
        (layers(mean=np.zeros(5, np.float32)), r"'mean' of layer 3 \(Like\) is float32\[5\], expected float32\[4\]"),
        (layers(n=np.zeros((), np.float32)), r"'n' of layer 3 \(Like\) is float32\[\], expected int32\[\]"),
        (layers(more=np.zeros(1, np.float32)), r"that of layer 3 \(Like\) is .*only one of both has \['more'\]"),
        ({"stacked": {}}, "layer_state is .*, but that of this pipeline is"),
        ("text", "layer_state is <U4"),
    ],
)
def test_what_does_not_fit(given, message):
    with pytest.raises(LayerError, match=message):
        STATES.checked(given)


def test_a_tree_that_does_not_fit_names_the_layer():
    tree = STATES.shapes()
    tree["stacked"]["Like"]["mean"] = jax.ShapeDtypeStruct((2, 1, 4), jnp.float32)
    with pytest.raises(LayerError, match=r"'mean' of layer 2 \(Like\) and those like it is float32\[2,1,4\], expected"):
        STATES.checked(tree)
    assert STATES.checked(STATES.shapes()) and len(STATES.checked(layers())) == 5


def test_state_of_a_later_use_of_a_tie_and_keys_are_refused():
    def make():
        return counter(4, "Tied")

    tie = jaxpipe.TiedLayerSpec("tie", make)
    module = jaxpipe.PipelineModule([tie, tie])
    of = Layout(module, (0, 2), [{}, {}])
    with pytest.raises(LayerError, match=r"layer 1 \(Tied\) was given state, but it is tied to layer 0"):
        StateLayout(of, [{}, {"n": jnp.int32(0)}])
    with pytest.raises(LayerError, match=r"layer 0 \(Tied\) has a PRNG key in its state"):
        StateLayout(of, [{"k": jax.random.key(0)}, {}])
