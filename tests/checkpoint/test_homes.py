"""Between a state and items: every leaf has one home, and comes back from there."""

import jax
import numpy as np

from jaxpipe.checkpoint.homes import layer_item
from jaxpipe.checkpoint.manifest import ArraySpec
from tests.checkpoint.states import homes, state, words
from tests.compare import assert_close

OF, SHARDINGS = state()
HOMES = homes(OF)


def names_of(item):
    return set(HOMES.expected(OF)[item])


def test_items_know_nothing_of_stacks():
    params = {"params/w", "params/b", "params/steps"}
    moments = {f"opt_state/0:{moment}/{name}" for moment in ("mu", "nu") for name in ("w", "b")}
    assert names_of("layer_003") == params | moments
    assert names_of("layer_000") == {"params/e", "opt_state/0:mu/e", "opt_state/0:nu/e"}
    assert names_of("layer_001") == set(), "a layer without weights has an entry, too"
    assert names_of("state") == {"step", "key", "opt_state/0:count"}
    assert HOMES.expected(OF)["layer_004"]["params/w"] == ArraySpec("float32", (4, 4))
    assert layer_item(12) == "layer_012"


def test_arrays_are_those_of_their_layer():
    items = dict(HOMES.items(OF))
    assert list(items) == ["layer_000", "layer_002", "layer_003", "layer_004", "layer_005", "state"]
    stack = HOMES.layout.stacks["Block"]
    for layer, place in stack.places.items():
        np.testing.assert_array_equal(
            items[f"layer_{layer:03d}"]["params/w"], OF.params["stacked"]["Block"]["w"][place]
        )
    for item, arrays in items.items():
        assert {n: ArraySpec(str(a.dtype), a.shape) for n, a in arrays.items()} == HOMES.expected(OF)[item]


def test_out_and_in_again():
    """Into another state, which is used up; leaves that no item has of are its own."""
    other, shardings = state(1)
    kept = words(jax.device_get(other))
    expected = {item: set(names) for item, names in HOMES.expected(OF).items()}
    expected["layer_004"].discard("params/w")
    assembly = HOMES.assembly(other, expected)
    for item, arrays in HOMES.items(OF):
        assembly.put(item, {name: np.asarray(a) for name, a in arrays.items() if name in expected[item]})
    made, error = assembly.place(other, shardings)
    assert error is None and other.params["stacked"]["Block"]["w"].is_deleted()
    place = HOMES.layout.stacks["Block"].places[4]
    wanted = jax.tree.map(np.array, jax.device_get(words(OF)))
    wanted.params["stacked"]["Block"]["w"][place] = kept.params["stacked"]["Block"]["w"][place]
    used = np.zeros((2, 3), bool)
    for at in HOMES.layout.stacks["Block"].places.values():
        used[at] = True
    np.testing.assert_array_equal(
        made.params["stacked"]["Block"]["w"][used], wanted.params["stacked"]["Block"]["w"][used]
    )
    assert_close(words(made).params["shared"], wanted.params["shared"], 0)
    assert_close((made.step, words(made).key), (wanted.step, wanted.key), 0)
    for new, sharding in zip(jax.tree.leaves(made), jax.tree.leaves(shardings), strict=True):
        assert new.sharding.is_equivalent_to(sharding, new.ndim)


def test_an_error_on_the_way_gives_what_there_is(monkeypatch):
    other, shardings = state(1)
    assembly = HOMES.assembly(other, HOMES.expected(OF))
    for item, arrays in HOMES.items(OF):
        assembly.put(item, {name: np.asarray(a) for name, a in arrays.items()})
    monkeypatch.setattr(jax, "device_put", lambda *_, **__: 1 / 0)
    made, error = assembly.place(other, shardings)
    assert isinstance(error, ZeroDivisionError)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(made))
