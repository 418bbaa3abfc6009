"""Leaves are brought as they are; with one process nothing is sent. Several: tests/contracts/test_processes_weights.py."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.errors import LayerError
from jaxpipe.layout.bring import Brought
from jaxpipe.processes.group import Group

MESH = jaxpipe.make_mesh(pipe=2)


def test_leaves_by_layer_and_number():
    mine = np.ones(3)
    brought = Brought(MESH, [{"b": jnp.arange(2), "a": mine}, {}, {"c": 1.5}])
    assert brought.leaf(0, 0)({0}) is mine
    found = brought.leaf(0, 1)({0})
    assert isinstance(found, np.ndarray) and found.tolist() == [0, 1]
    assert brought.leaf(2, 0)({0}) == 1.5


def test_arrays_of_processes_that_take_no_part_are_refused(monkeypatch):
    group = types.SimpleNamespace(members=(0, 1), holders=lambda leaves: [[2]] * len(leaves))
    monkeypatch.setattr(Group, "of", lambda mesh: group)
    with pytest.raises(LayerError, match=r"processes that have none in the mesh.*jaxpipe.fetch\(layers\)"):
        Brought(MESH, [{"w": np.ones(2)}])
