"""From items to a state on the devices. Pieces of several processes: tests/contracts/test_processes_checkpoints.py."""

import jax
import numpy as np

from jaxpipe.checkpoint.assembly import Assembly
from tests.checkpoint.states import homes, state, words
from tests.compare import assert_close

OF, SHARDINGS = state()
HOMES = homes(OF)


def test_out_and_in_again():
    """Into another state, which is used up; leaves that no item has of are its own."""
    other, shardings = state(1)
    kept = words(jax.device_get(other))
    expected = {item: set(names) for item, names in HOMES.expected(OF).items()}
    expected["layer_004"].discard("params/w")
    assembly = Assembly(HOMES.of_leaves, other, shardings, expected)
    for item, arrays in HOMES.items(OF):
        assembly.put(item, {name: np.asarray(a) for name, a in arrays.items() if name in expected[item]})
    made, error = assembly.place(other)
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
    assembly = Assembly(HOMES.of_leaves, other, shardings, HOMES.expected(OF))
    for item, arrays in HOMES.items(OF):
        assembly.put(item, {name: np.asarray(a) for name, a in arrays.items()})
    monkeypatch.setattr(jax, "device_put", lambda *_, **__: 1 / 0)
    made, error = assembly.place(other)
    assert isinstance(error, ZeroDivisionError)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(made))
