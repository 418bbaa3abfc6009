"""Every item is written once, by a process that has it, and none has more to do than it must."""

import types
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.checkpoint.shares import Shares
from jaxpipe.processes.group import Group
from tests.checkpoint.crowd import Member
from tests.optimizer.layouts import mesh


def shares_of(processes, monkeypatch, within=()):
    """Those of each process; `processes[rank][data rank]` holds that device."""
    grid = np.empty(np.shape(processes), object)
    for at, process in np.ndenumerate(processes):
        grid[at] = types.SimpleNamespace(process_index=int(process))
    count = int(np.max(processes)) + 1
    found = []
    for me in range(count):
        monkeypatch.setattr(Group, "of", lambda _, me=me: Member(me, count, None, None))
        found.append(Shares(types.SimpleNamespace(devices=grid, axis_names=("pipe", "data")), within))
    return found


@pytest.mark.parametrize(
    "processes", [[[0, 0], [1, 1]], [[0, 1], [0, 1]], [[1], [0], [1], [2]], [[0, 0, 1, 1]], [[0], [0]]]
)
def test_every_item_has_one_writer_who_has_it(processes, monkeypatch):
    shares = shares_of(processes, monkeypatch)
    for rank, row in enumerate(processes):
        for number in range(6):
            writers = [me for me, each in enumerate(shares) if each.writes(rank, number)]
            assert len(writers) == 1 and writers[0] in row
        assert [each.holds(rank) for each in shares] == [me in row for me in range(len(shares))]
    turns = Counter(me for me, each in enumerate(shares) for number in range(6) if each.writes(0, number))
    assert len(set(turns.values())) == 1


def test_of_layers_in_parts_a_writer_has_all(monkeypatch):
    """Nobody has where data ranks are in several processes; then the layers are gathered."""
    for processes, writers in [
        ([[0, 0], [1, 1]], [[0], [1]]),
        ([[0, 1], [0, 1]], [[], []]),
        ([[0, 0], [0, 1]], [[0], []]),
        ([[1], [0]], [[1], [0]]),
    ]:
        assert shares_of(processes, monkeypatch, within={"data"})[0].writers == writers


def test_what_is_gathered_is_dealt(monkeypatch):
    shares = shares_of([[0], [1], [2]], monkeypatch)
    dealt = [list(each.rounds(list("abcde"))) for each in shares]
    assert dealt[0] == [(["a", "b", "c"], "a"), (["d", "e"], "d")]
    assert dealt[2] == [(["a", "b", "c"], "c"), (["d", "e"], None)]
    assert list(shares[1].rounds([])) == []


def test_one_process_leaves_arrays_where_they_are():
    array = jax.device_put(jnp.arange(4), jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec("pipe")))
    shares = Shares(mesh())
    assert shares.whole(array) is array and shares.holders == [[0], [0]]
