"""Layers of one rank, and piles: what a rank takes is what is stored, and what it adds comes back to where it is stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.executor import owned, owned_places
from jaxpipe.executor.owned import Owned
from jaxpipe.layout.entries import Pile, Shared
from jaxpipe.layout.layout import PILED, SHARED, Address
from jaxpipe.layout.placement import Placement
from jaxpipe.layout.stages import Part
from jaxpipe.model.layers import Kind
from tests.compare import assert_close

RANKS = 3
rng = np.random.default_rng(0)
KIND = Kind(lambda key, x: {}, lambda p, x: x)


def floats(*shape):
    return rng.normal(size=shape).astype(np.float32)


STORED = {
    "0_Embed": {"ids": np.arange(6, dtype=np.int32), "w": floats(12, 4)},
    **{f"{i}_Block": {"b": floats(5), "w": floats(3, 6)} for i in (1, 2, 3)},
    "4_Odd": {"k": floats(5, 2, 3), "fixed": floats(9)},
    "5_Head": {"w": floats(4, 12)},
}
CUT = {"ids": 0, "w": 0, "b": None, "k": 2, "fixed": 0}
OWNERS = {"0_Embed": 0, "4_Odd": 1, "5_Head": 2}
BLOCKS = Pile("Block", {1: (0, 0), 2: (0, 1), 3: (2, 0)}, {i: f"{i}_Block" for i in (1, 2, 3)})
FROZEN = {"4_Odd": frozenset([0])}  # "fixed", the first one by name


def placement(name, leaf):
    dim = 1 if name in ("5_Head", "1_Block", "2_Block", "3_Block") and leaf == "w" else CUT[leaf]
    return Placement() if dim is None else Placement((("pipe", dim),))


def entries():
    found = {}
    for number, (name, leaves) in enumerate(STORED.items()):
        avals = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), leaves)
        found[name] = Shared(name, number, avals, {leaf: placement(name, leaf) for leaf in leaves})
    return found


@pytest.fixture(params=[True, False], ids=["tiled", "linear"])
def residence(request, monkeypatch):
    monkeypatch.setattr(owned_places, "SMALL", 40)
    monkeypatch.setattr(owned_places, "ALIGNED", 1)
    monkeypatch.setattr(owned, "on_tpu", lambda mesh: request.param)
    return Owned(entries(), jaxpipe.make_mesh(pipe=RANKS), OWNERS, {"Block": BLOCKS}, FROZEN)


PARTS = {
    "0_Embed": (0, Part(KIND, 0, address=Address(SHARED, "0_Embed"))),
    "4_Odd": (1, Part(KIND, 0, address=Address(SHARED, "4_Odd"))),
    "5_Head": (2, Part(KIND, 0, address=Address(SHARED, "5_Head"))),
    "1_Block": (0, Part(KIND, 0, address=Address(PILED, "Block"), slot=0)),
    "2_Block": (0, Part(KIND, 0, address=Address(PILED, "Block"), slot=1)),
    "3_Block": (2, Part(KIND, 0, address=Address(PILED, "Block"), slot=0)),
    "both": (0, Part(KIND, 0, 2, address=Address(PILED, "Block"), slot=0)),
}


def test_there_and_back(residence):
    specs = {name: jax.tree.map(lambda p: p.spec, entry.placements) for name, entry in residence.entries.items()}
    both = jax.tree.map(lambda *a: np.stack(a), STORED["1_Block"], STORED["2_Block"])
    wanted = {**STORED, "both": both}

    def work(stored, rank):
        held = residence.enter(stored, rank[0])
        taken = {name: residence.take(held, part, jnp.int32(0)) for name, (_, part) in PARTS.items()}
        trained = residence.trained(held)
        sums = jax.tree.map(jnp.zeros_like, trained)
        # Each rank adds twice what it has taken, and nothing of what is frozen.
        for name, (owner, part) in PARTS.items():
            leaves = [a for key, a in sorted(taken[name].items()) if key not in ("ids", "fixed")]
            mine = [jnp.where(rank[0] == owner, 2.0, 0.0) * a for a in leaves]
            sums = residence.add(sums, part, 0, mine)
        assert {a for a, b in trained.items() if b is None} == {"vector: float32, frozen"}
        return jax.tree.map(lambda a: a[None], taken), residence.leave(sums, rank[0])

    back_specs = {**specs, "4_Odd": {"k": specs["4_Odd"]["k"], "fixed": None}}
    run = jax.shard_map(
        work, mesh=residence.mesh, in_specs=(specs, P("pipe")), out_specs=(P("pipe"), back_specs), check_vma=False
    )
    taken, back = jax.device_get(jax.jit(run)(STORED, jnp.arange(RANKS)))
    for name, (owner, _) in PARTS.items():
        assert_close(jax.tree.map(lambda a, owner=owner: a[owner], taken[name]), wanted[name], 0, name)
    assert back["4_Odd"]["fixed"] is None and (back["0_Embed"]["ids"] == 0).all()
    for name, leaves in STORED.items():
        times = 4 if name in ("1_Block", "2_Block") else 2  # these were added to twice
        for leaf in leaves.keys() - {"ids", "fixed"}:
            assert_close(back[name][leaf], times * leaves[leaf], 1e-6, f"{name} {leaf}")


def test_a_rank_holds_as_much_as_the_fullest(residence):
    assert (len(residence.places.rooms), len(residence.places.vectors)) in ((1, 3), (0, 4)), "Embed and Head share one"
    held = sum(a.size for a in jax.tree.leaves(residence.avals()) if a.dtype == jnp.float32)
    assert held <= 1.01 * (48 + 2 * (5 + 18)) + 9  # the first rank's, and what is frozen on another one


def test_gradients_are_added_in_the_order_of_the_dims_of_a_room_that_two_read_in_unlike_orders(residence):
    """On TPU; otherwise its compiler copies the sums in every tick. Vectors have one order."""
    _, part = PARTS["5_Head"]
    sums = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), residence.avals())
    text = jax.jit(lambda sums, g: residence.add(sums, part, 0, [g])).lower(sums, STORED["5_Head"]["w"]).as_text()
    assert ("LayoutConstraint" in text) == owned.on_tpu(residence.mesh)
