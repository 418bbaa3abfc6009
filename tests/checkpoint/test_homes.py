"""Between a state and items: every leaf has one home, and comes back from there."""

import numpy as np

from jaxpipe.checkpoint.homes import layer_item
from jaxpipe.checkpoint.manifest import ArraySpec
from tests.checkpoint.states import homes, state

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
