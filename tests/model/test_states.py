"""State of layers: the form it keeps, and which of it a layer changes."""

import jax
import jax.numpy as jnp
import pytest

from jaxpipe.model.blame import Fault
from jaxpipe.model.states import changes, check_state, paths_of, settled

OLD = {"mean": jnp.zeros(3), "n": jnp.int32(0)}


def test_state_keeps_its_form():
    new = settled(OLD, {"mean": jnp.full(3, 0.5, jnp.bfloat16), "n": jnp.int32(1)})
    assert new["mean"].dtype == jnp.float32 and (new["mean"] == 0.5).all() and new["n"] == 1
    same = settled(OLD, dict(OLD))
    assert same["mean"] is OLD["mean"], "what is not changed stays the same object, which a trace shows"


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ({"mean": jnp.zeros(3)}, "changes the structure of its state from .*make every entry in init"),
        ({"mean": jnp.zeros(4), "n": jnp.int32(0)}, r"'mean' from float32\[3\] to float32\[4\]"),
        ({"mean": jnp.zeros(3), "n": jnp.float32(0)}, r"'n' from int32\[\] to float32\[\]"),
        ({"mean": jnp.zeros(3, int), "n": jnp.int32(0)}, "'mean' from float32"),
    ],
)
def test_another_form_is_refused(new, message):
    with pytest.raises(Fault, match=message):
        settled(OLD, new)


def test_keys_are_no_state():
    check_state(OLD)
    with pytest.raises(Fault, match="the PRNG key 'inner/key' in its state"):
        check_state({"inner": {"key": jax.random.key(0)}})


def test_which_leaves_a_layer_changes():
    def layer(x, state):
        kept = jax.jit(lambda table: table)(state["table"])  # inside of a call it is another object
        return x * state["n"].astype(x.dtype), {**state, "n": state["n"] + 1, "table": kept}

    state = {**OLD, "table": jnp.ones(2)}
    traced = jax.make_jaxpr(layer)(jnp.ones(2), state)
    assert changes(traced, 1, 1, 3) == (False, True, False)
    assert paths_of(state, (False, True, False)) == ["n"] and paths_of(jnp.ones(1), (True,)) == ["it"]
    swapped = jax.make_jaxpr(lambda x, a, b: (x, b, a))(jnp.ones(2), jnp.ones(3), jnp.ones(3))
    assert changes(swapped, 1, 1, 2) == (True, True), "what is another one's is changed"
