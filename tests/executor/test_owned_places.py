"""Rooms and vectors of unlike layers: no two arrays of a rank overlap, and no rank pays for much more than it needs."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpipe.executor import owned_places
from jaxpipe.executor.owned_places import Leaf, Places


def leaf(name, shape, ranks, dtype="float32", cut=0, slots=1, frozen=False):
    members = tuple((rank, tuple(f"{name}{rank}{slot}" for slot in range(slots))) for rank in ranks)
    return Leaf(name, 0, members, shape, shape, cut, dtype, 4, frozen)


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch):
    monkeypatch.setattr(owned_places, "SMALL", 8)
    monkeypatch.setattr(owned_places, "ALIGNED", 1)


def held(places):
    rooms = sum(room.slots * room.tenants[0].one for room in places.rooms.values())
    return rooms + sum(vector.length for vector in places.vectors.values())


LEAVES = st.lists(
    st.tuples(
        st.sampled_from([(4, 2), (2, 4), (8,), (4, 4), (3,), (16, 2), (5, 5)]),
        st.sets(st.integers(0, 3), min_size=1, max_size=2),
        st.integers(1, 2),
        st.booleans(),
    ),
    max_size=8,
)


@settings(max_examples=150)
@given(LEAVES, st.booleans())
def test_arrays_of_a_rank_never_overlap(found, tiled):
    owned_places.SMALL, owned_places.ALIGNED = 8, 1
    leaves = [leaf(f"L{i}", shape, sorted(r), slots=n, frozen=f) for i, (shape, r, n, f) in enumerate(found)]
    places = Places(leaves, tiled)
    for rank in range(4):
        used = []
        for name, room in places.rooms.items():
            used += [(name, 0)] * (room.on(rank) is not None)
            assert sum(rank in tenant.ranks for tenant in room.tenants) <= 1
        for name, vector in places.vectors.items():
            used += [(name, at + i) for each, at in vector.on(rank) for i in range(each.size)]
            assert all(at + each.size <= vector.length for each, at in vector.on(rank))
        assert len(set(used)) == len(used)
    placed = [t for room in places.rooms.values() for t in room.tenants]
    placed += [each for vector in places.vectors.values() for each, _ in vector.starts]
    assert sorted(map(repr, placed)) == sorted(map(repr, leaves)), "each has one place"
    for arrays in [[t for t in room.tenants] for room in places.rooms.values()]:
        assert len({each.frozen for each in arrays}) == 1
    single = [each for each in leaves if len(each.ranks) == 1]
    if len(single) == len(leaves):
        most = {
            (frozen, rank): sum(each.size for each in leaves if each.frozen == frozen and rank in each.ranks)
            for frozen, rank in itertools.product([False, True], range(4))
        }
        least = sum(max(size for (f, _), size in most.items() if f == frozen) for frozen in (False, True))
        assert held(places) <= 1.01 * least


def test_an_embedding_and_a_head_share_a_room():
    embedding, head = leaf("E", (32, 8), [0]), leaf("H", (8, 32), [3], cut=1)
    tiled, linear = Places([embedding, head], True), Places([embedding, head], False)
    [room] = tiled.rooms.values()
    assert room.on(3) == (head, (1, 0)) and room.on(0) == (embedding, (0, 1)) and room.on(1) is None
    [vector] = linear.vectors.values()
    assert vector.length == 256 and vector.on(3) == [(head, 0)] and not linear.rooms


def test_what_has_no_partner_lies_end_to_end():
    places = Places([leaf("A", (4, 4), [0]), leaf("B", (5, 3), [1]), leaf("C", (16,), [0])], False)
    assert held(places) == 32
    many = Places([leaf("A", (4, 4), [0, 1], slots=3), leaf("B", (5, 3), [2]), leaf("C", (2,), [1])], False)
    assert held(many) == 50, "a stack lies in one place on all of its ranks"


def test_an_array_that_fills_a_vector_lies_there_alone_and_is_read_without_a_copy():
    """A gain behind the largest array would make a slice of it, and XLA copies what a product reads a slice of."""
    arrays = [leaf("Head", (40, 40), [1]), leaf("Up", (30, 40), [0]), leaf("Down", (9, 40), [0])]
    gain = leaf("Gain", (7,), [1])
    places = Places([*arrays, gain], False)
    assert [(vector.length, vector.on(1)) for vector in places.vectors.values()] == [
        (1600, [(arrays[0], 0)]),
        (7, [(gain, 0)]),
    ]
    assert len(Places([*arrays, gain], True).vectors) == 1, "tiles are not numbers in a row: there it is copied anyway"
    many = Places([*arrays, *[leaf(f"Gain{i}", (7,), [1]) for i in range(3)]], False)
    assert [vector.length for vector in many.vectors.values()] == [1621], "more than a hundredth is not spent on it"
    full = Places([*arrays, leaf("More", (4, 40), [0]), gain], False)
    assert [vector.length for vector in full.vectors.values()] == [1720], "where nothing is read whole"
